"""Stages that are distilled from the base, in whole runs."""

from dataclasses import replace

import pytest

from mcl_clip import TowerConfig
from mcl_clip.config import DistillConfig, LockConfig
from mcl_clip.core.errors import UserError
from mcl_clip.model.clip import create_clip, save_clip
from mcl_clip.report.page import write_report
from tests.recipes.runs import execute, records, with_stages

SHORT = {"steps": 4, "warmup_steps": 0}


def test_a_stage_is_distilled_from_the_pretrained_model(recipe, tmp_path):
    save_clip(create_clip(model_cfg=recipe.tower.model, seed=3), tmp_path / "base")
    pretrained = replace(recipe, tower=TowerConfig(architecture=f"local-dir:{tmp_path / 'base'}"))
    distill = DistillConfig(weight=2.0)
    run = execute(with_stages(pretrained, {**SHORT, "distill": distill, "lock": LockConfig(text=True), "steps": 30}))
    logged = [
        r["distillation"] for r in records(run / "stage-0/train/metrics.jsonl") if "loss" in r and "distillation" in r
    ]
    assert len(logged) >= 29  # at the first step the model is its own teacher, up to rounding
    assert abs(logged[0]) < 1e-6 < logged[-1]
    assert "weight 2, temperature 1" in write_report(run).read_text()


def test_random_towers_have_nothing_to_distill(recipe):
    with pytest.raises(UserError, match=r"--stages.0.train.distill.weight 1 distills the pretrained model, and the"):
        execute(with_stages(recipe, {**SHORT, "distill": DistillConfig(weight=1.0)}))
    assert not recipe.run_dir.exists()


def test_later_stages_of_random_towers_are_distilled_from_stage_0(recipe):
    run = execute(with_stages(recipe, SHORT, {**SHORT, "distill": DistillConfig(weight=1.0)}))
    logged = [r.get("distillation", 0) for r in records(run / "stage-1/train/metrics.jsonl") if "loss" in r]
    assert logged[0] == pytest.approx(0, abs=1e-6)
    assert logged[-1] > 1e-6
