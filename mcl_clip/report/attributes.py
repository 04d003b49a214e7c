"""What each stage knows: a heat map of stages and sets with classes, zero-shot and by a read-out."""

from collections.abc import Mapping, Sequence
from typing import Any

from mcl_clip.report.section import Section
from mcl_clip.report.sentences import skill
from mcl_clip.report.thumbnails import Thumbnails
from mcl_clip.report.view import RunView
from mcl_clip.results.record import COMBINED, Result

MEASURES = {
    "linear_acc1": ("Linear read-out", "what the picture features hold, whatever it is called"),
    "acc1": ("Zero-shot", "what the right words find"),
}


def section(view: RunView, album: Thumbnails) -> Section | None:  # noqa: ARG001
    """A map a measure; none without a set with classes."""
    labels = [f"stage-{s}" for s in range(len(view.run.stages))] + [COMBINED] * (len(view.run.stages) > 1)
    maps = [
        {"title": title, "what": what, "columns": _titles(labels), "rows": rows}
        for metric, (title, what) in MEASURES.items()
        if (rows := _rows(view.run.results, labels, metric))
    ]
    return Section(name="attributes", title="What each stage knows", content={"maps": maps}) if maps else None


def _titles(labels: Sequence[str]) -> list[str]:
    return ["all stages" if label == COMBINED else label.replace("-", " ") for label in labels]


def _rows(results: Mapping[str, Mapping[str, Result]], labels: Sequence[str], metric: str) -> list[dict[str, Any]]:
    rows = []
    for found in results.values():
        first = next(iter(found.values()))
        if first.record.get("n_classes") and any(result.value(metric) is not None for result in found.values()):
            rows.append(
                {
                    "name": first.record["dataset"],
                    "chance": 100 / first.record["n_classes"],
                    "cells": [_cell(found.get(label), metric) for label in labels],
                }
            )
    return rows


def _cell(result: Result | None, metric: str) -> dict[str, Any] | None:
    """A share in percent, its interval, and how dark its cell is: from guessing to all right."""
    value = result.value(metric) if result else None
    if result is None or value is None:
        return None
    interval = result.interval(metric)
    title = f"95 % interval {100 * interval[0]:.1f} to {100 * interval[1]:.1f}" if interval else ""
    return {"value": 100 * value, "title": title, "shade": round(100 * max(0.0, skill(result, metric) or 0.0))}
