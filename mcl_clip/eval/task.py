"""The protocol of an evaluation task, and the record of a result in results.jsonl.

Embedding and scoring are separate steps, so stored features of several stages can be combined and scored without
another forward pass.
"""

from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from types import NoneType
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from mcl_clip.core.errors import UserError
from mcl_clip.core.files import read_jsonl
from mcl_clip.core.stats import bootstrap_interval

SCHEMA = 1
RESULTS = "results.jsonl"
PACKAGES = {"mcl_clip": "mcl_clip", "open_clip": "open_clip_torch", "torch": "torch"}
RESAMPLES = 2000
FIELD_TYPES: Mapping[str, Any] = {  # of a record, as far as readers use them
    **dict.fromkeys(("key", "task", "pretrained"), str),
    **dict.fromkeys(("n_images", "n_texts"), int),
    **dict.fromkeys(("main_metric", "outcomes", "label"), str | None),
    "stage": int | None,
}


@runtime_checkable
class ImageSource(Protocol):
    """Images addressed by row. It must be picklable, because loader workers read from copies of it."""

    def __len__(self) -> int:
        """Return the number of images."""

    def images(self, rows: Int[np.ndarray, " batch"]) -> Iterator[Image.Image]:
        """Yield the images of `rows` as RGB, in the given order; raise UserError for one that cannot be decoded."""


@runtime_checkable
class EvaluationSet(Protocol):
    """What a task embeds."""

    @property
    def source(self) -> ImageSource:
        """The images."""

    @property
    def texts(self) -> Sequence[str]:
        """The captions or prompts."""

    @property
    def sha256(self) -> str:
        """Digest of all that is evaluated: metrics are comparable only if it is equal."""


@runtime_checkable
class Task(Protocol):
    """An evaluation on one data set; each kind of task is a module in `mcl_clip/eval`."""

    @property
    def name(self) -> str:
        """Name of the set, as given by the user."""

    @property
    def main_metric(self) -> str:
        """Name of the metric to report where only one is shown."""

    @property
    def data(self) -> EvaluationSet:
        """The set."""

    def score(
        self, image_features: Float[Tensor, "images dim"], text_features: Float[Tensor, "texts dim"]
    ) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Return metrics and per-query outcomes.

        For each metric that is a mean over queries, `outcomes[METRIC]` holds the values it is the mean of, float32 or
        bool. Where queries depend on each other, `outcomes["unit:METRIC"]` holds the int32 group of each, which the
        bootstrap resamples as a whole. Arrays under other names are allowed.
        """

    def describe(self) -> dict[str, Any]:
        """Return `key`, `task` (CLIP_benchmark's name), `n_images`, `n_texts` and more, for the record."""


def result_record(
    task: Task,
    metrics: Mapping[str, float],
    *,
    model: str,
    pretrained: str,
    stage: int,
    combine: str | None,
    dtype: str,
    seconds: float,
    outcomes: Mapping[str, np.ndarray],
    outcomes_file: str,
) -> dict[str, Any]:
    """Build the JSON record of one result: CLIP_benchmark's fields, and what is needed to compare two results.

    Args:
        pretrained: name of the weights; its last part labels the model among others in the same folder.
        stage: index of the last stage used.
        combine: how stages are combined; None for a single stage.
        dtype: precision of the encoders, such as `fp32`.
        outcomes: see `Task.score`; metrics that have them get 95 % intervals.
        outcomes_file: name of the .npz file beside the record that holds the outcomes.
    """
    return {
        "schema": SCHEMA,
        **task.describe(),
        "dataset": task.name,
        "model": model,
        "pretrained": pretrained,
        "label": pretrained.rsplit("/", 1)[-1],
        "language": "en",
        "stage": stage,
        "combine": combine,
        "main_metric": task.main_metric,
        "metrics": {**metrics, "main_metric": metrics[task.main_metric]},
        "ci95": {
            name: list(bootstrap_interval(outcomes[name], outcomes.get(f"unit:{name}"), resamples=RESAMPLES))
            for name in metrics
            if name in outcomes
        },
        "outcomes": outcomes_file,
        "data_sha256": task.data.sha256,
        "dtype": dtype,
        "versions": {name: version(package) for name, package in PACKAGES.items()},
        "seconds": round(seconds, 3),
    }


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Read the records in a folder's results.jsonl; return an empty list without the file.

    Raises:
        UserError: if a record does not have the form that `result_record` gives it.
    """
    records = read_jsonl(folder / RESULTS)
    for number, record in enumerate(records, 1):
        if not _is_result(record):
            raise UserError(
                f"record {number} of {folder / RESULTS} is not a result; restore the file, or delete it and evaluate "
                f"again"
            )
    return records


def _is_result(record: Mapping[str, Any]) -> bool:
    """Check the types of all fields that readers use, so that a damaged file is an error here and not in a report."""
    metrics, intervals = record.get("metrics"), record.get("ci95", {})
    if not all(isinstance(record.get(name), types) for name, types in FIELD_TYPES.items()):
        return False
    if not (isinstance(metrics, dict) and isinstance(intervals, dict)):
        return False
    if not all(isinstance(bounds, list) and len(bounds) == 2 for bounds in intervals.values()):
        return False
    numbers = [record["n_images"], record["n_texts"], *metrics.values(), *chain(*intervals.values())]
    return all(type(number) in (int, float, NoneType) for number in numbers)


def label_of(record: Mapping[str, Any]) -> str:
    """Return the label of the model that a record is about; records of older versions have none."""
    return str(record.get("label") or record["pretrained"].rsplit("/", 1)[-1])
