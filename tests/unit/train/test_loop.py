import math
import os
import signal
import time

import pytest
import torch

from mcl_clip.config import MachineConfig
from mcl_clip.core.distributed import seed_of
from mcl_clip.core.errors import PlannedStop
from mcl_clip.core.files import read_jsonl
from mcl_clip.train import interrupt as module_of_interrupt
from mcl_clip.train import loop
from mcl_clip.train.interrupt import Interrupt
from mcl_clip.train.loop import TrainingDivergedError, clamp_logit_scale_
from tests import training


class Scaled(torch.nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.logit_scale = torch.nn.Parameter(torch.tensor(math.log(scale)))


@pytest.mark.parametrize(("scale", "kept"), [(117.3, 100), (0.5, 1), (14.3, 14.3)])
def test_the_temperature_is_clamped_where_it_trains(scale, kept):
    model = Scaled(scale)
    clamp_logit_scale_(model)
    assert float(model.logit_scale.detach().exp()) == pytest.approx(kept)
    locked = Scaled(scale)
    locked.logit_scale.requires_grad_(False)
    clamp_logit_scale_(locked)
    assert float(locked.logit_scale.exp()) == pytest.approx(scale)


@pytest.mark.parametrize(("loss", "low", "high"), [("clip", 99, 100.001), ("siglip", 116, 118)])
def test_only_the_loss_of_clip_limits_the_temperature(tmp_path, loss, low, high):
    shards = training.write_shards(tmp_path / "shards")
    changes = {"loss": loss, "lr": 1e-5, "average_decay": 0}
    make_loader, clip = training.parts(shards, model={"init_logit_bias": -10, "init_logit_scale": math.log(117.3)})
    if loss == "siglip":
        clip.model.register_forward_hook(lambda _, __, out: {**out, "logit_bias": out["logit_bias"] * 1})
    training.fit(clip, make_loader(most_steps=3), out=tmp_path / "out", changes=changes, max_steps=2)
    assert low < float(clip.model.logit_scale.detach().exp()) < high


def test_a_diverged_run_names_a_checkpoint_only_if_there_is_one(tmp_path):
    shards = training.write_shards(tmp_path / "shards")
    make_loader, clip = training.parts(shards)
    clip.model.visual.proj.data.fill_(torch.nan)
    with pytest.raises(TrainingDivergedError, match=r"the loss is nan .*; no checkpoint was saved yet. Use a lower"):
        training.fit(clip, make_loader(most_steps=3), out=tmp_path / "out", max_steps=2)
    (tmp_path / "out/checkpoints").mkdir()
    with pytest.raises(
        TrainingDivergedError, match=f"the last good checkpoint is in {tmp_path / 'out/checkpoints'}. Use"
    ):
        training.fit(clip, make_loader(most_steps=3), out=tmp_path / "out", max_steps=2)


@pytest.mark.parametrize("max_grad_norm", [None, 1e-3])
def test_the_optimizer_gets_the_clipped_gradient(tmp_path, monkeypatch, max_grad_norm):
    norms, step = [], torch.optim.AdamW.step

    def noted(optimizer, *arguments):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(gradients)))
        return step(optimizer, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    make_loader, clip = training.parts(training.write_shards(tmp_path / "shards"))
    changes = {"max_grad_norm": max_grad_norm}
    training.fit(clip, make_loader(most_steps=3), out=tmp_path / "out", changes=changes, max_steps=2)
    logged = [record["grad_norm"] for record in read_jsonl(tmp_path / "out/metrics.jsonl")]
    assert min(logged) > 1e-2  # the log has the norm before it is clipped
    assert norms == pytest.approx([max_grad_norm] * 2 if max_grad_norm else logged, rel=1e-3)


def seeds_of_dropout(shards, out) -> list[str]:
    names = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "seed_of", lambda *name: names.append(name) or seed_of(*name))
        training.train(shards, out, most_steps=2)
    return names


def test_the_seed_of_dropout_names_stage_step_process_and_chunk(pool, tmp_path):
    shards = training.write_shards(tmp_path / "shards")
    assert pool.run(seeds_of_dropout, 2, shards, tmp_path / "out") == [
        [(0, 1, "dropout", step, rank, 0) for step in range(2)] for rank in range(2)
    ]


class StallingLoader(training.StoppingLoader):
    """Once, after `most_steps` batches, a request to stop comes, and no further batch."""

    def steps(self, start_step, stop_step):
        try:
            yield from super().steps(start_step, stop_step)
        except training.StoppedError:
            os.kill(os.getpid(), signal.SIGTERM)
            while True:
                time.sleep(0.01)


@pytest.mark.parametrize(
    ("machine", "logged"),
    [({"log_steps": 2, "save_steps": 0}, [2, 3]), ({"log_steps": 1, "save_steps": 2}, [1, 2, 3])],
)
def test_a_stop_while_no_data_come_saves_the_last_step(tmp_path, monkeypatch, machine, logged):
    monkeypatch.setattr(module_of_interrupt, "GIVE_UP_S", 0.2)
    monkeypatch.setattr(module_of_interrupt, "TICK_S", 0.05)
    monkeypatch.setattr(training, "StoppingLoader", StallingLoader)
    shards, out = training.write_shards(tmp_path / "shards"), tmp_path / "out"
    machine = MachineConfig(progress=False, **machine)
    make_loader, clip = training.parts(shards)
    with (
        pytest.raises(PlannedStop, match=f"step 3 of {training.STEPS} is saved in {out / 'checkpoints'}"),
        Interrupt().listening() as interrupt,
    ):
        training.fit(clip, make_loader(most_steps=3), out=out, machine=machine, interrupt=interrupt)
    assert [record["step"] for record in read_jsonl(out / "metrics.jsonl")] == logged
    for folder, most_steps in ((out, 2), (tmp_path / "undisturbed", 5)):
        make_loader, clip = training.parts(shards)
        training.fit(clip, make_loader(most_steps=6), out=folder, machine=machine, max_steps=most_steps)
        weights = {name: tensor.clone() for name, tensor in clip.model.state_dict().items()}
        if folder == out:
            resumed = weights
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)


def test_a_stop_while_no_data_come_saves_nothing_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(module_of_interrupt, "GIVE_UP_S", 0.2)
    monkeypatch.setattr(module_of_interrupt, "TICK_S", 0.05)
    monkeypatch.setattr(training, "StoppingLoader", StallingLoader)
    make_loader, clip = training.parts(training.write_shards(tmp_path / "shards"))
    machine = MachineConfig(progress=False, save_steps=3)
    with pytest.raises(PlannedStop, match="its data did not come"), Interrupt().listening() as interrupt:
        training.fit(clip, make_loader(most_steps=3), out=tmp_path / "out", machine=machine, interrupt=interrupt)
    assert [path.name for path in (tmp_path / "out/checkpoints").iterdir()] == ["step-000000003"]
