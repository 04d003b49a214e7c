"""Odd image files as they are found on the web: each is decoded right, or refused by reason, without a warning."""

import io
import struct
import warnings
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageCms

from mcl_clip.data.decode import FORMATS, BadSampleError, TrainTransform, decode_image

RED, BLUE = (250, 20, 30), (10, 40, 240)  # the left and the right half of every picture
SIZE = (40, 24)


def halves(mode: str = "RGB") -> Image.Image:
    image = Image.new("RGB", SIZE, RED)
    image.paste(BLUE, (SIZE[0] // 2, 0, *SIZE))
    return image.convert(mode)


def save(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def with_chunk(png: bytes, name: bytes, data: bytes) -> bytes:
    """Insert a chunk behind the header of a PNG."""
    return png[:33] + chunk(name, data) + png[33:]


def deep_png(color_type: int, channels: int) -> bytes:
    """A PNG of 16 bits per channel, with the halves or their first channels; alpha is opaque."""
    pixels = np.asarray(halves("RGBA" if color_type & 2 else "LA")).astype(">u2")[..., :channels] * 257
    header = struct.pack(">IIBBBBB", *SIZE, 16, color_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def segment(marker: bytes, data: bytes) -> bytes:
    return b"\xff" + marker + struct.pack(">H", len(data) + 2) + data


def after_start(jpeg: bytes, *segments: bytes) -> bytes:
    return jpeg[:2] + b"".join(segments) + jpeg[2:]


JPEG, PNG, WEBP, GIF = (save(halves(), kind) for kind in ("JPEG", "PNG", "WEBP", "GIF"))
FINE_JPEG = save(halves(), "JPEG", quality=95, subsampling=0)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
BACK = [halves().transpose(Image.Transpose.FLIP_LEFT_RIGHT)]

SHOWN: dict[str, Callable[[], bytes]] = {  # that show red and blue
    "a baseline JPEG": lambda: FINE_JPEG,
    "a progressive JPEG": lambda: save(halves(), "JPEG", progressive=True, quality=95),
    "a JPEG with restart markers": lambda: save(halves(), "JPEG", restart_marker_rows=1, quality=95),
    "a JPEG with an ICC profile": lambda: save(halves(), "JPEG", icc_profile=SRGB, quality=95),
    "a CMYK JPEG of Adobe, inverted": lambda: save(halves("CMYK"), "JPEG", quality=95),
    "a CMYK JPEG with a profile": lambda: save(halves("CMYK"), "JPEG", icc_profile=SRGB, quality=95),
    "a JPEG in RGB without conversion": lambda: save(halves(), "JPEG", keep_rgb=True, quality=95),
    "a JPEG with an empty EXIF block": lambda: after_start(FINE_JPEG, segment(b"\xe1", b"Exif\0\0")),
    "a JPEG with EXIF of rubbish": lambda: after_start(FINE_JPEG, segment(b"\xe1", b"Exif\0\0" + bytes(range(250)))),
    "a JPEG with EXIF that points beyond its end": lambda: after_start(
        FINE_JPEG, segment(b"\xe1", b"Exif\0\0II*\0\x08\0\0\0\x01\0\x0e\x01\x02\0\xff\xff\xff\x00\xff\xff\xff\x7f")
    ),
    "a JPEG with 60 kB of comments": lambda: after_start(FINE_JPEG, segment(b"\xfe", bytes(60_000))),
    "a JPEG with many empty segments": lambda: after_start(FINE_JPEG, *[segment(b"\xe5", b"")] * 500),
    "a JPEG with a broken multi-picture block": lambda: after_start(FINE_JPEG, segment(b"\xe2", b"MPF\0II*\0\xff")),
    "a JPEG followed by another one": lambda: FINE_JPEG + save(BACK[0], "JPEG"),
    "a JPEG followed by rubbish": lambda: FINE_JPEG + b"<!-- served by -->" * 20,
    "a multi-picture file of a phone": lambda: save(halves(), "MPO", save_all=True, append_images=BACK, quality=95),
    "a PNG of 16 bits per channel": lambda: deep_png(2, 3),
    "a PNG of 16 bits with alpha": lambda: deep_png(6, 4),
    "a PNG with a gamma of its own": lambda: with_chunk(PNG, b"gAMA", struct.pack(">I", 100_000)),
    "a PNG with a wrong ICC profile": lambda: with_chunk(PNG, b"iCCP", b"x\0\0" + zlib.compress(b"no profile")),
    "a PNG with an unknown chunk": lambda: with_chunk(PNG, b"xxXx", b"private"),
    "a PNG with a palette": lambda: save(halves().quantize(2), "PNG"),
    "a PNG with a palette, all opaque": lambda: save(halves().quantize(2), "PNG", transparency=b"\xff\xff"),
    "a PNG whose transparent color is not used": lambda: save(halves(), "PNG", transparency=(1, 2, 3)),
    "a PNG with opaque alpha": lambda: save(halves("RGBA"), "PNG"),
    "an animated PNG": lambda: save(halves(), "PNG", save_all=True, append_images=BACK),
    "a PNG followed by rubbish": lambda: PNG + bytes(100),
    "a lossy WebP": lambda: save(halves(), "WEBP", quality=95),
    "a lossless WebP with alpha": lambda: save(halves("RGBA"), "WEBP", lossless=True),
    "an animated WebP": lambda: save(halves(), "WEBP", save_all=True, append_images=BACK, lossless=True),
    "an animated GIF": lambda: save(halves(), "GIF", save_all=True, append_images=BACK),
    "a GIF with a comment": lambda: save(halves(), "GIF", comment=b"made by hand"),
    "a BMP": lambda: save(halves(), "BMP"),
    "an AVIF": lambda: save(halves(), "AVIF", quality=95),
    "an animated AVIF": lambda: save(halves(), "AVIF", save_all=True, append_images=BACK, quality=95),
}
REFUSED: dict[str, tuple[str, Callable[[], bytes]]] = {
    "nothing": ("not_an_image", lambda: b""),
    "one byte": ("not_an_image", lambda: b"\xff"),
    "a JPEG cut in its header": ("broken_image", lambda: JPEG[:100]),
    "a JPEG cut in its pixels": ("broken_image", lambda: JPEG[: len(JPEG) * 3 // 4]),
    "a PNG cut in its pixels": ("broken_image", lambda: PNG[: len(PNG) - 30]),
    "a PNG with a wrong checksum": ("broken_image", lambda: PNG[:-20] + b"\0" + PNG[-19:]),
    "a WebP cut in its pixels": ("broken_image", lambda: WEBP[: len(WEBP) // 2]),
    "a GIF cut in its header": ("broken_image", lambda: GIF[:8]),
    "a PNG without pixels": ("broken_image", lambda: PNG[:33] + chunk(b"IEND", b"")),
    "a JPEG of 65,500 x 65,500 pixels": ("too_many_pixels", lambda: JPEG.replace(
        struct.pack(">HH", SIZE[1], SIZE[0]), struct.pack(">HH", 65_500, 65_500))),
    "a GIF of 65,535 x 65,535 pixels": ("too_many_pixels", lambda: GIF[:6] + b"\xff\xff\xff\xff" + GIF[10:]),
    "a strip of 4 x 4,000 pixels": ("too_narrow", lambda: save(Image.new("RGB", (4, 4000)), "PNG")),
    "a page that says 404": ("format_html", lambda: b"<!DOCTYPE html><title>404 Not Found</title>"),
    "a page that begins with a byte order mark": ("format_html", lambda: b"\xef\xbb\xbf\r\n<html><body>"),
    "an error in JSON": ("not_an_image", lambda: b'{"error": "not found"}'),
    "a drawing": ("format_svg", lambda: b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>'),
    "a PDF": ("format_pdf", lambda: b"%PDF-1.7\n"),
    "a TIFF of floats": ("format_tiff", lambda: save(Image.new("F", SIZE), "TIFF")),
    "a photo of an iPhone": ("format_heic", lambda: b"\0\0\0\x24ftypheic\0\0\0\0mif1MiHEhevc" + bytes(64)),
    "a video": ("format_video", lambda: b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41" + bytes(64)),
    "a pointer of Git LFS": ("not_an_image", lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
}  # fmt: skip


@pytest.mark.parametrize("file", SHOWN)
def test_a_file_that_is_odd_but_whole_shows_what_it_holds(file):
    if "AVIF" in file and "AVIF" not in FORMATS:
        pytest.skip("this Pillow has no AVIF")
    data = SHOWN[file]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shown = {"Pillow": np.asarray(decode_image(data))}
        for jpeg in ("fast", "exact"):
            whole = TrainTransform(size_px=SIZE[::-1], scale=(1.0, 1.0), ratio=(5 / 3, 5 / 3), jpeg=jpeg)
            shown[jpeg] = whole.decode(data, "whole").permute(1, 2, 0).numpy()
    for way, pixels in shown.items():
        assert pixels.shape == (SIZE[1], SIZE[0], 3), way
        for color, x in ((RED, SIZE[0] // 4), (BLUE, SIZE[0] * 3 // 4)):
            assert np.abs(pixels[SIZE[1] // 2, x].astype(int) - color).max() < 25, (way, pixels[SIZE[1] // 2, x])


def test_a_transparent_value_of_16_bits_is_not_taken_for_one_of_8():
    values = np.full(SIZE[::-1], 7 * 257, np.uint16)
    gray = with_chunk(save(Image.fromarray(values), "PNG"), b"tRNS", struct.pack(">H", 7))
    assert decode_image(gray).getpixel((3, 3)) == (7, 7, 7)


@pytest.mark.parametrize("file", REFUSED)
def test_a_file_that_cannot_be_shown_is_refused_by_reason(file):
    reason, make = REFUSED[file]
    data = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for decode in (decode_image, *(TrainTransform(size_px=(8, 8), jpeg=jpeg).decode for jpeg in ("fast", "exact"))):
            with pytest.raises(BadSampleError) as refused:
                decode(data)
            assert refused.value.reason == reason
            assert len(str(refused.value)) < 250
