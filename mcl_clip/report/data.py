"""The data of a run: how much, of what kind, what of it was lost, and how it falls into groups."""

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from mcl_clip.core.files import read_jsonl
from mcl_clip.report.figures import SERIES, drawing, svg
from mcl_clip.report.section import Section
from mcl_clip.report.thumbnails import Thumbnails
from mcl_clip.report.view import RunView
from mcl_clip.results.text import size

MEASURED = 1_000  # pictures whose size is read
FORMATS = ("JPEG", "PNG", "WEBP")


def section(view: RunView, album: Thumbnails) -> Section | None:  # noqa: ARG001
    """Counts and histograms; none without an index."""
    if view.run.data is None:
        return None
    captions = [texts for texts in view.sample.captions if texts]
    lengths = [len(text.split()) for texts in captions for text in texts]
    sides = _sides(view)
    plots = [
        _histogram(lengths, "words of a caption", "captions"),
        _histogram([len(texts) for texts in captions], "captions of a picture", "pictures"),
        _histogram(sides, "shorter side of a picture, pixels", "pictures"),
        *(_groups_plot(s, stage.groups) for s, stage in enumerate(view.run.stages)),
    ]
    content = {
        "rows": _facts(view),
        "losses": _losses(view),
        "plots": [plot for plot in plots if plot],
        "looked_at": len(view.sample.rows) if captions else 0,
        "measured": len(sides),
    }
    return Section(name="data", title="The data", content=content)


def _facts(view: RunView) -> list[list[str]]:
    data = view.run.data
    if data is None:
        return []
    skipped = ", ".join(f"{reason} {count:,}" for reason, count in data.skipped.items())
    return [
        ["", ""],
        ["pairs", f"{data.rows:,}"],
        ["shards", f"{data.shards:,}, {size(data.size)}"],
        ["samples of the shards that are no pairs", skipped or "none"],
        ["digest of keys and sizes", data.digest],
    ]


def _losses(view: RunView) -> list[list[str]]:
    """What each stage did not use: a line a stage."""
    rows = [["", "could not be decoded", "merged groups", "without weight", "masked duplicates"]]
    for s, stage in enumerate(view.run.stages):
        if not stage.steps and not stage.groups:
            continue
        bad = [
            record
            for phase in ("train", "embed")
            for record in read_jsonl(view.folder / f"stage-{s}" / phase / "bad_samples.jsonl")
        ]
        reasons = Counter(
            str(record.get("reason")) for record in {record.get("row"): record for record in bad}.values()
        )
        rows.append(
            [
                f"stage {s}",
                ", ".join(f"{reason} {count:,}" for reason, count in reasons.most_common()) or "none",
                f"{stage.groups.get('rows_relaxed', 0):,} pairs",
                f"{_sum(stage.steps, 'rows_without_weight'):,} times",
                f"{_sum(stage.steps, 'duplicates'):,} times",
            ]
        )
    return rows if len(rows) > 1 else []


def _sum(steps: Sequence[Mapping[str, Any]], name: str) -> int:
    return int(sum(record.get(name, 0) for record in steps))


def _sides(view: RunView) -> list[int]:
    """The shorter side of some pictures, by their headers."""
    if view.reader is None or not len(view.sample.rows):
        return []
    places = np.unique(np.linspace(0, len(view.sample.rows) - 1, MEASURED).astype(np.int64))
    found = []
    for sample in view.reader.read(view.sample.rows[places]):
        try:
            with Image.open(io.BytesIO(sample.image), formats=FORMATS) as image:
                found.append(min(image.size))
        except Exception:  # damaged headers fail in a dozen ways; they are counted elsewhere
            continue
    return found


def _histogram(values: Sequence[int], what: str, of: str) -> dict[str, Any] | None:
    if not values or min(values) == max(values):
        return None
    numbers = np.array(values)
    high = int(np.quantile(numbers, 0.99)) + 1
    edges = (
        np.arange(numbers.min(), high + 2) - 0.5 if high - numbers.min() < 40 else np.linspace(numbers.min(), high, 41)
    )
    with drawing() as (figure, axes):
        axes.hist(np.minimum(numbers, high), bins=edges.tolist(), color=SERIES[0])
        axes.set_title(what)
        axes.set_ylabel(of)
        low, middle, top = (int(np.quantile(numbers, share)) for share in (0.05, 0.5, 0.95))
        words = f"{middle} in the middle; nine of ten between {low} and {top}"
        return {"figure": svg(figure, f"Histogram of {what}: {words}."), "caption": f"{words}."}


def _groups_plot(s: int, groups: Mapping[str, Any]) -> dict[str, Any] | None:
    """Groups of a stage by their size; none for a single group."""
    sizes = np.array([group["size"] for group in groups.get("groups", ())])
    if len(sizes) < 2:
        return None
    with drawing() as (figure, axes):
        axes.hist(sizes, bins=min(40, len(sizes)), color=SERIES[s % len(SERIES)])
        axes.set_title(f"pairs of a group, stage {s}")
        axes.set_ylabel("groups")
        words = f"{len(sizes):,} groups of {sizes.min():,} to {sizes.max():,} pairs"
        return {"figure": svg(figure, f"Histogram of groups by size, stage {s}: {words}."), "caption": f"{words}."}
