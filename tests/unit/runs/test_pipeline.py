"""The plan of a run: phases, inputs and fingerprints."""

from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
from accelerate import Accelerator

from mcl_clip.config import (
    AugmentConfig,
    ClusterConfig,
    LockConfig,
    PublishConfig,
    RunConfig,
    StageConfig,
    TowerConfig,
    TrainConfig,
)
from mcl_clip.core.files import fingerprint
from mcl_clip.data.index import ShardIndex
from mcl_clip.data.row_order import Source
from mcl_clip.eval.task import Task
from mcl_clip.runs.context import RunContext, with_behavior
from mcl_clip.runs.pipeline import plan_phases

TRAIN = TrainConfig(steps=100, global_batch_size=64, lr=1e-3, warmup_steps=10)
STAGE = StageConfig(train=TRAIN)
SCRATCH = RunConfig(run_dir=Path("run"), tower=TowerConfig(model={"embed_dim": 8}), stages=(STAGE, STAGE))
PRETRAINED = replace(
    SCRATCH,
    tower=TowerConfig(architecture="ViT-B-32", pretrained="openai"),
    stages=(
        replace(STAGE, train=replace(TRAIN, steps=0)),
        replace(STAGE, start="base", train=replace(TRAIN, lock=LockConfig(text=True), precision="bf16")),
        replace(STAGE, train=replace(TRAIN, augment=AugmentConfig(jpeg="exact"), compiled=True)),
    ),
    publish=PublishConfig(repo="someone/model"),
)


class Index(ShardIndex):
    digest = "0123"

    def __init__(self):
        pass

    def __len__(self):
        return 500


def planned(config):
    return plan_phases(
        RunContext(
            config=config,
            accelerator=Mock(Accelerator),
            index=Index(),
            sources=(Source(rows=500, weight=1.0),),
            tasks={"photos": Mock(Task, data=Mock(sha256="4567"))},
        )
    )


def test_each_phase_depends_on_what_it_reads():
    assert {phase.name: [before.name for before in phase.inputs] for phase in planned(SCRATCH)} == {
        "stage-0/train": [],
        "stage-0/embed": ["stage-0/train"],
        "stage-0/cluster": ["stage-0/embed"],
        "stage-0/labels": ["stage-0/cluster"],
        "stage-0/eval": ["stage-0/train", "stage-0/cluster"],
        "stage-1/train": ["stage-0/train", "stage-0/labels"],
        "stage-1/embed": ["stage-1/train"],
        "stage-1/cluster": ["stage-1/embed"],
        "stage-1/labels": ["stage-1/cluster", "stage-0/labels"],
        "stage-1/eval": ["stage-0/train", "stage-1/train", "stage-0/cluster", "stage-1/cluster", "stage-0/eval"],
        "combined": [
            *("stage-0/train", "stage-1/train", "stage-0/embed", "stage-1/embed"),
            *("stage-0/eval", "stage-1/eval"),
        ],
    }


def test_stages_whose_groups_are_of_the_base_do_not_depend_on_each_other():
    of_base = replace(STAGE, start="base", cluster=ClusterConfig(features="base"))
    config = replace(PRETRAINED, stages=(PRETRAINED.stages[0], of_base, replace(STAGE, start="base")))
    inputs = {phase.name: [before.name for before in phase.inputs] for phase in planned(config)}
    assert inputs["stage-1/cluster"] == ["stage-0/embed"]
    assert inputs["stage-1/labels"] == ["stage-1/cluster"]
    assert inputs["stage-2/train"] == ["stage-1/labels"]
    changed = replace(config, stages=(config.stages[0], replace(of_base, train=replace(TRAIN, lr=0.5)), STAGE))
    before, after = ({phase.name: phase.fingerprint for phase in planned(each)} for each in (config, changed))
    assert before["stage-1/train"] != after["stage-1/train"]
    assert before["stage-1/labels"] == after["stage-1/labels"]


@pytest.mark.parametrize(
    ("config", "expected"),
    [(SCRATCH, "cb582bec99a725830fbbbdd14711993e"), (PRETRAINED, "42ca124f97a5bb281176b2eceb45aa4a")],
)
def test_runs_begun_with_earlier_versions_continue(config, expected):
    """A changed fingerprint refuses to continue every existing run: leave new fields out at their defaults."""
    phases = planned(replace(config, behavior="0.6"))
    assert fingerprint({phase.name: phase.fingerprint for phase in phases}) == expected


@pytest.mark.parametrize("marker", ["STARTED.json", "DONE.json"])
@pytest.mark.parametrize("behavior", ["0.6", "0.7"])
def test_a_run_keeps_the_behavior_it_was_begun_with(tmp_path, behavior, marker):
    config = replace(SCRATCH, run_dir=tmp_path)
    assert with_behavior(config).behavior == "0.7"
    phase = planned(replace(config, behavior=behavior))[0]
    phase.begin()
    if marker == "DONE.json":
        phase.mark_done()
    assert with_behavior(config).behavior == behavior
    assert with_behavior(replace(config, behavior="0.6")).behavior == "0.6"


def test_the_behavior_is_part_of_what_a_stage_was_made_from():
    now, before = (planned(replace(SCRATCH, behavior=behavior)) for behavior in ("0.7", "0.6"))
    assert all(a.fingerprint != b.fingerprint for a, b in zip(now, before, strict=True))
