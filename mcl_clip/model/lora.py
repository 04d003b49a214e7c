"""LoRA: train low-rank updates of the matrices of a tower (arXiv 2106.09685), by the layers of peft.

`add_lora` puts the updates into a model, `merge_lora` adds them to the weights and takes the layers out again, so that
a trained model is a plain one.
"""

import re
from collections.abc import Collection
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from mcl_clip.config import LoraConfig
from mcl_clip.core.distributed import seed_of
from mcl_clip.core.errors import UserError
from mcl_clip.model.grad_cache import TEMPERATURES
from mcl_clip.model.prepare import freeze_batch_norm

SIDES = {"image": (True,), "text": (False,), "both": (True, False)}


def check_installed(config: LoraConfig) -> None:
    """Raise UserError if a stage asks for low-rank updates and peft is missing."""
    if config.rank and find_spec("peft") is None:
        raise UserError(
            f"--stages.K.train.lora.rank {config.rank} needs peft; install it with: pip install 'mcl_clip[lora]'"
        )


def add_lora(model: Any, config: LoraConfig, *, seed: int = 0) -> None:
    """Put low-rank updates in place of the weights that train in the towers of `config`; `config.full` still trains.

    Linear layers get an update, and of an `nn.MultiheadAttention`, as in blocks of open_clip, the matrix of queries,
    keys and values. At first the updates are zero. Batch norms of the image tower are replaced by frozen ones.

    Raises:
        UserError: without peft, or if a tower has no layer that fits.
    """
    check_installed(config)
    import peft  # an extra

    unlocked = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in model.named_parameters():
        if name.startswith("visual.") in SIDES[config.towers] and not name.startswith(TEMPERATURES):
            is_full = any(re.search(pattern, name) for pattern in config.full)
            parameter.requires_grad_(is_full and name in unlocked)
    if config.towers != "text":
        freeze_batch_norm(model.visual)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for is_image in SIDES[config.towers]:
        root = "visual" if is_image else "text" if hasattr(model, "text") else "transformer"
        modules, weights = _find_layers(model.get_submodule(root), root, config, unlocked)
        settings = peft.LoraConfig(
            r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=modules,
            target_parameters=weights or None,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_of("lora", seed, root))
            # Into each tower by itself: peft takes a name for the end of a longer one, and a text tower has such names.
            peft.inject_adapter_in_model(settings, model.get_submodule(root))
    for name, parameter in model.named_parameters():  # peft locks everything else
        parameter.requires_grad_(name.replace(".base_layer", "") in trained or ".lora_" in name)


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
    for module in model.modules():
        if hasattr(module, "peft_config"):
            del module.peft_config


def _find_layers(
    tower: nn.Module, root: str, config: LoraConfig, unlocked: Collection[str]
) -> tuple[list[str], list[str]]:
    """Return the names, within a tower, of linear layers that get an update, and of matrices of attentions.

    Layers whose weights are not `unlocked`, and heads, which train in full, get none.

    Raises:
        UserError: if there are none, or dropout does not fit them.
    """
    modules: list[str] = []
    attentions: list[str] = []
    inside: list[str] = []  # of an attention, which reads the matrix of its output layer, and never calls that layer
    for name, layer in tower.named_modules():
        is_attention = isinstance(layer, nn.MultiheadAttention)
        if is_attention:
            inside.append(f"{name}.")
        elif not isinstance(layer, nn.Linear) or name.startswith(tuple(inside)):
            continue
        path = f"{root}.{name}"
        if f"{path}.{'in_proj_weight' if is_attention else 'weight'}" not in unlocked:
            continue
        is_full = any(re.search(pattern, f"{path}.weight") for pattern in config.full)
        if not is_full and (not config.patterns or any(re.search(pattern, path) for pattern in config.patterns)):
            (attentions if is_attention else modules).append(name)
    if not modules and not attentions:
        matching = f" that matches {', '.join(map(repr, config.patterns))}" if config.patterns else ""
        raise UserError(
            f"--stages.K.train.lora.rank {config.rank} finds no unlocked linear layer or attention{matching} "
            f"in the {'image' if root == 'visual' else 'text'} tower; name the other one as "
            f"--stages.K.train.lora.towers, or use 0"
        )
    if config.dropout and attentions:
        raise UserError(
            f"--stages.K.train.lora.dropout {config.dropout} cannot be used with attention layers such as "
            f"{root}.{attentions[0]}; use 0, or patterns that leave them out"
        )
    return modules, [f"{name}.in_proj_weight" for name in attentions]
