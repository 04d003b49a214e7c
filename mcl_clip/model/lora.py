"""LoRA: train low-rank updates of the matrices of a tower (arXiv 2106.09685), by the layers of peft.

`add_lora` puts the updates into a model, `merge_lora` adds them to the weights and takes the layers out again, so that
a trained model is a plain one.
"""

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from mcl_clip.config import LoraConfig
from mcl_clip.core.distributed import seed_of
from mcl_clip.core.errors import UserError
from mcl_clip.model.prepare import freeze_batch_norm

SIDES = {"image": (True,), "text": (False,), "both": (True, False)}


def add_lora(model: nn.Module, config: LoraConfig, *, seed: int = 0) -> None:
    """Put low-rank updates into the towers of `config`, in place; of these towers, only they and `config.full` train.

    Linear layers get an update, and of an `nn.MultiheadAttention`, as in blocks of open_clip, the matrix of queries,
    keys and values. At first the updates are zero. Batch norms of the image tower are replaced by frozen ones.

    Raises:
        UserError: without peft, or if a tower has no layer that fits.
    """
    try:
        import peft  # an extra
    except ModuleNotFoundError as error:
        raise UserError(
            f"--stages.K.train.lora.rank {config.rank} needs peft; install it with: pip install 'mcl_clip[lora]'"
        ) from error
    full = [re.compile(pattern) for pattern in config.full]
    named = [(name, p) for name, p in model.named_parameters() if _is_image(name) in SIDES[config.towers]]
    for name, parameter in named:
        if not name.startswith("logit_"):
            parameter.requires_grad_(any(pattern.search(name) for pattern in full))
    if config.towers != "text":
        freeze_batch_norm(model.visual)
    modules, weights = [], []
    for is_image in SIDES[config.towers]:
        found = [(name, layer) for name, layer in _layers(model, config) if _is_image(name) == is_image]
        if not found:
            matching = f" that matches {', '.join(map(repr, config.patterns))}" if config.patterns else ""
            raise UserError(
                f"--stages.K.train.lora.rank {config.rank} finds no linear layer or attention{matching} in the "
                f"{'image' if is_image else 'text'} tower; name the other as --stages.K.train.lora.towers, or use 0"
            )
        modules += [name for name, layer in found if isinstance(layer, nn.Linear)]
        weights += [f"{name}.in_proj_weight" for name, layer in found if isinstance(layer, nn.MultiheadAttention)]
    if config.dropout and weights:
        raise UserError(
            f"--stages.K.train.lora.dropout {config.dropout} cannot be used with attention layers such as "
            f"{weights[0].rpartition('.')[0]}; use 0, or patterns that leave them out"
        )
    settings = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=modules,
        target_parameters=weights or None,
    )  # fmt: skip
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_of("lora", seed))
        peft.inject_adapter_in_model(settings, model)
    for name, parameter in model.named_parameters():  # peft locks everything else
        parameter.requires_grad_(name in trained or ".lora_" in name)


def merge_lora(model: nn.Module) -> None:
    """Add the updates to the weights that they belong to, and restore the layers, in place."""
    for name, layer in list(model.named_modules()):
        if not hasattr(layer, "base_layer") or not hasattr(layer, "merge"):
            continue
        merged: Any = layer
        while hasattr(merged, "base_layer"):
            merged.merge()
            merged = merged.base_layer
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, merged)
    if hasattr(model, "peft_config"):
        del model.peft_config


def _layers(model: nn.Module, config: LoraConfig) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers that get an update: those that match, and no heads, which train in full."""
    patterns, full = [re.compile(p) for p in config.patterns], [re.compile(p) for p in config.full]
    attentions: list[str] = []
    for name, layer in model.named_modules():
        if isinstance(layer, nn.MultiheadAttention):
            attentions.append(f"{name}.")  # which reads the matrix of its output layer, and never calls that layer
        elif not isinstance(layer, nn.Linear) or name.startswith(tuple(attentions)):
            continue
        if any(pattern.search(f"{name}.weight") for pattern in full):
            continue
        if not patterns or any(pattern.search(name) for pattern in patterns):
            yield name, layer


def _is_image(name: str) -> bool:
    return name.startswith("visual.")
