"""Contrastive losses over the global batch, with the negatives of a row restricted to its own group.

Each process holds the rows of its slice and sees the columns of all processes. What is returned is this process's
share, scaled so that the mean over processes (which DistributedDataParallel takes of gradients) is the loss of the
global batch:

    L = sum_i w_i l_i / sum_i w_i.

A column is a negative of a row when both have the same group (Multistage Contrastive Learning, arXiv 2402.11816, and
CLIP-MoE, arXiv 2409.19291, equation 1), so the loss is the published one whatever a batch is made of.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mcl_clip.distributed import all_reduce_sum, gather, gather_with_grad, rank, world_size

Features = Float[Tensor, "local dim"]
Ids = Int64[Tensor, "local"]


@dataclass(frozen=True, kw_only=True)
class Negatives:
    """Which columns a row is contrasted with, and what each row weighs.

    Attributes:
        keep: the row's own column and its negatives.
        own: column of the row itself.
        weight: 1 for rows that count, 0 for fillers and rows with fewer than `min_negatives` negatives.
        total_weight: sum of the weights over all processes, at least 1.
        num_negatives: negatives of each row.
        duplicates: pairs of different places in this process's rows with an equal caption or image, masked or not.
    """

    keep: Bool[Tensor, "local global"]
    own: Int64[Tensor, "local"]
    weight: Float[Tensor, "local"]
    total_weight: Float[Tensor, ""]
    num_negatives: Int64[Tensor, "local"]
    duplicates: Int64[Tensor, ""]


def find_negatives(
    *,
    rows: Ids,
    groups: Ids,
    text_ids: Ids,
    image_ids: Ids,
    min_negatives: int = 1,
    mask_duplicates: bool = True,
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
    """
    local = len(rows)
    ids = gather(torch.stack([rows, groups, text_ids, image_ids], dim=1))
    all_rows, all_groups, all_texts, all_images = ids.unbind(1)
    own = rank() * local + torch.arange(local, device=rows.device)
    is_row, is_column = rows >= 0, all_rows >= 0
    is_other = own[:, None] != torch.arange(len(ids), device=rows.device)
    candidates = is_other & is_row[:, None] & is_column & (groups[:, None] == all_groups)
    same_row = rows[:, None] == all_rows
    alike = candidates & ((text_ids[:, None] == all_texts) | (image_ids[:, None] == all_images) | same_row)
    negatives = candidates & ~(alike if mask_duplicates else same_row)
    num_negatives = negatives.sum(1)
    weight = (is_row & (num_negatives >= min_negatives)).float()
    return Negatives(
        keep=negatives | ~is_other,
        own=own,
        weight=weight,
        total_weight=all_reduce_sum(weight.sum()).clamp(min=1),
        num_negatives=num_negatives,
        duplicates=alike.sum(),
    )


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
    images, texts = _at_least_float32(image_features), _at_least_float32(text_features)
    all_images, all_texts = gather_with_grad(images), gather_with_grad(texts)
    losses = []
    for cosines in (images @ all_texts.T, texts @ all_images.T):
        losses += [
            _cross_entropy(logit_scale * each, negatives) for each in _with_moved(cosines, negatives, ifm_epsilon)
        ]
    return _share(torch.stack(losses).mean(0), negatives)


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
    cosines = images @ gather_with_grad(texts).T
    sign = _pair_signs(cosines, negatives)
    losses = [
        -F.logsigmoid(sign * (logit_scale * each + logit_bias)).masked_fill(~negatives.keep, 0).sum(1)
        for each in _with_moved(cosines, negatives, ifm_epsilon)
    ]
    return _share(torch.stack(losses).mean(0), negatives)


def _with_moved(
    cosines: Float[Tensor, "local global"], negatives: Negatives, epsilon: float
) -> list[Float[Tensor, "local global"]]:
    """The cosines and, with `epsilon` above 0, the same with the pair's own lower and all others higher by epsilon.

    That is what the worst perturbation of the features by epsilon does (implicit feature modification, Robinson et al.,
    arXiv 2106.11230, section 4): it takes away what the loss relies on most, so that other features are learned.
    """
    return [cosines, cosines - epsilon * _pair_signs(cosines, negatives)] if epsilon else [cosines]


def _pair_signs(cosines: Float[Tensor, "local global"], negatives: Negatives) -> Float[Tensor, "local global"]:
    """1 for a row's own column, -1 for all others."""
    return (-torch.ones_like(cosines)).scatter_(1, negatives.own[:, None], 1)


def _cross_entropy(logits: Float[Tensor, "local global"], negatives: Negatives) -> Float[Tensor, "local"]:
    return F.cross_entropy(logits.masked_fill(~negatives.keep, -torch.inf), negatives.own, reduction="none")


def _share(losses: Float[Tensor, "local"], negatives: Negatives) -> Float[Tensor, ""]:
    return (losses * negatives.weight).sum() * world_size() / negatives.total_weight


def _at_least_float32(features: Features) -> Features:
    return features.float() if features.dtype in (torch.float16, torch.bfloat16) else features
