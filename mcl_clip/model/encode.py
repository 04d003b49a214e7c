"""From pixels to features, on the device."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from mcl_clip.model.speed import takes_short_texts

PRECISIONS = ("fp32", "bf16")
TEXTS_AT_A_TIME = {"cpu": 32}  # of about equal length; a GPU rather takes them all


def to_floats(
    pixels: UInt8[Tensor, "batch 3 height width"], preprocess_cfg: Mapping[str, Any]
) -> Float[Tensor, "batch 3 height width"]:
    """Pixels as torchvision's ToTensor and Normalize make them: (pixel / 255 - mean) / std."""
    mean = torch.tensor(preprocess_cfg["mean"], device=pixels.device).view(3, 1, 1)
    std = torch.tensor(preprocess_cfg["std"], device=pixels.device).view(3, 1, 1)
    if pixels.device.type != "cpu":
        return torch.div(pixels, 255).sub_(mean).div_(std)
    floats = torch.empty(pixels.shape, dtype=torch.float32)
    for picture, place in zip(pixels, floats, strict=True):  # one at a time stays in the cache: half the time
        torch.div(picture, 255, out=place).sub_(mean).div_(std)
    return floats


def encode_texts(model: Any, tokens: Int[Tensor, "texts length"], device: torch.device) -> Float[Tensor, "texts dim"]:
    """Un-normalised features of texts, on the device.

    Where nothing behind its end reaches the feature of a text, short texts go through the tower with short ones.
    """
    rows = TEXTS_AT_A_TIME.get(device.type, len(tokens))
    if not takes_short_texts(model) or not tokens.any():
        features: Tensor = model.encode_text(tokens.to(device))
        return features
    lengths = (tokens.ne(0) * torch.arange(1, tokens.shape[1] + 1)).amax(1)
    order = lengths.argsort(stable=True)
    parts = [model.encode_text(tokens[some, : lengths[some[-1]]].to(device)) for some in torch.split(order, rows)]
    return torch.cat(parts)[order.argsort().to(device)]


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """The context in which towers run: bfloat16 autocast, or nothing for `fp32`."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


def dtype_of(model: nn.Module) -> torch.dtype:
    """The type of a model's weights."""
    return next(model.parameters()).dtype
