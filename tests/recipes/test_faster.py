"""Runs that do less in a step: text features from disk, patches left out, blocks run twice, compiled towers."""

import logging
import re
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mcl_clip import TowerConfig
from mcl_clip.config import AugmentConfig, LockConfig
from mcl_clip.core.errors import UserError
from mcl_clip.data.features import part_name, read_part
from mcl_clip.model.clip import encode_texts
from mcl_clip.runs import train_phase
from mcl_clip.runs.phase import StaleArtifactError
from mcl_clip.runs.train_phase import start_clip
from mcl_clip.stages import embed
from tests.recipes.runs import Killer, execute, files, load_recipe, records, with_stages

TEXT_LOCKED = {"steps": 26, "lock": LockConfig(text=True)}  # 416 rows: each of 200 captions twice
OVERRIDES = ("--stages.1.train.steps", "26", "--stages.1.train.lock.text")
TRAIN = "stage-1/train"


@pytest.fixture(scope="module")
def locked(path, tmp_path_factory):
    """A run whose second stage has a locked text tower, and what it logged."""
    recipe = replace(load_recipe(path), run_dir=tmp_path_factory.mktemp("locked") / "run")
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("mcl_clip")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    run = execute(with_stages(recipe, {}, TEXT_LOCKED))
    logger.setLevel(level)
    logger.removeHandler(handler)
    return run, lines


def losses(run):
    return [record["loss"] for record in records(run / TRAIN / "metrics.jsonl") if "loss" in record]


def test_text_features_from_disk_train_as_the_locked_tower_does(locked, recipe):
    run, lines = locked
    said = r"stage 1: the text tower is locked; caption features are read from .*texts"
    assert any(re.fullmatch(said, line) for line in lines)
    without = {**TEXT_LOCKED, "lock": LockConfig(text=True, cached_texts=False)}
    uncached = execute(with_stages(recipe, {}, without))
    assert losses(run) == pytest.approx(losses(uncached), abs=1e-5)
    for name in ("duplicates", "negatives_per_row"):
        found = [[record[name] for record in records(of / TRAIN / "metrics.jsonl")] for of in (run, uncached)]
        assert found[0] == found[1]
    assert not (run / TRAIN / "texts").exists()
    before = files(uncached)
    execute(with_stages(recipe, {}, TEXT_LOCKED))  # where features come from is no change of a run
    assert files(uncached) == before


def test_the_embedding_takes_over_text_features_of_the_same_tower(locked):
    run, lines = locked
    assert "stage 1: the text features of the previous stage are reused" in lines
    for number in range(4):
        first, second = (read_part(run / f"stage-{stage}/embed" / part_name(number), 50) for stage in (0, 1))
        np.testing.assert_array_equal(first.text, second.text)
        assert (first.image != second.image).any()
    stages = [load_file(run / f"stage-{stage}/train/model/open_clip_model.safetensors") for stage in (0, 1)]
    assert torch.equal(stages[0]["text_projection"], stages[1]["text_projection"])


def test_texts_of_the_same_tower_are_not_encoded_again(recipe, monkeypatch):
    calls = []
    monkeypatch.setattr(embed, "encode_texts", lambda *given: calls.append(1) or encode_texts(*given))
    execute(with_stages(recipe, {}, {**TEXT_LOCKED, "steps": 4}))
    assert len(calls) == 4  # a batch for each shard, in stage 0


@pytest.mark.parametrize("change", [{"start": "scratch"}, {"precision": "bf16"}], ids=["scratch", "bf16"])
def test_texts_of_another_tower_or_precision_are_encoded(change, recipe):
    run = execute(with_stages(recipe, {}, {**TEXT_LOCKED, "steps": 4, **change}))
    first, second = (read_part(run / f"stage-{stage}/embed" / part_name(0), 50) for stage in (0, 1))
    assert (first.text != second.text).any()


def test_in_bfloat16_text_features_from_disk_are_those_of_a_step(recipe):
    found = []
    for cached in (True, False):
        lock = LockConfig(text=True, cached_texts=cached)
        run = recipe.run_dir / str(cached)
        stage = {**TEXT_LOCKED, "lock": lock, "precision": "bf16"}
        execute(with_stages(replace(recipe, run_dir=run), stage))
        found.append([r["loss"] for r in records(run / "stage-0/train/metrics.jsonl") if "loss" in r])
    assert found[0] == pytest.approx(found[1], abs=2e-2)


def test_features_that_are_drawn_or_asked_for_in_a_step_are_not_cached(recipe, monkeypatch, caplog):
    """A text tower with dropout gives other features each time; CoCa wants texts with every picture."""

    def with_dropout(*given):
        clip = start_clip(*given)
        clip.model.dropout = nn.Dropout(0.1)
        return clip

    caplog.set_level("INFO")
    coca = {**recipe.tower.model, "multimodal_cfg": {"width": 16, "heads": 2, "layers": 1, "context_length": 12}}
    coca["vision_cfg"] = {**coca["vision_cfg"], "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
    coca["text_cfg"] = {**coca["text_cfg"], "embed_cls": True, "output_tokens": True}
    coca["custom_text"] = True
    stage = {**TEXT_LOCKED, "steps": 26}
    execute(with_stages(replace(recipe, run_dir=recipe.run_dir / "coca", tower=TowerConfig(model=coca)), stage))
    monkeypatch.setattr(train_phase, "start_clip", with_dropout)
    execute(with_stages(replace(recipe, run_dir=recipe.run_dir / "dropout"), stage))
    assert "the text tower is locked" not in caplog.text


def test_a_tower_that_trained_is_embedded_anew(finished):
    first, second = (read_part(finished / f"stage-{stage}/embed" / part_name(0), 50) for stage in (0, 1))
    assert (first.text != second.text).any()


def test_few_steps_leave_captions_to_the_tower(recipe, caplog):
    caplog.set_level("INFO")
    execute(with_stages(recipe, {}, {**TEXT_LOCKED, "steps": 24}))  # 384 rows: not each caption twice
    assert "the text tower is locked" not in caplog.text


@pytest.mark.parametrize(
    ("target", "call", "after"),
    [
        ("mcl_clip.stages.embed:text_part_name", 10, False),
        pytest.param("mcl_clip.runs.frozen:write_text_features", 1, True, marks=pytest.mark.slow),
        pytest.param("mcl_clip.train.loop:save_checkpoint", 6, True, marks=pytest.mark.slow),
    ],
    ids=["between shards", "before the training", "after a checkpoint"],
)
def test_killed_with_text_features_on_disk_ends_with_the_same_bits(target, call, after, locked, path, tmp_path):
    killer, run = Killer(), tmp_path / "run"
    try:
        assert killer.run(path, target, call, "--run-dir", str(run), *OVERRIDES, after=after) == -signal.SIGKILL
    finally:
        killer.close()
    assert any((run / TRAIN / "texts").glob("texts-*.safetensors"))
    execute(load_recipe(path), "--run-dir", str(run), *OVERRIDES)
    name = f"{TRAIN}/model/open_clip_model.safetensors"
    assert (run / name).read_bytes() == (locked[0] / name).read_bytes()
    assert losses(run) == losses(locked[0])


def test_checkpointed_blocks_change_nothing_and_patches_left_out_do(recipe, finished):
    twice = execute(with_stages(replace(recipe, run_dir=recipe.run_dir / "a"), {"grad_checkpointing": True}))
    part = execute(with_stages(replace(recipe, run_dir=recipe.run_dir / "b"), {"patch_dropout": 0.5}))
    found = [[r["loss"] for r in records(run / "stage-0/train/metrics.jsonl")] for run in (finished, twice, part)]
    assert found[1] == pytest.approx(found[0], abs=1e-5)
    assert found[2] != pytest.approx(found[0], abs=1e-5)
    with pytest.raises(StaleArtifactError, match="patch_dropout"):
        execute(with_stages(replace(recipe, run_dir=recipe.run_dir / "b"), {"patch_dropout": 0.25}))
    with pytest.raises(UserError, match=r"--stages.K.train.patch-dropout must be from 0 to 0.999999, not 1"):
        with_stages(recipe, {"patch_dropout": 1.0})


@pytest.mark.slow
def test_compiled_towers_train_alike(recipe, finished):
    run = execute(with_stages(recipe, {"compiled": True}))
    found = [[r["loss"] for r in records(of / "stage-0/train/metrics.jsonl")] for of in (finished, run)]
    assert found[1] == pytest.approx(found[0], abs=1e-4)


def test_runs_from_before_the_options_continue(recipe):
    """Options at the values that stand for what was always done are no change of a run."""
    plain = with_stages(recipe, {"augment": AugmentConfig(jpeg="exact")})
    settings = execute(plain) / "stage-0/train/DONE.json"
    text = settings.read_text()
    for name in ("compiled", "patch_dropout", "grad_checkpointing", "cached_texts", "jpeg"):
        assert name not in text
