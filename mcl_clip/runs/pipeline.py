"""All phases of a run, in order, and what each was made from.

    stage-k/train -> embed -> cluster -> labels -> eval -> stage-k+1/train -> ... -> combined

Each phase (`mcl_clip.runs.phases`) writes its own folder. A finished phase is skipped, an unfinished one goes on from what
it left, and one that was made from other settings is refused. This module and `phases` alone read `RunConfig`.
"""

import logging
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator

from mcl_clip.core.files import DONE, STARTED, append_jsonl, file_digest, write_json
from mcl_clip.runs.phase import Phase, StaleArtifactError, lock
from mcl_clip.config import RunConfig
from mcl_clip.data.index import ShardIndex
from mcl_clip.data.row_order import Source
from mcl_clip.data.shards import expand_shards
from mcl_clip.data.shards import redacted as redacted_text
from mcl_clip.core.distributed import barrier, check_same, is_main, on_main, world_size
from mcl_clip.core.errors import UserError
from mcl_clip.eval.datasets import open_set
from mcl_clip.eval.task import Task, label_of, read_results
from mcl_clip.results.text import result_rows
from mcl_clip.eval.classification import ClassificationSet, ClassificationTask
from mcl_clip.eval.retrieval import RetrievalSet, RetrievalTask
from mcl_clip.runs.controls import equal_compute_steps
from mcl_clip.runs.phases import (
    ROW_MAP,
    RunContext,
    cluster,
    combine,
    embed,
    evaluate,
    first_step,
    label,
    min_group_size,
    only,
    publish,
    train,
)
from mcl_clip.results.record import COMBINED
from mcl_clip.publish.hub import check_repo_name, check_target, find_token
from mcl_clip.report.clusters import contact_sheets
from mcl_clip.report.page import write_report
from mcl_clip.report.view import RunView
from mcl_clip.train.interrupt import Interrupt
from mcl_clip.train.trackers import Trackers, check_trackers

logger = logging.getLogger(__name__)

DEFAULT_IFM_EPSILON = 0.1
MEASURED = ("/eval", COMBINED)  # ends of the names of phases after which there is something new to show


def run_pipeline(config: RunConfig, accelerator: Accelerator, interrupt: Interrupt | None = None) -> None:
    """Run every phase that is not done yet.

    Raises:
        PlannedStop: when `interrupt` was asked to stop.
        UserError: for everything that a user can mend; nothing that was finished is lost.
    """
    if config.machine.threads:
        torch.set_num_threads(config.machine.threads)
    check_stages(config)
    check_trackers(config.machine.trackers)
    on_main(partial(check_publishing, config))
    with _locked(config.run_dir):
        index, sources = load_index(config)
        config = with_control(config, rows=len(index))
        tasks = open_tasks(config)
        run = RunContext(
            config=config,
            accelerator=accelerator,
            index=index,
            sources=sources,
            tasks=tasks,
            interrupt=interrupt or Interrupt(),
            trackers=_trackers(config),
        )
        check_held_out(run)
        phases = plan_phases(run)
        todo = on_main(partial(_unfinished, phases))
        on_main(partial(_write_launch, config, accelerator))
        for phase in phases:
            if phase.name not in todo:
                logger.info("%s: done before", phase.name)
        run.trackers.start()
        try:
            _run_phases(run, [phase for phase in phases if phase.name in todo])
        finally:
            run.trackers.finish()


def _run_phases(run: RunContext, phases: Sequence[Phase]) -> None:
    """Run what is not done yet, and show what came of it."""
    for phase in phases:
        run.interrupt.check()
        run.interrupt.phase = phase.name
        started = time.perf_counter()
        on_main(phase.begin)
        phase.run()
        barrier()
        on_main(phase.mark_done)
        logger.info("%s: done in %s", phase.name, _duration(time.perf_counter() - started))
        if phase.name.endswith(MEASURED):
            on_main(partial(_show, run, phase))


def _trackers(config: RunConfig) -> Trackers:
    """The trackers of the recipe, on the main process."""
    machine = config.machine
    return Trackers(
        machine.trackers if is_main() else (),
        run_dir=config.run_dir,
        project=machine.tracker_project,
        config=redacted(asdict(config)),
    )


def _show(run: RunContext, phase: Phase) -> None:
    """Write the report anew, and give trackers what was measured. Whatever is wrong with that, the run goes on."""
    config, stages = run.config, len(run.config.stages)
    try:
        page = None
        if config.machine.report and phase.name != f"stage-{stages - 1}/eval":  # all stages follow at once
            page = write_report(config.run_dir, images=config.machine.report_images, max_mb=config.machine.report_mb)
            logger.info("report: %s", page)
        if run.trackers:
            _track_results(run, phase, page)
    except Exception as error:
        logger.warning(
            "what was measured could not be shown (%s: %s); the run goes on, and `mcl-clip report %s` tries again",
            *(type(error).__name__, error, config.run_dir),
        )


def _track_results(run: RunContext, phase: Phase, page: Path | None) -> None:
    """Figures, tables, clusters as pictures, and the report, at the step where the stage ended."""
    config, place = run.config, phase.folder.parent.name
    values = {
        f"eval/{record['dataset']}/{metric}/{label_of(record)}": value
        for record in read_results(phase.folder)
        for metric, value in record["metrics"].items()
        if value is not None
    }
    done = len(config.stages) if phase.name == COMBINED else 1 + int(place.removeprefix("stage-"))
    run.trackers.log_stage(
        values,
        step=first_step(config, done),
        tables={f"results/{name}": rows for name, rows in result_rows(config.run_dir).items()},
        pictures=contact_sheets(RunView(config.run_dir)) if config.machine.report_images else {},
        page=page,
    )


def with_control(config: RunConfig, *, rows: int) -> RunConfig:
    """The recipe of the control that `config` asks for.

    Every control has the compute of the stages: in as many stages without their groups, or in a single one.
    """
    stages = config.stages
    trained = [stage.train for stage in stages if stage.train.steps]
    if config.control == "none" or not trained:
        return config
    if config.control in ("single", "ifm"):
        train = trained[0]
        steps = equal_compute_steps(
            [(stage.train.steps, stage.train.global_batch_size) for stage in stages],
            rows=rows,
            global_batch_size=train.global_batch_size,
        )
        epsilon = (train.ifm_epsilon or DEFAULT_IFM_EPSILON) if config.control == "ifm" else train.ifm_epsilon
        warmup_steps = round(train.warmup_steps * steps / train.steps)
        train = replace(train, steps=steps, warmup_steps=warmup_steps, ifm_epsilon=epsilon)
        return replace(config, stages=(replace(stages[0], train=train),))
    groups: Literal["none", "random"] = "random" if config.control == "random-groups" else "none"
    later = [  # resharded neighbours are of one group, so rows are read where they came from
        replace(stage, train=replace(stage.train, groups=groups, resharded="", run_rows=1)) for stage in stages[1:]
    ]
    if config.control == "ensemble":
        fresh: Literal["base", "scratch"] = "base" if config.tower.is_pretrained else "scratch"
        later = [replace(stage, start=fresh) for stage in later]
    return replace(config, stages=(stages[0], *later))


def _unfinished(phases: Sequence[Phase]) -> list[str]:
    """Names of the phases that are not done. Settings that do not match are refused before anything is written."""
    todo = [phase for phase in phases if not phase.check()]
    if todo:
        todo[0].begin()
    return [phase.name for phase in todo]


def plan_phases(run: RunContext) -> list[Phase]:
    """All phases of the run, in order."""
    config, phases = run.config, []
    data = {**only(config.data, "caption_key", "max_pixels"), "index": run.index.digest}
    trained: list[Phase] = []
    embedded: list[Phase] = []
    clusterings: list[Phase] = []
    labels: Phase | None = None
    evaluated: list[Phase] = []
    for s, stage in enumerate(config.stages):

        def phase(
            name: str,
            run_phase: Callable[[RunContext, int], None],
            settings: dict[str, Any],
            inputs: Sequence[Phase | None],
            *,
            s: int = s,
            grows: bool = False,
        ) -> Phase:
            present = tuple(item for item in inputs if item is not None)
            made = Phase(
                name=f"stage-{s}/{name}",
                folder=run.folder(s, name),
                settings=settings,
                run=partial(run_phase, run, s),
                inputs=present,
                grows=grows,
            )
            phases.append(made)
            return made

        trained.append(phase("train", train, _train_settings(run, s, data), [*_start_phases(run, s, trained), labels]))
        batch = {"batch_size": config.eval.batch_size, "precision": stage.train.precision}
        embedded.append(phase("embed", embed, {**data, **batch}, [trained[s]]))
        clusterings.append(phase("cluster", cluster, {**asdict(stage.cluster), "seed": config.seed}, [embedded[s]]))
        labels = phase("labels", _alone(label), {}, [clusterings[s], labels])
        sets = {name: task.sha256 for name, task in run.tasks.items()}
        evaluated.append(phase("eval", evaluate, {"sets": sets}, [*trained, *clusterings, *evaluated], grows=True))
    settings = {"combine": config.combine, "loss": config.stages[0].train.loss}
    folder = config.run_dir / COMBINED
    inputs = (*trained, *embedded, *evaluated)
    phases.append(
        Phase(
            name=COMBINED,
            folder=folder,
            settings=settings,
            run=partial(_alone(combine), run),
            inputs=inputs,
            grows=True,
        )
    )
    if config.publish.repo:
        phases.append(
            Phase(
                name="publish",
                folder=config.run_dir / "publish",
                settings=asdict(config.publish),
                run=partial(_alone(publish), run),
                inputs=(phases[-1],),
                grows=True,
                keeps_nothing=True,
            )
        )
    return phases


def _alone(run_phase: Callable[..., None]) -> Callable[..., None]:
    """The phase on the main process alone; what it raises is raised on all."""
    return lambda *arguments: on_main(partial(run_phase, *arguments))


def _train_settings(run: RunContext, s: int, data: dict[str, Any]) -> dict[str, Any]:
    config, stage = run.config, run.config.stages[s]
    settings: dict[str, Any] = {
        "data": {**data, "weights": config.data.weights, "held_out_rows": len(run.held_out)},
        "train": {**asdict(stage.train), "min_group_size": min_group_size(stage)},
        "seed": config.seed,
    }
    if len(run.sources) > 1:
        settings["data"]["rows_of_lists"] = [source.rows for source in run.sources]
    if stage.train.augment.jpeg == "exact":  # as all runs were before there was a choice
        settings["train"]["augment"].pop("jpeg")
    for name in ("compiled", "patch_dropout", "grad_checkpointing"):
        if not settings["train"][name]:
            settings["train"].pop(name)
    settings["train"]["lock"].pop("cached_texts")  # the same features, from another place
    if stage.train.resharded:
        settings["train"]["resharded"] = file_digest(Path(stage.train.resharded) / ROW_MAP)
    if _uses_tower_config(config, s):
        settings["tower"] = _tower_settings(config)
    return settings


def _uses_tower_config(config: RunConfig, s: int) -> bool:
    start = config.stages[s].start
    return s == 0 or start == "scratch" or (start == "base" and config.tower.is_pretrained)


def _start_phases(run: RunContext, s: int, trained: list[Phase]) -> list[Phase]:
    if _uses_tower_config(run.config, s):
        return []
    return [trained[0 if run.config.stages[s].start == "base" else s - 1]]


def _tower_settings(config: RunConfig) -> dict[str, Any]:
    """The tower by content: weights on this machine count by their bytes, not by their path."""
    settings = asdict(config.tower)
    if Path(config.tower.pretrained).is_file():
        settings["pretrained"] = file_digest(Path(config.tower.pretrained))
    if config.tower.architecture.startswith("local-dir:"):
        folder = Path(config.tower.architecture.removeprefix("local-dir:"))
        settings["architecture"] = {path.name: file_digest(path) for path in sorted(folder.iterdir()) if path.is_file()}
    return settings


def check_held_out(run: RunContext) -> None:
    """Refuse data without rows to fit the combination's temperature; better to say so before the training.

    Raises:
        UserError: with the number of rows that it takes.
    """
    if len(run.held_out) < 2:
        raise UserError(
            f"--data.holdout-rows {run.config.data.holdout_rows} of {len(run.index)} rows are {len(run.held_out)} "
            f"held-out rows (at most a twentieth), too few to fit the logit scale; they must be 2 or more, which takes "
            f"at least 40 rows"
        ).on_every_process()


def check_publishing(config: RunConfig) -> None:
    """Refuse to train for days towards a repository that nothing can be written to, as far as can be told here.

    Raises:
        UserError: if the repository has no valid name, it is not yet published and this machine has no token, or a
            pull request is asked for against a branch.
    """
    if config.publish.repo:
        check_repo_name(config.publish.repo)
        check_target(config.publish.revision, config.publish.create_pr)
        if not (config.run_dir / "publish" / DONE).exists():
            find_token()


def check_stages(config: RunConfig, *, processes: int | None = None) -> None:
    """Refuse starts and batches that cannot be with so many processes, by default those that there are.

    Raises:
        UserError: naming the stage and the way out.
    """
    processes = processes or world_size()
    for s, stage in enumerate(config.stages):
        if stage.start == "scratch" and config.tower.is_pretrained:
            raise UserError(
                f"--stages.{s}.start scratch is a new random draw, and the towers of this recipe are pretrained; use "
                f"base or previous"
            ).on_every_process()
        if stage.train.global_batch_size % processes:
            raise UserError(
                f"--stages.{s}.train.global-batch-size {stage.train.global_batch_size} does not divide by "
                f"{processes} processes; use a multiple of {processes}"
            ).on_every_process()


def load_index(config: RunConfig) -> tuple[ShardIndex, tuple[Source, ...]]:
    """The index of the training shards, kept in the run, and how its rows divide into the lists of shards.

    Raises:
        UserError: if there are no shards, or none of them has a pair.
    """
    if not config.data.train:
        raise UserError("--data.train names no shards; give paths, URLs or folders with .tar files")
    lists = [expand_shards(spec) for spec in config.data.train]
    urls = [url for part in lists for url in part]
    path = config.run_dir / "index" / "index.arrow"

    def make() -> None:
        before = ShardIndex.load(path) if path.exists() else None
        if before is not None and [shard.url for shard in before.shards] == urls and not _has_changed(before):
            return
        index = ShardIndex.build(urls)
        if before is not None and index.digest != before.digest and any(config.run_dir.glob(f"stage-*/*/{STARTED}")):
            raise StaleArtifactError(
                f"{config.run_dir} was made from other shards: {len(before)} rows then, {len(index)} now, with other "
                f"keys or sizes; use the earlier --data.train, or another --run-dir"
            )
        index.save(path)

    on_main(make)
    index = ShardIndex.load(path)
    check_same(index.digest, "the index of the training shards")
    if skipped := index.skipped_by_reason():
        logger.info("index: %d rows; left out: %s", len(index), skipped)
    weights = config.data.weights or (1.0,) * len(lists)
    ends = np.cumsum([len(part) for part in lists])
    rows = [
        sum(shard.rows for shard in index.shards[end - len(part) : end]) for end, part in zip(ends, lists, strict=True)
    ]
    return index, tuple(Source(rows=n, weight=weight) for n, weight in zip(rows, weights, strict=True))


def open_tasks(config: RunConfig) -> dict[str, Task]:
    """The evaluations of a recipe by name.

    Raises:
        UserError: if a set is not in its layout, or two have the same name.
    """
    retrieval, classification = (_named_folders(sets) for sets in (config.eval.retrieval, config.eval.classification))
    if shared := retrieval.keys() & classification.keys():
        raise UserError(f"a retrieval and a classification set are both called {min(shared)}; write NAME=FOLDER")
    tasks: dict[str, Task] = {name: RetrievalTask(name, RetrievalSet.open(root)) for name, root in retrieval.items()}
    for name, root in classification.items():
        tasks[name] = ClassificationTask(name, ClassificationSet.open(root))
    for name, root in _named_folders(config.eval.sets).items():
        if name in tasks:
            raise UserError(f"two evaluation sets are both called {name}; write NAME=FOLDER")
        tasks[name] = open_set(root, name)
    return tasks


def _named_folders(values: Sequence[str]) -> dict[str, Path]:
    """Folders by name; a folder without one has its own."""
    pairs = [value.split("=", 1) if "=" in value else (Path(value).name, value) for value in values]
    folders = {name: Path(folder) for name, folder in pairs}
    if len(folders) < len(pairs):
        raise UserError(f"two of {', '.join(values)} have the same name; write NAME=FOLDER")
    return folders


def _has_changed(index: ShardIndex) -> bool:
    try:
        index.check_unchanged()
    except UserError:
        return True
    return False


@contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    """Hold the run directory through the main process."""
    with ExitStack() as stack:

        def take() -> None:
            run_dir.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock(run_dir))

        on_main(take)
        yield


def _write_launch(config: RunConfig, accelerator: Accelerator) -> None:
    """The resolved recipe, and a line about this start."""
    write_json(config.run_dir / "config.json", redacted(asdict(config)))
    packages = ("mcl_clip", "torch", "open_clip_torch", "accelerate", "webdataset", "numpy")
    record = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": redacted(sys.argv),
        "processes": accelerator.num_processes,
        "device": str(accelerator.device),
        "device_name": torch.cuda.get_device_name(accelerator.device) if accelerator.device.type == "cuda" else "",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
    }
    append_jsonl(config.run_dir / "launches.jsonl", record)


def redacted(value: Any) -> Any:
    """The value as JSON, without what stands in URLs before the host or after the path."""
    if isinstance(value, dict):
        return {str(key): redacted(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(item) for item in value]
    if isinstance(value, str | Path):
        return redacted_text(str(value))
    return value


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
