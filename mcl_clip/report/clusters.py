"""Show what each stage groups and attends to.

Clusters are rows of images with keywords, with their flow between stages; neighbors are the nearest images of a query.
"""

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
from mcl_clip.report.thumbnails import TRAINING, Thumbnail, Thumbnails, shortened, training_images
from mcl_clip.report.view import RunView, Section
from mcl_clip.results.scores import agreement_text
from mcl_clip.results.text import SIDE_NAMES

MAX_SHOWN = 8  # clusters of a gallery
MAX_CENTRAL, MAX_RANDOM = 6, 6  # images of a cluster
MAX_LISTED = 100  # clusters of the table
MAX_BANDS = 10  # clusters of a column of the flow figure; the others are one band
MIN_NAMED_SHARE = 0.02  # of the pairs, from which a band has its name beside it
SHEET_IMAGES, SHEET_PX = 12, 64
QUERIES, NEAREST = 5, 5  # of each kind, and of each query
QUERY_TITLES = {"image": "Image queries", "text": "Text queries"}
_WORD = re.compile(r"[^\W_]{1,40}(?:['\u2019-][^\W_]{1,20})*")
MAX_TERMS = 200  # of the captions of a pair
MIN_SHARE = 0.15  # of a cluster's pairs that have a keyword
KEYWORDS = 5  # of a cluster
MIN_LIFT = 1.5  # how much more frequent a keyword is in the cluster than among all pairs


@dataclass(frozen=True)
class Keyword:
    """A word or pair of words, with the share of a cluster's pairs that have it, and that of all pairs."""

    word: str
    share: float
    share_of_all: float

    def __str__(self) -> str:
        return f"{self.word} {100 * self.share:.0f} % (all: {100 * self.share_of_all:.0f} %)"


Keywords = dict[int, list[Keyword]]  # by number of the cluster


def section(view: RunView, thumbnails: Thumbnails) -> Section | None:
    """Return galleries of all clustered stages, and the flow between them; None before the first clustering."""
    words: dict[tuple[int, str], Keywords] = {}
    galleries = []
    for s, side in view.clusterings:
        words[s, side] = keywords(view.sample.captions, view.assignments(s, side)[view.sample.rows])
        before = max((stage for stage, of_side in words if stage < s and of_side == side), default=None)
        gallery = _gallery(view, thumbnails, words, s, side, before)
        galleries.append({**gallery, "flow": None if before is None else _flow(view, words, before, s, side)})
    if not galleries:
        return None
    return Section(name="clusters", title="What each stage groups", content={"galleries": galleries})


def shown_clusters(sizes: Int64[np.ndarray, "clusters"], most: int = MAX_SHOWN) -> list[int]:
    """Return clusters from the largest to the smallest non-empty one, at even distances in this order."""
    order = np.argsort(-sizes, kind="stable")
    order = order[sizes[order] > 0]
    chosen = np.unique(np.linspace(0, len(order) - 1, min(most, len(order))).round().astype(int))
    return [int(cluster) for cluster in order[chosen]]


def _gallery(
    view: RunView,
    thumbnails: Thumbnails,
    words: Mapping[tuple[int, str], Keywords],
    s: int,
    side: str,
    before: int | None,
) -> dict[str, Any]:
    """Return a table of all clusters of a stage, and images of some; `before` is the stage clustered before it."""
    assignments, similarity = view.assignments(s, side), view.centroid_similarity(s, side)
    sizes, of_sample = np.bincount(assignments), assignments[view.sample.rows]
    filled = sizes[sizes > 0]
    table = [["cluster", view.run.unit, "keywords"]]
    for cluster in np.argsort(-sizes, kind="stable")[: min(MAX_LISTED, len(filled))].tolist():
        table.append([str(cluster), f"{sizes[cluster]:,}", "; ".join(map(str, words[s, side].get(cluster, ())))])
    clusters = []
    for cluster in shown_clusters(sizes):
        members = _most_central(of_sample == cluster, similarity)
        others = members[MAX_CENTRAL:]
        others = others[permutation(len(others), "drawn members", s, side, cluster)[:MAX_RANDOM]]
        origin = ""
        if before is not None:
            earlier = view.assignments(before, side)
            counts = np.bincount(earlier[assignments == cluster])
            origin = (
                f"from {np.count_nonzero(counts):,} of the {np.count_nonzero(np.bincount(earlier)):,} clusters of "
                f"stage {before}; the largest part, {100 * counts.max() / counts.sum():.0f} %, from "
                f"{_cluster_name(int(counts.argmax()), words[before, side])}"
            )
        clusters.append(
            {
                "number": cluster,
                "size": int(sizes[cluster]),
                "share": sizes[cluster] / len(assignments),
                "words": words[s, side].get(cluster, []),
                "central": [_pair_thumbnail(view, thumbnails, index) for index in members[:MAX_CENTRAL]],
                "random": [_pair_thumbnail(view, thumbnails, index) for index in others],
                "origin": origin,
            }
        )
    spread = f"{filled.min():,} to {filled.max():,} {view.run.unit}, median {np.median(filled):,.0f}"
    summary = f"{len(filled):,} clusters of {spread}."
    return {"stage": s, "what": SIDE_NAMES[side], "summary": summary, "clusters": clusters, "table": table}


def _most_central(
    is_member: Bool[np.ndarray, "sample"], similarity: Float32[np.ndarray, "sample"]
) -> Int64[np.ndarray, "members"]:
    """Return the members of a cluster, the nearest to its centroid first."""
    members = np.flatnonzero(is_member)
    return members[np.argsort(-similarity[members], kind="stable")]


def _pair_thumbnail(view: RunView, thumbnails: Thumbnails, index: int | np.integer) -> Thumbnail:
    """Request the image of a pair of the sample, described by its first caption."""
    row, captions = int(view.sample.rows[index]), view.sample.captions[index]
    return thumbnails.request(TRAINING, row, captions[0] if captions else f"pair {row}, whose caption cannot be shown")


def _cluster_name(cluster: int, words: Keywords) -> str:
    """Return the first two keywords of a cluster, or its number."""
    return ", ".join(keyword.word for keyword in words.get(cluster, ())[:2]) or f"cluster {cluster}"


def _flow(view: RunView, words: Mapping[tuple[int, str], Keywords], before: int, s: int, side: str) -> dict[str, Any]:
    """Return a figure of how the clusters of a stage pass into those of the next, and a sentence on their agreement."""
    bands, names = [], []
    for number in (before, s):
        largest, band_of_row = _bands(view.assignments(number, side))
        more = np.count_nonzero(np.bincount(view.assignments(number, side))) - len(largest)
        bands.append(band_of_row)
        of_bands = [_cluster_name(cluster, words[number, side]) for cluster in largest]
        names.append([*of_bands, f"{more:,} other clusters" if more else ""])
    shape = len(names[0]), len(names[1])
    counts = np.bincount(bands[0] * shape[1] + bands[1], minlength=shape[0] * shape[1]).reshape(shape)
    sentence = ""
    if s == before + 1 and (before, side) in view.run.agreement:
        agreement, if_random = view.run.agreement[before, side]
        sentence = (
            f"The clusters of stage {s} {agreement_text(agreement, if_random)} those of stage {before} (normalized "
            f"mutual information {agreement:.2f}; {if_random:.2f} if unrelated)."
        )
    return {
        "figure": _flow_figure(counts, names, (before, s), view.run.unit),
        "sentence": sentence,
        "stages": (before, s),
    }


def _bands(assignments: Integer[np.ndarray, "rows"]) -> tuple[list[int], Int64[np.ndarray, "rows"]]:
    """Return the largest clusters, and the band of each row: the index of its cluster among these, or the last band."""
    sizes = np.bincount(assignments)
    largest = [int(cluster) for cluster in np.argsort(-sizes, kind="stable")[:MAX_BANDS] if sizes[cluster]]
    band_of_cluster = np.full(len(sizes), len(largest), np.int64)
    band_of_cluster[largest] = np.arange(len(largest))
    return largest, band_of_cluster[assignments]


def _flow_figure(
    counts: Int64[np.ndarray, "before after"],
    names: Sequence[Sequence[str]],
    stages: tuple[int, int],
    unit: str = "pairs",
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
        alt = f"Flow of {unit} from the clusters of stage {stages[0]} to those of stage {stages[1]}. {listing}."
        return svg(figure, alt)


def contact_sheets(view: RunView) -> dict[str, np.ndarray]:
    """Return an image for each clustering, [height, width, 3] of uint8: a row of central members for each cluster."""
    if view.reader is None:
        return {}
    load, sheets = training_images(view.reader), {}
    for s, side in view.clusterings:
        sheet = np.full((MAX_SHOWN, SHEET_PX, SHEET_IMAGES, SHEET_PX, 3), 255, np.uint8)
        assignments, similarity = view.assignments(s, side), view.centroid_similarity(s, side)
        for line, cluster in enumerate(shown_clusters(np.bincount(assignments))):
            members = _most_central(assignments[view.sample.rows] == cluster, similarity)
            rows = view.sample.rows[np.sort(members[:SHEET_IMAGES])]
            for column, image in enumerate(load(rows.tolist())):
                if image is not None:
                    sheet[line, :, column] = np.asarray(image.resize((SHEET_PX, SHEET_PX), Image.Resampling.LANCZOS))
        name = f"clusters of {SIDE_NAMES[side]}, stage {s}"
        sheets[name] = sheet.reshape(MAX_SHOWN * SHEET_PX, SHEET_IMAGES * SHEET_PX, 3)
    return sheets


def neighbours_section(view: RunView, thumbnails: Thumbnails) -> Section | None:
    """Return the nearest images of some images and texts, in each embedded stage and in all; None without a stage."""
    stages = view.stages_with("embed")
    if not stages:
        return None
    titles = {side: title for side, title in QUERY_TITLES.items() if side == "image" or not view.run.images_only}
    models: dict[str, dict[str, Float32[np.ndarray, "sample dim"]]] = {}
    for s in stages:
        features = {side: view.features(s, side) for side in titles}
        models[f"stage {s}"] = {
            side: raw / np.maximum(np.linalg.norm(raw, axis=1, keepdims=True), 1e-12) for side, raw in features.items()
        }
    if len(stages) > 1:
        models["all stages"] = {side: view.combined(side) for side in titles}
    # Features of samples that could not be decoded are zeros.
    decoded = np.flatnonzero(np.all([features["image"].any(1) for features in models.values()], axis=0))
    drawn = decoded[permutation(len(decoded), "neighbour queries")[: 2 * QUERIES]].tolist()
    kinds = []
    for kind, queries in zip(titles, (drawn[:QUERIES], drawn[QUERIES:]), strict=False):
        shown = []
        for query in queries:
            captions, rows = view.sample.captions[query], []
            for name, features in models.items():
                scores = features["image"] @ features[kind][query]
                if kind == "image":
                    scores[query] = -np.inf  # it does not find itself
                nearest = np.argsort(-scores, kind="stable")[:NEAREST].tolist()
                images = [
                    {"image": _pair_thumbnail(view, thumbnails, other), "is_match": other == query} for other in nearest
                ]
                rows.append({"name": name, "images": images})
            more = f" (and {len(captions) - 1} more captions)" if kind == "text" and len(captions) > 1 else ""
            missing = "" if view.run.images_only else "a caption that cannot be shown"
            text = f"{shortened(captions[0])}{more}" if captions else missing
            image = _pair_thumbnail(view, thumbnails, query) if kind == "image" else None
            shown.append({"image": image, "text": text, "rows": rows})
        kinds.append({"kind": kind, "title": titles[kind], "queries": shown})
    content = {"kinds": kinds, "gallery": len(view.sample.rows), "total": view.sample.total}
    return Section(name="neighbours", title="Nearest neighbors by stage", content=content)


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


def keywords(captions: Sequence[Sequence[str]], clusters: Integer[np.ndarray, "pairs"]) -> Keywords:
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
            if len(kept) < KEYWORDS and used.isdisjoint(term.split()):
                kept.append(keyword)
                used.update(term.split())
        best[cluster] = kept
    return best
