"""What the files of a run say that belongs on a model card: settings, counts and figures, no captions."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from mcl_clip.core.distributed import permutation
from mcl_clip.core.errors import UserError
from mcl_clip.core.files import DONE, read_json, read_jsonl, read_run_config
from mcl_clip.core.stats import PairedComparison, compare_paired, normalized_mutual_information
from mcl_clip.data.index import INDEX_NAME, ShardIndex
from mcl_clip.data.storage import load_numbers
from mcl_clip.model.multistage import CONFIG_NAME, NOT_TEXT
from mcl_clip.model.open_clip_io import OPEN_CLIP_CONFIG_NAME, OPEN_CLIP_WEIGHTS_NAME

COMBINED = "combined"
RESAMPLES = 2000
SIDES = ("image", "text")
_NOT_PARAMETERS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True, kw_only=True)
class Data:
    """The training data in numbers; `size` is in bytes, `skipped` counts what is no pair by reason."""

    rows: int
    shards: int
    size: int
    digest: str
    skipped: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Numbers of parameters of a stage's towers, and its factor on the cosine."""

    image: int
    text: int
    logit_scale: float


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage, as far as it went.

    Attributes:
        settings: what the recipe says of it.
        is_trained: whether its training is finished.
        model_cfg: open_clip's, empty before that.
        weights: none before that.
        steps: the records of its training, of the steps that made the model.
        groups: what `groups.json` says; empty where nothing was trained.
        bad_samples: how many pairs could not be decoded in training and embedding.
    """

    settings: Mapping[str, Any]
    is_trained: bool
    model_cfg: Mapping[str, Any]
    weights: Weights | None
    steps: Sequence[Mapping[str, Any]]
    groups: Mapping[str, Any]
    bad_samples: int


@dataclass(frozen=True)
class Result:
    """A record of results.jsonl, and the folder with the outcomes of its queries."""

    record: Mapping[str, Any]
    folder: Path

    @property
    def main_metric(self) -> str:
        """The metric to quote where there is place for one."""
        name: str = self.record["main_metric"]
        return name

    def value(self, metric: str) -> float | None:
        """A metric; none if it was not measured."""
        found = self.record["metrics"].get(metric)
        return None if found is None or not math.isfinite(found) else float(found)

    def interval(self, metric: str) -> tuple[float, float] | None:
        """Its 95 % interval, where it has one."""
        found = self.record.get("ci95", {}).get(metric)
        return (float(found[0]), float(found[1])) if found else None

    @cached_property
    def outcomes(self) -> Mapping[str, np.ndarray]:
        """What each query came to, by metric; empty if that is not stored."""
        path = self.folder / Path(self.record.get("outcomes") or "-").name
        if not path.is_file():
            return {}
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                return dict(stored)
        except Exception as error:  # damaged archives raise errors of many kinds
            raise UserError(f"{path} cannot be read ({error}); restore it or evaluate again") from error


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A run for its card.

    Attributes:
        config: the resolved recipe.
        launches: a record of each start.
        data: none if there is no index.
        stages: in order.
        combination: how they are combined, with its logit scale; empty before that.
        shares_text_tower: whether all stages have the same.
        results: by set and then by model: `stage-K`, or `COMBINED`.
        agreement: of clusterings of consecutive stages, by number of the first and side: their normalised mutual
            information, and that of the first with the second in a random order.
    """

    config: Mapping[str, Any]
    launches: Sequence[Mapping[str, Any]]
    data: Data | None
    stages: Sequence[Stage]
    combination: Mapping[str, Any]
    shares_text_tower: bool
    results: Mapping[str, Mapping[str, Result]]
    agreement: Mapping[tuple[int, str], tuple[float, float]]


def read_run(folder: Path) -> RunRecord:
    """What is known of a run, finished or not.

    Raises:
        UserError: if it is not a run directory, or a file is damaged.
    """
    config = read_run_config(folder)
    index_path, combined = folder / "index" / INDEX_NAME, folder / COMBINED
    index = ShardIndex.load(index_path) if index_path.exists() else None
    numbers = range(len(config["stages"]))
    return RunRecord(
        config=config,
        launches=read_jsonl(folder / "launches.jsonl"),
        data=None if index is None else _data(index),
        stages=[_stage(folder / f"stage-{s}", config["stages"][s]) for s in numbers],
        combination=_json(combined / "combination.json"),
        shares_text_tower=bool(_json(combined / "model" / CONFIG_NAME).get("shared_text_tower")),
        results=_results(folder, [f"stage-{s}" for s in numbers]),
        agreement={} if index is None else dict(_agreements(folder, numbers, len(index))),
    )


def compare(a: Result, b: Result, metric: str) -> PairedComparison | None:
    """How two models differ on the same queries; none where their outcomes are not stored or not of the same data."""
    both = a.outcomes.get(metric), b.outcomes.get(metric)
    is_same = a.record["data_sha256"] == b.record["data_sha256"]
    if both[0] is None or both[1] is None or both[0].shape != both[1].shape or not len(both[0]) or not is_same:
        return None
    return compare_paired(both[0], both[1], a.outcomes.get(f"unit:{metric}"), resamples=RESAMPLES)


def _json(path: Path) -> dict[str, Any]:
    """The object in a file; empty if there is none."""
    value = read_json(path) if path.exists() else {}
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object; restore it or delete it to make it anew")
    return value


def _data(index: ShardIndex) -> Data:
    return Data(
        rows=len(index),
        shards=len(index.shards),
        size=sum(shard.size for shard in index.shards),
        digest=index.digest,
        skipped=index.skipped_by_reason(),
    )


def _stage(folder: Path, settings: Mapping[str, Any]) -> Stage:
    train, model = folder / "train", folder / "train" / "model"
    bad = {record["row"] for phase in ("train", "embed") for record in read_jsonl(folder / phase / "bad_samples.jsonl")}
    return Stage(
        settings=settings,
        is_trained=(train / DONE).exists(),
        model_cfg=_json(model / OPEN_CLIP_CONFIG_NAME).get("model_cfg", {}),
        weights=_weights(model / OPEN_CLIP_WEIGHTS_NAME),
        steps=[record for record in read_jsonl(train / "metrics.jsonl") if "loss" in record],
        groups=_json(train / "groups.json"),
        bad_samples=len(bad),
    )


def _weights(path: Path) -> Weights | None:
    """What the header of a file of weights tells; no weights are read."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="np") as file:
            sizes = {name: math.prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            scale = float(np.exp(file.get_tensor("logit_scale")))
    except (SafetensorError, OSError, TypeError) as error:
        raise UserError(f"{path} is not a whole file of weights ({error}); restore it or train again") from error
    sizes = {name: size for name, size in sizes.items() if not name.endswith(_NOT_PARAMETERS)}
    return Weights(
        image=sum(size for name, size in sizes.items() if name.startswith("visual.")),
        text=sum(size for name, size in sizes.items() if not name.startswith(NOT_TEXT)),
        logit_scale=scale,
    )


def _results(folder: Path, stages: Sequence[str]) -> dict[str, dict[str, Result]]:
    places = {**{name: folder / name / "eval" for name in stages}, COMBINED: folder / COMBINED}
    results: dict[str, dict[str, Result]] = {}
    for name, place in places.items():
        for record in read_jsonl(place / "results.jsonl"):
            label = record.get("label") or record["pretrained"].rsplit("/", 1)[-1]
            if label == name:
                results.setdefault(record["key"], {})[label] = Result(record, place)
    return results


def _agreements(
    folder: Path, stages: Sequence[int], rows: int
) -> Iterator[tuple[tuple[int, str], tuple[float, float]]]:
    for s in stages[:-1]:
        for side in SIDES:
            paths = [folder / f"stage-{number}" / "cluster" / f"assignments-{side}.npy" for number in (s, s + 1)]
            if all(path.exists() for path in paths):
                one, two = (load_numbers(path, rows) for path in paths)
                shuffled = two[permutation(rows, "agreement of clusterings", s, side)]
                yield (
                    (s, side),
                    (normalized_mutual_information(one, two), normalized_mutual_information(one, shuffled)),
                )
