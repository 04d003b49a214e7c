"""From bytes to pictures and captions: a whitelist of formats, caps before anything is unpacked, nothing executed."""

import io
import json
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import simplejpeg
import torch
from jaxtyping import UInt8
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import InterpolationMode, Normalize, ToTensor
from torchvision.transforms.functional import pil_to_tensor
from torchvision.transforms.v2.functional import resize

from mcl_clip.core.distributed import Name, random_words
from mcl_clip.data.tar import MAX_IMAGE_BYTES, MAX_JSON_BYTES, MAX_TXT_BYTES

MAX_ASPECT_RATIO = 100  # the evaluation transform scales the shorter side to the tower's size, whatever the longer is
MAX_JPEG_SCANS = 64  # progressive files have about ten; each costs time in proportion to all pixels
MAX_CAPTION_CHARS = 4000  # beyond the context of any tower; byte-pair encoding of a long word takes quadratic time
_FORMATS = ("JPEG", "PNG", "WEBP")
_START_OF_IMAGE, _START_OF_SCAN = b"\xff\xd8", b"\xff\xda"
_JPEG_COLOURS = ("YCbCr", "Gray", "RGB")  # of those that libjpeg-turbo turns into RGB as Pillow does
Box = tuple[int, int, int, int]  # left, upper, right, lower in pixels
RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


class BadSampleError(ValueError):
    """A sample that cannot be decoded; `reason` is one word for counting."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason = reason

    def __str__(self) -> str:
        return ": ".join(filter(None, self.args))


def decode_image(data: bytes, *, max_pixels: int = 50_000_000) -> Image.Image:
    """The picture in `data` as RGB, of an animation the first frame.

    The content decides, not the member's name: only JPEG, PNG and WebP are opened. Transparency is dropped and EXIF
    orientation ignored, as in open_clip; 16-bit grey is scaled to 8 bits.

    Args:
        data: A whole image file.
        max_pixels: Larger pictures are refused before their pixels are unpacked.

    Raises:
        BadSampleError: `oversize_image`, `not_an_image`, `too_many_pixels`, `too_narrow` or `broken_image`.
    """
    if len(data) > MAX_IMAGE_BYTES:
        raise BadSampleError("oversize_image", f"{len(data)} bytes, at most {MAX_IMAGE_BYTES} are read")
    if data.startswith(_START_OF_IMAGE) and data.count(_START_OF_SCAN) > MAX_JPEG_SCANS:
        raise BadSampleError("broken_image", f"a JPEG of more than {MAX_JPEG_SCANS} scans")
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError as error:
        raise BadSampleError("not_an_image", f"no {', '.join(_FORMATS)}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadSampleError("too_many_pixels", str(error)) from error
    except MemoryError:
        raise
    except Exception as error:  # the plugins raise a dozen types on damaged headers
        raise BadSampleError("broken_image", f"{type(error).__name__}: {error}") from error
    _check_size(*image.size, max_pixels)
    try:
        image.load()
        return _to_rgb(image)
    except MemoryError:
        raise
    except Exception as error:  # as above, on damaged pixels
        raise BadSampleError("broken_image", f"{type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class Jpeg:
    """A JPEG whose header was read; `width` and `height` in pixels are those of the whole picture."""

    data: bytes
    width: int
    height: int

    def pixels(self, *, min_width: int, min_height: int) -> UInt8[np.ndarray, "height width 3"]:
        """The picture as RGB, reduced while it is decoded where it has at least twice the given sizes.

        Raises:
            ValueError: if it is damaged in any way; `decode_image` may still accept it.
        """
        reduces = self.width >= 2 * min_width and self.height >= 2 * min_height
        sizes = {"min_width": min_width, "min_height": min_height} if reduces else {}
        pixels: np.ndarray = simplejpeg.decode_jpeg(self.data, "RGB", **sizes)
        return pixels


def open_jpeg(data: bytes, *, max_pixels: int = 50_000_000) -> Jpeg | None:
    """The JPEG in `data`, checked as by `decode_image`; None for what `decode_image` has to look at.

    Raises:
        BadSampleError: `too_many_pixels`, `too_narrow` or `broken_image`, by what the header says.
    """
    is_known = data.startswith(_START_OF_IMAGE) and len(data) <= MAX_IMAGE_BYTES
    if not is_known or data.count(_START_OF_SCAN) > MAX_JPEG_SCANS:
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if colours not in _JPEG_COLOURS:
        return None
    _check_size(width, height, max_pixels)
    return Jpeg(data, width, height)


def decode_captions(data: bytes, text_format: str, *, json_key: str = "caption") -> list[str]:
    """The captions in a text member, stripped, at least one; of a long one the first 4000 characters.

    Args:
        data: UTF-8 text. `txt`: one caption a line, blank lines dropped. `json`: an object with a string or a list of
            strings at `json_key`.
        text_format: `txt` or `json`.
        json_key: Where a JSON object holds the captions.

    Raises:
        BadSampleError: `oversize_text`, `not_utf8`, `not_text` (a NUL, as in UTF-16), `bad_json`, `no_caption_key`,
            `bad_caption_type` or `empty_caption`.
    """
    limit = MAX_JSON_BYTES if text_format == "json" else MAX_TXT_BYTES
    if len(data) > limit:
        raise BadSampleError("oversize_text", f"{len(data)} bytes, at most {limit} are read")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSampleError("not_utf8", str(error)) from error
    captions = _json_captions(text, json_key) if text_format == "json" else text.splitlines()
    captions = [caption.strip()[:MAX_CAPTION_CHARS] for caption in captions if caption.strip()]
    if not captions:
        raise BadSampleError("empty_caption")
    if any("\0" in caption for caption in captions):
        raise BadSampleError("not_text", "it holds a NUL character")
    if sum(map(len, captions)) > MAX_TXT_BYTES:
        raise BadSampleError("oversize_text", f"captions of more than {MAX_TXT_BYTES} characters")
    return captions


def _check_size(width: int, height: int, max_pixels: int) -> None:
    """Refuse a picture by what its header says."""
    if not width or not height:
        raise BadSampleError("broken_image", f"{width} x {height} pixels")
    if width * height > max_pixels:
        raise BadSampleError("too_many_pixels", f"{width} x {height}, at most {max_pixels} pixels are unpacked")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise BadSampleError("too_narrow", f"{width} x {height}, sides may be as 1 to {MAX_ASPECT_RATIO}")


def _json_captions(text: str, json_key: str) -> list[str]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadSampleError("bad_json", str(error)) from error
    if not isinstance(value, dict):
        raise BadSampleError("bad_json", f"an object is needed, not {type(value).__name__}")
    if json_key not in value:
        raise BadSampleError("no_caption_key", f"no {json_key!r}")
    captions = value[json_key]
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise BadSampleError("bad_caption_type", f"{json_key!r} must be a string or a list of strings")
    try:
        "".join(captions).encode()
    except UnicodeEncodeError as error:  # JSON can spell half a character
        raise BadSampleError("not_utf8", str(error)) from error
    return captions


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # a plain conversion would clip 16 bits at 255
        image = image.point(lambda value: value * (1 / 257)).convert("L")
    elif image.mode == "P":
        image = image.convert("RGBA")  # palettes with partial transparency know no other way
    return image.convert("RGB")


@dataclass(frozen=True)
class EvaluationTransform:
    """open_clip's evaluation transform up to the pixels; `steps` are from a PIL image to the next."""

    steps: tuple[Callable[[Image.Image], Image.Image], ...]

    def of_file(self, data: bytes, *, max_pixels: int = 50_000_000) -> UInt8[Tensor, "3 height width"]:
        """The pixels of an image file.

        Raises:
            BadSampleError: as `decode_image`.
        """
        return self(decode_image(data, max_pixels=max_pixels))

    def __call__(self, image: Image.Image) -> UInt8[Tensor, "3 height width"]:
        """The pixels of a picture."""
        for step in self.steps:
            image = step(image)
        pixels: Tensor = pil_to_tensor(image)
        return pixels


def evaluation_transform(preprocess_cfg: Mapping[str, Any]) -> EvaluationTransform:
    """The transform that a tower asks for.

    The last two steps of open_clip's chain, to floats and normalisation, are done on the device in the same way.
    """
    chain = image_transform_v2(PreprocessCfg(**preprocess_cfg), is_train=False)
    return EvaluationTransform(tuple(step for step in chain.transforms if not isinstance(step, ToTensor | Normalize)))


@dataclass(frozen=True, kw_only=True)
class TrainTransform:
    """A random resized crop and, with a given probability, a horizontal flip.

    Args of the class:
        size_px: height and width of the result.
        scale: smallest and largest share of the area that is kept.
        ratio: smallest and largest aspect ratio of the crop.
        horizontal_flip: probability of a flip. It destroys orientation; captions that name left and right become wrong.
        interpolation: `bicubic` or `bilinear`.
        jpeg: `fast` decodes JPEGs at a reduced size where that is enough, and resizes them by torchvision; `exact` does
            both by Pillow, as open_clip does.
    """

    size_px: tuple[int, int]
    scale: tuple[float, float] = (0.9, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    horizontal_flip: float = 0.0
    interpolation: str = "bicubic"
    jpeg: str = "fast"

    def of_file(self, data: bytes, *name: Name, max_pixels: int = 50_000_000) -> UInt8[Tensor, "3 height width"]:
        """The augmented pixels of an image file; the draw is called `name`.

        Raises:
            BadSampleError: as `decode_image`.
        """
        if self.jpeg == "fast" and (opened := open_jpeg(data, max_pixels=max_pixels)):
            with suppress(ValueError):  # its decoder refuses what Pillow can repair
                return self(opened, *name)
        return self(decode_image(data, max_pixels=max_pixels), *name)

    def __call__(self, image: Image.Image | Jpeg, *name: Name) -> UInt8[Tensor, "3 height width"]:
        """The augmented pixels; the draw is called `name`, so it does not depend on workers or order."""
        chances = (random_words(32, *name) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        box = self._crop(image.width, image.height, chances)
        pixels = self._part_of_jpeg(image, box) if isinstance(image, Jpeg) else self._part(image, box)
        return pixels.flip(-1) if chances[30] < self.horizontal_flip else pixels

    def _part(self, image: Image.Image, box: Box) -> Tensor:
        height, width = self.size_px
        pixels: Tensor = pil_to_tensor(image.resize((width, height), RESAMPLING[self.interpolation], box=box))
        return pixels

    def _part_of_jpeg(self, image: Jpeg, box: Box) -> Tensor:
        """The same from a picture that may be reduced so far that the part is still as large as the result."""
        (height, width), (left, upper, right, lower) = self.size_px, box
        pixels = image.pixels(
            min_width=math.ceil(image.width * width / (right - left)),
            min_height=math.ceil(image.height * height / (lower - upper)),
        )
        x, y = pixels.shape[1] / image.width, pixels.shape[0] / image.height
        columns = slice(round(left * x), max(round(right * x), round(left * x) + 1))
        rows = slice(round(upper * y), max(round(lower * y), round(upper * y) + 1))
        part = torch.from_numpy(pixels[rows, columns]).permute(2, 0, 1)
        result: Tensor = resize(part, [height, width], InterpolationMode(self.interpolation), antialias=True)
        return result.contiguous()

    def _crop(self, width: int, height: int, chances: np.ndarray) -> Box:
        """Left, upper, right, lower, as torchvision's RandomResizedCrop: seven tries, then the largest centred crop."""
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for area, shape, x, y in chances[:28].reshape(7, 4):
            share = self.scale[0] + (self.scale[1] - self.scale[0]) * area
            ratio = math.exp(low + (high - low) * shape)
            w = round(math.sqrt(width * height * share * ratio))
            h = round(math.sqrt(width * height * share / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, upper = int(x * (width - w + 1)), int(y * (height - h + 1))
                return left, upper, left + w, upper + h
        w = max(1, min(width, round(height * self.ratio[1])))
        h = max(1, min(height, round(width / self.ratio[0])))
        left, upper = (width - w) // 2, (height - h) // 2
        return left, upper, left + w, upper + h


def train_transform(preprocess_cfg: Mapping[str, Any], **augment: Any) -> TrainTransform:
    """A `TrainTransform` of the size and interpolation that a tower asks for."""
    cfg = PreprocessCfg(**preprocess_cfg)
    size = (cfg.size, cfg.size) if isinstance(cfg.size, int) else (cfg.size[0], cfg.size[1])
    interpolation = cfg.interpolation if cfg.interpolation in RESAMPLING else "bicubic"
    return TrainTransform(size_px=size, interpolation=interpolation, **augment)


def empty_images(count: int, size_px: tuple[int, int]) -> UInt8[Tensor, "count 3 height width"]:
    """Black pictures."""
    return torch.zeros(count, 3, *size_px, dtype=torch.uint8)
