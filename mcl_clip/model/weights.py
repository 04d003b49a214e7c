"""Find and load the weights of a model of open_clip in a file."""

import pickle
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import nn

from mcl_clip.core.errors import UserError, shorten_list, suggest
from mcl_clip.core.files import read_json
from mcl_clip.model.open_clip_io import (
    OPEN_CLIP_CONFIG_NAME,
    UNSAFE_WEIGHTS,
    WEIGHT_SUFFIXES,
    check_weights,
    one_line,
)


def find_weights(name: str, pretrained: str, model_cfg: Mapping[str, Any]) -> Path:
    """Return the path of a weights file, checked against the activation in the open_clip config next to it."""
    path = Path(pretrained)
    if path.is_dir():
        raise UserError(f"--tower.pretrained {pretrained} is a folder; use --tower.architecture local-dir:{pretrained}")
    if not path.is_file():
        tags = open_clip.list_pretrained_tags_by_model(name)
        hint = f"its tags are {shorten_list(tags)}" if tags else "there are no tags for it"
        raise UserError(
            f"{pretrained!r} is neither a file nor a tag of {name or 'the model in the recipe'}"
            f"{suggest(pretrained, tags)}; {hint}"
        )
    config_path = path.with_name(OPEN_CLIP_CONFIG_NAME)
    if config_path.is_file():
        try:
            quick_gelu = bool(read_json(config_path).get("model_cfg", {}).get("quick_gelu"))
        except AttributeError as error:
            message = f"{config_path} is not an open_clip config; restore it, or move the weights to another folder"
            raise UserError(message) from error
        if quick_gelu != bool(model_cfg.get("quick_gelu")):
            raise UserError(
                f"{path} was trained {'with' if quick_gelu else 'without'} quick_gelu, unlike "
                f"{name or 'the model in the recipe'}; use --tower.architecture local-dir:{path.parent}"
            )
    return path


def load_weights(model: nn.Module, path: Path) -> None:
    """Load all weights of `model` from a weights file or a training checkpoint.

    Only tensors and plain values are unpickled; files that hold anything else are refused. Prefixes that torch.compile
    and DistributedDataParallel put before names are ignored.

    Raises:
        UserError: if the file is unsafe, or its weights do not fit the model.
    """
    if path.suffix not in WEIGHT_SUFFIXES:
        raise UserError(f"{path} is not one of {', '.join(WEIGHT_SUFFIXES)}; convert it with open_clip first")
    try:
        check_weights(path)
        state = open_clip.factory.load_state_dict(str(path), weights_only=True)
        plain = {name: name.replace("_orig_mod.", "").removeprefix("module.") for name in state}
        with tempfile.TemporaryDirectory() as folder:
            source = path
            if any(name != other for name, other in plain.items()):
                source = Path(folder) / "plain.pt"  # open_clip converts weights of other projects from files only
                torch.save({plain[name]: tensor for name, tensor in state.items()}, source)
            del state
            missing, unexpected = open_clip.load_checkpoint(model, str(source), strict=False, weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(UNSAFE_WEIGHTS.format(path)) from error
    except Exception as error:  # damaged files raise errors of many types
        raise UserError(f"the weights in {path} do not fit this model: {one_line(error)}") from error
    if missing or unexpected:
        raise UserError(
            f"the weights in {path} do not fit this model: {len(missing)} are missing ({shorten_list(missing, 3)}), "
            f"and {len(unexpected)} are unknown ({shorten_list(unexpected, 3)}); use their architecture"
        )
