"""The recipe of a control: one thing differs from the stages."""

from dataclasses import replace
from pathlib import Path

import pytest

from mcl_clip.config import ClusterConfig, RunConfig, StageConfig, TowerConfig, TrainConfig
from mcl_clip.runs.pipeline import with_control

TRAIN = TrainConfig(steps=100, global_batch_size=64, lr=1e-3, warmup_steps=10)
STAGE = StageConfig(train=TRAIN, cluster=ClusterConfig(num_clusters=4), start="previous")
SCRATCH = RunConfig(run_dir=Path("run"), tower=TowerConfig(model={"embed_dim": 8}), stages=(STAGE, STAGE, STAGE))
UNTOUCHED = StageConfig(train=replace(TRAIN, steps=0))
PRETRAINED = replace(
    SCRATCH, tower=TowerConfig(architecture="ViT-B-32", pretrained="openai"), stages=(UNTOUCHED, STAGE, STAGE)
)


def controlled(recipe, name, rows=1920):
    return with_control(replace(recipe, control=name), rows=rows)


def test_no_control_changes_nothing():
    assert with_control(SCRATCH, rows=1920) == SCRATCH


@pytest.mark.parametrize("name", ["single", "ifm"])
def test_a_single_stage_has_the_compute_of_all(name):
    (only,) = controlled(SCRATCH, name).stages
    assert only.train.steps == 330  # 3 x 100 steps and 3 x 1,920 rows forward only, which are 30 steps
    assert only.train.warmup_steps == 33
    assert only.train.ifm_epsilon == (0.1 if name == "ifm" else 0)
    assert replace(only.train, steps=100, warmup_steps=10, ifm_epsilon=0.0) == TRAIN


def test_ifm_takes_the_strength_of_the_recipe():
    stronger = replace(STAGE, train=replace(TRAIN, ifm_epsilon=0.2))
    assert controlled(replace(SCRATCH, stages=(stronger,)), "ifm").stages[0].train.ifm_epsilon == 0.2


@pytest.mark.parametrize(
    ("name", "groups", "start"),
    [
        ("no-groups", "none", "previous"),
        ("random-groups", "random", "previous"),
        ("ensemble", "none", "scratch"),
    ],
)
def test_the_same_stages_without_their_groups(name, groups, start):
    first, *later = controlled(SCRATCH, name).stages
    assert first == STAGE
    for stage in later:
        assert stage == replace(STAGE, start=start, train=replace(TRAIN, groups=groups))


def test_pretrained_towers_are_fine_tuned_from_the_same_weights():
    (only,) = controlled(PRETRAINED, "single").stages
    assert only.train.steps == 230  # what trains: 2 x 100 steps; all three stages embed
    assert [stage.start for stage in controlled(PRETRAINED, "ensemble").stages[1:]] == ["base", "base"]
    alone = replace(PRETRAINED, stages=(UNTOUCHED,))
    assert controlled(alone, "single").stages == (UNTOUCHED,)  # nothing trains, so there is nothing to compare
