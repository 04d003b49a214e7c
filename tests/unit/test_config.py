"""What the configuration refuses: values of another type, out of range, or that could have no effect."""

from copy import copy
from dataclasses import fields
from pathlib import Path

import pytest

from mcl_clip import config as module
from mcl_clip.config import (
    AugmentConfig,
    ClusterConfig,
    DataConfig,
    DecodeConfig,
    DistillConfig,
    EvalConfig,
    ExperimentConfig,
    LockConfig,
    LoraConfig,
    MachineConfig,
    PublishConfig,
    RunConfig,
    StageConfig,
    TowerConfig,
    TrainConfig,
)
from mcl_clip.core.errors import UserError

TRAIN = TrainConfig(steps=1, global_batch_size=2, lr=1.0)
STAGE = StageConfig(train=TRAIN)
SECTIONS = (
    *(
        TRAIN,
        STAGE,
        AugmentConfig(),
        ClusterConfig(),
        DataConfig(),
        DecodeConfig(),
        DistillConfig(),
        EvalConfig(),
        LockConfig(),
    ),
    *(ExperimentConfig(figures={}), LoraConfig(), MachineConfig(), PublishConfig()),
    TowerConfig(architecture="ViT-B-32"),
    RunConfig(run_dir=Path("run"), tower=TowerConfig(architecture="ViT-B-32"), stages=(STAGE,)),
)


def check(section, **changes):
    """Check a section with other values; the type checker of the tests would refuse to make one."""
    changed = copy(section)
    for name, value in changes.items():
        object.__setattr__(changed, name, value)
    changed.__post_init__()
    return changed


def test_all_sections_are_here():
    assert {type(section).__name__ for section in SECTIONS} == {n for n in vars(module) if n.endswith("Config")}


@pytest.mark.parametrize(
    ("section", "name"),
    [(section, field.name) for section in SECTIONS for field in fields(section)],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_field_takes_its_type_only(section, name):
    for wrong in (object(), float("nan"), {1: object()}, (object(),)):
        with pytest.raises(UserError, match=rf"--(\w+\.)*{name.replace('_', '-')} is .*, and takes ") as error:
            check(section, **{name: wrong})
        assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("section", "changes", "sentence"),
    [
        (TRAIN, {"lr": "1e-3"}, "--stages.K.train.lr is '1e-3', and takes a number"),
        (TRAIN, {"loss": "clipp"}, "--stages.K.train.loss is 'clipp', and takes one of clip, siglip"),
        (TRAIN, {"betas": (0.9,)}, r"--stages.K.train.betas is \(0.9,\), and takes a tuple \(a number, a number\)"),
        (TRAIN, {"betas": (0.9, 1.0)}, "--stages.K.train.betas must be from 0 to 1, not 1.0"),
        (TRAIN, {"steps": True}, "--stages.K.train.steps is True, and takes an integer"),
        (TRAIN, {"weight_decay": -0.1}, "--stages.K.train.weight-decay must be at least 0, not -0.1"),
        (TRAIN, {"own_group_share": 1.5}, "--stages.K.train.own-group-share must be from 0 to 1, not 1.5"),
        (TRAIN, {"groups_per_batch": 0}, "--stages.K.train.groups-per-batch must be at least 1, not 0"),
        (TRAIN, {"groups_per_batch": 2}, "groups-per-batch 2 does not divide a batch of 2 rows into .* at least 2"),
        (TRAIN, {"weight_decays": {"visual": -1}}, "--stages.K.train.weight-decays must be at least 0, not -1"),
        (TRAIN, {"lr_multipliers": {"(": 1}}, r"--stages.K.train.lr-multipliers '\(' is not a regular expression: "),
        (TRAIN, {"min_group_size": 0}, "--stages.K.train.min-group-size must be at least 1, not 0"),
        (LockConfig(), {"patterns": ("[",)}, r"--stages.K.train.lock.patterns '\[' is not a regular expression"),
        (AugmentConfig(), {"scale": (0.9, 0.1)}, "augment.scale 0.9 0.1 must be the smaller, then the larger value"),
        (AugmentConfig(), {"scale": (0.5, 2)}, "augment.scale must be from 1e-06 to 1, not 2"),
        (AugmentConfig(), {"ratio": (0, 1)}, "augment.ratio must be at least 1e-06, not 0"),
        (AugmentConfig(), {"horizontal_flip": 2}, "augment.horizontal-flip must be from 0 to 1, not 2"),
        (DataConfig(), {"train": ("a",), "weights": (0.0,)}, "--data.weights are all 0, which leaves no rows"),
        (DataConfig(), {"train": "shards"}, r"--data.train is 'shards', and takes a tuple \(a string, ...\)"),
        (MachineConfig(), {"trackers": ("wand",)}, r"takes a tuple \(one of tensorboard, wandb, trackio"),
        (MachineConfig(), {"save_minutes": -1}, "--machine.save-minutes must be at least 0, not -1"),
        (SECTIONS[-1], {"run_dir": "run"}, "--run-dir is 'run', and takes a pathlib.Path"),
        (SECTIONS[-1], {"stages": STAGE}, r"--stages is .*, and takes a tuple \(StageConfig\(...\), ...\)"),
        (SECTIONS[-1], {"control": "emsemble"}, "--control is 'emsemble', and takes one of none, single, ensemble"),
    ],
)  # fmt: skip
def test_a_refusal_names_the_option_and_what_it_takes(section, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        check(section, **changes)


def test_an_integer_is_a_number_and_a_list_becomes_a_tuple():
    assert check(TRAIN, lr=1, betas=[0, 0.5]).betas == (0, 0.5)
    assert check(DataConfig(), train=["a", "b"], weights=[1, 2]) == DataConfig(train=("a", "b"), weights=(1.0, 2.0))
    assert check(TRAIN, max_grad_norm=None, min_group_size=None) == TRAIN
