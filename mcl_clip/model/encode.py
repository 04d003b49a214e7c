"""From pixels to features, on the device."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

PRECISIONS = ("fp32", "bf16")


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


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """The context in which towers run: bfloat16 autocast, or nothing for `fp32`."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


def dtype_of(model: nn.Module) -> torch.dtype:
    """The type of a model's weights."""
    return next(model.parameters()).dtype
