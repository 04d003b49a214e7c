"""Run a recipe and its controls over several seeds, and tabulate the results.

Each run is a process of its own, `python RECIPE --run-dir OUT/seed-N/ARM --seed N ...`, and can be repeated by hand.
Finished runs are skipped, so the same command resumes an experiment. Controls that change only later stages start from
a copy of the finished stage 0; the run checks its fingerprints.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from mcl_clip.config import ExperimentConfig, RunConfig
from mcl_clip.core.distributed import count_cores
from mcl_clip.core.errors import UserError
from mcl_clip.core.files import DONE, append_jsonl, atomic_dir, atomic_path, file_digest, read_json, write_json
from mcl_clip.core.progress import Progress
from mcl_clip.core.stats import Estimate, Means, crossed_bootstrap
from mcl_clip.model.multistage import COMBINATIONS
from mcl_clip.results.record import COMBINED, Result, load_results
from mcl_clip.results.text import CONTROLS, format_percent, markdown_table
from mcl_clip.runs.controls import with_control

STAGES = "mcl"  # the arm of the recipe itself
SAME_FIRST_STAGE = ("ensemble", "no-groups", "random-groups")
WIDTH = re.compile(r"_width_\d+$")

Values = Mapping[str, Mapping[str, Float[np.ndarray, "_seeds _items"]]]


@dataclass(frozen=True, kw_only=True)
class ExperimentPlan:
    """Runs and table of an experiment."""

    recipe: Path
    out: Path  # folder of the runs
    seeds: Sequence[int]
    arms: Mapping[str, Sequence[str]]  # arguments of the recipe by arm, besides run directory and seed
    figures: Mapping[str, Sequence[str]]  # columns of the table: SET:METRIC terms, whose mean is shown, by name
    low: str = "single"  # the arms at both ends of the gap
    high: str | None = None  # None to leave out the share of the gap

    def folder(self, seed: int, arm: str) -> Path:
        """Return the run directory of an arm."""
        return self.out / f"seed-{seed}" / arm


def plan_experiment(
    recipe: Path,
    config: RunConfig,
    settings: ExperimentConfig,
    *,
    out: Path,
    seeds: Sequence[int],
    arms: Sequence[str] = (),
    arguments: Sequence[str] = (),
) -> ExperimentPlan:
    """Plan an experiment with the RECIPE `config` and the EXPERIMENT `settings` of a file `recipe`.

    By default it has all arms, without `no-groups` where it equals `ensemble`.

    Raises:
        UserError: for repeated seeds, an unknown arm, or a recipe that publishes its runs.
    """
    if len(set(seeds)) < len(seeds) or not seeds:
        raise UserError(f"--seeds {tuple(seeds)} must be one or more different numbers")
    if config.publish.repo or any(argument.startswith("--publish.") for argument in arguments):
        raise UserError("every arm and seed would be published to the same repository; leave out --publish")
    chosen = control_arms(arms, settings.arms)
    ensemble, no_groups = (with_control(replace(config, control=c), rows=0).stages for c in ("ensemble", "no-groups"))
    if not arms and ensemble == no_groups:
        del chosen["no-groups"]
    return ExperimentPlan(
        recipe=recipe,
        out=out,
        seeds=seeds,
        arms={name: (*arguments, *own) for name, own in chosen.items()},  # of a repeated flag, the last one counts
        figures=settings.figures,
        high=settings.high if settings.high in chosen and ExperimentPlan.low in chosen else None,
    )


def control_arms(names: Sequence[str], extra: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Return the arguments of some arms (the recipe, its controls and `extra`) by name; without `names`, of all.

    Raises:
        UserError: for an unknown name.
    """
    known = {STAGES: (), **{name: ("--control", name) for name in CONTROLS}, **extra}
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"there is no arm {unknown[0]!r}; there are {', '.join(known)}")
    return {name: tuple(known[name]) for name in names or known}


def run_arms(plan: ExperimentPlan, *, launcher: Sequence[str], jobs: int) -> None:
    """Run all unfinished runs of an experiment, `jobs` at a time, each started by the command `launcher`.

    Raises:
        UserError: if a run fails, after the others are finished; or if `out` belongs to another experiment.
    """
    _check_recipe(plan)
    todo = [(seed, arm) for seed in plan.seeds for arm in plan.arms if not is_done(plan.folder(seed, arm))]
    # The recipe comes before the controls that copy its first stage, which wait for it.
    todo.sort(key=lambda pair: (pair[0], pair[1] != STAGES, pair[1] in SAME_FIRST_STAGE))
    running: set[subprocess.Popen[bytes]] = set()
    futures: dict[tuple[int, str], Future[None]] = {}

    def run(seed: int, arm: str) -> None:
        source, folder = (seed, STAGES), plan.folder(seed, arm)
        if arm in SAME_FIRST_STAGE and STAGES in plan.arms:
            if source in futures:
                futures[source].result()  # submitted earlier, so it is running or done: no deadlock
            if not folder.exists():
                with atomic_dir(folder) as copy:
                    for name in ("index", "stage-0"):
                        shutil.copytree(plan.folder(*source) / name, copy / name)
        started = time.monotonic()
        command = [*launcher, str(plan.recipe), "--run-dir", str(folder), "--seed", str(seed), *plan.arms[arm]]
        _call(command, folder.with_name(f"{arm}.log"), threads=max(1, count_cores() // jobs), running=running)
        if not is_done(folder):  # a planned stop has exit code 0
            raise UserError(f"{folder} was stopped before it was done")
        bar.update()
        tqdm.write(f"seed {seed}, {arm}: done in {(time.monotonic() - started) / 60:.1f} min")

    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # KeyboardInterrupt, which stops all runs
    pool = ThreadPoolExecutor(jobs)
    with Progress(total=len(todo), desc="runs", unit="run") as bar:
        try:
            for pair in todo:
                futures[pair] = pool.submit(run, *pair)
            wait(futures.values())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(running):  # a copy, since threads remove what has ended
                process.terminate()
            signal.signal(signal.SIGTERM, before)
    if failed := [str(error) for future in futures.values() if (error := future.exception())]:
        raise UserError(f"{len(failed)} of {len(todo)} runs failed, the first: {failed[0]}; the same command resumes")


def _check_recipe(plan: ExperimentPlan) -> None:
    """Record the recipe and arms of `out`, or compare them: finished runs are skipped and check nothing."""
    path = plan.out / "experiment.json"
    arms = {name: list(arguments) for name, arguments in plan.arms.items()}
    digest = file_digest(plan.recipe)
    recorded: dict[str, Any] = read_json(path) if path.exists() else {"recipe": digest, "arms": {}}
    changed = [name for name in arms if recorded["arms"].get(name, arms[name]) != arms[name]]
    if recorded["recipe"] != digest or changed:
        what = f"the arguments of {', '.join(changed)} differ" if changed else f"{plan.recipe} has changed"
        raise UserError(f"{plan.out} holds another experiment: {what}; use another --out")
    write_json(path, {**recorded, "arms": {**recorded["arms"], **arms}})


def _call(command: Sequence[str], log: Path, *, threads: int, running: set[subprocess.Popen[bytes]]) -> None:
    """Run a command, which is in `running` until it ends; raise UserError with its last line if it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    running.add(process)
    code = process.wait()
    running.discard(process)
    if code:
        lines = log.read_text(errors="replace").strip().splitlines() or [f"exit code {code}"]
        raise UserError(f"{' '.join(command)}: {lines[-1]} (full output in {log})")


def is_done(run: Path) -> bool:
    """Return whether a run has its combined model and results."""
    return (run / COMBINED / DONE).exists()


def table(plan: ExperimentPlan, *, resamples: int = 2000) -> str:
    """Tabulate the figures of all arms with 95 % intervals; write `out`/table.md and `out`/results.jsonl.

    Intervals are from a paired bootstrap over seeds and items. With an arm `high`, the share of the gap between `low`
    and `high` that an arm recovers is shown too. Returns Markdown.

    Raises:
        UserError: if a figure is not among the results.
    """
    rows = {arm: (arm, COMBINED) for arm in plan.arms}
    if STAGES in plan.arms:  # also each stage alone, and the other combinations of all stages
        last = len(list(plan.folder(plan.seeds[0], STAGES).glob("stage-*"))) - 1
        rows |= {f"{STAGES}, stage {s} alone": (STAGES, f"stage-{s}") for s in range(last + 1)}
        rows |= {f"{STAGES}, {how}": (STAGES, f"stages-0-{last}-{how}") for how in COMBINATIONS if last}
    values = _outcomes(plan, rows)
    estimates = crossed_bootstrap(values, partial(_quantities, plan), resamples=resamples)
    items = {name: next(iter(values.values()))[terms[0]].shape[1] for name, terms in plan.figures.items()}
    with atomic_path(plan.out / "results.jsonl") as path:
        for key, estimate in estimates.items():
            if np.isfinite(estimate.value):
                row, figure, what = json.loads(key)
                record = {"row": row, "figure": figure, "what": what, **estimate._asdict()}
                append_jsonl(path, {**record, "seeds": list(plan.seeds), "items": items[figure]})
    text = "\n\n".join(_sections(plan, list(rows), estimates, items))
    with atomic_path(plan.out / "table.md") as path:
        path.write_text(text + "\n", encoding="utf-8")
    return text


def _outcomes(plan: ExperimentPlan, rows: Mapping[str, tuple[str, str]]) -> Values:
    """Read outcomes [seeds, items] by row and SET:METRIC; NaN where an arm was not evaluated on a set.

    Raises:
        UserError: if the runs of an arm were evaluated on different sets of the same name, or no run has a figure.
    """
    values: dict[str, dict[str, np.ndarray]] = {row: {} for row in rows}
    results = {arm: [load_results(plan.folder(seed, arm)) for seed in plan.seeds] for arm in plan.arms}
    for term in dict.fromkeys(term for terms in plan.figures.values() for term in terms):
        dataset, _, metric = term.partition(":")
        shape: tuple[int, ...] = ()
        for row, (arm, label) in rows.items():
            wanted = [[r for r in of_run if (r.dataset, r.label) == (dataset, label)] for of_run in results[arm]]
            present = [of_run[0] for of_run in wanted if of_run]
            if len({result.record["data_sha256"] for result in present}) > 1 or 0 < len(present) < len(plan.seeds):
                raise UserError(
                    f"the runs of {arm} were not all evaluated on the same {dataset}: the set has changed, or some "
                    f"runs lack it; use a new --out"
                )
            if present:
                values[row][term] = np.stack([_item_outcomes(result, metric) for result in present])
                shape = values[row][term].shape
        if not shape:
            raise UserError(f"no run in {plan.out} has results for {term}; name its set to --eval, or use a new --out")
        for of_row in values.values():
            of_row.setdefault(term, np.full(shape, np.nan))
    return values


def _item_outcomes(result: Result, metric: str) -> Float[np.ndarray, "items"]:
    """Return the outcome of each item, or of each unit where several items share one.

    Raises:
        UserError: if the results do not have the metric.
    """
    outcomes, name = result.outcomes, metric
    if metric not in outcomes and not any(WIDTH.search(other) for other in outcomes):
        name = WIDTH.sub("", metric)  # features of a single stage already have this width
    if name not in outcomes:
        has = ", ".join(outcomes)
        raise UserError(f"{result.folder} has no metric {metric!r} for {result.dataset}; it has {has}")
    values = np.asarray(outcomes[name], np.float64)
    if f"unit:{name}" not in outcomes:
        return values
    # Sums per unit, scaled so that their mean over units is the mean over items.
    units, unit_of_item = np.unique(outcomes[f"unit:{name}"], return_inverse=True)
    return np.bincount(unit_of_item, weights=values) * len(units) / len(values)


def _quantities(plan: ExperimentPlan, means: Means) -> dict[str, np.ndarray]:
    """Compute the mean, the difference to the recipe and the share of the gap, by `_key`."""
    figures: dict[tuple[str, str], np.ndarray] = {
        (row, name): np.mean([of_row[term] for term in terms], axis=0)
        for row, of_row in means.items()
        for name, terms in plan.figures.items()
    }
    quantities = {}
    for (row, name), value in figures.items():
        quantities[_key(row, name, "mean")] = value
        if STAGES in means and row in plan.arms and row != STAGES:
            quantities[_key(row, name, "behind")] = figures[STAGES, name] - value
        if plan.high:
            low, high = figures[plan.low, name], figures[plan.high, name]
            quantities[_key(row, name, "recovered")] = (value - low) / (high - low)
    return quantities


def _key(row: str, figure: str, what: str) -> str:
    return json.dumps([row, figure, what])


def _sections(
    plan: ExperimentPlan, rows: Sequence[str], estimates: Mapping[str, Estimate], items: Mapping[str, int]
) -> Iterator[str]:
    """Format the tables: figures, the recovered share of the gap, and differences of the controls to the recipe."""

    def table_of(rows: Sequence[str], what: str) -> str:
        lines = [["", *plan.figures]]
        for row in rows:
            of_row = [estimates[_key(row, name, what)] for name in plan.figures]
            lines.append([row, *(format_percent(each.value, (each.low, each.high)) for each in of_row)])
        return markdown_table(lines)

    seeds = f"{len(plan.seeds)} seeds ({', '.join(map(str, plan.seeds))})"
    yield f"Percent, mean of {seeds} with 95 % intervals over seeds and items:"
    yield table_of(rows, "mean")
    if plan.high:
        yield f"Share of the gap from `{plan.low}` to `{plan.high}` that is recovered, in percent:"
        yield table_of([row for row in rows if row not in (plan.low, plan.high)], "recovered")
    if STAGES in plan.arms:
        yield f"Difference of `{STAGES}` to each arm, in percentage points, paired:"
        yield table_of([row for row in plan.arms if row != STAGES], "behind")
    yield "Items: " + ", ".join(f"{name} {number}" for name, number in items.items())
