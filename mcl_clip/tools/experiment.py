"""A recipe beside its controls over several seeds, and one table of what came out.

Each run is a process of its own, `python RECIPE --run-dir OUT/seed-N/ARM --seed N ...`, and anybody can repeat it
alone. A run that is done is not done again, so the same command continues an experiment. Controls that change only
later stages start from a copy of the finished stage 0; the run checks its fingerprints.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from mcl_clip.core.distributed import count_cores
from mcl_clip.core.errors import UserError
from mcl_clip.core.files import DONE, append_jsonl, atomic_path, file_digest, read_json, write_json
from mcl_clip.core.progress import Progress
from mcl_clip.core.stats import Estimate, Means, crossed_bootstrap
from mcl_clip.model.multistage import COMBINATIONS
from mcl_clip.results.record import COMBINED, Result, load_results
from mcl_clip.results.text import CONTROLS, format_percent

STAGES = "mcl"
SAME_FIRST_STAGE = ("ensemble", "no-groups", "random-groups")

WIDTH = re.compile(r"_width_\d+$")

Values = Mapping[str, Mapping[str, Float[np.ndarray, "_seeds _items"]]]


@dataclass(frozen=True, kw_only=True)
class ExperimentPlan:
    """What an experiment runs and reports.

    Attributes:
        recipe: the recipe's file.
        out: folder of the runs.
        seeds: training seeds.
        arms: arguments of the recipe by the name of the arm.
        figures: columns of the table: name -> SET:METRIC terms, of which the mean is shown.
        low: the arm without what is looked for.
        high: the arm that shows what could be had; none if there is no such arm.
    """

    recipe: Path
    out: Path
    seeds: Sequence[int]
    arms: Mapping[str, Sequence[str]]
    figures: Mapping[str, Sequence[str]]
    low: str = "single"
    high: str | None = None

    def folder(self, seed: int, arm: str) -> Path:
        """Run directory of an arm."""
        return self.out / f"seed-{seed}" / arm

    def command(self, seed: int, arm: str) -> list[str]:
        """The command of a run, without the launcher."""
        return [str(self.recipe), "--run-dir", str(self.folder(seed, arm)), "--seed", str(seed), *self.arms[arm]]


def control_arms(names: Sequence[str], extra: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Arguments of the stages, of the controls, and of an experiment's own arms, by name.

    Raises:
        UserError: for a name that is none of them.
    """
    known = {STAGES: (), **{name: ("--control", name) for name in CONTROLS}, **extra}
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"there is no arm {unknown[0]!r}; there are {', '.join(known)}")
    return {name: tuple(known[name]) for name in names or known}


def run_arms(plan: ExperimentPlan, *, launcher: Sequence[str], jobs: int) -> None:
    """Run what is not done yet, `jobs` runs at a time.

    Raises:
        UserError: when a run fails (the others are finished first, and nothing is lost), or `out` is of another recipe.
    """
    _check_recipe(plan)
    todo = [(seed, arm) for seed in plan.seeds for arm in plan.arms if not is_done(plan.folder(seed, arm))]
    todo.sort(key=lambda pair: (pair[0], pair[1] != STAGES, pair[1] in SAME_FIRST_STAGE))
    children = _Children()
    done: dict[tuple[int, str], Future[None]] = {}

    def run(seed: int, arm: str) -> None:
        source = (seed, STAGES)
        if arm in SAME_FIRST_STAGE and STAGES in plan.arms:
            if source in done:
                done[source].result()  # submitted before, so it runs or has run
            _copy_first_stage(plan.folder(*source), plan.folder(seed, arm))
        started = time.monotonic()
        children.call([*launcher, *plan.command(seed, arm)], plan.folder(seed, f"{arm}.log"), jobs)
        if not is_done(plan.folder(seed, arm)):  # a planned stop is no failure of the run
            raise UserError(f"{plan.folder(seed, arm)} was stopped before its end")
        bar.update()
        tqdm.write(f"seed {seed}, {arm}: done in {(time.monotonic() - started) / 60:.1f} min")

    with _interrupted_by_sigterm(), Progress(total=len(todo), desc="runs", unit="run") as bar:
        pool = ThreadPoolExecutor(jobs)
        try:
            for pair in todo:
                done[pair] = pool.submit(run, *pair)
            wait(done.values())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            children.stop()
    if failed := [str(error) for future in done.values() if (error := future.exception())]:
        raise UserError(f"{len(failed)} of {len(todo)} runs failed, the first: {failed[0]}; the same command continues")


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, so that no run is left behind."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _check_recipe(plan: ExperimentPlan) -> None:
    """Runs that are done are not started again, so what they were made from is checked here."""
    path = plan.out / "experiment.json"
    arms = {name: list(arguments) for name, arguments in plan.arms.items()}
    before: dict[str, Any] = read_json(path) if path.exists() else {"recipe": file_digest(plan.recipe), "arms": {}}
    changed = [name for name in arms if before["arms"].get(name, arms[name]) != arms[name]]
    if before["recipe"] != file_digest(plan.recipe) or changed:
        what = f"the arguments of {', '.join(changed)} differ" if changed else f"{plan.recipe} has changed"
        raise UserError(f"{plan.out} was made from another experiment: {what}; use another --out")
    plan.out.mkdir(parents=True, exist_ok=True)
    write_json(path, {**before, "arms": {**before["arms"], **arms}})


class _Children:
    """Child processes, which are ended with this one."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()

    def call(self, command: Sequence[str], log: Path, jobs: int) -> None:
        threads = str(max(1, count_cores() // jobs))
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": threads}
            )
        with self._lock:
            self._running.add(process)
        code = process.wait()
        with self._lock:
            self._running.discard(process)
        if code:
            lines = log.read_text(errors="replace").strip().splitlines() or [f"exit code {code}"]
            raise UserError(f"{' '.join(command)}: {lines[-1]} (all of it in {log})")

    def stop(self) -> None:
        with self._lock:
            for process in self._running:
                process.terminate()


def is_done(run: Path) -> bool:
    """Whether a run has its combined model and results."""
    return (run / COMBINED / DONE).exists()


def _copy_first_stage(source: Path, target: Path) -> None:
    if target.exists():
        return
    temporary = target.with_name(f"{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    for name in ("index", "stage-0"):
        shutil.copytree(source / name, temporary / name)
    temporary.rename(target)


def table(plan: ExperimentPlan, *, resamples: int = 2000) -> str:
    """The figures of all arms with 95 % intervals, as Markdown, also written to `out`/table.md and results.jsonl.

    Intervals are a paired bootstrap over seeds and items. With an arm `high`, each figure has the share of the gap
    between `low` and `high` that an arm recovers.

    Raises:
        UserError: if a figure is not among the results.
    """
    rows = {
        **{arm: (arm, COMBINED) for arm in plan.arms},
        **_rows_of_stages(plan),
    }
    values = _outcomes(plan, rows)
    found = crossed_bootstrap(values, partial(_quantities, plan), resamples=resamples)
    items = {name: next(iter(values.values()))[terms[0]].shape[1] for name, terms in plan.figures.items()}
    _write(plan, found, items)
    text = "\n\n".join(_sections(plan, list(rows), found, items))
    with atomic_path(plan.out / "table.md") as path:
        path.write_text(text + "\n", encoding="utf-8")
    return text


def _rows_of_stages(plan: ExperimentPlan) -> dict[str, tuple[str, str]]:
    """Each stage alone, and the combinations of all stages."""
    if STAGES not in plan.arms:
        return {}
    last = len(list(plan.folder(plan.seeds[0], STAGES).glob("stage-*"))) - 1
    alone = {f"{STAGES}, stage {s} alone": (STAGES, f"stage-{s}") for s in range(last + 1)}
    together = {f"{STAGES}, {how}": (STAGES, f"stages-0-{last}-{how}") for how in COMBINATIONS if last}
    return alone | together


def _outcomes(plan: ExperimentPlan, rows: Mapping[str, tuple[str, str]]) -> Values:
    """Outcomes [seeds, items] by row and SET:METRIC; NaN where an arm is not measured on a set.

    Raises:
        UserError: if the runs of an arm were measured on different sets of one name, or none has a figure.
    """
    values: dict[str, dict[str, np.ndarray]] = {row: {} for row in rows}
    for term in dict.fromkeys(term for terms in plan.figures.values() for term in terms):
        found = {row: _of_seeds(plan, arm, label, term) for row, (arm, label) in rows.items()}
        known = next((of_row for of_row in found.values() if of_row is not None), None)
        if known is None:
            raise UserError(f"no run in {plan.out} has results for {term}; name its set to --eval, or use a new --out")
        for row, of_row in found.items():
            values[row][term] = np.full_like(known, np.nan) if of_row is None else of_row
    return values


def _of_seeds(plan: ExperimentPlan, arm: str, label: str, term: str) -> Float[np.ndarray, "seeds items"] | None:
    """The outcome of each item under each seed; nothing if no seed has results on the set."""
    dataset, _, metric = term.partition(":")
    results = [_result(plan.folder(seed, arm), label, dataset) for seed in plan.seeds]
    present = [result for result in results if result is not None]
    if len({result.record["data_sha256"] for result in present}) > 1 or 0 < len(present) < len(results):
        raise UserError(
            f"the runs of {arm} were not all measured on the same {dataset}; it was made anew meanwhile, or is missing "
            f"in some: use a new --out"
        )
    runs = (plan.folder(seed, arm) for seed in plan.seeds)
    return (
        np.stack([_outcome(run, result, metric) for run, result in zip(runs, present, strict=True)])
        if present
        else None
    )


def _result(run: Path, label: str, dataset: str) -> Result | None:
    results = (result for result in load_results(run) if result.dataset == dataset and result.label == label)
    return next(results, None)


def _outcome(run: Path, result: Result, metric: str) -> Float[np.ndarray, "items"]:
    """The outcome of each item, or of each unit where several items share one.

    Raises:
        UserError: if the results do not have the metric.
    """
    outcomes, name = result.outcomes, metric
    if metric not in outcomes and not any(WIDTH.search(other) for other in outcomes):
        name = WIDTH.sub("", metric)  # features of one stage, which have no narrower figure of their own
    if name not in outcomes:
        raise UserError(f"{run} has no metric {metric!r} for {result.dataset}; it has {', '.join(outcomes)}")
    values = np.asarray(outcomes[name], np.float64)
    if f"unit:{name}" not in outcomes:
        return values
    units, of_unit = np.unique(outcomes[f"unit:{name}"], return_inverse=True)
    return np.bincount(of_unit, weights=values) * len(units) / len(values)


def _quantities(plan: ExperimentPlan, means: Means) -> dict[str, np.ndarray]:
    """Quantities by name, as `_key` makes it: the mean, the difference to the stages, the share of the gap."""
    found = {}
    for row in means:
        for name in plan.figures:
            value = found[_key(row, name, "mean")] = _figure(plan, means, row, name)
            if STAGES in means and row in plan.arms and row != STAGES:
                found[_key(row, name, "behind")] = _figure(plan, means, STAGES, name) - value
            if plan.high:
                low, high = (_figure(plan, means, arm, name) for arm in (plan.low, plan.high))
                found[_key(row, name, "recovered")] = (value - low) / (high - low)
    return found


def _key(row: str, figure: str, what: str) -> str:
    return json.dumps([row, figure, what])


def _figure(plan: ExperimentPlan, means: Means, row: str, name: str) -> np.ndarray:
    figure: np.ndarray = np.mean([means[row][term] for term in plan.figures[name]], axis=0)
    return figure


def _sections(
    plan: ExperimentPlan, rows: Sequence[str], found: Mapping[str, Estimate], items: Mapping[str, int]
) -> Iterator[str]:
    """The tables: figures, what of the gap is recovered, and how far the controls are behind the stages."""
    seeds = f"{len(plan.seeds)} seeds ({', '.join(map(str, plan.seeds))})"
    yield f"Percent, mean of {seeds} with 95 % intervals over seeds and items:"
    yield _markdown(plan, rows, found, "mean")
    if plan.high:
        yield f"Share of the gap from `{plan.low}` to `{plan.high}` that is recovered, in percent:"
        yield _markdown(plan, [row for row in rows if row not in (plan.low, plan.high)], found, "recovered")
    if STAGES in plan.arms:
        yield f"How far each arm is behind `{STAGES}`, in points, paired:"
        yield _markdown(plan, [row for row in plan.arms if row != STAGES], found, "behind")
    yield "Items: " + ", ".join(f"{name} {number}" for name, number in items.items())


def _markdown(plan: ExperimentPlan, rows: Sequence[str], found: Mapping[str, Estimate], what: str) -> str:
    lines = [["", *plan.figures], ["---", *["--:"] * len(plan.figures)]]
    lines += [[row, *(_cell(found[_key(row, name, what)]) for name in plan.figures)] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(estimate: Estimate) -> str:
    return format_percent(estimate.value, (estimate.low, estimate.high))


def _write(plan: ExperimentPlan, found: Mapping[str, Estimate], items: Mapping[str, int]) -> None:
    with atomic_path(plan.out / "results.jsonl") as path:
        for key, estimate in ((key, estimate) for key, estimate in found.items() if np.isfinite(estimate.value)):
            row, figure, what = json.loads(key)
            record = {"row": row, "figure": figure, "what": what, **estimate._asdict()}
            append_jsonl(path, {**record, "seeds": list(plan.seeds), "items": items[figure]})
