"""A run that is killed anywhere and started again ends with the same bits."""

import signal
from dataclasses import replace

import pytest

from mcl_clip.core.files import DONE
from mcl_clip.stages import shared_metric
from tests.recipes.runs import (
    Killer,
    execute,
    files,
    load_recipe,
    records,
    steps,
)

WEIGHTS = ("stage-0/train/model", "stage-1/train/model", "combined/model/stage_0", "combined/model/stage_1")


KILLS = {
    "train before a checkpoint": ("mcl_clip.train.loop:clamp_logit_scale_", 2, False),
    "train, stage 1, after a checkpoint": ("mcl_clip.train.loop:clamp_logit_scale_", 13, False),
    "while a checkpoint is written": ("mcl_clip.train.checkpoint:write_json", 2, False),
    "after the last checkpoint": ("mcl_clip.train.loop:save_checkpoint", 3, True),
    "between model and DONE": ("mcl_clip.runs.train_phase:save_clip", 2, True),
    "embed between shards": ("mcl_clip.stages.embed:_embed_batch", 3, False),
    "embed, stage 1": ("mcl_clip.stages.embed:_embed_batch", 7, False),
    "cluster, products": ("mcl_clip.stages.shared_metric:save_array", 1, True),
    "cluster, projection": ("mcl_clip.stages.shared_metric:save_array", 2, True),
    "cluster": ("mcl_clip.runs.stage_phases:spherical_kmeans", 1, True),
    "labels": ("mcl_clip.stages.pseudo_labels:PseudoLabels.summary", 1, False),
    "eval": ("mcl_clip.runs.eval_phase:score_stages", 2, False),
    "eval between sets": ("mcl_clip.eval.embed:Encoder.embed", 2, False),
    "combined": ("mcl_clip.runs.eval_phase:score_stages", 3, False),
    "combined, model written": ("mcl_clip.runs.eval_phase:write_json", 1, True),
    **{f"before DONE {number}": ("mcl_clip.runs.phase:Phase.mark_done", number, False) for number in range(1, 12)},
}
QUICK_KILLS = ("train, stage 1, after a checkpoint", "embed between shards", "combined", "before DONE 1")


@pytest.fixture(scope="module")
def killer():
    process = Killer()
    yield process
    process.close()


def weights(run):
    return {name: (run / name / "open_clip_model.safetensors").read_bytes() for name in WEIGHTS}


@pytest.mark.parametrize(
    "where", [pytest.param(where, marks=() if where in QUICK_KILLS else pytest.mark.slow) for where in KILLS]
)
def test_a_killed_run_ends_with_the_same_bits(where, killer, finished, path, tmp_path):
    target, call, after = KILLS[where]
    run = tmp_path / "run"
    assert killer.run(path, target, call, "--run-dir", str(run), after=after) == -signal.SIGKILL
    assert not (run / "combined" / DONE).exists()
    execute(replace(load_recipe(path), run_dir=run))
    assert weights(run) == weights(finished)
    for stage in (0, 1):
        assert steps(run, stage) == list(range(1, 9))
        losses = [[r["loss"] for r in records(of / f"stage-{stage}/train/metrics.jsonl")] for of in (run, finished)]
        assert losses[0] == losses[1]
    assert files(run).keys() == files(finished).keys()
    names = ("stage-1/embed/part-000003.safetensors", "stage-1/labels/labels.npy", "stage-1/cluster/trace.json")
    for name in names:
        assert (run / name).read_bytes() == (finished / name).read_bytes()


@pytest.mark.parametrize(
    ("call", "kept", "not_again"),
    [(1, "products-000000000000.npy", "_add_products"), (2, "image-000000000000.npy", "_chunks")],
)
def test_a_killed_clustering_keeps_the_parts_that_are_done(
    killer, finished, recipe, path, tmp_path, monkeypatch, call, kept, not_again
):
    arguments = ("--run-dir", str(tmp_path / "run"), "--num-stages", "1")
    assert killer.run(path, "mcl_clip.stages.shared_metric:save_array", call, *arguments, after=True) == -signal.SIGKILL
    folder = tmp_path / "run/stage-0/cluster"
    assert (folder / "work" / kept).exists()
    assert not (folder / "centroids.safetensors").exists()
    monkeypatch.setattr(shared_metric, not_again, None)
    execute(recipe, *arguments)
    assert not (folder / "work").exists()
    for name in ("centroids.safetensors", "assignments-image.npy", "trace.json"):
        assert (folder / name).read_bytes() == (finished / "stage-0/cluster" / name).read_bytes()


@pytest.mark.slow
def test_killed_twice(killer, finished, path, tmp_path):
    arguments = ("--run-dir", str(tmp_path / "run"))
    assert killer.run(path, "mcl_clip.train.loop:clamp_logit_scale_", 5, *arguments) == -signal.SIGKILL
    assert killer.run(path, "mcl_clip.train.loop:clamp_logit_scale_", 4, *arguments) == -signal.SIGKILL
    assert (tmp_path / "run/lock").exists()
    execute(replace(load_recipe(path), run_dir=tmp_path / "run"))
    assert weights(tmp_path / "run") == weights(finished)
    assert not (tmp_path / "run/lock").exists()
