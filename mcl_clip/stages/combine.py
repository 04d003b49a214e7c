"""Combine the stages into one model: the combination and its temperature are fitted on held-out training rows."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mcl_clip.model.multistage import COMBINATIONS, combine_features

MAX_LOG_LOGIT_SCALE = math.log(100)


@dataclass(frozen=True, kw_only=True)
class Combination:
    """A combination of stages with its fitted temperature."""

    combine: str  # `concat` or `mean_cosine`
    logit_scale: float  # logarithm of the scale of the cosine
    logit_bias: float | None  # of the logits of the sigmoid loss; None for InfoNCE
    losses: Mapping[str, float]  # on the held-out rows, of each combination that was tried


def fit_combination(
    image_features: Sequence[Float[Tensor, "rows _dim"]],
    text_features: Sequence[Float[Tensor, "rows _dim"]],
    *,
    combine: str,
    loss: str,
) -> Combination:
    """Fit the temperature with the lowest loss (`clip` or `siglip`) on unnormalized features of held-out rows.

    There is one tensor of features for each stage. With `best` in place of `concat` or `mean_cosine`, the better
    combination is chosen too.
    """
    fits = {}
    for name in COMBINATIONS if combine == "best" else (combine,):
        cosine = combine_features(text_features, name).double() @ combine_features(image_features, name).double().T
        fits[name] = _fit(cosine, loss)
    best = min(fits, key=lambda name: fits[name][2])
    scale, bias, _ = fits[best]
    losses = {name: fit[2] for name, fit in fits.items()}
    return Combination(combine=best, logit_scale=scale, logit_bias=bias, losses=losses)


def _fit(cosine: Float[Tensor, "rows rows"], loss: str) -> tuple[float, float | None, float]:
    """Return log scale, bias and loss at the minimum."""
    parameters = torch.tensor([math.log(20), -5.0], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([parameters], max_iter=100, line_search_fn="strong_wolfe")

    def value() -> Tensor:
        logits = parameters[0].clamp(max=MAX_LOG_LOGIT_SCALE).exp() * cosine
        if loss == "siglip":
            sign = 2 * torch.eye(len(cosine), dtype=cosine.dtype) - 1
            return -F.logsigmoid(sign * (logits + parameters[1])).sum(1).mean()
        target = torch.arange(len(cosine))
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    def closure() -> Tensor:
        optimizer.zero_grad()
        current = value()
        current.backward()  # type: ignore[no-untyped-call]
        return current

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        parameters[0].clamp_(0, MAX_LOG_LOGIT_SCALE)
        scale, bias = parameters.tolist()
        return scale, bias if loss == "siglip" else None, float(value())
