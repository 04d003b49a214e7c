"""`mcl-clip profile` on the tiny recipe."""

import hashlib
import json
import multiprocessing
import tempfile

import pytest

from mcl_clip.tools.profile import PARTS
from mcl_clip.train import loop
from tests.commands import run_command
from tests.recipes.runs import write_shards

COUNTS = ("--steps", "3", "--warmup", "1")


@pytest.fixture
def profile(path, tmp_path, monkeypatch, capsys):
    """Exit code, output, figures and error output of `mcl-clip profile` on the tiny recipe; nothing is left behind."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    out = tmp_path / "profile.json"

    def run(*arguments):
        others = set(multiprocessing.active_children())
        command = ["profile", *COUNTS, path, "--run-dir", tmp_path / "run", *arguments, "--out", out]
        code, printed, errors = run_command(monkeypatch, capsys, *command)
        assert set(multiprocessing.active_children()) == others
        assert list(temporary.iterdir()) == []
        return code, printed, json.loads(out.read_text()) if code == 0 else {}, errors

    return run


def contents(folder):
    """Digest and time of every file and folder."""
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
        )
        for path in folder.rglob("*")
    }  # fmt: skip


def test_a_first_stage_before_there_is_a_run(profile, tmp_path):
    code, printed, found, errors = profile("--machine.workers", "2")
    assert (code, errors) == (0, "")
    assert "stage 0: 3 steps of 16 rows by 1 process on c" in printed
    assert all(name in printed for part, name in PARTS.items() if part != "exchange")
    assert (found["stage"], found["steps"], found["rows"], found["processes"]) == (0, 3, 16, 1)
    assert sum(found["shares"].values()) == pytest.approx(1)
    assert all(seconds > 0 for part, seconds in found["seconds"].items() if part != "exchange")
    assert found["samples_per_s"] == pytest.approx(16 / sum(found["seconds"].values()))
    assert found["samples_per_s_without_waiting"] > found["samples_per_s"]
    assert found["loader_rows_per_s"] > 0
    assert printed.count("hint: ") == len(found["hints"])
    assert not (tmp_path / "run").exists()


def test_a_later_stage_of_a_run_that_stays_as_it_is(profile, copy, caplog):
    before = contents(copy)
    code, _, found, _ = profile("--stage", "1", "--stages.1.train.grad-cache-rows", "4")
    assert code == 0
    assert found["stage"] == 1
    assert "stage 1: 3 groups" in caplog.text  # by the labels of the run
    assert all(seconds > 0 for part, seconds in found["seconds"].items() if part != "exchange")
    assert contents(copy) == before


def test_the_text_features_of_a_locked_tower_are_read(profile):
    _, _, read, _ = profile("--stages.0.train.lock.text", "--stages.0.train.steps", "100")
    _, _, run, _ = profile("--stages.0.train.lock.text", "--stages.0.train.lock.no-cached-texts")
    assert read["seconds"]["text"] == 0 < run["seconds"]["text"]


def test_a_stage_whose_start_is_not_there(profile, tmp_path):
    code, _, _, errors = profile("--stage", "1")
    assert code == 2
    assert errors == (
        f"error: --stage 1 trains from stage-0/train, stage-0/labels, not done in {tmp_path / 'run'}; run the recipe "
        f"so far, or give the --run-dir of a run that has it\n"
    )
    assert not (tmp_path / "run").exists()


def test_a_run_of_other_shards(profile, copy, tmp_path):
    write_shards(tmp_path / "others", rows=100)
    before = contents(copy)
    code, _, _, errors = profile("--stage", "1", "--data.train", tmp_path / "others")
    assert code == 2
    assert f"{copy / 'stage-0/labels'}" in errors
    assert "200" in errors
    assert contents(copy) == before


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--stage", "7"), "--stage 7 is not a stage that trains; those of this recipe are 0, 1"),
        (("--stage", "1", "--control", "single"), "--stage 1 is not a stage that trains; those of this recipe are 0"),
        (("--steps", "0"), "--steps must be at least 1, not 0"),
        (("--warmup", "0"), "--warmup must be at least 1, not 0"),
        (("--data.train", "/nowhere"), "/nowhere"),
    ],
)
def test_other_mistakes(profile, arguments, sentence):
    code, _, _, errors = profile(*arguments)
    assert code == 2
    assert sentence in errors
    assert errors.count("\n") == 1


def test_it_can_be_interrupted(profile, monkeypatch):
    calls = iter(range(100))

    def interrupt(model):
        if next(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "clamp_logit_scale_", interrupt)
    code, _, _, errors = profile("--machine.workers", "2")
    assert (code, errors) == (130, "interrupted\n")
