"""Contrastive losses over the global batch, with the negatives of a row restricted to its own group.

Rows are pairs of an image and a caption or, for `simclr_loss`, images with several views.

Each process holds the rows of its slice and sees the columns of all processes. The losses return this process's share,
scaled so that the mean over processes (which DistributedDataParallel takes of gradients) is the loss of the global
batch:

    L = sum_i w_i l_i / sum_i w_i.

A column is a negative of a row if both have the same group (Multistage Contrastive Learning, arXiv 2402.11816, and
CLIP-MoE, arXiv 2409.19291, equation 1), so the loss is the published one however a batch is composed. The opposite,
negatives of all other groups, is there to compare with.

Masks and logits have one entry per row and column. With `chunk_rows` they are computed for that many rows at a time,
and recomputed in the backward pass, so that memory grows with the batch and not with its square.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float16, Int64
from torch import Tensor

from mcl_clip.core.distributed import all_reduce_sum, gather, gather_with_grad, rank, world_size

MASKED = -1e30  # a logit of no weight, finite so that its share of a divergence is 0

Features = Float[Tensor, "local dim"]
Ids = Int64[Tensor, "local"]


@dataclass(frozen=True, kw_only=True)
class Similarity:
    """Unit features under another model, by which rows that are too similar are no negatives of each other.

    Sums of products of float16 values are exact in float64, so that the mask depends on no order of summation, hence
    not on the number of processes.
    """

    features: Float16[Tensor, "local dim"]
    columns: Float16[Tensor, "global dim"]  # the same for the rows of all processes
    threshold: float

    def exceeds(self, rows: slice) -> Bool[Tensor, "rows global"]:
        """Return for `rows` and all columns whether their cosine is above the threshold."""
        return self.features[rows].double() @ self.columns.double().T > self.threshold


@dataclass(frozen=True, kw_only=True)
class Negatives:
    """The negatives and the weight of each row of this process."""

    ids: Int64[Tensor, "local 4"]  # row number, group, hash of the tokens, hash of the image of this process's rows
    columns: Int64[Tensor, "global 4"]  # the same for the rows of all processes
    own: Int64[Tensor, "local"]  # column of the row itself
    of_other_groups: bool
    mask_duplicates: bool
    similarity: Similarity | None
    chunk_rows: int
    weight: Float[Tensor, "local"]  # 0 for padding rows and rows with fewer than `min_negatives` negatives, else 1
    total_weight: Float[Tensor, ""]  # sum over all processes, at least 1
    num_negatives: Int64[Tensor, "local"]
    losses: Float[Tensor, "local"]  # filled when the loss is computed
    duplicates: Int64[Tensor, ""]  # candidates of this process's rows with an equal caption or image, masked or not
    similar: Int64[Tensor, ""]  # candidates masked by `similarity`, without these duplicates

    def keep(self, rows: slice) -> Bool[Tensor, "rows global"]:
        """Return the mask of the columns in the loss of `rows`: the row itself and its negatives."""
        negatives, _ = _compare(
            self.ids[rows], self.columns, self.own[rows], of_other_groups=self.of_other_groups,
            mask_duplicates=self.mask_duplicates,
        )  # fmt: skip
        if self.similarity is not None:
            negatives &= ~self.similarity.exceeds(rows)
        return negatives.scatter_(1, self.own[rows, None], True)


@dataclass(frozen=True, kw_only=True)
class WrongCaptions:
    """Unit features of wrong captions of this process's rows: further negatives of the row's own image.

    As in NegCLIP (Yuksekgonul et al., arXiv 2210.01936), where they are negatives of all images of a batch.
    """

    features: Float[Tensor, "local number dim"]
    is_negative: Bool[Tensor, "local number"]  # the others only fill up the tensor


def find_negatives(
    *,
    rows: Ids,
    groups: Ids,
    text_ids: Ids,
    image_ids: Ids,
    min_negatives: int = 1,
    of_other_groups: bool = False,
    mask_duplicates: bool = True,
    similarity: Similarity | None = None,
    chunk_rows: int = 0,
) -> Negatives:
    """Find the negatives of this process's rows among the rows of all processes.

    Args:
        rows: row numbers; a negative number marks a padding row, which is a negative of no row.
        groups: group of each row, see above.
        text_ids: hash of each row's tokens.
        image_ids: hash of each row's image bytes.
        min_negatives: rows with fewer negatives get weight 0.
        of_other_groups: the negatives of a row are the rows of all groups but its own.
        mask_duplicates: exclude other rows with an equal caption or an equal image from the negatives. A second copy
            of the same row, possible in a weighted mixture, is always excluded.
        similarity: excludes rows that are similar from the negatives.
        chunk_rows: rows compared with all others at a time, here and in the loss; 0 is all.
    """
    ids = torch.stack([rows, groups, text_ids, image_ids], dim=1)
    columns = gather(ids)
    own = rank() * len(ids) + torch.arange(len(ids), device=rows.device)
    num_negatives, num_duplicates, num_similar = (torch.zeros_like(own) for _ in range(3))
    for chunk in _chunks(len(ids), chunk_rows):
        negatives, duplicates = _compare(
            ids[chunk], columns, own[chunk], of_other_groups=of_other_groups, mask_duplicates=mask_duplicates
        )
        num_duplicates[chunk] = duplicates.sum(1)
        if similarity is not None:
            similar = negatives & similarity.exceeds(chunk)
            negatives &= ~similar
            num_similar[chunk] = (similar & ~duplicates).sum(1)
        num_negatives[chunk] = negatives.sum(1)
    weight = ((rows >= 0) & (num_negatives >= min_negatives)).float()
    return Negatives(
        ids=ids, columns=columns, own=own, of_other_groups=of_other_groups, mask_duplicates=mask_duplicates,
        similarity=similarity, chunk_rows=chunk_rows, weight=weight,
        total_weight=all_reduce_sum(weight.sum()).clamp(min=1), num_negatives=num_negatives,
        losses=torch.zeros_like(weight), duplicates=num_duplicates.sum(), similar=num_similar.sum(),
    )  # fmt: skip


def _compare(
    ids: Int64[Tensor, "rows 4"],
    columns: Int64[Tensor, "global 4"],
    own: Int64[Tensor, "rows"],
    *,
    of_other_groups: bool,
    mask_duplicates: bool,
) -> tuple[Bool[Tensor, "rows global"], Bool[Tensor, "rows global"]]:
    """Return masks of the negatives of `ids`, and of the candidates with an equal caption, image or row number."""
    same_row, same_group, same_text, same_image = (
        mine[:, None] == others for mine, others in zip(ids.unbind(1), columns.unbind(1), strict=True)
    )
    candidates = (~same_group if of_other_groups else same_group) & (ids[:, :1] >= 0) & (columns[:, 0] >= 0)
    candidates.scatter_(1, own[:, None], False)
    duplicates = candidates & (same_text | same_image | same_row)
    return candidates & ~(duplicates if mask_duplicates else same_row), duplicates


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
    wrong: WrongCaptions | None = None,
) -> Float[Tensor, ""]:
    """Compute this process's share of InfoNCE in both directions (Radford et al., arXiv 2103.00020).

    l_i = (CE_i(image -> texts) + CE_i(text -> images)) / 2, over the row itself and its negatives, in float32 or more.
    The features of this process's rows have unit length, and `logit_scale` is the factor on the cosines, not its
    logarithm. With `ifm_epsilon`, this loss is averaged with the one of perturbed cosines, see `_with_perturbed`. The
    `wrong` captions of a row are further negatives in the direction image -> texts.
    """
    all_images, all_texts = (gather_with_grad(_at_least_float32(side)) for side in (image_features, text_features))
    first = rank() * len(image_features)

    def row_losses(
        rows: slice, all_images: Tensor, all_texts: Tensor, logit_scale: Tensor, *wrong_features: Tensor
    ) -> Tensor:
        kept, own = negatives.keep(rows), negatives.own[rows]
        columns = slice(first + rows.start, first + rows.stop)
        losses = []
        for side, others in ((all_images, all_texts), (all_texts, all_images)):
            cosines, keep = side[columns] @ others.T, kept
            if wrong is not None and side is all_images:
                cosines, keep = _append(cosines, kept, side[columns], wrong_features[0][rows], wrong.is_negative[rows])
            for perturbed in _with_perturbed(cosines, own, ifm_epsilon):
                # Not named, so that these logits are freed before the next ones are made.
                losses.append(
                    F.cross_entropy((logit_scale * perturbed).masked_fill(~keep, -torch.inf), own, reduction="none")
                )
        return torch.stack(losses).mean(0)

    return _share(row_losses, negatives, all_images, all_texts, logit_scale, *_features_of(wrong))


def siglip_loss(
    image_features: Features,
    text_features: Features,
    logit_scale: Float[Tensor, ""],
    logit_bias: Float[Tensor, ""],
    negatives: Negatives,
    *,
    ifm_epsilon: float = 0.0,
    wrong: WrongCaptions | None = None,
) -> Float[Tensor, ""]:
    """Compute this process's share of the pairwise sigmoid loss (SigLIP, Zhai et al., arXiv 2303.15343).

    l_i = - sum_j log sigmoid(z_ij (scale <image_i, text_j> + bias)), z_ij = 1 for j = i, else -1, over the row itself
    and its negatives. Arguments are those of `clip_loss`; `logit_bias` is added to the logits.
    """
    images, texts = _at_least_float32(image_features), _at_least_float32(text_features)

    def row_losses(
        rows: slice, images: Tensor, all_texts: Tensor, logit_scale: Tensor, logit_bias: Tensor, *wrong_features: Tensor
    ) -> Tensor:
        keep, own = negatives.keep(rows), negatives.own[rows]
        cosines = images[rows] @ all_texts.T
        if wrong is not None:
            cosines, keep = _append(cosines, keep, images[rows], wrong_features[0][rows], wrong.is_negative[rows])
        sign = _pair_signs(cosines, own)
        losses = [
            -F.logsigmoid(sign * (logit_scale * perturbed + logit_bias)).masked_fill(~keep, 0).sum(1)
            for perturbed in _with_perturbed(cosines, own, ifm_epsilon)
        ]
        return torch.stack(losses).mean(0)

    all_texts = gather_with_grad(texts)
    return _share(row_losses, negatives, images, all_texts, logit_scale, logit_bias, *_features_of(wrong))


def simclr_loss(
    views: Float[Tensor, "local views dim"],
    logit_scale: Float[Tensor, ""],
    negatives: Negatives,
    *,
    ifm_epsilon: float = 0.0,
) -> Float[Tensor, ""]:
    """Compute this process's share of InfoNCE between views of images (NT-Xent, Chen et al., arXiv 2002.05709).

    l_i is the mean over all ordered pairs of different views v, w of row i of

        -log (e^s(v_i, w_i) / (e^s(v_i, w_i) + sum_j sum_u e^s(v_i, u_j))),  s(a, b) = logit_scale <a, b>,

    where j runs over the negatives of the row, and u over all of their views: of N rows with two views in one group,
    each view has 2N - 2 negatives. Other arguments are those of `clip_loss`.
    """
    all_views = gather_with_grad(_at_least_float32(views))
    first, number = rank() * len(views), views.shape[1]

    def row_losses(rows: slice, all_views: Tensor, logit_scale: Tensor) -> Tensor:
        keep = negatives.keep(rows).scatter_(1, negatives.own[rows, None], False).repeat_interleave(number, dim=1)
        own, columns = all_views[first + rows.start : first + rows.stop], all_views.flatten(0, 1).T
        losses = []
        for view in range(number):
            others = (logit_scale * (own[:, view] @ columns)).masked_fill(~keep, -torch.inf).logsumexp(1)
            for other in (number for number in range(number) if number != view):
                positive = logit_scale * (own[:, view] * own[:, other]).sum(1)
                # Lower positive and higher negative cosines add up in the difference, see `_with_perturbed`.
                shifts = (0.0, 2 * ifm_epsilon) if ifm_epsilon else (0.0,)
                losses += [F.softplus(others - positive + shift * logit_scale) for shift in shifts]
        return torch.stack(losses).mean(0)

    return _share(row_losses, negatives, all_views, logit_scale)


def _features_of(wrong: WrongCaptions | None) -> list[Tensor]:
    return [] if wrong is None else [_at_least_float32(wrong.features)]


def _append(
    cosines: Float[Tensor, "rows global"],
    keep: Bool[Tensor, "rows global"],
    images: Float[Tensor, "rows dim"],
    wrong: Float[Tensor, "rows number dim"],
    is_negative: Bool[Tensor, "rows number"],
) -> tuple[Float[Tensor, "rows columns"], Bool[Tensor, "rows columns"]]:
    """Append columns of the wrong captions of each row to its cosines and its mask."""
    of_wrong = (wrong @ images[:, :, None]).squeeze(2)
    return torch.cat([cosines, of_wrong], dim=1), torch.cat([keep, is_negative], dim=1)


def distillation_loss(
    image_features: Features,
    text_features: Features,
    logit_scale: Float[Tensor, ""],
    teacher: Mapping[str, Tensor],
    negatives: Negatives,
    *,
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """Compute this process's share of the distillation of a teacher's similarities (arXiv 1503.02531).

    l_i = T^2 (KL(p_i || q_i) + KL(p*_i || q*_i)) / 2, where p_i is the softmax of the teacher's s <image_i, text_j> / T
    over the columns j of row i, q_i is that of the model, and p*, q* are those from texts to images. The columns and
    weights are those of `negatives`; `teacher` has `image_features`, `text_features` and `logit_scale`.
    """
    all_images, all_texts = (gather_with_grad(_at_least_float32(side)) for side in (image_features, text_features))
    names = ("image_features", "text_features")
    taught_images, taught_texts = (gather(_at_least_float32(teacher[name]).to(all_images.dtype)) for name in names)
    first = rank() * len(image_features)

    def row_losses(rows: slice, all_images: Tensor, all_texts: Tensor, logit_scale: Tensor) -> Tensor:
        keep, columns = negatives.keep(rows), slice(first + rows.start, first + rows.stop)

        def log_softmax(queries: Tensor, keys: Tensor, scale: Tensor) -> Tensor:
            logits = scale * (queries[columns] @ keys.T) / temperature
            return logits.masked_fill(~keep, MASKED).log_softmax(1)

        losses = [
            F.kl_div(log_softmax(*of_model), log_softmax(*of_teacher), reduction="none", log_target=True).sum(1)
            for of_model, of_teacher in (
                ((all_images, all_texts, logit_scale), (taught_images, taught_texts, teacher["logit_scale"])),
                ((all_texts, all_images, logit_scale), (taught_texts, taught_images, teacher["logit_scale"])),
            )
        ]
        return temperature**2 * torch.stack(losses).mean(0)

    return _share(row_losses, negatives, all_images, all_texts, logit_scale)


def decoding_loss(
    decoded: Features, targets: Float[Tensor, "local dim"], is_row: Bool[Tensor, "local"]
) -> Float[Tensor, ""]:
    """Compute this process's share of latent target decoding (LTD, Bleeker et al., arXiv 2204.13382).

    l_i = 1 - cos(decoded_i, target_i), over the rows of the global batch that are no fillers.
    """
    decoded, targets = _at_least_float32(decoded[is_row]), _at_least_float32(targets[is_row])
    losses = 1 - F.cosine_similarity(decoded, targets.to(decoded), dim=1)
    return losses.sum() * world_size() / all_reduce_sum(is_row.sum()).clamp(min=1)


def _with_perturbed(
    cosines: Float[Tensor, "rows global"], own: Int64[Tensor, "rows"], epsilon: float
) -> list[Float[Tensor, "rows global"]]:
    """Return the cosines and, with `epsilon` above 0, the perturbed ones of implicit feature modification.

    The perturbed cosine of the pair is lower by epsilon, all others are higher, which is the effect of the worst
    perturbation of the features by epsilon (Robinson et al., arXiv 2106.11230, section 4).
    """
    return [cosines, cosines - epsilon * _pair_signs(cosines, own)] if epsilon else [cosines]


def _pair_signs(cosines: Float[Tensor, "rows global"], own: Int64[Tensor, "rows"]) -> Float[Tensor, "rows global"]:
    """Return 1 for the own column of each row, -1 for all others."""
    return (-torch.ones_like(cosines)).scatter_(1, own[:, None], 1)


def _share(row_losses: Callable[..., Tensor], negatives: Negatives, *tensors: Tensor) -> Float[Tensor, ""]:
    """Compute this process's share of the loss: `row_losses(rows, *tensors)` returns the losses of a slice of rows."""
    chunks = _chunks(len(negatives.own), negatives.chunk_rows)

    def weighted_sum(rows: slice, *tensors: Tensor) -> Tensor:
        losses = row_losses(rows, *tensors)
        negatives.losses[rows] = losses.detach().to(negatives.losses)
        return (losses * negatives.weight[rows]).sum()

    if len(chunks) > 1:
        total: Tensor = _SumOfChunks.apply(weighted_sum, chunks, *tensors)
    else:
        total = weighted_sum(chunks[0], *tensors)
    # DistributedDataParallel divides gradients by the number of processes.
    return total * world_size() / negatives.total_weight


class _SumOfChunks(torch.autograd.Function):
    """Sum of a function over chunks; saves only its inputs, and recomputes each chunk in the backward pass."""

    @staticmethod
    def forward(ctx: Any, chunk_loss: Callable[..., Tensor], chunks: list[slice], *tensors: Tensor) -> Tensor:
        ctx.chunk_loss, ctx.chunks = chunk_loss, chunks
        ctx.save_for_backward(*tensors)
        return torch.stack([chunk_loss(chunk, *tensors) for chunk in chunks]).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[2:]
        leaves = [tensor.detach().requires_grad_(need) for tensor, need in zip(ctx.saved_tensors, needed, strict=True)]
        for chunk in ctx.chunks:
            with torch.enable_grad():
                torch.autograd.backward(ctx.chunk_loss(chunk, *leaves), grads[0])
        return None, None, *(leaf.grad for leaf in leaves)


def _at_least_float32(features: Tensor) -> Tensor:
    return features.float() if features.dtype in (torch.float16, torch.bfloat16) else features
