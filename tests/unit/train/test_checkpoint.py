import errno
import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mcl_clip.config import TrainConfig
from mcl_clip.core.errors import UserError
from mcl_clip.train import checkpoint
from mcl_clip.train.checkpoint import TrainState, checkpoints, load_newest, save_checkpoint
from mcl_clip.train.optim import ExponentialAverage, create_optimizer

CONFIG = TrainConfig(steps=1, global_batch_size=2, lr=0.1, weight_decay=0.2, betas=(0.9, 0.98), eps=1e-6)


class Run:
    """A model in training; a step is a function of the step number."""

    def __init__(self, *, width: int = 4, fast: str = "0", optimizer: str = "adamw") -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 2))
        rates = {} if optimizer == "adamw" else {"optimizer": optimizer, "lr": 1e-3}
        self.optimizer = create_optimizer(self.model, replace(CONFIG, lr_multipliers={fast: 2.0}, **rates))
        self.average = ExponentialAverage(self.model, 0.9)
        self.state = TrainState()

    def train(self, steps: int) -> "Run":
        for _ in range(steps):
            inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(self.state.step))
            self.model(inputs).square().sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.state.step += 1
            self.state.samples_seen += 8
            self.average.update(self.model, self.state.step)
        return self

    def save(self, folder: Path, keep: int = 2) -> Path:
        parts = {"model": self.model, "optimizer": self.optimizer, "average": self.average}
        return save_checkpoint(folder, **parts, state=self.state, keep=keep)

    def load(self, folder: Path) -> "Run":
        self.state = load_newest(folder, model=self.model, optimizer=self.optimizer, average=self.average)
        return self

    def tensors(self) -> dict[str, torch.Tensor]:
        state = {
            f"{name} {key}": value
            for name, parameter in self.model.named_parameters()
            for key, value in self.optimizer.state[parameter].items()
        }
        return {**self.model.state_dict(), **state, **{f"average {n}": t for n, t in self.average.average.items()}}


def assert_equal(one: Run, other: Run) -> None:
    assert one.state == other.state
    mine, theirs = one.tensors(), other.tensors()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_momentum_goes_on_bit_for_bit(tmp_path, optimizer):
    Run(optimizer=optimizer).train(5).save(tmp_path)
    resumed = Run(optimizer=optimizer).load(tmp_path)
    assert any("momentum_buffer" in name for name in resumed.tensors())
    assert all(tensor.isfinite().all() for tensor in resumed.tensors().values())
    assert_equal(resumed.train(4), Run(optimizer=optimizer).train(9))
    with pytest.raises(UserError, match=r"the state of the optimizer for .* has momentum_buffer\)"):
        Run().load(tmp_path)


def test_training_goes_on_bit_for_bit(tmp_path):
    first = Run().train(5)
    first.state.seconds = 12.5
    first.save(tmp_path)
    second = Run()
    places = {name: average.data_ptr() for name, average in second.average.average.items()}
    second.load(tmp_path)
    assert {name: average.data_ptr() for name, average in second.average.average.items()} == places
    assert_equal(first, second)
    assert_equal(first.train(4), second.train(4))
    whole = Run().train(9)
    whole.state.seconds = 12.5
    assert_equal(second, whole)


def test_the_optimiser_is_kept_by_name(tmp_path):
    """Other parameter groups mean another order of the parameters, not other momenta."""
    first = Run(fast="0.weight").train(3)
    first.save(tmp_path)
    assert_equal(first, Run(fast="2.bias").load(tmp_path))


def test_nothing_saved_is_a_new_state(tmp_path):
    assert Run().load(tmp_path / "nowhere").state == TrainState()


def test_the_newest_counts_and_old_ones_go(tmp_path):
    run = Run()
    for step in (2, 3, 20, 100):
        run.train(step - run.state.step).save(tmp_path)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000000020", "step-000000100"]
    os.utime(tmp_path / "step-000000020", (2e9, 2e9))  # as after a copy of the folder
    assert Run().load(tmp_path).state.step == 100


def test_a_half_written_checkpoint_is_invisible(tmp_path, monkeypatch):
    run = Run().train(2)
    run.save(tmp_path)

    def fail(*_) -> None:
        left = list(tmp_path.glob(".step-*"))
        assert len(left) == 1  # the tensors are there already, under another name
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_json", fail)
        with pytest.raises(KeyboardInterrupt):
            run.train(1).save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000002"]
    assert Run().load(tmp_path).state.step == 2


def test_what_a_killed_process_left_goes_with_the_next_checkpoint(tmp_path):
    (tmp_path / ".step-000000001.tmp").mkdir()
    (tmp_path / ".step-000000001.tmp" / "model.safetensors").write_bytes(b"half")
    assert checkpoints(tmp_path) == []
    Run().train(2).save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000002"]


def test_what_a_network_file_system_does_not_delete_yet_is_no_checkpoint_and_no_error(tmp_path, monkeypatch):
    run = Run().train(1)
    run.save(tmp_path, keep=1)

    def busy(path, **_):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", busy)
        run.train(1).save(tmp_path, keep=1)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000000002"]
    run.train(1).save(tmp_path, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000003"]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads the maps of this process")
def test_a_resumed_run_has_no_file_of_its_checkpoint_mapped(tmp_path):
    Run().train(1).save(tmp_path)
    run = Run().load(tmp_path)
    assert run.state.step == 1
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    Run(width=5).train(1).save(tmp_path)
    with pytest.raises(UserError, match=r"step-000000001 does not fit this model .*; use the recipe it was made with"):
        Run().load(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "average.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["missing", "cut off"])
def test_a_damaged_checkpoint_is_named(tmp_path, name, damage):
    path = Run().train(1).save(tmp_path) / name
    path.unlink() if damage == "missing" else path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(UserError, match="step-000000001"):
        Run().load(tmp_path)


def without(name: str):
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


DAMAGED_TENSORS = {
    "a missing weight": ("model", without("2.bias"), 'Missing key.* "2.bias"'),
    "a missing average": ("average", without("2.bias"), "2.bias"),
    "an average of another shape": ("average", lambda t: t | {"2.bias": torch.ones(3)}, "size of tensor"),
    "a state of no parameter": ("optimizer", lambda t: t | {"3.bias|step": torch.ones(())}, "3.bias"),
    "a missing moment": ("optimizer", without("2.bias|exp_avg_sq"), "the optimizer for 2.bias has exp_avg, step"),
    "an unknown moment": (
        "optimizer", lambda t: t | {"2.bias|sum": torch.ones(2)}, "for 2.bias has exp_avg, exp_avg_sq, step, sum"
    ),
    "a step of two numbers": ("optimizer", lambda t: t | {"2.bias|step": torch.ones(2)}, "for 2.bias has"),
    "a step that is an integer": ("optimizer", lambda t: t | {"2.bias|step": torch.tensor(1)}, "another shape or type"),
    "a moment for all": ("optimizer", lambda t: t | {"2.bias|exp_avg": torch.ones(1)}, "2.bias has another"),
    "moments in half": ("optimizer", lambda t: t | {"2.bias|exp_avg": torch.ones(2).half()}, "2.bias has another"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGED_TENSORS)
def test_tensors_that_do_not_fit_are_not_made_to_fit(tmp_path, damage):
    file, change, reason = DAMAGED_TENSORS[damage]
    path = Run().train(1).save(tmp_path) / f"{file}.safetensors"
    save_file(change(load_file(path)), path)
    with pytest.raises(UserError, match=rf"step-000000001 does not fit this model \(.*{reason}.*; use the recipe"):
        Run().load(tmp_path)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"step": -1}, "the step -1 and 0 samples"),
        ({"step": 1.0}, "the step 1.0 and 0 samples"),
        ({"step": True}, "the step True and 0 samples"),
        ({"samples_seen": -8}, "the step 0 and -8 samples"),
        ({"samples_seen": "8"}, "the step 0 and '8' samples"),
        ({"seconds": -0.5}, "-0.5 seconds"),
        ({"seconds": True}, "True seconds"),
        ({"seconds": 10**400}, r"state\.json holds"),
        ({"more": 1}, "more"),
    ],
)
def test_progress_that_is_none_is_refused(tmp_path, changed, reason):
    path = Run().save(tmp_path) / "state.json"
    path.write_text(json.dumps(asdict(TrainState()) | changed))
    with pytest.raises(UserError, match=rf"step-000000000 does not fit this model \(.*{reason}"):
        Run().load(tmp_path)
    for broken in ([], {"step": 1, "seconds": 1.0}):
        path.write_text(json.dumps(broken))
        with pytest.raises(UserError, match="step-000000000 does not fit this model"):
            Run().load(tmp_path)


def convolutional() -> tuple[nn.Module, torch.optim.Optimizer]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Conv2d(4, 5, 3).to(memory_format=torch.channels_last)
    return model, create_optimizer(model, CONFIG)


def train_convolutional(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        inputs = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(step))
        model(inputs).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_moments_are_laid_out_as_their_parameters(tmp_path):
    """The fused kernel goes through the memory of both side by side."""
    model, optimizer = convolutional()
    train_convolutional(model, optimizer, range(3))
    save_checkpoint(tmp_path, model=model, optimizer=optimizer, average=None, state=TrainState(step=3), keep=2)
    train_convolutional(model, optimizer, range(3, 6))
    again, restored = convolutional()
    load_newest(tmp_path, model=again, optimizer=restored, average=None)
    train_convolutional(again, restored, range(3, 6))
    assert torch.equal(again.weight, model.weight)
    assert restored.state[again.weight]["exp_avg"].stride() == again.weight.stride() != (36, 9, 3, 1)
