"""A finished run exported, published, and loaded back by those who did not make it."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from huggingface_hub import ModelCard, constants
from PIL import Image

import mcl_clip
from mcl_clip.config import PublishConfig
from mcl_clip.core.errors import UserError
from mcl_clip.core.files import read_jsonl
from mcl_clip.model.multistage import MultistageCLIP, normalized
from mcl_clip.publish import export as module
from mcl_clip.publish.export import Export, export_run
from tests.commands import run_command
from tests.hub import TOKEN, Hub, online
from tests.recipes.runs import draw, execute, load_recipe

URL_TEMPLATE = "/{repo_id}/resolve/{revision}/{filename}"
ROOT = Path(__file__).parents[2]


def features(model, transform, tokenizer):
    images = torch.stack([transform(Image.effect_noise((40, 30), 90).convert("RGB").resize((s, 33))) for s in (32, 60)])
    with torch.no_grad():
        return model.encode_image(images, normalize=True).shape, model.encode_text(tokenizer(["a dog", "two cats"]))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with Hub(force_regular=True) as hub:
        online(monkeypatch)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + URL_TEMPLATE)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield hub


def test_a_run_becomes_a_folder_that_everyone_can_load(finished, tmp_path):
    differences = export_run(finished, tmp_path / "out", Export())
    assert differences.keys() == {"mcl_clip", "open_clip", "transformers"}
    assert max(differences.values()) < 1e-6
    files = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {"mcl_clip_config.json", "README.md", "eval/results.jsonl", "config.json"} <= files
    assert {f"stage_{s}/open_clip_model.safetensors" for s in (0, 1)} <= files
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl"))]
    labels = {record["label"] for record in read_jsonl(tmp_path / "out" / "eval" / "results.jsonl")}
    assert {"stage-0", "stage-1", "combined"} <= labels
    assert ModelCard.load(tmp_path / "out" / "README.md").data.library_name == "mcl_clip"

    model, transform, tokenizer = mcl_clip.load(tmp_path / "out")
    whole, _, _ = mcl_clip.load(finished)
    shape, texts = features(model, transform, tokenizer)
    assert shape == (2, 32)
    assert torch.equal(texts, features(whole, transform, tokenizer)[1])


def test_compact_and_single_forms(finished, tmp_path):
    export_run(finished, tmp_path / "whole", Export())
    export_run(finished, tmp_path / "compact", Export(compact=True))
    assert torch.equal(*(features(*mcl_clip.load(tmp_path / name))[1] for name in ("whole", "compact")))

    export_run(finished, tmp_path / "one", Export(stage=1))
    plain, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'one'}")
    stage = MultistageCLIP.load(finished / "combined" / "model").stages[1]
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'one'}")(["a dog"])
    with torch.no_grad():
        assert torch.equal(plain.eval().encode_text(tokens), stage.encode_text(tokens))
    assert {record["label"] for record in read_jsonl(tmp_path / "one" / "eval" / "results.jsonl")} == {"stage-1"}

    differences = export_run(finished, tmp_path / "tf", Export(stage=1, as_transformers=True))
    assert differences["transformers"] < 1e-6 < differences[module.TRANSFORMERS_RESIZED] < 1e-2
    assert json.loads((tmp_path / "tf" / "config.json").read_text())["model_type"] == "clip"


def test_averaged_and_interpolated_weights(finished, tmp_path):
    export_run(finished, tmp_path / "mean", Export(average=True))
    half = Export(stage=1, wise_ft=0.5, base=f"{finished}/stage-0")
    export_run(finished, tmp_path / "half", half)
    stages = MultistageCLIP.load(finished / "combined" / "model").stages
    expected = (stages[0].visual.proj + stages[1].visual.proj) / 2
    for name in ("mean", "half"):
        model, _, _ = mcl_clip.load(tmp_path / name)
        torch.testing.assert_close(model.visual.proj, expected, rtol=0, atol=1e-7)
        assert not (tmp_path / name / "eval").exists()  # nothing was measured of this model


@pytest.mark.parametrize(
    ("export", "sentence"),
    [
        (Export(stage=2), "--stage 2 is not one of the stages of .*, 0 to 1"),
        (Export(stage=0, average=True), "leave one of them out"),
        (Export(as_transformers=True), "--as-transformers is for one model"),
        (Export(wise_ft=0.5), "--wise-ft is for one model"),
        (Export(stage=1, wise_ft=1.5), "--wise-ft 1.5 must be between 0 and 1"),
        (Export(stage=1, wise_ft=0.5), "started from random ones; name others by --base"),
        (Export(stage=1, base="x"), "--base x has no effect without --wise-ft"),
        (Export(stage=1, compact=True), "--compact writes weights that several stages share"),
    ],
)
def test_exports_that_make_no_sense(finished, tmp_path, export, sentence):
    with pytest.raises(UserError, match=sentence):
        export_run(finished, tmp_path / "out", export)
    assert not list(tmp_path.iterdir())


def test_stages_from_new_weights_are_not_averaged(copy, tmp_path):
    config = json.loads((copy / "config.json").read_text())
    config["stages"][1]["start"] = "scratch"
    (copy / "config.json").write_text(json.dumps(config))
    for export, option in ((Export(average=True), "--average"), (Export(stage=1, wise_ft=0.5), "--wise-ft 0.5")):
        with pytest.raises(UserError, match=rf"{option} is for .* stage 1 of .* starts from new random weights"):
            export_run(copy, tmp_path / "out", export)


def test_only_an_earlier_export_is_replaced(finished, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds files that are not an exported model"):
        export_run(finished, tmp_path / "out", Export())
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"
    export_run(finished, tmp_path / "model", Export(stage=0))
    monkeypatch.chdir(tmp_path / "model")
    export_run(finished, Path(), Export(stage=1))
    monkeypatch.chdir(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]
    assert "stage 1" in (tmp_path / "model" / "README.md").read_text()
    (tmp_path / "model" / ".git").mkdir()
    (tmp_path / "model" / ".git" / "HEAD").write_text("ref")
    with pytest.raises(UserError, match=r"not an exported model, such as .git/HEAD"):
        export_run(finished, tmp_path / "model", Export(stage=0))


def test_a_model_that_loads_otherwise_is_not_kept(finished, tmp_path, monkeypatch):
    def damaged(folder):
        images, texts = open_clip_features(folder)
        return normalized(images) + 1e-3, texts

    open_clip_features = module._open_clip_features
    monkeypatch.setattr(module, "_open_clip_features", damaged)
    with pytest.raises(UserError, match="was discarded"):
        export_run(finished, tmp_path / "out", Export())
    assert not list(tmp_path.iterdir())


def test_push_and_load_back(finished, copy, hub, monkeypatch, capsys):
    code, out, _ = run_command(monkeypatch, capsys, "push", copy, "someone/tiny", "--license", "mit")
    assert code == 0
    assert f"{hub.endpoint}/someone/tiny" in out
    card = ModelCard(hub.repos["someone/tiny"]["main"]["README.md"].decode())
    assert card.data.license == "mit"
    assert 'mcl_clip.load("hf-hub:someone/tiny")' in card.text

    model, transform, tokenizer = mcl_clip.load("hf-hub:someone/tiny")
    assert torch.equal(features(model, transform, tokenizer)[1], features(*mcl_clip.load(finished))[1])
    code, out, _ = run_command(monkeypatch, capsys, "push", copy, "someone/tiny", "--license", "mit")
    assert (code, "nothing has changed" in out, len(hub.commits)) == (0, True, 1)

    code, _, _ = run_command(monkeypatch, capsys, "push", copy, "someone/tiny", "--stage", 1, "--revision", "stage-1")
    assert code == 0
    text = hub.repos["someone/tiny"]["stage-1"]["README.md"].decode()
    assert 'snapshot_download("someone/tiny", revision="stage-1")' in text
    assert "hf-hub:" not in text
    plain, _, _ = mcl_clip.load("hf-hub:someone/tiny@stage-1")
    assert isinstance(plain, open_clip.CLIP)
    assert torch.equal(plain.visual.proj, model.stages[1].visual.proj)


def test_a_dry_run_sends_nothing(copy, hub, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    code, out, _ = run_command(monkeypatch, capsys, "push", copy, "someone/tiny", "--dry-run")
    assert (code, hub.calls, hub.repos) == (0, {}, {})
    assert "stage_1/open_clip_model.safetensors" in out
    assert "nothing was uploaded" in out
    assert (copy / "upload" / "README.md").is_file()


def test_nothing_is_made_on_the_hub_when_the_local_check_fails(copy, hub, monkeypatch, capsys):
    monkeypatch.setattr(module, "MAX_DIFFERENCE", -1.0)
    code, _, err = run_command(monkeypatch, capsys, "push", copy, "someone/tiny")
    assert (code, hub.calls, hub.repos) == (2, {}, {})
    assert "was discarded" in err


def test_publishing_is_the_last_phase_on_request(copy, path, hub, monkeypatch, capsys):
    recipe = replace(load_recipe(path), run_dir=copy)
    published = replace(recipe, publish=PublishConfig(repo="someone/tiny", license="mit"))
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="there is no token"):
        execute(published)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.forbid = True
    with pytest.raises(UserError, match="no write access to someone"):
        execute(published)
    hub.forbid = False
    both = replace(recipe, publish=PublishConfig(repo="someone/tiny", revision="new", create_pr=True))
    with pytest.raises(UserError, match="a pull request targets main"):
        execute(both)
    published = replace(published, publish=replace(published.publish, license="apache-2.0"))  # mended, and goes on
    execute(published)
    monkeypatch.delenv("HF_TOKEN")  # not needed any more
    assert "mcl_clip_config.json" in hub.repos["someone/tiny"]["main"]
    record = json.loads((copy / "publish" / "published.json").read_text())
    assert (record["url"], record["commit"]) == (f"{hub.endpoint}/someone/tiny", hub.sha("someone/tiny"))
    code, out, _ = run_command(monkeypatch, capsys, "status", copy)
    assert (code, "publish to someone/tiny: done" in out) == (0, True)
    commits = len(hub.commits)
    execute(published)
    assert len(hub.commits) == commits


def test_an_experiment_publishes_nothing(path, tmp_path, monkeypatch, capsys):
    arguments = ["--out", tmp_path / "out", "--arguments=--publish.repo someone/tiny"]
    recipe = path.with_name("experiment.py")
    extra = "\nfrom mcl_clip import ExperimentConfig\nEXPERIMENT = ExperimentConfig(figures={})\n"
    recipe.write_text(path.read_text() + extra)
    code, _, err = run_command(monkeypatch, capsys, "experiment", recipe, *arguments)
    assert (code, "would be published to the same repository" in err) == (2, True)
    assert not (tmp_path / "out").exists()


def examples(document, section):
    """Return the Python blocks in a section of a document."""
    text = (ROOT / document).read_text().split(f"## {section}")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def test_the_examples_in_the_documents_run(finished, tmp_path, monkeypatch, capsys):
    (tmp_path / "photos").mkdir()
    for number in range(6):
        (tmp_path / "photos" / f"{number}.png").write_bytes(draw(number)[0])
    shutil.copy(tmp_path / "photos" / "0.png", tmp_path / "photo.png")
    for name in ("mine", "photos"):
        shutil.copytree(finished, tmp_path / "runs" / name)
    monkeypatch.chdir(tmp_path)
    (zero_shot,), (search,) = examples("README.md", "Use a model"), examples("docs/publishing.md", "Search")
    names: dict[str, object] = {}
    exec(zero_shot, names)
    exec(search, names)
    printed = capsys.readouterr().out
    assert names["probabilities"].sum() == pytest.approx(1)
    assert len(re.findall(r"\d\.\d+ +photos/\d\.png", printed)) == 5
