"""What the report reads of a run: its records, a bounded sample of its training pairs, and its evaluation sets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32, Int64, Integer
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mcl_clip.core.errors import UserError
from mcl_clip.core.files import DONE
from mcl_clip.data.decode import BadSampleError, decode_captions
from mcl_clip.data.index import INDEX_NAME, ShardIndex
from mcl_clip.data.reader import Reader
from mcl_clip.data.shards import is_remote
from mcl_clip.data.storage import load_numbers, load_tensors
from mcl_clip.eval.datasets import open_set
from mcl_clip.eval.task import Task
from mcl_clip.model.multistage import combine_features
from mcl_clip.results.record import RunRecord, read_run
from mcl_clip.stages.embed import SIDES, part_name
from mcl_clip.stages.shared_metric import Projection

SAMPLE_ROWS = 20_000
SAMPLE_BLOCKS = 200  # of neighbouring rows, so that little is read of large data
REMOTE_ROWS = 2_000
EXPERIMENT = "experiment.json"  # two folders above the runs of an experiment
SETS = ("retrieval", "classification", "sets")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Training pairs that stand for all of them.

    Attributes:
        rows: their numbers, ascending.
        captions: the captions of each; none where they could not be read.
        total: how many pairs there are.
    """

    rows: Int64[np.ndarray, "sample"]
    captions: tuple[tuple[str, ...], ...]
    total: int


class RunView:
    """A run as the sections of the report see it. What is not made yet is left out; nothing is written."""

    def __init__(self, folder: Path) -> None:
        """Read the records of a run; features and captions follow when a section asks for them.

        Raises:
            UserError: if it is not a run directory, or a file is damaged.
        """
        self.folder = folder
        self.run: RunRecord = read_run(folder)
        index = folder / "index" / INDEX_NAME
        self.index = ShardIndex.load(index) if index.exists() else None
        self.missing: list[str] = []  # what could not be opened, as sentences
        self._features: dict[tuple[int, str], Float32[np.ndarray, "sample dim"]] = {}
        self._assignments: dict[tuple[int, str], Integer[np.ndarray, rows]] = {}
        self._of_sets: dict[tuple[int, str], Mapping[str, Tensor]] = {}

    @property
    def name(self) -> str:
        """What the run is called: its folder and, as an arm of an experiment, the experiment and the seed."""
        arm = self.folder.resolve()
        seed, experiment = arm.parent, arm.parent.parent
        is_arm = (experiment / EXPERIMENT).is_file() and seed.name.startswith("seed-")
        return f"{experiment.name}, {arm.name}, {seed.name.replace('-', ' ')}" if is_arm else arm.name

    def stages_with(self, phase: str) -> list[int]:
        """The stages of which a phase is done."""
        return [s for s in range(len(self.run.stages)) if (self.folder / f"stage-{s}" / phase / DONE).exists()]

    @property
    def combine(self) -> str:
        """How the stages are combined; the recipe's way before that is fitted."""
        wanted = self.run.combination.get("combine") or self.run.config.get("combine")
        return "concat" if wanted == "concat" else "mean_cosine"

    @cached_property
    def reader(self) -> Reader | None:
        """Reads the training pairs; none if their shards are gone."""
        if self.index is None:
            return None
        reader = Reader(self.index)
        try:
            if not self._is_far:  # else a request a shard; the first rows tell as well
                self.index.check_unchanged()
            reader.read(np.arange(min(1, len(self.index))))
        except (UserError, OSError) as error:
            self.missing.append(f"The pictures and captions of the training pairs cannot be shown: {error}.")
            return None
        return reader

    @property
    def _is_far(self) -> bool:
        return self.index is not None and any(is_remote(shard.url) for shard in self.index.shards)

    @cached_property
    def sample(self) -> Sample:
        """Blocks of neighbouring rows, evenly over all shards; all rows of small data."""
        if self.index is None:
            return Sample(rows=np.zeros(0, np.int64), captions=(), total=0)
        rows = sample_rows([shard.rows for shard in self.index.shards], REMOTE_ROWS if self._is_far else SAMPLE_ROWS)
        return Sample(rows=rows, captions=self._captions(rows), total=len(self.index))

    def _captions(self, rows: Int64[np.ndarray, "sample"]) -> tuple[tuple[str, ...], ...]:
        if self.reader is None:
            return ((),) * len(rows)
        key = self.run.config.get("data", {}).get("caption_key", "caption")
        found: list[tuple[str, ...]] = []
        for text, form in self.reader.read_texts(rows):
            try:
                found.append(tuple(decode_captions(text, form, json_key=key)))
            except BadSampleError:
                found.append(())
        return tuple(found)

    def features(self, stage: int, side: str) -> Float32[np.ndarray, "sample dim"]:
        """Un-normalised features of the sample under a stage; zeros for bad samples.

        Raises:
            UserError: if a file of them is missing or damaged.
        """
        if (stage, side) not in self._features:
            self._features[stage, side] = self._read_features(stage, side)
        return self._features[stage, side]

    def _read_features(self, stage: int, side: str) -> Float32[np.ndarray, "sample dim"]:
        pieces = []
        for number, shard in enumerate(self.index.shards if self.index else ()):
            low, high = np.searchsorted(self.sample.rows, [shard.first_row, shard.first_row + shard.rows])
            if low == high:
                continue
            wanted = self.sample.rows[low:high] - shard.first_row
            path = self.folder / f"stage-{stage}" / "embed" / part_name(number)
            pieces.append(_read_rows(path, side, wanted))
        return np.concatenate(pieces)

    def combined(self, side: str) -> Float32[np.ndarray, "sample dims"]:
        """Unit features of the sample under all embedded stages together."""
        stages = [torch.from_numpy(self.features(s, side)) for s in self.stages_with("embed")]
        return combine_features(stages, self.combine).numpy()

    def clustered_sides(self, stage: int) -> list[str]:
        """Which features of a stage were clustered: of pictures, of texts, or both."""
        folder = self.folder / f"stage-{stage}" / "cluster"
        return [side for side in SIDES if (folder / f"assignments-{side}.npy").exists()]

    def assignments(self, stage: int, side: str) -> Integer[np.ndarray, "rows"]:
        """The cluster of every row of the data."""
        if (stage, side) not in self._assignments:
            path = self.folder / f"stage-{stage}" / "cluster" / f"assignments-{side}.npy"
            self._assignments[stage, side] = load_numbers(path, self.sample.total)
        return self._assignments[stage, side]

    def closeness(self, stage: int, side: str) -> Float32[np.ndarray, "sample"]:
        """Cosine of each row of the sample with the centre of its cluster, in the metric of the clustering."""
        stored = load_tensors(self.folder / f"stage-{stage}" / "cluster" / "centroids.safetensors", side)
        features = self.features(stage, side)
        if f"{side}.matrix" in stored:
            projection = Projection(mean=stored[f"{side}.mean"].numpy(), matrix=stored[f"{side}.matrix"].numpy())
            features = projection(features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12))
        unit = torch.nn.functional.normalize(torch.from_numpy(features.astype(np.float32)))
        centres = stored[side].float()[torch.from_numpy(self.assignments(stage, side)[self.sample.rows]).long()]
        closeness: np.ndarray = (unit * centres).sum(1).numpy()
        return closeness

    @cached_property
    def tasks(self) -> dict[str, Task]:
        """The evaluation sets of the recipe that are still there, by name."""
        tasks: dict[str, Task] = {}
        settings = self.run.config.get("eval", {})
        for value in (value for kind in SETS for value in settings.get(kind) or ()):
            name, root = value.split("=", 1) if "=" in value else (Path(value).name, value)
            try:
                tasks[name] = open_set(Path(root), name)
            except (UserError, OSError) as error:
                self.missing.append(f"The evaluation set {name} cannot be shown: {error}.")
        return tasks

    def set_features(self, stage: int, name: str) -> Mapping[str, Tensor]:
        """Un-normalised `image` and `text` features of an evaluation set; empty if it was not measured."""
        if (stage, name) not in self._of_sets:
            path = self.folder / f"stage-{stage}" / "eval" / f"features-{name}.safetensors"
            self._of_sets[stage, name] = load_tensors(path, *SIDES) if path.exists() else {}
        return self._of_sets[stage, name]

    def combined_set_features(self, name: str, stages: Sequence[int]) -> dict[str, Tensor]:
        """Unit features of an evaluation set under some stages together, as the run combines them."""
        found = [self.set_features(s, name) for s in stages]
        return {side: combine_features([features[side] for features in found], self.combine) for side in SIDES}


def sample_rows(rows_of_shards: Sequence[int], most: int) -> Int64[np.ndarray, "sample"]:
    """Up to about `most` row numbers, ascending: all rows, or blocks of equal size at even distances."""
    total = sum(rows_of_shards)
    if total <= most:
        return np.arange(total)
    blocks = min(SAMPLE_BLOCKS, most)
    size = most // blocks
    starts = np.arange(blocks) * (total - size) // max(1, blocks - 1)
    return np.unique(starts[:, None] + np.arange(size))


def _read_rows(path: Path, side: str, wanted: Int64[np.ndarray, "wanted"]) -> Float32[np.ndarray, "wanted dim"]:
    """Features of some rows of a part with the norms they had; only their stretch of the file is read."""
    first, last = int(wanted[0]), int(wanted[-1]) + 1
    try:
        with safe_open(path, framework="np") as part:
            unit, norms = (part.get_slice(name)[first:last][wanted - first] for name in (side, f"{side}_norm"))
    except (SafetensorError, OSError, IndexError) as error:
        raise UserError(f"{path} is not a whole part ({error}); delete it and run the recipe again") from error
    found: np.ndarray = unit.astype(np.float32) * norms[:, None].astype(np.float32)
    return found
