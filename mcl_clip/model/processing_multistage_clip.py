"""Images and texts for a multistage CLIP model under transformers: exactly open_clip's pixels and tokens.

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
    raise ImportError("a multistage CLIP model is made of open_clip's towers: pip install open_clip_torch") from missing

from .open_clip_io import make_image_transform

PROCESSING_AUTO_MAP = {
    "AutoImageProcessor": "processing_multistage_clip.MultistageCLIPImageProcessor",
    "AutoProcessor": "processing_multistage_clip.MultistageCLIPProcessor",
}
IS_BEFORE_5 = int(transformers.__version__.split(".")[0]) < 5
CHANNELS = (1, 3, 4)


class MultistageCLIPImageProcessor(ImageProcessingMixin):
    """From pictures to `pixel_values`, [pictures, 3, height, width], as open_clip's evaluation transform makes them.

    Args:
        size: `height` and `width` in pixels.
        image_mean: of each channel, what is subtracted after scaling to 0..1.
        image_std: of each channel, what is divided by.
        interpolation: `bicubic` or `bilinear`.
        resize_mode: `shortest` (then cut), `longest` (then fill up) or `squash`.
        fill_color: what is filled up with.
        kwargs: what transformers writes down beside them.
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
        """open_clip's evaluation transform, of one PIL image."""
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
        """`pixel_values` of one picture or a list of them.

        Args:
            images: PIL images, or numpy arrays or tensors of bytes, [height, width, channels] or [channels, height,
                width], also batches of them.
            return_tensors: `pt` for a tensor, `np` for an array, None for a list of tensors.

        Raises:
            ValueError: if something is not a picture, or there is none.
        """
        if return_tensors not in (None, "pt", "np"):
            raise ValueError(f"return_tensors={return_tensors!r} is not one of 'pt', 'np' and None")
        transform = self.image_transform
        pixels = [transform(picture) for picture in _pictures(images)]
        if not pixels:
            raise ValueError("there are no images; give at least one")
        if return_tensors is None:
            return BatchFeature({"pixel_values": pixels})
        stacked = torch.stack(pixels)
        return BatchFeature({"pixel_values": stacked if return_tensors == "pt" else stacked.numpy()})

    preprocess = __call__


def _pictures(images: Any) -> Iterator[Image.Image]:
    if isinstance(images, Image.Image):
        yield images
    elif isinstance(images, list | tuple):
        for image in images:
            yield from _pictures(image)
    elif hasattr(images, "shape") and hasattr(images, "dtype"):
        yield from _pictures_of_array(torch.as_tensor(images).cpu())
    else:
        raise ValueError(f"{images!r:.80} is not a picture; open it with PIL first, or give an array of bytes")


def _pictures_of_array(pixels: torch.Tensor) -> Iterator[Image.Image]:
    if pixels.dtype != torch.uint8:
        raise ValueError(f"an image has values of type {pixels.dtype}; give bytes (uint8, 0 to 255) or a PIL image")
    if pixels.ndim == 4:
        for picture in pixels:
            yield from _pictures_of_array(picture)
        return
    if pixels.ndim == 3 and pixels.shape[0] in CHANNELS:  # transformers, too, looks at the first dimension first
        pixels = pixels.permute(1, 2, 0)
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in CHANNELS):
        raise ValueError(f"an image has the shape {tuple(pixels.shape)}; give [height, width, 3] or [3, height, width]")
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    yield Image.fromarray(pixels.contiguous().numpy())


class MultistageCLIPProcessor(ProcessorMixin):
    """Pictures and texts for the model in one call.

    Args:
        image_processor: a `MultistageCLIPImageProcessor`.
        tokenizer: the tokenizer of the model.
        clean: how open_clip cleans texts for it: `lower`, `whitespace` or `canonicalize`.
    """

    if IS_BEFORE_5:  # since then, the names of the arguments say it
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
        """`pixel_values` of `images` and `input_ids` with `attention_mask` of `text`; either may be left out.

        Texts are cleaned as open_clip does (broken characters, HTML entities, white space), which the tokenizer alone
        does not do in full. Further options are the tokenizer's.

        Raises:
            ValueError: if there is neither, or something is not a picture or a text.
        """
        if images is None and text is None:
            raise ValueError("there is nothing to process; give images=, text= or both")
        data: dict[str, Any] = {}
        if text is not None:
            options = {"return_tensors": return_tensors, "padding": padding, "truncation": truncation, **kwargs}
            data.update(self.tokenizer(self._cleaned(text), **options))
        if images is not None:
            data.update(self.image_processor(images, return_tensors=return_tensors))
        return BatchFeature(data)

    def _cleaned(self, text: str | Sequence[str]) -> str | list[str]:
        clean = get_clean_fn(self.clean)
        if isinstance(text, str):
            return str(clean(text))
        texts = list(text)
        wrong = [value for value in texts if not isinstance(value, str)]
        if wrong:
            raise ValueError(f"{wrong[0]!r:.80} is not a text; give a string or a list of strings")
        return [str(clean(value)) for value in texts]
