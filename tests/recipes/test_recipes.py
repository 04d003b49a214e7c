"""Every recipe parses, says what to expect, and has towers that can be built without a network."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import yaml
from PIL import Image

from mcl_clip.cli.recipe import parse
from mcl_clip.core.errors import UserError
from mcl_clip.model.clip import create_clip
from mcl_clip.model.prepare import lock, trainable_summary
from tests.recipes.runs import REPOSITORY, load_recipe

RECIPES = sorted((REPOSITORY / "recipes").glob("*.py"))
EXPERIMENTS = sorted((REPOSITORY / "recipes/experiments").glob("*.py"))
LAUNCHES = sorted((REPOSITORY / "recipes/accelerate").glob("*.yaml"))
PROCESSES = {"one_gpu": (1, 1), "two_cpu_processes": (2, 1), "eight_gpus": (8, 1), "two_nodes": (16, 2)}
PARAMETERS = {"ViT-L-14": (427.6e6, 768, 224), "ViT-B-32": (151.3e6, 512, 224)}
MEASURED = re.compile(r"\d[\d.,]* ?(%|s\b|min\b|minutes\b|hours\b|h\b)")

every_recipe = pytest.mark.parametrize("path", [*RECIPES, *EXPERIMENTS], ids=lambda path: path.stem)
every_experiment = pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)


def model_on_meta(architecture):
    """The towers of a named architecture, without memory for their weights."""
    with torch.device("meta"):
        return open_clip.CLIP(**open_clip.get_model_config(architecture), output_dict=True)


def test_there_are_three_recipes():
    assert [path.stem for path in RECIPES] == ["cc12m_vit_b32", "finetune_vit_l14_mcl", "photos"]


@every_recipe
def test_the_docstring_has_the_command_and_numbers_or_says_that_there_are_none(path):
    text = ast.get_docstring(ast.parse(path.read_text()))
    assert path.relative_to(REPOSITORY).as_posix() in text
    is_measured = MEASURED.search(text) is not None
    assert is_measured or re.search("not yet run|not measured", text, re.IGNORECASE), text
    assert path.name in (REPOSITORY / "recipes/README.md").read_text()


@every_recipe
def test_a_recipe_is_its_own_default(path):
    recipe = load_recipe(path)
    assert parse(recipe, []) == recipe


@every_recipe
def test_settings_of_a_stage_can_be_changed(path):
    recipe = load_recipe(path)
    changed = parse(recipe, ["--stages.1.train.lr", "0.125", "--seed", "7", "--data.train", "a.tar", "b.tar"])
    assert (changed.stages[1].train.lr, changed.seed, changed.data.train) == (0.125, 7, ("a.tar", "b.tar"))
    assert changed.stages[0] == recipe.stages[0]
    assert changed.tower == recipe.tower


@every_recipe
def test_the_number_of_stages_can_be_changed(path):
    recipe = load_recipe(path)
    four = parse(recipe, ["--num-stages", "4", "--stages.3.train.lr", "0.25"])
    assert len(four.stages) == 4
    assert four.stages[:3] == (*recipe.stages, recipe.stages[-1])[:3]
    assert four.stages[3].train.lr == 0.25
    assert parse(recipe, ["--num-stages=1"]).stages == recipe.stages[:1]
    for wrong in ("0", "-1", "many", ""):
        with pytest.raises(UserError, match=f"--num-stages must be an integer of at least 1, not '{wrong}'"):
            parse(recipe, ["--num-stages", wrong])


def test_help_lists_the_settings_with_their_meaning():
    path = REPOSITORY / "recipes/photos.py"
    shown = subprocess.run([sys.executable, path, "--help"], capture_output=True, text=True, check=True).stdout
    assert "small model from scratch" in shown
    assert "--stages.1.train.global-batch-size" in shown
    assert "Rows of a batch over all processes" in " ".join(shown.replace("│", " ").split())


@pytest.mark.parametrize(
    "path", [path for path in [*RECIPES, *EXPERIMENTS] if load_recipe(path).tower.model], ids=lambda path: path.stem
)
def test_inline_towers_make_features(path):
    tower = load_recipe(path).tower
    made = create_clip(model_cfg=tower.model, preprocess=tower.preprocess)
    pictures = np.random.default_rng(0).integers(0, 255, (2, 40, 50, 3), np.uint8)
    images = torch.stack([made.image_transform(Image.fromarray(picture)) for picture in pictures])
    out = made.model.eval()(images, made.tokenizer(["a red square", "two dogs"]))
    for side in ("image_features", "text_features"):
        assert out[side].shape == (2, tower.model["embed_dim"])
        assert torch.allclose(out[side].norm(dim=1), torch.ones(2), atol=1e-5)
        assert not torch.allclose(out[side][0], out[side][1])


@pytest.mark.parametrize(
    "path", [path for path in RECIPES if load_recipe(path).tower.architecture], ids=lambda path: path.stem
)
def test_named_towers_exist_with_the_weights_and_the_lock_of_the_recipe(path):
    recipe = load_recipe(path)
    architecture, tag = recipe.tower.architecture, recipe.tower.pretrained
    if tag:
        assert tag in open_clip.list_pretrained_tags_by_model(architecture)
    count, dim, size_px = PARAMETERS[architecture]
    model = model_on_meta(architecture)
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(count, rel=1e-3)
    assert open_clip.get_model_config(architecture)["embed_dim"] == dim
    assert model.visual.image_size == (size_px, size_px)
    for stage in recipe.stages:
        settings = stage.train.lock
        if stage.train.steps:
            lock(model, text=settings.text, image_unlocked_groups=settings.image_unlocked_groups)
    assert all(p.device.type == "meta" for p in model.parameters())


def test_the_setting_of_the_paper_trains_the_last_six_groups_of_the_image_tower():
    recipe = load_recipe(REPOSITORY / "recipes/finetune_vit_l14_mcl.py")
    model, settings = model_on_meta("ViT-L-14"), recipe.stages[1].train.lock
    lock(model, text=settings.text, image_unlocked_groups=settings.image_unlocked_groups)
    assert "trains 63.8M of 427.6M parameters" in trainable_summary(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    blocks = {name.split(".")[3] for name in trained if ".resblocks." in name}
    assert blocks == {"19", "20", "21", "22", "23"}
    assert {"visual.proj", "visual.ln_post.weight", "logit_scale"} <= trained
    assert not [name for name in trained if not name.startswith(("visual.", "logit_scale"))]
    assert recipe.stages[0].train.steps == 0
    assert [stage.start for stage in recipe.stages[1:]] == ["base"] * 3
    assert recipe.combine == "concat"


@pytest.mark.parametrize("path", LAUNCHES, ids=lambda path: path.stem)
def test_launch_configurations_start_the_processes_of_their_names(path):
    config = yaml.safe_load(path.read_text())
    assert (config["num_processes"], config["num_machines"]) == PROCESSES[path.stem]
    assert config["distributed_type"] == ("NO" if config["num_processes"] == 1 else "MULTI_GPU")
    assert config["mixed_precision"] == "no"  # YAML without quotes would make it false


def test_files_that_the_readme_and_slurm_script_name_exist():
    assert {path.stem for path in LAUNCHES} == PROCESSES.keys()
    named = (REPOSITORY / "recipes/README.md", REPOSITORY / "recipes/accelerate/slurm.sh", *RECIPES, *EXPERIMENTS)
    for source in named:
        text = source.read_text()
        for name in re.findall(r"recipes/[\w/]+\.(?:py|yaml|sh)|data_prep/\w+\.py", text):
            assert Path(REPOSITORY / name).exists() or "NAME" in name, f"{source} names {name}"


@every_experiment
def test_an_experiment_measures_sets_of_its_recipe_in_arms_that_parse(path):
    recipe, experiment = load_recipe(path), load_recipe(path, "EXPERIMENT")
    sets = [*recipe.eval.retrieval, *recipe.eval.classification, *recipe.eval.sets]
    names = {name.split("=")[0] if "=" in name else Path(name).name for name in sets}
    terms = [term for terms in experiment.figures.values() for term in terms]
    assert {term.split(":")[0] for term in terms} <= names
    for arguments in experiment.arms.values():
        assert parse(recipe, list(arguments)) != recipe
    assert experiment.high in {None, *experiment.arms}
