"""From a decoded picture to uint8 pixels; they become floats on the device (`mcl_clip.model.encode`)."""

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, Normalize, ToTensor
from torchvision.transforms.functional import pil_to_tensor
from torchvision.transforms.v2.functional import resize

from mcl_clip.data.decode import Jpeg, decode_image, open_jpeg
from mcl_clip.distributed import Name, random_words

Box = tuple[int, int, int, int]  # left, upper, right, lower in pixels
RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


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
