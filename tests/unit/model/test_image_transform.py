"""One way from image files to pixels: training, evaluation, `load` and the processor see the same, in every mode."""

import io
import warnings

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from mcl_clip.data.decode import FORMATS, TrainTransform, decode_image, evaluation_transform
from mcl_clip.model.clip import to_floats
from mcl_clip.model.image_transform import ORIENTATION, TURNS, exif_orientation, make_image_transform, to_rgb
from mcl_clip.model.processing_multistage_clip import MultistageCLIPImageProcessor

SIZE_PX = 48
CFG = {"size": SIZE_PX, "mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
COLUMN, ROW = np.meshgrid(np.arange(SIZE_PX) / SIZE_PX, np.arange(SIZE_PX) / SIZE_PX)
RGB = (127 + 120 * np.stack([np.sin(9 * COLUMN + ROW), np.cos(7 * ROW), np.sin(5 * (ROW - COLUMN))], 2)).astype(
    np.uint8
)
GREY = RGB[..., 0]
ALPHA = (255 * COLUMN).astype(np.uint8)


def on_white(color: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    opacity = alpha[..., None] / 255
    return color * opacity + 255 * (1 - opacity)


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=2)


def rgb() -> Image.Image:
    return Image.fromarray(RGB)


def with_alpha(mode: str) -> Image.Image:
    color = rgb().convert("L" if mode[0] == "L" else "RGB")
    color.putalpha(Image.fromarray(ALPHA))
    return color if mode == color.mode else color.convert(mode)


def palette(mode: str = "P") -> Image.Image:
    image = Image.frombytes("P", (SIZE_PX, SIZE_PX), (GREY // 4).tobytes())
    image.putpalette([channel for n in range(64) for channel in (4 * n, 255 - 4 * n, 2 * n)])
    return image.convert(mode)


def sixteen_bits(mode: str) -> Image.Image:
    order = ">" if mode.endswith("B") else "<"
    values = GREY.astype(f"{order}{'i4' if mode == 'I' else 'u2'}") * 257
    return Image.frombytes(mode, (SIZE_PX, SIZE_PX), values.tobytes())


GREY_L = np.asarray(rgb().convert("L"))
COLORS = np.stack([GREY // 4 * 4, 255 - GREY // 4 * 4, GREY // 4 * 2], axis=2)
MODES = {  # by mode: an image, and the RGB values that it shows
    "1": (Image.fromarray(GREY > 127), grey(255 * (GREY > 127))),
    "L": (Image.fromarray(GREY), grey(GREY)),
    "P": (palette(), COLORS),
    "PA": (palette("PA"), COLORS),
    "LA": (with_alpha("LA"), on_white(grey(GREY_L), ALPHA)),
    "La": (with_alpha("La"), on_white(grey(GREY_L), ALPHA)),
    "RGB": (rgb(), RGB),
    "RGBX": (rgb().convert("RGBX"), RGB),
    "RGBA": (with_alpha("RGBA"), on_white(RGB, ALPHA)),
    "RGBa": (with_alpha("RGBa"), on_white(RGB, ALPHA)),
    "CMYK": (rgb().convert("CMYK"), RGB),
    "YCbCr": (rgb().convert("YCbCr"), RGB),
    "HSV": (rgb().convert("HSV"), RGB),
    "LAB": (rgb().convert("LAB"), RGB),
    **{mode: (sixteen_bits(mode), grey(GREY)) for mode in ("I", "I;16", "I;16L", "I;16B")},
}
NEAR = {"HSV": 6, "LAB": 40, "YCbCr": 3}  # Pillow's own rounding; LAB has no saturated colors


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_pillow_becomes_the_colors_it_shows(mode):
    image, expected = MODES[mode]
    shown = to_rgb(image)
    assert shown.mode == "RGB"
    assert np.abs(np.asarray(shown).astype(int) - expected).max() <= NEAR.get(mode, 2)
    assert np.array_equal(np.asarray(to_rgb(shown)), np.asarray(shown))


def test_every_mode_of_pillow_is_known():
    """A mode that Pillow adds is looked at before it is trained on."""
    assert {mode for mode in Image.MODES if not mode.startswith("BGR;")} <= {
        *MODES,
        "F",
        "I;16N",
    }  # no file is one of these


def test_floats_are_refused_as_their_range_is_not_known():
    with pytest.raises(ValueError, match=r"mode F .* no known range of values; scale it to 0..255, convert to L"):
        to_rgb(Image.fromarray(COLUMN.astype(np.float32)))


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def files() -> dict[str, bytes]:
    """Files of every format and mode that is decoded."""
    found = {}
    for kind, modes in {
        "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
        "JPEG": ("L", "RGB", "CMYK", "YCbCr"),
        "WEBP": ("RGB", "RGBA", "L", "P"),
        "GIF": ("1", "L", "P", "RGBA"),
        "BMP": ("1", "L", "P", "RGB", "RGBA"),
        "AVIF": ("L", "RGB", "RGBA") if "AVIF" in FORMATS else (),
    }.items():
        found |= {f"{kind} {mode}": encoded(MODES[mode][0], kind) for mode in modes}
    found["PNG P, transparent color"] = encoded(palette(), "PNG", transparency=7)
    found["PNG P, partial transparency"] = encoded(palette(), "PNG", transparency=bytes(range(0, 256, 4)))
    found["PNG L, transparent grey"] = encoded(MODES["L"][0], "PNG", transparency=int(GREY[3, 3]))
    found["PNG RGB, transparent color"] = encoded(rgb(), "PNG", transparency=tuple(RGB[3, 3].tolist()))
    found["GIF P, transparent color"] = encoded(palette(), "GIF", transparency=7)
    return found | {
        f"{kind} RGB, orientation {number}": encoded(rgb(), kind, exif=turned(number))
        for kind in ("JPEG", "PNG", "WEBP", "AVIF")
        for number in TURNS
        if kind in FORMATS
    }


def turned(number: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = number
    return exif


FILES = files()


@pytest.mark.parametrize("file", FILES)
def test_training_evaluation_load_and_processor_see_the_same_pixels(file):
    """The size is that of the files, so that no way has to resize: what differs would be how they become RGB."""
    data = FILES[file]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = decode_image(data)
        whole = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "size_px": (SIZE_PX, SIZE_PX)}
        pixels = {jpeg: TrainTransform(jpeg=jpeg, **whole).decode(data, "whole") for jpeg in ("fast", "exact")}
        pixels["evaluation"] = evaluation_transform(CFG).decode(data)
    ways = {way: to_floats(of_way[None], CFG)[0] for way, of_way in pixels.items()}
    ways["load"] = make_image_transform(CFG)(Image.open(io.BytesIO(data)))
    processor = MultistageCLIPImageProcessor(
        {"height": SIZE_PX, "width": SIZE_PX}, image_mean=CFG["mean"], image_std=CFG["std"]
    )
    ways["processor"] = processor(Image.open(io.BytesIO(data)), return_tensors="pt")["pixel_values"][0]
    reference = to_floats(torch.from_numpy(np.array(expected)).permute(2, 0, 1)[None], CFG)[0]
    for way, of_way in ways.items():
        assert torch.equal(of_way, reference), way


@pytest.mark.parametrize("kind", [kind for kind in ("JPEG", "PNG", "WEBP", "AVIF") if kind in FORMATS])
@pytest.mark.parametrize("number", TURNS)
def test_photos_are_turned_upright_by_exif(kind, number):
    """The stored pixels are those of an upright photo turned the other way."""
    back = {6: 8, 8: 6}.get(number, number)
    upright = rgb().crop((0, 0, SIZE_PX, 32))
    stored = encoded(upright.transpose(TURNS[back]), kind, quality=95, exif=turned(number))
    assert exif_orientation(Image.open(io.BytesIO(stored))) == number
    for pixels in (np.asarray(decode_image(stored)), np.asarray(to_rgb(Image.open(io.BytesIO(stored))))):
        assert pixels.shape == (32, SIZE_PX, 3)
        assert np.abs(pixels.astype(int) - np.asarray(upright)).mean() < 6
    legacy = np.asarray(decode_image(stored, legacy=True)) if kind != "AVIF" else None
    assert legacy is None or legacy.shape == ((SIZE_PX, 32, 3) if number > 4 else (32, SIZE_PX, 3))


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + bytes(30)]
)
def test_damaged_exif_is_no_reason_to_refuse_a_photo(exif):
    data = encoded(rgb(), "JPEG", exif=exif)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_image(data).size == (SIZE_PX, SIZE_PX)
        TrainTransform(size_px=(8, 8)).decode(data, "draw")
    assert exif_orientation(Image.open(io.BytesIO(encoded(rgb(), "JPEG", exif=turned(9))))) == 1


@pytest.mark.parametrize("number", TURNS)
def test_crops_of_a_turned_jpeg_are_those_of_the_upright_one(number):
    """The fast decoder reduces the stored image, before it is turned."""
    back = {6: 8, 8: 6}.get(number, number)
    column, row = np.meshgrid(np.arange(640) / 640, np.arange(400) / 400)
    waves = np.stack([np.sin(9 * column + row), np.cos(7 * row), np.sin(5 * (row - column))], axis=2)
    upright = Image.fromarray((127 + 100 * waves).astype(np.uint8))
    stored = encoded(upright.transpose(TURNS[back]), "JPEG", quality=95, exif=turned(number))
    for jpeg in ("fast", "exact"):
        transform = TrainTransform(size_px=(32, 24), scale=(0.2, 0.9), jpeg=jpeg)
        for draw in range(8):
            pixels = transform.decode(stored, "crop", draw).int()
            expected = transform.decode(encoded(upright, "JPEG", quality=95), "crop", draw).int()
            assert (pixels - expected).abs().float().mean() < 2
