"""A disk that is full, or may not be written, in each phase: one sentence, nothing half-written, and on it goes."""

import errno
import os
import sys
from pathlib import Path

import pytest

from mcl_clip.cli.recipe import main
from mcl_clip.core import files as files_module
from tests.recipes.runs import execute, files, records

WEIGHTS = "combined/model/stage_1/open_clip_model.safetensors"
PLACES = (
    "index/index.arrow",
    "stage-0/train/checkpoints",
    "stage-0/train/model",
    "stage-0/embed/part-000002",
    "stage-0/cluster/centroids",
    "stage-0/labels/labels.npy",
    "stage-0/eval/features",
    "stage-1/train/checkpoints/.step-000000006",
    "stage-1/eval/results.jsonl",
    "combined/.model",
    "combined/DONE.json",
)
QUICK = ("stage-0/embed/part-000002", "stage-1/train/checkpoints/.step-000000006")
REFUSALS = {
    errno.ENOSPC: "no space left to write; free some space or choose a folder on another disk",
    errno.EACCES: "permission denied; change the permissions or choose another path",
}


@pytest.mark.parametrize(
    ("place", "number"),
    [
        *(pytest.param(place, errno.ENOSPC, marks=() if place in QUICK else pytest.mark.slow) for place in PLACES),
        pytest.param("stage-0/train/model", errno.EACCES, marks=pytest.mark.slow),
    ],
)
def test_what_cannot_be_written_stops_the_run_and_loses_nothing(place, number, recipe, finished, capsys, monkeypatch):
    finish, refused = files_module._finish_file, []

    def refusing(path: Path) -> None:
        shown = str(path.relative_to(recipe.run_dir)).replace("/.", "/")
        if shown.startswith(place.replace("/.", "/")):
            refused.append(path)
            raise OSError(number, os.strerror(number), str(path))
        finish(path)

    with monkeypatch.context() as patches:
        patches.setattr(files_module, "_finish_file", refusing)
        patches.setattr(sys, "argv", ["recipe.py"])
        with pytest.raises(SystemExit) as caught:
            main(recipe)
    printed = capsys.readouterr().err
    assert len(refused) == 1
    assert caught.value.code == 2
    assert printed.splitlines()[-1] == f"error: {refused[0]}: {REFUSALS[number]}"
    assert "Traceback" not in printed
    assert not [path for path in recipe.run_dir.rglob("*") if ".tmp" in path.name or path.name == "lock"]
    execute(recipe)
    assert (recipe.run_dir / WEIGHTS).read_bytes() == (finished / WEIGHTS).read_bytes()
    assert files(recipe.run_dir).keys() == files(finished).keys()
    for stage in (0, 1):
        log = f"stage-{stage}/train/metrics.jsonl"
        losses = [[(r["step"], r["loss"]) for r in records(of / log)] for of in (recipe.run_dir, finished)]
        assert losses[0] == losses[1]
