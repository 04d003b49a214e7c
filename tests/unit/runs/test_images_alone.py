"""Settings that need captions are refused for images alone, and the other way round; what views take away is said."""

import logging
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mcl_clip.config import (
    AugmentConfig,
    ClusterConfig,
    DataConfig,
    DecodeConfig,
    DistillConfig,
    LockConfig,
    LoraConfig,
    RunConfig,
    StageConfig,
    TowerConfig,
    TrainConfig,
)
from mcl_clip.core.errors import UserError
from mcl_clip.eval.classification import ClassificationSet, ClassificationTask, MultilabelTask, ProbeTask, as_probe
from mcl_clip.model.tower import create_tower
from mcl_clip.runs.images_alone import check_images_alone, report_invariances
from mcl_clip.runs.pipeline import settings_of

TRAIN = TrainConfig(steps=5, global_batch_size=8, lr=0.1, loss="simclr")
STAGE = StageConfig(train=TRAIN, cluster=ClusterConfig(metric="cosine"))
TOWER = TowerConfig(image="timm:resnet18=random")
RECIPE = RunConfig(run_dir=Path("run"), tower=TOWER, stages=(STAGE, STAGE))
PAIRS = TowerConfig(architecture="ViT-B-32")


def with_train(**changes) -> RunConfig:
    return replace(RECIPE, stages=(STAGE, replace(STAGE, train=replace(TRAIN, **changes))))


def with_cluster(**changes) -> RunConfig:
    return replace(RECIPE, stages=(replace(STAGE, cluster=ClusterConfig(**{"metric": "cosine", **changes})),))


REFUSED = {
    "--stages.0.train.loss simclr is for images alone, and the model is ViT-B-32, with a text tower; leave out "
    "--tower.text, or use clip or siglip for pairs": replace(RECIPE, tower=PAIRS),
    "--stages.1.train.loss clip is for pairs, and the model is timm:resnet18=random, without a text tower; use simclr, "
    "or add --tower.text":
        with_train(loss="clip"),
    "--stages.1.train.loss siglip is for pairs": with_train(loss="siglip"),
    "--data.caption-key title reads captions (leave it out)": replace(RECIPE, data=DataConfig(caption_key="title")),
    "--data.negatives-key wrong reads captions": replace(RECIPE, data=DataConfig(negatives_key="wrong")),
    "--data.text-member cap reads captions": replace(RECIPE, data=DataConfig(text_member="cap")),
    "--combine weighted is fitted to captions": replace(RECIPE, combine="weighted"),
    "--combine best is fitted to captions": replace(RECIPE, combine="best"),
    "--stages.0.cluster.on text clusters captions (use image)": with_cluster(on="text"),
    "--stages.0.cluster.metric shared weighs what images and captions share (use cosine)": with_cluster(metric="shared"),  # noqa: E501
    "--stages.1.train.lock.text freezes a text tower": with_train(lock=LockConfig(text=True)),
    "--stages.1.train.lock.text freezes": with_train(lock=LockConfig(text_unlocked_groups=1)),
    "--stages.1.train.distill.weight 0.5 distills": with_train(distill=DistillConfig(weight=0.5)),
    "--stages.1.train.decode.weight 1 decodes": with_train(decode=DecodeConfig(weight=1.0)),
    "--stages.1.train.lora.rank 4 is for towers of open_clip (use 0)": with_train(lora=LoraConfig(rank=4)),
    "--stages.1.train.similar-by text compares captions (use image)": with_train(mask_similar=0.9),
    "--stages.1.train.augment.views 2 fixes the views": with_train(augment=AugmentConfig(views=2)),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_what_needs_captions_is_refused_without_them(message):
    with pytest.raises(UserError, match=re.escape(message)):
        check_images_alone(REFUSED[message])


def test_what_can_be_done_is_not_refused():
    check_images_alone(RECIPE)
    check_images_alone(with_train(mask_similar=0.9, similar_by="image", own_group_share=0.5, ifm_epsilon=0.1))
    pretrained = replace(RECIPE, tower=TowerConfig(image="timm:resnet18"))
    untrained = replace(pretrained.stages[0], train=replace(TRAIN, steps=0, loss="clip"))
    check_images_alone(replace(pretrained, stages=(untrained, STAGE)))
    check_images_alone(
        RunConfig(run_dir=Path("run"), tower=PAIRS, stages=(replace(STAGE, train=replace(TRAIN, loss="clip")),))
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": "hf:words"}, "--tower.text is one tower of a pair; give --tower.image"),
        (
            {"architecture": "ViT-B-32", "stem": "cifar"},
            "--tower.stem, --tower.no-head-batch-norm and arguments of timm are for",
        ),
        ({"architecture": "ViT-B-32", "head_batch_norm": False}, "are for an image tower alone"),
        ({"image": "timm:resnet18", "context_length": 8}, "--tower.context-length 8 is for texts"),
    ],
)
def test_towers_that_do_not_fit_together(options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        TowerConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"image": "timm:resnet81=random"},
            "names no architecture of timm, did you mean|names no architecture of timm",
        ),
        ({"image": "timm:test_vit=random", "stem": "cifar"}, "has no stem of one convolution and a max-pooling"),
        ({"image_args": {"checkpoint_path": "x"}}, "the arguments of resnet18 set checkpoint_path, which they may not"),
        ({"image_args": {"width": 7}}, "timm cannot make the image tower resnet18 for images of 224 pixels: .*width"),
    ],
)
def test_towers_that_cannot_be_made(options, message):
    with pytest.raises(UserError, match=message):
        create_tower(TowerConfig(**{"image": "timm:resnet18=random", **options}))


def test_one_view_is_refused():
    with pytest.raises(UserError, match=re.escape("--stages.K.train.num-views must be at least 2, not 1")):
        replace(TRAIN, num_views=1)


def test_settings_that_came_later_are_no_part_of_the_fingerprint_of_a_run_with_captions():
    later = {"optimizer", "momentum", "temperature", "num_views"}
    assert not later & settings_of(replace(TRAIN, loss="clip")).keys()
    assert settings_of(TRAIN).keys() & later == set()
    assert settings_of(replace(TRAIN, temperature=0.5, num_views=3)).keys() >= {"temperature", "num_views"}
    assert not {"stem", "image_args", "head_batch_norm"} & settings_of(PAIRS).keys()
    assert not {"jitter", "grayscale", "blur", "solarize"} & settings_of(AugmentConfig()).keys()


class NoImages:
    def __len__(self) -> int:
        return 6

    def images(self, rows) -> None:
        raise NotImplementedError


def classes(*names: str) -> ClassificationSet:
    return ClassificationSet(NoImages(), np.arange(6) % len(names), names, ("{c}",), "digest")


def test_sets_become_probes_or_are_refused():
    probe = as_probe(ClassificationTask("shapes", classes("round", "square")))
    assert isinstance(probe, ProbeTask)
    assert (probe.data.texts, probe.main_metric) == ([], "linear_acc1")
    with pytest.raises(UserError, match="the set captions needs a text tower, and this model has learned from images"):
        as_probe(MultilabelTask("captions", classes("a", "b")))
    few = ClassificationTask("few", replace(classes("a", "b"), labels=np.arange(4)))
    with pytest.raises(UserError, match="the set few has 4 images, and probes need 5 or more"):
        as_probe(few)


@pytest.mark.parametrize(
    ("augment", "names", "warns"),
    [
        (AugmentConfig(grayscale=0.2), ("colors",), True),
        (AugmentConfig(jitter=(0.4, 0.4, 0.0, 0.1)), ("Colour of the bird",), True),
        (AugmentConfig(grayscale=0.2), ("shapes",), False),
        (AugmentConfig(jitter=(0.4, 0.4, 0.0, 0.0)), ("colors",), False),
        (AugmentConfig(jitter=(0.4, 0.4, 0.4, 0.1), jitter_probability=0.0), ("colors",), False),
    ],
)
def test_views_without_color_are_warned_of_where_a_set_is_of_colors(augment, names, warns, caplog):
    tasks = {name: ProbeTask(name, classes("round", "square")) for name in names}
    tasks["hues"] = ProbeTask("hues", classes("red", "Green", "other"))  # known by the names of its classes
    with caplog.at_level(logging.INFO):
        report_invariances(with_train(augment=augment), tasks)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    named = {name for name in tasks if any(f"the set {name} is of colors" in text for text in warnings)}
    takes_color = bool(augment.grayscale or (any(augment.jitter[2:]) and augment.jitter_probability))
    assert named == ({*(names if warns else ()), "hues"} if takes_color else set())
    assert any("stage 1: views vary size and position" in record.getMessage() for record in caplog.records)
