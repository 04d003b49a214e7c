import io
import json
import pickle
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from mcl_clip.data import decode as decode_module
from mcl_clip.data.decode import FORMATS, BadSampleError, decode_captions, decode_image, decode_negatives
from tests.unit.data.tars import noise, picture


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises a huge picture."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def refusal(data: bytes, **options) -> str:
    with pytest.raises(BadSampleError) as caught:
        decode_image(data, **options)
    assert caught.value.reason in str(caught.value)
    return caught.value.reason


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "1", "CMYK"])
def test_all_modes_become_rgb_as_pillow_does_it(kind, mode):
    image = Image.frombytes("RGB", (20, 10), noise("pixels", 600)).convert(mode)
    try:
        data = encoded(image, kind, **({"lossless": True} if kind == "WEBP" else {}))
    except (OSError, ValueError):
        pytest.skip(f"{kind} does not hold {mode}")
    decoded = decode_image(data)
    assert decoded.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(decoded), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_sixteen_bit_grey_is_scaled_not_clipped():
    grey = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    decoded = np.asarray(decode_image(encoded(Image.fromarray(grey), "PNG")))
    np.testing.assert_allclose(decoded[..., 0], grey / 257, atol=1)


def test_palettes_with_partial_transparency_do_not_warn():
    image = Image.frombytes("P", (4, 4), bytes(range(16)))
    image.putpalette(noise("palette", 48))
    data = encoded(image, "PNG", transparency=bytes(range(16)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_image(data, legacy=True).getpixel((1, 0)) == tuple(noise("palette", 48)[3:6])
        on_white = [value * 5 / 255 + 255 * 250 / 255 for value in noise("palette", 48)[15:18]]
        np.testing.assert_allclose(decode_image(data).getpixel((1, 1)), on_white, atol=1)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_only_the_first_frame_of_an_animation(kind):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert decode_image(data).getpixel((3, 3)) == (255, 0, 0)


@pytest.mark.parametrize("kind", ["TIFF", "ICO", "PPM", "EPS", "PDF", "JPEG2000"])
def test_other_formats_are_refused_by_name(kind):
    name = "jp2" if kind == "JPEG2000" else kind.lower()
    with pytest.raises(BadSampleError, match=f"^format_{name}: not one of JPEG, PNG, WEBP, GIF, BMP") as caught:
        decode_image(encoded(Image.new("RGB", (16, 16)), kind))
    assert caught.value.reason == f"format_{name}"


@pytest.mark.parametrize(
    ("start", "name"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "heic"),
        (b"\0\0\0\x20ftypisom", "video"),
        (b"\xff\x0a\xfa\x7f", "jxl"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "jxl"),
        (b"8BPS\0\1", "psd"),
        (b"\xef\xbb\xbf\n<!DOCTYPE html><html>", "html"),
        (b"<?xml version='1.0'?><svg/>", "svg"),
    ],
)
def test_formats_that_are_known_and_not_decoded_are_named(start, name):
    assert refusal(start + bytes(100)) == f"format_{name}"


@pytest.mark.parametrize("kind", FORMATS[3:])
def test_formats_of_later_versions_stay_refused_in_runs_begun_before(kind):
    data = encoded(Image.new("RGB", (16, 16), "red"), kind)
    assert decode_image(data).getpixel((3, 3)) in ((255, 0, 0), (255, 0, 1), (254, 0, 0))
    assert refusal(data, legacy=True) == f"format_{kind.lower()}"


@pytest.mark.parametrize(
    "data", [b"", b"<html>", b"\x80\x04.", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\xff\xd8", b"RIFFxxxxWEBP"]
)
def test_what_is_no_image(data):
    assert refusal(data) in ("not_an_image", "broken_image", "format_html", "format_eps")


def test_caps_hold_before_pixels_are_unpacked():
    assert refusal(bomb(9000, 9000)) == "too_many_pixels"
    assert refusal(bomb(60_000, 60_000)) == "too_many_pixels"
    assert refusal(bomb(2**31 - 1, 2**31 - 1)) in ("too_many_pixels", "broken_image")
    assert refusal(bytes((32 << 20) + 1)) == "oversize_image"
    data = picture(size=(20, 10))
    assert refusal(data, max_pixels=199) == "too_many_pixels"
    assert decode_image(data, max_pixels=200).size == (20, 10)


@pytest.mark.parametrize(("size", "is_bad"), [((1, 1_000_000), True), ((303, 3), True), ((1, 100), False)])
def test_a_picture_that_would_be_blown_up_is_bad(size, is_bad):
    data = encoded(Image.new("L", size), "PNG")
    if is_bad:
        with pytest.raises(
            BadSampleError, match=f"too_narrow: {size[0]} x {size[1]}, the limit of the aspect ratio is 100"
        ):
            decode_image(data)
    else:
        assert decode_image(data).size == size


@pytest.mark.parametrize(("width", "height"), [(0, 5), (5, 0), (0, 0)])
def test_a_picture_without_pixels_is_bad(width, height):
    assert refusal(bomb(width, height)) in ("broken_image", "not_an_image")
    with pytest.raises(BadSampleError, match=f"broken_image: {width} x {height} pixels"):
        decode_module._check_size(width, height, 100)  # what Pillow lets through differs by version


def test_a_jpeg_with_scans_without_end_is_not_decoded():
    data = encoded(Image.new("RGB", (64, 64)), "JPEG", progressive=True)
    last_scan = data[data.rfind(b"\xff\xc4") : -2]
    assert decode_image(data[:-2] + 20 * last_scan + data[-2:]).size == (64, 64)
    with pytest.raises(BadSampleError, match="broken_image: a JPEG with more than 64 scans"):
        decode_image(data[:-2] + 100_000 * last_scan + data[-2:])


@pytest.mark.parametrize("data", [b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%!PS-Adobe-3.0 EPSF-3.0\n(x) run\n"])
def test_programs_that_draw_are_no_images(data):
    with pytest.raises(BadSampleError, match=r"format_(svg|eps): not one of JPEG, PNG, WEBP"):
        decode_image(data)


def test_a_text_chunk_that_unpacks_to_much_is_bad():
    text = b"x\0\0" + zlib.compress(bytes(40 << 20))
    chunk = struct.pack(">I", len(text)) + b"zTXt" + text + struct.pack(">I", zlib.crc32(b"zTXt" + text))
    whole = encoded(Image.new("RGB", (8, 8)), "PNG")
    assert refusal(whole[:33] + chunk + whole[33:]) == "broken_image"


@pytest.mark.parametrize("kind", FORMATS)
def test_a_cut_image_is_broken(kind):
    data = encoded(Image.frombytes("RGB", (32, 32), noise("cut", 3072)), kind)
    for size in range(0, len(data) - 64, 61):
        assert refusal(data[:size]) in ("broken_image", "not_an_image", "too_many_pixels")


@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_images_raise_nothing_else(kind):
    data = encoded(Image.frombytes("RGB", (24, 24), noise("fuzz", 1728)), kind)
    rng = np.random.default_rng(0)
    bad = 0
    for _ in range(300):
        damaged = bytearray(data)
        for place in rng.integers(0, len(data) if rng.random() < 0.5 else 64, rng.integers(1, 6)):
            damaged[place] = rng.integers(256)
        try:
            decode_image(bytes(damaged), max_pixels=1_000_000)
        except BadSampleError:
            bad += 1
    assert bad > 30


def test_errors_survive_pickling():
    error = pickle.loads(pickle.dumps(BadSampleError("broken_image", "why")))
    assert (error.reason, str(error)) == ("broken_image", "broken_image: why")
    assert str(BadSampleError("empty_caption")) == "empty_caption"


def test_txt_holds_one_caption_and_lines_one_each():
    text = "  a cat \r\n\n\t\na dog\n\x85ein Bär"
    assert decode_captions(text.encode(), "lines") == ["a cat", "a dog", "ein Bär"]
    assert decode_captions(text.encode(), "txt") == ["a cat a dog ein Bär"]
    assert decode_captions(b"\xef\xbb\xbfone", "txt") == ["one"]
    assert decode_captions(b'{"caption": "x"}', "txt") == ['{"caption": "x"}']


def test_wrong_captions_are_a_string_or_a_list_and_may_be_missing():
    def decoded(value) -> list[str]:
        return decode_negatives(json.dumps(value).encode(), "json", json_key="wrong")

    assert decoded({"wrong": " a "}) == ["a"]
    assert decoded({"wrong": ["a", " ", "b" * 5000]}) == ["a", "b" * 4000]
    assert decoded({}) == decoded({"wrong": None}) == decode_negatives(b"text", "txt", json_key="wrong") == []
    for value in (3, [3], {"a": "b"}):
        with pytest.raises(BadSampleError, match="bad_negatives_type: 'wrong' must be a string or a list of strings"):
            decoded({"wrong": value})


def test_json_holds_a_string_or_a_list():
    assert decode_captions(b'{"caption": " a cat ", "n": 1}', "json") == ["a cat"]
    assert decode_captions(b'{"caption": ["a", " ", "b"]}', "json") == ["a", "b"]
    assert decode_captions(b'{"caption": "a", "alt": "b\\nc"}', "json", json_key="alt") == ["b\nc"]


@pytest.mark.parametrize(
    ("data", "text_format", "reason"),
    [
        (b"\xff\xfe", "txt", "not_utf8"),
        ("é".encode("latin-1"), "txt", "not_utf8"),
        (b"", "txt", "empty_caption"),
        (b" \n\t\n", "txt", "empty_caption"),
        (b"x" * ((64 << 10) + 1), "txt", "oversize_text"),
        (b'{"caption": "' + b"x" * (1 << 20) + b'"}', "json", "oversize_text"),
        (b"{", "json", "bad_json"),
        (b"[" * 100_000, "json", "bad_json"),
        (b"1" * 10_000, "json", "bad_json"),
        (b'["caption"]', "json", "bad_json"),
        (b"{}", "json", "no_caption_key"),
        (b'{"caption": null}', "json", "empty_caption"),
        (b'{"caption": 5}', "json", "bad_caption_type"),
        (b'{"caption": ["a", 5]}', "json", "bad_caption_type"),
        (b'{"caption": []}', "json", "empty_caption"),
        (b'{"caption": "\\ud800"}', "json", "not_utf8"),
        (b"\xff{}", "json", "not_utf8"),
        ("two dogs".encode("utf-16-le"), "txt", "not_text"),
        ("two dogs".encode("utf-16"), "txt", "not_utf8"),
        (b'{"caption": "a\\u0000b"}', "json", "not_text"),
        (json.dumps({"caption": ["x" * 3000] * 30}).encode(), "json", "oversize_text"),
    ],
)
def test_texts_that_are_refused(data, text_format, reason):
    with pytest.raises(BadSampleError) as caught:
        decode_captions(data, text_format)
    assert caught.value.reason == reason


def test_control_characters_stay_and_long_captions_are_cut():
    assert decode_captions(b"\x1b[31mred\x07", "txt") == ["\x1b[31mred\x07"]
    assert decode_captions(b"x" * 60_000, "txt") == ["x" * 4000]


def test_a_large_json_within_its_cap_is_read():
    data = json.dumps({"caption": "x", "rest": "y" * 900_000}).encode()
    assert decode_captions(data, "json") == ["x"]
