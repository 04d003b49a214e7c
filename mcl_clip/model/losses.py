"""Contrastive losses over the global batch, with the negatives of a row restricted to its own group.

Each process holds the rows of its slice and sees the columns of all processes. What is returned is this process's
share, scaled so that the mean over processes (which DistributedDataParallel takes of gradients) is the loss of the
global batch:

    L = sum_i w_i l_i / sum_i w_i.

A column is a negative of a row when both have the same group (Multistage Contrastive Learning, arXiv 2402.11816, and
CLIP-MoE, arXiv 2409.19291, equation 1), so the loss is the published one whatever a batch is made of.

Masks and logits have a number for each pair of a row and a column. With `chunk_rows` they are made for so many rows at
a time, and made again on the way back, so that memory grows with the batch and not with its square.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mcl_clip.core.distributed import all_reduce_sum, gather, gather_with_grad, rank, world_size

Features = Float[Tensor, "local dim"]
Ids = Int64[Tensor, "local"]


@dataclass(frozen=True, kw_only=True)
class Negatives:
    """Which columns a row is contrasted with, and what each row weighs.

    Attributes:
        ids: row number, group, hash of the tokens and hash of the image of each of this process's rows.
        columns: the same of the rows of all processes.
        own: column of the row itself.
        mask_duplicates: whether other rows with an equal caption or image are left out.
        chunk_rows: rows of the loss at a time; 0 is all.
        weight: 1 for rows that count, 0 for fillers and rows with fewer than `min_negatives` negatives.
        total_weight: sum of the weights over all processes, at least 1.
        num_negatives: negatives of each row.
        losses: loss of each row, once the loss was computed.
        duplicates: pairs of different places in this process's rows with an equal caption or image, masked or not.
    """

    ids: Int64[Tensor, "local 4"]
    columns: Int64[Tensor, "global 4"]
    own: Int64[Tensor, "local"]
    mask_duplicates: bool
    chunk_rows: int
    weight: Float[Tensor, "local"]
    total_weight: Float[Tensor, ""]
    num_negatives: Int64[Tensor, "local"]
    losses: Float[Tensor, "local"]
    duplicates: Int64[Tensor, ""]

    def keep(self, rows: slice) -> Bool[Tensor, "rows global"]:
        """The own column and the negatives of some of this process's rows."""
        ids, own = self.ids[rows], self.own[rows]
        negatives, _ = _compare(ids, self.columns, own, mask_duplicates=self.mask_duplicates)
        return negatives.scatter_(1, own[:, None], True)


def find_negatives(
    *,
    rows: Ids,
    groups: Ids,
    text_ids: Ids,
    image_ids: Ids,
    min_negatives: int = 1,
    mask_duplicates: bool = True,
    chunk_rows: int = 0,
) -> Negatives:
    """The negatives of this process's rows among the rows of all processes.

    Args:
        rows: row numbers; a negative number is a filler, which is nobody's negative.
        groups: group of each row.
        text_ids: hash of each row's tokens.
        image_ids: hash of each row's image bytes.
        min_negatives: rows with fewer negatives get weight 0.
        mask_duplicates: whether other rows with an equal caption or an equal image are left out of the negatives. The
            same row twice in a batch, possible in a weighted mixture, is always left out.
        chunk_rows: rows to compare with all others at a time, here and in the loss; 0 is all.
    """
    ids = torch.stack([rows, groups, text_ids, image_ids], dim=1)
    columns = gather(ids)
    own = rank() * len(ids) + torch.arange(len(ids), device=rows.device)
    num_negatives, num_alike = [], []
    for some in _chunks(len(ids), chunk_rows):
        negatives, alike = _compare(ids[some], columns, own[some], mask_duplicates=mask_duplicates)
        num_negatives.append(negatives.sum(1))
        num_alike.append(alike.sum())
    negatives_of_row = torch.cat(num_negatives)
    weight = ((rows >= 0) & (negatives_of_row >= min_negatives)).float()
    return Negatives(
        ids=ids,
        columns=columns,
        own=own,
        mask_duplicates=mask_duplicates,
        chunk_rows=chunk_rows,
        weight=weight,
        total_weight=all_reduce_sum(weight.sum()).clamp(min=1),
        num_negatives=negatives_of_row,
        losses=torch.zeros_like(weight),
        duplicates=torch.stack(num_alike).sum(),
    )


def _compare(
    ids: Int64[Tensor, "rows 4"],
    columns: Int64[Tensor, "global 4"],
    own: Int64[Tensor, "rows"],
    *,
    mask_duplicates: bool,
) -> tuple[Bool[Tensor, "rows global"], Bool[Tensor, "rows global"]]:
    """The negatives of some rows, and what could be one but has an equal caption, image or row number."""
    same_row, same_group, same_text, same_image = (
        mine[:, None] == others for mine, others in zip(ids.unbind(1), columns.unbind(1), strict=True)
    )
    candidates = same_group & (ids[:, :1] >= 0) & (columns[:, 0] >= 0)
    candidates.scatter_(1, own[:, None], False)
    alike = candidates & (same_text | same_image | same_row)
    return candidates & ~(alike if mask_duplicates else same_row), alike


def _chunks(rows: int, chunk_rows: int) -> list[slice]:
    size = chunk_rows or rows
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def clip_loss(
    image_features: Features,
    text_features: Features,
    logit_scale: Float[Tensor, ""],
    negatives: Negatives,
    *,
    ifm_epsilon: float = 0.0,
) -> Float[Tensor, ""]:
    """InfoNCE in both directions (Radford et al., arXiv 2103.00020), this process's share.

    l_i = (CE_i(image -> texts) + CE_i(text -> images)) / 2, over the row itself and its negatives, in float32 or more.

    Args:
        image_features: unit features of this process's rows.
        text_features: the same of the texts.
        logit_scale: the factor before the softmax (not its logarithm).
        negatives: what `find_negatives` gave for the same rows.
        ifm_epsilon: above 0, the mean of this loss and of the one with cosines moved against the pair.
    """
    all_images, all_texts = (gather_with_grad(_at_least_float32(side)) for side in (image_features, text_features))
    first = rank() * len(image_features)

    def of_rows(some: slice, all_images: Tensor, all_texts: Tensor, logit_scale: Tensor) -> Tensor:
        keep, own = negatives.keep(some), negatives.own[some]
        mine = slice(first + some.start, first + some.stop)
        losses = []
        for cosines in (all_images[mine] @ all_texts.T, all_texts[mine] @ all_images.T):
            for each in _with_moved(cosines, own, ifm_epsilon):
                losses.append(_cross_entropy(logit_scale * each, keep, own))
        return torch.stack(losses).mean(0)

    return _share(of_rows, negatives, all_images, all_texts, logit_scale)


def siglip_loss(
    image_features: Features,
    text_features: Features,
    logit_scale: Float[Tensor, ""],
    logit_bias: Float[Tensor, ""],
    negatives: Negatives,
    *,
    ifm_epsilon: float = 0.0,
) -> Float[Tensor, ""]:
    """The pairwise sigmoid loss (Zhai et al., arXiv 2303.15343), this process's share.

    l_i = - sum_j log sigmoid(z_ij (scale <image_i, text_j> + bias)), z_ij = 1 for j = i, else -1, over the row itself
    and its negatives. Arguments as in `clip_loss`; `logit_bias` is added to the logits.
    """
    images, texts = _at_least_float32(image_features), _at_least_float32(text_features)

    def of_rows(some: slice, images: Tensor, all_texts: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
        keep, own = negatives.keep(some), negatives.own[some]
        cosines = images[some] @ all_texts.T
        sign = _pair_signs(cosines, own)
        losses = [
            -F.logsigmoid(sign * (logit_scale * each + logit_bias)).masked_fill(~keep, 0).sum(1)
            for each in _with_moved(cosines, own, ifm_epsilon)
        ]
        return torch.stack(losses).mean(0)

    return _share(of_rows, negatives, images, gather_with_grad(texts), logit_scale, logit_bias)


def _with_moved(
    cosines: Float[Tensor, "rows global"], own: Int64[Tensor, "rows"], epsilon: float
) -> list[Float[Tensor, "rows global"]]:
    """The cosines and, with `epsilon` above 0, the same with the pair's own lower and all others higher by epsilon.

    That is what the worst perturbation of the features by epsilon does (implicit feature modification, Robinson et al.,
    arXiv 2106.11230, section 4): it takes away what the loss relies on most, so that other features are learned.
    """
    return [cosines, cosines - epsilon * _pair_signs(cosines, own)] if epsilon else [cosines]


def _pair_signs(cosines: Float[Tensor, "rows global"], own: Int64[Tensor, "rows"]) -> Float[Tensor, "rows global"]:
    """1 for a row's own column, -1 for all others."""
    return (-torch.ones_like(cosines)).scatter_(1, own[:, None], 1)


def _cross_entropy(
    logits: Float[Tensor, "rows global"], keep: Bool[Tensor, "rows global"], own: Int64[Tensor, "rows"]
) -> Float[Tensor, "rows"]:
    return F.cross_entropy(logits.masked_fill(~keep, -torch.inf), own, reduction="none")


def _share(of_rows: Callable[..., Tensor], negatives: Negatives, *tensors: Tensor) -> Float[Tensor, ""]:
    """This process's share of the loss; `of_rows` gives the losses of some of its rows, a function of `tensors`."""
    chunks = _chunks(len(negatives.own), negatives.chunk_rows)

    def weighted(some: slice, *tensors: Tensor) -> Tensor:
        losses = of_rows(some, *tensors)
        negatives.losses[some] = losses.detach().to(negatives.losses)
        return (losses * negatives.weight[some]).sum()

    total: Tensor
    total = _SumOfChunks.apply(weighted, chunks, *tensors) if len(chunks) > 1 else weighted(chunks[0], *tensors)
    return total * world_size() / negatives.total_weight


class _SumOfChunks(torch.autograd.Function):
    """The sum of a function over chunks. Keeps its inputs alone, and computes each chunk again on the way back."""

    @staticmethod
    def forward(ctx: Any, of_chunk: Callable[..., Tensor], chunks: list[slice], *tensors: Tensor) -> Tensor:
        ctx.of_chunk, ctx.chunks = of_chunk, chunks
        ctx.save_for_backward(*tensors)
        return torch.stack([of_chunk(chunk, *tensors) for chunk in chunks]).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[2:]
        leaves = [tensor.detach().requires_grad_(need) for tensor, need in zip(ctx.saved_tensors, needed, strict=True)]
        for chunk in ctx.chunks:
            with torch.enable_grad():
                torch.autograd.backward(ctx.of_chunk(chunk, *leaves), grads[0])
        return None, None, *(leaf.grad for leaf in leaves)


def _at_least_float32(features: Features) -> Features:
    return features.float() if features.dtype in (torch.float16, torch.bfloat16) else features
