"""The recipe of a control differs from the stages in one thing, at equal compute."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mcl_clip.config import ClusterConfig, RunConfig, StageConfig, TowerConfig, TrainConfig
from mcl_clip.runs.controls import equal_compute_steps, shuffled_groups, with_control

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


@pytest.mark.parametrize(
    ("method", "control"),
    [("single", "single"), ("plain-stages", "no-groups"), ("ensemble", "ensemble"), ("soup", "ensemble"),
     ("greedy-soup", "ensemble")],
)  # fmt: skip
def test_a_method_trains_what_its_control_trains(method, control):
    for recipe in (SCRATCH, PRETRAINED):
        assert with_control(replace(recipe, method=method), rows=1920).stages == controlled(recipe, control).stages


def test_pretrained_towers_are_fine_tuned_from_the_same_weights():
    (only,) = controlled(PRETRAINED, "single").stages
    assert only.train.steps == 230  # what trains: 2 x 100 steps; all three stages embed
    assert [stage.start for stage in controlled(PRETRAINED, "ensemble").stages[1:]] == ["base", "base"]
    alone = replace(PRETRAINED, stages=(UNTOUCHED,))
    assert controlled(alone, "single").stages == (UNTOUCHED,)  # nothing trains, so there is nothing to compare


def test_equal_compute_counts_training_images_and_a_third_for_each_embedded_row():
    # 3 x 300 steps of 128, and 3 x 12,000 rows forward only: 900 + 12,000 / 128 steps
    assert equal_compute_steps([(300, 128)] * 3, rows=12_000, global_batch_size=128) == 994
    assert equal_compute_steps([(300, 128)] * 3, rows=0, global_batch_size=128) == 900
    assert equal_compute_steps([(100, 64), (100, 128)], rows=0, global_batch_size=32) == 600
    assert equal_compute_steps([(0, 128), (10, 128)], rows=0, global_batch_size=128) == 10


@pytest.mark.parametrize("stage", [1, 2])
def test_random_groups_keep_all_sizes_and_hold_out_the_same_rows(stage):
    groups = np.repeat([0, 1, 2, -1], [500, 300, 40, 60])[np.random.default_rng(0).permutation(900)]
    shuffled = shuffled_groups(groups, name=(0, stage, "random groups"))
    assert np.array_equal(shuffled == -1, groups == -1)
    assert np.array_equal(np.bincount(shuffled + 1), np.bincount(groups + 1))
    same = (shuffled == groups)[groups >= 0].mean()
    assert same == pytest.approx((500**2 + 300**2 + 40**2) / 840**2, abs=0.06)  # as for independent labels
    assert np.array_equal(shuffled, shuffled_groups(groups, name=(0, stage, "random groups")))
    assert not np.array_equal(shuffled, shuffled_groups(groups, name=(1, stage, "random groups")))
