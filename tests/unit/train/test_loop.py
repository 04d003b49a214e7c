import math
import os
import signal
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from mcl_clip.config import MachineConfig
from mcl_clip.core.distributed import rank, seed_of
from mcl_clip.core.errors import PlannedStop, UserError
from mcl_clip.core.files import read_jsonl
from mcl_clip.data.batches import BadSample
from mcl_clip.train import interrupt as module_of_interrupt
from mcl_clip.train import loop
from mcl_clip.train.checkpoint import TrainState, checkpoints
from mcl_clip.train.interrupt import Interrupt
from mcl_clip.train.loop import TrainingDivergedError, clamp_logit_scale_, time_all_reduce
from mcl_clip.train.metrics import Spans
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


QUIET = MachineConfig(progress=False, log_steps=1, save_steps=0, save_minutes=0, keep_checkpoints=10)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return training.write_shards(tmp_path_factory.mktemp("loop") / "shards")


def train(shards, out, *, steps=7, **options):
    """Train on batches of 8 rows, of which the seventh has 4 fillers; the logged records."""
    make_loader, clip = training.parts(shards)
    training.fit(clip, make_loader(), out=out, changes={"steps": steps}, **{"machine": QUIET, **options})
    return read_jsonl(out / "metrics.jsonl")


def test_a_record_of_several_steps_is_their_mean_and_their_sum(shards, tmp_path):
    single, tracked = train(shards, tmp_path / "single"), []
    joined = train(
        shards, tmp_path / "joined", machine=replace(QUIET, log_steps=3), track=lambda *call: tracked.append(call)
    )
    assert [record["step"] for record in joined] == [3, 6, 7]
    for record, steps in zip(joined, (single[:3], single[3:6], single[6:]), strict=True):
        assert record["loss"] == pytest.approx(sum(step["loss"] for step in steps) / len(steps))
        for name in ("rows_without_weight", "duplicates"):
            assert record[name] == sum(step[name] for step in steps)
        assert record["group_loss"].keys() == {"p10", "p50", "p90"}
    assert joined[0]["group_loss"]["p10"] < joined[0]["group_loss"]["p90"]
    assert [record["duplicates"] for record in single] == [0] * 7  # captions and images differ
    seconds = 0.0
    for record, rows in zip(joined, (24, 24, 4), strict=True):
        of_record = record["seconds"] - seconds
        assert record["samples_per_s"] == pytest.approx(rows / of_record)
        assert sum(record["spans"].values()) == pytest.approx(of_record, rel=0.2)
        assert record["data_wait_share"] * of_record == pytest.approx(record["spans"]["data"], abs=1e-5)
        seconds = record["seconds"]
    shown = [({**record, "bad_samples": None, "spans": None}, record["step"]) for record in joined]
    assert [({**record, "bad_samples": None, "spans": None}, step) for record, step in tracked] == shown


def test_checkpoints_by_minutes_are_counted_from_the_last_one(shards, tmp_path, monkeypatch):
    times = iter(range(0, 10_000, 40))  # the clock is read at the start, at each record and after each checkpoint
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: next(times)))
    train(shards, tmp_path / "out", machine=replace(QUIET, save_minutes=2))
    saved = [int(path.name.removeprefix("step-")) for path in checkpoints(tmp_path / "out/checkpoints")]
    assert saved == [3, 6, 7]  # after 120 seconds, after 120 more, and at the end


def test_a_limit_of_steps_counts_from_the_checkpoint(shards, tmp_path):
    train(shards, tmp_path / "out", machine=replace(QUIET, save_steps=2), max_steps=3)
    assert [record["step"] for record in train(shards, tmp_path / "out", max_steps=3)] == [1, 2, 3, 4, 5]


class WithBadSample(training.StoppingLoader):
    """Loads a sample that cannot be decoded in the first step."""

    def steps(self, start_step, stop_step):
        for batch in super().steps(start_step, stop_step):
            bad = (BadSample(3, "a.tar", "broken_image"),) if batch.step == 0 else ()
            yield replace(batch, bad=bad)


def test_bad_samples_are_counted_from_the_first_step_on_and_judged_by_what_was_seen(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "StoppingLoader", WithBadSample)
    seen, flush = [], loop.BadSamples.flush
    monkeypatch.setattr(loop.BadSamples, "flush", lambda self, *call: seen.append(call) or flush(self, *call))
    machine = replace(QUIET, save_steps=2)
    train(shards, tmp_path / "out", machine=machine, max_bad_fraction=0.02, max_steps=3)
    records = train(shards, tmp_path / "out", machine=machine, max_bad_fraction=0.02, max_steps=3)
    assert [record["bad_samples"] for record in records] == [1] * 5
    assert seen == [(step, 52 * step // 7) for step in (1, 2, 3, 3, 4, 5)]  # 52 rows in 7 batches
    with pytest.raises(UserError, match="1 of about 7 samples could not be decoded"):
        train(shards, tmp_path / "strict", max_bad_fraction=0.01, max_steps=1)


def test_an_evaluation_leaves_the_model_in_training_mode(shards, tmp_path):
    modes, evaluated_at = [], []

    def evaluate(model):
        evaluated_at.append(len(modes))
        return {"acc1": float(not model.eval().training)}

    make_loader, clip = training.parts(shards)
    clip.model.eval().visual.register_forward_pre_hook(lambda tower, _: modes.append(tower.training))
    training.fit(
        clip, make_loader(), out=tmp_path / "out", changes={"steps": 4, "average_decay": 0},
        evaluate=evaluate, evaluate_steps=2, machine=QUIET,
    )  # fmt: skip
    assert (modes, evaluated_at) == ([True] * 4, [2])


def resumed_at_different_steps(shards, out) -> tuple[str, bool]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "load_newest", lambda *_, **__: TrainState(step=4 + rank()))
        try:
            train(shards, out)
        except UserError as error:
            return str(error), error.everywhere
    return "", False


def test_processes_that_resume_at_different_steps_stop(pool, shards, tmp_path):
    for message, everywhere in pool.run(resumed_at_different_steps, 2, shards, tmp_path / "out"):
        assert message.startswith("the step of the newest checkpoint differs between process 0 (4) and processes [1];")
        assert everywhere


def stopped(shards, out) -> tuple[list[str], bool]:
    """The checkpoints when a process leaves a stage that was asked to stop, and whether this process wrote one."""
    interrupt, save, wrote = Interrupt(), loop.save_checkpoint, []
    interrupt._signal = signal.SIGTERM * rank()  # to one process

    def slowly(*arguments, **options):
        wrote.append(time.sleep(0.5))
        return save(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", slowly)
        with pytest.raises(PlannedStop):
            train(shards, out, interrupt=interrupt)
    return [path.name for path in checkpoints(out / "checkpoints")], bool(wrote)


def test_no_process_leaves_before_the_main_process_has_saved_the_step(pool, shards, tmp_path):
    found = pool.run(stopped, 2, shards, tmp_path / "out")
    assert found == [(["step-000000001"], True), (["step-000000001"], False)]


def exchanged(device: torch.device | None) -> tuple[list[float], list[str]]:
    """Gradients of two layers in buckets of their own, and the spans of the backward pass."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = torch.nn.Sequential(torch.nn.Linear(600, 600), torch.nn.Linear(600, 600))
    model, spans = DistributedDataParallel(layers, bucket_cap_mb=1), Spans(device)
    time_all_reduce(model, spans)
    for step in range(2):  # the buckets of the first step are not yet those of the others
        model.zero_grad()
        spans.history.clear()
        with spans("backward"):
            model(torch.full((2, 600), rank() + step + 1.0)).sum().backward()
    return [float(p.grad.abs().sum()) for p in model.parameters()], [name for name, _ in spans.history]


def test_a_profile_names_the_exchange_of_gradients_once_and_changes_nothing(pool):
    plain, profiled = (pool.run(exchanged, 2, device) for device in (None, torch.device("cpu")))
    assert [gradients for gradients, _ in profiled] == [gradients for gradients, _ in plain]
    assert plain[0][0] == plain[1][0]
    assert [history for _, history in plain] == [[], []]
    assert [history for _, history in profiled] == [["other", "backward", "exchange"]] * 2
