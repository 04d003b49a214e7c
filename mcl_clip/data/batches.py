"""What loaders yield: the local part of a training batch, and rows with all their captions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int, Int64, UInt8
from torch import Tensor
from torch.nn import functional as F

from mcl_clip.data.batch_plan import FILLER

Batch = TypeVar("Batch", bound="_Batch")


class BadSample(NamedTuple):
    """A row that could not be decoded and became a filler."""

    row: int
    shard: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class _Batch:
    def pin_memory(self: Batch) -> Batch:
        """Copy the batch to page-locked memory (called by the DataLoader)."""
        return self._map_tensors(lambda tensor: tensor.pin_memory())

    def share_memory_(self: Batch) -> Batch:
        """Move the batch to memory that other processes read (called in loader processes)."""
        return self._map_tensors(lambda tensor: tensor.share_memory_())  # type: ignore[no-untyped-call]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in vars(self).values() if isinstance(tensor, Tensor))

    def to(self: Batch, device: torch.device) -> Batch:
        """Copy the batch to a device."""
        return self._map_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def _map_tensors(self: Batch, function: Callable[[Tensor], Tensor]) -> Batch:
        tensors: dict[str, Any] = {name: function(t) for name, t in vars(self).items() if isinstance(t, Tensor)}
        return replace(self, **tensors)


@dataclass(frozen=True, kw_only=True)
class PairBatch(_Batch):
    """The part of a global batch that one process holds.

    `rows`, `text_ids` and `image_ids` have an entry for every row, fillers (row -1) included. `images` and `tokens`
    hold decoded samples only, and `places` the index of each among `rows`. Ids are hashes of the tokens and of the
    image bytes. Where text features come from disk, `text_features` holds them and `tokens` have length 0. Where what
    the frozen part of a tower computes comes from disk, it is in place of pixels or tokens, in float32. With wrong
    captions, `negative_tokens` has the same number of texts for every sample; those that are not `is_negative` only
    fill it up. Images alone have several views, tokens of length 0, and for text ids those of the images.
    """

    step: int
    rows: Int64[Tensor, "local"]
    text_ids: Int64[Tensor, "local"]
    image_ids: Int64[Tensor, "local"]
    images: UInt8[Tensor, "decoded *views 3 height width"] | Float32[Tensor, "decoded ..."]
    tokens: Int[Tensor, "decoded length"] | Float32[Tensor, "decoded dim"]
    places: Int64[Tensor, "decoded"]
    text_features: Float32[Tensor, "decoded dim"] | None = None
    negative_tokens: Int[Tensor, "decoded number length"] | None = None
    is_negative: Bool[Tensor, "decoded number"] | None = None
    bad: tuple[BadSample, ...]


@dataclass(frozen=True, kw_only=True)
class CaptionedBatch(_Batch):
    """Rows with all their captions: `tokens[j]` belongs to `rows[caption_of[j]]`. Bad rows are left out.

    `full_captions` counts captions without padding, that is, those that may have been truncated. As in `PairBatch`,
    outputs of frozen parts may be in place of pixels and tokens.
    """

    rows: Int64[Tensor, "images"]
    images: UInt8[Tensor, "images 3 height width"] | Float32[Tensor, "images ..."]
    image_ids: Int64[Tensor, "images"]
    tokens: Int[Tensor, "captions length"] | Float32[Tensor, "captions dim"]
    caption_of: Int64[Tensor, "captions"]
    text_ids: Int64[Tensor, "images"]
    full_captions: int
    bad: tuple[BadSample, ...]


def pin(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to page-locked memory, if it is not there, for a GPU that copies it while this process goes on."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


def join_parts(parts: Sequence[PairBatch], device: torch.device) -> PairBatch:
    """Join the parts of a local batch, with the images on a device."""

    def cat(tensors: list[Tensor]) -> Tensor:
        return pin(torch.cat(tensors), device)

    def pad(tokens: Tensor) -> Tensor:
        return F.pad(tokens, (0, length - tokens.shape[-1]))

    starts = np.cumsum([0, *(len(part.rows) for part in parts)]).tolist()
    decoded = [(part, start) for part, start in zip(parts, starts, strict=False) if (part.rows != FILLER).any()]
    decoded = decoded or [(parts[0], 0)]  # a part without a decoded row holds one black image
    length = max(part.tokens.shape[1] for part, _ in decoded)
    negatives = [part.negative_tokens for part, _ in decoded if part.negative_tokens is not None]
    features = [part.text_features for part, _ in decoded if part.text_features is not None]
    return PairBatch(
        step=parts[0].step,
        **{name: cat([getattr(part, name) for part in parts]) for name in ("rows", "text_ids", "image_ids")},
        images=torch.cat([part.images.to(device, non_blocking=True) for part, _ in decoded]),
        tokens=cat([pad(part.tokens) for part, _ in decoded]),
        negative_tokens=cat([pad(tokens) for tokens in negatives]) if negatives else None,
        is_negative=cat([part.is_negative for part, _ in decoded if part.is_negative is not None])
        if negatives
        else None,
        places=cat([part.places + start for part, start in decoded]),
        text_features=cat(features) if features else None,
        bad=tuple(bad for part in parts for bad in part.bad),
    )
