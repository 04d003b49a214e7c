"""What all phases of a run share, and the data and evaluation sets that it is made of."""

import logging
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from jaxtyping import Int64

from mcl_clip.config import DataConfig, RunConfig
from mcl_clip.core.distributed import (
    barrier,
    check_same,
    count_cores,
    is_main,
    on_main,
    place_on_node,
    rank,
    sample_of_permutation,
    world_size,
)
from mcl_clip.core.errors import UserError
from mcl_clip.core.files import DONE, STARTED, read_json
from mcl_clip.data.features import EmbeddingTable
from mcl_clip.data.index import OLD_RULE, RULE, ShardIndex, collect_parts
from mcl_clip.data.reader import Reader
from mcl_clip.data.row_order import Source
from mcl_clip.data.samples import IMAGES_ALONE, SampleRule
from mcl_clip.data.shards import expand_shards
from mcl_clip.data.tar import TEXT_FORMATS
from mcl_clip.eval.classification import ClassificationSet, ClassificationTask, as_probe
from mcl_clip.eval.datasets import open_set
from mcl_clip.eval.embed import Encoder
from mcl_clip.eval.retrieval import RetrievalSet, RetrievalTask
from mcl_clip.eval.task import Task
from mcl_clip.model.clip import ClipBundle, load_clip
from mcl_clip.model.fast_paths import padding_token
from mcl_clip.runs.phase import StaleArtifactError
from mcl_clip.stages.pseudo_labels import PseudoLabels, no_labels, read_labels
from mcl_clip.train.interrupt import Interrupt
from mcl_clip.train.trackers import Trackers

RESULTS = "mcl_clip.results"  # logger of the tables of results, which are printed in quiet runs as well
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """Settings, data, devices and services of a run, and readers of what its phases have written."""

    config: RunConfig
    accelerator: Accelerator
    index: ShardIndex
    sources: tuple[Source, ...]
    tasks: dict[str, Task]
    interrupt: Interrupt = field(default_factory=Interrupt)
    trackers: Trackers = field(default_factory=Trackers)

    def folder(self, stage: int, phase: str) -> Path:
        """Return the folder that a phase of a stage writes to."""
        return self.config.run_dir / f"stage-{stage}" / phase

    def first_step(self, stage: int) -> int:
        """Return the number of training steps in all stages before `stage`."""
        return sum(earlier.train.steps for earlier in self.config.stages[:stage])

    @cached_property
    def held_out(self) -> Int64[np.ndarray, "held_out"]:
        """Rows that are never trained on, in ascending order; none without captions, when nothing is fitted to them."""
        if self.config.tower.images_only:
            return np.zeros(0, np.int64)
        count = min(self.config.data.holdout_rows, len(self.index) // 20)
        return sample_of_permutation(len(self.index), count, self.config.seed, "held out")

    def clip(self, stage: int) -> ClipBundle:
        """Load the trained model of a stage to the device of this process."""
        clip = load_clip(self.folder(stage, "train") / "model")
        clip.model.to(self.accelerator.device)
        return clip

    def embeddings(self, stage: int) -> EmbeddingTable:
        """Open the features of all rows under a stage."""
        return EmbeddingTable(self.folder(stage, "embed"), self.index)

    def clustered(self, stage: int) -> int:
        """Return the stage whose features the clustering of a stage is of: itself, or stage 0."""
        return 0 if self.config.stages[stage].cluster.features == "base" else stage

    def labels(self, stages: int) -> PseudoLabels:
        """Read the pseudo-labels of all rows after the first `stages` stages."""
        if stages == 0:
            return no_labels(len(self.index))
        return read_labels(self.folder(stages - 1, "labels"), len(self.index))

    def reader(self, index: ShardIndex) -> Reader:
        """Create a reader of the rows of an index."""
        machine, node = self.config.machine, place_on_node()[0]
        # Nodes may share the file system of the cache, whose locks and open files are those of one machine.
        cache_dir = machine.cache_dir / f"node-{node}" if machine.cache_dir and node else machine.cache_dir
        return Reader(
            index,
            remote=machine.remote,
            cache_dir=cache_dir,
            cache_gb=machine.cache_gb,
            captions_by_line=self.config.behavior == "0.6",
        )

    def batch_options(self, clip: ClipBundle) -> dict[str, Any]:
        """Return the arguments that all loaders of image-text batches have in common."""
        machine, data = self.config.machine, self.config.data
        return {
            "tokenizer": clip.tokenizer if clip.has_texts else None,
            "short_texts": padding_token(clip.model) == 0,
            "num_workers": machine.workers,
            "prefetch_batches": machine.prefetch_batches,
            "timeout_s": machine.loader_timeout_s,
            "device": self.accelerator.device,
            "max_pixels": data.max_pixels,
            "json_key": data.caption_key or RULE.caption_key,
        }

    def encoder(self, model: Any, clip: ClipBundle) -> Encoder:
        """Return what embeds evaluation sets with `model`, using the preprocessing and tokenizer of `clip`."""
        return Encoder(
            model=model,
            image_transform=clip.image_transform,
            tokenizer=clip.tokenizer,
            device=self.accelerator.device,
            batch_size=self.config.eval.batch_size,
            num_workers=self.config.machine.workers,
            timeout_s=self.config.machine.loader_timeout_s,
            waiting_for=self.interrupt.waiting_for,
        )


def with_behavior(config: RunConfig) -> RunConfig:
    """Return the configuration with the behavior that its run directory was begun with."""
    markers = (config.run_dir / "stage-0" / "train" / name for name in (STARTED, DONE))
    begun = next((read_json(marker) for marker in markers if marker.is_file()), None)
    if begun is None or "behavior" in begun.get("made_from", {}).get("settings", {}).get("data", {}):
        return config
    if config.behavior != "0.6":
        logger.info("%s was begun with version 0.6 or earlier, and continues with its behavior", config.run_dir)
    return replace(config, behavior="0.6")


def sample_rule(data: DataConfig, behavior: str, *, images_only: bool = False) -> SampleRule:
    """Return which members of the training shards make a pair, or an image alone."""
    images = (data.image_member.lower().lstrip("."),) if data.image_member else RULE.images
    if images_only:
        is_named = bool(data.image_member)
        return replace(IMAGES_ALONE, images=images, has_dotted_keys=is_named, skip_damaged=data.skip_damaged)
    if behavior == "0.6":
        return OLD_RULE
    texts = RULE.texts[::-1] if data.caption_key or data.negatives_key else RULE.texts
    return SampleRule(
        images=images,
        texts=(data.text_member.lower().lstrip("."),) if data.text_member else texts,
        has_dotted_keys=bool(data.image_member or data.text_member),
        caption_key=data.caption_key or RULE.caption_key,
        skip_damaged=data.skip_damaged,
    )


def load_index(config: RunConfig, interrupt: Interrupt | None = None) -> tuple[ShardIndex, tuple[Source, ...]]:
    """Return the index of the training shards, and the rows and weight of each list of shards.

    The index is kept in the run directory, and rebuilt when a shard was added, removed or changed. All processes scan
    shards for it; when they are stopped or killed, the next start continues with the shards that are left.

    Raises:
        UserError: if there are no shards, no shard holds a pair, or too many samples are left out.
        StaleArtifactError: if the run was begun with other data.
    """
    if not config.data.train:
        raise UserError("--data.train names no shards; give paths, URLs or folders with .tar files")
    lists = [expand_shards(spec) for spec in config.data.train]
    path = config.run_dir / "index" / "index.arrow"
    urls, rule, kept = (
        [url for urls in lists for url in urls],
        sample_rule(config.data, config.behavior, images_only=config.tower.images_only),
        path.parent / "parts",
    )
    if not on_main(partial(_is_current, path, urls, rule)):
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if world_size() > 1 else 1
        workers = max(1, count_cores() // processes)
        interrupt = interrupt or Interrupt()
        collect_parts(urls[rank() :: world_size()], rule, kept=kept, workers=workers, is_stopping=interrupt.noticed)
        barrier()
        interrupt.check()
        on_main(partial(_write_index, path, urls, rule, kept))
    index = ShardIndex.load(path, check=is_main())
    check_same(index.digest, "the index of the training shards")
    logger.info("index: %d rows; captions: %s", len(index), index.text_counts())
    if index.skipped_by_reason():
        logger.info("index: left out: %s", index.describe_skipped())
    check_pairs(config, index)
    weights = config.data.weights or (1.0,) * len(lists)
    shards = iter(index.shards)
    rows = [sum(shard.rows for shard in islice(shards, len(urls))) for urls in lists]
    return index, tuple(Source(rows=n, weight=weight) for n, weight in zip(rows, weights, strict=True))


def check_pairs(config: RunConfig, index: ShardIndex) -> None:
    """Raise UserError if the samples have no .json member for a given key, or too many of them are left out."""
    data, skipped = config.data, sum(index.skipped_by_reason().values())
    if config.behavior == "0.6":
        return
    option, key = ("caption", data.caption_key) if data.caption_key else ("negatives", data.negatives_key)
    if key and not (index.text_format == TEXT_FORMATS.index("json")).any():
        raise UserError(
            f"--data.{option}-key {key} is a key of .json members, but the captions of all {len(index):,} "
            f"samples are {index.text_counts()}; leave it out, or add .json members"
        )
    if skipped > data.max_bad_fraction * (len(index) + skipped):
        raise UserError(
            f"{skipped:,} of {len(index) + skipped:,} samples of the shards are left out, more than "
            f"--data.max-bad-fraction {data.max_bad_fraction:g} allows: {index.describe_skipped()}; mend the shards, "
            f"say where images and captions are (--data.image-member, --data.text-member, --data.caption-key), or "
            f"raise the limit"
        )


def _is_current(path: Path, urls: list[str], rule: SampleRule) -> bool:
    before = ShardIndex.load(path) if path.exists() else None
    if before is not None and [shard.url for shard in before.shards] == urls and before.rule == rule:
        with suppress(UserError):  # a shard has changed
            before.check_unchanged()
            return True
    return False


def _write_index(path: Path, urls: list[str], rule: SampleRule, kept: Path) -> None:
    """Write the index of the parts that all processes have scanned, and of shards that are not among them."""
    index, run_dir = ShardIndex.build(urls, rule=rule, kept=kept), path.parents[1]
    before = ShardIndex.load(path) if path.exists() else None
    is_other = before is not None and index.digest != before.digest and any(run_dir.glob(f"stage-*/*/{STARTED}"))
    rows = len(index)
    if not is_other:
        index.save(path)
    del index  # it is mapped from a file in `kept`
    shutil.rmtree(kept, ignore_errors=True)
    if before is not None and is_other:
        raise StaleArtifactError(
            f"{run_dir} was begun with other data ({len(before)} rows then, {rows} now, with other keys or "
            f"sizes); use the earlier --data.train, or another --run-dir"
        )


def name_and_folder(value: str) -> tuple[str, str]:
    """Split NAME=FOLDER; FOLDER alone has its own name."""
    name, _, folder = value.partition("=") if "=" in value else ("", "", value)
    return name or Path(folder).name, folder


def open_tasks(config: RunConfig) -> dict[str, Task]:
    """Open evaluation sets by name (default: the folder's); raise UserError if two share one or a layout is wrong."""
    kinds: tuple[tuple[Sequence[str], Callable[[Path, str], Task]], ...] = (
        (config.eval.retrieval, lambda folder, name: RetrievalTask(name, RetrievalSet.open(folder))),
        (config.eval.classification, lambda folder, name: ClassificationTask(name, ClassificationSet.open(folder))),
        (config.eval.sets, open_set),
    )
    tasks: dict[str, Task] = {}
    for values, open_task in kinds:
        for value in values:
            name, folder = name_and_folder(value)
            if name in tasks:
                raise UserError(f"two evaluation sets are both called {name}; write NAME=FOLDER")
            task = open_task(Path(folder), name)
            tasks[name] = as_probe(task) if config.tower.images_only else task
    return tasks
