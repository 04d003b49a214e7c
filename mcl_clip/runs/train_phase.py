"""The training phase of a stage: start weights, batches by pseudo-label group, cached texts, settings of the loop."""

import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Integer
from torch import Tensor, nn

from mcl_clip.config import RunConfig, StageConfig, TrainConfig
from mcl_clip.core.distributed import is_main, on_main, seed_of, world_size
from mcl_clip.core.errors import UserError
from mcl_clip.core.files import fingerprint, write_json
from mcl_clip.data.batch_plan import BatchPlan
from mcl_clip.data.decode import train_transform
from mcl_clip.data.features import SIDES
from mcl_clip.data.index import ShardIndex
from mcl_clip.data.loader import TrainingLoader
from mcl_clip.data.reader import Reader
from mcl_clip.data.shards import expand_shards
from mcl_clip.data.storage import load_numbers, save_array
from mcl_clip.model.clip import ClipBundle, check_vocabulary, load_clip, save_clip
from mcl_clip.model.decoder import add_decoder, remove_decoder, sentence_encoder
from mcl_clip.model.image_model import set_temperature
from mcl_clip.model.lora import add_lora, merge_lora
from mcl_clip.model.multistage import combine_features
from mcl_clip.model.prepare import (
    check_contract,
    prepare_training,
    reference_features,
    synchronize_batch_norm,
    trainable_summary,
)
from mcl_clip.model.prepare import lock as lock_parameters
from mcl_clip.model.tower import create_tower
from mcl_clip.runs.context import RunContext
from mcl_clip.runs.controls import shuffled_groups
from mcl_clip.runs.frozen import TEXTS, embed_set, share_frozen_parts, store_outputs
from mcl_clip.runs.negatives import (
    BASE,
    check_negatives,
    read_similarity_features,
    similarity_path,
    write_similarity_features,
)
from mcl_clip.stages.pseudo_labels import default_min_group_size, group_labels, no_labels
from mcl_clip.train.loop import BatchSource, train_stage
from mcl_clip.train.metrics import Spans
from mcl_clip.train.optim import create_optimizer
from mcl_clip.train.validation import BestWeights

logger = logging.getLogger(__name__)

BEST = "best.json"  # which weights of a stage are the best, and their value
ROW_MAP = "row_map.npy"  # in a folder of resharded shards: the original row of each of its rows
IDENTITY_COLUMNS = ("image_size", "text_size")  # bytes of each row: recognize samples without reading them


def train(run: RunContext, stage: int) -> None:
    """Train the model of a stage on batches of its groups, and save it."""
    clip, out = start_clip(run, stage), run.folder(stage, "train")
    if run.config.stages[stage].train.steps:
        make_loader, groups = prepare_stage(run, stage, clip)
        loader = make_loader()
        fit_stage(run, stage, clip, loader, groups)
        loader.plan.remove_files()
        merge_lora(clip.model)
        remove_decoder(clip.model)
    if is_main():
        save_clip(clip, out / "model")
        shutil.rmtree(out / TEXTS, ignore_errors=True)
        shutil.rmtree(out / BASE, ignore_errors=True)
        _groups_path(run, stage).unlink(missing_ok=True)
        similarity_path(run, stage).unlink(missing_ok=True)


def prepare_stage(
    run: RunContext, stage: int, clip: ClipBundle
) -> tuple[Callable[..., TrainingLoader], Integer[np.ndarray, "rows"]]:
    """Set up the model for training, in place; return a factory of loaders and the group of each row.

    Keyword arguments of the factory replace options of the loader. A collective call.
    """
    config = run.config.stages[stage].train
    clip.model.to(run.accelerator.device)
    row_map = open_resharded(run, stage)[1] if config.mask_similar and config.resharded else None
    write_similarity_features(run, stage, clip, row_map)
    expected = reference_features(clip)
    lock_stage(clip.model, config, seed=seed_of(run.config.seed, "lora", stage))
    if config.decode.weight:
        add_decoder(clip, hidden_dim=config.decode.hidden_dim, seed=seed_of(run.config.seed, "decoder", stage))
    logger.info("stage %d: %s", stage, trainable_summary(clip.model))
    clip.model = _synchronize_batch_norm(clip.model, stage, config.grad_cache_rows)
    check_contract(clip, expected, name=run.config.tower.name, stage=stage)
    prepare_training(
        clip.model, compiled=config.compiled, patch_dropout=config.patch_dropout,
        grad_checkpointing=config.grad_checkpointing,
    )  # fmt: skip
    plan, groups, reader = _batch_plan(run, stage)
    negatives_key = run.config.data.negatives_key if config.negative_captions else ""
    if negatives_key:
        check_negatives(clip.model, reader, negatives_key)
    if config.loss == "simclr":
        set_temperature(clip.model, config.temperature)
    transform = train_transform(clip.preprocess_cfg, legacy=run.config.behavior == "0.6", **asdict(config.augment))
    images, texts = None, None
    if clip.has_texts:
        images, texts = store_outputs(run, stage, clip, reader.index, transform, teacher=_teacher(run, config))
    make_loader = partial(
        TrainingLoader,
        plan,
        reader,
        transform=transform,
        num_views=config.num_views,
        images=images,
        texts=texts,
        negatives_key=negatives_key,
        num_negatives=config.negative_captions if negatives_key else 0,
        **run.batch_options(clip),
    )
    return make_loader, groups


def fit_stage(
    run: RunContext,
    stage: int,
    clip: ClipBundle,
    loader: BatchSource,
    groups: Integer[np.ndarray, "rows"],
    *,
    spans: Spans | None = None,
    max_steps: int | None = None,
) -> None:
    """Train a model that `prepare_stage` has set up; see `train_stage` for `spans` and `max_steps`."""
    config = run.config
    best = None if max_steps else _best_weights(run, config.stages[stage].train)
    teacher = _teacher(run, config.stages[stage].train)
    if teacher is not None:
        share_frozen_parts(run, stage, clip, teacher)
        teacher.model.eval().requires_grad_(requires_grad=False)
    state = train_stage(
        run.accelerator,
        clip.model,
        loader=loader,
        groups=groups,
        preprocess_cfg=clip.preprocess_cfg,
        config=config.stages[stage].train,
        machine=config.machine,
        optimizer=create_optimizer(clip.model, config.stages[stage].train, decays_unlisted=config.behavior == "0.6"),
        out=run.folder(stage, "train"),
        seed=(config.seed, stage),
        similar_by=read_similarity_features(run, stage, len(groups)),
        max_bad_fraction=config.data.max_bad_fraction,
        evaluate=lambda _: _evaluate(run, stage, clip),
        evaluate_steps=config.eval.every_steps,
        best=best,
        teacher=None if teacher is None else teacher.model,
        sentences=_sentences(run, config.stages[stage].train),
        track=partial(_track, run, stage),
        interrupt=run.interrupt,
        spans=spans,
        max_steps=max_steps,
    )
    run.accelerator.free_memory()
    if best is not None:
        logger.info(
            "stage %d: the weights of step %d are the best (%s %.4g); training ended at step %d",
            *(stage, best.step, best.metric, best.value, state.step),
        )
        if is_main():
            record = {name: value for name, value in best.record().items() if name != "stale"}
            write_json(run.folder(stage, "train") / BEST, {**record, "last_step": state.step})


def _teacher(run: RunContext, settings: TrainConfig) -> ClipBundle | None:
    """Return the model that a stage distills: the pretrained one or, without one, that of stage 0."""
    if not settings.distill.weight:
        return None
    clip = base_clip(run.config) if run.config.tower.is_pretrained else run.clip(0)
    clip.model.to(run.accelerator.device)
    return clip


def _sentences(run: RunContext, settings: TrainConfig) -> Callable[[Tensor], Tensor] | None:
    """Return the frozen encoder of the sentence features that a stage decodes: the text tower of the recipe."""
    if not settings.decode.weight:
        return None
    model = base_clip(run.config).model
    return sentence_encoder(model.to(run.accelerator.device).eval().requires_grad_(False))


def _best_weights(run: RunContext, settings: TrainConfig) -> BestWeights | None:
    """Return what keeps the best weights of a stage, if they are asked for."""
    if not settings.keep_best:
        return None
    name, _, metric = settings.keep_best.partition(":")
    return BestWeights(f"{name}/{metric or run.tasks[name].main_metric}", patience=settings.patience)


def start_stage(config: RunConfig, stage: int) -> int | None:
    """Return the stage whose trained model `stage` starts from; None if it starts from the tower of the recipe."""
    start = config.stages[stage].start
    if stage == 0 or start == "scratch" or (start == "base" and config.tower.is_pretrained):
        return None
    return 0 if start == "base" else stage - 1


def start_clip(run: RunContext, stage: int) -> ClipBundle:
    """Create or load the model that a stage starts from."""
    config = run.config
    if (earlier := start_stage(config, stage)) is not None:
        return load_clip(run.folder(earlier, "train") / "model")
    return base_clip(config, stage if config.stages[stage].start == "scratch" else 0)


def base_clip(config: RunConfig, draw: int = 0) -> ClipBundle:
    """Create the towers of the recipe; `draw` is the number of the draw of random weights."""
    clip = create_tower(
        config.tower,
        seed=seed_of(config.seed, "tower", draw),
        text_weights=config.behavior != "0.6",
    )
    if clip.has_texts:
        check_vocabulary(clip.model, clip.tokenizer)
    return clip


def min_group_size(stage: StageConfig) -> int:
    """Return the smallest number of rows of a group in a stage."""
    return stage.train.min_group_size or default_min_group_size(stage.train.global_batch_size)


def lock_stage(model: nn.Module, config: TrainConfig, *, seed: int = 0) -> None:
    """Lock what a stage does not train, and add low-rank updates drawn by `seed`.

    A `logit_bias` trains only if the loss uses it, in a form that DDP supports.

    Raises:
        UserError: if the model cannot be locked or take updates as asked, or the loss needs a bias.
    """
    has_bias = getattr(model, "logit_bias", None) is not None
    if has_bias and config.loss == "clip":
        model.logit_bias.requires_grad_(False)
    elif has_bias:
        # The model returns the parameter itself, which DDP regards as unused; a product with it is used.
        model.register_forward_hook(lambda _, __, out: {**out, "logit_bias": out["logit_bias"] * 1})
    elif config.loss == "siglip" and config.steps:
        raise UserError(
            "--stages.K.train.loss siglip needs a tower with a bias: put init_logit_bias, such as -10, next to "
            "embed_dim in the recipe's TowerConfig(model=...), or use an architecture that has it"
        ).on_every_process()
    if config.steps:
        lock_parameters(
            model, text=config.lock.text, text_unlocked_groups=config.lock.text_unlocked_groups,
            image_unlocked_groups=config.lock.image_unlocked_groups, patterns=config.lock.patterns,
        )  # fmt: skip
    if config.steps and config.lora.rank:
        add_lora(model, config.lora, seed=seed)


def _synchronize_batch_norm(model: nn.Module, stage: int, grad_cache_rows: int) -> nn.Module:
    """Make trainable BatchNorm layers, if any, use statistics of the global batch; locked ones are of another class.

    Raises:
        UserError: with gradient caching, or on several CPU processes.
    """
    if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        return model
    if grad_cache_rows:
        raise UserError(
            f"--stages.{stage}.train.grad-cache-rows {grad_cache_rows} cannot be used with BatchNorm, whose statistics "
            f"of {grad_cache_rows} rows are not those of the batch; use 0, lock the layers with BatchNorm "
            f"(--stages.{stage}.train.lock.image-unlocked-groups), or use a tower with LayerNorm"
        ).on_every_process()
    if world_size() == 1:
        return model
    if not torch.cuda.is_available():
        raise UserError(
            f"the image tower has BatchNorm, which cannot be synchronized over {world_size()} CPU processes; use one "
            f"process, GPUs, or a tower with LayerNorm"
        ).on_every_process()
    return synchronize_batch_norm(model)


def _batch_plan(run: RunContext, stage: int) -> tuple[BatchPlan, Integer[np.ndarray, "rows"], Reader]:
    """Return the batches of a stage, the group of each row (-1 for held-out rows), and a reader of the rows."""
    config, settings = run.config, run.config.stages[stage].train
    index, row_map, sources = run.index, None, run.sources
    if settings.resharded:
        (index, row_map), sources = open_resharded(run, stage), ()
    record = on_main(partial(_write_groups, run, stage, row_map))
    groups = load_numbers(_groups_path(run, stage), len(index))  # one copy in memory for all processes of a node
    # Negatives of other groups are in batches of all groups.
    planned = np.minimum(groups, 0) if settings.groups == "others" else groups
    folder = config.machine.cache_dir  # runs may share it, and have equal plans
    plan = BatchPlan(
        shard_of=index.shard_of,
        groups=planned,
        global_batch_size=settings.global_batch_size,
        seed=config.seed,
        stage=stage,
        groups_per_batch=settings.groups_per_batch,
        sources=sources,
        window_shards=settings.window_shards,
        run_rows=settings.run_rows,
        cache_dir=folder / fingerprint(str(config.run_dir.resolve())) if folder else config.run_dir / "index",
    )
    rows = plan.rows_per_epoch
    if rows < settings.global_batch_size:
        logger.warning(
            "stage %d: the data has %d rows, fewer than a global batch of %d; each batch has %d valid rows",
            *(stage, rows, settings.global_batch_size, rows),
        )
    statistics = plan.statistics(min_negatives=settings.min_negatives)  # collective if the plan is on disk
    if is_main():
        write_json(run.folder(stage, "train") / "groups.json", {**record, "epoch_0": asdict(statistics)})
        logger.info(
            "stage %d: %d groups (smallest %d, median %g rows; %d rows in merged groups); %d batches per epoch, %.0f "
            "%% of rows in batches of a single group, %.0f negatives per row",
            *(stage, *(record[name] for name in ("num_groups", "smallest", "median", "rows_relaxed"))),
            *(statistics.batches, 100 * statistics.share_homogeneous, statistics.mean_negatives),
        )
    return plan, groups, run.reader(index)


def _groups_path(run: RunContext, stage: int) -> Path:
    """Return the file of the group of each row, which exists while the stage trains."""
    return run.config.run_dir / "index" / f"groups-stage-{stage}.npy"


def _write_groups(run: RunContext, stage: int, row_map: Integer[np.ndarray, "rows"] | None) -> dict[str, Any]:
    """Write the group of each row, in the order of `row_map`, and return the content of groups.json without epoch_0."""
    settings = run.config.stages[stage].train
    labels = no_labels(len(run.index)) if settings.groups == "none" else run.labels(stage)
    grouping = group_labels(labels, min_group_size=min_group_size(run.config.stages[stage]))
    groups = grouping.group_of
    groups[run.held_out] = -1
    if settings.groups == "random":
        groups = shuffled_groups(groups, name=(run.config.seed, stage, "random groups"))
    save_array(_groups_path(run, stage), np.int32, groups.shape, [groups if row_map is None else groups[row_map]])
    return {**grouping.record(), "assignment": settings.groups, "held_out_rows": len(run.held_out)}


def row_map_path(config: RunConfig, stage: int) -> Path:
    """Return the file that maps the rows of the resharded shards of a stage to those of the run.

    Raises:
        UserError: if there is none.
    """
    folder = Path(config.stages[stage].train.resharded)
    if not (folder / ROW_MAP).is_file():
        raise UserError(
            f"--stages.{stage}.train.resharded {folder} is not a folder that mcl-clip reshard wrote: it has no "
            f"{ROW_MAP}; correct the path, or leave it out to read the shards of the run"
        ).on_every_process()
    return folder / ROW_MAP


def open_resharded(run: RunContext, stage: int) -> tuple[ShardIndex, Integer[np.ndarray, "rows"]]:
    """Return the index of resharded shards, and the row in this run of each of its rows.

    Raises:
        UserError: if the shards do not hold the samples of this run, or lists of shards have weights.
    """
    path = row_map_path(run.config, stage)
    folder = path.parent
    if any(source.weight != 1 for source in run.sources):
        raise UserError(f"--data.weights {run.config.data.weights} cannot be used with resharded shards in {folder}")
    index = ShardIndex.build(expand_shards(folder), rule=run.index.rule)
    row_map = load_numbers(path, len(index))
    if len(index) != len(run.index) or row_map.min() < 0 or row_map.max() >= len(index):
        raise UserError(f"{folder} has {len(index)} rows and this run {len(run.index)}; reshard from this run again")
    if not all(np.array_equal(getattr(index, name), getattr(run.index, name)[row_map]) for name in IDENTITY_COLUMNS):
        raise UserError(f"{folder} holds other samples than this run; reshard from this run again")
    return index, row_map


def _evaluate(run: RunContext, stage: int, clip: ClipBundle) -> dict[str, float]:
    """Return the metrics of all evaluation sets as `SET/METRIC`, for an evaluation within a stage."""
    features = {name: embed_set(run, stage, task, clip, is_locked=True) for name, task in run.tasks.items()}

    def score() -> dict[str, float]:
        metrics = {}
        for name, task in run.tasks.items():
            scores, _ = task.score(*(combine_features([features[name][side]], "concat") for side in SIDES))
            metrics.update({f"{name}/{metric}": value for metric, value in scores.items()})
        return metrics

    return on_main(score)


def _track(run: RunContext, stage: int, record: Mapping[str, Any], step: int) -> None:
    """Log a training record to the trackers, at its step counted over all stages."""
    values = {name: value for name, value in record.items() if name not in ("step", "group_loss")}
    values |= {f"group_loss/{name}": value for name, value in record.get("group_loss", {}).items()}
    values = {f"stage-{stage}/{name}": value for name, value in values.items()}
    run.trackers.log(values, step=run.first_step(stage) + step)
