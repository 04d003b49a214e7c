"""What each phase of a run does: train, embed, cluster, label, evaluate, combine."""

import logging
import math
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from accelerate import Accelerator
from jaxtyping import Float, Int64
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from mcl_clip.core.files import append_jsonl, atomic_dir, atomic_path, read_jsonl, write_json
from mcl_clip.config import RunConfig, StageConfig
from mcl_clip.data.loader import CaptionedBatch, TrainingLoader, captioned_batches
from mcl_clip.data.storage import load_numbers, load_tensors
from mcl_clip.data.index import ShardIndex
from mcl_clip.data.row_order import Source
from mcl_clip.data.batch_plan import BatchPlan
from mcl_clip.data.reader import Reader
from mcl_clip.data.shards import expand_shards
from mcl_clip.data.features import TextFeatures
from mcl_clip.data.decode import evaluation_transform, train_transform
from mcl_clip.core.distributed import barrier, is_main, on_main, permutation, seed_of, world_size
from mcl_clip.core.errors import UserError
from mcl_clip.eval.task import Task, label_of, result_record
from mcl_clip.results.text import results_table
from mcl_clip.eval.classification import ClassificationTask, at_width_of_one_stage
from mcl_clip.model.multistage import COMBINATIONS, MultistageCLIP, combine_features
from mcl_clip.model.multistage import have_same_text_tower
from mcl_clip.model.fast_paths import prepare_training, takes_short_texts
from mcl_clip.model.clip import ClipBundle, create_clip, load_clip, save_clip, trainable_summary
from mcl_clip.model.clip import lock as lock_parameters
from mcl_clip.stages.kmeans import Clustering, ReadRows, spherical_kmeans
from mcl_clip.stages.shared_metric import Projection, fit_shared_metric, projected_rows
from mcl_clip.stages.combine import fit_combination
from mcl_clip.runs.controls import shuffled_groups
from mcl_clip.stages.embed import SIDES, EmbeddingTable, bad_samples, embed_shards, full_captions, write_text_features
from mcl_clip.stages.pseudo_labels import PseudoLabels, default_min_group_size, group_labels, no_labels, read_labels
from mcl_clip.stages.diagnose import diagnose
from mcl_clip.publish.card import About
from mcl_clip.publish.export import Export, export_run
from mcl_clip.publish.hub import upload
from mcl_clip.core.stats import normalized_mutual_information
from mcl_clip.train.interrupt import Interrupt
from mcl_clip.train.loop import Intervals, Objective, Schedule, train_stage
from mcl_clip.train.metrics import BadSamples
from mcl_clip.train.optim import create_optimizer
from mcl_clip.train.trackers import Trackers

RESULTS = "mcl_clip.results"  # the logger of the tables of results, which speaks in quiet runs too
logger = logging.getLogger(__name__)

SINGLE = "single"
SIZES = ("image_size", "text_size")  # in bytes, of each row: what tells samples apart without reading them
TEXTS = "texts"  # features of the captions, while a stage with a locked text tower trains
ROWS_TO_COUNT = 64  # from which it is told how many captions a row has
ROW_MAP = "row_map.npy"  # beside resharded shards: the old row of each new row


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """What all phases share."""

    config: RunConfig
    accelerator: Accelerator
    index: ShardIndex
    sources: tuple[Source, ...]
    tasks: dict[str, Task]
    interrupt: Interrupt = field(default_factory=Interrupt)
    trackers: Trackers = field(default_factory=Trackers)

    def folder(self, stage: int, phase: str) -> Path:
        """Where a phase of a stage writes."""
        return self.config.run_dir / f"stage-{stage}" / phase

    def reader(self, index: ShardIndex) -> Reader:
        """Bytes for rows of an index."""
        machine = self.config.machine
        return Reader(index, remote=machine.remote, cache_dir=machine.cache_dir, cache_gb=machine.cache_gb)

    @cached_property
    def held_out(self) -> Int64[np.ndarray, "held_out"]:
        """Rows that never train."""
        count = min(self.config.data.holdout_rows, len(self.index) // 20)
        return np.sort(permutation(len(self.index), self.config.seed, "held out")[:count])

    def tower(self, stage: int) -> ClipBundle:
        """The trained towers of a stage, on this process's device."""
        tower = load_clip(self.folder(stage, "train") / "model")
        tower.model.to(self.accelerator.device)
        return tower

    def embeddings(self, stage: int) -> EmbeddingTable:
        """Features of all rows under a stage."""
        return EmbeddingTable(self.folder(stage, "embed"), self.index)

    def labels(self, stages: int) -> PseudoLabels:
        """Labels from the clusters of the first `stages` stages."""
        if stages == 0:
            return no_labels(len(self.index))
        return read_labels(self.folder(stages - 1, "labels"), len(self.index))

    def batch_options(self, tower: ClipBundle) -> dict[str, Any]:
        """What the loaders need."""
        machine, data = self.config.machine, self.config.data
        return {
            "tokenizer": tower.tokenizer,
            "short_texts": takes_short_texts(tower.model),
            "num_workers": machine.workers,
            "prefetch_batches": machine.prefetch_batches,
            "device": self.accelerator.device,
            "max_pixels": data.max_pixels,
            "json_key": data.caption_key,
        }


def train(run: RunContext, s: int) -> None:
    """Train the towers of a stage on batches of its groups."""
    config, stage, out = run.config, run.config.stages[s], run.folder(s, "train")
    settings = stage.train
    tower = start_tower(run, s)
    if settings.steps:
        _fit_bias(tower.model, settings.loss)
        lock_parameters(
            tower.model,
            text=settings.lock.text,
            image_unlocked_groups=settings.lock.image_unlocked_groups,
            patterns=settings.lock.patterns,
        )
        logger.info("stage %d: %s", s, trainable_summary(tower.model))
        _check_grad_cache(tower.model, s, settings.grad_cache_rows)
        prepare_training(tower.model, **only(settings, "compiled", "patch_dropout", "grad_checkpointing"))
        tower.model = _synchronise_batch_norm(tower.model.to(run.accelerator.device))
        plan, groups, reader = _batch_plan(run, s)
        loader = TrainingLoader(
            plan,
            reader,
            transform=train_transform(tower.preprocess_cfg, **asdict(settings.augment)),
            texts=_cached_texts(run, s, tower, reader),
            **run.batch_options(tower),
        )
        train_stage(
            run.accelerator,
            tower.model,
            loader=loader,
            objective=Objective(
                groups=groups,
                preprocess_cfg=tower.preprocess_cfg,
                **only(settings, "loss", "ifm_epsilon", "precision", "min_negatives", "mask_duplicates"),
                **only(settings, "grad_cache_rows", "loss_chunk_rows"),
            ),
            optimizer=create_optimizer(
                tower.model,
                **only(settings, "lr", "weight_decay", "betas", "eps", "lr_multipliers", "weight_decays"),
            ),
            schedule=Schedule(
                total_steps=settings.steps,
                lr=settings.lr,
                warmup_steps=settings.warmup_steps,
                shape=settings.schedule,
                max_grad_norm=settings.max_grad_norm or math.inf,
            ),
            intervals=Intervals(
                evaluate_steps=config.eval.every_steps,
                **only(config.machine, "log_steps", "save_steps", "save_minutes", "keep_checkpoints"),
            ),
            out=out,
            seed=(config.seed, s),
            average_decay=settings.average_decay,
            max_bad_fraction=config.data.max_bad_fraction,
            evaluate=partial(_metrics, run, tower),
            show_progress=config.machine.progress,
            track=partial(_track, run, s),
            interrupt=run.interrupt,
        )
        run.accelerator.free_memory()
    if is_main():
        save_clip(tower, out / "model")
        shutil.rmtree(out / TEXTS, ignore_errors=True)


def _track(run: RunContext, s: int, record: Mapping[str, Any], step: int) -> None:
    """Give a record of training to the trackers, at its step over all stages."""
    flat = {**record, **{f"group_loss/{name}": value for name, value in record.get("group_loss", {}).items()}}
    values = {f"stage-{s}/{name}": value for name, value in flat.items() if name not in ("step", "group_loss")}
    run.trackers.log(values, step=first_step(run.config, s) + step)


def first_step(config: RunConfig, s: int) -> int:
    """How many steps the stages before have."""
    return sum(stage.train.steps for stage in config.stages[:s])


def _cached_texts(run: RunContext, s: int, tower: ClipBundle, reader: Reader) -> TextFeatures | None:
    """The features of all captions under a text tower that never changes in a stage, if that is less work in all."""
    settings, index, out = run.config.stages[s].train, reader.index, run.folder(s, "train") / TEXTS
    draws = any(isinstance(m, nn.Dropout) and m.p for name, m in tower.model.named_modules() if "visual" not in name)
    goes_without = isinstance(tower.model, open_clip.CLIP | open_clip.CustomTextCLIP)  # others want texts in a step
    if not settings.lock.text or not settings.lock.cached_texts or draws or not goes_without:
        return None
    options = run.batch_options(tower) | {"short_texts": False, "device": torch.device("cpu")}

    def batches(grid: Iterable[np.ndarray], **changed: Any) -> Iterator[CaptionedBatch]:
        return captioned_batches(run.reader(index), grid, transform=None, **(options | changed))

    counted = np.unique(np.linspace(0, len(index) - 1, ROWS_TO_COUNT).astype(np.int64))
    (some,) = batches([counted], tokenizer=None, num_workers=0)
    captions = len(index) * max(1.0, len(some.caption_of) / max(1, len(some.rows)))
    if settings.steps * settings.global_batch_size < 2 * captions:
        return None
    with run.interrupt.deferred():
        write_text_features(
            tower.model,
            index,
            batches=batches,
            dim=tower.model_cfg["embed_dim"],
            out=out,
            device=run.accelerator.device,
            batch_size=run.config.eval.batch_size,
            precision=settings.precision,
            show_progress=run.config.machine.progress,
            is_stopping=run.interrupt.noticed,
        )
    run.interrupt.check()
    barrier()
    logger.info("stage %d: the text tower is locked; the features of its captions are read from %s", s, out)
    return TextFeatures(out, index, tower.model_cfg["embed_dim"])


def start_tower(run: RunContext, s: int) -> ClipBundle:
    """The towers that a stage starts from, not yet trained by it."""
    tower, start = run.config.tower, run.config.stages[s].start
    if s == 0 or start == "scratch":
        return _new_tower(run.config, s if start == "scratch" else 0)
    if start == "base" and tower.is_pretrained:
        return _new_tower(run.config, 0)
    return load_clip(run.folder(0 if start == "base" else s - 1, "train") / "model")


def embed(run: RunContext, s: int) -> None:
    """Features of all rows under the towers of a stage."""
    out = run.folder(s, "embed")
    tower = run.tower(s)
    transform = evaluation_transform(tower.preprocess_cfg)
    texts = _same_texts(run, s, tower)
    options = run.batch_options(tower) | ({} if texts is None else {"tokenizer": None})

    def batches(grid: Iterable[np.ndarray]) -> Iterator[CaptionedBatch]:
        return captioned_batches(run.reader(run.index), grid, transform=transform, **options)

    with run.interrupt.deferred():
        embed_shards(
            tower.model,
            run.index,
            batches=batches,
            preprocess_cfg=tower.preprocess_cfg,
            dim=tower.model_cfg["embed_dim"],
            out=out,
            device=run.accelerator.device,
            batch_size=run.config.eval.batch_size,
            precision=run.config.stages[s].train.precision,
            show_progress=run.config.machine.progress,
            is_stopping=run.interrupt.noticed,
            texts=texts,
        )
    run.interrupt.check()
    barrier()
    bad = BadSamples(
        out / "bad_samples.jsonl", max_fraction=run.config.data.max_bad_fraction, rows=len(run.index), step=-1
    )
    if is_main():
        bad.add(bad_samples(out, run.index))
        pads_with_zero = not tower.model_cfg["text_cfg"].get("hf_tokenizer_name")
        if pads_with_zero and (full := full_captions(out, run.index)):
            logger.info(
                "stage %d: %d captions fill the %d tokens; what is longer is cut", s, full, tower.context_length
            )
    bad.flush(0, len(run.index))
    if bad.count:
        logger.info("stage %d: %d samples could not be decoded: %s", s, bad.count, bad.by_reason())


def _same_texts(run: RunContext, s: int, tower: ClipBundle) -> EmbeddingTable | None:
    """The features under the stage before, if its text tower is the same and ran in the same precision."""
    stages = run.config.stages
    if s == 0 or not stages[s].train.lock.text or stages[s].train.precision != stages[s - 1].train.precision:
        return None
    before = load_clip(run.folder(s - 1, "train") / "model")
    if not have_same_text_tower([before.model, tower.model], [before.model_cfg, tower.model_cfg]):
        return None
    logger.info("stage %d: the text features are those of the stage before", s)
    return run.embeddings(s - 1)


def cluster(run: RunContext, s: int) -> None:
    """Clusters of the features of a stage, on one side or both."""
    settings, out = run.config.stages[s].cluster, run.folder(s, "cluster")
    sides = SIDES if settings.on == "product" else (settings.on,)
    results: dict[str, Clustering] = {}
    stored: dict[str, np.ndarray] = {}
    table = run.embeddings(s)
    features: dict[str, ReadRows] = {side: partial(table.rows, side=side) for side in SIDES}
    metric: dict[str, Projection] = {}
    if settings.metric == "shared":
        metric = dict(zip(SIDES, fit_shared_metric(features["image"], features["text"], len(table)), strict=True))
    for side in sides:
        with ExitStack() as stack:
            rows = features[side]
            if side in metric:
                stored |= {f"{side}.mean": metric[side].mean, f"{side}.matrix": metric[side].matrix}
                rows = stack.enter_context(projected_rows(rows, len(table), metric[side], out / f"{side}.tmp"))
            results[side] = spherical_kmeans(
                rows,
                num_rows=len(table),
                num_clusters=settings.text_clusters or settings.num_clusters
                if side == "text"
                else settings.num_clusters,
                name=(run.config.seed, s, "cluster", side),
                num_starts=settings.num_starts,
                max_passes=settings.max_passes,
                device=run.accelerator.device,
            )
    if is_main():
        stored |= {side: result.centroids for side, result in results.items()}
        with atomic_path(out / "centroids.safetensors") as path:
            save_file({name: torch.from_numpy(array) for name, array in stored.items()}, path)
        for side, result in results.items():
            with atomic_path(out / f"assignments-{side}.npy") as path, path.open("wb") as file:
                np.save(file, result.assignments.astype(np.int32))
        write_json(out / "trace.json", {side: result.trace for side, result in results.items()})


def label(run: RunContext, s: int) -> None:
    """The labels of all stages so far, refined by the clusters of this one. For the main process alone."""
    labels, out = run.labels(s), run.folder(s, "labels")
    for path in sorted(run.folder(s, "cluster").glob("assignments-*.npy")):
        side = path.stem.removeprefix("assignments-")
        num_clusters = len(load_tensors(run.folder(s, "cluster") / "centroids.safetensors", side)[side])
        labels = labels.refine(load_numbers(path, len(run.index)).astype(np.int64), num_clusters)
    with atomic_path(out / "labels.npy") as path, path.open("wb") as file:
        np.save(file, labels.values)
    summary = labels.summary()
    write_json(out / "labels.json", summary)
    logger.info(
        "stage %d: %d labels, smallest %d, median %g, largest %d rows",
        s,
        *(summary[name] for name in ("labels", "smallest", "median", "largest")),
    )


def evaluate(run: RunContext, s: int) -> None:
    """The tasks by this stage alone and by all stages so far."""
    tower, out = run.tower(s), run.folder(s, "eval")
    for name, task in run.tasks.items():
        run.interrupt.check()
        path = out / f"features-{name}.safetensors"
        if not path.exists():
            raw = task.embed(tower.model, **_embedding_options(run, tower))
            if is_main():
                with atomic_path(path) as temporary:
                    save_file(raw, temporary)
    so_far = [(f"stages-0-{s}-{how}", range(s + 1), how) for how in COMBINATIONS] if s else []
    on_main(partial(score_stages, run, out, [(f"stage-{s}", [s], SINGLE), *so_far]))
    logging.getLogger(RESULTS).info("after stage %d\n%s", s, results_table(run.config.run_dir))
    settings = asdict(run.config.stages[s].train)
    if is_main() and (said := diagnosis(run.config.run_dir, s, settings=settings, rows=len(run.index))):
        logger.info("stage %d: %s", s, said)


def diagnosis(run_dir: Path, s: int, *, settings: Mapping[str, Any], rows: int) -> str:
    """Whether anything seems to be suppressed in a stage; nothing for one that was not trained, or by another loss.

    Args:
        run_dir: the run directory.
        s: the stage.
        settings: of its training, as in config.json.
        rows: rows of the data.
    """
    if settings.get("loss") != "clip" or settings.get("ifm_epsilon"):
        return ""
    folder = run_dir / f"stage-{s}"
    steps = [r for r in read_jsonl(folder / "train" / "metrics.jsonl") if "negatives_per_row" in r]
    if not steps:
        return ""
    last = steps[-max(1, len(steps) // 10) :]
    return diagnose(
        loss=float(np.mean([record["loss"] for record in last])),
        negatives=float(np.mean([record["negatives_per_row"] for record in last])),
        scores={
            record["dataset"]: record["metrics"]["main_metric"]
            for record in read_jsonl(folder / "eval" / "results.jsonl")
            if label_of(record) == f"stage-{s}"
        },
        rows=rows,
        global_batch_size=settings["global_batch_size"],
    )


def combine(run: RunContext) -> None:
    """The multistage model, with its temperature, and its results. For the main process alone."""
    out, stages = run.config.run_dir / "combined", range(len(run.config.stages))
    tables = [run.embeddings(s) for s in stages]
    rows = run.held_out[_is_good(tables, run.held_out)] if len(run.held_out) else run.held_out
    if len(rows) < 2:
        raise UserError(f"{len(rows)} held-out rows are too few to fit the logit scale; raise --data.holdout-rows")
    sides = [[torch.from_numpy(table.take(rows, side)) for table in tables] for side in SIDES]
    fitted = fit_combination(*sides, combine=run.config.combine, loss=run.config.stages[0].train.loss)
    towers = [load_clip(run.folder(s, "train") / "model") for s in stages]
    model = MultistageCLIP(
        [tower.model for tower in towers],
        combine=fitted.combine,
        logit_scale=fitted.logit_scale,
        logit_bias=fitted.logit_bias,
        preprocess_cfg=towers[0].preprocess_cfg,
        model_cfgs=[tower.model_cfg for tower in towers],
        tokenizer=towers[0].tokenizer,
    )
    with atomic_dir(out / "model") as folder:
        model.save(folder)
    write_json(out / "combination.json", {**asdict(fitted), "held_out_rows": len(rows)})
    score_stages(run, out, [("combined", stages, fitted.combine)])
    logging.getLogger(RESULTS).info("all stages\n%s", results_table(run.config.run_dir))


def publish(run: RunContext) -> None:
    """The multistage model on the Hub: written, loaded back, then sent. For the main process alone."""
    config, out = run.config.publish, run.config.run_dir / "publish"
    export = Export(compact=config.compact, about=About(**only(config, "license", "datasets", "description")))
    export_run(run.config.run_dir, out / "model", export, **only(config, "repo", "revision"))
    published = upload(out / "model", config.repo, **only(config, "private", "revision", "create_pr"))
    write_json(out / "published.json", asdict(published))
    logger.info("published at %s, commit %s", published.url, published.commit)


def score_stages(run: RunContext, out: Path, models: Iterable[tuple[str, Sequence[int], str]]) -> None:
    """Results of stages and combinations from the stored features: results.jsonl, and the outcome of each query."""
    records = []
    for label, stages, how in models:
        for name, found in run.tasks.items():
            started = time.perf_counter()
            stored = [load_tensors(run.folder(s, "eval") / f"features-{name}.safetensors", *SIDES) for s in stages]
            combination = "concat" if how == SINGLE else how
            image, text = (combine_features([features[side] for features in stored], combination) for side in SIDES)
            task = at_width_of_one_stage(found, [features["image"].shape[1] for features in stored])
            metrics, outcomes = task.score(image, text)
            if how == SINGLE and isinstance(task, ClassificationTask):
                metrics |= _cluster_agreement(run, stages[0], task, image)
            outcomes_file = f"outcomes-{name}-{label}.npz"
            with atomic_path(out / outcomes_file) as path, path.open("wb") as file:
                np.savez_compressed(file, allow_pickle=False, **outcomes)
            records.append(
                result_record(
                    task,
                    metrics,
                    model=run.config.tower.architecture or "model given in the recipe",
                    pretrained=f"{run.config.run_dir.name}/{label}",
                    stage=stages[-1],
                    combine=None if how == SINGLE else how,
                    dtype="fp32",
                    seconds=time.perf_counter() - started,
                    outcomes=outcomes,
                    outcomes_file=outcomes_file,
                )
            )
    with atomic_path(out / "results.jsonl") as path:
        path.touch()
        for record in records:
            append_jsonl(path, record)


def _cluster_agreement(
    run: RunContext, s: int, task: ClassificationTask, image_features: Float[Tensor, "images dim"]
) -> dict[str, float]:
    """How well the clusters of a stage tell the classes of a set apart; nothing if pictures were not clustered."""
    stored = load_tensors(run.folder(s, "cluster") / "centroids.safetensors")
    if "image" not in stored:
        return {}
    features = F.normalize(image_features)
    if "image.matrix" in stored:
        projection = Projection(mean=stored["image.mean"].numpy(), matrix=stored["image.matrix"].numpy())
        features = torch.from_numpy(projection(features.numpy())).float()
    clusters = (features @ stored["image"].T).argmax(1).numpy()
    return {"cluster_nmi": normalized_mutual_information(clusters, task.data.labels)}


def _batch_plan(run: RunContext, s: int) -> tuple[BatchPlan, Int64[np.ndarray, "rows"], Reader]:
    """The batches of a stage, the group of each row (-1 for held-out rows), and where the rows are read."""
    config, settings = run.config, run.config.stages[s].train
    labels = no_labels(len(run.index)) if settings.groups == "none" else run.labels(s)
    found = group_labels(labels, min_group_size=min_group_size(config.stages[s]))
    groups = found.group_of.copy()
    groups[run.held_out] = -1
    if settings.groups == "random":
        groups = shuffled_groups(groups, name=(config.seed, s, "random groups"))
    index, sources = run.index, run.sources
    if settings.resharded:
        index, groups, sources = _resharded(run, Path(settings.resharded), groups)
    plan = BatchPlan(
        shard_of=index.shard_of,
        groups=groups,
        global_batch_size=settings.global_batch_size,
        seed=config.seed,
        stage=s,
        sources=sources,
        window_shards=settings.window_shards,
        run_rows=settings.run_rows,
        cache_dir=config.machine.cache_dir or config.run_dir / "index",
    )
    if plan.rows_per_epoch < settings.global_batch_size:
        logger.warning(
            "stage %d: the data has %d rows, fewer than a global batch of %d; each batch has %d valid rows",
            s, plan.rows_per_epoch, settings.global_batch_size, plan.rows_per_epoch,
        )  # fmt: skip
    statistics = plan.statistics(min_negatives=settings.min_negatives)  # on every process: plans on disk are collective
    if is_main():
        record = {
            **found.record(),
            "assignment": settings.groups,
            "held_out_rows": len(run.held_out),
            "epoch_0": asdict(statistics),
        }
        write_json(run.folder(s, "train") / "groups.json", record)
        logger.info(
            "stage %d: %d groups, smallest %d, median %g rows, %d rows relaxed; %d batches an epoch, %.0f %% of rows "
            "in batches of one group, %.0f negatives a row",
            s, *(record[name] for name in ("num_groups", "smallest", "median", "rows_relaxed")), statistics.batches,
            100 * statistics.share_homogeneous, statistics.mean_negatives,
        )  # fmt: skip
    return plan, groups, run.reader(index)


def _resharded(
    run: RunContext, folder: Path, groups: Int64[np.ndarray, "rows"]
) -> tuple[ShardIndex, Int64[np.ndarray, "rows"], tuple[Source, ...]]:
    """The same rows in the order of other shards, with their groups."""
    if any(source.weight != 1 for source in run.sources):
        raise UserError(f"--data.weights {run.config.data.weights} cannot be used with resharded shards in {folder}")
    index = ShardIndex.build(expand_shards(folder))
    row_map = load_numbers(folder / ROW_MAP, len(index))
    if len(index) != len(run.index) or row_map.min() < 0 or row_map.max() >= len(index):
        raise UserError(f"{folder} has {len(index)} rows and this run {len(run.index)}; reshard from this run again")
    if not all(np.array_equal(getattr(index, name), getattr(run.index, name)[row_map]) for name in SIZES):
        raise UserError(f"{folder} holds other samples than this run; reshard from this run again")
    return index, groups[row_map], ()


def _new_tower(config: RunConfig, draw: int) -> ClipBundle:
    """The towers of the recipe; without weights, draw number `draw`."""
    tower = config.tower
    return create_clip(
        architecture=tower.architecture,
        model_cfg=tower.model or None,
        pretrained=tower.pretrained,
        preprocess=tower.preprocess,
        seed=seed_of(config.seed, "tower", draw),
    )


def _fit_bias(model: nn.Module, loss: str) -> None:
    """Let the bias of the logits train if the loss uses it, in a way that DistributedDataParallel can follow."""
    has_bias = getattr(model, "logit_bias", None) is not None
    if has_bias and loss == "clip":
        model.logit_bias.requires_grad_(False)
    elif has_bias:
        # The model returns the parameter itself, which DDP takes for unused; a product of it is not.
        model.register_forward_hook(lambda _, __, out: {**out, "logit_bias": out["logit_bias"] * 1})
    elif loss == "siglip":
        raise UserError(
            "--stages.K.train.loss siglip needs a tower with a bias: put init_logit_bias, such as -10, beside "
            "embed_dim in the recipe's TowerConfig(model=...), or use an architecture that has it"
        ).on_every_process()


def _has_batch_norm(model: nn.Module) -> bool:
    """Whether features of a row depend on the other rows; not in layers that are locked."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def _check_grad_cache(model: nn.Module, s: int, rows: int) -> None:
    if rows and _has_batch_norm(model):
        raise UserError(
            f"--stages.{s}.train.grad-cache-rows {rows} cannot be used with BatchNorm, whose statistics of {rows} rows "
            f"are not those of the batch; use 0, lock the layers with BatchNorm "
            f"(--stages.{s}.train.lock.image-unlocked-groups), or use a tower with LayerNorm"
        ).on_every_process()


def _synchronise_batch_norm(model: nn.Module) -> nn.Module:
    """The model with batch statistics over the global batch.

    Raises:
        UserError: where that is not possible.
    """
    if not _has_batch_norm(model) or world_size() == 1:
        return model
    if not torch.cuda.is_available():
        raise UserError(
            f"the image tower has BatchNorm, which cannot be synchronised over {world_size()} CPU processes; use one "
            f"process, GPUs, or a tower with LayerNorm"
        ).on_every_process()
    synchronised: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    return synchronised


def _embedding_options(run: RunContext, tower: ClipBundle) -> dict[str, Any]:
    return {
        "image_transform": tower.image_transform,
        "tokenizer": tower.tokenizer,
        "device": run.accelerator.device,
        "batch_size": run.config.eval.batch_size,
        "num_workers": run.config.machine.workers,
    }


def _metrics(run: RunContext, tower: ClipBundle, model: nn.Module) -> dict[str, float]:
    """What an evaluation inside a stage logs."""
    metrics = {}
    for name, task in run.tasks.items():
        raw = task.embed(model, **_embedding_options(run, tower))
        found, _ = task.score(*(combine_features([raw[side]], "concat") for side in SIDES))
        metrics.update({f"{name}/{metric}": value for metric, value in found.items()})
    return metrics


def _is_good(tables: Sequence[EmbeddingTable], rows: Int64[np.ndarray, "rows"]) -> np.ndarray:
    good: np.ndarray = np.all([table.take(rows, "image").any(1) for table in tables], axis=0)
    return good


def min_group_size(stage: StageConfig) -> int:
    """The smallest group of a stage, in rows."""
    return stage.train.min_group_size or default_min_group_size(stage.train.global_batch_size)


def only(settings: Any, *names: str) -> dict[str, Any]:
    """Some attributes, by name."""
    return {name: getattr(settings, name) for name in names}
