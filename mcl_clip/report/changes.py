"""Queries that stage 0 gets wrong and all stages together get right, and the reverse."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, Integer
from torch import Tensor

from mcl_clip.eval.classification import ClassificationTask, class_scores
from mcl_clip.eval.retrieval import RetrievalTask
from mcl_clip.eval.task import Task
from mcl_clip.report.section import Section
from mcl_clip.report.thumbnails import Picture, Thumbnails, shortened
from mcl_clip.report.view import RunView
from mcl_clip.results.record import COMBINED, Result, compare

EXAMPLES = 4
SETS_WITH_EXAMPLES = 4
RANKS = {RetrievalTask: "image_retrieval", ClassificationTask: "ranks"}
METRICS = {RetrievalTask: "image_retrieval_recall@1", ClassificationTask: "acc1"}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A query, its right answer, and what stage 0 and all stages put first; pictures where answers are pictures."""

    query: str
    right: Picture
    first: str | Picture
    together: str | Picture


def section(view: RunView, album: Thumbnails) -> Section | None:
    """Counts and examples for each set that was measured on stage 0 and on all stages; none before that."""
    sets: list[dict[str, Any]] = []
    for found in view.run.results.values():
        if not {"stage-0", COMBINED} <= found.keys() or len(view.run.stages) < 2:
            continue
        name = found[COMBINED].record["dataset"]
        task = view.tasks.get(name)
        if task is not None and type(task) in RANKS:
            has_examples = sum(bool(other["mended"] or other["spoiled"]) for other in sets) < SETS_WITH_EXAMPLES
            sets.append(_of_set(view, album, task, found["stage-0"], found[COMBINED], examples=has_examples))
    sets = [of_set for of_set in sets if of_set["summary"]]
    return Section(name="mended", title="Mended and spoiled", content={"sets": sets}) if sets else None


def _of_set(
    view: RunView, album: Thumbnails, task: Task, first: Result, together: Result, *, examples: bool
) -> dict[str, Any]:
    ranks = [result.outcomes.get(RANKS[type(task)]) for result in (first, together)]
    paired = compare(together, first, METRICS[type(task)])
    if ranks[0] is None or ranks[1] is None or ranks[0].shape != ranks[1].shape or paired is None:
        return {"summary": "", "mended": [], "spoiled": []}
    mended, spoiled = (_worst(wrong, right) for wrong, right in ((ranks[0], ranks[1]), (ranks[1], ranks[0])))
    is_words = isinstance(task, RetrievalTask)
    summary = (
        f"Of {len(ranks[0]):,} {'texts' if is_words else 'pictures'}, all stages together get {len(mended):,} right "
        f"that stage 0 gets wrong, and {len(spoiled):,} wrong that it gets right: {100 * paired.difference:+.1f} "
        f"points [{100 * paired.low:+.1f}, {100 * paired.high:+.1f}]."
    )
    case = _case_maker(view, album, task) if examples else None
    return {
        "name": task.name,
        "answers": "picture" if is_words else "class",
        "summary": summary,
        "mended": [case(int(query)) for query in mended[:EXAMPLES]] if case else [],
        "spoiled": [case(int(query)) for query in spoiled[:EXAMPLES]] if case else [],
    }


def _worst(wrong: Integer[np.ndarray, "queries"], right: Integer[np.ndarray, "queries"]) -> Int64[np.ndarray, "some"]:
    """Queries that come first in `right` and not in `wrong`, the furthest behind in `wrong` first."""
    queries = np.flatnonzero((right == 0) & (wrong > 0))
    return queries[np.argsort(-wrong[queries], kind="stable")].astype(np.int64)


def _case_maker(view: RunView, album: Thumbnails, task: Task) -> Callable[[int], Case] | None:
    """Looks up what a query of a set gets; none where features are not stored."""
    stages = view.stages_with("eval")
    features = [view.set_features(0, task.name), view.combined_set_features(task.name, stages)] if stages else []
    if len(features) < 2 or not all(features):
        return None
    if isinstance(task, RetrievalTask):
        return lambda query: _retrieval_case(album, task, features, query)
    if isinstance(task, ClassificationTask):
        return lambda query: _class_case(album, task, features, query)
    return None


def _retrieval_case(album: Thumbnails, task: RetrievalTask, features: list[Any], query: int) -> Case:
    captions, of = task.data.captions, task.data.image_of_text

    def shown(image: int) -> Picture:
        return album.want(task.name, image, captions[image][0] if captions[image] else f"picture {image}")

    def best(sides: dict[str, Tensor]) -> int:
        images = torch.nn.functional.normalize(sides["image"].float(), dim=1)
        return int((images @ sides["text"][query].float()).argmax())

    first, together = (best(sides) for sides in features)
    return Case(
        query=shortened(task.data.texts[query]),
        right=shown(int(of[query])),
        first=shown(first),
        together=shown(together),
    )


def _class_case(album: Thumbnails, task: ClassificationTask, features: list[Any], query: int) -> Case:
    names = task.data.classnames
    first, together = (
        names[int(class_scores(sides["image"][query : query + 1], sides["text"], len(names)).argmax())]
        for sides in features
    )
    right = names[int(task.data.labels[query])]
    return Case(query=right, right=album.want(task.name, query, right), first=first, together=together)
