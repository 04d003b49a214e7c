"""How the training went: curves of all stages on one axis of steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64
from matplotlib.axes import Axes

from mcl_clip.core.files import read_jsonl
from mcl_clip.report.figures import LINE, SERIES, drawing, svg
from mcl_clip.report.section import Section
from mcl_clip.report.thumbnails import Thumbnails
from mcl_clip.report.view import RunView

POINTS = 300  # of a curve; more records are averaged
SPREAD = ("p10", "p50", "p90")
PLOTS = {  # by the name of the figure in the records: title, and what it is
    "loss": ("loss", "Loss of the batches; its level hangs on how many negatives a row has."),
    "logit_scale": ("logit scale", "Factor on the cosines, exp(logit_scale); at most 100."),
    "lr": ("learning rate", "Learning rate of the schedule."),
    "samples_per_s": ("pairs per second", "Pairs a second, over all processes."),
    "negatives_per_row": ("negatives of a row", "Negatives of a row; fewer where groups are small."),
    "duplicates_share": ("equal captions or pictures", "Other rows with an equal caption or picture, for each row."),
}


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Values of a stage at its steps, counted over all stages."""

    stage: int
    steps: Float64[np.ndarray, "points"]
    values: Float64[np.ndarray, "points"]


def section(view: RunView, album: Thumbnails) -> Section | None:  # noqa: ARG001
    """Curves of what was recorded in training; none before the first record."""
    starts = _starts(view)
    records = [_with_shares(stage.steps, stage.settings.get("train", {})) for stage in view.run.stages]
    if not any(records):
        return None
    loss, *others = (_plot(_curves(records, starts, name), starts, *words) for name, words in PLOTS.items())
    plots = [loss, _spread_plot(records, starts), *others, *_evaluations(view, starts)]
    return Section(name="curves", title="How the training went", content={"plots": [plot for plot in plots if plot]})


def _with_shares(steps: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Records of a stage, with duplicates for each row of a batch, and the spread of the loss over groups, on top."""
    records, before = [], 0
    for record in steps:
        rows = (record["step"] - before) * settings.get("global_batch_size", 0)
        before = record["step"]
        share = {"duplicates_share": record["duplicates"] / rows} if rows > 0 and "duplicates" in record else {}
        records.append({**record, **(record.get("group_loss") or {}), **share})
    return records


def _starts(view: RunView) -> list[int]:
    """The first step of each stage on the common axis."""
    steps = [int(stage.settings.get("train", {}).get("steps", 0)) for stage in view.run.stages]
    return [sum(steps[:s]) for s in range(len(steps))]


def _curves(records: Sequence[Sequence[Mapping[str, Any]]], starts: Sequence[int], name: str) -> list[Curve]:
    """A curve a stage of a figure of its records, thinned to `POINTS` means."""
    curves = []
    for s, of_stage in enumerate(records):
        found = [(record["step"], record[name]) for record in of_stage if record.get(name) is not None]
        if found:
            points = np.array(found, np.float64)
            means = np.array([part.mean(0) for part in np.array_split(points, min(POINTS, len(points)))])
            curves.append(Curve(stage=s, steps=means[:, 0] + starts[s], values=means[:, 1]))
    return curves


def _plot(curves: Sequence[Curve], starts: Sequence[int], what: str, caption: str) -> dict[str, Any] | None:
    if not curves or not any(curve.values.any() for curve in curves):
        return None
    with drawing() as (figure, axes):
        _mark_stages(axes, starts)
        for curve in curves:
            axes.plot(curve.steps, curve.values, color=SERIES[curve.stage % len(SERIES)], label=f"stage {curve.stage}")
        axes.set_title(what)
        axes.set_xlabel("step")
        if len(curves) > 1:
            axes.legend()
        ends = "; ".join(f"stage {c.stage} from {c.values[0]:.3g} to {c.values[-1]:.3g}" for c in curves)
        return {"figure": svg(figure, f"Curve of {what} over steps: {ends}."), "caption": caption}


def _mark_stages(axes: Axes, starts: Sequence[int]) -> None:
    for start in starts[1:]:
        axes.axvline(start, color=LINE, linestyle=":", linewidth=1)


def _spread_plot(records: Sequence[Sequence[Mapping[str, Any]]], starts: Sequence[int]) -> dict[str, Any] | None:
    """The loss of the middle group, between the tenth and the ninetieth of a hundred."""
    low, middle, high = (_curves(records, starts, name) for name in SPREAD)
    if not middle:
        return None
    with drawing() as (figure, axes):
        _mark_stages(axes, starts)
        for curve, bottom, top in zip(middle, low, high, strict=True):
            colour = SERIES[curve.stage % len(SERIES)]
            axes.fill_between(curve.steps, bottom.values, top.values, color=colour, alpha=0.2, linewidth=0)
            axes.plot(curve.steps, curve.values, color=colour, label=f"stage {curve.stage}")
        axes.set_title("loss by group")
        axes.set_xlabel("step")
        ends = "; ".join(
            f"stage {c.stage} ends at {c.values[-1]:.3g}, between {b.values[-1]:.3g} and {t.values[-1]:.3g}"
            for c, b, t in zip(middle, low, high, strict=True)
        )
        return {
            "figure": svg(figure, f"Loss by group over steps: {ends}."),
            "caption": "Mean loss of each group: the middle one, and the band that holds four of five.",
        }


def _evaluations(view: RunView, starts: Sequence[int]) -> list[dict[str, Any] | None]:
    """The main measure of each set, where it was measured inside the stages too."""
    found: dict[str, list[tuple[int, int, float]]] = {}
    mains = {
        of_set[next(iter(of_set))].record["dataset"]: of_set[next(iter(of_set))].main_metric
        for of_set in view.run.results.values()
    }
    for s in range(len(view.run.stages)):
        for record in read_jsonl(view.folder / f"stage-{s}" / "train" / "metrics.jsonl"):
            for name, metric in mains.items():
                value = record.get(f"{name}/{metric}")
                if isinstance(value, int | float):
                    found.setdefault(name, []).append((s, record["step"], float(value)))
    plots = []
    for name, points in found.items():
        curves = []
        for s in dict.fromkeys(stage for stage, _, _ in points):
            mine = np.array([(step, value) for stage, step, value in points if stage == s], np.float64)
            curves.append(Curve(stage=s, steps=mine[:, 0] + starts[s], values=100 * mine[:, 1]))
        plots.append(_plot(curves, starts, f"{name}, %", f"{mains[name]} inside the stages."))
    return plots
