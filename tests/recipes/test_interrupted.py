"""A run that is asked to stop saves what it has, says so in a line, and ends with the same bits when it goes on."""

import contextlib
import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from mcl_clip.cli.recipe import main
from mcl_clip.core.errors import UserError
from mcl_clip.core.files import DONE
from tests.recipes.runs import REPOSITORY, execute, files, records, steps

WEIGHTS = ("stage-0/train/model", "stage-1/train/model", "combined/model/stage_0", "combined/model/stage_1")
TRAIN = "mcl_clip.train.loop:clamp_logit_scale_"
EMBED = "mcl_clip.stages.embed:_embed_batch"

AT_ONCE = {
    "stage-0/cluster": ("mcl_clip.runs.stage_phases:spherical_kmeans", 1),
    "stage-0/labels": ("mcl_clip.stages.pseudo_labels:PseudoLabels.summary", 1),
    "stage-0/eval": ("mcl_clip.eval.embed:Encoder.embed", 2),
    "stage-1/eval": ("mcl_clip.runs.eval_phase:score_stages", 2),
    "combined": ("mcl_clip.runs.eval_phase:score_stages", 3),
}
QUICK = ("stage-0/cluster", "combined")


@pytest.fixture(autouse=True)
def _ctrl_c_is_heard():
    """Also where the tests run in the background, which shells protect from Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def stop(recipe, monkeypatch, capsys):
    """Run the recipe, and send signals when the n-th call of a function ends; the exit code and what stderr says."""

    def run(number, target, call, *arguments, send=lambda number: os.kill(os.getpid(), number)):
        module, names = target.split(":")
        holder = importlib.import_module(module)
        *path, name = names.split(".")
        for part in path:
            holder = getattr(holder, part)
        function, calls = getattr(holder, name), []

        def stopping(*args, **kwargs):
            result = function(*args, **kwargs)
            calls.append(None)
            if len(calls) == call:
                send(number)
            return result

        with monkeypatch.context() as patched:
            patched.setattr(holder, name, stopping)
            patched.setattr(sys, "argv", ["recipe.py", *arguments])
            with pytest.raises(SystemExit) as caught:
                main(recipe)
        assert not (recipe.run_dir / "lock").exists()
        assert not (recipe.run_dir / "combined" / DONE).exists()
        return caught.value.code, capsys.readouterr().err

    return run


def check_same(run, finished):
    """The run has the bits of one that nothing disturbed, and each of its steps once."""
    for name in WEIGHTS:
        weights = [(of / name / "open_clip_model.safetensors").read_bytes() for of in (run, finished)]
        assert weights[0] == weights[1], name
    for stage in (0, 1):
        assert steps(run, stage) == list(range(1, 9))
        losses = [[r["loss"] for r in records(of / f"stage-{stage}/train/metrics.jsonl")] for of in (run, finished)]
        assert losses[0] == losses[1]
    for name in ("stage-1/embed/part-000003.safetensors", "stage-1/labels/labels.npy", "stage-1/cluster/trace.json"):
        assert (run / name).read_bytes() == (finished / name).read_bytes()
    checkpoints = f"{os.sep}checkpoints{os.sep}"
    assert {f for f in files(run) if checkpoints not in f} == {f for f in files(finished) if checkpoints not in f}


@pytest.mark.parametrize(
    ("number", "said", "options", "code", "stage", "call"),
    [
        (signal.SIGTERM, "SIGTERM", (), 0, 0, 4),
        (signal.SIGUSR1, "SIGUSR1", ("--machine.preempt-exit-code", "85"), 85, 1, 13),
        (signal.SIGINT, "Ctrl-C", ("--machine.preempt-exit-code", "85"), 130, 0, 8),
    ],
)
def test_a_stop_in_training_saves_the_step(stop, recipe, finished, number, said, options, code, stage, call):
    step, folder = call - 8 * stage, recipe.run_dir / f"stage-{stage}/train/checkpoints"
    where = f"in stage-{stage}/train: step {step} of 8 is saved in {folder}"
    assert stop(number, TRAIN, call, *options) == (code, f"stopped by {said} {where}; the same command continues\n")
    assert (folder / f"step-{step:09d}").exists()
    assert steps(recipe.run_dir, stage) == list(range(1, step + 1))
    check_same(execute(recipe), finished)


def test_stopped_twice_between_records_nothing_is_counted_twice_or_not_at_all(stop, recipe, finished):
    options = ("--machine.log-steps", "5", "--machine.save-steps", "0", "--eval.every-steps", "2")
    for call in (2, 2):
        assert stop(signal.SIGTERM, TRAIN, call, *options)[0] == 0
    run = execute(recipe, *options)
    found = records(run / "stage-0/train/metrics.jsonl")
    assert [r["step"] for r in found if "loss" not in r] == [2, 4, 6]  # 2 and 4 by the runs after the stops
    losses = {r["step"]: r["loss"] for r in found if "loss" in r}
    assert list(losses) == [2, 4, 5, 8]
    whole = [r["loss"] for r in records(finished / "stage-0/train/metrics.jsonl")]
    expected = [sum(whole[:2]) / 2, sum(whole[2:4]) / 2, whole[4], sum(whole[5:]) / 3]
    assert list(losses.values()) == pytest.approx(expected, rel=1e-6)


def test_an_evaluation_at_the_step_of_a_checkpoint_is_made_once(stop, recipe):
    options = ("--machine.save-steps", "2", "--eval.every-steps", "2", "--num-stages", "1")

    def fail(_):
        raise UserError("the storage does not answer")

    assert stop(0, TRAIN, 4, *options, send=fail) == (2, "error: the storage does not answer\n")  # evaluated, not saved
    found = records(execute(recipe, *options) / "stage-0/train/metrics.jsonl")
    assert [r["step"] for r in found if "loss" not in r] == [2, 4, 6]
    assert [r["step"] for r in found if "loss" in r] == list(range(1, 9))


def test_a_stop_is_answered_while_an_evaluation_within_a_stage_waits_for_its_images(recipe, monkeypatch, capsys):
    def stalled(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(20)
        pytest.fail("it was waited for")

    monkeypatch.setattr("mcl_clip.train.interrupt.GIVE_UP_S", 0.2)
    monkeypatch.setattr("mcl_clip.train.interrupt.TICK_S", 0.05)
    monkeypatch.setattr("mcl_clip.eval.embed._ImageBatches.make_batch", stalled)
    monkeypatch.setattr(sys, "argv", ["recipe.py", "--eval.every-steps", "2", "--machine.save-steps", "2"])
    with pytest.raises(SystemExit) as caught:
        main(recipe)
    assert caught.value.code == 0
    assert "stopped by SIGTERM in stage-0/train: its data did not come; what is finished" in capsys.readouterr().err
    assert [path.name for path in (recipe.run_dir / "stage-0/train/checkpoints").iterdir()] == ["step-000000002"]


def test_a_stop_while_embedding_finishes_the_shard(stop, recipe, finished):
    code, said = stop(signal.SIGTERM, EMBED, 2)
    assert (code, said) == (
        0, "stopped by SIGTERM in stage-0/embed: what is finished is kept; the same command continues\n"
    )  # fmt: skip
    folder = recipe.run_dir / "stage-0/embed"
    kept = {path.name: path.stat().st_mtime_ns for path in sorted(folder.glob("part-*"))}
    assert list(kept) == ["part-000000.safetensors", "part-000001.safetensors"]
    check_same(execute(recipe), finished)
    assert {name: (folder / name).stat().st_mtime_ns for name in kept} == kept


@pytest.mark.parametrize(
    "phase", [pytest.param(phase, marks=() if phase in QUICK else pytest.mark.slow) for phase in AT_ONCE]
)
def test_other_phases_stop_at_once(stop, recipe, finished, phase):
    assert stop(signal.SIGUSR1, *AT_ONCE[phase], "--machine.preempt-exit-code", "85") == (
        85,
        f"stopped by SIGUSR1 in {phase}: what is finished is kept; the same command continues\n",
    )
    assert not (recipe.run_dir / phase / DONE).exists()
    check_same(execute(recipe), finished)


def test_a_stop_before_the_first_phase(stop):
    assert stop(signal.SIGINT, "mcl_clip.runs.pipeline:open_tasks", 1) == (
        130,
        "stopped by Ctrl-C: what is finished is kept; the same command continues\n",
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_loader_processes_outlive_a_signal_to_all_processes(stop, recipe, number):
    """As schedulers and terminals send it; a step needs its batch."""
    others = multiprocessing.active_children()  # of the pool

    def to_all(number):
        children = [child for child in multiprocessing.active_children() if child not in others]
        assert len(children) == 2
        pids = [str(child.pid) for child in children]
        subprocess.run(["kill", f"-{number:d}", *pids], check=True)  # of another process: their parent's ends them
        time.sleep(0.2)
        os.kill(os.getpid(), number)

    code, said = stop(number, TRAIN, 4, "--machine.workers", "2", send=to_all)
    assert (code, said.count("\n")) == ({signal.SIGTERM: 0, signal.SIGINT: 130}[number], 1)
    assert "step 4 of 8 is saved" in said
    assert set(multiprocessing.active_children()) <= set(others)


class Launched:
    """`mcl-clip launch RECIPE --num-processes 2`, and what it prints."""

    def __init__(self, path, run, *arguments):
        command = ["launch", path, "--num-processes", "2", "--run-dir", run, "--machine.save-steps", "0", *arguments]
        self.run = run
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mcl_clip", *map(str, command)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1", "RUN_OF_THE_TEST": str(run)},
        )  # fmt: skip
        self.pid = self._process.pid

    def ranks(self):
        """The processes of the recipe, by rank."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                names = dict(line.partition("=")[::2] for line in (folder / "environ").read_text().split("\0"))
                if names.get("RUN_OF_THE_TEST") == str(self.run) and "RANK" in names:
                    found[int(names["RANK"])] = int(folder.name)
        return found

    def wait_for_steps(self, count):
        """Wait for so many steps of stage 0."""
        deadline = time.monotonic() + 300
        while not (self.run / "stage-0/train/metrics.jsonl").exists() or len(steps(self.run, 0)) < count:
            assert self._process.poll() is None, self._process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def end(self):
        """Exit code and output; nothing is left behind."""
        output = self._process.communicate(timeout=60)[0]
        assert self.ranks() == {}
        assert not (self.run / "lock").exists() or self._process.returncode > 128
        return self._process.returncode, output


LONG = ("--stages.0.train.steps", "100000")


@pytest.mark.slow
def test_two_processes_stop_when_their_launcher_is_asked(path, tmp_path):
    launched = Launched(path, tmp_path / "run", *LONG)
    launched.wait_for_steps(3)
    assert launched.ranks().keys() == {0, 1}
    os.kill(launched.pid, signal.SIGTERM)
    code, output = launched.end()
    step = steps(launched.run, 0)[-1]
    kept = launched.run / "stage-0/train/checkpoints"
    line = f"stopped by SIGTERM in stage-0/train: step {step} of 100000 is saved in {kept}; the same command continues"
    assert code == 0, output
    assert output.splitlines()[-1] == line
    assert output.count("stopped by") == 1
    assert [folder.name for folder in kept.iterdir()] == [f"step-{step:09d}"]
    again = Launched(path, launched.run, *LONG)
    again.wait_for_steps(step + 2)
    os.kill(again.ranks()[1], signal.SIGUSR1)  # one process alone
    assert again.end()[0] == 0
    assert steps(again.run, 0) == list(range(1, len(steps(again.run, 0)) + 1))


@pytest.mark.slow
def test_a_killed_process_ends_the_job_and_is_what_the_user_reads(path, tmp_path):
    launched = Launched(path, tmp_path / "run", *LONG)
    launched.wait_for_steps(3)
    os.kill(launched.ranks()[1], signal.SIGKILL)
    started = time.monotonic()
    code, output = launched.end()
    assert time.monotonic() - started < 60
    assert code == 128 + signal.SIGKILL
    assert "error: process 1 of 2 was killed by SIGKILL" in output.splitlines()[-1]
    assert "Traceback" not in output
    assert "onnection" not in output


@pytest.mark.slow
def test_no_process_of_a_recipe_outlives_a_killed_launcher(path, tmp_path):
    launched = Launched(path, tmp_path / "run", *LONG)
    launched.wait_for_steps(3)
    os.kill(launched.pid, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while launched.ranks():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize(("code", "sentence"), [(1, "means that a job has failed"), (256, "must be from 0 to 255")])
def test_exit_codes_that_would_mislead_are_refused(recipe, code, sentence):
    with pytest.raises(ValueError, match=f"--machine.preempt-exit-code.* {sentence}"):
        replace(recipe.machine, preempt_exit_code=code)
