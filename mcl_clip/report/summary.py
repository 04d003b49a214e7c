"""Summarize a run: its state, what each stage has learned in sentences and as heat maps, and its main results."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mcl_clip.report.thumbnails import Thumbnails
from mcl_clip.report.view import RunView, Section, as_markup
from mcl_clip.results.record import COMBINED, PHASES, Result, RunRecord, StageRecord
from mcl_clip.results.scores import LINEAR_PROBE, agreement_text, compare, headline_metrics, verdict
from mcl_clip.results.text import (
    CONTROLS,
    METHODS,
    METRICS,
    SIDE_NAMES,
    cell,
    format_bytes,
    format_duration,
    label_title,
    listed,
)
from mcl_clip.results.training import machine_rows, stage_rows

HIGH_SKILL, LOW_SKILL = 0.8, 0.3  # 0 is chance, 1 is all right
MAX_NAMES = 4  # sets that a sentence lists
STAGE_CHANGES = {
    "better": "It encodes {} better than {}.",
    "lost": "It no longer encodes {}: what the pairs of a group share cannot lower its loss.",
    "worse": "It encodes {} less well than {}.",
}
COMBINED_CHANGES = {
    "better": "They are better than the best single stage on {}.",
    "worse": "They are worse than the best single stage on {}.",
    "": "There is no clear difference from the best single stage on {}.",
}
HEAT_MAPS = {
    LINEAR_PROBE: ("Linear probe", "what the image features encode, whatever words would find it"),
    "acc1": ("Zero-shot", "what the class names find"),
}


def section(view: RunView, thumbnails: Thumbnails) -> Section:  # noqa: ARG001
    """Return the summary, which every run has."""
    run = view.run
    count, control = len(run.stages), CONTROLS.get(str(run.config.get("control")))
    index, seconds = run.index, run.training_seconds
    data = ""
    if index is not None:
        size = format_bytes(sum(shard.size for shard in index.shards))
        data = f" on {len(index):,} {run.unit} ({len(index.shards):,} shard{'s' * (len(index.shards) != 1)}, {size})"
    unfinished = [f"at {stage.folder.name}/{phase}" for stage in run.stages if (phase := _next_phase(stage))]
    progress = "finished" if run.is_finished else f"not finished: {[*unfinished, 'the stages are not combined yet'][0]}"
    lead = f"{count} stage{'s' * (count > 1)}{data}, {progress}."
    if seconds is not None:
        lead += f" Training took {format_duration(seconds)}{'' if run.is_finished else ' so far'}."
    content = {
        "lead": lead,
        "control": f"This run is a control: {control}." if control else "",
        "method": _method_sentence(run),
        "stages": [
            {"number": s, "state": _stage_state(stage), "sentences": stage_sentences(run, s)}
            for s, stage in enumerate(run.stages)
        ],
        "combined": combined_sentences(run),
        "results": _results(run),
        "stage_rows": as_markup(stage_rows(run)),
        "machine_rows": as_markup(machine_rows(run)),
    }
    return Section(name="summary", title="Summary", content=content)


def _method_sentence(run: RunRecord) -> str:
    """Say what the run trains in place of stages with groups, and how the weights of the final model were made."""
    method = METHODS.get(str(run.config.get("method", "stages")), "")
    sentences = [f"The method is {method}."] if method else []
    sentences += [f"The weights of the final model are {run.averaged}."] if run.averaged else []
    return " ".join(sentences)


def _next_phase(stage: StageRecord) -> str:
    """Return the first phase of a stage that is not done; empty for a finished stage."""
    return next((phase for phase in PHASES if stage.state(phase) != "done"), "")


def _stage_state(stage: StageRecord) -> str:
    """Say how far a stage is; empty for a finished stage."""
    phase = _next_phase(stage)
    if phase != "train":
        return f"trained; next phase: {phase}" if phase else ""
    total = stage.train_settings.get("steps", 0)
    return f"in training: step {stage.steps[-1]['step']:,} of {total:,}" if stage.steps else "not started"


def _results(run: RunRecord) -> list[list[str]]:
    """Return the headline metrics of each set, a column for each model; empty before the first evaluation."""
    labels = [label for label in run.labels if any(label in of_set for of_set in run.results.values())]
    rows = [["set", "metric", *map(label_title, labels)]]
    for of_set in run.results.values():
        first = next(iter(of_set.values()))
        for metric in dict.fromkeys(metric for result in of_set.values() for metric in headline_metrics(result)):
            cells = [cell(of_set.get(label), metric) for label in labels]
            rows.append([first.dataset, METRICS.get(metric, metric), *cells])
    return rows if labels else []


def stage_sentences(run: RunRecord, stage: int) -> list[str]:
    """Say what a stage has learned, by its results and its clusters; empty before it is evaluated."""
    label, before = f"stage-{stage}", f"stage-{stage - 1}"
    results = [of_set[label] for of_set in run.results.values() if label in of_set]
    with_classes = [result for result in results if skill(result, _class_metric(result)) is not None]
    if stage == 0:
        sentences = _skill_sentences(with_classes)
    else:
        pairs = [(r, of_set[before]) for r in with_classes if before in (of_set := run.results[r.record["key"]])]
        sentences = _change_sentences(pairs, f"stage {stage - 1}", STAGE_CHANGES)
        if pairs and not sentences:
            sentences = [f"There is no clear difference from stage {stage - 1} in what it encodes."]
    for result in results:
        if result.main_metric == "mean_recall@1":
            at_10 = [result.value(f"{side}_retrieval_recall@10") for side in ("image", "text")]
            values = [value for value in at_10 if value is not None]
            more = f" and the mean R@10 is {100 * sum(values) / 2:.1f} %" if len(values) == 2 else ""
            sentences.append(f"On {result.dataset} the mean R@1 is {_percent(result, result.main_metric)}{more}.")
    for (first, side), (agreement, if_random) in run.agreement.items():
        if first == stage - 1:
            relation = agreement_text(agreement, if_random)
            numbers = f"agreement {agreement:.2f}; {if_random:.2f} if unrelated"
            sentences.append(f"Its clusters of {SIDE_NAMES[side]} {relation} those of stage {first} ({numbers}).")
    return sentences


def combined_sentences(run: RunRecord) -> list[str]:
    """Compare all stages together with the best single one; empty before they are evaluated."""
    pairs = []
    for of_set in run.results.values():
        stages = [result for label, result in of_set.items() if label != COMBINED]
        if (combined := of_set.get(COMBINED)) and len(stages) > 1:
            metric = _class_metric(combined)
            pairs.append((combined, max(stages, key=lambda result: result.value(metric) or 0.0)))
    return _change_sentences(pairs, "best stage", COMBINED_CHANGES)


def _skill_sentences(results: Sequence[Result]) -> list[str]:
    """Say how well a first stage encodes the classes of each set."""
    grades: dict[str, list[str]] = {"encodes": [], "partly encodes": [], "hardly encodes": []}
    for result in results:
        metric = _class_metric(result)
        level = skill(result, metric) or 0.0
        grade = "encodes" if level >= HIGH_SKILL else "hardly encodes" if level <= LOW_SKILL else "partly encodes"
        grades[grade].append(f"{result.dataset} ({_percent(result, metric)})")
    clauses = [f"{grade} {_listed(names)}" for grade, names in grades.items() if names]
    return [f"It {', '.join(clauses)}."] if clauses else []


def _change_sentences(pairs: Iterable[tuple[Result, Result]], other: str, sentences: Mapping[str, str]) -> list[str]:
    """Say on which sets a model is better or worse than `other`, where the difference is clear."""
    names = defaultdict(list)
    for result, old in pairs:
        metric = _class_metric(result)
        change, now, then = verdict(compare(result, old, metric)), skill(result, metric), skill(old, metric)
        has_lost = now is not None and then is not None and now <= LOW_SKILL < HIGH_SKILL / 2 <= then
        change = "lost" if change == "worse" and has_lost and "lost" in sentences else change
        names[change].append(f"{result.dataset} ({_percent(result, metric)}, {other}: {_percent(old, metric)})")
    return [sentence.format(_listed(names[change]), other) for change, sentence in sentences.items() if change in names]


def skill(result: Result, metric: str) -> float | None:
    """Rescale an accuracy to 0 at chance and 1 at all right; None if it was not measured, or without classes."""
    value, classes = result.value(metric), result.record.get("n_classes") or 0
    if value is None or classes < 2:
        return None
    return (value - 1 / classes) / (1 - 1 / classes)


def _class_metric(result: Result) -> str:
    """Return the metric of what a stage encodes: the linear probe if there is one, as it needs no class names."""
    return next((metric for metric in HEAT_MAPS if result.value(metric) is not None), result.main_metric)


def _percent(result: Result, metric: str) -> str:
    text = cell(result, metric, has_interval=False)
    return text if text == "-" else f"{text} %"


def _listed(names: Sequence[str]) -> str:
    more = len(names) - MAX_NAMES
    return listed(names if more <= 0 else [*names[:MAX_NAMES], f"{more} more sets"])


def attributes_section(view: RunView, thumbnails: Thumbnails) -> Section | None:  # noqa: ARG001
    """Return heat maps of stages and sets with classes, by linear probe and zero-shot; None without such a set."""
    columns = [label_title(label) for label in view.run.labels]
    maps = [
        {"title": title, "meaning": meaning, "columns": columns, "rows": rows}
        for metric, (title, meaning) in HEAT_MAPS.items()
        if (rows := heat_map_rows(view.run.results, view.run.labels, metric))
    ]
    return Section(name="attributes", title="What each stage encodes", content={"maps": maps}) if maps else None


def heat_map_rows(
    results: Mapping[str, Mapping[str, Result]], labels: Sequence[str], metric: str
) -> list[dict[str, Any]]:
    """Return a row for each set: shares in percent, intervals, and the shade of each cell from chance to 100 %."""
    rows = []
    for of_set in results.values():
        first = next(iter(of_set.values()))
        if not first.record.get("n_classes") or all(result.value(metric) is None for result in of_set.values()):
            continue
        cells: list[dict[str, Any] | None] = []
        for label in labels:
            result = of_set.get(label)
            value = result.value(metric) if result else None
            if result is None or value is None:
                cells.append(None)
                continue
            interval = result.interval(metric)
            title = f"95 % interval {100 * interval[0]:.1f} to {100 * interval[1]:.1f}" if interval else ""
            shade = round(100 * max(0.0, skill(result, metric) or 0.0))
            cells.append({"value": 100 * value, "title": title, "shade": shade})
        rows.append({"name": first.dataset, "chance": 100 / first.record["n_classes"], "cells": cells})
    return rows
