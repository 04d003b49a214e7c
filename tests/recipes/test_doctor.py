"""`mcl-clip doctor`, and what `mcl-clip status` says was lost, on the tiny recipe."""

import json
import re
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from mcl_clip.cli import commands
from mcl_clip.cli import recipe as cli
from mcl_clip.core.errors import UserError
from mcl_clip.core.files import append_jsonl
from mcl_clip.data.decode import TrainTransform
from mcl_clip.results.record import data_losses
from mcl_clip.tools import estimates
from mcl_clip.train import loop
from tests.commands import run_command
from tests.recipes.runs import execute, files, load_recipe, records, write_shards


@pytest.fixture
def doctor(path, tmp_path, monkeypatch, capsys):
    """Exit code and lines of `mcl-clip doctor` on the tiny recipe."""

    def run(*arguments, before=()):
        command = ["doctor", *before, path, "--run-dir", tmp_path / "run", *arguments]
        code, printed, errors = run_command(monkeypatch, capsys, *command)
        assert "Traceback" not in errors
        return code, printed.splitlines()

    return run


def lines(found, level, topic):
    return [line for line in found if line.startswith(f"{level:<8}{topic:<10}")]


def failures(found):
    return [line for line in found if line.startswith("FAIL")]


def test_a_healthy_recipe(doctor, tmp_path):
    code, found = doctor()
    assert (code, failures(found)) == (0, [])
    topics = ("packages", "devices", "shards", "reading", "sets", "steps", "groups", "memory", "disk")
    for topic in topics:
        assert lines(found, "ok", topic), topic
    assert "4 shards, 200 rows (4 of them indexed now, in memory)" in lines(found, "ok", "shards")[0]
    assert "200 samples at " in lines(found, "ok", "reading")[0]
    assert "can be opened: retrieval, colours" in lines(found, "ok", "sets")[0]
    assert "16 steps in 2 stages: 8 of 16 rows (0.667 epochs)" in lines(found, "ok", "steps")[0]
    assert "stage 1 66.67" in lines(found, "ok", "groups")[0]
    assert found[-1].startswith("nothing will fail, ")
    assert not (tmp_path / "run").exists()


def test_samples_are_read_as_the_training_reads_them(doctor, monkeypatch):
    found = []
    decode = TrainTransform.decode
    monkeypatch.setattr(TrainTransform, "decode", lambda self, *a, **o: found.append(self) or decode(self, *a, **o))
    doctor("--stages.0.train.augment.jpeg", "exact")
    assert (len(found), {transform.jpeg for transform in found}) == (200, {"exact"})


def test_the_estimates_are_near_what_a_run_takes(recipe):
    execute(recipe)
    sizes = estimates.measure_stages(recipe.stages, recipe.tower.model)
    keep = recipe.machine.keep_checkpoints
    estimated = estimates.estimate_disk(recipe.stages, sizes, rows=200, keep_checkpoints=keep)
    for name, size in estimated.items():
        folder = recipe.run_dir / name
        taken = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        # One checkpoint is deleted when the next is whole, and the projected features when they are clustered.
        kept = {"train": 0.66, "cluster": 0.1}.get(name.rpartition("/")[2], 1)
        assert kept * size < taken + 1000, name
        assert taken < 1.1 * size + 2_000_000, name  # vocabularies and small files


def test_a_missing_shard(doctor, path):
    code, found = doctor("--data.train", path.parent / "shards/{0000..0004}.tar")
    assert code == 1
    assert f"the shard {path.parent / 'shards/0004.tar'} does not exist" in failures(found)[0]
    assert found[-1].startswith("1 will fail")


def test_a_broken_tar(doctor, tmp_path):
    shards = write_shards(tmp_path / "shards")
    broken = shards / "0002.tar"
    broken.write_bytes(broken.read_bytes()[:20_000])
    code, found = doctor("--data.train", shards)
    assert code == 1
    assert len(failures(found)) == 1
    assert str(broken) in lines(found, "FAIL", "shards")[0]


@pytest.mark.parametrize(("free", "code", "level"), [(10**3, 1, "FAIL"), (10**11, 0, "ok")])
def test_too_little_disk(doctor, monkeypatch, free, code, level):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free, total=free))
    ended, found = doctor()
    assert ended == code
    assert "/run needs about " in lines(found, level, "disk")[0]


def test_too_many_clusters(doctor):
    code, found = doctor("--stages.0.cluster.num-clusters", "500")
    assert code == 1
    assert "--stages.0.cluster.num-clusters 500 is more than the 200 rows" in lines(found, "FAIL", "groups")[0]
    code, found = doctor("--stages.0.cluster.num-clusters", "20")
    assert code == 0
    assert (
        "stage 1 has 10 rows per label: most are merged, into groups of at least 16 rows"
        in (lines(found, "warning", "groups")[0])
    )


def test_a_missing_evaluation_set(doctor, path):
    code, found = doctor("--eval.sets", "/nowhere", path.parent / "colours", "/nowhere/else")
    assert code == 1
    assert [line.split(";")[0].split()[2:] for line in lines(found, "FAIL", "sets")] == [
        ["there", "is", "no", "folder", "/nowhere"],
        ["there", "is", "no", "folder", "/nowhere/else"],
    ]


def test_two_sets_of_one_name(doctor, path):
    code, found = doctor("--eval.sets", path.parent / "colours")
    assert code == 1
    assert "two evaluation sets are both called colours" in lines(found, "FAIL", "sets")[0]


@pytest.mark.parametrize(
    ("corrupt", "code", "level", "sentence"),
    [
        ((17, 113), 0, "warning", "2 of 201 samples cannot be decoded: 2 broken_image; they are counted and skipped"),
        (range(0, 60, 2), 1, "FAIL", "30 of 201 samples cannot be decoded: 30 broken_image; the run stops above"),
    ],
)
def test_corrupt_pictures(doctor, tmp_path, corrupt, code, level, sentence):
    shards = write_shards(tmp_path / "shards", corrupt=corrupt, rows=201)
    ended, found = doctor("--data.train", shards)
    assert ended == code
    assert sentence in lines(found, level, "reading")[0]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--data.holdout-rows", "1"), "--data.holdout-rows 1 gives 1 held-out rows of 200"),
        (("--stages.1.train.global-batch-size", "3"), "--stages.1.train.global-batch-size 3 does not divide by 2"),
        (("--tower.pretrained", "/nowhere.pt"), "'/nowhere.pt' is neither a file nor a tag"),
        (
            ("--stages.1.train.resharded", "/nowhere"),
            "--stages.1.train.resharded /nowhere is not a folder that mcl-clip",
        ),
        (("--stages.1.train.lock.image-unlocked-groups", "9"), "image-unlocked-groups 9 is not between 0 and 4"),
    ],
)
def test_other_things_that_will_fail(doctor, arguments, sentence):
    code, found = doctor(*arguments, before=("--processes", "2"))
    assert code == 1
    assert any(sentence in line for line in failures(found)), found


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        ("49408", "49000", "the tokenizer makes token 49407, and the text tower has vocab_size 49000"),
        (
            "model=MODEL",
            'model=MODEL, preprocess={"mean": [0.5]}',
            "preprocess sets mean to [0.5]; it must be a number, or",
        ),
        ("model=MODEL", 'model=MODEL, preprocess={"crop": 1}', "preprocess has no crop; it may set size, mean"),
    ],
)
def test_a_tower_that_will_fail(path, tmp_path, monkeypatch, capsys, before, after, sentence):
    other = path.with_name("other.py")
    other.write_text(path.read_text().replace(before, after))
    code, found, _ = run_command(monkeypatch, capsys, "doctor", other, "--run-dir", tmp_path / "run")
    assert code == 1
    assert any(sentence in line for line in lines(found.splitlines(), "FAIL", "tower")), found
    with pytest.raises(UserError, match=re.escape(sentence)):
        execute(replace(load_recipe(other), run_dir=tmp_path / "run"))
    assert not list(tmp_path.glob("run/stage-*/train/checkpoints"))


def test_controls_are_examined_as_they_will_run(doctor):
    code, found = doctor("--control", "single")
    assert code == 0
    assert "in 1 stage: 24 of 16 rows" in lines(found, "ok", "steps")[0]


def test_a_finished_run_stays_as_it_is(doctor, copy):
    before = files(copy)
    code, found = doctor()
    assert (code, failures(found)) == (0, [])
    ran = lines(found, "ok", "run")
    assert "stage 0: train done, embed done, cluster done, labels done, eval done (step 8 of 8)" in ran[0]
    assert "the recipe matches: 11 of 11 phases are done and are kept" in ran[-1]
    assert "needs no more" in lines(found, "ok", "disk")[0]
    assert files(copy) == before


def test_a_stale_run(doctor, copy):
    before = files(copy)
    code, found = doctor("--stages.0.train.lr", "0.5")
    assert code == 1
    assert (
        f"{copy / 'stage-0/train'} is finished but does not match this recipe: train.lr was 0.001 and is now 0.5"
        in (lines(found, "FAIL", "run")[0])
    )
    assert files(copy) == before


def test_a_run_whose_shards_are_gone(doctor, copy):
    code, found = doctor("--data.train", "/nowhere.tar")
    assert code == 1
    assert "stage 1: train done" in " ".join(lines(found, "ok", "run"))
    assert "only when all shards and sets can be opened" in lines(found, "warning", "run")[0]


def test_publishing_is_checked_before_the_training(doctor, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_local")
    code, found = doctor("--publish.repo", "someone/tiny")
    assert (code, "to someone/tiny" in lines(found, "ok", "publish")[0]) == (0, True)
    code, found = doctor("--publish.repo", "tiny")
    assert (code, "give it as ORG/NAME" in lines(found, "FAIL", "publish")[0]) == (1, True)
    monkeypatch.setattr("mcl_clip.publish.hub.get_token", lambda: None)
    code, found = doctor("--publish.repo", "someone/tiny")
    assert (code, "there is no token for the Hub" in lines(found, "FAIL", "publish")[0]) == (1, True)


def test_what_a_finished_stage_says_of_the_next(doctor, copy):
    _, found = doctor()
    assert "stage 0: still learning (loss " in lines(found, "ok", "learned")[0]
    last = {"step": 8, "loss": 0.001, "negatives_per_row": 15.0, "data_wait_share": 0.9}
    append_jsonl(copy / "stage-0/train/metrics.jsonl", last)
    for record in (results := records(copy / "stage-0/eval/results.jsonl")):
        record["metrics"]["main_metric"] = 0.1
    (copy / "stage-0/eval/results.jsonl").write_text("".join(json.dumps(record) + "\n" for record in results))
    _, found = doctor()
    said = lines(found, "warning", "learned")[0]
    assert "the batches are solved" in said
    assert "--stages.0.cluster.num-clusters up to 12 (groups of one batch" in said  # 200 rows, batches of 16
    assert "--stages.1.start scratch; the recipe has 3 clusters and starts from previous" in said
    assert "stage 0 spent 90 % of its time waiting for data" in lines(found, "warning", "reading")[0]


def test_a_recipe_that_is_none(monkeypatch, capsys, tmp_path):
    (tmp_path / "x.py").write_text("RECIPE = 3\n")
    for arguments, sentence in (
        (["/nowhere.py"], "there is no recipe /nowhere.py"),
        ([str(tmp_path / "x.py")], f"{tmp_path / 'x.py'} has no RECIPE = RunConfig(...)"),
        (["--processes", "-1", "/nowhere.py"], "--processes must be at least 0"),
    ):
        monkeypatch.setattr(sys, "argv", ["mcl-clip", "doctor", *arguments])
        with pytest.raises(SystemExit) as stopped:
            commands.command()
        assert stopped.value.code == 2
        assert sentence in capsys.readouterr().err


class StopError(Exception):
    pass


def test_what_was_lost_is_the_same_after_a_resume(recipe, tmp_path, monkeypatch):
    shards = write_shards(tmp_path / "shards", corrupt=(17, 113), rows=201)
    arguments = ("--data.train", str(shards), "--data.max-bad-fraction", "0.02", "--stages.1.train.steps", "14",
                 "--stages.1.train.min-negatives", "6", "--stages.0.cluster.num-clusters", "12")  # fmt: skip
    whole = execute(recipe, *arguments)
    calls = iter(range(100))
    clamp = loop.clamp_logit_scale_

    def stop_at_step_20(model):
        if next(calls) == 19:  # 8 of stage 0, and 12 of stage 1
            raise StopError
        clamp(model)

    monkeypatch.setattr(loop, "clamp_logit_scale_", stop_at_step_20)
    with pytest.raises(StopError):
        execute(recipe, *arguments, "--run-dir", str(tmp_path / "resumed"))
    begun = data_losses(tmp_path / "resumed")
    assert "stage 1: steps 10 to 11 are not in a checkpoint yet; if training stops now, they are repeated" in begun
    resumed = execute(recipe, *arguments, "--run-dir", str(tmp_path / "resumed"))
    lost = data_losses(whole)
    assert data_losses(resumed) == [*lost, "the run was started 2 times"]
    assert f"stage 0: embedding: {shards / '0000.tar'}: broken_image 1" in lost
    assert f"stage 1: training: {shards / '0002.tar'}: broken_image 1" in lost
    for part in ("same caption or image as their row were masked", "merged from several labels", "too few negatives"):
        assert any(part in line for line in lost), part
    (weightless,) = [line for line in lost if line.startswith("stage 1:") and "too few negatives" in line]
    steps = records(whole / "stage-1/train/metrics.jsonl")
    assert f"{int(sum(record.get('rows_without_weight', 0) for record in steps))} of 224 rows" in weightless


def test_status_and_the_end_of_a_run_say_what_was_lost(copy, path, monkeypatch, capsys):
    expected = ["losses and restarts:", *(f"  {line}" for line in data_losses(copy))]
    monkeypatch.setattr(sys, "argv", ["mcl-clip", "status", str(copy)])
    commands.command()
    shown = capsys.readouterr().out.splitlines()
    assert shown[:2] == [
        f"stage {stage}: train done, embed done, cluster done, labels done, eval done (step 8 of 8)" for stage in (0, 1)
    ]
    assert shown[3].startswith("stage 0: still learning (loss ")
    assert shown[5 : 5 + len(expected)] == expected
    monkeypatch.setattr(sys, "argv", [str(path), "--run-dir", str(copy)])
    cli.main(load_recipe(path))
    assert capsys.readouterr().out.splitlines()[-len(expected) - 1 :] == [*expected, "  the run was started 2 times"]


def test_status_of_a_run_with_damaged_results(copy, monkeypatch, capsys):
    path = copy / "stage-0/eval/results.jsonl"
    path.write_text(path.read_text().replace('"main_metric": 0.', '"main_metric": null, "x": 0.'))
    monkeypatch.setattr(sys, "argv", ["mcl-clip", "status", str(copy)])
    with pytest.raises(SystemExit) as stopped:
        commands.command()
    assert stopped.value.code == 2
    assert f"metrics or results in {copy / 'stage-0'} are damaged" in capsys.readouterr().err
