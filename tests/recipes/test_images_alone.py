"""Runs of images alone: SimCLR in two stages, from shards without captions to an exported model."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from transformers import AutoModel

import mcl_clip
from mcl_clip import AugmentConfig, ClusterConfig, EvalConfig, RunConfig, StageConfig, TowerConfig, TrainConfig
from mcl_clip.cli import commands
from mcl_clip.core.errors import UserError
from mcl_clip.core.files import read_json, read_jsonl
from mcl_clip.data.features import EmbeddingTable
from mcl_clip.data.index import ShardIndex
from mcl_clip.eval.datasets import open_set
from mcl_clip.eval.embed import Encoder
from mcl_clip.publish.export import EVERYTHING, Export, export_run
from mcl_clip.tools.doctor import examine
from tests.recipes.runs import Killer, execute, load_recipe, write_project, write_shards

TRAIN = TrainConfig(
    steps=6, global_batch_size=16, lr=0.05, optimizer="sgd", weight_decay=1e-4, min_group_size=16, loss="simclr",
    temperature=0.5, augment=AugmentConfig(scale=(0.4, 1.0), horizontal_flip=0.5, jitter=(0.4, 0.4, 0.0, 0.0)),
)  # fmt: skip
STAGE = StageConfig(train=TRAIN, cluster=ClusterConfig(num_clusters=3, num_starts=2, metric="cosine"))
TOWER = TowerConfig(image="timm:resnet18=random", image_args={"channels": [4, 4, 8, 8]}, image_size=(16,), dim=8)


def with_images(recipe: RunConfig, **changes) -> RunConfig:
    return replace(
        recipe,
        **{"tower": TOWER, "stages": (STAGE, STAGE), "combine": "mean_cosine", **changes},
        eval=EvalConfig(classification=recipe.eval.classification),
        machine=replace(recipe.machine, report=True, save_steps=2),
    )


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A recipe of images alone, as a file, and shards without captions."""
    folder = tmp_path_factory.mktemp("images")
    path = write_project(folder)
    write_shards(folder / "alone", captions=False)
    text = path.read_text().replace("\nif __name__", "\nfrom tests.recipes.test_images_alone import with_images\n\n"
                                    'RECIPE = with_images(RECIPE, data=DataConfig(train=(str(HERE / "alone"),)))\n'
                                    "\nif __name__")  # fmt: skip
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def run(project) -> Path:
    return execute(load_recipe(project))


def test_every_stage_and_their_combination_are_probed(run):
    results = read_jsonl(run / "combined/results.jsonl") + read_jsonl(run / "stage-1/eval/results.jsonl")
    labels = {record["label"]: record for record in results}
    assert labels.keys() == {"combined", "stage-1", "stages-0-1-concat", "stages-0-1-mean_cosine"}
    for label, record in labels.items():
        assert (record["task"], record["n_texts"], record["main_metric"]) == ("image_probe", 0, "linear_acc1")
        expected = {"linear_acc1", "knn_acc1", "main_metric"}
        expected |= {"cluster_nmi"} if label == "stage-1" else {"linear_acc1_width_8"}
        assert record["metrics"].keys() == expected
        outcomes = np.load((run / "combined" if label == "combined" else run / "stage-1/eval") / record["outcomes"])
        assert outcomes["linear_acc1"].mean() == pytest.approx(record["metrics"]["linear_acc1"])
    assert labels["combined"]["metrics"] == labels["stages-0-1-mean_cosine"]["metrics"]


def test_features_are_those_of_the_trunk(run):
    """Stored features, those of `load` and those of the evaluation are what the trunk computes, without the head."""
    index = ShardIndex.load(run / "index/index.arrow")
    stored = EmbeddingTable(run / "stage-0/embed", index)
    assert stored.rows(0, 3, "image").shape == (3, 8)
    assert stored.rows(0, 3, "text").shape == (3, 0)
    model, transform, tokenizer = mcl_clip.load(run / "stage-0")
    task = open_set(run.parent / "colours")
    encoder = Encoder(model=model, image_transform=transform, tokenizer=tokenizer, device=torch.device("cpu"))
    images = torch.stack([transform(image) for image in task.data.source.images(np.arange(32))])
    with torch.inference_mode():
        expected = model.visual.trunk(images)
    found = encoder.embed(replace(task.data, templates=()))
    torch.testing.assert_close(found["image"], expected, rtol=1e-5, atol=1e-5)
    assert found["text"].shape[0] == 0
    assert model(images[:2])["image_features"].shape == (2, 8)
    assert not torch.allclose(model.encode_image(images[:2], normalize=True), model(images[:2])["image_features"])
    with pytest.raises(UserError, match="has no text tower for captions"):
        tokenizer(["a photo"])


def test_nothing_is_held_out_and_no_temperature_is_fitted(run):
    combination = read_json(run / "combined/combination.json")
    assert (combination["combine"], combination["logit_scale"], combination["held_out_rows"]) == ("mean_cosine", 0, 0)
    assert read_json(run / "stage-1/train/groups.json")["held_out_rows"] == 0


def test_an_export_is_loaded_by_mcl_clip_timm_and_transformers(run, tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
    assert export_run(run, tmp_path / "all", EVERYTHING) == {"mcl_clip": 0}
    model, transform, _ = mcl_clip.load(tmp_path / "all")
    ours, _, _ = mcl_clip.load(run)
    pixels = transform(image)[None]
    with torch.inference_mode():
        assert torch.equal(model.encode_image(pixels), ours.encode_image(pixels))
        stages = [mcl_clip.load(run / f"stage-{s}")[0].encode_image(pixels, normalize=True) for s in range(2)]
        torch.testing.assert_close(model.encode_image(pixels), torch.cat(stages, dim=1))
        with pytest.raises(ValueError, match="no text tower"):
            model.encode_text(torch.zeros(1, 8, dtype=torch.int64))
        assert export_run(run, tmp_path / "one", Export(stage=1)) == {"mcl_clip": 0, "timm": 0}
        trunk = timm.create_model(f"local-dir:{tmp_path / 'one'}", pretrained=True, num_classes=0).eval()
        assert torch.equal(trunk(pixels), mcl_clip.load(run / "stage-1")[0].encode_image(pixels))
        hugging_face = AutoModel.from_pretrained(tmp_path / "one").eval()
        torch.testing.assert_close(hugging_face(pixel_values=pixels).pooler_output, trunk(pixels), rtol=1e-5, atol=1e-6)
    for folder in ("all", "one"):
        card = (tmp_path / folder / "README.md").read_text()
        assert "trained on images alone, without captions" in card
        assert "size and position (crops from 40 % of the area), left and right (flips), brightness, contrast" in card
        assert "encode_text" not in card
        assert "pairs" not in card.replace("image-text-pairs", "")
    assert "pipeline_tag: image-feature-extraction" in card
    with pytest.raises(UserError, match="--as-transformers writes a CLIPModel, and this model has no text tower"):
        export_run(run, tmp_path / "clip", Export(stage=0, as_transformers=True))


def test_the_evaluation_command_probes_too_and_refuses_other_sets(run, tmp_path, monkeypatch):
    def evaluate(data: str) -> Path:
        out = tmp_path / data
        arguments = ["eval", str(run), "--data", str(run.parent / data), "--out", str(out), "--device", "cpu"]
        monkeypatch.setattr("sys.argv", ["mcl-clip", *arguments])
        commands.command()
        return out

    (record,) = read_jsonl(evaluate("colours") / "results.jsonl")
    (ours,) = read_jsonl(run / "combined/results.jsonl")
    assert record["metrics"] == ours["metrics"]
    with pytest.raises(SystemExit) as stop:
        evaluate("retrieval")
    assert stop.value.code == 2


def test_the_report_has_no_captions(run):
    page = (run / "report.html").read_text()
    assert "200 images" in page
    assert "Image queries" in page
    assert "Text queries" not in page
    assert "all images are clustered by its features" in page


def test_the_doctor_finds_nothing_that_fails(project):
    recipe = load_recipe(project)
    from mcl_clip.cli.recipe import create_accelerator

    findings = list(examine(recipe, processes=1, make_accelerator=create_accelerator))
    assert [finding.text for finding in findings if finding.level == "FAIL"] == []
    assert any("samples at" in finding.text for finding in findings)


def test_a_killed_stage_resumes_with_the_same_bits(project, run, tmp_path):
    """SGD's momentum, BatchNorm's statistics and the views are those of the run that was not killed."""
    other, killer = tmp_path / "run", Killer()
    try:
        for target, call in (("mcl_clip.train.loop:save_checkpoint", 2), ("mcl_clip.stages.embed:write_part", 2)):
            assert killer.run(project, target, call, "--run-dir", str(other)) < 0
    finally:
        killer.close()
    execute(replace(load_recipe(project), run_dir=other))
    for name in ("stage-0/train/model/model.safetensors", "stage-1/train/model/model.safetensors",
                 "stage-1/train/model/head.safetensors", "stage-1/labels/labels.npy"):  # fmt: skip
        assert (other / name).read_bytes() == (run / name).read_bytes(), name
    assert len((other / "launches.jsonl").read_text().splitlines()) == 3


def test_captions_beside_the_images_change_nothing(project, run, tmp_path):
    """Shards with captions give the same model, and the captions are said not to be read."""
    recipe = load_recipe(project)
    shards = replace(recipe.data, train=(str(project.parent / "shards"),))
    execute(replace(recipe, data=shards, run_dir=tmp_path / "run", stages=(STAGE,)))
    first = [json.loads(line)["loss"] for line in (run / "stage-0/train/metrics.jsonl").read_text().splitlines()]
    second = [
        json.loads(line)["loss"] for line in (tmp_path / "run/stage-0/train/metrics.jsonl").read_text().splitlines()
    ]
    assert first == second
