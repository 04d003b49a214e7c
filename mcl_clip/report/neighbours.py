"""What each stage looks at: the nearest pictures of a few pictures and texts, stage by stage."""

from typing import Any

import numpy as np
from jaxtyping import Float32

from mcl_clip.core.distributed import permutation
from mcl_clip.report.clusters import pair_picture
from mcl_clip.report.section import Section
from mcl_clip.report.thumbnails import Thumbnails, shortened
from mcl_clip.report.view import RunView

QUERIES = 5  # of each kind
NEAREST = 5
KINDS = {"image": "Pictures like a picture", "text": "Pictures for a text"}

Sides = dict[str, Float32[np.ndarray, "sample dim"]]


def section(view: RunView, album: Thumbnails) -> Section | None:
    """Queries with their neighbours in each embedded stage and in all; none before the first embedding."""
    models = _models(view)
    if not models:
        return None
    good = np.flatnonzero(np.all([features["image"].any(1) for features in models.values()], axis=0))
    drawn = good[permutation(len(good), "neighbour queries")[: 2 * QUERIES]] if len(good) else good
    kinds = []
    for kind, places in zip(KINDS, (drawn[:QUERIES], drawn[QUERIES:]), strict=True):
        queries = [_query(view, album, models, kind, int(place)) for place in places]
        kinds.append({"kind": kind, "title": KINDS[kind], "queries": queries})
    return Section(
        name="neighbours",
        title="What each stage looks at",
        content={"kinds": kinds, "gallery": len(view.sample.rows), "total": view.sample.total},
    )


def _models(view: RunView) -> dict[str, Sides]:
    """Unit features of the sample by the name of a model: each stage, then all of them."""
    stages = view.stages_with("embed")
    models = {f"stage {s}": {side: _unit(view.features(s, side)) for side in KINDS} for s in stages}
    if len(stages) > 1:
        models["all stages"] = {side: view.combined(side) for side in KINDS}
    return models


def _unit(features: Float32[np.ndarray, "sample dim"]) -> Float32[np.ndarray, "sample dim"]:
    unit: np.ndarray = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    return unit


def _query(view: RunView, album: Thumbnails, models: dict[str, Sides], kind: str, place: int) -> dict[str, Any]:
    """A query and, for each model, its nearest pictures; a picture does not find itself."""
    captions = view.sample.captions[place]
    rows = []
    for name, features in models.items():
        scores = features["image"] @ features[kind][place]
        if kind == "image":
            scores[place] = -np.inf
        nearest = np.argsort(-scores, kind="stable")[:NEAREST]
        places = [
            {"picture": pair_picture(view, album, other), "own": int(other) == place, "score": float(scores[other])}
            for other in nearest
        ]
        rows.append({"name": name, "places": places})
    more = f" (and {len(captions) - 1} more captions)" if kind == "text" and len(captions) > 1 else ""
    return {
        "picture": pair_picture(view, album, place) if kind == "image" else None,
        "text": f"{shortened(captions[0])}{more}" if captions else "a caption that cannot be shown",
        "rows": rows,
    }
