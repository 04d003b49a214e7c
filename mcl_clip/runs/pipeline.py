"""All phases of a run: their order, what each depends on, and the loop that runs them.

    stage-k/train -> embed -> cluster -> labels -> eval -> stage-k+1/train -> ... -> combined -> publish

Each phase writes to its own folder. A finished phase is skipped, an unfinished one continues from what it left, and one
that was made from other settings is refused.
"""

import logging
import platform
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import MISSING, asdict, fields, is_dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from mcl_clip.config import AugmentConfig, ClusterConfig, LockConfig, RunConfig, TowerConfig, TrainConfig
from mcl_clip.core.distributed import barrier, is_main, on_main, world_size
from mcl_clip.core.errors import UserError
from mcl_clip.core.files import DONE, append_jsonl, file_digest, write_json
from mcl_clip.data.index import RULE
from mcl_clip.data.shards import redacted as redacted_text
from mcl_clip.eval.task import label_of, read_results
from mcl_clip.model.lora import check_installed
from mcl_clip.model.pair import split_image
from mcl_clip.publish.hub import check_repo_name, check_target, find_token
from mcl_clip.report.clusters import contact_sheets
from mcl_clip.report.page import write_report
from mcl_clip.report.view import RunView
from mcl_clip.results.record import COMBINED
from mcl_clip.results.text import format_duration, result_rows
from mcl_clip.runs.context import RunContext, load_index, name_and_folder, open_tasks, with_behavior
from mcl_clip.runs.controls import with_control
from mcl_clip.runs.eval_phase import combine, evaluate, publish
from mcl_clip.runs.final_model import check_choices, is_averaged
from mcl_clip.runs.frozen import TRUNKS
from mcl_clip.runs.images_alone import check_images_alone, report_invariances
from mcl_clip.runs.phase import Phase, lock
from mcl_clip.runs.stage_phases import cluster, embed, label
from mcl_clip.runs.train_phase import min_group_size, row_map_path, start_stage, train
from mcl_clip.train.interrupt import Interrupt
from mcl_clip.train.trackers import Trackers, check_trackers

logger = logging.getLogger(__name__)

# Fields that came after the first version: at their defaults, which change nothing, they are no part of a fingerprint,
# so that runs begun before keep theirs.
LATER_FIELDS: dict[type, tuple[str, ...]] = {
    TrainConfig: (
        "compiled",
        "patch_dropout",
        "grad_checkpointing",
        "own_group_share",
        "groups_per_batch",
        "negative_captions",
        "mask_similar",
        "similar_by",
        "keep_best",
        "patience",
        "lora",
        "distill",
        "decode",
        "optimizer",
        "momentum",
        "temperature",
        "num_views",
    ),
    LockConfig: ("text_unlocked_groups",),
    AugmentConfig: ("views", "jitter", "jitter_probability", "grayscale", "blur", "solarize"),
    ClusterConfig: ("features",),
    TowerConfig: (
        *("image", "text", "dim", "heads", "context_length", "image_size"),
        *("head_batch_norm", "stem", "image_args"),
    ),
}


def run_pipeline(config: RunConfig, accelerator: Accelerator, interrupt: Interrupt | None = None) -> None:
    """Run every phase that is not done yet.

    Raises:
        PlannedStop: when `interrupt` was asked to stop.
        UserError: for everything that the user can fix; finished work is never lost.
    """
    if config.machine.threads:
        torch.set_num_threads(config.machine.threads)
    check_stages(config)
    check_trackers(config.machine.trackers)
    on_main(partial(check_publishing, config))
    with ExitStack() as stack:
        on_main(lambda: stack.enter_context(lock(config.run_dir)))  # the main process holds the lock for all
        config = on_main(partial(with_behavior, config))
        index, sources = load_index(config, interrupt)
        config = with_control(config, rows=len(index))  # the steps of equal compute depend on the number of rows
        run = RunContext(
            config=config,
            accelerator=accelerator,
            index=index,
            sources=sources,
            tasks=open_tasks(config),
            interrupt=interrupt or Interrupt(),
            trackers=Trackers(
                config.machine.trackers if is_main() else (),
                run_dir=config.run_dir,
                project=config.machine.tracker_project,
                config=redacted(asdict(config)),
            ),
        )
        report_invariances(config, run.tasks)
        check_held_out(run)
        phases = plan_phases(run)
        todo = on_main(partial(_check_phases, phases))
        on_main(partial(_write_launch, config, accelerator))
        for phase in phases:
            if phase.name not in todo:
                logger.info("%s: already done", phase.name)
        run.trackers.start()
        try:
            for phase in phases:
                if phase.name in todo:
                    _run_phase(run, phase)
        finally:
            run.trackers.finish()
        on_main(lambda: shutil.rmtree(config.run_dir / TRUNKS, ignore_errors=True))


def _check_phases(phases: Sequence[Phase]) -> list[str]:
    """Return the names of the phases to run; refuse mismatched settings before anything is written."""
    todo = [phase for phase in phases if not phase.check()]
    if todo:
        todo[0].begin()  # refuses what an interrupted run with other settings left
    return [phase.name for phase in todo]


def _run_phase(run: RunContext, phase: Phase) -> None:
    run.interrupt.check()
    run.interrupt.phase = phase.name
    started = time.perf_counter()
    on_main(phase.begin)
    phase.run()
    barrier()  # every process has finished writing
    on_main(phase.mark_done)
    logger.info("%s: done in %s", phase.name, format_duration(time.perf_counter() - started))
    if phase.name.endswith(("/eval", COMBINED)):
        on_main(partial(_show_results, run, phase))


def _show_results(run: RunContext, phase: Phase) -> None:
    """Rewrite the report and log the new results to the trackers; a failure is logged and does not end the run."""
    config, last_stage = run.config, len(run.config.stages) - 1
    try:
        page = None
        if config.machine.report and phase.name != f"stage-{last_stage}/eval":  # `combined` follows right after it
            page = write_report(
                config.run_dir, images=config.machine.report_images, max_mb=config.machine.report_mb,
                option="--machine.report-mb",
            )  # fmt: skip
            logger.info("report: %s", page)
        if run.trackers:
            values = {
                f"eval/{record['dataset']}/{metric}/{label_of(record)}": value
                for record in read_results(phase.folder)
                for metric, value in record["metrics"].items()
                if value is not None
            }
            stage = last_stage if phase.name == COMBINED else int(phase.folder.parent.name.removeprefix("stage-"))
            run.trackers.log_stage(
                values,
                step=run.first_step(stage + 1),
                tables={f"results/{name}": rows for name, rows in result_rows(config.run_dir).items()},
                images=contact_sheets(RunView(config.run_dir)) if config.machine.report_images else {},
                page=page,
            )
    except Exception as error:
        logger.warning(
            "the results could not be reported (%s: %s); the run continues, and `mcl-clip report %s` tries again",
            *(type(error).__name__, error, config.run_dir),
        )


def plan_phases(run: RunContext) -> list[Phase]:
    """Return all phases of the run, in order."""
    config = run.config
    caption_key = config.data.caption_key or RULE.caption_key
    data = {"caption_key": caption_key, "max_pixels": config.data.max_pixels, "index": run.index.digest}
    if config.behavior != "0.6":  # earlier versions did not record it
        data["behavior"] = config.behavior
    sets = {name: task.data.sha256 for name, task in run.tasks.items()}

    def stage_phase(s: int, name: str, work: Callable[[RunContext, int], None], **options: Any) -> Phase:
        phases.append(Phase(name=f"stage-{s}/{name}", folder=run.folder(s, name), run=partial(work, run, s), **options))
        return phases[-1]

    phases: list[Phase] = []
    trained, embedded, clustered, labeled, evaluated = (list[Phase]() for _ in range(5))
    for s, stage in enumerate(config.stages):
        start = start_stage(config, s)
        train_inputs = (*([] if start is None else [trained[start]]), *labeled[-1:])
        embed_settings = {**data, "batch_size": config.eval.batch_size, "precision": stage.train.precision}
        cluster_settings = {**settings_of(stage.cluster), "seed": config.seed}
        trained.append(stage_phase(s, "train", train, settings=_train_settings(run, s, data), inputs=train_inputs))
        embedded.append(stage_phase(s, "embed", embed, settings=embed_settings, inputs=(trained[-1],)))
        source = run.clustered(s)
        clustered.append(stage_phase(s, "cluster", cluster, settings=cluster_settings, inputs=(embedded[source],)))
        label_inputs = (clustered[-1], *(labeled[-1:] if source == s else ()))
        labeled.append(
            stage_phase(s, "labels", lambda *of: on_main(partial(label, *of)), settings={}, inputs=label_inputs)
        )
        # The evaluation of combined stages reads the stored features of all earlier evaluations.
        eval_inputs = (*trained, *clustered, *evaluated)
        evaluated.append(stage_phase(s, "eval", evaluate, settings={"sets": sets}, inputs=eval_inputs, grows=True))
    combined = Phase(
        name=COMBINED,
        folder=config.run_dir / COMBINED,
        settings={"combine": config.combine, "loss": config.stages[0].train.loss, **_choices(config)},
        run=partial(combine, run),
        inputs=(*trained, *embedded, *evaluated),
        grows=True,
    )
    phases.append(combined)
    if config.publish.repo:
        phases.append(
            Phase(
                name="publish",
                folder=config.run_dir / "publish",
                settings=asdict(config.publish),
                run=partial(on_main, partial(publish, run)),
                inputs=(combined,),
                grows=True,
                keeps_nothing=True,
            )
        )
    return phases


def _choices(config: RunConfig) -> dict[str, Any]:
    """Return what the final model depends on where it is one model of averaged weights."""
    if not is_averaged(config):
        return {}
    choices = {name: getattr(config.eval, name) for name in ("select", "guard", "wise_ft")}
    return {"method": config.method, **choices}


def _train_settings(run: RunContext, s: int, data: dict[str, Any]) -> dict[str, Any]:
    """Return what the weights of a stage depend on, besides earlier phases."""
    config, stage = run.config, run.config.stages[s]
    settings: dict[str, Any] = {
        "data": {**data, "weights": config.data.weights, "held_out_rows": len(run.held_out)},
        "train": {**settings_of(stage.train), "min_group_size": min_group_size(stage)},
        "seed": config.seed,
    }
    if config.data.negatives_key and stage.train.negative_captions:
        settings["data"]["negatives_key"] = config.data.negatives_key
    if s == 0 and stage.train.mask_similar:  # features of the pretrained model are computed in such batches
        settings["eval_batch_size"] = config.eval.batch_size
    if len(run.sources) > 1:
        settings["data"]["rows_of_lists"] = [source.rows for source in run.sources]
    if stage.train.augment.jpeg == "exact":
        settings["train"]["augment"].pop("jpeg")
    if stage.train.keep_best:
        task = run.tasks[stage.train.keep_best.partition(":")[0]]
        settings["chosen_on"] = {"every_steps": config.eval.every_steps, "set": task.data.sha256}
    for name in ("cached_texts", "cached_trunks"):  # do not change the features
        settings["train"]["lock"].pop(name)
    if stage.train.resharded:
        settings["train"]["resharded"] = file_digest(row_map_path(config, s))
    if start_stage(config, s) is None:
        settings["tower"] = _tower_settings(config)
    return settings


def settings_of(section: Any) -> dict[str, Any]:
    """Return a section of the configuration for a fingerprint: without `LATER_FIELDS` that have their default."""
    settings = {}
    for each in fields(section):
        value = getattr(section, each.name)
        default = each.default if each.default_factory is MISSING else each.default_factory()
        if each.name not in LATER_FIELDS.get(type(section), ()) or value != default:
            settings[each.name] = settings_of(value) if is_dataclass(value) else value
    return settings


def _tower_settings(config: RunConfig) -> dict[str, Any]:
    """Return the settings of the tower, with the content of local files in place of their paths."""
    settings = settings_of(config.tower)
    if Path(config.tower.pretrained).is_file():
        settings["pretrained"] = file_digest(Path(config.tower.pretrained))
    if config.tower.architecture.startswith("local-dir:"):
        folder = Path(config.tower.architecture.removeprefix("local-dir:"))
        settings["architecture"] = _digests(folder)
    if config.tower.image:
        name, weights = split_image(config.tower.image)
        settings["image"] = {name: file_digest(Path(weights)) if Path(weights).is_file() else weights}
    if config.tower.text:
        folder = Path(config.tower.text.removeprefix("hf:"))
        settings["text"] = _digests(folder) if folder.is_dir() else config.tower.text
    return settings


def _digests(folder: Path) -> dict[str, str]:
    return {path.name: file_digest(path) for path in sorted(folder.iterdir()) if path.is_file()}


def check_stages(config: RunConfig, *, processes: int | None = None) -> None:
    """Raise UserError for starts, batch sizes and choices that are impossible with `processes` processes (all)."""
    processes, sets = processes or world_size(), dict(map(name_and_folder, config.eval.all_sets))
    check_choices(config, sets)
    check_images_alone(config)
    for s, stage in enumerate(config.stages):
        check_installed(stage.train.lora)
        if stage.start == "scratch" and config.tower.is_pretrained:
            raise UserError(
                f"--stages.{s}.start scratch means random weights, and the towers of this recipe are pretrained; use "
                f"base or previous"
            ).on_every_process()
        if stage.train.groups == "others" and not s:
            raise UserError(
                "--stages.0.train.groups others leaves no negatives, as stage 0 has one group; use it in later stages"
            ).on_every_process()
        if stage.train.mask_similar and not s and not config.tower.is_pretrained:
            raise UserError(
                f"--stages.0.train.mask-similar {stage.train.mask_similar:g} compares features under the model that "
                f"stage 0 starts from, which has random weights here; use it in later stages, or a pretrained tower"
            ).on_every_process()
        check_decoding(config, s)
        if stage.train.distill.weight and s == 0 and not config.tower.is_pretrained:
            raise UserError(
                f"--stages.0.train.distill.weight {stage.train.distill.weight:g} distills the pretrained model, and "
                f"the towers of this recipe, or the heads that join them, are random; use 0, or a pretrained CLIP"
            ).on_every_process()
        if stage.train.global_batch_size % processes:
            raise UserError(
                f"--stages.{s}.train.global-batch-size {stage.train.global_batch_size} does not divide by "
                f"{processes} processes; use a multiple of {processes}"
            ).on_every_process()
        if not stage.train.keep_best:
            continue
        if (name := stage.train.keep_best.partition(":")[0]) not in sets:
            raise UserError(
                f"--stages.{s}.train.keep-best {stage.train.keep_best} names no evaluation set; there are "
                f"{', '.join(sets) or 'none'}, and --eval.sets {name}=FOLDER adds one"
            ).on_every_process()
        if not config.eval.every_steps:
            raise UserError(
                f"--stages.{s}.train.keep-best {stage.train.keep_best} needs evaluations inside the stage; add "
                f"--eval.every-steps N"
            ).on_every_process()


def check_decoding(config: RunConfig, stage: int) -> None:
    """Raise UserError if the text features of a stage do not train, or there are no sentence features to decode."""
    train = config.stages[stage].train
    if not train.decode.weight:
        return
    option = f"--stages.{stage}.train.decode.weight {train.decode.weight:g}"
    if train.lock.text:
        raise UserError(
            f"{option} changes the text tower, and --stages.{stage}.train.lock.text locks it; use 0, or lock its lower "
            f"layers with --stages.{stage}.train.lock.text-unlocked-groups"
        ).on_every_process()
    has_text = config.tower.image or config.tower.model.get("text_cfg", {}).get("hf_model_name")
    if not config.tower.is_pretrained and not has_text:
        raise UserError(
            f"{option} decodes what a pretrained text tower makes of a caption, and that of this recipe is random; use "
            f"0, or a pretrained tower"
        ).on_every_process()


def check_held_out(run: RunContext) -> None:
    """Raise UserError if the data has too few rows to fit the temperature of the combination, which needs captions."""
    if not run.config.tower.images_only and len(run.held_out) < 2:
        raise UserError(
            f"--data.holdout-rows {run.config.data.holdout_rows} gives {len(run.held_out)} held-out rows of "
            f"{len(run.index)} (at most a twentieth), too few for the logit scale; at least 2 are needed, which "
            f"takes at least 40 rows"
        ).on_every_process()


def check_publishing(config: RunConfig) -> None:
    """Raise UserError for a repository that cannot be written to, as far as this is known before training."""
    if config.publish.repo:
        check_repo_name(config.publish.repo)
        check_target(config.publish.revision, config.publish.create_pr)
        if not (config.run_dir / "publish" / DONE).exists():
            find_token()


def _write_launch(config: RunConfig, accelerator: Accelerator) -> None:
    """Write the resolved recipe, and append a record of this launch."""
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
    """Return a value as JSON types, without secrets in its strings (see `mcl_clip.data.shards.redacted`)."""
    if isinstance(value, dict):
        return {str(key): redacted(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(item) for item in value]
    if isinstance(value, str | Path):
        return redacted_text(str(value))
    return value
