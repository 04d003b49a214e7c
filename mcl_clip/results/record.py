"""Read a run from its files, finished or not: configuration, stages, results, outcomes of queries, and lost data.

Each file is read when it is first needed, so a damaged file is an error only where its content is used.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from mcl_clip.core.distributed import permutation
from mcl_clip.core.errors import UserError
from mcl_clip.core.files import DONE, read_json, read_jsonl, read_run_config
from mcl_clip.core.stats import normalized_mutual_information
from mcl_clip.data.index import INDEX_NAME, ShardIndex
from mcl_clip.data.shards import redacted
from mcl_clip.data.storage import load_numbers
from mcl_clip.eval.task import label_of, read_results
from mcl_clip.model.image_model import CONFIG_NAME as IMAGE_CONFIG_NAME
from mcl_clip.model.image_model import HEAD_NAME, TRUNK_NAME, is_image_folder
from mcl_clip.model.multistage import CONFIG_NAME, NOT_TEXT
from mcl_clip.model.open_clip_io import OPEN_CLIP_CONFIG_NAME, OPEN_CLIP_WEIGHTS_NAME
from mcl_clip.train.checkpoint import checkpoints

PHASES = ("train", "embed", "cluster", "labels", "eval")
COMBINED = "combined"
SIDES = ("image", "text")
SHARDS_SHOWN = 5  # shards whose lost samples are listed one by one
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


class WeightSizes(NamedTuple):
    """Numbers of parameters of a stage's image and text tower, and its logit scale, exponentiated."""

    image: int
    text: int
    logit_scale: float


@dataclass(frozen=True)
class Result:
    """A record of results.jsonl, and the folder that holds its file of outcomes."""

    record: Mapping[str, Any]
    folder: Path

    @property
    def dataset(self) -> str:
        """The user's name of the evaluation set."""
        return str(self.record["dataset"])

    @property
    def label(self) -> str:
        """The model that was evaluated: `stage-K`, `combined`, `stages-0-K-concat`, or a name of its own."""
        return label_of(self.record)

    @property
    def main_metric(self) -> str:
        """The metric to quote where there is room for one."""
        return str(self.record["main_metric"])

    def value(self, metric: str) -> float | None:
        """Return a metric, or None where it was not measured."""
        value = self.record["metrics"].get(metric)
        return None if value is None or not math.isfinite(value) else float(value)

    def interval(self, metric: str) -> tuple[float, float] | None:
        """Return the 95 % interval of a metric, or None where it has none."""
        low, high = self.record.get("ci95", {}).get(metric) or (None, None)
        return None if low is None or high is None else (float(low), float(high))

    @property
    def outcomes_path(self) -> Path | None:
        """The file with the outcomes of queries; None where outcomes are not stored."""
        path = self.folder / Path(self.record.get("outcomes") or "-").name
        return path if path.is_file() else None

    @cached_property
    def outcomes(self) -> Mapping[str, np.ndarray]:
        """The outcome of each query, by metric; empty where outcomes are not stored."""
        path = self.outcomes_path
        if path is None:
            return {}
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                return dict(stored)
        except Exception as error:  # numpy raises errors of many types for damaged archives
            raise UserError(f"{path} cannot be read ({error}); restore it or evaluate again") from error


@dataclass(frozen=True)
class StageRecord:
    """One stage: its folder, and its part of the configuration."""

    folder: Path
    settings: Mapping[str, Any]

    @property
    def train_settings(self) -> Mapping[str, Any]:
        """The configuration of its training."""
        settings: Mapping[str, Any] = self.settings.get("train", {})
        return settings

    def state(self, phase: str) -> str:
        """Return `done`, `partial` or `missing`."""
        return phase_state(self.folder / phase)

    @cached_property
    def model_cfg(self) -> Mapping[str, Any]:
        """The configuration of the model; empty before training is finished."""
        folder = self.folder / "train" / "model"
        name = IMAGE_CONFIG_NAME if is_image_folder(folder) else OPEN_CLIP_CONFIG_NAME
        config: Mapping[str, Any] = _read_object(folder / name)
        model_cfg: Mapping[str, Any] = config.get("model_cfg", {})
        return model_cfg

    @cached_property
    def weights(self) -> WeightSizes | None:
        """Sizes from the header of the weights; None before training is finished."""
        folder = self.folder / "train" / "model"
        if is_image_folder(folder):
            trunk, _ = _read_sizes(folder / TRUNK_NAME)
            head, scale = _read_sizes(folder / HEAD_NAME)
            return WeightSizes(image=sum(trunk.values()) + sum(head.values()), text=0, logit_scale=scale)
        if not (path := folder / OPEN_CLIP_WEIGHTS_NAME).exists():
            return None
        sizes, scale = _read_sizes(path)
        return WeightSizes(
            image=sum(size for name, size in sizes.items() if name.startswith("visual.")),
            text=sum(size for name, size in sizes.items() if not name.startswith(NOT_TEXT)),
            logit_scale=scale,
        )

    @cached_property
    def metrics(self) -> Sequence[Mapping[str, Any]]:
        """All records of metrics.jsonl: of training steps (those a restart repeated once), and of evaluations."""
        return read_jsonl(self.folder / "train" / "metrics.jsonl")

    @cached_property
    def steps(self) -> Sequence[Mapping[str, Any]]:
        """The records of training steps."""
        return [record for record in self.metrics if "loss" in record]

    def total(self, counter: str) -> int:
        """Sum a counter over all steps."""
        return int(sum(record.get(counter, 0) for record in self.steps))

    @cached_property
    def groups(self) -> Mapping[str, Any]:
        """The content of groups.json; empty where nothing was trained."""
        return _read_object(self.folder / "train" / "groups.json")

    @cached_property
    def bad_samples(self) -> Mapping[str, Sequence[Mapping[str, Any]]]:
        """Records of the samples that could not be decoded, by phase."""
        return {phase: read_jsonl(self.folder / phase / "bad_samples.jsonl") for phase in ("train", "embed")}

    @cached_property
    def best(self) -> Mapping[str, Any]:
        """Which weights were kept as the best: metric, step, value, and last step; empty where the last ones were."""
        return _read_object(self.folder / "train" / "best.json")

    @property
    def bad_rows(self) -> Mapping[Any, str]:
        """Why each row could not be decoded; rows that failed in both phases are there once."""
        return {record.get("row"): str(record.get("reason")) for phase in self.bad_samples.values() for record in phase}


@dataclass(frozen=True)
class RunRecord:
    """A run: its folder, and the resolved recipe."""

    folder: Path
    config: Mapping[str, Any]

    @cached_property
    def stages(self) -> Sequence[StageRecord]:
        """All stages of the recipe, in order."""
        return [StageRecord(self.folder / f"stage-{s}", settings) for s, settings in enumerate(self.config["stages"])]

    @property
    def labels(self) -> list[str]:
        """The models that tables show: all stages, and their combination where there are several."""
        is_single = len(self.stages) == 1 and not self.averaged
        return [f"stage-{s}" for s in range(len(self.stages))] + [COMBINED] * (not is_single)

    @property
    def is_finished(self) -> bool:
        """Whether the stages are combined."""
        return phase_state(self.folder / COMBINED) == "done"

    @cached_property
    def launches(self) -> Sequence[Mapping[str, Any]]:
        """A record of each start."""
        return read_jsonl(self.folder / "launches.jsonl")

    @cached_property
    def index(self) -> ShardIndex | None:
        """The index of the training data; None before it is written."""
        path = self.folder / "index" / INDEX_NAME
        return ShardIndex.load(path) if path.exists() else None

    @cached_property
    def combination(self) -> Mapping[str, Any]:
        """How the stages are combined, and the fitted logit scale; empty before that."""
        return _read_object(self.folder / COMBINED / "combination.json")

    @property
    def images_only(self) -> bool:
        """Whether the run learns from images alone, without captions."""
        tower = self.config.get("tower", {})
        return bool(tower.get("image")) and not tower.get("text")

    @property
    def unit(self) -> str:
        """What the rows of the data are called: pairs, or images where there are no captions."""
        return "images" if self.images_only else "pairs"

    @property
    def averaged(self) -> str:
        """How the weights of a final model that is one CLIP were made; empty where the stages are combined."""
        return str(self.combination.get("averaged") or "")

    @property
    def shares_text_tower(self) -> bool:
        """Whether all stages have the same text tower."""
        return bool(_read_object(self.folder / COMBINED / "model" / CONFIG_NAME).get("shared_text_tower"))

    @property
    def held_out_rows(self) -> int:
        """Pairs that no stage trains on."""
        counts = [stage.groups["held_out_rows"] for stage in self.stages if stage.groups]
        return int(counts[0] if counts else self.combination.get("held_out_rows", 0))

    @property
    def training_seconds(self) -> float | None:
        """Time of all training steps; None before the first one."""
        seconds = [stage.steps[-1]["seconds"] for stage in self.stages if stage.steps]
        return sum(seconds) if seconds else None

    @cached_property
    def results(self) -> Mapping[str, Mapping[str, Result]]:
        """Results of single stages and of their combination, by key of the set and then by label."""
        results: dict[str, dict[str, Result]] = {}
        for result in load_results(self.folder):
            if result.folder == self.folder / (COMBINED if result.label == COMBINED else f"{result.label}/eval"):
                results.setdefault(result.record["key"], {})[result.label] = result
        return results

    @cached_property
    def agreement(self) -> Mapping[tuple[int, str], tuple[float, float]]:
        """Agreement of the clusterings of consecutive stages, by number of the first stage and side.

        Each is the normalized mutual information, and that of the same clusters over pairs in a random order.
        """
        agreement = {}
        rows = len(self.index) if self.index else 0
        for s, side in product(range(len(self.stages) - 1), SIDES):
            paths = [stage.folder / "cluster" / f"assignments-{side}.npy" for stage in self.stages[s : s + 2]]
            if rows and all(path.exists() for path in paths):
                first, second = (load_numbers(path, rows) for path in paths)
                shuffled = second[permutation(rows, "agreement of clusterings", s, side)]
                mutual, if_random = (normalized_mutual_information(first, other) for other in (second, shuffled))
                agreement[s, side] = mutual, if_random
        return agreement


def _read_sizes(path: Path) -> tuple[dict[str, int], float]:
    """Return the number of values of each weight in a file, and the logit scale, 1 if there is none."""
    try:
        with safe_open(path, framework="np") as file:
            names = list(file.keys())
            sizes = {name: math.prod(file.get_slice(name).get_shape()) for name in names}
            scale = float(np.exp(file.get_tensor("logit_scale"))) if "logit_scale" in names else 1.0
    except (SafetensorError, OSError, TypeError) as error:
        raise UserError(f"{path} is not a whole file of weights ({error}); restore it or train again") from error
    return {name: size for name, size in sizes.items() if not name.endswith(_BUFFERS)}, scale


def read_run(folder: Path) -> RunRecord:
    """Open a run, finished or not.

    Raises:
        UserError: if it is not a run directory; the properties of the record raise it for damaged files.
    """
    return RunRecord(folder, read_run_config(folder))


def phase_state(folder: Path) -> str:
    """Return the state of a phase: `done`, `partial` or `missing`."""
    if (folder / DONE).exists():
        return "done"
    return "partial" if folder.exists() and any(folder.iterdir()) else "missing"


def load_results(folder: Path) -> list[Result]:
    """Read all results of a run (its stages in order, then the combined model), of a stage, or of an evaluation.

    Raises:
        UserError: if a file of results is damaged.
    """
    stages = sorted(folder.glob("stage-*/eval"), key=lambda path: int(path.parent.name.removeprefix("stage-")))
    folders = [folder, folder / "eval", *stages, folder / COMBINED]
    return [Result(record, path) for path in folders for record in read_results(path)]


def data_losses(folder: Path) -> list[str]:
    """List what a run lost: samples left out or not decoded, masked negatives, merged groups, and restarts.

    Counters are of the steps that made the model: steps that a restart trained again count once.

    Raises:
        UserError: if `folder` is not a run directory, or one of its files is damaged.
    """
    run = read_run(folder)
    lines = []
    if run.index is not None and (skipped := run.index.skipped_by_reason()):
        lines.append(f"index: {sum(skipped.values()):,} samples of the shards are not pairs ({count_text(skipped)})")
    for number, stage in enumerate(run.stages):
        try:
            lines += [f"stage {number}: {line}" for line in _stage_losses(stage)]
        except UserError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise UserError(
                f"the counts in {stage.folder} are damaged ({type(error).__name__}: {error}); restore its files, or "
                f"delete it and run the recipe again"
            ) from error
    if len(run.launches) > 1:
        lines.append(f"the run was started {len(run.launches)} times")
    return lines or ["nothing"]


def count_text(counts: Mapping[str, int]) -> str:
    """Format counts by name: `broken_image 1,200, empty_caption 3`."""
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _stage_losses(stage: StageRecord) -> Iterator[str]:
    for phase, activity in (("train", "training"), ("embed", "embedding")):
        records = stage.bad_samples[phase]
        if records:
            yield f"{activity} could not decode {len(records):,} samples"
        shards = Counter(record["shard"] for record in records).most_common()
        for shard, _ in shards[:SHARDS_SHOWN]:
            reasons = Counter(record["reason"] for record in records if record["shard"] == shard)
            yield f"{activity}: {redacted(shard)}: {count_text(dict(reasons.most_common()))}"
        if more := shards[SHARDS_SHOWN:]:
            yield f"{activity}: {len(more)} more shards: {sum(count for _, count in more):,} samples"
    yield from _false_negatives(stage)
    if relaxed := stage.groups.get("rows_relaxed", 0):
        total = sum(group["size"] for group in stage.groups["groups"])
        yield f"{relaxed:,} of {total:,} rows are in groups merged from several labels, to have enough rows"
    if weightless := stage.total("rows_without_weight"):
        seen = stage.steps[-1]["samples_seen"]
        yield f"{weightless:,} of {seen:,} rows had too few negatives in their batch, and got weight 0"
    # How many steps earlier starts repeated is not recorded; those that the next start would repeat are known.
    if stage.state("train") != "done" and stage.steps:
        saved = [int(path.name.removeprefix("step-")) for path in checkpoints(stage.folder / "train" / "checkpoints")]
        newest, last = max(saved, default=0), stage.steps[-1]["step"]
        if last > newest:
            yield f"steps {newest + 1} to {last} are not in a checkpoint yet; if training stops now, they are repeated"


def _false_negatives(stage: StageRecord) -> Iterator[str]:
    if duplicates := stage.total("duplicates"):
        action = "masked" if stage.train_settings.get("mask_duplicates", True) else "kept"
        yield f"{duplicates:,} negatives with the same caption or image as their row were {action}"
    if similar := stage.total("similar"):
        of_images = stage.train_settings.get("similar_by") == "image"
        alike = "an image similar to that" if of_images else "captions similar to those"
        yield f"{similar:,} negatives with {alike} of their row were masked"


def _read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty if the file does not exist."""
    value = read_json(path) if path.exists() else {}
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object; restore it or delete it to recreate it")
    return value
