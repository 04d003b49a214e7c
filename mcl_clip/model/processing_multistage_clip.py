"""Image processor and processor of a multistage CLIP model for transformers, with exactly open_clip's pixels.

This file is shipped inside exported models: it needs torch, transformers, open_clip and PIL, and the files shipped
beside it.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import transformers
from PIL import Image
from transformers import BatchFeature, ImageProcessingMixin, ProcessorMixin
from transformers.processing_utils import ImagesKwargs

try:
    from open_clip.tokenizer import get_clean_fn
except ModuleNotFoundError as missing:
    raise ImportError("a multistage CLIP model needs open_clip: pip install open_clip_torch") from missing

from .image_transform import make_image_transform

PROCESSING_AUTO_MAP = {
    "AutoImageProcessor": "processing_multistage_clip.MultistageCLIPImageProcessor",
    "AutoProcessor": "processing_multistage_clip.MultistageCLIPProcessor",
}
IS_BEFORE_5 = int(transformers.__version__.split(".")[0]) < 5
CHANNELS = (1, 3, 4)


class MultistageCLIPImageProcessor(ImageProcessingMixin):
    """Converts images to `pixel_values`, [images, 3, height, width], with open_clip's evaluation transform.

    Args:
        size: `height` and `width` in pixels.
        image_mean: mean of each channel, after scaling to 0..1.
        image_std: standard deviation of each channel.
        interpolation: `bicubic` or `bilinear`.
        resize_mode: `shortest` (then center crop), `longest` (then pad) or `squash`.
        fill_color: value of the padding.
        kwargs: further entries of preprocessor_config.json, written by transformers.
    """

    model_input_names = ("pixel_values",)
    valid_kwargs = ImagesKwargs

    def __init__(
        self,
        size: dict[str, int],
        image_mean: Sequence[float],
        image_std: Sequence[float],
        interpolation: str = "bicubic",
        resize_mode: str = "shortest",
        fill_color: int | Sequence[int] = 0,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)  # type: ignore[no-untyped-call]
        self.size = dict(size)
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.interpolation = interpolation
        self.resize_mode = resize_mode
        self.fill_color = fill_color

    @property
    def image_transform(self) -> Callable[[Any], torch.Tensor]:
        """open_clip's evaluation transform for a single PIL image."""
        return make_image_transform(
            {
                "size": (self.size["height"], self.size["width"]),
                "mean": tuple(self.image_mean),
                "std": tuple(self.image_std),
                "interpolation": self.interpolation,
                "resize_mode": self.resize_mode,
                "fill_color": self.fill_color,
            }
        )

    def __call__(self, images: Any, return_tensors: str | None = None) -> BatchFeature:
        """Convert one image or a list of images to `pixel_values`.

        Args:
            images: PIL images, or uint8 numpy arrays or tensors, [height, width, channels] or [channels, height,
                width], or batches of them.
            return_tensors: `pt` for a tensor, `np` for an array, None for a list of tensors.

        Raises:
            ValueError: if an input is not an image, or there is none.
        """
        if return_tensors not in (None, "pt", "np"):
            raise ValueError(f"return_tensors={return_tensors!r} is not one of 'pt', 'np' and None")
        transform = self.image_transform
        pixels = [transform(image) for image in _to_pil(images)]
        if not pixels:
            raise ValueError("there are no images; give at least one")
        if return_tensors is None:
            return BatchFeature({"pixel_values": pixels})
        stacked = torch.stack(pixels)
        return BatchFeature({"pixel_values": stacked if return_tensors == "pt" else stacked.numpy()})

    preprocess = __call__


def _to_pil(images: Any) -> Iterator[Image.Image]:
    """Yield PIL images from images, uint8 arrays and batches of arrays, in lists of any depth."""
    if isinstance(images, Image.Image):
        yield images
        return
    if isinstance(images, list | tuple):
        for image in images:
            yield from _to_pil(image)
        return
    if not hasattr(images, "shape") or not hasattr(images, "dtype"):
        raise ValueError(f"{images!r:.80} is not an image; open it with PIL first, or give a uint8 array")
    pixels = torch.as_tensor(images).cpu()
    if pixels.dtype != torch.uint8:
        raise ValueError(f"an image has values of type {pixels.dtype}; give uint8 values (0 to 255) or a PIL image")
    for array in pixels if pixels.ndim == 4 else [pixels]:
        if array.ndim == 3 and array.shape[0] in CHANNELS and array.shape[2] in CHANNELS:
            raise ValueError(
                f"an image of the shape {tuple(array.shape)} may have its channels first or last; give a PIL image"
            )
        is_first = array.ndim == 3 and array.shape[0] in CHANNELS
        channels_last = array.permute(1, 2, 0) if is_first else array
        if array.ndim not in (2, 3) or (array.ndim == 3 and channels_last.shape[2] not in CHANNELS):
            raise ValueError(
                f"an image has the shape {tuple(channels_last.shape)}; give [height, width, 3] or [3, height, width]"
            )
        is_gray = array.ndim == 3 and channels_last.shape[2] == 1
        yield Image.fromarray((channels_last[:, :, 0] if is_gray else channels_last).contiguous().numpy())


class MultistageCLIPProcessor(ProcessorMixin):
    """Prepares images and texts for the model in one call.

    Args:
        image_processor: a `MultistageCLIPImageProcessor`.
        tokenizer: the tokenizer of the model.
        clean: open_clip's text cleaning for this tokenizer: `lower`, `whitespace` or `canonicalize`.
    """

    if IS_BEFORE_5:  # later versions read this from the argument names
        attributes = ("image_processor", "tokenizer")
        valid_kwargs = ("clean",)
        image_processor_class = "AutoImageProcessor"
        tokenizer_class = "AutoTokenizer"

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, clean: str = "lower"):
        super().__init__(image_processor, tokenizer)  # type: ignore[no-untyped-call]
        self.clean = clean

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        return_tensors: str | None = None,
        padding: bool | str = True,
        truncation: bool | str = True,
        **kwargs: Any,
    ) -> BatchFeature:
        """Return `pixel_values` of `images` and `input_ids` with `attention_mask` of `text`; one may be left out.

        Texts are cleaned as open_clip does (broken characters, HTML entities, whitespace), which the tokenizer alone
        does only in part. Further options are passed to the tokenizer.

        Raises:
            ValueError: if there is neither, or an input is not an image or a text.
        """
        if images is None and text is None:
            raise ValueError("there is nothing to process; give images=, text= or both")
        data: dict[str, Any] = {}
        if text is not None:
            clean = get_clean_fn(self.clean)
            texts = [text] if isinstance(text, str) else list(text)
            wrong = [value for value in texts if not isinstance(value, str)]
            if wrong:
                raise ValueError(f"{wrong[0]!r:.80} is not a text; give a string or a list of strings")
            cleaned = [str(clean(value)) for value in texts]
            options = {"return_tensors": return_tensors, "padding": padding, "truncation": truncation, **kwargs}
            data.update(self.tokenizer(cleaned[0] if isinstance(text, str) else cleaned, **options))
        if images is not None:
            data.update(self.image_processor(images, return_tensors=return_tensors))
        return BatchFeature(data)
