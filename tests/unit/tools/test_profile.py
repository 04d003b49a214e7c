from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from mcl_clip.config import AugmentConfig, LockConfig, TrainConfig
from mcl_clip.core.errors import UserError
from mcl_clip.data.batches import PairBatch
from mcl_clip.tools import profile
from mcl_clip.tools.profile import (
    PARTS,
    MeasuredLoader,
    Profile,
    Setup,
    hints,
    profile_text,
    profile_training,
    step_parts,
    temporary_run_dir,
)
from mcl_clip.train.metrics import Spans
from tests import training

CPU = torch.device("cpu")
TOWERS = "towers take {} % of the step: nothing in the loader or the loss would help"


def setup(*, jpeg="fast", is_text_locked=False, cached_texts=True, **changes) -> Setup:
    machine = {"workers": 2, "cores": 8} | {name: changes.pop(name) for name in Setup.__annotations__.keys() & changes}
    train = TrainConfig(**({"steps": 1, "global_batch_size": 64, "lr": 0.1} | changes))
    lock = LockConfig(text=is_text_locked, cached_texts=cached_texts)
    return Setup(stage=2, train=replace(train, augment=AugmentConfig(jpeg=jpeg), lock=lock), **machine)


SETUP = setup()


def figures(**hundredths) -> Profile:
    """A step of a second; what is not given is backward."""
    seconds = {part: hundredths.get(part, 0) / 100 for part in PARTS}
    seconds["backward"] = 1 - sum(seconds.values())
    return Profile(
        seconds=seconds, steps=20, processes=1, rows=64.0, late_share=0.5, loader_rows_per_s=20.0, peak_bytes=10**9
    )  # fmt: skip


# --- the steps


class Clock(Spans):
    """Spans in profiling mode whose time is moved by hand."""

    time = 0.0

    def now(self, *, wait=True):
        return self.time


class Arriving:
    """Batches of 4 rows, one of them a filler, each after so many seconds."""

    plan = None

    def __init__(self, clock, delays):
        self.clock, self.delays = clock, delays

    def steps(self, start_step, stop_step):
        for step, delay in enumerate(self.delays):
            self.clock.time += delay
            yield PairBatch(
                step=step, rows=torch.tensor([1, 2, -1, 3]), text_ids=torch.zeros(4, dtype=torch.int64),
                image_ids=torch.zeros(4, dtype=torch.int64), images=torch.zeros(3, 3, 2, 2, dtype=torch.uint8),
                tokens=torch.zeros(3, 2, dtype=torch.int64), places=torch.tensor([0, 1, 3]), bad=(),
            )  # fmt: skip


def measured(delays, *, ready, step_s=10.0):
    """The steps that a loop makes of which two are measured, the loader, and seconds by part of the measured ones."""
    clock, made = Clock(CPU), []
    bar = profile.Progress(show=False)
    loader = MeasuredLoader(Arriving(clock, delays), clock, bar, warmup_steps=2, ready_batches=ready)
    batches = loader.steps(0, len(delays))
    for _ in range(2 + profile.SETTLE_STEPS + 2):
        with clock("data"):
            batch = next(batches)
        with clock("backward"):
            clock.time += step_s
        made.append(batch.step)
    batches.close()
    return made, loader, step_parts(clock.history, reads_text_features=False)


def test_batches_that_were_ready_before_do_not_hide_a_slow_loader():
    # Two to warm up, two that are ready and one that is not, two to settle, and two that count.
    made, loader, parts = measured([0, 0, 0, 0, 7, 7, 7, 5, 0.1, 99], ready=5)
    assert made == [0, 1, 5, 6, 7, 8]
    assert [step["data"] for step in parts] == pytest.approx([5, 0.1])
    assert [step["backward"] for step in parts] == [10, 10]
    assert (loader.rows, loader.next_step) == (6, 9)


def test_no_more_is_left_out_than_can_be_ready():
    assert measured([0] * 20, ready=3)[0] == [0, 1, 5, 6, 7, 8]
    assert measured([0] * 20, ready=0)[0] == [0, 1, 2, 3, 4, 5]


def test_a_history_is_split_into_the_parts_of_steps():
    history = [("data", 1), ("device", 2), ("other", 4), ("forward", 8), ("image", 16), ("forward", 32), ("log", 64)]
    history += [("other", 128), ("data", 256), ("exchange", 512)]
    none = dict.fromkeys(PARTS, 0)
    first, second = step_parts(history, reads_text_features=False)
    assert first == none | {"data": 1, "device": 2, "image": 16, "text": 40, "rest": 196}
    assert second == none | {"data": 256, "exchange": 512}
    assert step_parts(history, reads_text_features=True)[0] == first | {"image": 56, "text": 0}


# --- training


def profiled(shards, out) -> Profile:
    loaders, towers = training.parts(shards)
    fit = partial(training.fit, towers, out=out)
    return profile_training(fit, loaders, towers.model.visual, CPU, steps=4, warmup_steps=1, ready_batches=0)


@pytest.mark.parametrize("processes", [1, 2])
def test_all_parts_of_the_training_are_measured(pool, tmp_path, processes):
    shards = training.write_shards(tmp_path / "shards")
    every = pool.run(profiled, processes, shards, tmp_path / "out")
    found = every[0]
    assert all(each == found for each in every)
    assert found.seconds.keys() == PARTS.keys()
    assert {part for part, seconds in found.seconds.items() if seconds > 0} == set(PARTS) - (
        {"exchange"} if processes == 1 else set()
    )
    assert sum(found.record()["shares"].values()) == pytest.approx(1)
    assert (found.processes, found.steps, found.rows) == (processes, 4, pytest.approx(7.0))  # epochs of 52 rows
    assert found.loader_rows_per_s > 0
    assert found.peak_bytes > 50e6
    assert 0 <= found.late_share <= 1


def test_what_goes_wrong_in_the_training_is_told():
    def run(fit):
        options = {"steps": 1, "warmup_steps": 1, "ready_batches": 0}
        profile_training(fit, lambda **_: Arriving(Clock(CPU), []), nn.Identity(), CPU, **options)

    with pytest.raises(RuntimeError, match="the training ended after 0 of 1 measured steps"):
        run(lambda **_: None)

    def fail(**_):
        raise UserError("too many samples are bad")

    with pytest.raises(UserError, match="too many samples are bad"):
        run(fail)


# --- a run directory that is only read


def test_a_temporary_run_directory_leaves_the_run_as_it_is(tmp_path):
    run = tmp_path / "run"
    for name in ("index/index.arrow", "stage-0/train/DONE.json", "stage-1/train/DONE.json"):
        (run / name).parent.mkdir(parents=True)
        (run / name).write_text(name)
    with temporary_run_dir(run) as folder:
        assert [str(path.relative_to(folder)) for path in folder.rglob("*.*")] == ["index/index.arrow"]
        assert (folder / "index/index.arrow").read_text() == "index/index.arrow"
        (folder / "index/index.arrow").write_text("changed")
    assert not folder.exists()
    assert {str(path.relative_to(run)): path.read_text() for path in run.rglob("*") if path.is_file()} == {
        name: name for name in ("index/index.arrow", "stage-0/train/DONE.json", "stage-1/train/DONE.json")
    }


@pytest.mark.parametrize("everywhere", [False, True])
def test_errors_name_the_run_and_not_the_temporary_folder(tmp_path, everywhere):
    folders = []

    def fail():
        with temporary_run_dir(tmp_path / "run") as folder:
            folders.append(folder)
            error = UserError(f"{folder}/stage-0 is broken")
            raise error.on_every_process() if everywhere else error

    with pytest.raises(UserError) as raised:
        fail()
    assert str(raised.value) == f"{tmp_path / 'run'}/stage-0 is broken"
    assert raised.value.everywhere == everywhere
    assert not folders[0].exists()


# --- hints


def test_where_the_towers_take_all_nothing_else_is_advised():
    assert hints(figures(data=3, loss=2, optimizer=2), SETUP) == [TOWERS.format(93)]


def test_what_comes_next_is_named_where_nothing_can_be_advised():
    (said,) = hints(figures(optimizer=15, rest=10), SETUP)
    assert said == (
        "towers take 75 % of the step, and next comes gradient norm, optimizer with 15 %: nothing in the loader or the "
        "loss would help"
    )


@pytest.mark.parametrize("share", [10, 11])
def test_waiting_for_data(share):
    found = hints(figures(data=share), SETUP)
    if share == 10:
        assert found == [TOWERS.format(90)]
        return
    # 64 rows in 0.89 s want four loaders of 20 rows/s.
    assert found == ["waiting for data takes 11 % of a step: --machine.workers 4 (now 2, this machine has 8 cores)"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"cores": 3}, "step: --machine.workers 3 (now 2, this machine has 3 cores)"),
        ({"workers": 0, "cores": 1}, "step: --machine.workers 1 (now 0, this machine has 1 core)"),
        ({"workers": 6}, "step: --machine.workers 7 (now 6, this machine has 8 cores)"),
        ({"jpeg": "exact"}, "step: --stages.2.train.augment.jpeg fast (now exact), or --machine.workers 4 (now 2, "),
        ({"cores": 2}, "step: shards with smaller images, as data_prep/from_table.py --max-side-px writes them "
                       "(--machine.workers is 2 and takes every core already)"),
    ],
)  # fmt: skip
def test_ways_to_load_faster(change, said):
    (found,) = hints(figures(data=11), setup(**change))
    assert said in found


def test_fast_loaders_that_are_late_lack_cores():
    found = replace(figures(data=11), loader_rows_per_s=72.0)  # 64 rows in 0.89 s are 71.9 a second
    (said,) = hints(found, setup(cores=2))
    assert "leave them some with --machine.threads (--machine.workers is 2 and takes every core already)" in said
    (said,) = hints(replace(found, loader_rows_per_s=71.0), setup(cores=2))
    assert "smaller images" in said


def test_several_processes_share_the_cores():
    (found,) = hints(replace(figures(data=30), processes=2), SETUP)
    assert "--machine.workers 3 (now 2, this machine has 8 cores for each process)" in found


@pytest.mark.parametrize(
    ("share", "change", "is_said"),
    [
        (11, {"global_batch_size": 4096}, True),
        (10, {"global_batch_size": 4096}, False),
        (11, {"global_batch_size": 1024}, False),  # chunks would not pay
        (11, {"global_batch_size": 4096, "loss_chunk_rows": 256}, False),
        (11, {"global_batch_size": 4096, "loss_chunk_rows": 64}, True),
        (11, {"global_batch_size": 4096, "device": "cuda"}, False),
        (11, {"global_batch_size": 4096, "device": "cuda", "loss_chunk_rows": 64}, True),
    ],
)
def test_a_slow_loss(share, change, is_said):
    found = hints(figures(loss=share), setup(**change))
    option = f"--stages.2.train.loss-chunk-rows 256 (now {change.get('loss_chunk_rows', 0)})"
    assert any(f"the loss takes {share} % of a step: {option}" in text for text in found) == is_said


@pytest.mark.parametrize(
    ("share", "change", "said"),
    [
        (6, {"is_text_locked": True, "cached_texts": False}, "--stages.2.train.lock.cached-texts (now off) runs it"),
        (6, {"is_text_locked": True}, "sees each caption twice or more"),
        (5, {"is_text_locked": True}, None),
        (30, {}, None),
    ],
)  # fmt: skip
def test_a_locked_text_tower(share, change, said):
    found = hints(figures(text=share), setup(**change))
    assert [text for text in found if "the text tower is locked" in text and (said or "") in text] == found[
        : bool(said)
    ]


@pytest.mark.parametrize(
    ("change", "is_said"),
    [
        ({"has_bf16": True, "device": "cuda"}, True),
        ({"has_bf16": True, "device": "cuda", "precision": "bf16"}, False),
        ({"has_bf16": False, "device": "cuda"}, False),
    ],
)
def test_a_gpu_that_could_do_bfloat16(change, is_said):
    found = hints(figures(), setup(**change))
    assert any("--stages.2.train.precision bf16 (now fp32)" in text for text in found) == is_said
    assert found[-1] == TOWERS.format(100)


@pytest.mark.parametrize(
    ("memory", "chunk", "is_said"),
    [(80e9, 8, True), (8e9, 8, False), (80e9, 0, False), (80e9, 64, False)],
)  # fmt: skip
def test_grad_cache_where_the_batch_fits(memory, chunk, is_said):
    found = hints(figures(), setup(grad_cache_rows=chunk, device="cuda", memory=int(memory)))
    said = f"--stages.2.train.grad-cache-rows 0 (now {chunk})"
    assert any(said in text for text in found) == is_said


def test_the_exchange_of_gradients():
    (found, rest) = hints(replace(figures(exchange=20), processes=2), SETUP)
    assert "20 % of a step: a larger --stages.2.train.global-batch-size (now 64)" in found
    assert rest.startswith("towers take 80 %")


def test_at_most_three_the_greatest_first():
    found = hints(
        replace(figures(data=25, loss=20, text=15, exchange=12), processes=2),
        setup(has_bf16=True, is_text_locked=True, global_batch_size=4096),
    )
    assert [text.split(" takes ")[0].split(" take ")[0] for text in found] == [
        "the towers", "waiting for data", "the loss"
    ]  # fmt: skip


# --- the table


def test_the_table_names_all_parts_and_adds_up():
    shown = profile_text(figures(data=25, image=20, text=5, loss=3, device=1, optimizer=1, rest=1), SETUP).splitlines()
    assert shown[0] == "stage 2: 20 steps of 64 rows by 1 process on cpu, 2 loader workers each"
    rows = {line[:28].strip(): line[28:].split() for line in shown[3:12]}
    assert list(rows) == [*(name for part, name in PARTS.items() if part != "exchange"), "all"]
    assert rows["waiting for data"] == ["250.0", "25.0", "%"]
    assert rows["all"] == ["1000.0", "100.0", "%"]
    assert sum(float(share) for name, (_, share, _) in rows.items() if name != "all") == pytest.approx(100)
    assert "samples per second: 64; without waiting for data 85" in shown
    assert "a loader process delivers 20 samples/s while nothing trains, and there are 2" in shown
    assert "batches came late in 50 % of the steps" in shown
    assert "peak memory: 1.0 GB resident" in shown
    assert [line for line in shown if line.startswith("hint: waiting for data takes 25 %")]


def test_the_exchange_is_shown_where_there_are_several_processes():
    shown = profile_text(replace(figures(exchange=25), processes=2), setup(device="cuda"))
    assert f"{'gradient all-reduce':<28}{250:>10.1f}{25:>8.1f} %" in shown
    assert "by 2 processes on cuda" in shown
    assert "and there are 4" in shown
    assert "1.0 GB allocated on the GPU" in shown
