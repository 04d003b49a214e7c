import ast
import json
import math
import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.numpy import save_file
from sklearn.metrics import normalized_mutual_info_score

from mcl_clip import UserError
from mcl_clip.core.distributed import permutation
from mcl_clip.core.stats import compare_paired, mcnemar_exact
from mcl_clip.data.index import ShardIndex
from mcl_clip.eval.task import result_record
from mcl_clip.model.clip import create_clip, save_clip
from mcl_clip.model.multistage import MultistageCLIP
from mcl_clip.publish.card import About, card
from mcl_clip.publish.hub import MARKER
from mcl_clip.results.text import public_name, safe
from tests.unit.data.tars import pairs, write_tar
from tests.unit.eval.sets import set_of

ROWS, HELD_OUT = 60, 3
LABELS = ("stage-0", "stage-1", "combined")
MODEL_CFG = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 2},
}
SECRET = "hf_abcdefghijklmnop"


@dataclass(frozen=True, eq=False)
class FakeTask:
    """What `result_record` asks of a task."""

    name: str
    kind: str
    main_metric: str
    sizes: dict
    data = set_of()

    def score(self, image_features, text_features):
        raise NotImplementedError

    def describe(self):
        return {"key": f"{self.kind}/{self.name}", **self.sizes}


def classification(name):
    sizes = {"task": "zeroshot_classification", "n_images": 40, "n_texts": 5, "n_classes": 5}
    return FakeTask(name, "classification", "acc1", sizes)


def retrieval(name):
    return FakeTask(name, "retrieval", "mean_recall@1", {"task": "zeroshot_retrieval", "n_images": 20, "n_texts": 40})


def first(count, size=40):
    """Right on the first `count` of `size` queries."""
    return np.arange(size) < count


def right(zero_shot, read_out):
    return {"acc1": first(zero_shot), "linear_acc1": first(read_out)}


def found(images, captions):
    """Outcomes of a retrieval set with two captions a picture."""
    text, image = first(images, 20), first(captions)
    units = np.repeat(np.arange(20, dtype=np.int32), 2)
    return {
        "text_retrieval_recall@1": text,
        "image_retrieval_recall@1": image,
        "unit:image_retrieval_recall@1": units,
        "mean_recall@1": ((text + image.reshape(20, 2).mean(1)) / 2).astype(np.float32),
    }


# Of stage 0, stage 1 and all stages: the combination is better on shape, equal on colour, worse on photos.
OUTCOMES = {
    classification("shape"): (right(10, 12), right(28, 39), right(32, 38)),
    classification("colour"): (right(36, 36), right(4, 4), right(36, 35)),
    retrieval("wds/photos"): (found(18, 36), found(2, 4), found(9, 20)),
}


def write_lines(path, *values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in values))


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_results(run, outcomes=OUTCOMES):
    """Records and outcomes as phases write them."""
    for number, label in enumerate(LABELS):
        folder = run / label / "eval" if label.startswith("stage-") else run / label
        folder.mkdir(parents=True, exist_ok=True)
        records = []
        for task, by_model in outcomes.items():
            values = by_model[number]
            name = f"outcomes-{task.name.replace('/', '--')}-{label}.npz"
            np.savez_compressed(folder / name, **values)
            metrics = {metric: float(array.mean(dtype=np.float64)) for metric, array in values.items()}
            metrics = {metric: value for metric, value in metrics.items() if not metric.startswith("unit:")}
            record = result_record(
                task,
                {**metrics, "acc5": None},
                model="model given in the recipe",
                pretrained=f"{run.name}/{label}",
                stage=min(number, 1),
                combine=None,
                dtype="fp32",
                seconds=0.1,
                outcomes=values,
                outcomes_file=name,
            )
            records.append(record)
        write_lines(folder / "results.jsonl", *records)
    return run


def stage_settings(**train):
    settings = {"steps": 20, "global_batch_size": 16, "lr": 1e-3, "warmup_steps": 2, "schedule": "cosine",
                "loss": "clip", "precision": "fp32", "groups": "labels", "lock": {}, **train}  # fmt: skip
    return {"train": settings, "cluster": {"num_clusters": 4, "on": "image", "metric": "shared"}, "start": "previous"}


def step(number, seconds, **values):
    return {"step": number, "loss": 1.0, "samples_seen": 16 * number, "negatives_per_row": 15.0, "seconds": seconds,
            **values}  # fmt: skip


def write_stage(run, number):
    train = run / f"stage-{number}/train"
    seconds = (30.0, 70.0) if number == 0 else (2000.0, 7300.0)
    write_lines(train / "metrics.jsonl", step(10, seconds[0]), step(15, 50.0, loss=0.75), step(20, seconds[1]))
    write_json(
        train / "groups.json",
        {"num_groups": 1 + 3 * number, "median": 15.0, "rows_relaxed": 7 * number, "held_out_rows": HELD_OUT},
    )
    write_lines(train / "bad_samples.jsonl", *[{"row": 1, "shard": "/secret/0.tar", "reason": "broken"}] * number)
    write_json(train / "DONE.json", {})
    write_json(train / "model/open_clip_config.json", {"model_cfg": MODEL_CFG})
    weights = {
        "visual.proj": np.zeros((100, 20), np.float32),
        "visual.bn.running_mean": np.zeros(900, np.float32),
        "token_embedding.weight": np.zeros((100, 5), np.float32),
        "logit_scale": np.float32([math.log(20)]),
    }
    save_file({name: value.reshape(() if name == "logit_scale" else value.shape) for name, value in weights.items()},
              train / "model/open_clip_model.safetensors")  # fmt: skip
    cluster = run / f"stage-{number}/cluster"
    cluster.mkdir()
    np.save(cluster / "assignments-image.npy", assignments(number))


def assignments(number):
    return (np.arange(ROWS) // (5 + number) % 4).astype(np.int32)


def launch(**values):
    return {"time": "2026-01-02T03:04:05+0000", "command": ["recipe.py", "--token", SECRET, "/home/me/data"],
            "processes": 2, "device": "cuda:0", "threads": 4, "python": "3.11.7",
            "versions": {"mcl_clip": "0.2.0", "torch": "2.9.0"}, **values}  # fmt: skip


@pytest.fixture(scope="module")
def index_file(tmp_path_factory):
    """The index of two shards with a sample that is no pair."""
    folder = tmp_path_factory.mktemp("index")
    shards = [write_tar(folder / "secret" / f"{n}.tar", pairs(30, prefix=f"s{n}-")) for n in (0, 1)]
    write_tar(shards[1], [*pairs(30, prefix="s1-"), ("lonely.txt", b"no picture")])
    ShardIndex.build([str(shard) for shard in shards]).save(folder / "index.arrow")
    return folder / "index.arrow"


@pytest.fixture
def bare(tmp_path, index_file):
    """A run of two stages without evaluation sets."""
    run = tmp_path / "tiny"
    data = {"train": ["/home/me/data/{00..01}.tar"], "weights": [], "holdout_rows": 512}
    config = {
        "run_dir": str(run), "tower": {"architecture": "", "pretrained": "", "model": MODEL_CFG}, "seed": 5,
        "stages": [stage_settings(), stage_settings()], "data": data, "control": "none", "combine": "mean_cosine",
        "eval": {"retrieval": ["/home/me/sets/photos"]},
    }  # fmt: skip
    write_json(run / "config.json", config)
    write_lines(run / "launches.jsonl", launch())
    (run / "index").mkdir()
    (run / "index/index.arrow").write_bytes(index_file.read_bytes())
    for number in (0, 1):
        write_stage(run, number)
    combination = {"combine": "mean_cosine", "logit_scale": 3.0, "held_out_rows": HELD_OUT}
    write_json(run / "combined/combination.json", combination)
    write_json(run / "combined/model/mcl_clip_config.json", {"shared_text_tower": False})
    return run


@pytest.fixture
def run(bare):
    return write_results(bare)


def change_config(run, change):
    config = json.loads((run / "config.json").read_text())
    change(config)
    (run / "config.json").write_text(json.dumps(config))


def records(run, label):
    folder = run / label / "eval" if label.startswith("stage-") else run / label
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def tables(text):
    """All tables of a text, as rows of cells, by the text of their first row."""
    blocks = re.findall(r"(?:^\|.*\|\n)+", text, re.M)
    rows = [[[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()] for block in blocks]
    return [[row for number, row in enumerate(table) if number != 1] for table in rows]


def section(text, title):
    return re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.M | re.S)[1]


def sentence(text, pattern):
    """The line of the limits with a pattern."""
    return next((line for line in section(text, "Limits").splitlines() if re.search(pattern, line)), "")


def shown(record, metric):
    """How the card shows a metric of a record."""
    low, high = record["ci95"][metric]
    return f"{100 * record['metrics'][metric]:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def front_of(text):
    return ModelCard(text).data


@pytest.mark.parametrize(
    ("form", "options", "label", "library"),
    [
        ("multistage", {}, "combined", "mcl_clip"),
        ("open_clip", {"stage": 1}, "stage-1", "open_clip"),
        ("transformers", {"stage": 0}, "stage-0", "transformers"),
    ],
)
def test_front_matter_parses_back_with_the_values_of_the_records(run, form, options, label, library):
    text = card(run, form=form, repo="some-org/some.name", **options)
    assert text.startswith("---\n")
    assert text.split("\n---\n", 1)[1].lstrip().splitlines()[0] == MARKER
    data = front_of(text)
    assert (data.library_name, data.pipeline_tag) == (library, "zero-shot-image-classification")
    assert data.tags == ["clip", "mcl_clip", "multistage-contrastive-learning"]
    assert data.model_name == "some.name"
    assert data.license is data.datasets is data.base_model is None
    there = {(result.dataset_name, result.metric_type): result.metric_value for result in data.eval_results}
    wanted = {
        (record["dataset"], metric): value
        for record in records(run, label)
        for metric, value in record["metrics"].items()
        if metric not in ("main_metric", "acc5")
    }
    assert there == wanted
    assert {result.task_type for result in data.eval_results} == {
        "zero-shot-image-classification", "zero-shot-retrieval"
    }  # fmt: skip


def test_front_matter_says_what_a_person_knows(run):
    change_config(run, lambda config: config["tower"].update(architecture="hf-hub:some/base"))
    about = About(license="cc-by-4.0", datasets=("a/b", "c"), description="Pictures of *cats*.")
    text = card(run, form="multistage", about=about)
    data = front_of(text)
    assert (data.license, data.datasets, data.base_model, data.model_name) == (
        "cc-by-4.0", ["a/b", "c"], "some/base", "tiny"
    )  # fmt: skip
    assert "\nPictures of *cats*.\n" in text
    assert "| datasets on the Hub | a/b, c |" in text
    assert "57 image-text pairs of a/b and c, from the weights of some/base" in text
    assert "What some/base was trained on, and its flaws, are not described here." in text


@pytest.mark.parametrize(
    ("tower", "pretrained", "base"),
    [
        ({"architecture": "ViT-B-32", "pretrained": "openai"}, "ViT-B-32, weights openai", None),
        ({"architecture": "ViT-B-32", "pretrained": "/home/me/w/some.pt"}, "ViT-B-32, weights some.pt", None),
        ({"architecture": "local-dir:/home/me/siglip"}, "siglip (a local folder)", None),
        ({"architecture": "hf-hub:a/b"}, "a/b", "a/b"),
        ({"architecture": "ViT-B-32"}, "random weights", None),
    ],
)
def test_where_the_stages_start(run, tower, pretrained, base):
    def change(config):
        config["tower"] = tower
        config["stages"][1]["start"] = "base"

    change_config(run, change)
    text = card(run, form="multistage")
    rows = {row[0]: row[1:] for row in tables(section(text, "Training"))[0]}
    again = "stage 0" if pretrained == "random weights" else pretrained
    assert rows["starts from"] == [pretrained, again]
    assert front_of(text).base_model == base
    assert ("; ViT-B-32;" in text or "**Model**: ViT-B-32;" in text) == (tower["architecture"] == "ViT-B-32")


def test_every_figure_of_the_results_is_that_of_its_record(run):
    text = card(run, form="multistage")
    by_label = {label: {record["dataset"]: record for record in records(run, label)} for label in LABELS}
    summary = next(table for table in tables(text) if table[0][:2] == ["set", "metric, %"])
    assert summary[0] == ["set", "metric, %", "size", "chance", "stage 0", "stage 1", "**all stages**"]
    assert [row[0] for row in summary[1:]] == ["shape", "colour", "wds/photos"]
    for row in summary[1:]:
        for label, cell in zip(LABELS, row[4:], strict=True):
            record = by_label[label][row[0]]
            assert cell == shown(record, record["main_metric"])
    assert summary[1][1:4] == ["zero-shot accuracy", "40 images, 5 classes", "20.0"]
    assert summary[3][1:4] == ["mean R@1", "20 images, 40 texts", "5.0"]
    metrics = {
        "shape": ["acc1", "linear_acc1"],
        "wds/photos": ["mean_recall@1", "text_retrieval_recall@1", "image_retrieval_recall@1"],
    }
    for name, of_set in metrics.items():
        part = section(text, "Results").split(f"### {name}\n")[1]
        rows = tables(part)[0]
        assert [row[0] for row in rows[1:]] == ["stage 0", "stage 1", "**all stages**"]
        for label, row in zip(LABELS, rows[1:], strict=True):
            assert row[1:] == [shown(by_label[label][name], metric) for metric in of_set]
        assert "data digest `0123456789abcdef`" in part


def test_the_stage_of_the_card_is_in_bold(run):
    text = card(run, form="open_clip", stage=1)
    assert "| stage 0 | **stage 1** | all stages |" in text


def test_a_set_on_which_the_combination_is_worse_is_said(run):
    text = card(run, form="multistage")
    line = sentence(text, "Stage 0 alone is better than all stages on wds/photos")
    values = [records(run, label)[2]["metrics"]["mean_recall@1"] for label in LABELS]
    assert f"mean R@1 {100 * values[0]:.1f} vs. {100 * values[2]:.1f} %" in line
    outcomes = [found(18, 36)["mean_recall@1"], found(9, 20)["mean_recall@1"]]
    paired = compare_paired(outcomes[1], outcomes[0], resamples=2000)
    low, high = 100 * paired.low, 100 * paired.high
    assert f"(difference {100 * paired.difference:+.1f} points [{low:+.1f}, {high:+.1f}])" in line
    assert "better on shape; worse on wds/photos; no clear difference on colour" in text
    unclear = sentence(text, "Stage 0 alone is ahead of all stages, but not clearly")
    assert "colour, linear probe (-2.5 points" in unclear
    assert sentence(text, "Stage 1 alone is ahead of all stages, but not clearly, on shape, linear probe")
    assert not sentence(text, "On no set")


def test_a_later_stage_that_is_better_is_said_at_once(bare):
    shape = next(iter(OUTCOMES))
    text = card(write_results(bare, {shape: (right(10, 12), right(39, 30), right(20, 38))}), form="multistage")
    assert "- **A later stage alone is better**: stage 1 on shape\n" in text.split("## Use")[0]
    assert "better on shape; worse on none" in text


def test_a_combination_that_is_nowhere_worse(bare):
    shape = next(iter(OUTCOMES))
    text = card(write_results(bare, {shape: (right(10, 12), right(28, 30), right(32, 38))}), form="multistage")
    assert sentence(text, "On no set is a single stage better")
    assert "A later stage" not in text
    assert not sentence(text, "better than|ahead of")
    assert "better on shape; worse on none" in text


def test_a_stage_alone_is_compared_with_all_of_them(run):
    text = card(run, form="open_clip", stage=1)
    assert "**This stage vs. all stages together**: better on none; worse on shape, colour and wds/photos" in text
    assert sentence(
        text, r"\*\*All stages together are better than stage 1 alone on colour\*\*: zero-shot accuracy 90.0"
    )
    assert "only stage 1" in section(text, "How the stages differ")


def test_differences_are_those_of_the_outcomes(run):
    rows = tables(section(card(run, form="multistage"), "How the stages differ"))[0]
    assert rows[0][2:6] == ["queries", "only stage 0", "only all stages", "difference, points"]
    by_name = {tuple(row[:2]): row[2:] for row in rows[1:]}
    assert set(by_name) == {
        ("shape", "zero-shot accuracy"), ("shape", "linear probe"), ("colour", "zero-shot accuracy"),
        ("colour", "linear probe"), ("wds/photos", "image-to-text R@1"), ("wds/photos", "text-to-image R@1"),
    }  # fmt: skip
    queries, only_0, only_all, difference, p, p_holm = by_name["wds/photos", "image-to-text R@1"]
    paired = compare_paired(first(9, 20), first(18, 20), resamples=2000)
    assert (queries, only_0, only_all) == ("20", "9", "0")
    assert difference == f"-45.0 [{100 * paired.low:+.1f}, {100 * paired.high:+.1f}]"
    assert p == f"{mcnemar_exact(0, 9):.2g}"
    assert p_holm == f"{3 * mcnemar_exact(0, 9):.2g}"  # the third of five tests, after two below 1e-6
    assert by_name["shape", "zero-shot accuracy"][4] == "< 1e-6"
    assert by_name["wds/photos", "text-to-image R@1"][4:] == ["-", "-"]  # captions of a picture depend on each other
    units = np.repeat(np.arange(20), 2)
    by_unit = compare_paired(first(20), first(36), units, resamples=2000)
    assert by_name["wds/photos", "text-to-image R@1"][3].endswith(
        f"[{100 * by_unit.low:+.1f}, {100 * by_unit.high:+.1f}]"
    )


def test_clusterings_of_consecutive_stages(run):
    rows = tables(section(card(run, form="multistage"), "How the stages differ"))[1]
    shuffled = assignments(1)[permutation(ROWS, "agreement of clusterings", 0, "image")]
    assert rows[1] == [
        "0 and 1", "images", f"{normalized_mutual_info_score(assignments(0), assignments(1)):.2f}",
        f"{normalized_mutual_info_score(assignments(0), shuffled):.2f}",
    ]  # fmt: skip
    (run / "stage-1/cluster/assignments-image.npy").unlink()
    assert "Whether the stages cluster the pairs differently: not measured." in card(run, form="multistage")


def test_without_results_nothing_is_claimed(bare):
    text = card(bare, form="multistage")
    assert front_of(text).eval_results is None
    assert text.count("**Not measured.**") == 2
    assert "its quality is unknown" in sentence(text, "Not measured")
    assert "Not measured: there are no outcomes of single queries." in section(text, "How the stages differ")
    assert not re.search(r"\d %|better|worse|R@1|accuracy|interval", text.split("## Use")[0].replace("pairs of", ""))
    assert not re.search(r"R@1|accuracy", section(text, "Results") + section(text, "Limits"))


def test_results_without_stored_outcomes(run):
    for path in run.rglob("outcomes-*.npz"):
        path.unlink()
    text = card(run, form="multistage")
    assert "Not measured: there are no outcomes of single queries." in section(text, "How the stages differ")
    assert "wds/photos, mean R@1 (-42.5 points, interval not known)" in sentence(text, "Stage 0 alone is ahead")
    assert "no clear difference on shape, colour and wds/photos" in text


def test_outcomes_of_other_data_are_not_compared(run):
    path = run / "stage-0/eval/results.jsonl"
    path.write_text(path.read_text().replace("0123456789abcdef", "fedcba9876543210"))
    text = card(run, form="multistage")
    assert "Not measured: there are no outcomes" in section(text, "How the stages differ")


def test_a_set_that_only_a_stage_was_measured_on(run):
    path = run / "combined/results.jsonl"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if "wds/photos" not in line))
    text = card(run, form="multistage")
    summary = next(table for table in tables(text) if table[0][:2] == ["set", "metric, %"])
    assert summary[3][-1] == "-"
    assert sentence(text, "evaluated on 2 sets .* only. Not evaluated on wds/photos, unlike other models of the run.")


def test_averaged_weights_have_no_results(run):
    text = card(run, form="open_clip", weights="the mean of the weights of stages 0 to 1")
    assert front_of(text).eval_results is None
    assert "Its weights are the mean of the weights of stages 0 to 1, from a run with 2 stages." in text
    assert text.count("**Not measured.** These weights were combined after the run") == 3
    for record in records(run, "combined"):
        assert shown(record, record["main_metric"]) not in text
    assert "| steps | 20 | 20 |" in text


def test_a_run_of_one_stage(run):
    change_config(run, lambda config: config.update(stages=config["stages"][:1]))
    for form in ("multistage", "open_clip"):
        text = card(run, form=form)
        assert "A CLIP model, trained in a single stage" in text
        assert "multistage contrastive learning" not in text.split("## Use")[0].split("---\n")[2]
        assert "There is only one stage." in text
        assert not sentence(text, "equal compute")
        label = "combined" if form == "multistage" else "stage-0"
        assert shown(records(run, label)[0], "acc1") in text
        assert "| chance | **this model** |" in text


def test_a_control_is_called_one(run):
    change_config(run, lambda config: config.update(control="random-groups"))
    text = card(run, form="multistage")
    assert (
        "a control of multistage contrastive learning, not an example of it: the same stages with random groups" in text
    )
    assert not sentence(text, "equal compute")


def test_an_unfinished_run(run):
    (run / "stage-1/train/DONE.json").unlink()
    lines = (run / "stage-1/train/metrics.jsonl").read_text().splitlines(True)
    (run / "stage-1/train/metrics.jsonl").write_text("".join(lines[:1]))
    for path in ("stage-1/train/model/open_clip_model.safetensors", "stage-1/train/model/open_clip_config.json",
                 "combined/combination.json", "combined/results.jsonl"):  # fmt: skip
        (run / path).unlink()
    text = card(run, form="multistage")
    assert "| steps | 20 | 10 of 20, not finished |" in text
    assert sentence(text, "The training is not finished: stage 1.")
    assert "the mean of the cosine" not in text
    for nothing in ("launches.jsonl", "index/index.arrow"):
        (run / nothing).unlink()
    text = card(run, form="multistage")
    assert "**Trained on**: unknown, as the run has no index of its data" in text
    assert "| pairs | 60 |" not in text


def test_an_empty_run(tmp_path):
    write_json(tmp_path / "new/config.json", {"tower": {}, "stages": [{"train": {"steps": 10}}] * 2})
    text = card(tmp_path / "new", form="multistage")
    assert "**Model**: unknown, as the training is not finished" in text
    assert "| training time, all stages | not measured |" in text


def test_how_the_stages_were_trained(run):
    def change(config):
        config["stages"][1]["train"].update(
            lock={"text": True, "image_unlocked_groups": 6, "patterns": ["ln_.*|bias"]}, ifm_epsilon=0.1,
            average_decay=0.99, global_batch_size=2048, own_group_share=0.6,
        )  # fmt: skip
        config["stages"][1]["cluster"].update(on="product", text_clusters=9)

    change_config(run, change)
    text = card(run, form="multistage")
    rows = {row[0]: row[1:] for row in tables(section(text, "Training"))[0]}
    assert rows["steps"] == ["20", "20"]
    assert rows["global batch, pairs"] == ["16", "2,048"]
    assert rows["pairs seen"] == ["320", "320"]
    assert rows["learning rate"] == ["0.001, cosine, 2 warm-up steps"] * 2
    assert rows["frozen"] == [
        "-", "text tower; image tower except its last 6 layer groups; names that match ln&#95;.&#42;&#124;bias"
    ]  # fmt: skip
    assert rows["loss"][1] == (
        "InfoNCE with implicit feature modification, epsilon 0.1, weights averaged with decay 0.99"
    )
    assert rows["final loss"] == ["1.000"] * 2
    assert rows["negatives from"] == ["-", "the same clusters for 60 % of the loss, all pairs for the rest"]
    assert rows["groups"] == ["1", "4, median 15 pairs"]
    assert rows["pairs in merged groups"] == ["0", "7"]
    assert rows["clusters after it"] == [
        "4 of images, shared metric", "4 of images, 9 of texts, shared metric"
    ]  # fmt: skip
    assert rows["pairs that could not be decoded"] == ["0", "1"]
    assert rows["training time"] == ["1 min 10 s", "2 h 2 min"]


def test_sizes_of_the_model(run):
    assert "4.0 K + 1.0 K parameters over all stages" in card(run, form="multistage")
    assert f"logit scale {math.exp(3):.1f}, fitted on 3 held-out pairs\n" in card(run, form="multistage")
    assert "2.0 K + 500 parameters; logit scale 20.0\n" in card(run, form="open_clip", stage=1)
    assert "logit scale" not in card(run, form="open_clip", weights="the mean of the weights")
    write_json(run / "combined/model/mcl_clip_config.json", {"shared_text_tower": True})
    text = card(run, form="multistage")
    assert "4.0 K + 500 parameters, with one text tower for all stages" in text
    assert "images of 32 px and texts of up to 12 tokens, 8 + 8 dimensions" in text
    assert "ViT of 1 block, patches of 16 px, width 16; text tower: transformer of 2 blocks, width 8" in text


def test_the_data(run):
    rows = {row[0]: row[1:] for row in tables(section(card(run, form="multistage"), "Training data"))[0]}
    index = ShardIndex.load(run / "index/index.arrow")
    size = sum(shard.size for shard in index.shards)
    assert rows["pairs"] == ["60"]
    assert rows["captions"] == ["60 .txt"]
    assert rows["held out, to fit the temperature"] == ["3"]
    assert rows["shards"] == [f"2, {size / 1000:.1f} kB"]
    assert rows["digest of keys and sizes"] == [f"`{index.digest}`"]
    assert rows["samples that are not pairs, skipped"] == ["missing_image 1"]
    assert rows["license of the data"] == rows["license of the model"] == ["not stated"]


def test_restarts_do_not_count_twice(run):
    write_lines(
        run / "launches.jsonl", launch(), launch(time="2026-01-05T00:00:00+0000", device_name="NVIDIA H100"),
        launch(time="2026-01-04T00:00:00+0000", versions={"mcl_clip": "0.3.0", "torch": "2.9.0"}, processes=4),
    )  # fmt: skip
    rows = {row[0]: row[1:] for row in tables(section(card(run, form="multistage"), "Training"))[1]}
    assert rows["started"] == ["3 times"]
    assert rows["dates"] == ["2026-01-02 to 2026-01-05"]
    assert rows["processes"] == ["2 and 4"]
    assert rows["device"] == ["cuda and NVIDIA H100"]
    assert rows["software"] == ["Python 3.11.7, mcl_clip 0.2.0 and 0.3.0, torch 2.9.0"]
    assert rows["training time, all stages"] == ["2 h 3 min"]  # 70 + 7300 s, of the steps that are in the model
    assert rows["energy, emissions"] == ["not measured"]


EVIL = "x|<script>alert(1)</script> [a](b) `c` *d* _e_\n# f"


def test_hostile_names_stay_text(bare):
    def change(config):
        config["tower"]["architecture"] = f"local-dir:/home/me/{EVIL}"
        for stage in config["stages"]:
            stage["train"].update(lock={"patterns": [EVIL]}, schedule=EVIL, precision=EVIL, loss=EVIL)
            stage["cluster"]["metric"] = EVIL

    change_config(bare, change)
    shape = next(iter(OUTCOMES))
    evil = FakeTask(EVIL, f"c/{EVIL}", EVIL, {**shape.sizes, "task": EVIL})
    outcomes = [{EVIL: first(count)} for count in (9, 20, 30)]
    write_results(bare, {evil: outcomes, classification("/home/me/sets/some"): OUTCOMES[shape]})
    write_lines(bare / "launches.jsonl", launch(device=EVIL, python=EVIL, versions={EVIL: EVIL}))
    about = About(license=EVIL, datasets=(EVIL,))
    evil_cfg = {**MODEL_CFG, "vision_cfg": {"timm_model_name": EVIL}, "text_cfg": {"hf_model_name": f"/home/me/{EVIL}"}}
    write_json(bare / "stage-0/train/model/open_clip_config.json", {"model_cfg": evil_cfg})
    for form, options in (("multistage", {}), ("open_clip", {"weights": EVIL}), ("transformers", {"stage": 0})):
        text = card(bare, form=form, about=about, **options)
        _, body = text.split("\n---\n", 1)
        assert ModelCard(text).data.license == EVIL
        assert "<" not in body.replace(MARKER, "").replace("< 1e-6", "")
        assert not re.search(r"^# f|\[a\]\(b\)|`c`|\*d\*|(?<!\w)_e_", body, re.M)
        assert "/home/me" not in body
        for table in tables(body):
            assert len({len(row) for row in table}) == 1


def test_no_paths_and_no_secrets(run):
    for form, options in (("multistage", {}), ("open_clip", {"stage": 0}), ("transformers", {"stage": 1})):
        text = card(run, form=form, **options)
        for private in (str(run), "/home/me", SECRET, "secret", "recipe.py", ".tar", "caption of", "s0-0001"):
            assert private not in text, private


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a/b", "a/b"),
        ("/home/me/data", "data"),
        ("runs/photos/model/", "model"),
        ("wds/vtab_cifar10", "wds/vtab_cifar10"),
        ("C 1", "C 1"),
        ("https://host/sets/x|y", "x&#124;y"),
    ],
)
def test_names_that_may_be_paths(text, wanted):
    assert public_name(text) == wanted


def test_safe_text_is_one_line():
    assert safe("a\nb\t\x1b[0m  c") == "a b &#91;0m c"
    assert safe("ln_post snake_case _x_") == "ln_post snake_case &#95;x&#95;"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "open_clip"}, "a card for open_clip is of one stage; say which, from 0 to 1"),
        ({"form": "transformers", "stage": 2}, "there is no stage 2; the run has stages 0 to 1"),
        ({"form": "multistage", "repo": "no-owner"}, "'no-owner' is not a valid repository name"),
        ({"form": "multistage", "repo": 'a/b"); import os'}, "is not a valid repository name"),
    ],
)
def test_what_a_user_gets_wrong(run, options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        card(run, **options)


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("combined/results.jsonl", '{"key": "a"}\n'),
        ("combined/combination.json", "[]"),
        ("stage-0/train/groups.json", '{"median": "x"}'),
        ("stage-0/train/metrics.jsonl", '{"loss": 1.0}\n'),
        ("stage-1/train/model/open_clip_model.safetensors", "no weights"),
        ("combined/outcomes-shape-combined.npz", "no archive"),
        ("stage-1/cluster/assignments-image.npy", "no array"),
        ("config.json", "{}"),
        ("index/index.arrow", "no index"),
    ],
)
def test_damaged_files_are_named(run, path, content):
    (run / path).write_text(content)
    with pytest.raises(UserError, match=r"tiny"):
        card(run, form="multistage")


def test_outcomes_that_could_run_code_are_refused(run):
    np.savez(run / "combined/outcomes-shape-combined.npz", acc1=np.array([{"a": 1}] * 40, object))
    with pytest.raises(UserError, match=r"outcomes-shape-combined\.npz cannot be read"):
        card(run, form="multistage")


def blocks(text):
    return re.findall(r"```python\n(.*?)```", text, re.S)


@pytest.mark.parametrize("repo", ["", "some-org/name"])
@pytest.mark.parametrize(("form", "count"), [("multistage", 3), ("open_clip", 1), ("transformers", 1)])
@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_examples_of_each_form(run, repo, form, count, loss):
    change_config(run, lambda config: config["stages"][0]["train"].update(loss=loss))
    text = card(run, form=form, repo=repo, **({} if form == "multistage" else {"stage": 0}))
    found = blocks(text)
    assert len(found) == count
    for block in found:
        ast.parse(block)
        assert ("sigmoid" in block) == (loss == "siglip")
        assert ("softmax" in block) == (loss == "clip")
        assert ("some-org/name" in block) == bool(repo)
        assert ("FOLDER" in block) != bool(repo)
    assert ("`FOLDER` stands for" in text) != bool(repo)
    code = "\n".join(found)
    assert ("trust_remote_code=True" in code) == (form == "multistage")
    assert ("AutoModel" in code) == (form != "open_clip")
    assert ("mcl_clip.load(" in text) == (form != "transformers")


@pytest.mark.parametrize("form", ["multistage", "open_clip"])
def test_examples_run(run, tmp_path, monkeypatch, form):
    towers = [create_clip(model_cfg=MODEL_CFG, seed=seed) for seed in (0, 1)]
    folder = tmp_path / "FOLDER"
    if form == "multistage":
        MultistageCLIP(
            [tower.model for tower in towers], logit_scale=3.0, preprocess_cfg=towers[0].preprocess_cfg,
            model_cfgs=[MODEL_CFG] * 2, tokenizer=towers[0].tokenizer,
        ).save(folder)  # fmt: skip
    else:
        save_clip(towers[0], folder)
    Image.new("RGB", (40, 30), "red").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    codes = [code for code in blocks(card(run, form=form, stage=0)) if "transformers" not in code]
    assert len(codes) == 2 - (form == "open_clip")
    for code in codes:
        names = {}
        exec(code, names)
        assert names["probabilities"].shape == (1, 2)
        assert torch.allclose(names["probabilities"].sum(), torch.tensor(1.0))
