"""Sentences on a stage say no more than was measured."""

from pathlib import Path

import numpy as np

from mcl_clip.report.summary import combined_sentences, stage_sentences
from mcl_clip.results.record import Result, RunRecord

QUERIES = 400


def result(name: str, label: str, right: float, *, classes: int = 10, metric: str = "linear_acc1") -> Result:
    """A set of which the first `right` of all queries are answered rightly."""
    outcomes = np.arange(QUERIES) < right * QUERIES
    record = {
        "dataset": name,
        "key": name,
        "label": label,
        "main_metric": "acc1",
        "metrics": {metric: float(outcomes.mean()), "acc1": 0.1},
        "n_classes": classes,
        "data_sha256": name,
    }
    found = Result(record, Path("nowhere"))
    found.__dict__["outcomes"] = {metric: outcomes}
    return found


def run_of(shares: dict[str, dict[str, float]], agreement=None) -> RunRecord:
    results = {
        name: {label: result(name, label, share) for label, share in of_set.items()} for name, of_set in shares.items()
    }
    run = RunRecord(Path("nowhere"), {"stages": []})
    run.__dict__.update(results=results, agreement=agreement or {})
    return run


def test_the_first_stage_is_described_by_what_it_encodes():
    run = run_of({"colour": {"stage-0": 0.99}, "shape": {"stage-0": 0.5}, "texture": {"stage-0": 0.15}})
    assert stage_sentences(run, 0) == [
        "It encodes colour (99.0 %), partly encodes shape (50.0 %), hardly encodes texture (15.0 %)."
    ]


def test_a_later_stage_is_described_by_what_changed():
    run = run_of(
        {
            "colour": {"stage-0": 0.99, "stage-1": 0.12},
            "shape": {"stage-0": 0.3, "stage-1": 0.8},
            "texture": {"stage-0": 0.6, "stage-1": 0.5},
            "size": {"stage-0": 0.5, "stage-1": 0.5},
        },
        {(0, "image"): (0.05, 0.03)},
    )
    assert stage_sentences(run, 1) == [
        "It encodes shape (80.0 %, stage 0: 30.0 %) better than stage 0.",
        "It no longer encodes colour (12.0 %, stage 0: 99.0 %): what the pairs of a group share cannot lower its loss.",
        "It encodes texture (50.0 %, stage 0: 60.0 %) less well than stage 0.",
        "Its clusters of images are largely unrelated to those of stage 0 (agreement 0.05; 0.03 if unrelated).",
    ]


def test_what_is_within_chance_is_no_difference():
    run = run_of({"shape": {"stage-0": 0.5, "stage-1": 0.5}})
    assert stage_sentences(run, 1) == ["There is no clear difference from stage 0 in what it encodes."]


def test_without_results_there_are_no_sentences():
    run = run_of({})
    assert stage_sentences(run, 0) == stage_sentences(run, 1) == combined_sentences(run) == []


def test_all_stages_are_held_against_the_best_of_them():
    run = run_of(
        {
            "colour": {"stage-0": 0.99, "stage-1": 0.1, "combined": 0.9},
            "shape": {"stage-0": 0.3, "stage-1": 0.8, "combined": 0.9},
            "texture": {"stage-0": 0.3, "stage-1": 0.8, "combined": 0.8},
        }
    )
    assert combined_sentences(run) == [
        "They are better than the best single stage on shape (90.0 %, best stage: 80.0 %).",
        "They are worse than the best single stage on colour (90.0 %, best stage: 99.0 %).",
        "There is no clear difference from the best single stage on texture (80.0 %, best stage: 80.0 %).",
    ]


def test_agreeing_clusters_are_said_to_agree():
    for found, words in ((0.9, "mostly agree with"), (0.4, "partly agree with"), (0.1, "are largely unrelated to")):
        (sentence,) = stage_sentences(run_of({}, {(0, "text"): (found, 0.02)}), 1)
        assert f"of texts {words} those of stage 0" in sentence


def test_many_sets_are_counted():
    run = run_of({f"set {n}": {"stage-0": 0.99} for n in range(9)})
    assert stage_sentences(run, 0)[0].endswith("set 3 (99.0 %) and 5 more sets.")
