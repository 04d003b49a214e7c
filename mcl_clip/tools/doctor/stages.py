"""Steps and groups of the stages, and a run that exists."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from mcl_clip.core.files import STARTED, read_json
from mcl_clip.runs.phase import Phase
from mcl_clip.tools.doctor.findings import Finding, attempt
from mcl_clip.tools.doctor.needs import MAX_LABELS, StageEstimate, rows_of_a_label

MUCH_WAITING = 0.3  # of the time
FAULTS = {
    "weightless": "rows with fewer than {min_negatives} negatives get no weight; use fewer clusters in earlier stages",
    "merged": "most are merged, into groups of at least {min_group_size} rows, and say less; use fewer clusters",
    "mixed": "a batch of {global_batch_size} holds several groups, with about {negatives} negatives a row; use fewer "
    "clusters before this stage, or smaller batches",
}


def check_steps(stages: Sequence[StageEstimate], *, rows: int | None) -> Iterator[Finding]:
    """Steps and epochs; `rows` are those of an epoch, if they are known."""
    trained = {number: stage for number, stage in enumerate(stages) if stage.steps}
    epochs = {number: stage.steps / -(-rows // stage.global_batch_size) for number, stage in trained.items() if rows}
    each = ", ".join(
        f"{stage.steps:,} of {stage.global_batch_size:,} rows"
        + (f" ({epochs[number]:,.0f} epochs)" if epochs.get(number, 0) >= 100 else "")
        + (f" ({epochs[number]:.3g} epochs)" if 0 < epochs.get(number, 0) < 100 else "")
        for number, stage in trained.items()
    )
    total = sum(stage.steps for stage in stages)
    yield Finding("ok", "steps", f"{total:,} steps in {len(stages)} stage{'s' * (len(stages) > 1)}: {each}")
    if large := [number for number, stage in trained.items() if rows and stage.global_batch_size > rows]:
        batch = f"--stages.{large[0]}.train.global-batch-size {stages[large[0]].global_batch_size}"
        wrong = f"{batch} is more than the {rows:,} rows of an epoch: batches are not full"
        yield Finding("warning", "steps", wrong + _also(large))
    if slow := [number for number, stage in trained.items() if stage.warmup_steps >= stage.steps]:
        warmup = f"--stages.{slow[0]}.train.warmup-steps {stages[slow[0]].warmup_steps}"
        wrong = f"{warmup} of {stages[slow[0]].steps} steps: the learning rate never gets past its warm-up"
        yield Finding("warning", "steps", wrong + _also(slow))


def _also(numbers: Sequence[int]) -> str:
    """The stages after the first that have the same fault."""
    return f" (also stage {', '.join(map(str, numbers[1:]))})" if len(numbers) > 1 else ""


def check_groups(stages: Sequence[StageEstimate], rows: int) -> Iterator[Finding]:
    """How large groups can be expected to be, against the batch that they have to fill."""
    sizes = rows_of_a_label(stages, rows)
    grouped = [number for number, stage in enumerate(stages) if number and stage.steps and stage.groups != "none"]
    if grouped:
        expected = ", ".join(f"stage {number} {sizes[number]:,.4g}" for number in grouped)
        yield Finding("ok", "groups", f"rows of a label on average, before small groups are merged: {expected}")
    faults: dict[str, list[int]] = {}
    for number in grouped:
        faults.setdefault(_fault(stages[number], sizes[number]), []).append(number)
    for fault, numbers in faults.items():
        if fault:
            stage, size = stages[numbers[0]], sizes[numbers[0]]
            filled = FAULTS[fault].format(**vars(stage), negatives=max(0, round(size) - 1))
            yield Finding(
                "warning", "groups", f"stage {numbers[0]} has {size:,.4g} rows a label: {filled}{_also(numbers)}"
            )
    for number, stage in enumerate(stages):
        if max(stage.clusters) > rows:
            wrong = f"--stages.{number}.cluster.num-clusters {max(stage.clusters)} is more than the {rows:,} rows"
            yield Finding("FAIL", "groups", f"{wrong}; use a smaller number")
    if math.prod(stage.labels for stage in stages) >= MAX_LABELS:
        yield Finding(
            "FAIL", "groups", "the clusters of all stages make over 2^63 labels; use fewer stages or clusters"
        )


def _fault(stage: StageEstimate, size: float) -> str:
    """What is wrong with labels of so many rows, as a key of `FAULTS`; empty if nothing is."""
    if size <= stage.min_negatives:
        return "weightless"
    if size < stage.min_group_size:
        return "merged"
    return "mixed" if size < stage.global_batch_size else ""


def check_lock(run_dir: Path) -> Iterator[Finding]:
    """Whether another job holds the run directory."""
    if (path := run_dir / "lock").exists():
        owner, wrongs = attempt("run", lambda: read_json(path))
        named = f"process {owner.get('pid')} on {owner.get('host')}" if isinstance(owner, dict) else "a job"
        text = f"{run_dir} is held by {named}; a job that is dead does not hinder, one that lives does"
        yield from wrongs or [Finding("warning", "run", text)]


def check_waiting(stage: int, records: Sequence[Mapping[str, float]]) -> Iterator[Finding]:
    """Whether the steps of a stage, by its metrics, waited for data."""
    found = (record.get("data_wait_share") for record in records)
    shares = [share for share in found if isinstance(share, float | int)]
    last = shares[-max(1, len(shares) // 10) :]
    if last and (share := sum(last) / len(last)) > MUCH_WAITING:
        way_out = "give more --machine.workers, faster storage, or smaller pictures"
        text = f"stage {stage} spent {100 * share:.0f} % of its time waiting for data; {way_out}"
        yield Finding("warning", "reading", text)


def check_phases(plan: Callable[[], Sequence[Phase]]) -> Iterator[Finding]:
    """Whether the phases that are done or begun were made by this recipe. Only reads."""
    phases, wrongs = attempt("run", plan)
    yield from wrongs
    done = 0
    for phase in phases or ():
        is_done, wrongs = attempt("run", phase.check)
        wrongs = wrongs or _check_begun(phase, is_done=bool(is_done))
        if wrongs:
            yield from wrongs
            return  # what follows was made from it
        done += bool(is_done)
    if phases:
        yield Finding("ok", "run", f"the recipe matches: {done} of {len(phases)} phases are done and stay")


def _check_begun(phase: Phase, *, is_done: bool) -> list[Finding]:
    if is_done or phase.grows or not (phase.folder / STARTED).exists():
        return []
    difference, wrongs = attempt("run", lambda: phase.difference(STARTED))
    if not difference:
        return wrongs
    way_out = f"use the earlier setting, another --run-dir, or delete {phase.folder} to make it anew"
    return [Finding("FAIL", "run", f"{phase.folder} is begun but does not match this recipe: {difference}; {way_out}")]


def check_suppression(
    stage: int, said: str, *, labels_needed: float, clusters: int, next_start: str | None, is_pretrained: bool
) -> Iterator[Finding]:
    """What a finished stage says about the next: repeats it, with the clusters and the start that follow.

    Args:
        stage: its number.
        said: what `diagnose` said about it.
        labels_needed: by how many labels its rows are to be divided so that each is a batch.
        clusters: of this stage in the recipe.
        next_start: where the next stage starts from; none if there is no next stage.
        is_pretrained: whether the towers start from weights, and so never from scratch.
    """
    wanted = max(2, round(labels_needed))
    if "suppressed. " in said:
        start = "base" if is_pretrained else "scratch"
        is_followed = next_start in (None, start) and wanted / 2 <= clusters <= 2 * wanted
        advice = (
            f"--stages.{stage}.cluster.num-clusters up to {wanted} (groups of one batch; many more clusters than "
            f"values that were learned), and --stages.{stage + 1}.start {start}"
        )
    elif said.startswith("still learning"):
        is_followed = next_start in (None, "previous")
        advice = f"more steps, or --stages.{stage + 1}.start previous, which goes on learning"
    else:
        yield Finding("ok", "learned", f"stage {stage}: {said}")
        return
    has = f"; the recipe has {clusters} clusters" + (f" and starts from {next_start}" if next_start else "")
    yield Finding("ok" if is_followed else "warning", "learned", f"stage {stage}: {said}. It follows: {advice}{has}")
