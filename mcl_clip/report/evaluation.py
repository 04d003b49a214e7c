"""Show all results of each set, which queries all stages together fix, and a run beside its controls."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from markupsafe import Markup
from matplotlib.ticker import NullFormatter

from mcl_clip.core.files import DONE, read_json, read_jsonl
from mcl_clip.eval.classification import ClassificationTask, class_scores
from mcl_clip.eval.retrieval import RetrievalTask
from mcl_clip.report.figures import SERIES, TEXT, new_figure, svg
from mcl_clip.report.thumbnails import Thumbnails, shortened
from mcl_clip.report.view import EXPERIMENT, RunView, Section
from mcl_clip.results.record import COMBINED, Result, RunRecord, read_run
from mcl_clip.results.scores import compare, difference_text, headline_metrics, shown_metrics, sizes, verdict
from mcl_clip.results.text import METRICS, cell, format_percent, label_title, metric_title, trade_rows

DIRECTIONS = {"image_retrieval": "text to image", "text_retrieval": "image to text"}
GROUP_METRIC = "accuracy/"  # of a set of pairs
CURVE_POINTS = 100
MAX_MATRIX_CLASSES = 40  # of a confusion matrix; with more, the most confused pairs are listed
MAX_NAMED_CLASSES = 20
CONFUSED_PAIRS = 12
EXAMPLES, SETS_WITH_EXAMPLES = 4, 4
STAGES_ARM = "mcl"  # of an experiment: the arm that controls are compared with


def section(view: RunView, thumbnails: Thumbnails) -> Section | None:  # noqa: ARG001
    """Return each set with its tables and plots; None before anything is evaluated."""
    sets = []
    for of_set in view.run.results.values():
        labels = [label for label in view.run.labels if label in of_set] or list(of_set)
        first, metrics = of_set[labels[0]], shown_metrics(of_set.values())
        titles = [Markup(metric_title(metric)) for metric in metrics]  # escaped by `metric_title`
        rows = [[label_title(label), *(cell(of_set[label], metric) for metric in metrics)] for label in labels]
        sets.append(
            {
                "name": first.dataset,
                "sizes": sizes(first),
                "table": [["", *titles], *rows],
                "curves": [figure for side in DIRECTIONS if (figure := _recall_figure(of_set, labels, side))],
                "groups": _group_table(of_set, labels),
                "confusions": _confusions(view, first.dataset, labels),
            }
        )
    return Section(name="evaluation", title="Evaluation", content={"sets": sets}) if sets else None


def _recall_figure(of_set: Mapping[str, Result], labels: Sequence[str], side: str) -> Markup | None:
    """Plot the share of queries with a right answer among the first k, over k."""
    ranks = {label: of_set[label].outcomes[side] for label in labels if side in of_set[label].outcomes}
    if not ranks:
        return None
    most = max(2, *(int(of_label.max()) + 1 for of_label in ranks.values()))
    ks = np.unique(np.geomspace(1, most, CURVE_POINTS).round().astype(np.int64))
    with new_figure() as (figure, axes):
        for label, of_label in ranks.items():
            color = TEXT if label == COMBINED else SERIES[int(label.removeprefix("stage-")) % len(SERIES)]
            recalls = 100 * np.searchsorted(np.sort(of_label), ks) / len(of_label)
            axes.plot(ks, recalls, color=color, label=label_title(label))
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(0, 102)
        axes.set_xlabel("k")
        axes.set_title(f"{DIRECTIONS[side]}: recall@k, %")
        axes.legend()
        at_10 = ", ".join(
            f"{label_title(label)} {100 * np.mean(of_label < 10):.1f} %" for label, of_label in ranks.items()
        )
        name = of_set[labels[0]].dataset
        return svg(figure, f"Recall@k of {name}, {DIRECTIONS[side]}, over k. At 10: {at_10}.")


def _group_table(of_set: Mapping[str, Result], labels: Sequence[str]) -> list[list[str]]:
    """Return the accuracy on each group of a set of pairs, a column for each model; empty for other sets."""
    metrics = [name for name in of_set[labels[0]].record["metrics"] if name.startswith(GROUP_METRIC)]
    rows = [[name.removeprefix(GROUP_METRIC), *(cell(of_set[label], name) for label in labels)] for name in metrics]
    return [["group", *map(label_title, labels)], *rows] if rows else []


def _confusions(view: RunView, name: str, labels: Sequence[str]) -> list[dict[str, Any]]:
    """Return the confusion of classes under the first and the last model; empty without classes or stored features."""
    task = view.tasks.get(name)
    stages = [int(label.removeprefix("stage-")) for label in labels if label != COMBINED]
    if not isinstance(task, ClassificationTask) or not all(view.set_features(s, name) for s in stages):
        return []
    confusions = []
    for label in dict.fromkeys((labels[0], labels[-1])):
        of_label = stages if label == COMBINED else [int(label.removeprefix("stage-"))]
        features = view.combined_set_features(name, of_label)
        predictions = class_scores(features["image"], features["text"], len(task.data.classnames)).argmax(1)
        title = f"{name}, {label_title(label)}"
        confusions.append(_confusion(task.data.labels, predictions.numpy(), task.data.classnames, title))
    return confusions


def _confusion(
    labels: Int64[np.ndarray, "images"], predictions: Int64[np.ndarray, "images"], names: Sequence[str], title: str
) -> dict[str, Any]:
    """Plot the confusion matrix or, with many classes, list the most confused pairs."""
    counts = np.bincount(labels * len(names) + predictions, minlength=len(names) ** 2).reshape(len(names), len(names))
    shares = counts / np.maximum(1, counts.sum(1, keepdims=True))
    errors = np.where(np.eye(len(names), dtype=bool), 0, shares)
    worst = np.unravel_index(np.argsort(-errors, axis=None, kind="stable")[:CONFUSED_PAIRS], errors.shape)
    pairs = [(names[i], names[j], f"{100 * errors[i, j]:.0f}") for i, j in zip(*worst, strict=True) if errors[i, j] > 0]
    if len(names) > MAX_MATRIX_CLASSES:
        return {"title": title, "table": [("class", "predicted as", "% of its images"), *pairs]}
    with new_figure(400, 380) as (figure, axes):
        axes.grid(visible=False)
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        shown = names if len(names) <= MAX_NAMED_CLASSES else []
        axes.set_xticks(range(len(shown)), shown, rotation=90)
        axes.set_yticks(range(len(shown)), shown)
        axes.set_xlabel("predicted class")
        axes.set_ylabel("class")
        axes.set_title(title)
        most = "; ".join(f"{one} as {other} ({percent} %)" for one, other, percent in pairs[:5])
        alt = f"Confusion matrix, {title}. Most frequent confusions: {most or 'none'}."
        return {"title": title, "figure": svg(figure, alt)}


def changes_section(view: RunView, thumbnails: Thumbnails) -> Section | None:
    """Return the queries that all stages together fix or regress on; None before they and stage 0 are evaluated."""
    sets: list[dict[str, Any]] = []
    for of_set in view.run.results.values():
        if len(view.run.stages) < 2 or not {"stage-0", COMBINED} <= of_set.keys():
            continue
        task = view.tasks.get(of_set[COMBINED].dataset)
        if isinstance(task, RetrievalTask | ClassificationTask):
            has_room = sum(bool(other["fixed"] or other["regressed"]) for other in sets) < SETS_WITH_EXAMPLES
            changes = _changes(view, thumbnails if has_room else None, task, of_set["stage-0"], of_set[COMBINED])
            sets += [changes] if changes else []
    return Section(name="changes", title="Fixed and regressed queries", content={"sets": sets}) if sets else None


def _changes(
    view: RunView,
    thumbnails: Thumbnails | None,
    task: RetrievalTask | ClassificationTask,
    first: Result,
    combined: Result,
) -> dict[str, Any] | None:
    """Return counts of changed queries, and examples if there are thumbnails; None without stored outcomes."""
    answers_are_images = isinstance(task, RetrievalTask)
    # Outcomes: whether the first answer is right, and the rank of the right one, from 0.
    is_right, rank = ("image_retrieval_recall@1", "image_retrieval") if answers_are_images else ("acc1", "ranks")
    before, after = (result.outcomes.get(rank) for result in (first, combined))
    paired = compare(combined, first, is_right)
    if before is None or after is None or before.shape != after.shape or paired is None:
        return None
    changed = {}
    for change, wrong, right in (("fixed", before, after), ("regressed", after, before)):
        queries = np.flatnonzero((right == 0) & (wrong > 0))
        changed[change] = queries[np.argsort(-wrong[queries], kind="stable")].tolist()  # the worst rank first
    summary = (
        f"Of {len(before):,} {'texts' if answers_are_images else 'images'}, all stages together fix "
        f"{len(changed['fixed']):,} that stage 0 gets wrong, and get {len(changed['regressed']):,} wrong that stage 0 "
        f"gets right: a difference of {difference_text(paired).replace(' [', ' points [')}."
    )
    examples: dict[str, list[dict[str, Any]]] = {"fixed": [], "regressed": []}
    stages = view.stages_with("eval")
    if thumbnails is not None and stages and view.set_features(0, task.name):
        features = [view.set_features(0, task.name), view.combined_set_features(task.name, stages)]
        for change, queries in changed.items():
            examples[change] = [_example(thumbnails, task, features, query) for query in queries[:EXAMPLES]]
    return {"name": task.name, "answers_are_images": answers_are_images, "summary": summary, **examples}


def _example(
    thumbnails: Thumbnails, task: RetrievalTask | ClassificationTask, features: Sequence[Any], query: int
) -> dict[str, Any]:
    """Return a query, its right answer, and the first answers of stage 0 and of all stages together."""
    if isinstance(task, RetrievalTask):
        images = [torch.nn.functional.normalize(sides["image"].float(), dim=1) for sides in features]
        texts = [sides["text"][query].float() for sides in features]
        found = [int((image @ text).argmax()) for image, text in zip(images, texts, strict=True)]
        captions = task.data.captions
        right, first, combined = (
            thumbnails.request(task.name, image, captions[image][0] if captions[image] else f"image {image}")
            for image in (int(task.data.image_of_text[query]), *found)
        )
        return {"query": shortened(task.data.texts[query]), "right": right, "first": first, "combined": combined}
    names = task.data.classnames
    scores = [class_scores(sides["image"][query : query + 1], sides["text"], len(names)) for sides in features]
    answers = [names[int(of_classes.argmax())] for of_classes in scores]
    name = names[int(task.data.labels[query])]
    image = thumbnails.request(task.name, query, name)
    return {"query": name, "right": image, "first": answers[0], "combined": answers[1]}


def trade_section(view: RunView, thumbnails: Thumbnails) -> Section | None:  # noqa: ARG001
    """Return what the interpolation with the base gains and costs; None where there is no such choice."""
    curve = view.run.combination.get("curve") or ()
    if not curve:
        return None
    chosen, terms = view.run.combination["wise_ft"], [name for name in curve[0] if name != "share"]
    content: dict[str, Any] = {"rows": trade_rows(curve, chosen), "figure": None}
    if len(terms) > 1:
        task, guards = terms[0], terms[1:]
        points = [(100 * sum(point[g] for g in guards) / len(guards), 100 * point[task]) for point in curve]
        with new_figure() as (figure, axes):
            axes.plot(*zip(*points, strict=True), color=SERIES[0], marker="o")
            for (x, y), point in zip(points, curve, strict=True):
                axes.annotate(f"{point['share']:g}", (x, y), textcoords="offset points", xytext=(4, 4))
            axes.set_xlabel(f"guard: {', '.join(guards)}, %")
            axes.set_title(f"{task}, %")
            ends = "; ".join(
                f"share {p['share']:g}: {y:.1f} and {x:.1f} %" for (x, y), p in zip(points, curve, strict=True)
            )
            content["figure"] = svg(
                figure, f"{task} over {', '.join(guards)} by share of the fine-tuned weights: {ends}."
            )
    return Section(name="trade", title="Fine-tuned against base weights", content=content)


def controls_section(view: RunView, thumbnails: Thumbnails) -> Section | None:  # noqa: ARG001
    """Return the other finished arms of the same seed, and the table over seeds; None outside of experiments."""
    run_dir = view.folder.resolve()
    experiment = run_dir.parent.parent
    if run_dir.name != STAGES_ARM or not (experiment / EXPERIMENT).is_file():
        return None
    record = read_json(experiment / EXPERIMENT)
    names = record.get("arms", {}) if isinstance(record, dict) else {}
    folders = {name: run_dir.parent / str(name) for name in names if name != STAGES_ARM}
    arms = {name: read_run(folder) for name, folder in folders.items() if (folder / COMBINED / DONE).exists()}
    over_seeds = _seed_table(read_jsonl(experiment / "results.jsonl"))
    if not arms and not over_seeds:
        return None
    rows, sentences = _against_arms(view.run, arms) if arms else ([], [])
    content = {"rows": rows, "verdicts": sentences, "over_seeds": over_seeds}
    return Section(name="controls", title="Comparison with controls", content=content)


def _against_arms(run: RunRecord, arms: Mapping[str, RunRecord]) -> tuple[list[list[str]], list[str]]:
    """Return the results of a run and of other arms as a table, and a sentence on each arm."""
    rows = [["set", "metric", "this run", *arms]]
    verdicts: dict[str, dict[str, list[str]]] = {name: {"better": [], "worse": [], "": []} for name in arms}
    # The result of a whole run is that of all stages together, or of the only one.
    (_, results), *others = (
        (name, {key: of_set.get(COMBINED) or next(iter(of_set.values())) for key, of_set in record.results.items()})
        for name, record in {"": run, **arms}.items()
    )
    for key, metric in ((key, metric) for key, result in results.items() for metric in headline_metrics(result)):
        ours, title = results[key], METRICS.get(metric, metric)
        row = [ours.dataset, title, cell(ours, metric, has_interval=False)]
        for name, of_arm in others:
            other = of_arm.get(key)
            paired = compare(ours, other, metric) if other else None
            row.append(cell(other, metric, has_interval=False) + (f" ({difference_text(paired)})" if paired else ""))
            if paired:
                verdicts[name][verdict(paired)].append(f"{ours.dataset} ({title})")
        rows.append(row)
    words = {"better": "better on", "worse": "worse on", "": "no clear difference on"}
    sentences = []
    for name, changes in verdicts.items():
        parts = [f"{words[change]} {', '.join(sets)}" for change, sets in changes.items() if sets]
        sentences += [f"Compared with {name}: {'; '.join(parts)}."] if parts else []
    return rows, sentences


def _seed_table(records: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return the table of an experiment: means over its seeds with intervals over seeds and items."""
    means = [record for record in records if record.get("what") == "mean"]
    figures = list(dict.fromkeys(str(record["figure"]) for record in means))
    cells = {
        (record["row"], record["figure"]): format_percent(record["value"], (record["low"], record["high"]))
        for record in means
    }
    arms = dict.fromkeys(str(record["row"]) for record in means)
    rows = [[arm, *(cells.get((arm, figure), "-") for figure in figures)] for arm in arms]
    return [["", *figures], *rows] if rows else []


def runs_with_controls(experiment: Path) -> list[Path]:
    """Return the finished runs of an experiment that controls are compared with."""
    return sorted(path.parents[1] for path in experiment.glob(f"seed-*/{STAGES_ARM}/{COMBINED}/{DONE}"))
