"""Stages that read resharded shards, and stages that start from published weights."""

import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mcl_clip import MultistageCLIP, TowerConfig
from mcl_clip.cli.commands import command
from mcl_clip.cli.recipe import create_accelerator
from mcl_clip.config import LockConfig
from mcl_clip.core.errors import UserError
from mcl_clip.core.files import read_json
from mcl_clip.model.clip import create_clip, save_clip
from mcl_clip.runs.context import RunContext, load_index
from mcl_clip.runs.phase import StaleArtifactError
from mcl_clip.runs.train_phase import open_resharded
from tests.recipes.runs import (
    execute,
    files,
    steps,
    with_stages,
    write_shards,
)


def reshard(run, out, monkeypatch, stage=1):
    monkeypatch.setattr(sys, "argv", ["mcl-clip", "reshard", str(run), str(out), "--stage", str(stage)])
    command()


def test_a_stage_trains_from_resharded_shards(copy, recipe, tmp_path, monkeypatch, capsys):
    reshard(copy, tmp_path / "grouped", monkeypatch)
    assert "200 rows in 3 groups" in capsys.readouterr().out
    index, sources = load_index(recipe)
    run = RunContext(config=recipe, accelerator=create_accelerator(), index=index, sources=sources, tasks={})
    (_, train) = (stage.train for stage in recipe.stages)
    stages = (recipe.stages[0], replace(recipe.stages[1], train=replace(train, resharded=str(tmp_path / "grouped"))))
    new_index, row_map = open_resharded(replace(run, config=replace(recipe, stages=stages)), 1)
    groups = run.labels(1).values[row_map]
    by_key = {index.key(row): group for row, group in enumerate(run.labels(1).values)}
    assert [by_key[new_index.key(row)] for row in range(200)] == groups.tolist()
    assert (np.diff(groups) >= 0).all()  # group after group
    before = read_json(copy / "stage-1/train/groups.json")
    for folder in ("stage-1", "combined"):
        shutil.rmtree(copy / folder)
    resharded = ("--stages.1.train.resharded", str(tmp_path / "grouped"), "--stages.1.train.run-rows", "4")
    execute(recipe, *resharded)
    after = read_json(copy / "stage-1/train/groups.json")
    assert after["groups"] == before["groups"]
    assert after["epoch_0"]["rows"] == before["epoch_0"]["rows"] == 192  # without the held-out rows
    assert steps(copy, 1) == list(range(1, 9))
    with pytest.raises(StaleArtifactError, match="run_rows was 4 and is now 1"):
        execute(recipe)


def test_shards_of_another_run_are_refused(copy, path, recipe, tmp_path, monkeypatch):
    other = write_shards(tmp_path / "other", captions=True, corrupt=range(1))
    arguments = ("--run-dir", str(tmp_path / "other_run"), "--data.train", str(other), "--num-stages", "1")
    execute(recipe, *arguments)
    reshard(tmp_path / "other_run", tmp_path / "grouped", monkeypatch)
    for folder in ("stage-1", "combined"):
        shutil.rmtree(copy / folder)
    with pytest.raises(UserError, match="holds other samples than this run; reshard from this run again"):
        execute(recipe, "--stages.1.train.resharded", str(tmp_path / "grouped"))


def test_a_folder_without_resharded_shards_is_refused_before_anything_is_trained(recipe, tmp_path):
    sentence = f"--stages.1.train.resharded {tmp_path} is not a folder that mcl-clip reshard wrote: it has no row_map"
    with pytest.raises(UserError, match=sentence):
        execute(recipe, "--stages.1.train.resharded", str(tmp_path))
    assert not list(recipe.run_dir.glob("stage-*"))


def test_there_must_be_labels(copy, tmp_path, monkeypatch, capsys):
    for stage in (0, 4):
        with pytest.raises(SystemExit) as caught:
            reshard(copy, tmp_path / "grouped", monkeypatch, stage)
        assert caught.value.code == 2
        assert f"error: --stage {stage} needs the labels of stage {stage - 1}" in capsys.readouterr().err


def test_an_untouched_stage_0_and_a_locked_text_tower(recipe, tmp_path):
    folder = tmp_path / "published"
    save_clip(create_clip(model_cfg=recipe.tower.model, seed=5), folder)
    locked = {"start": "base", "lock": LockConfig(text=True, image_unlocked_groups=1)}
    recipe = replace(recipe, tower=TowerConfig(architecture=f"local-dir:{folder}"))
    run = execute(with_stages(recipe, {"steps": 0}, locked, locked))
    stages = [load_file(run / f"stage-{s}/train/model/open_clip_model.safetensors") for s in (0, 1, 2)]
    base = load_file(folder / "open_clip_model.safetensors")
    assert all(torch.equal(stages[0][name], base[name]) for name in base)
    trained = {name for name in base if not torch.equal(stages[1][name], base[name])}
    assert trained == {name for name in base if not torch.equal(stages[2][name], base[name])}
    assert trained == {"logit_scale", "visual.proj"}  # the last group of a ViT
    assert not torch.equal(stages[1]["visual.proj"], stages[2]["visual.proj"])
    model = MultistageCLIP.load(run / "combined/model")
    assert model.shared_text_tower
    assert read_json(run / "combined/model/mcl_clip_config.json")["shared_text_tower"] is True
    assert not (run / "stage-0/train/metrics.jsonl").exists()


def test_the_weights_count_by_their_bytes(recipe, tmp_path):
    first, second = tmp_path / "published", tmp_path / "moved"
    save_clip(create_clip(model_cfg=recipe.tower.model, seed=5), first)
    at_first, at_second = (
        with_stages(replace(recipe, tower=TowerConfig(architecture=f"local-dir:{folder}")), {"steps": 0})
        for folder in (first, second)
    )
    execute(at_first)
    before = files(recipe.run_dir)
    first.rename(second)
    execute(at_second)
    assert files(recipe.run_dir) == before
    save_clip(create_clip(model_cfg=recipe.tower.model, seed=6), second)
    with pytest.raises(StaleArtifactError, match=r"tower.architecture.open_clip_model.safetensors was"):
        execute(at_second)


def test_scratch_is_not_for_pretrained_towers(recipe, tmp_path):
    save_clip(create_clip(model_cfg=recipe.tower.model), tmp_path / "published")
    recipe = replace(recipe, tower=TowerConfig(architecture=f"local-dir:{tmp_path / 'published'}"))
    with pytest.raises(UserError, match=r"--stages.1.start scratch means random weights, and .* are pretrained"):
        execute(with_stages(recipe, {}, {"start": "scratch"}))
