import json
import runpy
import sys

import numpy as np
import pytest
import torch
import webdataset
from torch.utils.data import DataLoader

from mcl_clip.core.errors import UserError
from mcl_clip.core.files import read_jsonl
from mcl_clip.eval.evaluate import evaluate
from mcl_clip.tools import clip_benchmark as module
from mcl_clip.tools.clip_benchmark import accuracy, load_model, main, with_defaults
from tests.unit.eval.sets import make_multistage, write_classification, write_multilabel, write_retrieval, write_tower

MODELS = """
TYPE2FUNC = {"open_clip": lambda **given: (given["pretrained"], None, None)}
MODEL_TYPES = list(TYPE2FUNC)
"""
FAULTY = """
def accuracy(output, target, topk=(1,)):
    return [float([0.5]) for k in topk]
"""
SOUND = """
def accuracy(output, target, topk=(1,)):
    return [0.25 for k in topk]
"""
CLI = """
import argparse, json
from clip_benchmark.models import MODEL_TYPES, TYPE2FUNC

def main():
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="which")
    evaluation = commands.add_parser("eval")
    evaluation.add_argument("--dataset", nargs="+", default="cifar10")
    evaluation.add_argument("--model", nargs="+", default=["ViT-B-32-quickgelu"])
    evaluation.add_argument("--pretrained", nargs="+", default=["laion400m_e32"])
    evaluation.add_argument("--model_type", default="open_clip", choices=MODEL_TYPES)
    evaluation.add_argument("--output", default="{pretrained}_{model}.json")
    evaluation.add_argument("--recall_k", type=int, nargs="+", default=[5])
    evaluation.add_argument("--no_amp", action="store_false", dest="amp")
    commands.add_parser("build").add_argument("files", nargs="+")
    args = parser.parse_args()
    if args.which == "build":
        print("building", *args.files)
        return
    (args.model,), models = args.model, args.pretrained
    for args.pretrained in models:
        run(args)

def run(args):
    output = args.output.format(model=args.model, pretrained=args.pretrained)
    model, _, _ = TYPE2FUNC[args.model_type](
        model_name=args.model, pretrained=args.pretrained, cache_dir=None, device="cpu"
    )
    with open(output, "w") as file:
        json.dump({**vars(args), "loaded": str(model).split("(")[0]}, file)
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """`clip_benchmark` with the attributes that count, whose accuracy fails in one of two modules."""
    package = tmp_path / "packages/clip_benchmark"
    (package / "metrics").mkdir(parents=True)
    for name, text in {
        "__init__": "",
        "cli": CLI,
        "models": MODELS,
        "metrics/__init__": "",
        "metrics/zeroshot_classification": FAULTY,
        "metrics/linear_probe": SOUND,
    }.items():
        (package / f"{name}.py").write_text(text)
    for name in [name for name in sys.modules if name.split(".")[0] == "clip_benchmark"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setattr(webdataset, "WebDataset", webdataset.WebDataset)
    monkeypatch.chdir(tmp_path)
    yield package
    for name in [name for name in sys.modules if name.split(".")[0] == "clip_benchmark"]:
        del sys.modules[name]


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["clip_benchmark", *map(str, arguments)])
    main()


def test_models_of_this_project_are_the_default(fake, tmp_path, monkeypatch):
    make_multistage().save(tmp_path / "runs/two")
    arguments = ("--dataset", "a", "b", "--recall_k", "1", "10", "--no_amp")
    for name in ("runs/two", f"{tmp_path}/runs/two/"):
        run(monkeypatch, "eval", "--model", name, *arguments)
    absolute = f"{tmp_path}/runs/two".replace("/", "_").strip("_")
    assert {path.name for path in tmp_path.glob("*.json")} == {
        "mcl_clip_runs_two.json", f"mcl_clip_{absolute}.json"
    }  # fmt: skip
    found = json.loads((tmp_path / "mcl_clip_runs_two.json").read_text())
    assert found.pop("output") == "{pretrained}_runs_two.json"
    assert found == {
        "which": "eval",
        "dataset": ["a", "b"],
        "model": "runs/two",
        "pretrained": "mcl_clip",
        "model_type": "mcl_clip",
        "recall_k": [1, 10],
        "amp": False,
        "loaded": "MultistageCLIP",
    }


def test_weights_are_the_rest_of_the_name(fake, tmp_path, monkeypatch):
    towers = {name: write_tower(tmp_path / "towers" / name, seed) for seed, name in enumerate("ab")}
    run(monkeypatch, "eval", "--model", "towers", "--pretrained", "a", "b", "--output", "{model}-{pretrained}.json")
    assert {path.name for path in tmp_path.glob("*.json")} == {"towers-a.json", "towers-b.json"}
    for name, folder in towers.items():
        model, _, tokenizer = load_model("towers", name, None, "cpu")
        expected, _, _ = load_model(str(folder), "mcl_clip", None, torch.device("cpu"))
        assert torch.equal(model.encode_text(tokenizer(["a"])), expected.encode_text(tokenizer(["a"])))


def test_other_models_stay_as_they_were(fake, tmp_path, monkeypatch, capsys):
    run(monkeypatch, "eval", "--model_type", "open_clip", "--model", "ViT-B-32")
    found = json.loads((tmp_path / "laion400m_e32_ViT-B-32.json").read_text())
    assert (found["model_type"], found["loaded"]) == ("open_clip", "laion400m_e32")
    run(monkeypatch, "build", "a.json", "b.json")
    assert capsys.readouterr().out == "building a.json b.json\n"


@pytest.mark.parametrize(
    ("arguments", "ours"),
    [
        ("eval --model a", True),
        ("eval --model a --model_type mcl_clip --pretrained b", True),
        ("eval --model a --model_type open_clip", False),
        ("eval --model_type=ja_clip --model a", False),
        ("build a.json", False),
        ("--help", False),
        ("", False),
    ],
)
def test_defaults_stand_before_what_is_given(arguments, ours):
    arguments = arguments.split()
    added = ["--pretrained", "mcl_clip", "--model_type", "mcl_clip"]
    assert with_defaults(arguments) == (["eval", *added, *arguments[1:]] if ours else arguments)


def test_accuracy():
    scores = torch.randn(200, 7, generator=torch.Generator().manual_seed(0))
    target = torch.arange(200) % 7
    order = np.argsort(-scores.numpy(), axis=1)
    expected = [np.mean([label in row[:k] for label, row in zip(target.tolist(), order, strict=True)]) for k in (1, 5)]
    assert accuracy(scores, target, topk=(1, 5)) == expected
    assert accuracy(scores, target) == expected[:1]
    assert all(type(value) is float for value in accuracy(scores, target))


def test_only_an_accuracy_that_fails_is_replaced(fake, monkeypatch):
    for _ in range(2):  # a second call finds nothing to fix, and the model type already registered
        run(monkeypatch, "build", "a.json")
    modules = sys.modules
    assert modules["clip_benchmark.metrics.zeroshot_classification"].accuracy is accuracy
    assert modules["clip_benchmark.metrics.linear_probe"].accuracy(torch.eye(2), torch.arange(2), topk=(1, 2)) == [
        0.25, 0.25
    ]  # fmt: skip
    assert modules["clip_benchmark.models"].MODEL_TYPES == ["open_clip", "mcl_clip"]


def test_a_set_may_have_fewer_shards_than_there_are_workers(fake, tmp_path, monkeypatch):
    run(monkeypatch, "build", "a.json")
    write_classification(tmp_path / "set", [0, 1, 2])
    data = webdataset.WebDataset(str(tmp_path / "set/test/0.tar"), shardshuffle=False)
    keys = [sample["__key__"] for sample in DataLoader(data, batch_size=None, num_workers=2)]
    assert keys == ["s0000000", "s0000001", "s0000002"]


def test_errors_are_one_sentence(fake, monkeypatch, capsys):
    with pytest.raises(
        UserError, match=r"there is no folder nothing/here, and open_clip has no architecture 'nothing'"
    ):
        run(monkeypatch, "eval", "--model", "nothing/here")
    with pytest.raises(UserError, match=r"--model_cache_dir cache is for other model types; set .* HF_HUB_CACHE"):
        load_model("tower", "mcl_clip", "cache", "cpu")
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "clip_benchmark", None)
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(module.__file__, run_name="__main__")
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: clip_benchmark cannot be imported: ")
    assert message.endswith("; install it with pip install clip_benchmark requests\n")
    assert message.count("\n") == 1


@pytest.fixture
def real(tmp_path, monkeypatch):
    """The real package, as it was again after the test."""
    cli = pytest.importorskip("clip_benchmark.cli")
    monkeypatch.setattr(cli, "run", cli.run)
    for metrics in (cli.zeroshot_classification, cli.linear_probe):
        monkeypatch.setattr(metrics, "accuracy", metrics.accuracy)
    monkeypatch.setattr(webdataset, "WebDataset", webdataset.WebDataset)
    monkeypatch.chdir(tmp_path)


def test_scores_are_those_of_eval(real, tmp_path, monkeypatch):
    make_multistage().save(tmp_path / "models/two")
    write_classification(tmp_path / "sets/birds", np.arange(28) % 7)
    write_multilabel(tmp_path / "sets/voc", np.random.default_rng(0).integers(0, 2, (12, 7)))
    write_retrieval(tmp_path / "sets/photos", 24)
    out = evaluate("models/two", data=tmp_path / "sets", device=torch.device("cpu"))
    ours = {record["dataset"]: record["metrics"] for record in read_jsonl(out / "results.jsonl")}
    for name, kind in {"birds": "classification", "voc": "classification", "photos": "retrieval"}.items():
        run(
            monkeypatch,
            *("eval", "--model", "models/two", "--dataset", f"wds/{name}", "--dataset_root", f"sets/{name}"),
            *("--task", f"zeroshot_{kind}", "--recall_k", 1, 5, 10, "--no_amp", "--quiet"),
            *("--output", "{dataset}_{model}.json"),
        )
        theirs = json.loads((tmp_path / f"{name}_models_two.json").read_text())["metrics"]
        assert len(theirs) == {"birds": 3, "voc": 1, "photos": 6}[name]
        tolerance = 1e-6 if name == "voc" else 0.0  # precision is summed in float32 there
        for metric, value in theirs.items():
            assert np.float32(value) == pytest.approx(np.float32(ours[name][metric]), rel=tolerance, abs=0.0), metric
