"""Show what each stage attends to: the nearest images of a few images and texts, stage by stage."""

from typing import Any

import numpy as np
from jaxtyping import Float32

from mcl_clip.core.distributed import permutation
from mcl_clip.report.clusters import pair_thumbnail
from mcl_clip.report.thumbnails import Thumbnails, shortened
from mcl_clip.report.view import RunView, Section

QUERIES = 5  # of each kind
NEAREST = 5
KINDS = {"image": "Image queries", "text": "Text queries"}

Features = dict[str, Float32[np.ndarray, "sample dim"]]


def section(view: RunView, thumbnails: Thumbnails) -> Section | None:
    """Return queries with their neighbors in each embedded stage and in all; None before the first embedding."""
    stages = view.stages_with("embed")
    if not stages:
        return None
    models: dict[str, Features] = {}
    for s in stages:
        raw = {side: view.features(s, side) for side in KINDS}
        models[f"stage {s}"] = {
            side: features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
            for side, features in raw.items()
        }
    if len(stages) > 1:
        models["all stages"] = {side: view.combined(side) for side in KINDS}
    # Features of samples that could not be decoded are zeros.
    decoded = np.flatnonzero(np.all([features["image"].any(1) for features in models.values()], axis=0))
    sampled = decoded[permutation(len(decoded), "neighbour queries")[: 2 * QUERIES]] if len(decoded) else decoded
    kinds = []
    for kind, indices in zip(KINDS, (sampled[:QUERIES], sampled[QUERIES:]), strict=True):
        queries = [_query(view, thumbnails, models, kind, int(index)) for index in indices]
        kinds.append({"kind": kind, "title": KINDS[kind], "queries": queries})
    return Section(
        name="neighbours",
        title="Nearest neighbors by stage",
        content={"kinds": kinds, "gallery": len(view.sample.rows), "total": view.sample.total},
    )


def _query(view: RunView, thumbnails: Thumbnails, models: dict[str, Features], kind: str, index: int) -> dict[str, Any]:
    """Return a query and its nearest images in each model; an image does not find itself."""
    captions = view.sample.captions[index]
    rows = []
    for name, features in models.items():
        scores = features["image"] @ features[kind][index]
        if kind == "image":
            scores[index] = -np.inf
        nearest = np.argsort(-scores, kind="stable")[:NEAREST]
        images = [
            {"image": pair_thumbnail(view, thumbnails, other), "is_match": int(other) == index} for other in nearest
        ]
        rows.append({"name": name, "images": images})
    more = f" (and {len(captions) - 1} more captions)" if kind == "text" and len(captions) > 1 else ""
    return {
        "image": pair_thumbnail(view, thumbnails, index) if kind == "image" else None,
        "text": f"{shortened(captions[0])}{more}" if captions else "a caption that cannot be shown",
        "rows": rows,
    }
