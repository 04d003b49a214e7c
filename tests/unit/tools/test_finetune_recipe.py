import runpy
from dataclasses import replace
from pathlib import Path

import pytest

from mcl_clip import (
    AugmentConfig,
    EvalConfig,
    LockConfig,
    MachineConfig,
    RunConfig,
    StageConfig,
    TowerConfig,
    TrainConfig,
    UserError,
)
from mcl_clip.cli.recipe import parse
from mcl_clip.tools.finetune_data import PreparedData
from mcl_clip.tools.finetune_recipe import Default, default_recipe, find_towers, layer_rates, recipe_text

TOWER = TowerConfig(architecture="ViT-B-32", pretrained="openai")


def data(pictures: int, folder: Path = Path("/runs/r/data")) -> PreparedData:
    return PreparedData(folder, {"train": pictures, "validation": 10, "test": 10}, {}, ())


@pytest.mark.parametrize(
    ("pictures", "batch", "steps", "unlocked"),
    [
        (64, 16, 40, 3),
        (1_999, 64, 300, 3),
        (2_000, 64, 300, None),
        (6_000, 256, 138, None),
        (1_000_000, 256, 3_903, None),
    ],
)
def test_settings_fit_the_size_of_the_data(tmp_path, pictures, batch, steps, unlocked):
    config, defaults = default_recipe(tmp_path, TOWER, data(pictures))
    train = config.stages[0].train
    assert (train.global_batch_size, train.steps) == (batch, steps)
    assert train.lock.image_unlocked_groups == unlocked
    assert train.warmup_steps == round(steps / 10)
    assert 5 * config.eval.every_steps >= steps
    assert train.keep_best == "validation"
    assert config.data.holdout_rows == min(1024, pictures // 20)
    assert {f"{steps:,} steps", f"batches of {batch}"} <= {default.setting for default in defaults}


def test_what_depends_on_a_changed_setting_follows_it(tmp_path):
    def changed(*arguments):
        usual = parse(default_recipe(tmp_path, TOWER, data(6_000))[0], list(arguments))
        return default_recipe(tmp_path, TOWER, data(6_000), given=usual.stages[0].train)[0]

    shorter = changed("--stages.0.train.steps", "20")
    assert (shorter.stages[0].train.steps, shorter.stages[0].train.warmup_steps) == (20, 2)
    assert shorter.eval.every_steps == shorter.machine.save_steps == 4
    smaller = changed("--stages.0.train.global-batch-size", "64")
    assert (smaller.stages[0].train.steps, smaller.stages[0].train.warmup_steps) == (6 * 90, 54)


def test_rates_fall_from_block_to_block():
    names = [f"visual.transformer.resblocks.{n}.attn.weight" for n in range(12)]
    names += [f"transformer.encoder.layer.{n}.weight" for n in range(10, 12)]
    rates = layer_rates([*names, "visual.proj", "visual.conv1.weight", "logit_scale"])
    assert rates[r"^visual\.transformer\.resblocks\.10\."] == 0.85
    assert rates[r"^visual\.transformer\.resblocks\.0\."] == round(0.85**11, 4)
    assert rates[r"^transformer\.encoder\.layer\.10\."] == 0.85
    assert len(rates) == 11 + 1 + 1
    assert next(iter(rates.values())) == round(0.85**12, 4)
    assert layer_rates(["visual.proj", "logit_scale"]) == {}


CONFIGS = [
    {},
    {"stages": (StageConfig(train=TrainConfig(steps=5, global_batch_size=4, lr=1e-5)),) * 2, "seed": 3},
    {"tower": TowerConfig(model={"embed_dim": 8, "vision_cfg": {"layers": [1, 2]}, "text_cfg": {"width": 3.5}})},
    {"eval": EvalConfig(sets=("a=/x/'quoted'", "HERE/{b}"), every_steps=7)},
    {"machine": MachineConfig(cache_dir=Path("/tmp/cache"), trackers=("wandb",))},
    {"tower": TowerConfig(architecture="local-dir:/runs/r-other/model")},
]


@pytest.mark.parametrize("changes", CONFIGS)
def test_the_written_recipe_is_the_configuration(tmp_path, changes):
    run = tmp_path / "run"
    run.mkdir()
    config = replace(
        default_recipe(run, TOWER, data(500, run / "data"), trained=["a.blocks.0.w", "a.blocks.1.w"])[0], **changes
    )
    train = replace(
        config.stages[0].train, augment=AugmentConfig(ratio=(0.5, 2)), lock=LockConfig(patterns=(r"^a\.b'",))
    )
    config = replace(config, stages=(replace(config.stages[0], train=train), *config.stages[1:]))
    text = recipe_text(config, command='mcl-clip finetune "a\\b" """', defaults=[Default("1 step", 'said "so"')])
    (run / "recipe.py").write_text(text)
    found = runpy.run_path(str(run / "recipe.py"))["RECIPE"]
    assert found == config
    assert str(run) not in text  # the folder can be moved
    moved = run.rename(tmp_path / "moved")
    recipe: RunConfig = runpy.run_path(str(moved / "recipe.py"))["RECIPE"]
    assert recipe.run_dir == moved
    assert recipe.data.train == (str(moved / "data" / "train"),)


def test_models_are_named_as_elsewhere(tmp_path):
    assert find_towers("ViT-B-32/laion2b_s34b_b79k") == TowerConfig(
        architecture="ViT-B-32", pretrained="laion2b_s34b_b79k"
    )
    assert find_towers("hf-hub:org/name") == TowerConfig(architecture="hf-hub:org/name")
    for folder in (tmp_path / "model", tmp_path / "run/stage-0/train/model"):
        folder.mkdir(parents=True)
        (folder / "open_clip_config.json").write_text("{}")
    assert find_towers(str(tmp_path / "model")).architecture == f"local-dir:{tmp_path}/model"
    assert find_towers(f"local-dir:{tmp_path}/model").architecture == f"local-dir:{tmp_path}/model"
    assert find_towers(str(tmp_path / "run/stage-0")).architecture == f"local-dir:{tmp_path}/run/stage-0/train/model"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "ViT-B-32",
            "ViT-B-32 names an architecture without weights; write ViT-B-32/TAG, with one of its tags: openai",
        ),
        ("ViT-B-32/none", "ViT-B-32 has no weights 'none'; its tags are openai"),
        ("ViT-Z/openai", "there is no folder ViT-Z/openai, and open_clip has no architecture 'ViT-Z'"),
        (".", "holds no model to fine-tune: it has no open_clip_config.json"),
    ],
)
def test_models_that_are_not_there_are_refused(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        find_towers(name)
