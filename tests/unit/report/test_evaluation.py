"""Tables and plots of what was measured."""

from pathlib import Path

import numpy as np

from mcl_clip.report.evaluation import (
    _against_arms,
    _confusion,
    _group_table,
    _recall_figure,
    _seed_table,
)
from mcl_clip.report.summary import heat_map_rows
from mcl_clip.results.record import Result, RunRecord


def result(metrics, outcomes=None, **record) -> Result:
    found = Result({"dataset": "set", "main_metric": "accuracy", "metrics": metrics, **record}, Path("nowhere"))
    found.__dict__["outcomes"] = outcomes or {}
    return found


def test_groups_of_a_set_of_pairs_have_a_line_each():
    found = {
        "stage-0": result({"accuracy": 0.5, "accuracy/Colour": 0.25, "accuracy/Count <3": 0.75}),
        "combined": result({"accuracy": 0.6, "accuracy/Colour": 0.5, "accuracy/Count <3": 0.7}),
    }
    assert _group_table(found, ["stage-0", "combined"]) == [
        ["group", "stage 0", "all stages"],
        ["Colour", "25.0", "50.0"],
        ["Count <3", "75.0", "70.0"],
    ]
    assert _group_table({"stage-0": result({"acc1": 0.5})}, ["stage-0"]) == []


def test_recall_rises_from_the_first_place_to_the_last():
    ranks = np.array([0, 0, 3, 9, 99])
    figure = _recall_figure({"stage-0": result({}, {"image_retrieval": ranks})}, ["stage-0"], "image_retrieval")
    assert "At 10: stage 0 80.0 %" in str(figure)
    assert _recall_figure({"stage-0": result({})}, ["stage-0"], "image_retrieval") is None


def test_confusions_are_counted_by_true_class():
    labels, predictions = np.array([0, 0, 1, 2, 2, 2]), np.array([0, 1, 1, 0, 0, 2])
    figure = str(_confusion(labels, predictions, ["a", "b", "c"], "set, stage 0")["figure"])
    assert "confusions: c as a (67 %); a as b (50 %)." in figure


def test_many_classes_are_a_table_of_the_most_confused():
    labels = np.array([*range(100), 3, 3, 3])
    part = _confusion(labels, np.array([*range(100), 7, 7, 7]), [f"class {n}" for n in range(100)], "set, stage 0")
    assert part["table"][1:] == [("class 3", "class 7", "75")]
    assert "figure" not in part


def test_cells_of_a_heat_map_are_darker_the_further_above_chance():
    found = {"set": {label: result({"acc1": value}, n_classes=4) for label, value in
                     {"stage-0": 0.25, "stage-1": 1.0, "combined": 0.1}.items()}}  # fmt: skip
    (row,) = heat_map_rows(found, ["stage-0", "stage-1", "stage-2", "combined"], "acc1")
    assert [cell and cell["shade"] for cell in row["cells"]] == [0, 100, None, 0]
    assert row["chance"] == 25


def run_with(right, size=40):
    """A run whose combined model is right on the first `right` queries of a set."""
    outcomes = np.arange(size) < right
    of_set = result(
        {"acc1": outcomes.mean()}, {"acc1": outcomes}, main_metric="acc1", data_sha256="0", label="combined"
    )
    run = RunRecord(Path("nowhere"), {"stages": []})
    run.__dict__["results"] = {"classification/set": {"combined": of_set}}
    return run


def test_a_run_is_compared_with_each_arm():
    rows, sentences = _against_arms(run_with(30), {"single": run_with(10), "ifm": run_with(30), "late": run_with(40)})
    assert rows[0] == ["set", "metric", "this run", "single", "ifm", "late"]
    assert rows[1][:3] == ["set", "zero-shot accuracy", "75.0"]
    assert rows[1][3].startswith("25.0 (+50.0 [+3")
    assert rows[1][4] == "75.0 (+0.0 [+0.0, +0.0])"
    assert sentences == [
        "Compared with single: better on set (zero-shot accuracy).",
        "Compared with ifm: no clear difference on set (zero-shot accuracy).",
        "Compared with late: worse on set (zero-shot accuracy).",
    ]


def test_means_over_seeds_are_a_table():
    means = [
        {"what": "mean", "row": row, "figure": "shape", "value": 0.5, "low": 0.25, "high": 0.75}
        for row in ("mcl", "ifm")
    ]
    assert _seed_table([*means, {"what": "behind"}]) == [
        ["", "shape"],
        ["mcl", "50.0 [25.0, 75.0]"],
        ["ifm", "50.0 [25.0, 75.0]"],
    ]
    assert _seed_table([]) == []
