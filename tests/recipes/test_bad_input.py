"""Mistakes of the user: one sentence, exit code 2, no traceback."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mcl_clip import TowerConfig
from mcl_clip.cli.recipe import main
from mcl_clip.core.files import read_json
from mcl_clip.runs.phase import lock
from tests.recipes.runs import (
    execute,
    files,
    records,
    with_stages,
    write_shards,
)


def fail(capsys, monkeypatch, recipe, *arguments):
    """The sentence that a recipe ends with; exit code 2, one line, no traceback."""
    monkeypatch.setattr(sys, "argv", ["recipe.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main(recipe)
    printed = capsys.readouterr().err
    assert caught.value.code == 2, printed
    lines = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, printed
    assert "Traceback" not in printed
    return lines[0]


@pytest.mark.parametrize(
    ("tower", "sentence"),
    [
        ({"architecture": "ViT-B-33"}, "open_clip has no architecture 'ViT-B-33' (close: "),
        ({"architecture": "ViT-B-32", "pretrained": "openay"}, "'openay' is neither a file nor a tag of ViT-B-32"),
        ({"architecture": "local-dir:/nowhere"}, "/nowhere: there is no such file or folder"),
    ],
)  # fmt: skip
def test_unknown_towers(recipe, capsys, monkeypatch, tower, sentence):
    assert sentence in fail(capsys, monkeypatch, replace(recipe, tower=TowerConfig(**tower)))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--stages.1.train.learning-rate", "1"], "--stages.1.train.learning-rate"),
        (["--stages.2.train.lr", "1"], "--stages.2.train.lr"),
        (["--seed", "many"], "many"),
        (["--data.max-bad-fraction", "2"], "--data.max-bad-fraction must be from 0 to 1, not 2"),
        (["--data.weights", "1", "2"], "--data.weights has 2 values for 1 lists of shards"),
        (["--stages.0.train.steps", "0"], "--stages.0.train.steps is 0, which is meant for a pretrained stage 0"),
    ],
)  # fmt: skip
def test_options_that_do_not_parse(recipe, capsys, monkeypatch, arguments, sentence):
    monkeypatch.setattr(sys, "argv", ["recipe.py", *arguments])
    with pytest.raises(SystemExit) as caught:
        main(recipe)
    printed = capsys.readouterr().err
    assert caught.value.code == 2
    assert sentence in " ".join(printed.replace("│", " ").split())  # tyro breaks lines
    assert "Traceback" not in printed


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--num-stages", "0"], "--num-stages must be an integer of at least 1, not '0'"),
        (["--data.train", "/nowhere/{0..3}.tar"], "the shard /nowhere/0.tar does not exist"),
        (["--data.train", "pipe:cat x.tar"], "starts with 'pipe:', which is not a supported protocol"),
        (["--eval.retrieval", "/nowhere"], "/nowhere is not an evaluation set"),
        (["--stages.0.train.loss", "siglip"], "siglip needs a tower with a bias: put init_logit_bias"),
        (["--stages.0.train.lr-multipliers", "visual.nothing", "0.1"], "'visual.nothing' matches none of the"),
        (["--stages.0.cluster.num-clusters", "500"], "500 clusters need at least as many distinct samples"),
        (["--data.holdout-rows", "1"], "--data.holdout-rows 1 gives 1 held-out rows of 200"),
    ],
)  # fmt: skip
def test_wrong_options(recipe, capsys, monkeypatch, arguments, sentence):
    assert sentence in fail(capsys, monkeypatch, recipe, *arguments)


def test_no_shards(recipe, capsys, monkeypatch, tmp_path):
    (tmp_path / "empty").mkdir()
    sentence = fail(capsys, monkeypatch, recipe, "--data.train", tmp_path / "empty")
    assert "no shard matches" in sentence
    assert "--data.train names no shards" in fail(
        capsys, monkeypatch, replace(recipe, data=replace(recipe.data, train=()))
    )


def test_shards_without_captions(recipe, capsys, monkeypatch, tmp_path):
    shards = write_shards(tmp_path / "shards", rows=60, captions=False)
    sentence = fail(capsys, monkeypatch, recipe, "--data.train", shards)
    assert str(tmp_path / "shards") in sentence
    assert "60" in sentence


def test_a_truncated_tar(recipe, capsys, monkeypatch, tmp_path):
    shards = write_shards(tmp_path / "shards")
    broken = shards / "0002.tar"
    broken.write_bytes(broken.read_bytes()[:20_000])
    sentence = fail(capsys, monkeypatch, recipe, "--data.train", shards)
    assert str(broken) in sentence


def test_too_few_rows(recipe, capsys, monkeypatch, tmp_path):
    shards = write_shards(tmp_path / "shards", rows=30)
    sentence = fail(capsys, monkeypatch, recipe, "--data.train", shards)
    assert "gives 1 held-out rows of 30 " in sentence
    assert "at least 40 rows" in sentence


def test_too_many_corrupt_pictures(recipe, capsys, monkeypatch, tmp_path):
    shards = write_shards(tmp_path / "shards", corrupt=range(0, 60, 2))
    sentence = fail(capsys, monkeypatch, recipe, "--data.train", shards)
    assert "samples could not be decoded" in sentence
    assert "more than --data.max-bad-fraction 0.01 allows; most in" in sentence
    assert str(shards / "0000.tar") in sentence


def test_a_few_corrupt_pictures_are_counted(recipe, tmp_path):
    shards = write_shards(tmp_path / "shards", corrupt=(17, 113))
    execute(recipe, "--data.train", str(shards), "--data.max-bad-fraction", "0.02", "--stages.0.train.steps", "12")
    for phase in ("train", "embed"):
        found = records(recipe.run_dir / f"stage-0/{phase}/bad_samples.jsonl")
        assert {record["row"] for record in found} == {17, 113}
        assert {Path(record["shard"]).name for record in found} == {"0000.tar", "0002.tar"}
    trained = records(recipe.run_dir / "stage-0/train/metrics.jsonl")
    assert trained[-1]["bad_samples"] == 2


def test_fewer_rows_than_a_batch_are_a_warning(recipe, caplog):
    execute(with_stages(recipe, {"steps": 2, "global_batch_size": 256}))
    assert "the data has 192 rows, fewer than a global batch of 256; each batch has 192 valid rows" in caplog.text
    assert read_json(recipe.run_dir / "stage-0/train/groups.json")["epoch_0"]["fillers"] == 64


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_run_directory_that_cannot_be_written(recipe, capsys, monkeypatch, tmp_path):
    (tmp_path / "fixed").mkdir(mode=0o500)
    assert "permission denied" in fail(capsys, monkeypatch, recipe, "--run-dir", tmp_path / "fixed/run")


def test_a_run_directory_that_is_a_file(recipe, capsys, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("x")
    assert str(tmp_path / "file") in fail(capsys, monkeypatch, recipe, "--run-dir", tmp_path / "file")


def test_a_second_job(recipe, capsys, monkeypatch):
    recipe.run_dir.mkdir()
    with lock(recipe.run_dir):
        sentence = fail(capsys, monkeypatch, recipe)
    assert f"is in use by process {os.getpid()} on " in sentence


def test_a_program_ends_with_one_sentence(path, copy):
    before = files(copy)
    ended = subprocess.run(
        [sys.executable, path, "--run-dir", copy, "--stages.1.train.lr", "0.5"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert ended.returncode == 2
    (line,) = [line for line in ended.stderr.splitlines() if "rror" in line]
    assert line.startswith(f"error: {copy / 'stage-1/train'} is finished but does not match this recipe: train.lr was")
    assert "Traceback" not in ended.stderr
    assert files(copy) == before
