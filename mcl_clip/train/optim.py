"""Optimizer, parameter groups, learning rate schedule and weight averaging.

What depends on the step is a pure function of the step, so that resuming needs no state of a scheduler.
"""

import math
import re
from collections.abc import Mapping

import torch
from timm.optim.lars import Lars
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from mcl_clip.config import TrainConfig
from mcl_clip.core.errors import UserError

# Learned positions, class tokens and pooling queries: values that are added or attended to, not weights of a product.
ADDED = re.compile(
    r"(pos(ition(al)?)?_?embed(ding)?s?|embed_positions|rel_embeddings|relative_(position|attention)_bias(_table)?|"
    r"rel_pos_[hw]|attention_biases|(cls|class|reg|dist|mask)_(token|emb|embed|embedding)|attn_pool\.(latent|query))"
    r"(\.weight)?$"
)


def create_optimizer(model: nn.Module, config: TrainConfig, *, decays_unlisted: bool = False) -> Optimizer:
    """Create the optimizer of the trainable parameters.

    The parameters of `find_undecayed` are not decayed unless `config.weight_decays` says so. Each parameter group has
    `lr_scale`, its factor on the learning rate of the step.

    Raises:
        UserError: if a regular expression is malformed or matches no trainable parameter.
    """
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    undecayed = set(find_undecayed(model, decays_unlisted=decays_unlisted))
    scale_of = dict.fromkeys(named, 1.0)
    decay_of = {name: 0.0 if name in undecayed else config.weight_decay for name in named}
    _override(scale_of, config.lr_multipliers, "--stages.K.train.lr-multipliers")
    _override(decay_of, config.weight_decays, "--stages.K.train.weight-decays")
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named.items():
        groups.setdefault((scale_of[name], decay_of[name]), []).append(parameter)
    options = [
        {"params": parameters, "lr_scale": scale, "weight_decay": decay}
        for (scale, decay), parameters in groups.items()
    ]
    if config.optimizer == "sgd":
        return SGD(options, lr=config.lr, momentum=config.momentum, fused=True)
    if config.optimizer == "lars":  # which adapts the rate of parameters that are decayed
        return Lars(options, lr=config.lr, momentum=config.momentum)
    return AdamW(options, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def find_undecayed(model: nn.Module, *, decays_unlisted: bool = False) -> list[str]:
    """List the trainable parameters that are not decayed: vectors (gains, biases), positions, class and pooling tokens.

    They are recognized by their shape, by the `no_weight_decay()` of open_clip's and timm's modules, and by their names
    elsewhere. With `decays_unlisted`, as in version 0.6, only what the whole model lists and parameters of fewer than
    two dimensions are left out, so that positions and tokens of timm and Hugging Face towers are decayed.
    """
    modules = [("", model)] if decays_unlisted else model.named_modules()
    listed = {
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in modules if hasattr(module, "no_weight_decay")
        for name in module.no_weight_decay()  # type: ignore[operator]
    }  # fmt: skip

    def is_undecayed(name: str, parameter: nn.Parameter) -> bool:
        if name in listed or parameter.ndim < 2:
            return True
        is_vector = parameter.numel() == max(parameter.shape)  # such as a gain of shape [channels, 1, 1]
        return not decays_unlisted and (is_vector or bool(ADDED.search(name)))

    return [name for name, p in model.named_parameters() if p.requires_grad and is_undecayed(name, p)]


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
