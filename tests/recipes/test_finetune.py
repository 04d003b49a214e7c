"""`mcl-clip finetune` from a table to an exported model, on a few pictures."""

import csv
import json
import os
import re
import runpy
import subprocess
import sys

import pytest
import timm
import torch
from PIL import Image
from transformers import CLIPModel

import mcl_clip
from mcl_clip.config import TowerConfig
from mcl_clip.core.errors import UserError
from mcl_clip.core.files import DONE
from mcl_clip.model.clip import create_clip, save_clip
from mcl_clip.publish.export import EVERYTHING, Export, export_run
from mcl_clip.results.record import load_results
from mcl_clip.runs import pipeline
from mcl_clip.tools import finetune as finetune_tool
from mcl_clip.tools.finetune_recipe import find_towers
from tests.commands import run_command
from tests.parts import write_text_model
from tests.photos import write_photos
from tests.recipes.runs import REPOSITORY, files, write_project

MODEL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "layers": 2, "width": 32, "head_width": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
SETTINGS = (
    *("--machine.workers", "0", "--machine.threads", "1", "--stages.0.train.steps", "4"),
    *("--stages.0.train.keep-best", ""),  # four steps improve nothing
)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A model, a table of 80 pictures, and a classification set."""
    folder = tmp_path_factory.mktemp("finetune")
    save_clip(create_clip(model_cfg=MODEL), folder / "base")
    names = write_photos(folder / "images", range(80))
    with (folder / "captions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file", "caption"), *((name, f"picture {name}") for name in names)])
    write_project(folder / "other")
    return folder


@pytest.fixture(autouse=True)
def inside(project, monkeypatch):
    monkeypatch.chdir(project)


def finetune(monkeypatch, capsys, run, *arguments, data="captions.csv", model="base"):
    own = ("--images-root", "images", "--run-dir", run)
    return run_command(monkeypatch, capsys, "finetune", model, data, *own, *SETTINGS, *arguments)


def test_one_command_from_a_table_to_a_model_that_open_clip_loads(project, monkeypatch, capsys, caplog):
    code, out, errors = finetune(monkeypatch, capsys, "run", "--eval.sets", "colours=other/colours")
    assert (code, errors) == (0, "")
    assert "data: 64 for train, 8 for validation, 8 for test" in out
    assert "setting: 40 steps: 10 epochs, which is usual for 64 pictures" in out
    for title in ("validation, percent:", "test, percent:", "colours, percent:"):
        assert title in out
    assert re.search(r"mean R@1 +[\d.]+ +[\d.]+ +[+-][\d.]+ \[", out)
    assert re.search(r"zero-shot +[\d.]+ +[\d.]+ +[+-][\d.]+ \[", out)
    assert "no audit: run/data/test has 8 pictures with captions that can be read" in out
    assert "next, more steps: the model is still learning" in out
    assert (project / "run/report.html").is_file()
    base = {result.dataset: result for result in load_results(project / "run/base")}
    assert base.keys() == {"validation", "test", "colours"}
    trained, transform, tokenizer = mcl_clip.load(project / "run/model")
    image = transform(Image.open(project / "images/000.jpg"))[None]
    untrained, *_ = mcl_clip.load(project / "base")
    with torch.inference_mode():
        assert not torch.equal(trained.encode_image(image), untrained.encode_image(image))
        assert tokenizer(["a"]).shape == (1, 12)

    before = files(project / "run")
    code, again, _ = finetune(monkeypatch, capsys, "run", "--eval.sets", "colours=other/colours")
    assert code == 0
    assert "stage-0/train: already done" in caplog.messages
    assert again[again.index("validation, percent:") :] == out[out.index("validation, percent:") :].replace(
        "losses and restarts:\n  nothing", "losses and restarts:\n  the run was started 2 times"
    )
    kept = ("data/", "stage-0/", "base/", "combined/")
    assert {name: times for name, times in files(project / "run").items() if name.startswith(kept)} == {
        name: times for name, times in before.items() if name.startswith(kept)
    }

    code, _, errors = finetune(monkeypatch, capsys, "run", "--stages.0.train.lr", "1")
    assert code == 2
    assert "train.lr was 1e-05 and is now 1" in errors


def test_the_result_is_audited_on_a_test_set_that_is_large_enough(project, monkeypatch, capsys):
    arguments = ("--test", "32", "--validation", "8", "--stages.0.train.steps", "1")
    code, out, errors = finetune(monkeypatch, capsys, "audited", *arguments)
    assert (code, errors) == (0, "")
    assert "audit: audited/audit/audit.html\n" in out
    record = json.loads((project / "audited/audit/audit.json").read_text())
    assert record["pictures"] == 32
    assert f"next, more steps: the model is {record['verdict']['text']}" in out
    written = files(project / "audited/audit")
    assert finetune(monkeypatch, capsys, "audited", *arguments)[0] == 0
    assert files(project / "audited/audit") == written

    code, out, _ = finetune(monkeypatch, capsys, "not-audited", *arguments, "--no-audit")
    assert code == 0
    assert not (project / "not-audited/audit").exists()


@pytest.mark.slow
def test_the_written_recipe_repeats_the_run_bit_by_bit(project, monkeypatch, capsys):
    assert finetune(monkeypatch, capsys, "first")[0] == 0
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "recipe.py", "--run-dir", str(project / "second")]
    done = subprocess.run(command, cwd=project / "first", env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    weights = "stage-0/train/model/open_clip_model.safetensors"
    assert (project / "first" / weights).read_bytes() == (project / "second" / weights).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--caption-column", "words"], "no column 'words'; its columns are file, caption"),
        (["--images-root", "other"], r"80 of 80 pictures cannot be used \(80 missing\).*--max-missing 0.01.*000.jpg"),
        (["--validation", "70"], "2 for training, 70 for validation and 8 for the test; 40 are needed"),
        (["--max-missing", "2"], "--max-missing must be from 0 to 1, not 2"),
        (["--eval.sets", "images"], "images is not an evaluation set"),
        (["--eval.sets", "nowhere"], "there is no folder nowhere"),
        (["--encoding", "ascii-or-so"], "--encoding ascii-or-so is not known"),
        (["--stages.0.train.lock.patterns", "nothing"], "no parameter matches the pattern 'nothing'"),
    ],
)
def test_what_cannot_be_is_one_sentence_and_leaves_nothing(project, monkeypatch, capsys, arguments, message):
    code, _, errors = finetune(monkeypatch, capsys, "refused", *arguments)
    assert code == 2
    assert re.search(message, errors), errors
    assert errors.count("\n") == 1
    assert not (project / "refused").exists() or not (project / "refused" / "recipe.py").exists()


def test_an_unknown_setting_is_refused_before_the_data_are_read(project, monkeypatch, capsys):
    code, _, errors = finetune(monkeypatch, capsys, "mistyped", "--stages.0.train.lrr", "1")
    assert code == 2
    assert "lrr" in errors
    assert not (project / "mistyped").exists()


def test_a_damaged_model_is_refused_before_the_data_are_read(project, monkeypatch, capsys):
    (project / "broken").mkdir(exist_ok=True)
    (project / "broken/open_clip_config.json").write_text(json.dumps({"model_cfg": MODEL, "preprocess_cfg": {}}))
    code, _, errors = finetune(monkeypatch, capsys, "damaged", model="broken")
    assert code == 2
    assert "has no weights" in errors
    assert not (project / "damaged").exists()


def test_an_interrupted_run_continues_with_the_same_command(project, monkeypatch, capsys, caplog):

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "embed", stop)
        assert finetune(monkeypatch, capsys, "stopped")[0] == 130
    assert (project / "stopped/stage-0/train" / DONE).is_file()
    assert finetune(monkeypatch, capsys, "stopped")[0] == 0
    assert "stage-0/train: already done" in caplog.messages
    assert (project / "stopped/model/open_clip_model.safetensors").is_file()


def test_a_pair_of_towers_trains_its_heads(project, monkeypatch, capsys):
    torch.save(timm.create_model("test_efficientnet").state_dict(), "trunk.pth")
    write_text_model(project / "words")
    arguments = ["finetune", "captions.csv", "--images-root", "images", "--run-dir", "pair", *SETTINGS]
    code, _, errors = run_command(monkeypatch, capsys, *arguments, "--image", "timm:test_efficientnet=trunk.pth")
    assert code == 2
    assert "DATA with both --image timm:NAME=FILE and --text hf:FOLDER" in errors
    towers = ("--image", "timm:test_efficientnet=trunk.pth", "--text", "hf:words")
    code, output, error = run_command(monkeypatch, capsys, *arguments, *towers)
    assert (code, error.count("error:")) == (0, 0)
    assert "rate 0.001: for projection heads" in output
    assert "both trunks locked, images not augmented" in output
    recipe = runpy.run_path("pair/recipe.py")["RECIPE"]
    assert recipe.tower == TowerConfig(image=f"timm:test_efficientnet={project}/trunk.pth", text=f"hf:{project}/words")
    trained = mcl_clip.load("pair/model")[0].state_dict()
    trunk = {
        name: trained[f"visual.trunk.{name}"]
        for name in timm.create_model("test_efficientnet", num_classes=0).state_dict()
    }
    saved = torch.load("trunk.pth")
    assert all(torch.equal(trunk[name], saved[name]) for name in trunk)
    with pytest.raises(UserError, match=r"is an image tower alone; write timm:NAME=FILE.hf:FOLDER"):
        find_towers("timm:test_efficientnet=trunk.pth")


def test_a_clip_model_of_transformers_comes_back_as_one(project, monkeypatch, capsys):
    clip = create_clip(model_cfg={**MODEL, "quick_gelu": True})
    save_clip(clip, project / "own")
    assert run_command(monkeypatch, capsys, "finetune", "own", "captions.csv", "--images-root", "images", "--run-dir",
                       "as-open-clip", *SETTINGS)[0] == 0  # fmt: skip
    export_run(project / "as-open-clip", project / "hf", Export(stage=0, as_transformers=True))
    assert finetune(monkeypatch, capsys, "from-hf", model="hf")[0] == 0
    config = json.loads((project / "from-hf/model/config.json").read_text())
    assert config["architectures"] == ["CLIPModel"]
    assert CLIPModel.from_pretrained(project / "from-hf/model").config.projection_dim == 16


@pytest.mark.slow
def test_the_final_model_is_what_is_exported(project, monkeypatch, capsys):
    """Where weights are averaged, it is not that of the stage."""
    assert finetune(monkeypatch, capsys, "plain")[0] == 0
    assert finetune(monkeypatch, capsys, "between", "--eval.select", "validation", "--eval.wise-ft", "0.5")[0] == 0
    exported = {}
    monkeypatch.setattr(finetune_tool, "export_run", lambda run, _, what: exported.update({run.name: what}) or {})
    for name in ("plain", "between"):
        finetune_tool.export_result(project / name)
    assert exported == {"plain": Export(stage=0), "between": EVERYTHING}
