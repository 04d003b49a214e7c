"""Show all results of each set, which queries all stages together fix, and a run beside its controls."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64, Int64, Integer
from markupsafe import Markup
from matplotlib.ticker import NullFormatter

from mcl_clip.core.files import DONE, read_json, read_jsonl
from mcl_clip.eval.classification import ClassificationTask, class_scores
from mcl_clip.eval.retrieval import RetrievalTask
from mcl_clip.eval.task import Task
from mcl_clip.report.figures import SERIES, TEXT, new_figure, svg
from mcl_clip.report.thumbnails import Thumbnail, Thumbnails, shortened
from mcl_clip.report.view import EXPERIMENT, RunView, Section
from mcl_clip.results.record import COMBINED, Result, RunRecord, read_run
from mcl_clip.results.scores import compare, difference_text, headline_metrics, shown_metrics, sizes, verdict
from mcl_clip.results.text import METRICS, cell, format_percent, label_title, metric_title

DIRECTIONS = {"image_retrieval": "text to image", "text_retrieval": "image to text"}
GROUP_METRIC = "accuracy/"  # of a set of pairs
CURVE_POINTS = 100
MAX_MATRIX_CLASSES = 40  # of a confusion matrix; with more, the most confused pairs are listed
MAX_NAMED_CLASSES = 20
CONFUSED_PAIRS = 12
EXAMPLES, SETS_WITH_EXAMPLES = 4, 4
RANKS = {RetrievalTask: "image_retrieval", ClassificationTask: "ranks"}  # outcomes: rank of the right answer, from 0
FIRST_RANK = {RetrievalTask: "image_retrieval_recall@1", ClassificationTask: "acc1"}
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
    confusions, classes = [], task.data.classnames
    for label in dict.fromkeys((labels[0], labels[-1])):
        if label == COMBINED:
            features: Mapping[str, torch.Tensor] = view.combined_set_features(name, stages)
        else:
            features = view.set_features(int(label.removeprefix("stage-")), name)
        predictions = class_scores(features["image"], features["text"], len(classes)).argmax(1)
        counts = _confusion_counts(task.data.labels, predictions, len(classes))
        confusions.append(_confusion(counts, classes, f"{name}, {label_title(label)}"))
    return confusions


def _confusion_counts(
    labels: Int64[np.ndarray, "images"], predictions: torch.Tensor, classes: int
) -> Int64[np.ndarray, "classes classes"]:
    """Count images by class (rows) and predicted class (columns)."""
    counts: np.ndarray = np.bincount(labels * classes + predictions.numpy(), minlength=classes * classes)
    return counts.reshape(classes, classes)


def _confusion(counts: Int64[np.ndarray, "classes classes"], names: Sequence[str], title: str) -> dict[str, Any]:
    """Plot the confusion matrix or, with many classes, list the most confused pairs."""
    shares = counts / np.maximum(1, counts.sum(1, keepdims=True))
    pairs = _most_confused(shares, names)
    if len(names) > MAX_MATRIX_CLASSES:
        rows = [[one, other, f"{100 * share:.0f}"] for one, other, share in pairs]
        return {"title": title, "table": [["class", "predicted as", "% of its images"], *rows]}
    with new_figure(400, 380) as (figure, axes):
        axes.grid(visible=False)
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        shown = names if len(names) <= MAX_NAMED_CLASSES else []
        axes.set_xticks(range(len(shown)), shown, rotation=90)
        axes.set_yticks(range(len(shown)), shown)
        axes.set_xlabel("predicted class")
        axes.set_ylabel("class")
        axes.set_title(title)
        most = "; ".join(f"{one} as {other} ({100 * share:.0f} %)" for one, other, share in pairs[:5])
        alt = f"Confusion matrix, {title}. Most frequent confusions: {most or 'none'}."
        return {"title": title, "figure": svg(figure, alt)}


def _most_confused(
    shares: Float64[np.ndarray, "classes classes"], names: Sequence[str]
) -> list[tuple[str, str, float]]:
    """Return class, predicted class and share of the largest entries off the diagonal."""
    errors = shares.copy()
    np.fill_diagonal(errors, 0)
    order = np.argsort(-errors, axis=None, kind="stable")[:CONFUSED_PAIRS]
    pairs = zip(*np.unravel_index(order, errors.shape), strict=True)
    return [(names[i], names[j], float(errors[i, j])) for i, j in pairs if errors[i, j] > 0]


def changes_section(view: RunView, thumbnails: Thumbnails) -> Section | None:
    """Return the queries that all stages together fix or regress on; None before they and stage 0 are evaluated."""
    sets: list[dict[str, Any]] = []
    for of_set in view.run.results.values():
        if len(view.run.stages) < 2 or not {"stage-0", COMBINED} <= of_set.keys():
            continue
        task = view.tasks.get(of_set[COMBINED].dataset)
        if task is not None and type(task) in RANKS:
            has_room = sum(bool(other["fixed"] or other["regressed"]) for other in sets) < SETS_WITH_EXAMPLES
            changes = _changes(view, thumbnails if has_room else None, task, of_set["stage-0"], of_set[COMBINED])
            sets += [changes] if changes else []
    return Section(name="changes", title="Fixed and regressed queries", content={"sets": sets}) if sets else None


def _changes(
    view: RunView, thumbnails: Thumbnails | None, task: Task, first: Result, combined: Result
) -> dict[str, Any] | None:
    """Return counts of changed queries, and examples if there are thumbnails; None without stored outcomes."""
    before, after = (result.outcomes.get(RANKS[type(task)]) for result in (first, combined))
    paired = compare(combined, first, FIRST_RANK[type(task)])
    if before is None or after is None or before.shape != after.shape or paired is None:
        return None
    fixed, regressed = _changed(before, after), _changed(after, before)
    answers_are_images = isinstance(task, RetrievalTask)
    summary = (
        f"Of {len(before):,} {'texts' if answers_are_images else 'images'}, all stages together fix {len(fixed):,} "
        f"that stage 0 gets wrong, and get {len(regressed):,} wrong that stage 0 gets right: a difference of "
        f"{difference_text(paired).replace(' [', ' points [')}."
    )
    stages = view.stages_with("eval")
    features = [view.set_features(0, task.name), view.combined_set_features(task.name, stages)] if stages else []
    examples: dict[str, list[dict[str, Any]]] = {"fixed": [], "regressed": []}
    if thumbnails is not None and len(features) == 2 and all(features):
        for change, queries in (("fixed", fixed), ("regressed", regressed)):
            examples[change] = [_example(thumbnails, task, features, query) for query in queries[:EXAMPLES].tolist()]
    return {"name": task.name, "answers_are_images": answers_are_images, "summary": summary, **examples}


def _changed(wrong: Integer[np.ndarray, "queries"], right: Integer[np.ndarray, "queries"]) -> Int64[np.ndarray, "some"]:
    """Return queries with rank 0 in `right` but not in `wrong`, by descending rank in `wrong`."""
    queries = np.flatnonzero((right == 0) & (wrong > 0))
    return queries[np.argsort(-wrong[queries], kind="stable")].astype(np.int64)


def _example(thumbnails: Thumbnails, task: Task, features: Sequence[Any], query: int) -> dict[str, Any]:
    """Return a query, its right answer, and the first answers of stage 0 and of all stages together."""
    if isinstance(task, RetrievalTask):
        captions = task.data.captions

        def answer(image: int) -> Thumbnail:
            alt = captions[image][0] if captions[image] else f"image {image}"
            return thumbnails.request(task.name, image, alt)

        answers = []
        for sides in features:
            images = torch.nn.functional.normalize(sides["image"].float(), dim=1)
            answers.append(answer(int((images @ sides["text"][query].float()).argmax())))
        right = answer(int(task.data.image_of_text[query]))
        return {
            "query": shortened(task.data.texts[query]),
            "right": right,
            "first": answers[0],
            "combined": answers[1],
        }
    if not isinstance(task, ClassificationTask):
        raise TypeError(f"{type(task).__name__} has no examples")
    names = task.data.classnames
    first, combined = (
        names[int(class_scores(sides["image"][query : query + 1], sides["text"], len(names)).argmax())]
        for sides in features
    )
    name = names[int(task.data.labels[query])]
    return {
        "query": name,
        "right": thumbnails.request(task.name, query, name),
        "first": first,
        "combined": combined,
    }


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
    results = {key: result for key in run.results if (result := _final_result(run, key)) is not None}
    for key, metric in ((key, metric) for key, result in results.items() for metric in headline_metrics(result)):
        ours, title = results[key], METRICS.get(metric, metric)
        row = [ours.dataset, title, cell(ours, metric, has_interval=False)]
        for name, arm in arms.items():
            other = _final_result(arm, key)
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


def _final_result(run: RunRecord, key: str) -> Result | None:
    """Return the result of a whole run on a set."""
    of_set = run.results.get(key, {})
    return of_set.get(COMBINED) or next(iter(of_set.values()), None)


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
