import json
import shutil
from functools import partial

import numpy as np
import open_clip
import pytest
import torch

from mcl_clip.cli import commands
from mcl_clip.core.errors import UserError
from mcl_clip.core.files import read_jsonl
from mcl_clip.eval import evaluate as module
from mcl_clip.eval.datasets import discover
from mcl_clip.eval.embed import Encoder
from mcl_clip.eval.evaluate import evaluate, run_task
from mcl_clip.model.clip import load_clip
from mcl_clip.model.multistage import MultistageCLIP
from mcl_clip.model.resolve import find_models
from mcl_clip.results.text import results_table
from tests.commands import run_command
from tests.unit.eval.sets import (
    make_multistage,
    name_classes,
    noise_png,
    write_classification,
    write_image_folder,
    write_multilabel,
    write_pairs,
    write_retrieval,
    write_tower,
)

CPU = torch.device("cpu")
SETS = ["animals", "birds", "photos", "two", "voc"]


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A set of each kind, a model, and a multistage model of two of them."""
    root = tmp_path_factory.mktemp("originals")
    name_classes(write_image_folder(root / "sets/animals", {"owl": 4, "bee": 3}))
    write_classification(root / "sets/birds", np.arange(28) % 7)
    write_retrieval(root / "sets/photos", 8)
    write_pairs(root / "sets/two")
    write_multilabel(root / "sets/voc", np.random.default_rng(0).integers(0, 2, (12, 7)))
    write_tower(root / "tower", 0)
    make_multistage().save(root / "multistage")
    return root


@pytest.fixture
def here(originals, tmp_path, monkeypatch):
    """A copy of them, as the current folder."""
    shutil.copytree(originals, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def run(here):
    """A finished run of two stages."""
    for stage in range(2):
        write_tower(here / f"runs/mine/stage-{stage}/train/model", stage)
    shutil.copytree(here / "multistage", here / "runs/mine/combined/model")
    config = {"tower": {"architecture": ""}, "stages": [{}, {}]}
    (here / "runs/mine/config.json").write_text(json.dumps(config))
    return here / "runs/mine"


def measure(name, here, *, data="sets", **options):
    """Evaluate a model, and return the folder of the results."""
    options = {"device": CPU, "num_workers": 0, **options}
    return evaluate(str(name), data=here / data, **options)


def records(folder):
    return {record["dataset"]: record for record in read_jsonl(folder / "results.jsonl")}


def counted(monkeypatch):
    """Return a list that collects the names of the sets embedded from now on."""
    names = []

    def counting(task, encoder):
        names.append(task.name)
        return run_task(task, encoder)

    monkeypatch.setattr(module, "run_task", counting)
    return names


def test_records_and_outcomes(here):
    out = measure("tower", here, batch_size=5)
    assert out == module.Path("evaluations/tower")
    found = records(out)
    assert list(found) == SETS
    tower = load_clip(here / "tower")
    encoder = Encoder(model=tower.model, image_transform=tower.image_transform, tokenizer=tower.tokenizer, device=CPU,
                      batch_size=5)  # fmt: skip
    for name, task in discover(here / "sets").items():
        record = found[name]
        expected = run_task(task, encoder)[0]
        assert record["metrics"] == {**expected, "main_metric": expected[task.main_metric]}
        assert record["data_sha256"] == task.data.sha256
        assert {"key", "model", "pretrained", "task", "language", "versions", "seconds", "n_images"} <= record.keys()
        assert (record["dtype"], record["combine"], record["label"]) == ("fp32", None, "tower")
        assert len(record["model_sha256"]) == 64
        assert 50 < record["peak_memory_mb"] < 50_000
        with np.load(out / record["outcomes"], allow_pickle=False) as outcomes:
            for metric in record["ci95"]:
                assert outcomes[metric].mean() == pytest.approx(record["metrics"][metric], abs=1e-6)
        low, high = record["ci95"][task.main_metric]
        assert low <= record["metrics"]["main_metric"] <= high
    assert {path.name for path in out.iterdir()} == {
        "results.jsonl", *(f"outcomes-{name}-tower.npz" for name in SETS)
    }  # fmt: skip
    assert [line.split(":")[0] for line in results_table(out).splitlines() if line[0] != " "] == [
        record["key"] for record in found.values()
    ]


def test_what_was_measured_is_left_out(here, monkeypatch):
    out = measure("tower", here, tasks=("birds", "photos"))
    before = (out / "results.jsonl").read_text()
    names = counted(monkeypatch)
    measure("tower", here, tasks=("photos", "birds"))
    assert names == []
    assert (out / "results.jsonl").read_text() == before
    (out / "outcomes-photos-tower.npz").unlink()
    measure("tower", here)
    assert names == ["animals", "photos", "two", "voc"]
    assert records(out).keys() == set(SETS)


def test_an_interrupted_evaluation_continues(here, monkeypatch):
    def interrupted(task, encoder):
        if task.name == "photos":
            raise KeyboardInterrupt
        return run_task(task, encoder)

    monkeypatch.setattr(module, "run_task", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure("tower", here)
    monkeypatch.undo()
    monkeypatch.chdir(here)
    names = counted(monkeypatch)
    assert list(records(measure("tower", here))) == SETS
    assert names == ["photos", "two", "voc"]


def test_a_record_that_was_cut_off_is_made_again(here, monkeypatch):
    out = measure("tower", here, tasks=("birds", "voc"))
    text = (out / "results.jsonl").read_text()
    (out / "results.jsonl").write_text(text[:-20])
    names = counted(monkeypatch)
    measure("tower", here, tasks=("birds", "voc"))
    assert names == ["voc"]
    assert records(out).keys() == {"birds", "voc"}


def test_other_data_models_and_precisions_are_measured(here, monkeypatch):
    out = measure("tower", here, tasks=("animals", "birds"))
    before = records(out)
    names = counted(monkeypatch)
    (here / "sets/animals/owl/9.png").write_bytes(noise_png(9))
    measure("tower", here, tasks=("animals", "birds"))
    assert names == ["animals"]
    assert len(read_jsonl(out / "results.jsonl")) == 2
    shutil.rmtree(here / "tower")
    write_tower(here / "tower", 5)
    with pytest.raises(UserError, match=r"has results of another model called tower .*give --out another folder"):
        measure("tower", here, tasks=("animals", "birds"))
    assert records(out)["birds"] == before["birds"]
    out = measure("tower", here, tasks=("birds",), out=here / "other")
    assert names == ["animals", "birds"]
    assert records(out)["birds"]["model_sha256"] != before["birds"]["model_sha256"]
    measure("tower", here, tasks=("birds",), precision="bf16", out=out)
    both = [record for record in read_jsonl(out / "results.jsonl") if record["dataset"] == "birds"]
    assert [record["dtype"] for record in both] == ["fp32", "bf16"]
    assert [record["label"] for record in both] == ["tower", "tower-bf16"]
    assert [(out / record["outcomes"]).is_file() for record in both] == [True, True]


def test_bf16_runs_the_towers_in_bfloat16(here):
    tower = load_clip(here / "tower")
    make = partial(Encoder, model=tower.model, image_transform=tower.image_transform, tokenizer=tower.tokenizer,
                   device=CPU)  # fmt: skip
    (task,) = discover(here / "sets", ("birds",)).values()
    fine, coarse = (make(precision=precision).embed(task.data)["image"] for precision in ("fp32", "bf16"))
    assert coarse.dtype == torch.float32
    assert not torch.equal(fine, coarse)
    assert torch.equal(coarse, coarse.bfloat16().float())
    assert torch.allclose(fine, coarse, atol=0.05)


def test_settings_of_the_model_count_as_the_model(here):
    one, two = (load_clip(here / "tower") for _ in range(2))
    two.preprocess_cfg = {**two.preprocess_cfg, "mean": [0.5, 0.5, 0.5]}
    assert module._model_digest(one) == module._model_digest(load_clip(here / "tower"))
    assert module._model_digest(one) != module._model_digest(two)
    assert module._model_digest(one) != module._model_digest(MultistageCLIP.load(here / "multistage"))


def test_a_multistage_model(here):
    out = measure("multistage", here, tasks=("birds", "photos"))
    birds = records(out)["birds"]
    assert (birds["stage"], birds["combine"], birds["label"]) == (1, "concat", "multistage")
    assert "linear_acc1_width_16" in birds["metrics"]
    measure("multistage", here, tasks=("birds",), combine="mean_cosine")
    found = [record for record in read_jsonl(out / "results.jsonl") if record["dataset"] == "birds"]
    assert [(record["label"], record["combine"]) for record in found] == [
        ("multistage", "concat"), ("multistage-mean_cosine", "mean_cosine")
    ]  # fmt: skip
    assert found[0]["model_sha256"] == found[1]["model_sha256"]


def test_a_combination_is_that_of_the_model(here):
    """--combine evaluates the model as if saved with that combination."""
    make_multistage(combine="mean_cosine").save(here / "other")
    one = records(measure("multistage", here, tasks=("photos",), combine="mean_cosine"))["photos"]
    two = records(measure("other", here, tasks=("photos",)))["photos"]
    assert one["metrics"] == two["metrics"]


def test_a_run_and_its_stages(here, run):
    combined = records(measure("runs/mine", here, tasks=("birds",)))["birds"]
    assert (combined["pretrained"], combined["label"], combined["stage"]) == ("mine/combined", "mine", 1)
    assert combined["model"] == "model given in the recipe"
    out = measure("runs/mine", here, tasks=("birds",), each=True)
    found = {record["label"]: record for record in read_jsonl(out / "results.jsonl")}
    assert list(found) == ["mine", "mine-stage-0", "mine-stage-1"]
    measure("runs/mine", here, tasks=("birds",), each=True, combine="mean_cosine")
    labels = [record["label"] for record in read_jsonl(out / "results.jsonl")]
    assert labels == ["mine", "mine-stage-0", "mine-stage-1", "mine-mean_cosine"]
    single = records(measure(run / "stage-1", here, tasks=("birds",)))["birds"]
    assert (single["pretrained"], single["stage"], single["combine"]) == ("mine/stage-1", 1, None)
    assert single["metrics"] == found["mine-stage-1"]["metrics"]
    assert single["model_sha256"] == found["mine-stage-1"]["model_sha256"] != found["mine-stage-0"]["model_sha256"]
    assert {name: value for name, value in combined["metrics"].items() if "width" not in name} != single["metrics"]


def test_where_names_lead(here):
    (local,) = find_models(f"local-dir:{here}/tower")
    assert local.model == f"local-dir:{here}/tower"
    assert torch.is_tensor(local.load().model.logit_scale)
    (known,) = find_models("ViT-B/32/laion2b_s34b_b79k")
    assert (known.model, known.pretrained, known.label) == (
        "ViT-B-32", "laion2b_s34b_b79k", "ViT-B-32-laion2b_s34b_b79k"
    )  # fmt: skip
    assert known.load.keywords == {"architecture": "ViT-B/32", "pretrained": "laion2b_s34b_b79k"}
    (hub,) = find_models("hf-hub:org/name")
    assert (hub.model, hub.pretrained, hub.label) == ("hf-hub:org/name", "org/name", "org-name")
    assert measure(here / "tower", here, tasks=("voc",), out=here / "x/y") == here / "x/y"
    assert list(records(here / "x/y")) == ["voc"]


def test_a_model_that_is_not_there(here, run):
    def refused(name, **options):
        with pytest.raises(UserError) as refusal:
            find_models(name, **options)
        return str(refusal.value)

    tags = open_clip.list_pretrained_tags_by_model("ViT-B-32")
    assert f"write ViT-B-32/TAG, with one of its tags: {', '.join(tags)}" in refused("ViT-B-32")
    assert "there is no folder runs/typo, and open_clip has no architecture 'runs'; name a run" in refused("runs/typo")
    assert "there is no folder typo, and open_clip has no architecture 'typo'" in refused("typo")
    assert "sets holds no model: it is not a run directory (config.json and stage-K), and has no mcl" in refused("sets")
    assert "--each measures all stages of a run, and tower is not a run directory" in refused("tower", each=True)
    assert f"{run} has no trained stage-7 yet; it has stage-0, stage-1" in refused(f"{run}/stage-7")
    shutil.rmtree(run / "combined")
    assert f"{run} has no combined model yet; finish the run, or name one of its stages as {run}/stage-0" in refused(
        str(run)
    )
    (candidate,) = find_models("ViT-B-32/nonsense")
    with pytest.raises(UserError, match="'nonsense' is neither a file nor a tag of ViT-B-32"):
        candidate.load()


def test_mistakes(here):
    with pytest.raises(UserError, match=r"has no set birdz; it has animals, birds, photos, two, voc"):
        measure("tower", here, tasks=("birdz",))
    with pytest.raises(UserError, match="--combine concat has no effect on tower, which is a single stage; leave it"):
        measure("tower", here, combine="concat")
    (here / "multistage/stage_1/open_clip_model.safetensors").unlink()
    with pytest.raises(UserError, match="the multistage model in multistage cannot be loaded: "):
        measure("multistage", here)
    (here / "tower/open_clip_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"tower has no weights: open_clip_model.safetensors is missing"):
        measure("tower", here)
    assert not (here / "evaluations").exists()


def test_an_image_that_cannot_be_decoded(here):
    (here / "sets/animals/owl/2.png").write_bytes(noise_png(9, 8)[:60])
    with pytest.raises(UserError, match=r"owl/2.png cannot be decoded"):
        measure("tower", here)
    assert read_jsonl(here / "evaluations/tower/results.jsonl") == []


def test_the_command(here, monkeypatch, capsys):
    code, out, err = run_command(
        monkeypatch,
        capsys,
        "eval",
        "tower",
        "--data",
        "sets",
        "--tasks",
        "birds",
        "voc",
        "--workers",
        "0",
        "--device",
        "cpu",
    )
    assert (code, err) == (0, "")
    assert "classification/birds: 28 images, 14 texts" in out
    assert "multilabel/voc: 12 images, 14 texts" in out
    assert out.endswith("in evaluations/tower\n")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["tower", "--data", "sets", "--tasks", "x"],
            "error: sets has no set x; it has animals, birds, photos, two, voc\n",
        ),
        (["tower", "--data", "/nowhere"], "error: there is no folder /nowhere; name the folder of one evaluation set"),
        (["nothing", "--data", "sets"], "error: there is no folder nothing, and open_clip has no architecture"),
        (["tower", "--data", "sets", "--batch-size", "0"], "error: --batch-size must be at least 1, not 0\n"),
        (["tower", "--data", "sets", "--workers", "-1"], "error: --workers must be at least 0, not -1\n"),
        (["tower", "--data", "sets", "--device", "tpu9"], "error: --device tpu9 cannot be used here: "),
        (["tower", "--data", "sets", "--precision", "fp8"], "fp8"),
        (["tower"], "--data"),
    ],
)
def test_mistakes_of_the_command(here, monkeypatch, capsys, arguments, sentence):
    code, _, err = run_command(monkeypatch, capsys, "eval", *arguments)
    assert code == 2
    assert sentence in err
    assert "Traceback" not in err


def test_a_device_is_not_for_several_processes(here, monkeypatch, capsys):
    monkeypatch.setattr(commands, "world_size", lambda: 4)
    code, _, err = run_command(monkeypatch, capsys, "eval", "tower", "--data", "sets", "--device", "cpu")
    assert code == 2
    assert "error: --device cpu cannot be shared by 4 processes, each of which has its own; leave it out\n" in err


def test_the_help_has_units(monkeypatch, capsys):
    code, out, _ = run_command(monkeypatch, capsys, "eval", "--help")
    assert code == 0
    assert "images, or texts, per forward pass and process" in " ".join(out.replace("│", " ").split())
