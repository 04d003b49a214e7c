"""What each stage groups: its clusters as rows of pictures with their words, and how they pass into the next ones."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int64, Integer
from markupsafe import Markup
from matplotlib.axes import Axes
from PIL import Image

from mcl_clip.core.distributed import permutation
from mcl_clip.report.figures import SERIES, TEXT, drawing, svg
from mcl_clip.report.section import Section
from mcl_clip.report.thumbnails import TRAINING, Picture, Thumbnails, pictures_of_pairs
from mcl_clip.report.view import RunView
from mcl_clip.report.words import Word, telling_words

SHOWN = 8  # clusters of a gallery
CENTRAL, DRAWN = 6, 6
LISTED = 100  # clusters of the table
BANDS = 10  # clusters of a side of the flow picture; the others are one
THINNEST = 0.02  # share of the pairs from which a band has a name
SHEET, SHEET_PX = 12, 64
WHAT = {"image": "pictures", "text": "captions"}


def section(view: RunView, album: Thumbnails) -> Section | None:
    """Galleries of all clustered stages, and the flow between them; none before the first clustering."""
    galleries: list[dict[str, Any]] = []
    for s in view.stages_with("cluster"):
        galleries += [_gallery(view, album, s, side) for side in view.clustered_sides(s)]
    if not galleries:
        return None
    return Section(name="clusters", title="What each stage groups", content={"galleries": galleries})


def shown_clusters(sizes: Int64[np.ndarray, "clusters"], most: int = SHOWN) -> list[int]:
    """Clusters from the largest to the smallest that has rows, at even distances in this order."""
    order = np.argsort(-sizes, kind="stable")
    order = order[sizes[order] > 0]
    places = np.unique(np.linspace(0, len(order) - 1, min(most, len(order))).round().astype(int))
    return [int(cluster) for cluster in order[places]]


def _gallery(view: RunView, album: Thumbnails, s: int, side: str) -> dict[str, Any]:
    assignments = view.assignments(s, side)
    sizes = np.bincount(assignments)
    of_sample = assignments[view.sample.rows]
    words = telling_words(view.sample.captions, of_sample)
    closeness = view.closeness(s, side)
    earlier = [number for number in view.stages_with("cluster") if number < s and side in view.clustered_sides(number)]
    before = earlier[-1] if earlier else None
    return {
        "stage": s,
        "what": WHAT[side],
        "summary": _summary(sizes),
        "clusters": [
            {
                "number": cluster,
                "size": int(sizes[cluster]),
                "share": sizes[cluster] / len(assignments),
                "words": words.get(cluster, []),
                "pictures": _members(view, album, of_sample == cluster, closeness, (s, side, cluster)),
                "origin": "" if before is None else _origin(view, before, side, assignments == cluster),
            }
            for cluster in shown_clusters(sizes)
        ],
        "all": _all_clusters(sizes, words),
        "flow": None if before is None else _flow(view, before, s, side),
    }


def _summary(sizes: Int64[np.ndarray, "clusters"]) -> str:
    filled = sizes[sizes > 0]
    return (
        f"{len(filled):,} clusters: the smallest of {filled.min():,}, the median of {np.median(filled):,.0f}, the "
        f"largest of {filled.max():,} pairs."
    )


def _members(
    view: RunView,
    album: Thumbnails,
    inside: Bool[np.ndarray, "sample"],
    closeness: Float32[np.ndarray, "sample"],
    name: tuple[str | int, ...],
) -> dict[str, list[Picture]]:
    """The members of the sample that are nearest to the centre, and some of the others."""
    members = np.flatnonzero(inside)
    members = members[np.argsort(-closeness[members], kind="stable")]
    central, others = members[:CENTRAL], members[CENTRAL:]
    drawn = others[permutation(len(others), "drawn members", *name)[:DRAWN]] if len(others) else others
    return {
        "central": [pair_picture(view, album, place) for place in central],
        "drawn": [pair_picture(view, album, place) for place in drawn],
    }


def pair_picture(view: RunView, album: Thumbnails, place: int | np.integer) -> Picture:
    """The picture of a pair of the sample, with its first caption as its description."""
    row, captions = int(view.sample.rows[place]), view.sample.captions[place]
    return album.want(TRAINING, row, captions[0] if captions else f"pair {row}, whose caption cannot be shown")


def _origin(view: RunView, before: int, side: str, inside: Bool[np.ndarray, "rows"]) -> str:
    """From which clusters of an earlier stage the rows of a cluster come."""
    counts = np.bincount(view.assignments(before, side)[inside])
    largest, total = int(counts.argmax()), int(counts.sum())
    words = telling_words(view.sample.captions, view.assignments(before, side)[view.sample.rows], 2)
    name = _name(largest, words)
    of_all = int(np.count_nonzero(np.bincount(view.assignments(before, side))))
    return (
        f"from {np.count_nonzero(counts):,} of the {of_all:,} clusters of stage {before}; the largest part, "
        f"{100 * counts[largest] / total:.0f} %, from {name}"
    )


def _name(cluster: int, words: Mapping[int, Sequence[Word]]) -> str:
    """What a cluster is called: its two most telling words, or its number."""
    found = [word.word for word in words.get(cluster, ())][:2]
    return ", ".join(found) if found else f"cluster {cluster}"


def _all_clusters(sizes: Int64[np.ndarray, "clusters"], words: Mapping[int, Sequence[Word]]) -> list[list[str]]:
    """A table of the largest clusters with their words."""
    order = [int(cluster) for cluster in np.argsort(-sizes, kind="stable") if sizes[cluster]]
    rows = [
        [str(cluster), f"{sizes[cluster]:,}", "; ".join(str(word) for word in words.get(cluster, ()))]
        for cluster in order[:LISTED]
    ]
    return [["cluster", "pairs", "most telling words"], *rows]


def _flow(view: RunView, before: int, s: int, side: str) -> dict[str, Any]:
    """How the clusters of a stage pass into those of the next: a picture, and a sentence."""
    sides = [view.assignments(number, side) for number in (before, s)]
    kept = [_largest(numbers) for numbers in sides]
    places = [_places(numbers, largest) for numbers, largest in zip(sides, kept, strict=True)]
    widths = [len(largest) + 1 for largest in kept]
    counts = np.bincount(places[0] * widths[1] + places[1], minlength=widths[0] * widths[1]).reshape(widths)
    names = [_names(view, number, side, largest) for number, largest in zip((before, s), kept, strict=True)]
    found, unrelated = view.run.agreement.get((before, side), (None, None)) if s == before + 1 else (None, None)
    sentence = ""
    if found is not None and unrelated is not None:
        nature = (
            f"stage {s} groups by something else"
            if found - unrelated < 0.2 * (1 - unrelated)
            else f"stage {s} groups in part as stage {before} does"
        )
        sentence = f"Agreement {found:.2f} (normalised mutual information; {unrelated:.2f} if unrelated): {nature}."
    return {"figure": _flow_figure(counts, names, (before, s)), "sentence": sentence, "stages": (before, s)}


def _largest(assignments: Integer[np.ndarray, "rows"]) -> list[int]:
    sizes = np.bincount(assignments)
    return [int(cluster) for cluster in np.argsort(-sizes, kind="stable")[:BANDS] if sizes[cluster]]


def _places(assignments: Integer[np.ndarray, "rows"], kept: Sequence[int]) -> Int64[np.ndarray, "rows"]:
    """The place of each row's cluster among `kept`; the last place for all others."""
    place_of = np.full(int(assignments.max()) + 1, len(kept), np.int64)
    place_of[list(kept)] = np.arange(len(kept))
    places: np.ndarray = place_of[assignments]
    return places


def _names(view: RunView, s: int, side: str, kept: Sequence[int]) -> list[str]:
    assignments = view.assignments(s, side)
    words = telling_words(view.sample.captions, assignments[view.sample.rows], 2)
    more = np.count_nonzero(np.bincount(assignments)) - len(kept)
    return [*(_name(cluster, words) for cluster in kept), f"{more:,} other clusters" if more else ""]


def _flow_figure(
    counts: Int64[np.ndarray, "before after"], names: Sequence[Sequence[str]], stages: tuple[int, int]
) -> Markup:
    """Bands between two columns of clusters, as thick as they have rows."""
    gap = 0.02 * counts.sum()
    sizes = counts.sum(1), counts.sum(0)
    tops = [np.concatenate([[0], np.cumsum(size + gap * (size > 0))]) for size in sizes]
    with drawing(560, 400) as (figure, axes):
        axes.set_axis_off()
        left, right = tops[0][:-1].copy(), tops[1][:-1].copy()
        for i, j in np.ndindex(*counts.shape):
            if counts[i, j]:
                _band(axes, float(left[i]), float(right[j]), float(counts[i, j]), SERIES[i % len(SERIES)])
                left[i] += counts[i, j]
                right[j] += counts[i, j]
        for column, (size, top, labels) in enumerate(zip(sizes, tops, names, strict=True)):
            for place, label in enumerate(labels):
                if size[place]:
                    axes.barh(top[place], 0.02, size[place], column - 0.01, align="edge", color=TEXT)
                if size[place] > THINNEST * counts.sum():
                    at, side = (-0.03, "right") if column == 0 else (1.03, "left")
                    axes.text(at, top[place] + size[place] / 2, label[:28], ha=side, va="center", fontsize=8)
            axes.text(column, -2 * gap, f"stage {stages[column]}", ha="center", va="bottom", fontsize=9)
        axes.set_xlim(-0.55, 1.55)
        axes.set_ylim(max(top[-1] for top in tops), -4 * gap)
        named = "; ".join(
            f"stage {stage}: {', '.join(filter(None, of))}" for stage, of in zip(stages, names, strict=True)
        )
        return svg(
            figure, f"How the pairs of the clusters of stage {stages[0]} pass into those of stage {stages[1]}. {named}."
        )


def _band(axes: Axes, left: float, right: float, width: float, colour: str) -> None:
    x = np.linspace(0, 1, 30)
    bend = x * x * (3 - 2 * x)
    low = left + (right - left) * bend
    axes.fill_between(x, low, low + width, color=colour, alpha=0.35, linewidth=0)


def contact_sheets(view: RunView) -> dict[str, np.ndarray]:
    """A picture a stage, [height, width, 3] of bytes: a row of central members for each shown cluster, for trackers."""
    if view.reader is None:
        return {}
    sheets = {}
    for s in view.stages_with("cluster"):
        for side in view.clustered_sides(s):
            sheet = np.full((SHOWN * SHEET_PX, SHEET * SHEET_PX, 3), 255, np.uint8)
            assignments = view.assignments(s, side)
            closeness, of_sample = view.closeness(s, side), assignments[view.sample.rows]
            for line, cluster in enumerate(shown_clusters(np.bincount(assignments))):
                members = np.flatnonzero(of_sample == cluster)
                members = np.sort(members[np.argsort(-closeness[members], kind="stable")][:SHEET])
                images = pictures_of_pairs(view.reader)(view.sample.rows[members].tolist())
                for column, image in enumerate(images):
                    if image is not None:
                        small = image.resize((SHEET_PX, SHEET_PX), Image.Resampling.LANCZOS)
                        place = (
                            slice(line * SHEET_PX, (line + 1) * SHEET_PX),
                            slice(column * SHEET_PX, (column + 1) * SHEET_PX),
                        )
                        sheet[place] = np.asarray(small)
            sheets[f"clusters of {WHAT[side]}, stage {s}"] = sheet
    return sheets
