import inspect
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from mcl_clip.core.errors import UserError
from mcl_clip.data.loader import PairBatch, TrainingLoader
from mcl_clip.tools import profile
from mcl_clip.tools.profile import (
    PARTS,
    Clock,
    Profile,
    Setup,
    borrowed,
    hints,
    lend_stages,
    profile_text,
    profile_training,
)
from mcl_clip.train import loop
from tests import training

CPU = torch.device("cpu")
SETUP = Setup(
    stage=2, workers=2, jpeg="fast", global_batch_size=64, loss_chunk_rows=0, grad_cache_rows=0, precision="fp32",
    is_text_locked=False, cached_texts=True, cores=8,
)  # fmt: skip
TOWERS = "towers take {} % of the step: nothing in the loader or the loss would help"


def figures(**hundredths) -> Profile:
    """A step of a second; what is not given is backward."""
    seconds = {part: hundredths.get(part, 0) / 100 for part in PARTS}
    seconds["backward"] = 1 - sum(seconds.values())
    return Profile(
        seconds=seconds, steps=20, processes=1, rows=64.0, late_share=0.5, loader_rows_per_s=20.0, peak_bytes=10**9
    )  # fmt: skip


def ticking(device=CPU):
    """A clock that is moved by hand."""
    clock = Clock(device)
    clock.time = 0.0
    clock.now = lambda **_: clock.time
    return clock


# --- the clock


def test_every_moment_is_charged_once():
    clock = ticking()

    def spend(seconds):
        clock.time += seconds

    with clock.part("loss"):
        spend(100)  # before the start
    clock.start()
    spend(1)
    with clock.part("backward"):
        spend(2)
        clock.during("image", spend)(4)
        spend(8)
        clock.turn_to("exchange")
        spend(16)
    spend(32)
    clock.stop()
    spend(64)
    with clock.part("loss"):
        spend(128)
    assert {part: seconds for part, seconds in clock.seconds.items() if seconds} == {
        "rest": 33, "backward": 10, "image": 4, "exchange": 16
    }  # fmt: skip
    assert clock.charged() == 63


def test_a_part_ends_with_an_error_too():
    clock = ticking()
    clock.start()
    with pytest.raises(ZeroDivisionError):
        clock.during("loss", lambda: 1 / 0)()
    clock.time += 1
    assert clock.charged() == clock.seconds["rest"] == 1


# --- the steps


def watch(clock, *, ready=3, steps=2):
    bar = profile.Progress(show=False)
    return profile._Watch(clock=clock, device=CPU, steps=steps, warmup_steps=2, ready_batches=ready, bar=bar)


def arriving(clock, delays):
    """Batches of 4 rows, one of them a filler, each after so many seconds."""
    for step, delay in enumerate(delays):
        clock.time += delay
        yield PairBatch(
            step=step, rows=torch.tensor([1, 2, -1, 3]), text_ids=torch.zeros(4, dtype=torch.int64),
            image_ids=torch.zeros(4, dtype=torch.int64), images=torch.zeros(3, 3, 2, 2, dtype=torch.uint8),
            tokens=torch.zeros(3, 2, dtype=torch.int64), places=torch.tensor([0, 1, 3]), bad=(),
        )  # fmt: skip


def steps_made(watched, clock, delays, step_s=10.0):
    made = []

    def train():
        for batch in watched.batches(arriving(clock, delays)):
            clock.time += step_s
            made.append(batch.step)

    profile._until_enough(train)
    return made


def test_batches_that_were_ready_before_do_not_hide_a_slow_loader():
    clock = ticking()
    watched = watch(clock, ready=5)
    # Two to warm up, two that are ready and one that is not, two to settle, and two that count.
    assert steps_made(watched, clock, [0, 0, 0, 0, 7, 7, 7, 5, 0.1, 99]) == [0, 1, 5, 6, 7, 8]
    assert clock.seconds["data"] == pytest.approx(5.1)
    assert clock.seconds["rest"] == 20
    assert (watched.waited, watched.rows, watched.next_step) == ([True, False], 6, 9)


def test_no_more_is_left_out_than_can_be_ready():
    clock = ticking()
    assert steps_made(watch(clock, ready=3), clock, [0] * 20) == [0, 1, 5, 6, 7, 8]
    assert steps_made(watch(clock, ready=0), clock, [0] * 20) == [0, 1, 2, 3, 4, 5]


# --- training


def profiled(shards, out) -> Profile:
    made = training.accelerator()
    with patch.object(training, "accelerator", lambda: made):
        return profile_training(
            lambda: training.train(shards, out), made, steps=4, warmup_steps=1, ready_batches=0
        )  # fmt: skip


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


def test_nothing_stays_changed(tmp_path):
    before = TrainingLoader.__init__, TrainingLoader.steps, PairBatch.to, loop.add_gradients
    profiled(training.write_shards(tmp_path / "shards"), tmp_path / "out")
    assert (TrainingLoader.__init__, TrainingLoader.steps, PairBatch.to, loop.add_gradients) == before
    assert all(inspect.getmodule(function).__name__.startswith("mcl_clip") for function in before)


def test_what_goes_wrong_in_the_training_is_told():
    accelerator = training.accelerator()
    options = {"steps": 1, "warmup_steps": 1, "ready_batches": 0}
    with pytest.raises(RuntimeError, match="ended before all steps were counted"):
        profile_training(lambda: None, accelerator, **options)

    def fail():
        raise UserError("too many samples are bad")

    with pytest.raises(UserError, match="too many samples are bad"):
        profile_training(fail, accelerator, **options)


# --- a run directory that is only read


def test_a_borrowed_folder_leaves_the_run_as_it_is(tmp_path):
    run = tmp_path / "run"
    for name in ("index/index.arrow", "stage-0/train/DONE.json", "stage-1/train/DONE.json"):
        (run / name).parent.mkdir(parents=True)
        (run / name).write_text(name)
    with borrowed(run) as folder:
        lend_stages(folder, run, 1)
        assert (folder / "index/index.arrow").read_text() == "index/index.arrow"
        assert (folder / "stage-0/train/DONE.json").exists()
        assert list((folder / "stage-1/train").iterdir()) == []
        (folder / "stage-1/train/metrics.jsonl").write_text("{}")
        (folder / "index/index.arrow").unlink()
    assert not folder.exists()
    assert {str(path.relative_to(run)): path.read_text() for path in run.rglob("*") if path.is_file()} == {
        name: name for name in ("index/index.arrow", "stage-0/train/DONE.json", "stage-1/train/DONE.json")
    }


@pytest.mark.parametrize("everywhere", [False, True])
def test_errors_name_the_run_and_not_the_borrowed_folder(tmp_path, everywhere):
    folders = []

    def fail():
        with borrowed(tmp_path / "run") as folder:
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
        "towers take 75 % of the step, and next comes gradient norm, optimiser with 15 %: nothing in the loader or the "
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
        ({"cores": 2}, "step: shards with smaller pictures, as data_prep/from_table.py --max-side-px writes them "
                       "(--machine.workers is 2 and takes every core already)"),
    ],
)  # fmt: skip
def test_ways_to_load_faster(change, said):
    (found,) = hints(figures(data=11), replace(SETUP, **change))
    assert said in found


def test_fast_loaders_that_are_late_lack_cores():
    found = replace(figures(data=11), loader_rows_per_s=72.0)  # 64 rows in 0.89 s are 71.9 a second
    (said,) = hints(found, replace(SETUP, cores=2))
    assert "leave them some by --machine.threads (--machine.workers is 2 and takes every core already)" in said
    (said,) = hints(replace(found, loader_rows_per_s=71.0), replace(SETUP, cores=2))
    assert "smaller pictures" in said


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
    found = hints(figures(loss=share), replace(SETUP, **change))
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
    found = hints(figures(text=share), replace(SETUP, **change))
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
    found = hints(figures(), replace(SETUP, **change))
    assert any("--stages.2.train.precision bf16 (now fp32)" in text for text in found) == is_said
    assert found[-1] == TOWERS.format(100)


@pytest.mark.parametrize(
    ("memory", "chunk", "is_said"),
    [(80e9, 8, True), (8e9, 8, False), (80e9, 0, False), (80e9, 64, False)],
)  # fmt: skip
def test_grad_cache_where_the_batch_fits(memory, chunk, is_said):
    setup = replace(SETUP, grad_cache_rows=chunk, device="cuda", memory=int(memory))
    said = f"--stages.2.train.grad-cache-rows 0 (now {chunk})"
    assert any(said in text for text in hints(figures(), setup)) == is_said


def test_the_exchange_of_gradients():
    (found, rest) = hints(replace(figures(exchange=20), processes=2), SETUP)
    assert "20 % of a step: a larger --stages.2.train.global-batch-size (now 64)" in found
    assert rest.startswith("towers take 80 %")


def test_at_most_three_the_greatest_first():
    setup = replace(SETUP, has_bf16=True, is_text_locked=True, global_batch_size=4096)
    found = hints(replace(figures(data=25, loss=20, text=15, exchange=12), processes=2), setup)
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
    assert "a loader process delivers 20 samples/s where nothing else runs, and there are 2" in shown
    assert "batches came late in 50 % of the steps" in shown
    assert "peak memory: 1 GB resident" in shown
    assert [line for line in shown if line.startswith("hint: waiting for data takes 25 %")]


def test_the_exchange_is_shown_where_there_are_several_processes():
    shown = profile_text(replace(figures(exchange=25), processes=2), replace(SETUP, device="cuda"))
    assert f"{'gradient all-reduce':<28}{250:>10.1f}{25:>8.1f} %" in shown
    assert "by 2 processes on cuda" in shown
    assert "and there are 4" in shown
    assert "1 GB allocated on the GPU" in shown
