"""What the report reads besides the record of a run: a bounded sample of training pairs, features, evaluation sets."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int64, Integer
from markupsafe import Markup
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mcl_clip.core.errors import UserError
from mcl_clip.data.decode import BadSampleError, decode_captions
from mcl_clip.data.features import SIDES, part_name
from mcl_clip.data.index import RULE
from mcl_clip.data.reader import Reader
from mcl_clip.data.shards import is_remote
from mcl_clip.data.storage import load_numbers, load_tensors
from mcl_clip.eval.classification import as_probe
from mcl_clip.eval.datasets import open_set
from mcl_clip.eval.task import Task
from mcl_clip.model.multistage import WEIGHTED, combine_features
from mcl_clip.results.record import RunRecord, read_run
from mcl_clip.stages.shared_metric import Projection

SAMPLE_ROWS = 20_000
SAMPLE_BLOCKS = 200  # of adjacent rows, so that little is read of large data
REMOTE_ROWS = 2_000
EXPERIMENT = "experiment.json"  # two folders above the runs of an experiment
EVAL_KINDS = ("retrieval", "classification", "sets")


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page: its id, its title, and the content that `templates/NAME.html.jinja` shows."""

    name: str
    title: str
    content: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Ascending rows of training pairs that represent all `total` of them, with the captions that could be read."""

    rows: Int64[np.ndarray, "sample"]
    captions: tuple[tuple[str, ...], ...]
    total: int


class RunView:
    """A run as the sections of the report see it; what does not exist yet is left out, and nothing is written."""

    def __init__(self, folder: Path) -> None:
        """Open a run; features and captions are read when a section needs them.

        Raises:
            UserError: if it is not a run directory.
        """
        self.folder = folder
        self.run: RunRecord = read_run(folder)
        self.missing: list[str] = []  # sentences on what could not be opened
        # Caches of this view: a cache of the class would keep each view of a long run in memory.
        self.features, self.assignments = cache(self._read_features), cache(self._read_assignments)
        self.set_features = cache(self._read_set_features)

    @property
    def name(self) -> str:
        """The name of its folder and, for an arm of an experiment, of the experiment and the seed."""
        arm = self.folder.resolve()
        seed, experiment = arm.parent, arm.parent.parent
        is_arm = (experiment / EXPERIMENT).is_file() and seed.name.startswith("seed-")
        return f"{experiment.name}, {arm.name}, {seed.name.replace('-', ' ')}" if is_arm else arm.name

    def stages_with(self, phase: str) -> list[int]:
        """Return the stages of which a phase is done."""
        return [s for s, stage in enumerate(self.run.stages) if stage.state(phase) == "done"]

    def combine(self, stage_features: Sequence[Tensor]) -> Tensor:
        """Combine unnormalized features of stages to unit features, as the run does or, by its recipe, will do."""
        combine, weights = (self.run.combination.get(name) for name in ("combine", "weights"))
        if combine == WEIGHTED and len(weights or ()) == len(stage_features):
            return combine_features(stage_features, combine, weights)
        is_concat = (combine or self.run.config.get("combine")) == "concat"
        return combine_features(stage_features, "concat" if is_concat else "mean_cosine")

    @cached_property
    def reader(self) -> Reader | None:
        """Reads the training pairs; None if their shards are gone."""
        if self.run.index is None:
            return None
        reader = Reader(self.run.index, captions_by_line=self.run.config.get("behavior", "0.6") == "0.6")
        try:
            if not self._is_remote:  # checking takes a request for each shard; reading a row fails as well
                self.run.index.check_unchanged()
            reader.read(np.arange(min(1, len(self.run.index))))
        except (UserError, OSError) as error:
            self.missing.append(f"The images and captions of the training pairs cannot be shown: {error}.")
            return None
        return reader

    @property
    def _is_remote(self) -> bool:
        return self.run.index is not None and any(is_remote(shard.url) for shard in self.run.index.shards)

    @cached_property
    def sample(self) -> Sample:
        """Blocks of adjacent rows, evenly over all shards; all rows of small data."""
        if self.run.index is None:
            return Sample(rows=np.zeros(0, np.int64), captions=(), total=0)
        shard_rows = [shard.rows for shard in self.run.index.shards]
        rows = sample_rows(shard_rows, REMOTE_ROWS if self._is_remote else SAMPLE_ROWS)
        captions: list[tuple[str, ...]] = [()] * len(rows)
        if self.reader is not None:
            key = self.run.config.get("data", {}).get("caption_key") or RULE.caption_key
            for number, (text, form) in enumerate(self.reader.read_texts(rows)):
                with suppress(BadSampleError):
                    captions[number] = tuple(decode_captions(text, form, json_key=key))
        return Sample(rows=rows, captions=tuple(captions), total=len(self.run.index))

    def _read_features(self, stage: int, side: str) -> Float32[np.ndarray, "sample dim"]:
        """Return unnormalized features of the sample under a stage; zeros for bad samples.

        Raises:
            UserError: if a file of them is missing or damaged.
        """
        parts = []
        for number, shard in enumerate(self.run.index.shards if self.run.index else ()):
            low, high = np.searchsorted(self.sample.rows, [shard.first_row, shard.first_row + shard.rows])
            if low < high:
                path = self.run.stages[stage].folder / "embed" / part_name(number)
                parts.append(_read_rows(path, side, self.sample.rows[low:high] - shard.first_row))
        return np.concatenate(parts)

    def combined(self, side: str) -> Float32[np.ndarray, "sample dims"]:
        """Return unit features of the sample under all embedded stages together."""
        stages = [torch.from_numpy(self.features(s, side)) for s in self.stages_with("embed")]
        return self.combine(stages).numpy()

    @property
    def clusterings(self) -> list[tuple[int, str]]:
        """The stages whose clustering is done, with the sides that were clustered: `image`, `text` or both."""
        stages = self.stages_with("cluster")
        return [(s, side) for s in stages for side in SIDES if self._assignments_path(s, side).exists()]

    def _assignments_path(self, stage: int, side: str) -> Path:
        return self.run.stages[stage].folder / "cluster" / f"assignments-{side}.npy"

    def _read_assignments(self, stage: int, side: str) -> Integer[np.ndarray, "rows"]:
        """Return the cluster of each row of the data."""
        return load_numbers(self._assignments_path(stage, side), self.sample.total)

    def centroid_similarity(self, stage: int, side: str) -> Float32[np.ndarray, "sample"]:
        """Return the cosine of each row of the sample with its centroid, in the metric of the clustering."""
        stored = load_tensors(self.run.stages[stage].folder / "cluster" / "centroids.safetensors", side)
        is_base = self.run.stages[stage].settings.get("cluster", {}).get("features") == "base"
        features = self.features(0 if is_base else stage, side)
        if f"{side}.matrix" in stored:
            projection = Projection(mean=stored[f"{side}.mean"].numpy(), matrix=stored[f"{side}.matrix"].numpy())
            features = projection(features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12))
        unit = torch.nn.functional.normalize(torch.from_numpy(features.astype(np.float32)))
        centroids = stored[side].float()[torch.from_numpy(self.assignments(stage, side)[self.sample.rows]).long()]
        similarity: np.ndarray = (unit * centroids).sum(1).numpy()
        return similarity

    @cached_property
    def tasks(self) -> dict[str, Task]:
        """The evaluation sets of the recipe that still exist, by name."""
        tasks: dict[str, Task] = {}
        settings = self.run.config.get("eval", {})
        for value in (value for kind in EVAL_KINDS for value in settings.get(kind) or ()):
            name, root = value.split("=", 1) if "=" in value else (Path(value).name, value)
            try:
                task = open_set(Path(root), name)
                tasks[name] = as_probe(task) if self.run.images_only else task
            except (UserError, OSError) as error:
                self.missing.append(f"The evaluation set {name} cannot be shown: {error}.")
        return tasks

    def _read_set_features(self, stage: int, name: str) -> Mapping[str, Tensor]:
        """Return unnormalized `image` and `text` features of an evaluation set; empty if it was not evaluated."""
        path = self.run.stages[stage].folder / "eval" / f"features-{name}.safetensors"
        return load_tensors(path, *SIDES) if path.exists() else {}

    def combined_set_features(self, name: str, stages: Sequence[int]) -> dict[str, Tensor]:
        """Return unit features of an evaluation set under some stages together, as the run combines them."""
        of_stages = [self.set_features(s, name) for s in stages]
        return {side: self.combine([features[side] for features in of_stages]) for side in SIDES}


def as_markup(rows: Sequence[Sequence[str]]) -> list[list[Markup]]:
    """Mark cells that `results.text.safe` has escaped, so that templates do not escape them twice."""
    return [[Markup(text) for text in row] for row in rows]


def sample_rows(shard_rows: Sequence[int], most: int) -> Int64[np.ndarray, "sample"]:
    """Return up to about `most` row numbers, ascending: all rows, or blocks of equal size at even distances."""
    total = sum(shard_rows)
    if total <= most:
        return np.arange(total)
    blocks = min(SAMPLE_BLOCKS, most)
    size = most // blocks
    starts = np.arange(blocks) * (total - size) // max(1, blocks - 1)
    return np.unique(starts[:, None] + np.arange(size))


def _read_rows(path: Path, side: str, rows: Int64[np.ndarray, "rows"]) -> Float32[np.ndarray, "rows dim"]:
    """Read some rows of a part with their original norms; only the range of the file that holds them is read."""
    first, last = int(rows[0]), int(rows[-1]) + 1
    try:
        with safe_open(path, framework="np") as part:
            unit, norms = (part.get_slice(name)[first:last][rows - first] for name in (side, f"{side}_norm"))
    except (SafetensorError, OSError, IndexError) as error:
        raise UserError(f"{path} is not a whole part ({error}); delete it and run the recipe again") from error
    features: np.ndarray = unit.astype(np.float32) * norms[:, None].astype(np.float32)
    return features
