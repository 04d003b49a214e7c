"""`mcl-clip doctor`: find what will fail, or perform badly, before a job runs; and the progress of a run for `status`.

Nothing is written; of the training data a sample is read.
"""

import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from mcl_clip.config import RunConfig, StageConfig
from mcl_clip.core.distributed import count_cores
from mcl_clip.core.errors import UserError
from mcl_clip.core.files import STARTED, read_json, read_jsonl
from mcl_clip.data.row_order import Source
from mcl_clip.data.workers import shared_memory
from mcl_clip.eval.task import Task
from mcl_clip.report.page import REPORT
from mcl_clip.results.audit import FOLDER, read_audit
from mcl_clip.results.record import PHASES, phase_state, read_run
from mcl_clip.runs.context import RunContext, with_behavior
from mcl_clip.runs.controls import with_control
from mcl_clip.runs.eval_phase import diagnosis
from mcl_clip.runs.phase import Phase
from mcl_clip.runs.pipeline import check_held_out, check_publishing, check_stages, plan_phases
from mcl_clip.runs.train_phase import min_group_size, open_resharded
from mcl_clip.stages.diagnose import Diagnosis
from mcl_clip.tools.doctor_data import (
    RowCounts,
    check_reading,
    check_text_tower,
    check_tokenizer,
    check_weights,
    find_model_cfg,
    inspect_shards,
    open_sets,
)
from mcl_clip.tools.doctor_machine import (
    Finding,
    attempt,
    check_devices,
    check_disk,
    check_memory,
    check_versions,
    find_gpus,
    find_versions,
    free_memory,
    machines_for,
)
from mcl_clip.tools.estimates import (
    MAX_LABELS,
    TowerSize,
    clusters_per_modality,
    estimate_disk,
    measure_stages,
    num_labels,
    rows_per_label,
)
from mcl_clip.train.trackers import check_trackers

MAX_DATA_WAIT_SHARE = 0.3
MAX_NAMES = 6  # of parameters in a line
GREEN, YELLOW, RED, FAINT, PLAIN = "\033[32m", "\033[33m", "\033[31m", "\033[2m", "\033[0m"
COLOURS = {"ok": GREEN, "warning": YELLOW, "FAIL": RED, "done": GREEN, "partial": YELLOW, "missing": FAINT}


def finding_text(finding: Finding, *, columns: int = 0, has_colours: bool = False) -> str:
    """Format a finding as one line, or wrapped to `columns` characters if given."""
    level = f"{finding.level:<8}"
    text = f"{finding.topic:<10} {finding.text}"
    if columns:
        text = textwrap.fill(text, max(40, columns - 8), subsequent_indent=" " * 11).replace("\n", f"\n{'':8}")
    return f"{COLOURS[finding.level]}{level}{PLAIN}{text}" if has_colours else level + text


def examine(config: RunConfig, *, processes: int, make_accelerator: Callable[[], Accelerator]) -> Iterator[Finding]:
    """Run all checks of a recipe; 0 `processes` are one per GPU of this machine, or one without GPUs.

    `make_accelerator` is called only if the data can be opened and phases can be planned.
    """
    gpus, cores = find_gpus(), count_cores()
    processes = processes or len(gpus) or 1
    machines = machines_for(processes, gpus)
    yield from check_versions(find_versions())
    yield from attempt("recipe", partial(check_stages, config, processes=processes))
    config = (yield from attempt("run", partial(with_behavior, config))) or config
    rows = yield from inspect_shards(config)
    config = with_control(config, rows=rows.total if rows else 0)
    cfg = yield from attempt("tower", partial(find_model_cfg, config.tower))
    measure = partial(measure_stages, config.stages, cfg, name=config.tower.name)
    sizes = yield from attempt("tower", partial(measure, decays_unlisted=config.behavior == "0.6"))
    yield from check_devices(
        gpus,
        cores=cores,
        processes=processes,
        workers=config.machine.workers,
        precisions=[stage.train.precision for stage in config.stages if stage.train.steps],
        trained=max((size.trained for size in sizes or () if size), default=0),
    )
    if rows and cfg:
        # Loaders with a core of their own; with 0 workers the training process loads by itself.
        loaders = max(1, machines * min(config.machine.workers * processes // machines, cores))
        yield from check_reading(config, rows.index, cfg, loaders=loaders)
    tasks = yield from open_sets(config)
    yield from attempt("trackers", partial(check_trackers, config.machine.trackers))
    if repo := config.publish.repo:
        failures = list(attempt("publish", partial(check_publishing, config)))
        yield from failures or [Finding("ok", "publish", f"to {repo}")]
    if cfg is not None:
        yield from check_weights(config.tower, cfg)
        loads_weights = not config.tower.is_pretrained and config.behavior != "0.6"
        text_cfg = cfg.get("text_cfg")
        yield from check_text_tower(text_cfg if isinstance(text_cfg, Mapping) else {}, loads_weights=loads_weights)
    if cfg and any(sizes or ()):  # the model can be built here
        yield from attempt("tower", partial(check_tokenizer, cfg))
    if sizes:
        per_epoch = rows.per_epoch(config.data.weights, config.data.holdout_rows) if rows else None
        yield from check_steps(config.stages, rows=per_epoch)
        yield from describe_decay(config.stages, sizes)
        yield from check_groups(config.stages, rows.total) if rows else ()
        memory = {"free": free_memory(), "shared": shared_memory()[1]}
        yield from check_memory(config.stages, sizes, config.machine, gpus, processes=processes, **memory)
        total, keep = rows.total if rows else 0, config.machine.keep_checkpoints
        yield from check_disk(config.run_dir, estimate_disk(config.stages, sizes, rows=total, keep_checkpoints=keep))
    yield from _check_run(config, rows, tasks, make_accelerator)


def check_steps(stages: Sequence[StageConfig], *, rows: int | None) -> Iterator[Finding]:
    """Report steps and epochs of `rows`; warn of batches above an epoch and of a warm-up that never ends."""
    trained = {number: stage.train for number, stage in enumerate(stages) if stage.train.steps}
    parts = []
    for train in trained.values():
        epochs = train.steps / -(-rows // train.global_batch_size) if rows else 0
        shown = f" ({f'{epochs:,.0f}' if epochs >= 100 else f'{epochs:.3g}'} epochs)" if epochs else ""
        parts.append(f"{train.steps:,} of {train.global_batch_size:,} rows{shown}")
    total = sum(train.steps for train in trained.values())
    yield Finding("ok", "steps", f"{total:,} steps in {len(stages)} stage{'s' * (len(stages) > 1)}: {', '.join(parts)}")
    if large := [number for number, train in trained.items() if rows and train.global_batch_size > rows]:
        setting = f"--stages.{large[0]}.train.global-batch-size {trained[large[0]].global_batch_size}"
        text = f"{setting} is more than the {rows:,} rows of an epoch: batches are not full"
        yield Finding("warning", "steps", text + _also(large))
    if slow := [number for number, train in trained.items() if train.warmup_steps >= train.steps]:
        setting = f"--stages.{slow[0]}.train.warmup-steps {trained[slow[0]].warmup_steps}"
        text = f"{setting} of {trained[slow[0]].steps} steps: the learning rate never leaves its warm-up"
        yield Finding("warning", "steps", text + _also(slow))


def _also(numbers: Sequence[int]) -> str:
    """Name the stages after the first that share a problem."""
    return f" (also stage {', '.join(map(str, numbers[1:]))})" if len(numbers) > 1 else ""


def describe_decay(stages: Sequence[StageConfig], sizes: Sequence[TowerSize | None]) -> Iterator[Finding]:
    """List what the weight decay of each stage spares, unless its `weight_decays` say otherwise; once if all agree."""
    texts: dict[str, int] = {}
    for number, (stage, size) in enumerate(zip(stages, sizes, strict=True)):
        if size and stage.train.steps and stage.train.weight_decay:
            spared = Counter(re.sub(r"\d+", "*", name) for name in size.undecayed)
            names = [f"{name} ({count})" if count > 1 else name for name, count in spared.items()]
            shown = ", ".join(["gains and biases", *names[:MAX_NAMES]]) + ", ..." * (len(names) > MAX_NAMES)
            text = f"{stage.train.weight_decay:g} on {size.decayed} of {size.tensors} parameters, not on {shown}"
            overrides = ", ".join(stage.train.weight_decays)
            texts.setdefault(f"{text}; then {overrides}" if overrides else text, number)
    for text, number in texts.items():
        yield Finding("ok", "decay", f"stage {number}: {text}" if len(texts) > 1 else text)


def check_groups(stages: Sequence[StageConfig], rows: int) -> Iterator[Finding]:
    """Compare the expected sizes of groups with the batches that they have to fill."""
    sizes = rows_per_label(stages, rows)
    grouped = [n for n, stage in enumerate(stages) if n and stage.train.steps and stage.train.groups != "none"]
    if grouped:
        expected = ", ".join(f"stage {number} {sizes[number]:,.4g}" for number in grouped)
        yield Finding("ok", "groups", f"mean rows per label, before small groups are merged: {expected}")
    problems: dict[int, list[int]] = {}  # stages by the first limit that the rows of a label are below
    for number in grouped:
        train, size = stages[number].train, sizes[number]
        part = train.global_batch_size // train.groups_per_batch
        limits = (size <= train.min_negatives, size < min_group_size(stages[number]), size < part)
        if any(limits):
            problems.setdefault(limits.index(True), []).append(number)
    for limit, affected in problems.items():
        number, size, train = affected[0], sizes[affected[0]], stages[affected[0]].train
        several = "several" if train.groups_per_batch == 1 else f"more than {train.groups_per_batch}"
        text = (
            f"rows with fewer than {train.min_negatives} negatives get no weight; use fewer clusters in earlier stages",
            f"most are merged, into groups of at least {min_group_size(stages[number])} rows; use fewer clusters",
            f"a batch of {train.global_batch_size} holds {several} groups, with about {max(0, round(size) - 1)} "
            f"negatives per row; use fewer clusters before this stage, or smaller batches",
        )[limit]
        yield Finding("warning", "groups", f"stage {number} has {size:,.4g} rows per label: {text}{_also(affected)}")
    clusters = [clusters_per_modality(stage) for stage in stages]
    for number, numbers in enumerate(clusters):
        if max(numbers) > rows:
            setting = f"--stages.{number}.cluster.num-clusters {max(numbers)}"
            yield Finding("FAIL", "groups", f"{setting} is more than the {rows:,} rows; use a smaller number")
    if num_labels(stages) >= MAX_LABELS:
        yield Finding(
            "FAIL", "groups", "the clusters of all stages make over 2^63 labels; use fewer stages or clusters"
        )


def status_lines(run: Path, *, has_colours: bool = False) -> list[str]:
    """List the state of the phases of each stage with its last step, of the combined model and of publishing."""
    record, lines = read_run(run), []

    def state(folder: Path) -> str:
        word = phase_state(folder)
        return f"{COLOURS[word]}{word}{PLAIN}" if has_colours else word

    for number, stage in enumerate(record.stages):
        states = ", ".join(f"{phase} {state(stage.folder / phase)}" for phase in PHASES)
        steps = stage.train_settings.get("steps")
        last = f" (step {stage.steps[-1].get('step')} of {steps})" if stage.steps else ""
        lines.append(f"stage {number}: {states}{last}")
    lines.append(f"combined: {state(run / 'combined')}")
    publish = record.config.get("publish")
    if isinstance(publish, dict) and publish.get("repo"):
        lines.append(f"publish to {publish['repo']}: {state(run / 'publish')}")
    if (run / REPORT).exists():
        lines.append(f"report: {run / REPORT}")
    return lines


def diagnoses(run: Path) -> list[str]:
    """List one line per evaluated stage on whether a further stage, or more training, can help, then audits."""
    record = read_run(run)
    rows = len(record.index or ())
    found = [diagnose_stage(run, number, stage.train_settings, rows) for number, stage in enumerate(record.stages)]
    lines = [f"stage {number}: {one.text}" for number, one in enumerate(found) if one]
    return [*lines, *audit_verdicts(run)]


def audit_verdicts(run: Path) -> list[str]:
    """List the verdicts of the audits of a run and its stages."""
    folders = [run, *sorted(run.glob("stage-*"))]
    audits = {folder: read_audit(folder / FOLDER) for folder in folders}
    return [
        f"audit of {'all stages' if folder == run else folder.name.replace('-', ' ')}: {record['verdict']['text']}"
        for folder, record in audits.items()
        if record
    ]


def diagnose_stage(run: Path, stage: int, settings: Mapping[str, Any], rows: int) -> Diagnosis | None:
    """Diagnose one stage by its training settings, as in config.json; None before it is evaluated or without `rows`.

    Raises:
        UserError: if its metrics or results are damaged.
    """
    if not rows or phase_state(run / f"stage-{stage}" / "eval") != "done":
        return None
    try:
        return diagnosis(run, stage, settings=settings, rows=rows)
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise UserError(
            f"metrics or results in {run / f'stage-{stage}'} are damaged ({type(error).__name__}: {error}); restore "
            f"them, or delete their folders and run the recipe again"
        ) from error


def _check_run(
    config: RunConfig,
    rows: RowCounts | None,
    tasks: Mapping[str, Task] | None,
    make_accelerator: Callable[[], Accelerator],
) -> Iterator[Finding]:
    """Report the state of an existing run, whether the recipe still matches it, and what its stages suggest."""
    yield from check_lock(config.run_dir)
    has_begun = (config.run_dir / "config.json").exists()
    if has_begun:
        lines = yield from attempt("run", partial(status_lines, config.run_dir))
        yield from [Finding("ok", "run", line) for line in lines or ()]
    if rows is None or tasks is None or not rows.is_whole:
        if has_begun:
            text = "the recipe can be compared with the run only when all shards and sets can be opened"
            yield Finding("warning", "run", text)
        return
    weights = config.data.weights or (1.0,) * len(rows.per_list)
    sources = tuple(Source(rows=n, weight=w) for n, w in zip(rows.per_list, weights, strict=True))
    run = RunContext(
        config=config, accelerator=make_accelerator(), index=rows.index, sources=sources, tasks=dict(tasks)
    )
    yield from attempt("recipe", partial(check_held_out, run))
    for number, stage in enumerate(config.stages):
        if stage.train.resharded and stage.train.steps:
            yield from attempt("shards", partial(open_resharded, run, number))
    if has_begun:
        yield from check_phases(partial(plan_phases, run))
        yield from _check_finished_stages(config, rows.total)


def check_lock(run_dir: Path) -> Iterator[Finding]:
    """Warn if another job holds the run directory."""
    if (path := run_dir / "lock").exists() and (owner := (yield from attempt("run", partial(read_json, path)))):
        name = f"process {owner.get('pid')} on {owner.get('host')}" if isinstance(owner, dict) else "a job"
        text = f"{run_dir} is locked by {name}; the run is refused while that job lives, and starts once it is dead"
        yield Finding("warning", "run", text)


def check_phases(plan: Callable[[], Sequence[Phase]]) -> Iterator[Finding]:
    """Check whether finished and unfinished phases were made by this recipe, up to the first that was not."""
    phases = (yield from attempt("run", plan)) or ()
    done = 0
    for phase in phases:
        if (is_done := (yield from attempt("run", phase.check))) is None:
            return  # the phases after it depend on its output
        if not is_done and not phase.grows and (phase.folder / STARTED).exists():
            if (difference := (yield from attempt("run", partial(phase.difference, STARTED)))) is None:
                return
            if difference:
                way_out = f"use the earlier setting, another --run-dir, or delete {phase.folder} to start it again"
                text = f"{phase.folder} is unfinished and does not match this recipe: {difference}; {way_out}"
                yield Finding("FAIL", "run", text)
                return
        done += is_done
    if phases:
        yield Finding("ok", "run", f"the recipe matches: {done} of {len(phases)} phases are done and are kept")


def _check_finished_stages(config: RunConfig, rows: int) -> Iterator[Finding]:
    sizes = rows_per_label(config.stages, rows)
    for number, stage in enumerate(config.stages):
        path = config.run_dir / f"stage-{number}" / "train" / "metrics.jsonl"
        diagnose = partial(diagnose_stage, config.run_dir, number, asdict(stage.train), rows)
        if found := (yield from attempt("learned", diagnose)):
            yield check_suppression(config, number, found, sizes[number])
        yield from check_data_wait(number, (yield from attempt("learned", partial(read_jsonl, path))) or [])
    for text in (yield from attempt("audit", partial(audit_verdicts, config.run_dir))) or ():
        yield Finding("ok", "audit", text)


def check_data_wait(stage: int, records: Sequence[Mapping[str, float]]) -> Iterator[Finding]:
    """Warn if the last tenth of the logged steps of a stage spent much of their time waiting for data."""
    values = (record.get("data_wait_share") for record in records)
    shares = [share for share in values if isinstance(share, float | int)]
    last = shares[-max(1, len(shares) // 10) :]
    if last and (share := sum(last) / len(last)) > MAX_DATA_WAIT_SHARE:
        way_out = "use more --machine.workers, faster storage, or smaller images"
        text = f"stage {stage} spent {100 * share:.0f} % of its time waiting for data; {way_out}"
        yield Finding("warning", "reading", text)


def check_suppression(config: RunConfig, number: int, diagnosis: Diagnosis, rows: float) -> Finding:
    """Repeat the diagnosis of stage `number`, and compare the recipe with the clusters and start it suggests.

    `rows` is the mean number of rows per label at the start of the stage.
    """
    stage, following = config.stages[number], config.stages[number + 1 : number + 2]
    clusters, start = stage.cluster.num_clusters, following[0].start if following else None
    # Labels that divide the rows of the stage into groups of one batch of the next.
    wanted = max(2, round(rows / (following or [stage])[0].train.global_batch_size))
    if diagnosis.kind == "suppressed":
        fresh = "base" if config.tower.is_pretrained else "scratch"
        is_followed = start in (None, fresh) and wanted / 2 <= clusters <= 2 * wanted
        advice = (
            f"--stages.{number}.cluster.num-clusters up to {wanted} (groups of one batch; many more clusters than "
            f"values that were learned), and --stages.{number + 1}.start {fresh}"
        )
    elif diagnosis.kind == "learning":
        is_followed = start in (None, "previous")
        advice = f"more steps, or --stages.{number + 1}.start previous, which continues training"
    else:
        return Finding("ok", "learned", f"stage {number}: {diagnosis.text}")
    recipe = f"the recipe has {clusters} clusters" + (f" and starts from {start}" if start else "")
    audit = f"`mcl-clip audit {config.run_dir / f'stage-{number}'} --data SHARDS` says by what"
    seen = f"{diagnosis.text}; {audit}" if diagnosis.kind == "suppressed" else diagnosis.text
    text = f"stage {number}: {seen}. Recommended: {advice}; {recipe}"
    return Finding("ok" if is_followed else "warning", "learned", text)
