"""Show the training and its data: curves of all stages on one axis of steps, counts, and histograms of the data."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64

from mcl_clip.data.decode import BadSampleError, read_header
from mcl_clip.report.figures import LINE, SERIES, new_figure, svg
from mcl_clip.report.thumbnails import Thumbnails
from mcl_clip.report.view import RunView, Section, as_markup
from mcl_clip.results.record import count_text
from mcl_clip.results.training import data_rows

MAX_POINTS = 300  # of a curve; more records are averaged
SPREAD = ("p10", "p50", "p90")
PLOTS = {  # by the name of the value in the records: title and caption
    "loss": ("loss", "Loss of the batches; its level depends on the number of negatives per row."),
    "decoding": ("decoding", "1 - cosine of decoded and true sentence features (latent target decoding)."),
    "distillation": ("distillation", "Divergence of the similarities in the batch from those of the base."),
    "logit_scale": ("logit scale", "Factor on the cosines, exp(logit_scale); at most 100."),
    "lr": ("learning rate", "Learning rate of the schedule."),
    "samples_per_s": ("pairs per second", "Pairs per second, over all processes."),
    "negatives_per_row": ("negatives per row", "Negatives per row; fewer where groups are small."),
    "duplicates_share": ("duplicates per row", "Other rows of the batch with an equal caption or image, for each row."),
}
MEASURED_IMAGES = 1_000  # whose size is read


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Values of a stage at its steps, counted over all stages."""

    stage: int
    steps: Float64[np.ndarray, "points"]
    values: Float64[np.ndarray, "points"]


def section(view: RunView, thumbnails: Thumbnails) -> Section | None:  # noqa: ARG001
    """Return curves of what training recorded; None before the first record."""
    steps = [int(stage.train_settings.get("steps", 0)) for stage in view.run.stages]
    starts = [sum(steps[:s]) for s in range(len(steps))]  # the first step of each stage on the common axis
    records = [_with_shares(stage.steps, stage.train_settings.get("global_batch_size", 0)) for stage in view.run.stages]
    if not any(records):
        return None
    loss, *others = (_plot(_curves(records, starts, name), starts, *words) for name, words in PLOTS.items())
    low, median, high = (_curves(records, starts, name) for name in SPREAD)
    caption = "Mean loss of each group: the median, and the band from the 10th to the 90th percentile."
    plots = [loss, _plot(median, starts, "loss by group", caption, bands=(low, high)), *others]
    metrics = [stage.metrics for stage in view.run.stages]
    for first in (next(iter(of_set.values())) for of_set in view.run.results.values()):
        curves = _curves(metrics, starts, f"{first.dataset}/{first.main_metric}", factor=100)
        plots.append(_plot(curves, starts, f"{first.dataset}, %", f"{first.main_metric} during training."))
    return Section(name="training", title="Training", content={"plots": [plot for plot in plots if plot]})


def _with_shares(steps: Sequence[Mapping[str, Any]], batch_size: int) -> list[dict[str, Any]]:
    """Add duplicates per row, and the spread of the loss over groups, to the records of a stage."""
    records, before = [], 0
    for record in steps:
        rows = (record["step"] - before) * batch_size
        before = record["step"]
        share = {"duplicates_share": record["duplicates"] / rows} if rows > 0 and "duplicates" in record else {}
        records.append({**record, **(record.get("group_loss") or {}), **share})
    return records


def _curves(
    records: Sequence[Sequence[Mapping[str, Any]]], starts: Sequence[int], name: str, factor: float = 1
) -> list[Curve]:
    """Return a curve for each stage that recorded a value, thinned to `MAX_POINTS` means."""
    curves = []
    for s, of_stage in enumerate(records):
        values = [(record["step"], record[name]) for record in of_stage if isinstance(record.get(name), int | float)]
        if values:
            points = np.array(values, np.float64)
            means = np.array([part.mean(0) for part in np.array_split(points, min(MAX_POINTS, len(points)))])
            curves.append(Curve(stage=s, steps=means[:, 0] + starts[s], values=factor * means[:, 1]))
    return curves


def _plot(
    curves: Sequence[Curve],
    starts: Sequence[int],
    title: str,
    caption: str,
    bands: tuple[Sequence[Curve], ...] = (),
) -> dict[str, Any] | None:
    """Plot curves over steps, each with the band between its lower and upper curve; None where all values are 0."""
    if not any(curve.values.any() for curve in curves):
        return None
    with new_figure() as (figure, axes):
        axes.set_title(title)
        axes.set_xlabel("step")
        for start in starts[1:]:
            axes.axvline(start, color=LINE, linestyle=":", linewidth=1)
        colors = [SERIES[curve.stage % len(SERIES)] for curve in curves]
        for color, bottom, top in zip(colors, *bands, strict=True) if bands else ():
            axes.fill_between(bottom.steps, bottom.values, top.values, color=color, alpha=0.2, linewidth=0)
        for color, curve in zip(colors, curves, strict=True):
            axes.plot(curve.steps, curve.values, color=color, label=f"stage {curve.stage}")
        if len(curves) > 1:
            axes.legend()
        ends = "; ".join(f"stage {c.stage} from {c.values[0]:.3g} to {c.values[-1]:.3g}" for c in curves)
        if bands:
            spread = (f"{low.values[-1]:.3g} and {high.values[-1]:.3g}" for low, high in zip(*bands, strict=True))
            ends += f"; at the end between {', '.join(spread)}"
        return {"figure": svg(figure, f"Curve of {title} over steps: {ends}."), "caption": caption}


def data_section(view: RunView, thumbnails: Thumbnails) -> Section | None:  # noqa: ARG001
    """Return counts and histograms of the data; None without an index."""
    if view.run.index is None:
        return None
    captions = [texts for texts in view.sample.captions if texts]
    words = [len(text.split()) for texts in captions for text in texts]
    plots = [
        _histogram(words, "words per caption", "captions"),
        _histogram([len(texts) for texts in captions], "captions per image", "images"),
        _histogram(_image_sides(view), "shorter side of the image, pixels", "images"),
    ]
    for s, stage in enumerate(view.run.stages):
        sizes = [group["size"] for group in stage.groups.get("groups", ())]
        plots.append(_histogram(sizes, f"pairs per group, stage {s}", "groups", SERIES[s % len(SERIES)]))
    rows, shown = as_markup(data_rows(view.run)), [plot for plot in plots if plot]
    return Section(name="data", title="Data", content={"rows": rows, "losses": _losses(view), "plots": shown})


def _losses(view: RunView) -> list[list[str]]:
    """Return what each stage could not use; empty before the first stage."""
    rows = [
        ["", "could not be decoded", "merged groups", "rows without weight", "masked duplicates", "masked as similar"]
    ]
    for s, stage in enumerate(view.run.stages):
        if stage.steps or stage.groups:
            reasons = dict(Counter(stage.bad_rows.values()).most_common())
            merged = f"{stage.groups.get('rows_relaxed', 0):,} pairs"
            totals = (f"{stage.total(counter):,}" for counter in ("rows_without_weight", "duplicates", "similar"))
            rows.append([f"stage {s}", count_text(reasons) or "none", merged, *totals])
    return rows if len(rows) > 1 else []


def _image_sides(view: RunView) -> list[int]:
    """Return the shorter side of some images in pixels, from their headers."""
    if view.reader is None or not len(view.sample.rows):
        return []
    indices = np.unique(np.linspace(0, len(view.sample.rows) - 1, MEASURED_IMAGES).astype(np.int64))
    sides = []
    for sample in view.reader.read(view.sample.rows[indices]):
        try:
            header = read_header(sample.image)
            sides.append(min(header.width, header.height))
        except BadSampleError:  # counted elsewhere
            continue
    return sides


def _histogram(values: Sequence[int], title: str, unit: str, color: str = SERIES[0]) -> dict[str, Any] | None:
    """Plot a histogram up to the 99th percentile; None where all values are equal."""
    if not values or min(values) == max(values):
        return None
    numbers = np.array(values)
    first, last = int(numbers.min()), int(np.quantile(numbers, 0.99)) + 1
    edges = (
        np.arange(first, last + 2) - 0.5 if last - first < 40 else np.linspace(first, last, min(40, len(values)) + 1)
    )
    with new_figure() as (figure, axes):
        axes.hist(np.minimum(numbers, last), bins=edges.tolist(), color=color)
        axes.set_title(title)
        axes.set_ylabel(unit)
        low, median, high = (int(np.quantile(numbers, share)) for share in (0.05, 0.5, 0.95))
        caption = f"{len(values):,} {unit}: median {median:,}; 90 % are between {low:,} and {high:,}."
        return {"figure": svg(figure, f"Histogram of {title}: {caption}"), "caption": caption}
