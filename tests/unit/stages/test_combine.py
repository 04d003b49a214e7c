import math
from itertools import product

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, logsigmoid, normalize

from mcl_clip.stages.combine import fit_combination


def features(stages: int, noise: float, rows: int = 60) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Un-normalised features of pairs; stages have their own dimensions and lengths."""
    draw = torch.Generator().manual_seed(0)
    images = [(s + 1) * torch.randn(rows, 8 + 2 * s, generator=draw) for s in range(stages)]
    return images, [
        image + noise * (s + 1) * torch.randn(image.shape, generator=draw) for s, image in enumerate(images)
    ]


def losses_around(images, texts, combine: str, loss: str, scale: float, bias: float) -> float:
    parts = (
        (images, texts) if combine == "concat" else ([normalize(f, dim=1) for f in side] for side in (images, texts))
    )
    image, text = (normalize(torch.cat(list(side), 1).double(), dim=1) for side in parts)
    logits = math.exp(scale) * image @ text.T
    if loss == "clip":
        target = torch.arange(len(image))
        return float(cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
    return float(-logsigmoid((logits + bias) * (2 * torch.eye(len(image)) - 1)).sum() / len(image))


@pytest.mark.parametrize("combine", ["concat", "mean_cosine"])
@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_temperature_and_bias_are_at_the_minimum(combine, loss):
    images, texts = features(2, 1.5)
    fitted = fit_combination(images, texts, combine=combine, loss=loss)
    scale, bias = fitted.logit_scale, fitted.logit_bias or 0.0
    assert fitted.combine == combine
    assert (fitted.logit_bias is None) == (loss == "clip")
    best = losses_around(images, texts, combine, loss, scale, bias)
    assert fitted.losses == {combine: pytest.approx(best, rel=1e-6)}
    for step in (-0.05, 0.05):
        assert losses_around(images, texts, combine, loss, scale + step, bias) > best
        assert loss == "clip" or losses_around(images, texts, combine, loss, scale, bias + step) > best


def test_the_best_way_to_combine_is_chosen():
    images, texts = features(2, 0.8)
    images[1] = torch.randn(images[1].shape, generator=torch.Generator().manual_seed(1)) * 20  # long and of no use
    fitted = fit_combination(images, texts, combine="best", loss="clip")
    assert set(fitted.losses) == {"concat", "mean_cosine"}
    assert fitted.combine == "mean_cosine"
    assert fitted.losses["mean_cosine"] == min(fitted.losses.values())


def weighted_loss(images, texts, loss: str, factors: list[float], bias: float) -> float:
    cosines = [
        normalize(i.double(), dim=1) @ normalize(t.double(), dim=1).T for i, t in zip(images, texts, strict=True)
    ]
    logits = sum(factor * cosine for factor, cosine in zip(factors, cosines, strict=True))
    if loss == "clip":
        target = torch.arange(len(logits))
        return float(cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
    return float(-logsigmoid((logits + bias) * (2 * torch.eye(len(logits)) - 1)).sum() / len(logits))


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_weights_of_the_stages_are_at_the_minimum(loss):
    images, texts = features(3, 1.5)
    images[2] = torch.randn(images[2].shape, generator=torch.Generator().manual_seed(1))  # of no use
    fitted = fit_combination(images, texts, combine="weighted", loss=loss)
    assert sum(fitted.weights) == pytest.approx(1)
    assert fitted.weights[2] < 0.05 < min(fitted.weights[:2])
    factors, bias = [math.exp(fitted.logit_scale) * weight for weight in fitted.weights], fitted.logit_bias or 0.0
    best = weighted_loss(images, texts, loss, factors, bias)
    assert fitted.losses == {"weighted": pytest.approx(best, rel=1e-6)}
    assert best < min(fit_combination(images, texts, combine="mean_cosine", loss=loss).losses.values())
    for s, step in product(range(2), (0.9, 1.1)):
        changed = [factor * step if k == s else factor for k, factor in enumerate(factors)]
        assert weighted_loss(images, texts, loss, changed, bias) > best


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_the_factor_stays_between_1_and_100(loss):
    same, _ = features(1, 0.0)
    assert fit_combination(same, same, combine="weighted", loss=loss).logit_scale <= math.log(100) + 1e-9
    assert fit_combination(same, same, combine="concat", loss=loss).logit_scale <= math.log(100) + 1e-9
    unrelated = [torch.from_numpy(np.random.default_rng(5).normal(size=(60, 8)))]
    assert fit_combination(same, unrelated, combine="concat", loss=loss).logit_scale >= 0


@pytest.mark.parametrize("combine", ["concat", "weighted"])
def test_the_bias_is_the_best_one_at_the_largest_factor(combine):
    images, texts = features(1, 0.05)
    fitted = fit_combination(images, texts, combine=combine, loss="siglip")
    scale, bias = fitted.logit_scale, fitted.logit_bias
    assert scale == pytest.approx(math.log(100))
    best = losses_around(images, texts, "concat", "siglip", scale, bias)
    for step in (-0.05, 0.05):
        assert losses_around(images, texts, "concat", "siglip", scale, bias + step) > best
