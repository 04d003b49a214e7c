"""Decoding of untrusted samples: captions, images, and the transforms from image files to pixels.

Formats are whitelisted, sizes are limited before anything is decompressed, and nothing is executed.
"""

import io
import json
import math
import re
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
import torch
from jaxtyping import UInt8
from open_clip.transform import PreprocessCfg
from PIL import Image, UnidentifiedImageError, features
from torch import Tensor
from torchvision.transforms import InterpolationMode, Normalize, ToTensor
from torchvision.transforms.functional import pil_to_tensor
from torchvision.transforms.v2.functional import resize

from mcl_clip.core.distributed import Name
from mcl_clip.data.tar import MAX_IMAGE_BYTES, MAX_JSON_BYTES, MAX_TXT_BYTES
from mcl_clip.data.views import ColorChanges, uniform_numbers
from mcl_clip.model.image_transform import exif_orientation, make_image_transform, to_rgb

MAX_PIXELS = 50_000_000
MAX_ASPECT_RATIO = 100  # the evaluation transform resizes the shorter side, however long the other one becomes
MAX_JPEG_SCANS = 64  # progressive files have about ten; each costs time in proportion to all pixels
MAX_KEYS, MAX_KEY_CHARS = 10, 40  # of a JSON object, in a message
MAX_CAPTION_CHARS = 4000  # beyond the context of any encoder; byte-pair encoding of a long word takes quadratic time
LEGACY_FORMATS = ("JPEG", "PNG", "WEBP")
FORMATS = (
    *LEGACY_FORMATS,
    "GIF",
    "BMP",
    *(["AVIF"] if "avif" in features.get_supported() else []),
)  # AVIF: from Pillow 11.3 on
OTHER_FORMATS = {  # by how files of formats that are not decoded begin, in lower case
    rb"....ftypavi": "avif",
    rb"....ftyp(hei|hev|mif1|msf1)": "heic",
    rb"....ftyp": "video",
    rb"ii[*+]\0|mm\0[*+]": "tiff",
    rb"gif8": "gif",
    rb"bm....\0\0\0\0": "bmp",
    rb"\xff\x0a|\0\0\0\x0cjxl ": "jxl",
    rb"\0\0\0\x0cjp  |\xffo\xffq": "jp2",
    rb"8bps": "psd",
    rb"\0\0\x01\0": "ico",
    rb"%pdf": "pdf",
    rb"%!ps": "eps",
    rb"<svg|<\?xml": "svg",
    rb"<!doctype|<html": "html",
    rb"p[1-7]\s": "ppm",
}
_START_OF_IMAGE, _START_OF_SCAN = b"\xff\xd8", b"\xff\xda"
_ORIENTED = (b"Exif\0", b"tiff:Orientation")  # one of them is in every JPEG that is not upright
_JPEG_COLOURS = ("YCbCr", "Gray", "RGB")  # those that libjpeg-turbo converts to RGB as Pillow does
_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
Box = tuple[int, int, int, int]  # left, upper, right, lower in pixels


class BadSampleError(ValueError):
    """A sample that cannot be decoded; `reason` is one word for counting."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason = reason

    def __str__(self) -> str:
        return ": ".join(filter(None, self.args))


def decode_captions(data: bytes, text_format: str, *, json_key: str = "caption") -> list[str]:
    """Decode the captions in a text member: at least one, stripped, each cut to 4000 characters.

    The text is UTF-8. `txt`: one caption, whose line ends become spaces. `lines`: a caption on each line that is not
    blank. `json`: an object with a string or a list of strings at `json_key`.

    Raises:
        BadSampleError: `oversize_text`, `not_utf8`, `not_text` (a NUL, as in UTF-16), `bad_json`, `no_caption_key`,
            `bad_caption_type` or `empty_caption`.
    """
    limit = MAX_JSON_BYTES if text_format == "json" else MAX_TXT_BYTES
    if len(data) > limit:
        raise BadSampleError("oversize_text", f"{len(data)} bytes, the limit is {limit}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSampleError("not_utf8", str(error)) from error
    if text_format == "json":
        captions = _json_captions(text, json_key)
    else:
        lines = [line.strip() for line in text.splitlines()]
        captions = lines if text_format == "lines" else [" ".join(filter(None, lines))]
    captions = [caption.strip()[:MAX_CAPTION_CHARS] for caption in captions if caption.strip()]
    if not captions:
        raise BadSampleError("empty_caption")
    if any("\0" in caption for caption in captions):
        raise BadSampleError("not_text", "it contains a NUL character")
    if sum(map(len, captions)) > MAX_TXT_BYTES:
        raise BadSampleError("oversize_text", f"the captions have more than {MAX_TXT_BYTES} characters")
    return captions


def decode_negatives(data: bytes, text_format: str, *, json_key: str) -> list[str]:
    """Decode the wrong captions in a text member whose captions are valid; none where it has no such key.

    Raises:
        BadSampleError: `bad_negatives_type` for anything but a string or a list of strings.
    """
    content = json.loads(data.decode("utf-8-sig")) if text_format == "json" else None
    value = content.get(json_key) if isinstance(content, dict) else None
    negatives = [value or ""] if isinstance(value, str | None) else value
    if not isinstance(negatives, list) or not all(isinstance(caption, str) for caption in negatives):
        raise BadSampleError("bad_negatives_type", f"{json_key!r} must be a string or a list of strings")
    return [caption.strip()[:MAX_CAPTION_CHARS] for caption in negatives if caption.strip()]


def missing_caption(data: bytes, text_format: str, *, json_key: str) -> tuple[str, str] | None:
    """Return why a text member has no caption, as reason and details; None if it has one, or is damaged."""
    try:
        decode_captions(data, text_format, json_key=json_key)
    except BadSampleError as error:
        return error.args if error.reason in ("empty_caption", "no_caption_key") else None
    return None


def _json_captions(text: str, json_key: str) -> list[str]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadSampleError("bad_json", str(error)) from error
    if not isinstance(value, dict):
        raise BadSampleError("bad_json", f"expected an object, got {type(value).__name__}")
    if json_key not in value:
        keys = ", ".join(repr(key[:MAX_KEY_CHARS]) for key in list(value)[:MAX_KEYS])
        raise BadSampleError("no_caption_key", f"no {json_key!r} among the keys {keys or '(none)'}")
    captions = value[json_key]
    captions = [captions or ""] if isinstance(captions, str | None) else captions
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise BadSampleError("bad_caption_type", f"{json_key!r} must be a string or a list of strings")
    try:
        "".join(captions).encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
        raise BadSampleError("not_utf8", str(error)) from error
    return captions


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS, legacy: bool = False) -> Image.Image:
    """Decode an image file to RGB with `to_rgb`; of an animation, the first frame.

    The content decides, not the name. `legacy` decodes as versions up to 0.6 did: only JPEG, PNG and WebP, as they are
    stored whatever EXIF says, and with whatever colors lie under transparent pixels.

    Raises:
        BadSampleError: as `open_image`, or `broken_image`.
    """
    with warnings.catch_warnings(action="ignore"):  # of Pillow, about files that it decodes all the same
        image = open_image(data, max_pixels=max_pixels, formats=LEGACY_FORMATS if legacy else FORMATS)
        try:
            image.load()
            return _legacy_rgb(image) if legacy else to_rgb(image)
        except MemoryError:
            raise
        except Exception as error:  # the plugins raise a dozen types on damaged pixels
            raise BadSampleError("broken_image", f"{type(error).__name__}: {error}") from error


def open_image(data: bytes, *, max_pixels: int = MAX_PIXELS, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """Read the header of an image file, whose pixels are not decompressed yet, and check its format and size.

    Raises:
        BadSampleError: `oversize_image`, `too_many_pixels`, `too_narrow`, `broken_image`, `format_NAME` for a format
            that is known but not decoded, or `not_an_image`.
    """
    if len(data) > MAX_IMAGE_BYTES:
        raise BadSampleError("oversize_image", f"{len(data)} bytes, the limit is {MAX_IMAGE_BYTES}")
    if data.startswith(_START_OF_IMAGE) and data.count(_START_OF_SCAN) > MAX_JPEG_SCANS:
        raise BadSampleError("broken_image", f"a JPEG with more than {MAX_JPEG_SCANS} scans")
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
    except UnidentifiedImageError as error:
        start = data[:64].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
        name = next((name for signature, name in OTHER_FORMATS.items() if re.match(signature, start, re.DOTALL)), "")
        is_damaged = name.upper() in formats
        reason = "broken_image" if is_damaged else f"format_{name}" if name else "not_an_image"
        detail = "a damaged header" if is_damaged else f"not one of {', '.join(formats)}"
        raise BadSampleError(reason, detail if data else "the file is empty") from error
    except Image.DecompressionBombError as error:
        raise BadSampleError("too_many_pixels", str(error)) from error
    except MemoryError:
        raise
    except Exception as error:  # as in `decode_image`, on damaged headers
        raise BadSampleError("broken_image", f"{type(error).__name__}: {error}") from error
    _check_size(*image.size, max_pixels)
    return image


class ImageHeader(NamedTuple):
    """Format (Pillow's name), width and height in pixels as they are stored, and EXIF orientation of an image file."""

    format: str
    width: int
    height: int
    orientation: int


def read_header(data: bytes, *, max_pixels: int = MAX_PIXELS) -> ImageHeader:
    """Read the header of an image file; raise BadSampleError as `open_image`."""
    with warnings.catch_warnings(action="ignore"):
        image = open_image(data, max_pixels=max_pixels)
        # Pillow decodes a PNG to look for EXIF data behind its pixels.
        is_upright = image.format == "PNG" and "exif" not in image.info
        return ImageHeader(image.format or "", *image.size, 1 if is_upright else exif_orientation(image))


def _legacy_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # a plain conversion would clip 16 bits at 255
        image = image.point(lambda value: value * (1 / 257)).convert("L")
    elif image.mode == "P":
        image = image.convert("RGBA")  # Pillow warns when it converts partial transparency to RGB directly
    return image.convert("RGB")


@dataclass(frozen=True)
class Jpeg:
    """A JPEG whose header was read; `width` and `height` in pixels are those of the full image, upright."""

    data: bytes
    width: int
    height: int
    orientation: int = 1

    def pixels(self, *, min_width: int, min_height: int) -> UInt8[np.ndarray, "height width 3"]:
        """Decode to upright RGB, at a reduced size if the image has at least twice the given width and height.

        Raises:
            ValueError: if the file is damaged in any way; `decode_image` may still accept it.
        """
        is_large = self.width >= 2 * min_width and self.height >= 2 * min_height
        if self.orientation > 4:  # stored with the axes swapped
            min_width, min_height = min_height, min_width
        sizes = {"min_width": min_width, "min_height": min_height} if is_large else {}
        pixels: np.ndarray = simplejpeg.decode_jpeg(self.data, "RGB", **sizes)
        return _turned(pixels, self.orientation)


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Return a view of pixels [height, width, 3], turned upright from an EXIF orientation."""
    if orientation > 4:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels[:, ::-1] if orientation in (2, 3, 6, 7) else pixels


def open_jpeg(data: bytes, *, max_pixels: int = MAX_PIXELS, legacy: bool = False) -> Jpeg | None:
    """Read a JPEG's header, with the checks of `decode_image`; return None for files that need `decode_image`.

    Raises:
        BadSampleError: `too_many_pixels`, `too_narrow` or `broken_image`, judging by the header.
    """
    is_jpeg = data.startswith(_START_OF_IMAGE) and len(data) <= MAX_IMAGE_BYTES
    if not is_jpeg or data.count(_START_OF_SCAN) > MAX_JPEG_SCANS:
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if colours not in _JPEG_COLOURS:
        return None
    _check_size(width, height, max_pixels)
    orientation = 1
    if not legacy and any(name in data for name in _ORIENTED):  # opening an image takes as long as decoding a small one
        orientation = read_header(data, max_pixels=max_pixels).orientation
    return Jpeg(data, *((height, width) if orientation > 4 else (width, height)), orientation)


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if not width or not height:
        raise BadSampleError("broken_image", f"{width} x {height} pixels")
    if width * height > max_pixels:
        raise BadSampleError("too_many_pixels", f"{width} x {height}, the limit is {max_pixels} pixels")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise BadSampleError("too_narrow", f"{width} x {height}, the limit of the aspect ratio is {MAX_ASPECT_RATIO}")


@dataclass(frozen=True)
class EvaluationTransform:
    """A model's evaluation transform up to uint8 pixels; each of `steps` maps an RGB image to the next."""

    steps: tuple[Callable[[Image.Image], Image.Image], ...]
    legacy: bool = False

    def decode(self, data: bytes, *, max_pixels: int = MAX_PIXELS) -> UInt8[Tensor, "3 height width"]:
        """Decode and transform an image file.

        Raises:
            BadSampleError: as `decode_image`.
        """
        return self(decode_image(data, max_pixels=max_pixels, legacy=self.legacy))

    def __call__(self, image: Image.Image) -> UInt8[Tensor, "3 height width"]:
        """Transform an RGB image."""
        for step in self.steps:
            image = step(image)
        pixels: Tensor = pil_to_tensor(image)
        return pixels


def evaluation_transform(preprocess_cfg: Mapping[str, Any], *, legacy: bool = False) -> EvaluationTransform:
    """Create the evaluation transform of a model; see `decode_image` for `legacy`.

    Left out are the first step, conversion to RGB, which decoding has done (as `legacy` says), and the last two,
    conversion to floats and normalization, which are done on the device.
    """
    chain: Any = make_image_transform(preprocess_cfg)
    steps = [step for step in chain.transforms if step is not to_rgb and not isinstance(step, ToTensor | Normalize)]
    return EvaluationTransform(tuple(steps), legacy)


@dataclass(frozen=True, kw_only=True)
class TrainTransform:
    """A random resized crop and, with given probabilities, a horizontal flip and changes of color.

    Randomness comes from the name of the draw alone, so the result does not depend on workers or order.

    Attributes:
        size_px: Height and width of the result.
        scale: Smallest and largest share of the area that is kept.
        ratio: Smallest and largest aspect ratio of the crop.
        horizontal_flip: Probability of a flip. It makes captions that mention left and right wrong.
        colors: Changes of color and sharpness; None for none.
        interpolation: `bicubic` or `bilinear`.
        jpeg: `fast` decodes JPEGs at a reduced size where that is enough and resizes with torchvision; `exact` uses
            Pillow for both, as open_clip does.
        legacy: Decode as versions up to 0.6 did; see `decode_image`.
        views: Number of fixed views of each image, of which the first is that of the evaluation; 0 is without limit.
        evaluation: The evaluation transform, for the first of fixed views.
    """

    size_px: tuple[int, int]
    scale: tuple[float, float] = (0.9, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    horizontal_flip: float = 0.0
    colors: ColorChanges | None = None
    interpolation: str = "bicubic"
    jpeg: str = "fast"
    legacy: bool = False
    views: int = 0
    evaluation: EvaluationTransform | None = None

    def view(self, epoch: int, row: int) -> int:
        """Return the view of a row in an epoch: its own in each, or one of the fixed ones in turn."""
        return (epoch + row) % self.views if self.views else epoch

    def decode_view(
        self, data: bytes, view: int, *, row: int, name: tuple[Name, ...], max_pixels: int = MAX_PIXELS
    ) -> UInt8[Tensor, "3 height width"]:
        """Decode a view of an image file; raise as `decode`. `name` and the row identify the draws."""
        if self.evaluation is not None and view == 0:
            return self.evaluation.decode(data, max_pixels=max_pixels)
        return self.decode(data, *name, view, row, "augment", max_pixels=max_pixels)

    def decode(self, data: bytes, *name: Name, max_pixels: int = MAX_PIXELS) -> UInt8[Tensor, "3 height width"]:
        """Decode and augment an image file; `name` identifies the draw.

        Raises:
            BadSampleError: as `decode_image`.
        """
        if self.jpeg == "fast" and (jpeg := open_jpeg(data, max_pixels=max_pixels, legacy=self.legacy)):
            with suppress(ValueError):  # simplejpeg refuses files that Pillow can repair
                return self(jpeg, *name)
        return self(decode_image(data, max_pixels=max_pixels, legacy=self.legacy), *name)

    def __call__(self, image: Image.Image | Jpeg, *name: Name) -> UInt8[Tensor, "3 height width"]:
        """Augment an image; `name` identifies the draw."""
        uniform = uniform_numbers(32, *name)
        box, (height, width) = self._crop(image.width, image.height, uniform), self.size_px
        if isinstance(image, Jpeg):
            pixels = self._resized_jpeg(image, box)
        else:
            pixels = pil_to_tensor(image.resize((width, height), _RESAMPLING[self.interpolation], box=box))
        pixels = pixels.flip(-1) if uniform[30] < self.horizontal_flip else pixels
        return pixels if self.colors is None else self.colors(pixels, *name)

    def _crop(self, width: int, height: int, uniform: np.ndarray) -> Box:
        """Choose a box as torchvision's RandomResizedCrop does: seven tries, then the largest centered crop."""
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for area, shape, x, y in uniform[:28].reshape(7, 4):
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

    def _resized_jpeg(self, image: Jpeg, box: Box) -> Tensor:
        """Crop and resize a JPEG decoded at the smallest size at which the crop is no smaller than the result."""
        (height, width), (left, upper, right, lower) = self.size_px, box
        pixels = image.pixels(
            min_width=math.ceil(image.width * width / (right - left)),
            min_height=math.ceil(image.height * height / (lower - upper)),
        )
        x, y = pixels.shape[1] / image.width, pixels.shape[0] / image.height
        columns = slice(round(left * x), max(round(right * x), round(left * x) + 1))
        rows = slice(round(upper * y), max(round(lower * y), round(upper * y) + 1))
        # Resized as it is stored, and turned when it is small: turning a whole photo takes as long as decoding it.
        orientation = image.orientation
        stored = _turned(pixels[rows, columns], {6: 8, 8: 6}.get(orientation, orientation))
        size = [width, height] if orientation > 4 else [height, width]
        crop = torch.from_numpy(stored).permute(2, 0, 1)
        result: Tensor = resize(crop, size, InterpolationMode(self.interpolation), antialias=True)
        if orientation != 1:
            upright = _turned(result.permute(1, 2, 0).numpy(), orientation)
            result = torch.from_numpy(np.ascontiguousarray(upright.transpose(2, 0, 1)))
        return result.contiguous()


def train_transform(
    preprocess_cfg: Mapping[str, Any], *, views: int = 0, legacy: bool = False, **augment: Any
) -> TrainTransform:
    """Create a `TrainTransform` with the size and interpolation of a model; `augment` sets its other fields.

    These are those of `AugmentConfig`.
    """
    colors = ColorChanges(
        **{each.name: augment.pop(each.name) for each in fields(ColorChanges) if each.name in augment}
    )
    cfg = PreprocessCfg(**preprocess_cfg)
    size = (cfg.size, cfg.size) if isinstance(cfg.size, int) else (cfg.size[0], cfg.size[1])
    interpolation = cfg.interpolation if cfg.interpolation in _RESAMPLING else "bicubic"
    evaluation = evaluation_transform(preprocess_cfg, legacy=legacy) if views else None
    return TrainTransform(
        size_px=size, interpolation=interpolation, legacy=legacy, views=views, evaluation=evaluation,
        colors=colors if colors.acts() else None, **augment,
    )  # fmt: skip
