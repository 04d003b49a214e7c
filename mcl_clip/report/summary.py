"""The run at a glance: what it is, how far it is, what each stage has learned, and the main figures."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from markupsafe import Markup

from mcl_clip.core.files import DONE
from mcl_clip.report.section import Section
from mcl_clip.report.sentences import combined_sentences, percent, stage_sentences
from mcl_clip.report.thumbnails import Thumbnails
from mcl_clip.report.view import RunView
from mcl_clip.results.record import COMBINED, RunRecord
from mcl_clip.results.scores import TITLES
from mcl_clip.results.text import duration, size
from mcl_clip.results.training import machine_rows, stage_rows

PHASES = ("train", "embed", "cluster", "labels", "eval")
CONTROLS = {
    "single": "This run is a control: a single stage with the compute of all stages.",
    "ensemble": "This run is a control: as many models from other draws, without groups.",
    "no-groups": "This run is a control: the same stages without groups.",
    "random-groups": "This run is a control: the same stages with random groups.",
    "ifm": "This run is a control: a single stage of equal compute with implicit feature modification.",
}


def section(view: RunView, album: Thumbnails) -> Section:  # noqa: ARG001
    """There is always one, even of a run that has only begun."""
    run = view.run
    stages = [
        {"number": s, "state": _state(view.folder, run, s), "sentences": stage_sentences(run, s)}
        for s in range(len(run.stages))
    ]
    return Section(
        name="glance",
        title="At a glance",
        content={
            "lead": " ".join(_lead(view)),
            "control": CONTROLS.get(str(run.config.get("control")), ""),
            "stages": stages,
            "together": combined_sentences(run),
            "figures": _figures(run),
            "made": _as_markup(stage_rows(run)),
            "machine": _as_markup(machine_rows(run)),
        },
    )


def _lead(view: RunView) -> Iterator[str]:
    run = view.run
    number = len(run.stages)
    pairs = f" on {run.data.rows:,} pairs ({run.data.shards} shards, {size(run.data.size)})" if run.data else ""
    yield f"{number} stage{'s' * (number > 1)}{pairs}, {_how_far(view.folder, number)}."
    seconds = [stage.steps[-1]["seconds"] for stage in run.stages if stage.steps]
    if seconds:
        yield (
            f"Training took {duration(sum(seconds))} so far."
            if not _is_finished(view.folder)
            else (f"Training took {duration(sum(seconds))}.")
        )


def _is_finished(folder: Path) -> bool:
    return (folder / COMBINED / DONE).exists()


def _how_far(folder: Path, stages: int) -> str:
    if _is_finished(folder):
        return "finished"
    for s in range(stages):
        for phase in PHASES:
            if not (folder / f"stage-{s}" / phase / DONE).exists():
                return f"not finished: at stage-{s}/{phase}"
    return "not finished: the stages are not combined yet"


def _state(folder: Path, run: RunRecord, s: int) -> str:
    """How far a stage is, if it is not finished."""
    for phase in PHASES:
        if (folder / f"stage-{s}" / phase / DONE).exists():
            continue
        steps, total = run.stages[s].steps, run.stages[s].settings.get("train", {}).get("steps", 0)
        if phase == "train":
            return f"in training: step {steps[-1]['step']:,} of {total:,}" if steps else "not begun"
        return f"trained; not done yet: {phase}"
    return ""


def _figures(run: RunRecord) -> list[list[Any]]:
    """The main measure of each set, a column a model, with intervals; empty before anything is measured."""
    labels = [f"stage-{s}" for s in range(len(run.stages))] + [COMBINED] * (len(run.stages) > 1)
    labels = [label for label in labels if any(label in found for found in run.results.values())]
    if not labels:
        return []
    titles = ["all stages" if label == COMBINED else label.replace("-", " ") for label in labels]
    rows: list[list[Any]] = [["set", "measure", *titles]]
    for found in run.results.values():
        first = next(iter(found.values()))
        for metric in dict.fromkeys((first.main_metric, "linear_acc1")):
            if any(result.value(metric) is not None for result in found.values()):
                cells = [_cell(found.get(label), metric) for label in labels]
                rows.append([first.record["dataset"], TITLES.get(metric, metric), *cells])
    return rows


def _cell(result: Any, metric: str) -> str:
    if result is None or result.value(metric) is None:
        return "-"
    interval = result.interval(metric)
    ends = f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if interval else ""
    return percent(result, metric).removesuffix(" %") + ends


def _as_markup(rows: list[list[str]]) -> list[list[Markup]]:
    """Cells that are escaped already, by `wording.safe`."""
    return [[Markup(cell) for cell in row] for row in rows]
