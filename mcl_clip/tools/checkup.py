"""What stands where before and during a run: all checks of a recipe, the phases of a run, what its stages say."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from mcl_clip.config import RunConfig, StageConfig
from mcl_clip.core.distributed import count_cores
from mcl_clip.core.errors import UserError
from mcl_clip.core.files import read_jsonl, read_run_config
from mcl_clip.data.decode import train_transform
from mcl_clip.data.index import ShardIndex
from mcl_clip.data.row_order import Source
from mcl_clip.eval.task import Task
from mcl_clip.model.open_clip_io import DEFAULT_CONTEXT_LENGTH, make_tokenizer
from mcl_clip.report.page import REPORT
from mcl_clip.results.record import PHASES, phase_state, read_run
from mcl_clip.runs.context import RunContext, only, open_tasks
from mcl_clip.runs.controls import with_control
from mcl_clip.runs.eval_phase import diagnosis
from mcl_clip.runs.pipeline import check_held_out, check_publishing, check_stages, plan_phases
from mcl_clip.runs.train_phase import min_group_size
from mcl_clip.tools.doctor import data, machine, needs, stages, weights
from mcl_clip.tools.doctor.findings import Finding, attempt
from mcl_clip.train.trackers import check_trackers

COLOURS = {"done": "\033[32m", "partial": "\033[33m", "missing": "\033[2m"}
TOWER_SETTINGS = ("architecture", "model", "preprocess")
STAGE_SETTINGS = (
    *("steps", "global_batch_size", "warmup_steps", "groups", "min_negatives", "precision"),
    *("grad_cache_rows", "loss_chunk_rows"),
)


def status_lines(run: Path, *, has_colours: bool = False) -> list[str]:
    """Which phases of each stage are done, and its last step."""
    record, lines = read_run(run), []

    def state(folder: Path) -> str:
        word = phase_state(folder)
        return f"{COLOURS[word]}{word}\033[0m" if has_colours else word

    for number, stage in enumerate(record.stages):
        states = [f"{phase} {state(stage.folder / phase)}" for phase in PHASES]
        steps = stage.train_settings.get("steps")
        at = f" (step {stage.steps[-1].get('step')} of {steps})" if stage.steps else ""
        lines.append(f"stage {number}: {', '.join(states)}{at}")
    lines.append(f"combined: {state(run / 'combined')}")
    publish = record.config.get("publish")
    if isinstance(publish, dict) and publish.get("repo"):
        lines.append(f"publish to {publish['repo']}: {state(run / 'publish')}")
    if (run / REPORT).exists():
        lines.append(f"report: {run / REPORT}")
    return lines


def diagnoses(run: Path) -> list[str]:
    """What the finished stages of a run say about the next ones."""
    settings = [stage.get("train", {}) for stage in read_run_config(run)["stages"]]
    index = run / "index" / "index.arrow"
    rows = len(ShardIndex.load(index)) if index.exists() else 0
    said = [_said_of(run, s, train, rows) for s, train in enumerate(settings)]
    return [f"stage {s}: {text}" for s, text in enumerate(said) if text]


def _said_of(run: Path, s: int, settings: Mapping[str, Any], rows: int) -> str:
    """What a stage says about the next; nothing before it is evaluated."""
    if not rows or phase_state(run / f"stage-{s}" / "eval") != "done":
        return ""
    try:
        return diagnosis(run, s, settings=settings, rows=rows)
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise UserError(
            f"metrics or results in {run / f'stage-{s}'} are damaged ({type(error).__name__}: {error}); restore them, "
            f"or delete their folders and run the recipe again"
        ) from error


def examine(config: RunConfig, *, processes: int, make_accelerator: Callable[[], Accelerator]) -> Iterator[Finding]:
    """All findings on a recipe.

    Args:
        config: the recipe.
        processes: training processes; 0 is one for each GPU of this machine, or one.
        make_accelerator: called where there are data for the phases to be planned.
    """
    requirements, gpus, cores = machine.own_requirements(), machine.find_gpus(), count_cores()
    processes = processes or len(gpus) or 1
    here = processes // machine.machines_for(processes, gpus)
    yield from machine.check_versions(machine.installed_versions(requirements), requirements)
    rows, of_shards = data.look_at_shards(config.data.train, config.run_dir / "index" / "index.arrow")
    _, of_starts = attempt("recipe", partial(check_stages, config, processes=processes))
    config = with_control(config, rows=rows.total if rows else 0)
    settings, of_tower = attempt("tower", partial(weights.tower_config, **only(config.tower, *TOWER_SETTINGS)))
    plans, of_plans = attempt("tower", partial(_stage_plans, config, settings))
    trained = max((plan.tower.trained for plan in plans or () if plan.tower), default=0)
    yield from machine.check_devices(
        gpus,
        cores=cores,
        processes=processes,
        workers=config.machine.workers,
        precisions=[stage.train.precision for stage in config.stages if stage.train.steps],
        trained=trained,
    )
    yield from of_shards
    if rows and settings:
        yield from _examine_reading(config, rows, settings, loaders=_loaders(config, processes, cores))
    tasks, of_sets = _open_sets(config)
    yield from of_sets
    yield from [*of_starts, *attempt("trackers", partial(check_trackers, config.machine.trackers))[1]]
    yield from [*of_tower, *of_plans]
    if repo := config.publish.repo:
        yield from attempt("publish", partial(check_publishing, config))[1] or [Finding("ok", "publish", f"to {repo}")]
    if not of_tower:
        yield from weights.check_weights(**only(config.tower, "architecture", "pretrained", "model"))
        yield from weights.check_tokenizer((settings or {}).get("text_cfg", {}))
    if plans:
        per_epoch = rows.per_epoch(config.data.weights, config.data.holdout_rows) if rows else None
        yield from stages.check_steps(plans, rows=per_epoch)
        yield from stages.check_groups(plans, rows.total) if rows else ()
        free = machine.free_memory()
        yield from machine.check_memory(
            plans,
            processes=processes,
            memory=min(gpu.memory for gpu in gpus) if gpus else free // processes,
            device="of GPU memory" if gpus else "of free memory",
            host_memory=free,
            loader_batches=here * config.machine.workers * config.machine.prefetch_batches,
        )
        disk = needs.disk_needs(plans, rows=rows.total if rows else 0, keep_checkpoints=config.machine.keep_checkpoints)
        yield from machine.check_disk(config.run_dir, disk)
    yield from _examine_run(config, rows, tasks, make_accelerator)


def _stage_plans(config: RunConfig, settings: Mapping[str, Any] | None) -> list[needs.StageEstimate]:
    known = settings if settings and weights.is_measurable(settings) else None
    sizes = {stage.train.lock: None if known is None else _size(known, stage) for stage in config.stages}
    return [
        needs.StageEstimate(
            **only(stage.train, *STAGE_SETTINGS),
            min_group_size=min_group_size(stage),
            has_average=stage.train.average_decay > 0,
            clusters=_clusters(stage),
            has_projection=stage.cluster.metric == "shared",
            tower=sizes[stage.train.lock],
            has_cached_texts=stage.train.lock.text and stage.train.lock.cached_texts,
        )
        for stage in config.stages
    ]


def _size(settings: Mapping[str, Any], stage: StageConfig) -> needs.TowerSize:
    locks = only(stage.train.lock, "text", "image_unlocked_groups", "patterns") if stage.train.steps else {}
    return needs.measure(settings, locked=locks)


def _clusters(stage: StageConfig) -> tuple[int, ...]:
    """Clusters of each side that is clustered."""
    settings = stage.cluster
    texts = settings.text_clusters or settings.num_clusters
    return {"image": (settings.num_clusters,), "text": (texts,), "product": (settings.num_clusters, texts)}[settings.on]


def _loaders(config: RunConfig, processes: int, cores: int) -> int:
    """Loader processes that have a core of their own; 1 where training processes load."""
    machines = machine.machines_for(processes, machine.find_gpus())
    return max(1, machines * min(config.machine.workers * processes // machines, cores))


def _examine_reading(
    config: RunConfig, rows: data.RowCounts, settings: Mapping[str, Any], *, loaders: int
) -> Iterator[Finding]:
    text = settings["text_cfg"]
    length = text.get("context_length", DEFAULT_CONTEXT_LENGTH)
    size = settings["vision_cfg"].get("image_size", 224)
    yield from data.check_reading(
        rows.index,
        transform=train_transform({"size": size, **config.tower.preprocess}, **asdict(config.stages[0].train.augment)),
        # A tokenizer of the Hub is not fetched; most of the time goes into pictures.
        tokenizer=partial(_no_tokens, length) if text.get("hf_tokenizer_name") else make_tokenizer(settings),
        max_pixels=config.data.max_pixels,
        json_key=config.data.caption_key,
        max_bad_fraction=config.data.max_bad_fraction,
        loaders=loaders,
        batch_sizes=[(stage.train.steps, stage.train.global_batch_size) for stage in config.stages],
        is_staged=config.machine.remote == "stage",
    )


def _no_tokens(length: int, texts: list[str]) -> torch.Tensor:
    return torch.zeros(len(texts), length, dtype=torch.int64)


def _open_sets(config: RunConfig) -> tuple[Mapping[str, Task] | None, list[Finding]]:
    kinds = ("retrieval", "classification", "sets")
    nothing: dict[str, Any] = dict.fromkeys(kinds, ())
    each = [
        replace(config, eval=replace(config.eval, **{**nothing, kind: (value,)}))
        for kind in kinds
        for value in getattr(config.eval, kind)
    ]
    return data.open_sets(partial(open_tasks, config), [partial(open_tasks, one) for one in each])


def _examine_run(
    config: RunConfig,
    rows: data.RowCounts | None,
    tasks: Mapping[str, Task] | None,
    make_accelerator: Callable[[], Accelerator],
) -> Iterator[Finding]:
    """Where a run stands that has begun, whether the recipe is still its own, and what its stages say of the next."""
    yield from stages.check_lock(config.run_dir)
    has_begun = (config.run_dir / "config.json").exists()
    lines, wrongs = attempt("run", partial(status_lines, config.run_dir)) if has_begun else ([], [])
    yield from wrongs
    yield from (Finding("ok", "run", line) for line in lines or ())
    if rows is None or tasks is None or not rows.is_whole:
        if has_begun:
            text = "whether the recipe matches the run shows only when all shards and sets can be looked at"
            yield Finding("warning", "run", text)
        return
    weights_of_lists = config.data.weights or (1.0,) * len(rows.per_list)
    sources = tuple(Source(rows=n, weight=w) for n, w in zip(rows.per_list, weights_of_lists, strict=True))
    run = RunContext(
        config=config, accelerator=make_accelerator(), index=rows.index, sources=sources, tasks=dict(tasks)
    )
    yield from attempt("recipe", partial(check_held_out, run))[1]
    if has_begun:
        yield from stages.check_phases(partial(plan_phases, run))
        yield from _examine_stages(config, rows.total)


def _examine_stages(config: RunConfig, rows: int) -> Iterator[Finding]:
    labels = 1
    for s, stage in enumerate(config.stages):
        following = config.stages[s + 1] if s + 1 < len(config.stages) else None
        batch = (following or stage).train.global_batch_size
        said, wrongs = attempt("learned", partial(_said_of, config.run_dir, s, asdict(stage.train), rows))
        yield from wrongs
        if said:
            yield from stages.check_suppression(
                s,
                said,
                labels_needed=rows / batch / labels,
                clusters=stage.cluster.num_clusters,
                next_start=following.start if following else None,
                is_pretrained=config.tower.is_pretrained,
            )
        metrics, _ = attempt("learned", partial(read_jsonl, config.run_dir / f"stage-{s}" / "train" / "metrics.jsonl"))
        yield from stages.check_waiting(s, metrics or [])
        labels *= math.prod(_clusters(stage))
