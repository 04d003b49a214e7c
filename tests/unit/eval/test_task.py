import json

import numpy as np
import pytest

from mcl_clip.core.stats import bootstrap_interval
from mcl_clip.eval.task import result_record
from mcl_clip.results.record import load_results
from mcl_clip.results.text import results_table
from tests.unit.eval.sets import set_of

RECALLS = {
    f"{side}_{name}": value
    for side in ("text_retrieval", "image_retrieval")
    for name, value in (("recall@1", 0.125), ("recall@5", 0.5), ("recall@10", 1.0), ("median_rank", 3.0))
}

MEAN = {"mean_recall@1": 0.125}


def record(key, task, pretrained, main=None, ci95=None, **metrics):
    made = {"key": key, "task": task, "pretrained": pretrained, "n_images": 8, "n_texts": 16, "metrics": metrics}
    return made if main is None else {**made, "main_metric": main, "ci95": ci95 or {}}


def write(folder, *records):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.jsonl").write_text("".join(json.dumps(item) + "\n" for item in records))


def test_nothing_was_measured(tmp_path):
    assert results_table(tmp_path) == ""
    assert load_results(tmp_path) == []


def test_the_table(tmp_path):
    retrieval = ("retrieval/photos", "zeroshot_retrieval")
    classes = ("classification/colours", "zeroshot_classification")
    write(
        tmp_path / "stage-0/eval",
        record(*retrieval, "run/stage-0", **RECALLS),  # as written before there were intervals
        record(*classes, "run/stage-0", acc1=0.25, acc5=1.0, linear_acc1=0.96875, cluster_nmi=0.5),
    )
    intervals = {"mean_recall@1": [0.0654, 0.5], "text_retrieval_recall@1": [0.0, 1.0]}
    write(
        tmp_path / "combined",
        record(
            *retrieval,
            "run/combined",
            "mean_recall@1",
            intervals,
            **RECALLS | MEAN | {"text_retrieval_median_rank": 12.0},
        ),
        record(*classes, "run/combined", "acc1", {"acc1": [0.125, 1.0]}, acc1=0.5, linear_acc1=1.0),
    )
    assert results_table(tmp_path).splitlines() == [
        "retrieval/photos: 8 images, 16 texts",
        "                    mean R@1  i2t R@1  i2t R@5  i2t R@10  i2t med.  t2i R@1  t2i R@5  t2i R@10  t2i med.",
        "  stage-0                  -     12.5     50.0     100.0         3     12.5     50.0     100.0         3",
        "  combined  12.5 [6.5, 50.0]     12.5     50.0     100.0        12     12.5     50.0     100.0         3",
        "classification/colours: 8 images, 16 texts",
        "                     zero-shot  top 5  linear probe  NMI of clusters",
        "  stage-0                 25.0  100.0          96.9             50.0",
        "  combined  50.0 [12.5, 100.0]      -         100.0                -",
    ]


def test_the_table_fits_a_wide_terminal(tmp_path):
    interval = {"mean_recall@1": [0.1, 0.2]}
    long = record("k", "zeroshot_retrieval", "run/stages-0-1-mean_cosine", "mean_recall@1", interval, **RECALLS | MEAN)
    write(tmp_path / "stage-1/eval", long)
    assert max(map(len, results_table(tmp_path).splitlines())) <= 120


def test_the_main_metric_of_a_set_has_a_column(tmp_path):
    main = "mean_per_class_recall"
    write(tmp_path / "combined", record("k", "zeroshot_classification", "r/combined", main, acc1=0.25, **{main: 0.75}))
    _, titles, row = results_table(tmp_path).splitlines()
    assert titles.split()[:2] == [main, "zero-shot"]
    assert row.split()[:3] == ["combined", "75.0", "25.0"]


def test_a_new_task_shows_its_metrics_as_they_are_called(tmp_path):
    patterns = {f"pattern_{number}": number / 16 for number in range(12)}
    write(
        tmp_path / "stage-0/eval",
        record("pairs/new", "pairs", "r/stage-0", "average", {"average": [0.25, 0.75]}, **patterns, average=0.5),
    )
    write(tmp_path / "combined", record("pairs/new", "pairs", "r/combined", "average", average=0.5, main_metric=0.5))
    _, titles, first, second = results_table(tmp_path).splitlines()
    assert titles.split() == ["average", *(f"pattern_{number}" for number in range(9))]
    assert first.split()[:5] == ["stage-0", "50.0", "[25.0,", "75.0]", "0.0"]
    assert second.split() == ["combined", "50.0", *["-"] * 9]


class SomeTask:
    name, main_metric, data = "set", "acc1", set_of()

    def score(self, image_features, text_features):
        raise NotImplementedError

    def describe(self):
        return {"key": "new/set", "task": "new", "n_images": 100, "n_texts": 10}


def make_record(metrics, **options):
    options = {"outcomes": {}, "outcomes_file": "outcomes-x.npz", **options}
    return result_record(SomeTask(), metrics, model="m", pretrained="r/stage-0", stage=0, combine=None, dtype="fp32",
                         seconds=1.0, **options)  # fmt: skip


def test_metrics_with_outcomes_get_intervals():
    right = np.arange(100) % 3 == 0
    units = np.arange(100, dtype=np.int32) // 10 % 4
    outcomes = {"acc1": right, "recall": right.astype(np.float32), "unit:recall": units, "ranks": np.zeros(100)}
    made = make_record({"acc1": 0.34, "recall": 0.34, "nmi": 0.5}, outcomes=outcomes)
    assert json.loads(json.dumps(made, allow_nan=False)) == made
    assert list(made["ci95"]) == ["acc1", "recall"]
    assert made["ci95"]["acc1"] == list(bootstrap_interval(right, resamples=2000))
    assert made["ci95"]["acc1"] == pytest.approx([0.25, 0.43], abs=0.02)
    assert made["ci95"]["recall"] == list(bootstrap_interval(right, units, resamples=2000))
    assert made["outcomes"] == "outcomes-x.npz"
    assert made["main_metric"] == "acc1"
    assert made["metrics"]["main_metric"] == 0.34


def test_a_record_without_outcomes():
    made = make_record({"acc1": 0.5})
    assert (made["ci95"], made["label"]) == ({}, "stage-0")


def test_models_of_one_folder_may_have_labels(tmp_path):
    made = make_record({"acc1": 0.5})
    write(tmp_path, {**made, "label": "stage-0-bf16"}, made)
    assert [line.split()[0] for line in results_table(tmp_path).splitlines()[2:]] == ["stage-0-bf16", "stage-0"]


def test_stages_come_in_the_order_of_their_numbers(tmp_path):
    for stage in (10, 2, 0):
        write(tmp_path / f"stage-{stage}/eval", record("k", "zeroshot_classification", f"r/stage-{stage}", acc1=0.5))
    write(tmp_path / "combined", record("k", "zeroshot_classification", "r/combined", acc1=0.5))
    names = [item.record["pretrained"] for item in load_results(tmp_path)]
    assert names == ["r/stage-0", "r/stage-2", "r/stage-10", "r/combined"]


def test_a_record_that_was_cut_off_is_left_out(tmp_path):
    write(tmp_path / "combined", record("k", "zeroshot_classification", "r/combined", acc1=0.5))
    with (tmp_path / "combined/results.jsonl").open("a") as file:
        file.write('{"key": "k", "task"')
    assert len(load_results(tmp_path)) == 1
