"""All that was measured on each set: tables with intervals, recall curves, and which classes are confused."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64, Int64
from markupsafe import Markup
from matplotlib.ticker import NullFormatter

from mcl_clip.eval.classification import ClassificationTask, class_scores
from mcl_clip.report.figures import SERIES, TEXT, drawing, svg
from mcl_clip.report.section import Section
from mcl_clip.report.thumbnails import Thumbnails
from mcl_clip.report.view import RunView
from mcl_clip.results.record import COMBINED, Result
from mcl_clip.results.scores import cell, metric_title, metrics_of, sizes

DIRECTIONS = {"image_retrieval": "text to picture", "text_retrieval": "picture to text"}
OF_GROUP = "accuracy/"  # of a set of pairs
CURVE_POINTS = 100
SHOWN_CLASSES = 40  # of a confusion matrix; with more, the most confused pairs
NAMED_CLASSES = 20
CONFUSED_PAIRS = 12


def section(view: RunView, album: Thumbnails) -> Section | None:  # noqa: ARG001
    """Each set with its tables and plots; none before anything is measured."""
    labels = [f"stage-{s}" for s in range(len(view.run.stages))] + [COMBINED] * (len(view.run.stages) > 1)
    sets = [_of_set(view, found, labels) for found in view.run.results.values()]
    return Section(name="evaluation", title="Evaluation", content={"sets": sets}) if sets else None


def _of_set(view: RunView, found: Mapping[str, Result], labels: Sequence[str]) -> dict[str, Any]:
    present = [label for label in labels if label in found]
    first = found[present[0]]
    name = first.record["dataset"]
    metrics = metrics_of(found.values())
    return {
        "name": name,
        "sizes": sizes(first),
        "table": [
            ["", *(Markup(metric_title(metric)) for metric in metrics)],
            *([_title(label), *(cell(found[label], metric) for metric in metrics)] for label in present),
        ],
        "curves": [plot for side in DIRECTIONS if (plot := _recall_plot(found, present, side))],
        "parts": _parts_table(found, present),
        "confusions": _confusions(view, name, present),
    }


def _title(label: str) -> str:
    return "all stages" if label == COMBINED else label.replace("-", " ")


def _recall_plot(found: Mapping[str, Result], labels: Sequence[str], side: str) -> dict[str, Any] | None:
    """Share of queries with a right answer among the first k, over k."""
    ranks = {label: found[label].outcomes[side] for label in labels if side in found[label].outcomes}
    if not ranks:
        return None
    most = max(2, *(int(of_label.max()) + 1 for of_label in ranks.values()))
    ks = np.unique(np.geomspace(1, most, CURVE_POINTS).round().astype(np.int64))
    with drawing() as (figure, axes):
        for label, of_label in ranks.items():
            colour = TEXT if label == COMBINED else SERIES[int(label.removeprefix("stage-")) % len(SERIES)]
            recalls = 100 * np.searchsorted(np.sort(of_label), ks) / len(of_label)
            axes.plot(ks, recalls, color=colour, label=_title(label))
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(0, 102)
        axes.set_xlabel("k")
        axes.set_title(f"{DIRECTIONS[side]}: recall among the first k, %")
        axes.legend()
        at_10 = ", ".join(f"{_title(label)} {100 * np.mean(of_label < 10):.1f} %" for label, of_label in ranks.items())
        return {
            "figure": svg(
                figure,
                f"Recall of {found[labels[0]].record['dataset']} from {DIRECTIONS[side]} over k. At 10: {at_10}.",
            )
        }


def _parts_table(found: Mapping[str, Result], labels: Sequence[str]) -> list[list[str]]:
    """What a set of pairs measured on each of its groups, a column a model; empty for other sets."""
    parts = [name for name in found[labels[0]].record["metrics"] if name.startswith(OF_GROUP)]
    if not parts:
        return []
    rows = [[name.removeprefix(OF_GROUP), *(cell(found[label], name) for label in labels)] for name in parts]
    return [["group", *map(_title, labels)], *rows]


def _confusions(view: RunView, name: str, labels: Sequence[str]) -> list[dict[str, Any]]:
    """The confusion of classes under the first and the last model of a classification set."""
    task = view.tasks.get(name)
    if not isinstance(task, ClassificationTask):
        return []
    stages = [int(label.removeprefix("stage-")) for label in labels if label != COMBINED]
    if not all(view.set_features(s, name) for s in stages):
        return []
    found = []
    for label in dict.fromkeys((labels[0], labels[-1])):
        features = (
            view.combined_set_features(name, stages)
            if label == COMBINED
            else view.set_features(int(label.removeprefix("stage-")), name)
        )
        scores = class_scores(features["image"], features["text"], len(task.data.classnames))
        counts = _confusion(task.data.labels, scores.argmax(1), len(task.data.classnames))
        found.append(_confusion_part(counts, task.data.classnames, f"{name}, {_title(label)}"))
    return found


def _confusion(
    labels: Int64[np.ndarray, "images"], guesses: torch.Tensor, classes: int
) -> Int64[np.ndarray, "classes classes"]:
    counts: np.ndarray = np.bincount(labels * classes + guesses.numpy(), minlength=classes * classes)
    return counts.reshape(classes, classes)


def _confusion_part(counts: Int64[np.ndarray, "classes classes"], names: Sequence[str], title: str) -> dict[str, Any]:
    """A picture of the matrix or, of many classes, a table of the most confused pairs."""
    shares = counts / np.maximum(1, counts.sum(1, keepdims=True))
    pairs = _most_confused(shares, names)
    if len(names) > SHOWN_CLASSES:
        rows = [
            ["is", "taken for", "% of its pictures"],
            *([one, other, f"{100 * share:.0f}"] for one, other, share in pairs),
        ]
        return {"title": title, "table": rows}
    with drawing(400, 380) as (figure, axes):
        axes.grid(visible=False)
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        is_named = len(names) <= NAMED_CLASSES
        axes.set_xticks(range(len(names)) if is_named else [], names if is_named else [], rotation=90)
        axes.set_yticks(range(len(names)) if is_named else [], names if is_named else [])
        axes.set_xlabel("taken for")
        axes.set_ylabel("is")
        axes.set_title(title)
        told = "; ".join(f"{one} for {other} ({100 * share:.0f} %)" for one, other, share in pairs[:5])
        return {
            "title": title,
            "figure": svg(figure, f"Confusion of classes, {title}. Most often taken: {told or 'none'}."),
        }


def _most_confused(
    shares: Float64[np.ndarray, "classes classes"], names: Sequence[str]
) -> list[tuple[str, str, float]]:
    off = shares.copy()
    np.fill_diagonal(off, 0)
    order = np.argsort(-off, axis=None, kind="stable")[:CONFUSED_PAIRS]
    found = [(*np.unravel_index(place, off.shape),) for place in order]
    return [(names[i], names[j], float(off[i, j])) for i, j in found if off[i, j] > 0]
