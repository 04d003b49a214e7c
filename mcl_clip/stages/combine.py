"""Combine the stages into one model: combination, weights and temperature are fitted on held-out training rows."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mcl_clip.model.multistage import COMBINATIONS, WEIGHTED, combine_features

MAX_LOG_LOGIT_SCALE = math.log(100)


@dataclass(frozen=True, kw_only=True)
class Combination:
    """A combination of stages with its fitted temperature."""

    combine: str  # `concat`, `mean_cosine` or `weighted`
    logit_scale: float  # logarithm of the scale of the cosine
    logit_bias: float | None  # of the logits of the sigmoid loss; None for InfoNCE
    losses: Mapping[str, float]  # on the held-out rows, of each combination that was tried
    weights: Sequence[float] | None = None  # of the stages, with the sum 1, for `weighted`


def fit_combination(
    image_features: Sequence[Float[Tensor, "rows _dim"]],
    text_features: Sequence[Float[Tensor, "rows _dim"]],
    *,
    combine: str,
    loss: str,
) -> Combination:
    """Fit the temperature with the lowest loss (`clip` or `siglip`) on unnormalized features of held-out rows.

    There is one tensor of features for each stage. With `best` in place of `concat` or `mean_cosine`, the better
    combination is chosen too; with `weighted`, weights of the stages are fitted together with the temperature.
    """
    if combine == WEIGHTED:
        return _fit_weights(image_features, text_features, loss)
    fits = {}
    for name in COMBINATIONS if combine == "best" else (combine,):
        cosine = combine_features(text_features, name).double() @ combine_features(image_features, name).double().T
        fits[name] = _fit(cosine, loss)
    best = min(fits, key=lambda name: fits[name][2])
    scale, bias, _ = fits[best]
    losses = {name: fit[2] for name, fit in fits.items()}
    return Combination(combine=best, logit_scale=scale, logit_bias=bias, losses=losses)


def _fit_weights(
    image_features: Sequence[Float[Tensor, "rows _dim"]], text_features: Sequence[Float[Tensor, "rows _dim"]], loss: str
) -> Combination:
    """Fit the weights w of the stages and the scale s in logits s sum_k w_k cos_k, with w_k >= 0 and sum_k w_k = 1.

    Both losses are convex in the factors s w_k, so there is one minimum. Their logarithms are fitted, which keeps them
    positive; a stage that only harms ends with a weight near 0.
    """
    stages = zip(image_features, text_features, strict=True)
    cosines = torch.stack([F.normalize(t.double()) @ F.normalize(i.double()).T for i, t in stages])
    parameters = torch.tensor([math.log(20 / len(cosines))] * len(cosines) + [-5.0], dtype=torch.float64)

    def value(parameters: Tensor) -> Tensor:
        factors = parameters[:-1].exp()
        factors = factors * (math.exp(MAX_LOG_LOGIT_SCALE) / factors.sum()).clamp(max=1)
        return _loss(torch.einsum("s,stv->tv", factors, cosines), parameters[-1], loss)

    parameters = _minimize(value, parameters)
    scale = min(max(0.0, float(parameters[:-1].logsumexp(0))), MAX_LOG_LOGIT_SCALE)
    weights = parameters[:-1].softmax(0).tolist()
    at_minimum = _loss(
        math.exp(scale) * torch.einsum("s,stv->tv", cosines.new_tensor(weights), cosines), parameters[-1], loss
    )
    bias = float(parameters[-1]) if loss == "siglip" else None
    return Combination(
        combine=WEIGHTED, weights=weights, logit_scale=scale, logit_bias=bias, losses={WEIGHTED: float(at_minimum)}
    )


def _fit(cosine: Float[Tensor, "rows rows"], loss: str) -> tuple[float, float | None, float]:
    """Return log scale, bias and loss at the minimum."""

    def value(parameters: Tensor) -> Tensor:
        return _loss(parameters[0].clamp(max=MAX_LOG_LOGIT_SCALE).exp() * cosine, parameters[1], loss)

    parameters = _minimize(value, torch.tensor([math.log(20), -5.0], dtype=torch.float64))
    parameters[0].clamp_(0, MAX_LOG_LOGIT_SCALE)
    scale, bias = parameters.tolist()
    return scale, bias if loss == "siglip" else None, float(value(parameters))


def _loss(logits: Float[Tensor, "rows rows"], bias: Float[Tensor, ""], loss: str) -> Float[Tensor, ""]:
    """Compute the mean loss of a row; the bias is used by `siglip` only."""
    if loss == "siglip":
        sign = 2 * torch.eye(len(logits), dtype=logits.dtype) - 1
        return -F.logsigmoid(sign * (logits + bias)).sum(1).mean()
    target = torch.arange(len(logits))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def _minimize(value: Callable[[Tensor], Tensor], start: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    """Return the parameters at the minimum of a smooth function."""
    parameters = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([parameters], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        current = value(parameters)
        current.backward()  # type: ignore[no-untyped-call]
        return current

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return parameters.detach()
