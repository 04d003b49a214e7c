"""Checkpoints in safetensors and JSON, which cannot execute code; training resumes from the newest complete one."""

import shutil
import sys
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.optim.lars import Lars
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from mcl_clip.core.distributed import on_main
from mcl_clip.core.errors import UserError
from mcl_clip.core.files import atomic_dir, read_json, write_json
from mcl_clip.train.optim import ExponentialAverage
from mcl_clip.train.validation import BestWeights

ADAMW_SLOTS = {"step", "exp_avg", "exp_avg_sq"}  # what an optimizer keeps for a parameter
SLOTS: dict[type, set[str]] = {SGD: {"momentum_buffer"}, Lars: {"momentum_buffer"}}


@dataclass(kw_only=True)
class TrainState:
    """Progress of a stage. All other state, such as batches and learning rates, is a function of the step."""

    step: int = 0
    samples_seen: int = 0
    seconds: float = 0.0


def save_checkpoint(
    folder: Path,
    *,
    model: nn.Module,
    optimizer: Optimizer,
    average: ExponentialAverage | None,
    state: TrainState,
    keep: int,
    best: BestWeights | None = None,
) -> Path:
    """Write `folder`/step-N atomically and delete all but the newest `keep`. Call it on the main process only."""
    path = folder / f"step-{state.step:09d}"
    with atomic_dir(path) as temporary:
        files = {"model": model.state_dict()}
        if average is not None:
            files["average"] = average.average
        if best is not None:
            files["best"] = best.weights
        files["optimizer"] = {
            f"{name}|{key}": torch.as_tensor(value)
            for name, parameter in model.named_parameters()
            for key, value in optimizer.state.get(parameter, {}).items()
        }
        for file, tensors in files.items():
            contiguous = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
            save_file(contiguous, temporary / f"{file}.safetensors")
        write_json(temporary / "state.json", asdict(state) | ({} if best is None else {"best": best.record()}))
    for old in checkpoints(folder)[:-keep]:
        old.rename(folder / f".{old.name}.tmp")  # half of a folder must not pass for a checkpoint
    for old in folder.glob(".step-*.tmp"):  # also those of killed processes
        shutil.rmtree(old, ignore_errors=True)  # a network file system keeps what any process has open; try again later
    return path


def checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints, oldest first."""
    return sorted(folder.glob("step-?????????"))


def load_newest(
    folder: Path,
    *,
    model: nn.Module,
    optimizer: Optimizer,
    average: ExponentialAverage | None,
    best: BestWeights | None = None,
) -> TrainState:
    """Restore all parts in place from the newest checkpoint; return a new state if there is none.

    The main process decides which one it is: others may not see the same files at the same time. A collective call.
    Raise UserError if the checkpoint does not fit the model.
    """
    path = on_main(lambda: next(reversed(checkpoints(folder)), None))
    if path is None:
        return TrainState()
    try:
        model.load_state_dict(load_file(path / "model.safetensors"))
        _restore_optimizer(model, optimizer, load_file(path / "optimizer.safetensors"))
        if average is not None:
            saved = load_file(path / "average.safetensors")
            for name, tensor in average.average.items():
                tensor.copy_(saved[name])
        values = read_json(path / "state.json")
        if best is not None:
            weights = load_file(path / "best.safetensors")  # which maps the file
            best.load(values.pop("best"), {name: tensor.clone() for name, tensor in weights.items()})
        return _train_state(values)
    except (RuntimeError, KeyError, OSError, TypeError, ValueError, SafetensorError) as error:
        reason = textwrap.shorten(str(error), 300)  # torch lists every tensor on its own line
        raise UserError(
            f"{path} does not fit this model ({reason}); use the recipe it was made with, or delete it to resume "
            f"from the previous one"
        ) from error


def _train_state(values: Any) -> TrainState:
    step, samples_seen, seconds = (values[name] for name in ("step", "samples_seen", "seconds"))
    if not all(type(number) is int and number >= 0 for number in (step, samples_seen)):
        raise ValueError(f"state.json holds the step {step!r} and {samples_seen!r} samples")
    if type(seconds) not in (int, float) or not 0 <= seconds <= sys.float_info.max:
        raise ValueError(f"state.json holds {seconds!r} seconds")
    return TrainState(**{**values, "seconds": float(seconds)})


def _restore_optimizer(model: nn.Module, optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    named, expected_slots = dict(model.named_parameters()), SLOTS.get(type(optimizer), ADAMW_SLOTS)
    states: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, slot = key.rsplit("|", 1)
        states.setdefault(name, {})[slot] = tensor
    for name, state in states.items():
        parameter = named[name]
        if set(state) != expected_slots:
            raise ValueError(f"the state of the optimizer for {name} has {', '.join(sorted(state))}")
        expected = (parameter.shape, parameter.dtype)
        step = state.pop("step", None)
        is_step = step is None or (step.numel() == 1 and step.dtype == torch.float32)
        if not is_step or any((moment.shape, moment.dtype) != expected for moment in state.values()):
            raise ValueError(f"the state of the optimizer for {name} has another shape or type")
        # The fused kernel assumes that moments have the strides of the parameter, and needs the step on its device.
        moments = {slot: torch.empty_like(parameter).copy_(moment) for slot, moment in state.items()}
        steps = {} if step is None else {"step": step.to(parameter.device, copy=True)}  # `step` maps the file
        optimizer.state[parameter] = {**moments, **steps}
