"""Trackers: what they are given, once, through restarts; and what is wrong with one ends no run."""

import logging
import shutil
from dataclasses import replace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mcl_clip.core.errors import UserError
from mcl_clip.train import trackers
from tests.recipes.runs import execute, records, with_stages


@pytest.fixture
def tracked(recipe):
    machine = replace(recipe.machine, report=True, trackers=("tensorboard",))
    return with_stages(replace(recipe, machine=machine), {"steps": 4}, {"steps": 4})


def events(run) -> EventAccumulator:
    found = EventAccumulator(str(run / "trackers" / "tensorboard" / run.name))
    found.Reload()
    return found


def test_tensorboard_has_the_figures_the_tables_and_the_pictures(tracked):
    run = execute(tracked)
    found = events(run)
    for stage, first in ((0, 0), (1, 4)):
        steps = [record for record in records(run / f"stage-{stage}/train/metrics.jsonl") if "loss" in record]
        scalars = found.Scalars(f"stage-{stage}/loss")
        assert [scalar.step for scalar in scalars] == [first + record["step"] for record in steps]
        assert [scalar.value for scalar in scalars] == pytest.approx([record["loss"] for record in steps])
    assert found.Scalars("stage-1/group_loss/p50")
    tags = found.Tags()
    assert {"eval/colours/acc1/stage-0", "eval/colours/acc1/combined"} <= set(tags["scalars"])
    assert [scalar.step for scalar in found.Scalars("eval/colours/acc1/stage-1")] == [8]
    assert any("clusters_of_images" in tag.replace(" ", "_") for tag in tags["images"])
    assert any("retrieval" in tag for tag in tags["tensors"])


def test_a_run_that_goes_on_logs_no_step_twice(tracked, monkeypatch):
    tracked = replace(tracked, machine=replace(tracked.machine, report=False))
    run = execute(with_stages(tracked, {"steps": 4}))
    monkeypatch.setattr(trackers.Trackers, "log_stage", lambda *_, **__: None)
    shutil.rmtree(run / "stage-0")  # all of it is made again
    execute(tracked)
    assert [scalar.step for scalar in events(run).Scalars("stage-0/loss")] == [1, 2, 3, 4]
    assert [scalar.step for scalar in events(run).Scalars("stage-1/loss")] == [5, 6, 7, 8]


def test_a_tracker_that_is_not_installed_is_refused_at_the_start(recipe, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    recipe = replace(recipe, machine=replace(recipe.machine, trackers=("wandb",)))
    with pytest.raises(UserError, match=r"wandb: the package wandb is not installed; pip install 'mcl_clip\[wandb\]'"):
        execute(recipe)
    assert not recipe.run_dir.exists()


def test_a_tracker_that_fails_is_left_and_the_run_goes_on(tracked, monkeypatch, caplog):
    caplog.set_level(logging.WARNING, logger="mcl_clip")

    def fail(*_, **__):
        raise ConnectionError("no way there")

    monkeypatch.setattr(trackers.TensorBoardTracker, "log", fail)
    run = execute(with_stages(tracked, {"steps": 4}))
    assert (run / "combined/DONE.json").exists()
    said = [record.getMessage() for record in caplog.records if "no way there" in record.getMessage()]
    assert said == ["tensorboard: ConnectionError: no way there; the run continues without it"]


def test_names_of_settings_are_flat_and_without_lists_of_objects():
    settings = {"stages": [{"train": {"steps": 1}}], "data": {"train": ["a", "b"], "weights": []}, "seed": 0}
    assert dict(trackers._flat(settings)) == {
        "stages.0.train.steps": 1,
        "data.train": "['a', 'b']",
        "data.weights": "[]",
        "seed": 0,
    }
