"""Runs whose batches go through the towers and the loss in chunks."""

from dataclasses import replace

import pytest
from safetensors.torch import load_file

from mcl_clip import TowerConfig
from mcl_clip.config import LockConfig
from mcl_clip.core.errors import UserError
from mcl_clip.runs.phase import StaleArtifactError
from tests.recipes.runs import execute, records, with_stages

RESNET = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 64, "patch_size": None},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def test_a_run_in_chunks_has_the_same_losses(recipe, finished):
    chunks = {"grad_cache_rows": 4, "loss_chunk_rows": 5}
    run = execute(with_stages(recipe, chunks, chunks))
    for stage in (0, 1):
        mine, usual = (
            [record for record in records(of / f"stage-{stage}/train/metrics.jsonl") if "loss" in record]
            for of in (run, finished)
        )
        assert len(mine) == len(usual) == 8
        for name in ("loss", "grad_norm", "logit_scale", "negatives_per_row", "duplicates"):
            found, expected = ([record[name] for record in of] for of in (mine, usual))
            assert found == pytest.approx(expected, abs=1e-5, rel=1e-4 if name == "grad_norm" else 0), name
    weights = [load_file(of / "stage-1/train/model/open_clip_model.safetensors") for of in (run, finished)]
    assert any((weights[0][name] != weights[1][name]).any() for name in weights[0])  # else no chunk was made
    with pytest.raises(StaleArtifactError, match="grad_cache_rows was 4 and is now 8"):
        execute(with_stages(recipe, {**chunks, "grad_cache_rows": 8}, chunks))


def test_chunks_in_bfloat16(recipe):
    whole, chunked = (
        execute(
            replace(
                with_stages(recipe, {"steps": 4, "precision": "bf16", "grad_cache_rows": rows}),
                run_dir=recipe.run_dir.with_name(str(rows)),
            )
        )
        for rows in (0, 4)
    )
    losses = [
        [r["loss"] for r in records(of / "stage-0/train/metrics.jsonl") if "loss" in r] for of in (whole, chunked)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=0.01)


def test_batch_norm_is_refused_where_it_trains(recipe):
    recipe = replace(recipe, tower=TowerConfig(model=RESNET))
    trained = {"steps": 1, "grad_cache_rows": 4}
    with pytest.raises(UserError, match=r"--stages.0.train.grad-cache-rows 4 cannot be used with BatchNorm.*; use 0,"):
        execute(with_stages(replace(recipe, run_dir=recipe.run_dir.with_name("refused")), trained))
    run = execute(with_stages(recipe, {**trained, "lock": LockConfig(image_unlocked_groups=1)}))
    assert len(records(run / "stage-0/train/metrics.jsonl")) == 1


@pytest.mark.parametrize("name", ["grad-cache-rows", "loss-chunk-rows"])
def test_a_negative_number_of_rows_is_refused(recipe, name):
    with pytest.raises(UserError, match=f"--stages.K.train.{name} must be at least 0, not -1"):
        with_stages(recipe, {name.replace("-", "_"): -1})
