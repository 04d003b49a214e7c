"""Show what each stage groups: its clusters as rows of images with their keywords, and their flow between stages."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int64, Integer
from markupsafe import Markup
from PIL import Image

from mcl_clip.core.distributed import permutation
from mcl_clip.report.figures import SERIES, TEXT, new_figure, svg
from mcl_clip.report.thumbnails import TRAINING, Thumbnail, Thumbnails, training_images
from mcl_clip.report.view import RunView, Section
from mcl_clip.results.scores import agreement_text
from mcl_clip.results.text import SIDE_NAMES

MAX_SHOWN = 8  # clusters of a gallery
MAX_CENTRAL, MAX_RANDOM = 6, 6  # images of a cluster
MAX_LISTED = 100  # clusters of the table
MAX_BANDS = 10  # clusters of a column of the flow figure; the others are one band
MIN_NAMED_SHARE = 0.02  # of the pairs, from which a band has its name beside it
SHEET_IMAGES, SHEET_PX = 12, 64
_WORD = re.compile(r"[^\W_]{1,40}(?:['\u2019-][^\W_]{1,20})*")
MAX_TERMS = 200  # of the captions of a pair
MIN_SHARE = 0.15  # of a cluster's pairs that have a keyword
MIN_LIFT = 1.5  # how much more frequent a keyword is in the cluster than among all pairs


@dataclass(frozen=True)
class Keyword:
    """A word or pair of words, with the share of a cluster's pairs that have it, and that of all pairs."""

    word: str
    share: float
    share_of_all: float

    def __str__(self) -> str:
        return f"{self.word} {100 * self.share:.0f} % (all: {100 * self.share_of_all:.0f} %)"


def section(view: RunView, thumbnails: Thumbnails) -> Section | None:
    """Return galleries of all clustered stages, and the flow between them; None before the first clustering."""
    clustered = [(s, side) for s in view.stages_with("cluster") for side in view.clustered_sides(s)]
    galleries = [_gallery(view, thumbnails, s, side) for s, side in clustered]
    if not galleries:
        return None
    return Section(name="clusters", title="What each stage groups", content={"galleries": galleries})


def shown_clusters(sizes: Int64[np.ndarray, "clusters"], most: int = MAX_SHOWN) -> list[int]:
    """Return clusters from the largest to the smallest non-empty one, at even distances in this order."""
    order = np.argsort(-sizes, kind="stable")
    order = order[sizes[order] > 0]
    chosen = np.unique(np.linspace(0, len(order) - 1, min(most, len(order))).round().astype(int))
    return [int(cluster) for cluster in order[chosen]]


def _gallery(view: RunView, thumbnails: Thumbnails, s: int, side: str) -> dict[str, Any]:
    assignments = view.assignments(s, side)
    sizes = np.bincount(assignments)
    filled, order = sizes[sizes > 0], np.argsort(-sizes, kind="stable")
    sample_clusters = assignments[view.sample.rows]
    words = keywords(view.sample.captions, sample_clusters)
    similarity = view.centroid_similarity(s, side)
    earlier = [number for number in view.stages_with("cluster") if number < s and side in view.clustered_sides(number)]
    before = earlier[-1] if earlier else None
    words_before: Mapping[int, Sequence[Keyword]] = {}
    if before is not None:
        words_before = keywords(view.sample.captions, view.assignments(before, side)[view.sample.rows], 2)
    table = [["cluster", "pairs", "keywords"]]
    for cluster in order[:MAX_LISTED].tolist():
        if sizes[cluster]:
            table.append([str(cluster), f"{sizes[cluster]:,}", "; ".join(map(str, words.get(cluster, ())))])
    clusters = []
    for cluster in shown_clusters(sizes):
        central, others = _members(sample_clusters == cluster, similarity, (s, side, cluster))
        clusters.append(
            {
                "number": cluster,
                "size": int(sizes[cluster]),
                "share": sizes[cluster] / len(assignments),
                "words": words.get(cluster, []),
                "central": [pair_thumbnail(view, thumbnails, index) for index in central],
                "random": [pair_thumbnail(view, thumbnails, index) for index in others],
                "origin": ""
                if before is None
                else _origin(view.assignments(before, side), assignments == cluster, before, words_before),
            }
        )
    return {
        "stage": s,
        "what": SIDE_NAMES[side],
        "summary": f"{len(filled):,} clusters of {filled.min():,} to {filled.max():,} pairs, median "
        f"{np.median(filled):,.0f}.",
        "clusters": clusters,
        "table": table,
        "flow": None if before is None else _flow(view, before, s, side),
    }


def _members(
    is_member: Bool[np.ndarray, "sample"], similarity: Float32[np.ndarray, "sample"], name: tuple[str | int, ...]
) -> tuple[Int64[np.ndarray, "central"], Int64[np.ndarray, "random"]]:
    """Return the members of a cluster that are nearest to its centroid, and some random ones of the others."""
    members = np.flatnonzero(is_member)
    members = members[np.argsort(-similarity[members], kind="stable")]
    central, others = members[:MAX_CENTRAL], members[MAX_CENTRAL:]
    if len(others):
        others = others[permutation(len(others), "drawn members", *name)[:MAX_RANDOM]]
    return central, others


def pair_thumbnail(view: RunView, thumbnails: Thumbnails, index: int | np.integer) -> Thumbnail:
    """Request the image of a pair of the sample, described by its first caption."""
    row, captions = int(view.sample.rows[index]), view.sample.captions[index]
    return thumbnails.request(TRAINING, row, captions[0] if captions else f"pair {row}, whose caption cannot be shown")


def _origin(
    assignments: Integer[np.ndarray, "rows"],
    is_member: Bool[np.ndarray, "rows"],
    before: int,
    words: Mapping[int, Sequence[Keyword]],
) -> str:
    """Say from which clusters of stage `before`, with its assignments and keywords, the rows of a cluster come."""
    counts = np.bincount(assignments[is_member])
    largest = int(counts.argmax())
    total = int(np.count_nonzero(np.bincount(assignments)))
    return (
        f"from {np.count_nonzero(counts):,} of the {total:,} clusters of stage {before}; the largest part, "
        f"{100 * counts[largest] / counts.sum():.0f} %, from {_cluster_name(largest, words)}"
    )


def _cluster_name(cluster: int, words: Mapping[int, Sequence[Keyword]]) -> str:
    """Return the first two keywords of a cluster, or its number."""
    return ", ".join(keyword.word for keyword in words.get(cluster, ())[:2]) or f"cluster {cluster}"


def _flow(view: RunView, before: int, s: int, side: str) -> dict[str, Any]:
    """Return a figure of how the clusters of a stage pass into those of the next, and a sentence on their agreement."""
    kept, bands, names = [], [], []
    for number in (before, s):
        assignments = view.assignments(number, side)
        largest, band_of_row = _bands(assignments)
        words = keywords(view.sample.captions, assignments[view.sample.rows], 2)
        more = np.count_nonzero(np.bincount(assignments)) - len(largest)
        kept.append(largest)
        bands.append(band_of_row)
        names.append(
            [*(_cluster_name(cluster, words) for cluster in largest), f"{more:,} other clusters" if more else ""]
        )
    shape = len(kept[0]) + 1, len(kept[1]) + 1
    counts = np.bincount(bands[0] * shape[1] + bands[1], minlength=shape[0] * shape[1]).reshape(shape)
    sentence = ""
    if s == before + 1 and (before, side) in view.run.agreement:
        agreement, if_random = view.run.agreement[before, side]
        sentence = (
            f"The clusters of stage {s} {agreement_text(agreement, if_random)} those of stage {before} (normalized "
            f"mutual information {agreement:.2f}; {if_random:.2f} if unrelated)."
        )
    return {"figure": _flow_figure(counts, names, (before, s)), "sentence": sentence, "stages": (before, s)}


def _bands(assignments: Integer[np.ndarray, "rows"]) -> tuple[list[int], Int64[np.ndarray, "rows"]]:
    """Return the largest clusters, and the band of each row: the index of its cluster among these, or the last band."""
    sizes = np.bincount(assignments)
    largest = [int(cluster) for cluster in np.argsort(-sizes, kind="stable")[:MAX_BANDS] if sizes[cluster]]
    band_of_cluster = np.full(len(sizes), len(largest), np.int64)
    band_of_cluster[largest] = np.arange(len(largest))
    return largest, band_of_cluster[assignments]


def _flow_figure(
    counts: Int64[np.ndarray, "before after"], names: Sequence[Sequence[str]], stages: tuple[int, int]
) -> Markup:
    """Plot bands between two columns of clusters, as thick as they have rows."""
    gap = 0.02 * counts.sum()
    sizes = counts.sum(1), counts.sum(0)
    tops = [np.concatenate([[0], np.cumsum(size + gap * (size > 0))]) for size in sizes]
    x = np.linspace(0, 1, 30)
    bend = x * x * (3 - 2 * x)  # smoothstep
    with new_figure(560, 400) as (figure, axes):
        axes.set_axis_off()
        left, right = tops[0][:-1].copy(), tops[1][:-1].copy()
        for i, j in np.argwhere(counts):
            low = left[i] + (right[j] - left[i]) * bend
            axes.fill_between(x, low, low + counts[i, j], color=SERIES[i % len(SERIES)], alpha=0.35, linewidth=0)
            left[i] += counts[i, j]
            right[j] += counts[i, j]
        for column, (size, top, labels) in enumerate(zip(sizes, tops, names, strict=True)):
            for band, label in enumerate(labels):
                if size[band]:
                    axes.barh(top[band], 0.02, size[band], column - 0.01, align="edge", color=TEXT)
                if size[band] > MIN_NAMED_SHARE * counts.sum():
                    position, alignment = (-0.03, "right") if column == 0 else (1.03, "left")
                    middle = top[band] + size[band] / 2
                    axes.text(position, middle, label[:28], ha=alignment, va="center", fontsize=8)
            axes.text(column, -2 * gap, f"stage {stages[column]}", ha="center", va="bottom", fontsize=9)
        axes.set_xlim(-0.55, 1.55)
        axes.set_ylim(max(top[-1] for top in tops), -4 * gap)
        listing = "; ".join(
            f"stage {stage}: {', '.join(filter(None, of_stage))}" for stage, of_stage in zip(stages, names, strict=True)
        )
        alt = f"Flow of pairs from the clusters of stage {stages[0]} to those of stage {stages[1]}. {listing}."
        return svg(figure, alt)


def contact_sheets(view: RunView) -> dict[str, np.ndarray]:
    """Return an image for each clustering, [height, width, 3] of uint8: a row of central members for each cluster."""
    if view.reader is None:
        return {}
    load, sheets = training_images(view.reader), {}
    clusterings = [(s, side) for s in view.stages_with("cluster") for side in view.clustered_sides(s)]
    for s, side in clusterings:
        sheet = np.full((MAX_SHOWN, SHEET_PX, SHEET_IMAGES, SHEET_PX, 3), 255, np.uint8)
        assignments = view.assignments(s, side)
        similarity, sample_clusters = view.centroid_similarity(s, side), assignments[view.sample.rows]
        for line, cluster in enumerate(shown_clusters(np.bincount(assignments))):
            members = np.flatnonzero(sample_clusters == cluster)
            members = np.sort(members[np.argsort(-similarity[members], kind="stable")][:SHEET_IMAGES])
            for column, image in enumerate(load(view.sample.rows[members].tolist())):
                if image is not None:
                    sheet[line, :, column] = np.asarray(image.resize((SHEET_PX, SHEET_PX), Image.Resampling.LANCZOS))
        name = f"clusters of {SIDE_NAMES[side]}, stage {s}"
        sheets[name] = sheet.reshape(MAX_SHOWN * SHEET_PX, SHEET_IMAGES * SHEET_PX, 3)
    return sheets


def terms(texts: Iterable[str]) -> set[str]:
    """Return the different words, and pairs of adjacent words, of the captions of a pair: lower case, in any script."""
    found: set[str] = set()
    for text in texts:
        words = [match[0] for match in _WORD.finditer(text.lower())]
        found.update(words)
        found.update(f"{one} {two}" for one, two in pairwise(words))
        if len(found) > MAX_TERMS:
            break
    return found


def keywords(
    captions: Sequence[Sequence[str]], clusters: Integer[np.ndarray, "pairs"], most: int = 5
) -> dict[int, list[Keyword]]:
    """Return the keywords of each cluster, by class-based tf-idf (BERTopic, Grootendorst 2022, arXiv 2203.05794).

    A term scores tf log(1 + A / f): tf is its count in the cluster, f its count over all clusters, A the mean number of
    terms of a cluster. A pair counts a term once, in however many captions. Left out are terms of few pairs, terms that
    are hardly more frequent in the cluster than elsewhere, and terms that share a word with a better one.
    """
    of_cluster: dict[int, Counter[str]] = {}
    for texts, cluster in zip(captions, clusters.tolist(), strict=True):
        of_cluster.setdefault(cluster, Counter()).update(terms(texts))
    totals = sum(of_cluster.values(), Counter())
    mean = totals.total() / max(1, len(of_cluster))
    sizes = np.bincount(clusters) if len(clusters) else np.zeros(0, np.int64)
    best = {}
    for cluster, counts in of_cluster.items():
        scored = []
        for term, count in counts.items():
            share, share_of_all = count / int(sizes[cluster]), totals[term] / len(captions)
            if count > 1 and share >= max(MIN_SHARE, MIN_LIFT * share_of_all):
                score = count * math.log1p(mean / totals[term])
                scored.append((-score, term, Keyword(term, share, share_of_all)))
        kept: list[Keyword] = []
        used: set[str] = set()
        for _, term, keyword in sorted(scored, key=lambda entry: entry[:2]):
            if len(kept) < most and used.isdisjoint(term.split()):
                kept.append(keyword)
                used.update(term.split())
        best[cluster] = kept
    return best
