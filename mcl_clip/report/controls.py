"""A run beside its controls, where it is an arm of an experiment."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mcl_clip.core.files import DONE, read_json, read_jsonl
from mcl_clip.report.section import Section
from mcl_clip.report.thumbnails import Thumbnails
from mcl_clip.report.view import EXPERIMENT, RunView
from mcl_clip.results.record import COMBINED, Result, RunRecord, compare, read_run
from mcl_clip.results.scores import TITLES

STAGES = "mcl"  # the arm that controls are held against


def section(view: RunView, album: Thumbnails) -> Section | None:  # noqa: ARG001
    """The other finished arms of the same seed, and the figures over seeds; none outside of experiments."""
    run_dir = view.folder.resolve()
    experiment = run_dir.parent.parent
    if run_dir.name != STAGES or not (experiment / EXPERIMENT).is_file():
        return None
    record = read_json(experiment / EXPERIMENT)
    names = record.get("arms", {}) if isinstance(record, dict) else {}
    arms = {name: run_dir.parent / str(name) for name in names if name != STAGES}
    others = {name: read_run(folder) for name, folder in arms.items() if (folder / COMBINED / DONE).exists()}
    over_seeds = _over_seeds(read_jsonl(experiment / "results.jsonl"))
    if not others and not over_seeds:
        return None
    content = {
        "rows": _rows(view.run, others),
        "verdicts": [text for name, other in others.items() if (text := _verdict(view.run, name, other))],
        "over_seeds": over_seeds,
    }
    return Section(name="controls", title="Against its controls", content=content)


def _last(run: RunRecord, key: str) -> Result | None:
    """The result of a whole run on a set."""
    found = run.results.get(key, {})
    return found.get(COMBINED) or next(iter(found.values()), None)


def _measures(result: Result) -> list[str]:
    return [metric for metric in dict.fromkeys((result.main_metric, "linear_acc1")) if result.value(metric) is not None]


def _rows(run: RunRecord, others: Mapping[str, RunRecord]) -> list[list[str]]:
    """A line a set and measure: the run, and each other arm with its paired difference."""
    rows = [["set", "measure", "this run", *others]]
    for key, ours in ((key, _last(run, key)) for key in run.results):
        if ours is None:
            continue
        for metric in _measures(ours):
            cells = [_against(ours, _last(other, key), metric) for other in others.values()]
            rows.append(
                [ours.record["dataset"], TITLES.get(metric, metric), f"{100 * (ours.value(metric) or 0):.1f}", *cells]
            )
    return rows if others else []


def _against(ours: Result | None, other: Result | None, metric: str) -> str:
    """A measure of another arm and how far this run is ahead of it."""
    if ours is None or other is None or other.value(metric) is None:
        return "-"
    value = f"{100 * (other.value(metric) or 0):.1f}"
    paired = compare(ours, other, metric)
    if paired is None:
        return value
    return f"{value} ({100 * paired.difference:+.1f} [{100 * paired.low:+.1f}, {100 * paired.high:+.1f}])"


def _verdict(run: RunRecord, name: str, other: RunRecord) -> str:
    """Where this run is clearly ahead of another arm, and where behind."""
    sides: dict[str, list[str]] = {"ahead at": [], "behind at": [], "level at": []}
    for key in run.results:
        ours, theirs = _last(run, key), _last(other, key)
        if ours is None or theirs is None:
            continue
        for metric in _measures(ours):
            paired = compare(ours, theirs, metric)
            if paired is not None:
                side = "level at" if paired.low <= 0 <= paired.high else "ahead at" if paired.low > 0 else "behind at"
                sides[side].append(f"{ours.record['dataset']} ({TITLES.get(metric, metric)})")
    told = [f"{side} {', '.join(names)}" for side, names in sides.items() if names]
    return f"Against {name}: {'; '.join(told)}." if told else ""


def _over_seeds(records: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The table of the experiment: means over its seeds with intervals over seeds and items."""
    means = [record for record in records if record.get("what") == "mean"]
    figures = list(dict.fromkeys(str(record["figure"]) for record in means))
    cells = {
        (
            record["row"],
            record["figure"],
        ): f"{100 * record['value']:.1f} [{100 * record['low']:.1f}, {100 * record['high']:.1f}]"
        for record in means
    }
    arms = list(dict.fromkeys(str(record["row"]) for record in means))
    return (
        [["", *figures], *([arm, *(cells.get((arm, figure), "-") for figure in figures)] for arm in arms)]
        if arms
        else []
    )


def runs_with_controls(experiment: Path) -> list[Path]:
    """The finished runs of an experiment that controls are held against."""
    return sorted(path.parents[1] for path in experiment.glob(f"seed-*/{STAGES}/{COMBINED}/{DONE}"))
