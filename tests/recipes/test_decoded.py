"""Stages with latent target decoding, in whole runs."""

import shutil
from dataclasses import replace

import pytest
from safetensors.torch import load_file

from mcl_clip import TowerConfig
from mcl_clip.config import DecodeConfig, LockConfig
from mcl_clip.core.errors import UserError
from mcl_clip.model.clip import create_clip, save_clip
from mcl_clip.report.page import write_report
from tests.recipes.runs import execute, records, with_stages

SHORT = {"steps": 12, "warmup_steps": 0, "lr": 0.01, "decode": DecodeConfig(weight=2.0, hidden_dim=16)}


@pytest.fixture
def pretrained(recipe, tmp_path):
    save_clip(create_clip(model_cfg=recipe.tower.model, seed=3), tmp_path / "base")
    return replace(recipe, tower=TowerConfig(architecture=f"local-dir:{tmp_path / 'base'}"))


def test_sentence_features_are_decoded_and_the_head_is_dropped(pretrained):
    config = with_stages(pretrained, SHORT)
    run = execute(config)
    logged = [r["decoding"] for r in records(run / "stage-0/train/metrics.jsonl") if "loss" in r]
    assert len(logged) == 12
    assert logged[-1] < 0.7 * logged[0]
    (weights,) = (run / "stage-0/train/model").glob("*.safetensors")
    before = {name: tensor.clone() for name, tensor in load_file(weights).items()}
    assert not [name for name in before if "decoder" in name]
    assert "sentence features, weight 2" in write_report(run).read_text()
    train = run / "stage-0/train"  # as if the job had been killed after its last checkpoint but one
    for name in ("stage-0/embed", "stage-0/cluster", "stage-0/labels", "stage-0/eval", "combined"):
        shutil.rmtree(run / name)
    shutil.rmtree(train / "model")
    (train / "DONE.json").unlink()
    *kept, newest = sorted((train / "checkpoints").glob("step-*"))
    assert kept
    shutil.rmtree(newest)
    execute(config)
    after = load_file(weights)
    assert before.keys() == after.keys()
    assert all(after[name].equal(tensor) for name, tensor in before.items())


def test_what_cannot_be_decoded_is_refused(recipe, pretrained):
    with pytest.raises(UserError, match=r"--stages.0.train.decode.weight 2 decodes what a pretrained text tower"):
        execute(with_stages(recipe, SHORT))
    with pytest.raises(UserError, match=r"weight 2 changes the text tower, and --stages.0.train.lock.text locks it"):
        execute(with_stages(pretrained, {**SHORT, "lock": LockConfig(text=True)}))
    assert not recipe.run_dir.exists()
