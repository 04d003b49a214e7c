"""Optimiser, parameter groups and learning rate; what depends on the step is a pure function of the step."""

import math
import re
from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.optim import AdamW

from mcl_clip.core.errors import UserError


def create_optimizer(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    lr_multipliers: Mapping[str, float],
    weight_decays: Mapping[str, float],
) -> AdamW:
    """AdamW over the parameters that train.

    Gains, biases, positions and everything else with fewer than two dimensions, and what the model lists in
    `no_weight_decay()`, are not decayed. Each group has `lr_scale`, the factor on the learning rate of the step.

    Args:
        model: the unwrapped model.
        lr: learning rate at its peak.
        weight_decay: of matrices and kernels.
        betas: of Adam.
        eps: of Adam.
        lr_multipliers: regular expression of parameter names -> factor on the learning rate; the last match counts.
        weight_decays: regular expression -> weight decay, in place of the rule above; the last match counts.

    Raises:
        UserError: if an expression is malformed or matches no parameter that trains.
    """
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    skip = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()  # type: ignore[operator]
    scale_of = _by_pattern(named, lr_multipliers, "lr-multipliers", lambda _: 1.0)
    decay_of = _by_pattern(
        named, weight_decays, "weight-decays", lambda n: 0.0 if named[n].ndim < 2 or n in skip else weight_decay
    )
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named.items():
        groups.setdefault((scale_of[name], decay_of[name]), []).append(parameter)
    return AdamW(
        [
            {"params": parameters, "lr_scale": scale, "weight_decay": decay}
            for (scale, decay), parameters in sorted(groups.items(), key=lambda item: item[0])
        ],
        lr=lr,
        betas=betas,
        eps=eps,
        fused=True,
    )


def _by_pattern(
    named: Mapping[str, nn.Parameter], values: Mapping[str, float], option: str, default: Callable[[str], float]
) -> dict[str, float]:
    result = {name: default(name) for name in named}
    for pattern, value in values.items():
        try:
            matching = [name for name in named if re.search(pattern, name)]
        except re.error as error:
            raise UserError(f"{option} {pattern!r} is not a regular expression: {error}") from error
        if not matching:
            raise UserError(f"{option} {pattern!r} matches none of the {len(named)} parameters that train")
        result.update(dict.fromkeys(matching, value))
    return result


def lr_at(step: int, *, total_steps: int, warmup_steps: int, schedule: str) -> float:
    """Factor on the learning rate of a step: a linear warm-up, then `cosine` to 0 or `constant`."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, total_steps - warmup_steps)))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its learning rate for the coming step."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


class ExponentialAverage:
    """Running average of the weights that train, for evaluation and export.

    After t steps the average a becomes d a + (1 - d) w, d = min(decay, (1 + t) / (10 + t)): the start is forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.average = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after `step` updates."""
        decay = min(self.decay, (1 + step) / (10 + step))
        named = dict(model.named_parameters())
        torch._foreach_lerp_(list(self.average.values()), [named[name].detach() for name in self.average], 1 - decay)

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Exchange the weights of the model with the average; twice is nothing."""
        named = dict(model.named_parameters())
        for name, average in self.average.items():
            kept = named[name].detach().clone()
            named[name].copy_(average)
            average.copy_(kept)
