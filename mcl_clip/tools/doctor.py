"""`mcl-clip doctor`: find what will fail, or perform badly, before a job runs.

Nothing is written; of the training data a sample is read.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from mcl_clip.config import RunConfig, StageConfig
from mcl_clip.core.distributed import count_cores
from mcl_clip.core.files import STARTED, read_json, read_jsonl
from mcl_clip.data.decode import train_transform
from mcl_clip.data.row_order import Source
from mcl_clip.eval.task import Task
from mcl_clip.model.open_clip_io import DEFAULT_CONTEXT_LENGTH, make_tokenizer
from mcl_clip.runs.context import RunContext, only, open_tasks
from mcl_clip.runs.controls import with_control
from mcl_clip.runs.phase import Phase
from mcl_clip.runs.pipeline import check_held_out, check_publishing, check_stages, plan_phases
from mcl_clip.runs.train_phase import min_group_size
from mcl_clip.tools.doctor_data import RowCounts, check_reading, inspect_shards, open_sets
from mcl_clip.tools.doctor_machine import (
    check_devices,
    check_disk,
    check_memory,
    check_versions,
    find_gpus,
    free_memory,
    installed_versions,
    machines_for,
    own_requirements,
)
from mcl_clip.tools.doctor_weights import check_tokenizer, check_weights, find_model_cfg, is_measurable
from mcl_clip.tools.estimates import MAX_LABELS, StageEstimate, estimate_disk, measure, rows_per_label
from mcl_clip.tools.findings import Finding, attempt
from mcl_clip.tools.status import diagnose_stage, status_lines
from mcl_clip.train.trackers import check_trackers

MAX_DATA_WAIT_SHARE = 0.3
SMALL_GROUPS = {
    "weightless": "rows with fewer than {min_negatives} negatives get no weight; use fewer clusters in earlier stages",
    "merged": "most are merged, into groups of at least {min_group_size} rows; use fewer clusters",
    "mixed": "a batch of {global_batch_size} holds several groups, with about {negatives} negatives per row; use fewer "
    "clusters before this stage, or smaller batches",
}


def examine(config: RunConfig, *, processes: int, make_accelerator: Callable[[], Accelerator]) -> Iterator[Finding]:
    """Run all checks of a recipe.

    Args:
        config: the recipe.
        processes: training processes; 0 for one per GPU of this machine, or one without GPUs.
        make_accelerator: called only if the data can be opened and phases can be planned.
    """
    requirements, gpus, cores = own_requirements(), find_gpus(), count_cores()
    processes = processes or len(gpus) or 1
    machines = machines_for(processes, gpus)
    yield from check_versions(installed_versions(requirements), requirements)
    rows, shard_findings = inspect_shards(config.data.train, config.run_dir / "index" / "index.arrow")
    _, recipe_findings = attempt("recipe", partial(check_stages, config, processes=processes))
    config = with_control(config, rows=rows.total if rows else 0)
    tower = config.tower
    cfg, tower_findings = attempt(
        "tower",
        lambda: find_model_cfg(architecture=tower.architecture, model=tower.model, preprocess=tower.preprocess),
    )
    estimates, estimate_findings = attempt("tower", partial(estimate_stages, config, cfg))
    yield from check_devices(
        gpus,
        cores=cores,
        processes=processes,
        workers=config.machine.workers,
        precisions=[stage.train.precision for stage in config.stages if stage.train.steps],
        trained=max((estimate.tower.trained for estimate in estimates or () if estimate.tower), default=0),
    )
    yield from shard_findings
    if rows and cfg:
        # Loaders with a core of their own; with 0 workers the training process loads by itself.
        loaders = max(1, machines * min(config.machine.workers * processes // machines, cores))
        yield from _check_reading(config, rows, cfg, loaders=loaders)
    tasks, set_findings = _open_sets(config)
    yield from set_findings
    yield from recipe_findings
    yield from attempt("trackers", partial(check_trackers, config.machine.trackers))[1]
    yield from [*tower_findings, *estimate_findings]
    if repo := config.publish.repo:
        yield from attempt("publish", partial(check_publishing, config))[1] or [Finding("ok", "publish", f"to {repo}")]
    if not tower_findings:
        yield from check_weights(tower.architecture, tower.pretrained, model=tower.model)
        yield from check_tokenizer((cfg or {}).get("text_cfg", {}))
    if estimates:
        yield from _check_estimates(config, estimates, rows, processes=processes)
    yield from _check_run(config, rows, tasks, make_accelerator)


def _check_estimates(
    config: RunConfig, estimates: Sequence[StageEstimate], rows: RowCounts | None, *, processes: int
) -> Iterator[Finding]:
    """Check steps, groups, memory and disk space."""
    yield from check_steps(
        estimates, rows=rows.per_epoch(config.data.weights, config.data.holdout_rows) if rows else None
    )
    if rows:
        yield from check_groups(estimates, rows.total)
    free, gpus = free_memory(), find_gpus()
    local = processes // machines_for(processes, gpus)
    yield from check_memory(
        estimates,
        processes=processes,
        memory=min(gpu.memory for gpu in gpus) if gpus else free // processes,
        device="of GPU memory" if gpus else "of free memory",
        host_memory=free,
        loader_batches=local * config.machine.workers * config.machine.prefetch_batches,
    )
    total = rows.total if rows else 0
    sizes = estimate_disk(estimates, rows=total, keep_checkpoints=config.machine.keep_checkpoints)
    yield from check_disk(config.run_dir, sizes)


def estimate_stages(config: RunConfig, cfg: Mapping[str, Any] | None) -> list[StageEstimate]:
    """Collect what the estimates depend on, for each stage.

    Args:
        config: the recipe.
        cfg: model config of open_clip; None if it is unknown.

    Raises:
        UserError: if the model cannot be built, or cannot be locked as the recipe asks.
    """
    is_known = cfg is not None and is_measurable(cfg)
    names = ("steps", "global_batch_size", "warmup_steps", "groups", "min_negatives", "precision")
    estimates, towers = [], {}
    for stage in config.stages:
        train = stage.train
        if is_known and cfg and train.lock not in towers:
            locked = only(train.lock, "text", "image_unlocked_groups", "patterns") if train.steps else {}
            towers[train.lock] = measure(cfg, locked=locked)
        estimates.append(
            StageEstimate(
                **only(train, *names, "grad_cache_rows", "loss_chunk_rows"),
                min_group_size=min_group_size(stage),
                has_average=train.average_decay > 0,
                clusters=_clusters_per_modality(stage),
                has_projection=stage.cluster.metric == "shared",
                tower=towers.get(train.lock),
                has_cached_texts=train.lock.text and train.lock.cached_texts,
            )
        )
    return estimates


def _clusters_per_modality(stage: StageConfig) -> tuple[int, ...]:
    cluster = stage.cluster
    texts = cluster.text_clusters or cluster.num_clusters
    return {"image": (cluster.num_clusters,), "text": (texts,), "product": (cluster.num_clusters, texts)}[cluster.on]


def _check_reading(config: RunConfig, rows: RowCounts, cfg: Mapping[str, Any], *, loaders: int) -> Iterator[Finding]:
    text = cfg["text_cfg"]
    length = text.get("context_length", DEFAULT_CONTEXT_LENGTH)

    def no_tokens(texts: list[str]) -> torch.Tensor:
        return torch.zeros(len(texts), length, dtype=torch.int64)

    size = cfg["vision_cfg"].get("image_size", 224)
    yield from check_reading(
        rows.index,
        transform=train_transform({"size": size, **config.tower.preprocess}, **asdict(config.stages[0].train.augment)),
        # A tokenizer on the Hub is not downloaded; decoding images takes most of the time.
        tokenizer=no_tokens if text.get("hf_tokenizer_name") else make_tokenizer(dict(cfg)),
        max_pixels=config.data.max_pixels,
        json_key=config.data.caption_key,
        max_bad_fraction=config.data.max_bad_fraction,
        loaders=loaders,
        batch_sizes=[(stage.train.steps, stage.train.global_batch_size) for stage in config.stages],
        is_staged=config.machine.remote == "stage",
    )


def _open_sets(config: RunConfig) -> tuple[Mapping[str, Task] | None, list[Finding]]:
    kinds = ("retrieval", "classification", "sets")
    none: dict[str, Any] = dict.fromkeys(kinds, ())
    singles = [
        replace(config, eval=replace(config.eval, **{**none, kind: (value,)}))
        for kind in kinds
        for value in getattr(config.eval, kind)
    ]
    return open_sets(partial(open_tasks, config), [partial(open_tasks, single) for single in singles])


def check_steps(stages: Sequence[StageEstimate], *, rows: int | None) -> Iterator[Finding]:
    """Report steps and epochs; warn of batches above an epoch and of a warm-up that never ends.

    Args:
        stages: all stages.
        rows: rows of an epoch, if known.
    """
    trained = {number: stage for number, stage in enumerate(stages) if stage.steps}
    parts = []
    for stage in trained.values():
        epochs = stage.steps / -(-rows // stage.global_batch_size) if rows else 0
        shown = f" ({f'{epochs:,.0f}' if epochs >= 100 else f'{epochs:.3g}'} epochs)" if epochs else ""
        parts.append(f"{stage.steps:,} of {stage.global_batch_size:,} rows{shown}")
    total = sum(stage.steps for stage in stages)
    yield Finding("ok", "steps", f"{total:,} steps in {len(stages)} stage{'s' * (len(stages) > 1)}: {', '.join(parts)}")
    if large := [number for number, stage in trained.items() if rows and stage.global_batch_size > rows]:
        setting = f"--stages.{large[0]}.train.global-batch-size {stages[large[0]].global_batch_size}"
        text = f"{setting} is more than the {rows:,} rows of an epoch: batches are not full"
        yield Finding("warning", "steps", text + _also(large))
    if slow := [number for number, stage in trained.items() if stage.warmup_steps >= stage.steps]:
        setting = f"--stages.{slow[0]}.train.warmup-steps {stages[slow[0]].warmup_steps}"
        text = f"{setting} of {stages[slow[0]].steps} steps: the learning rate never leaves its warm-up"
        yield Finding("warning", "steps", text + _also(slow))


def _also(numbers: Sequence[int]) -> str:
    """Name the stages after the first that share a problem."""
    return f" (also stage {', '.join(map(str, numbers[1:]))})" if len(numbers) > 1 else ""


def check_groups(stages: Sequence[StageEstimate], rows: int) -> Iterator[Finding]:
    """Compare the expected sizes of groups with the batches that they have to fill."""
    sizes = rows_per_label(stages, rows)
    grouped = [number for number, stage in enumerate(stages) if number and stage.steps and stage.groups != "none"]
    if grouped:
        expected = ", ".join(f"stage {number} {sizes[number]:,.4g}" for number in grouped)
        yield Finding("ok", "groups", f"mean rows per label, before small groups are merged: {expected}")
    problems: dict[str, list[int]] = {}
    for number in grouped:
        stage, size = stages[number], sizes[number]
        if size <= stage.min_negatives:
            problems.setdefault("weightless", []).append(number)
        elif size < stage.min_group_size:
            problems.setdefault("merged", []).append(number)
        elif size < stage.global_batch_size:
            problems.setdefault("mixed", []).append(number)
    for problem, numbers in problems.items():
        stage, size = stages[numbers[0]], sizes[numbers[0]]
        text = SMALL_GROUPS[problem].format(**vars(stage), negatives=max(0, round(size) - 1))
        text = f"stage {numbers[0]} has {size:,.4g} rows per label: {text}{_also(numbers)}"
        yield Finding("warning", "groups", text)
    for number, stage in enumerate(stages):
        if max(stage.clusters) > rows:
            setting = f"--stages.{number}.cluster.num-clusters {max(stage.clusters)}"
            yield Finding("FAIL", "groups", f"{setting} is more than the {rows:,} rows; use a smaller number")
    if math.prod(stage.labels for stage in stages) >= MAX_LABELS:
        text = "the clusters of all stages make over 2^63 labels; use fewer stages or clusters"
        yield Finding("FAIL", "groups", text)


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
        lines, failures = attempt("run", partial(status_lines, config.run_dir))
        yield from failures or [Finding("ok", "run", line) for line in lines or ()]
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
    yield from attempt("recipe", partial(check_held_out, run))[1]
    if has_begun:
        yield from check_phases(partial(plan_phases, run))
        yield from _check_finished_stages(config, rows.total)


def check_lock(run_dir: Path) -> Iterator[Finding]:
    """Warn if another job holds the run directory."""
    if (path := run_dir / "lock").exists():
        owner, failures = attempt("run", lambda: read_json(path))
        name = f"process {owner.get('pid')} on {owner.get('host')}" if isinstance(owner, dict) else "a job"
        text = f"{run_dir} is locked by {name}; the run is refused while that job lives, and starts once it is dead"
        yield from failures or [Finding("warning", "run", text)]


def check_phases(plan: Callable[[], Sequence[Phase]]) -> Iterator[Finding]:
    """Check whether finished and unfinished phases were made by this recipe, up to the first that was not."""
    phases, failures = attempt("run", plan)
    yield from failures
    done = 0
    for phase in phases or ():
        is_done, failures = attempt("run", phase.check)
        if not failures and not is_done and not phase.grows and (phase.folder / STARTED).exists():
            difference, failures = attempt("run", partial(phase.difference, STARTED))
            if difference:
                way_out = f"use the earlier setting, another --run-dir, or delete {phase.folder} to start it again"
                text = f"{phase.folder} is unfinished and does not match this recipe: {difference}; {way_out}"
                failures = [Finding("FAIL", "run", text)]
        if failures:
            yield from failures
            return  # the phases after it depend on its output
        done += bool(is_done)
    if phases:
        yield Finding("ok", "run", f"the recipe matches: {done} of {len(phases)} phases are done and are kept")


def _check_finished_stages(config: RunConfig, rows: int) -> Iterator[Finding]:
    labels = 1
    for number, stage in enumerate(config.stages):
        following = config.stages[number + 1] if number + 1 < len(config.stages) else None
        batch = (following or stage).train.global_batch_size
        diagnosis, failures = attempt(
            "learned", partial(diagnose_stage, config.run_dir, number, asdict(stage.train), rows)
        )
        yield from failures
        if diagnosis:
            yield from check_suppression(
                number,
                diagnosis,
                labels_needed=rows / batch / labels,
                clusters=stage.cluster.num_clusters,
                next_start=following.start if following else None,
                is_pretrained=config.tower.is_pretrained,
            )
        path = config.run_dir / f"stage-{number}" / "train" / "metrics.jsonl"
        yield from check_data_wait(number, attempt("learned", partial(read_jsonl, path))[0] or [])
        labels *= math.prod(_clusters_per_modality(stage))


def check_data_wait(stage: int, records: Sequence[Mapping[str, float]]) -> Iterator[Finding]:
    """Warn if the last tenth of the logged steps of a stage spent much of their time waiting for data."""
    values = (record.get("data_wait_share") for record in records)
    shares = [share for share in values if isinstance(share, float | int)]
    last = shares[-max(1, len(shares) // 10) :]
    if last and (share := sum(last) / len(last)) > MAX_DATA_WAIT_SHARE:
        way_out = "use more --machine.workers, faster storage, or smaller images"
        text = f"stage {stage} spent {100 * share:.0f} % of its time waiting for data; {way_out}"
        yield Finding("warning", "reading", text)


def check_suppression(
    stage: int, diagnosis: str, *, labels_needed: float, clusters: int, next_start: str | None, is_pretrained: bool
) -> Iterator[Finding]:
    """Repeat the diagnosis of a finished stage, and compare the recipe with the clusters and start it suggests.

    Args:
        stage: number of the stage.
        diagnosis: sentence of `mcl_clip.stages.diagnose.diagnose`.
        labels_needed: number of labels that divides the rows of the stage into groups of one batch.
        clusters: number of clusters of this stage in the recipe.
        next_start: initial weights of the next stage; None if there is no next stage.
        is_pretrained: whether the recipe has pretrained weights, so that no stage starts from scratch.
    """
    wanted = max(2, round(labels_needed))
    if "suppressed. " in diagnosis:
        start = "base" if is_pretrained else "scratch"
        is_followed = next_start in (None, start) and wanted / 2 <= clusters <= 2 * wanted
        advice = (
            f"--stages.{stage}.cluster.num-clusters up to {wanted} (groups of one batch; many more clusters than "
            f"values that were learned), and --stages.{stage + 1}.start {start}"
        )
    elif diagnosis.startswith("still learning"):
        is_followed = next_start in (None, "previous")
        advice = f"more steps, or --stages.{stage + 1}.start previous, which continues training"
    else:
        yield Finding("ok", "learned", f"stage {stage}: {diagnosis}")
        return
    recipe = f"the recipe has {clusters} clusters" + (f" and starts from {next_start}" if next_start else "")
    level = "ok" if is_followed else "warning"
    yield Finding(level, "learned", f"stage {stage}: {diagnosis}. Recommended: {advice}; {recipe}")  # type: ignore[arg-type]
