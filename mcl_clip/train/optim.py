"""Optimizer, parameter groups, learning rate schedule and weight averaging.

What depends on the step is a pure function of the step, so that resuming needs no state of a scheduler.
"""

import math
import re
from collections.abc import Mapping

import torch
from torch import nn
from torch.optim import AdamW

from mcl_clip.config import TrainConfig
from mcl_clip.core.errors import UserError


def create_optimizer(model: nn.Module, config: TrainConfig) -> AdamW:
    """Create AdamW over the trainable parameters.

    Parameters with fewer than two dimensions (gains, biases), and those that the model lists in `no_weight_decay()`
    (positions), are not decayed unless `config.weight_decays` says so. Each parameter group has `lr_scale`, its factor
    on the learning rate of the step.

    Raises:
        UserError: if a regular expression is malformed or matches no trainable parameter.
    """
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    skip = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()  # type: ignore[operator]
    scale_of = dict.fromkeys(named, 1.0)
    decay_of = {name: 0.0 if p.ndim < 2 or name in skip else config.weight_decay for name, p in named.items()}
    _override(scale_of, config.lr_multipliers, "lr-multipliers")
    _override(decay_of, config.weight_decays, "weight-decays")
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named.items():
        groups.setdefault((scale_of[name], decay_of[name]), []).append(parameter)
    options = [
        {"params": parameters, "lr_scale": scale, "weight_decay": decay}
        for (scale, decay), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]
    return AdamW(options, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def _override(values: dict[str, float], patterns: Mapping[str, float], option: str) -> None:
    """Set the values of parameters by regular expressions of their names, in place; the last match counts."""
    for pattern, value in patterns.items():
        try:
            matching = [name for name in values if re.search(pattern, name)]
        except re.error as error:
            raise UserError(f"{option} {pattern!r} is not a regular expression: {error}") from error
        if not matching:
            raise UserError(f"{option} {pattern!r} matches none of the {len(values)} parameters that train")
        values.update(dict.fromkeys(matching, value))


def lr_at(step: int, config: TrainConfig) -> float:
    """Return the learning rate of a step: linear warmup, then `cosine` decay to 0 or `constant`."""
    if step < config.warmup_steps:
        return config.lr * ((step + 1) / config.warmup_steps)
    if config.schedule == "constant":
        return config.lr
    angle = math.pi * (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.lr * (0.5 * (1 + math.cos(angle)))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group, scaled by its `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


class ExponentialAverage:
    """Exponential moving average (EMA) of the trainable weights, for evaluation and export.

    After step t the average is d * average + (1 - d) * weights with d = min(decay, (1 + t) / (10 + t)); the growing
    decay lets the average forget the initial weights.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.average = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Update the average with the weights after `step` optimizer steps."""
        decay = min(self.decay, (1 + step) / (10 + step))
        named = dict(model.named_parameters())
        torch._foreach_lerp_(list(self.average.values()), [named[name].detach() for name in self.average], 1 - decay)

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Swap the weights of the model with the average; calling it twice restores both."""
        named = dict(model.named_parameters())
        for name, average in self.average.items():
            weights = named[name].detach().clone()
            named[name].copy_(average)
            average.copy_(weights)
