"""What a task is, and the results of a run as records and as a table.

Embedding and scoring are apart: the raw features of each stage are stored, so combinations cost no second pass.
"""

from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float
from torch import Tensor

from mcl_clip.core.errors import UserError
from mcl_clip.core.files import read_jsonl
from mcl_clip.core.stats import bootstrap_interval

SCHEMA = 1
PACKAGES = {"mcl_clip": "mcl_clip", "open_clip": "open_clip_torch", "torch": "torch"}
RESAMPLES = 2000


@runtime_checkable
class Task(Protocol):
    """An evaluation: one file in `mcl_clip/eval`."""

    @property
    def name(self) -> str:
        """What the user calls the set."""

    @property
    def main_metric(self) -> str:
        """The metric to quote where there is place for one."""

    @property
    def sha256(self) -> str:
        """Digest of what is measured on: figures are comparable only where it is equal."""

    def embed(
        self, model: Any, *, image_transform: Any, tokenizer: Any, num_workers: int, **options: Any
    ) -> dict[str, Tensor]:
        """Un-normalised `image` and `text` features of the set, equal on all processes."""

    def score(
        self, image_features: Float[Tensor, "images dim"], text_features: Float[Tensor, "texts dim"]
    ) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Metrics, and the outcomes of all queries.

        For each metric that is a mean over queries, `outcomes[METRIC]` holds what it is the mean of, float32 or bool.
        Where queries depend on each other, `outcomes["unit:METRIC"]` says what each belongs to, int32. Other arrays may
        stand beside them under names that are no metrics.
        """

    def describe(self) -> dict[str, Any]:
        """`key`, `task` (CLIP_benchmark's word), `n_images` and more, for the record."""


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
    outcomes: Mapping[str, np.ndarray] | None = None,
    outcomes_file: str | None = None,
    label: str | None = None,
    language: str = "en",
) -> dict[str, Any]:
    """One result as JSON: what CLIP_benchmark writes, and what makes two figures comparable.

    Args:
        task: what was measured.
        metrics: what came out.
        model: name of the architecture.
        pretrained: which weights.
        stage: the last stage that was used.
        combine: how stages were combined; None for a single one.
        dtype: in which the towers ran, such as `fp32`.
        seconds: time it took.
        outcomes: of the queries, see `Task.score`; metrics that have them get 95 % intervals.
        outcomes_file: name of the .npz file beside the record that holds them.
        label: what tells the model from others in the same folder; by default the last part of `pretrained`.
        language: of the texts.
    """
    return {
        "schema": SCHEMA,
        **task.describe(),
        "dataset": task.name,
        "model": model,
        "pretrained": pretrained,
        "label": label or pretrained.rsplit("/", 1)[-1],
        "language": language,
        "stage": stage,
        "combine": combine,
        "main_metric": task.main_metric,
        "metrics": {**metrics, "main_metric": metrics[task.main_metric]},
        "ci95": _intervals(metrics, outcomes or {}),
        "outcomes": outcomes_file,
        "data_sha256": task.sha256,
        "dtype": dtype,
        "versions": {name: version(package) for name, package in PACKAGES.items()},
        "seconds": round(seconds, 3),
    }


def _intervals(metrics: Iterable[str], outcomes: Mapping[str, np.ndarray]) -> dict[str, list[float]]:
    return {
        name: list(bootstrap_interval(outcomes[name], outcomes.get(f"unit:{name}"), resamples=RESAMPLES))
        for name in metrics
        if name in outcomes
    }


def read_results(folder: Path) -> list[dict[str, Any]]:
    """The records in a folder's results.jsonl; none if there is no file.

    Raises:
        UserError: if a record is not one that `result_record` makes.
    """
    records = read_jsonl(folder / "results.jsonl")
    for number, record in enumerate(records, 1):
        if not _is_result(record):
            raise UserError(
                f"record {number} of {folder / 'results.jsonl'} is not a result; restore the file, or delete it and "
                f"evaluate again"
            )
    return records


def _is_result(record: Mapping[str, Any]) -> bool:
    texts, counts = ("key", "task", "pretrained"), ("n_images", "n_texts")
    is_named = all(isinstance(record.get(name), str) for name in texts) and isinstance(record.get("label", ""), str)
    is_counted = all(type(record.get(name)) is int for name in counts) and isinstance(record.get("stage"), int | None)
    metrics, intervals = record.get("metrics"), record.get("ci95", {})
    if not (is_named and is_counted and isinstance(metrics, dict) and isinstance(intervals, dict)):
        return False
    numbers = [*metrics.values(), *(end for ends in intervals.values() if isinstance(ends, list) for end in ends)]
    is_measured = all(type(number) in (int, float, type(None)) for number in numbers)
    main, outcomes = record.get("main_metric"), record.get("outcomes")
    is_told = all(value is None or isinstance(value, str) for value in (main, outcomes))
    return is_measured and is_told and all(isinstance(ends, list) and len(ends) == 2 for ends in intervals.values())


def label_of(record: Mapping[str, Any]) -> str:
    """Which model of a run, or of a folder, a record is about."""
    label: str = record.get("label") or record["pretrained"].rsplit("/", 1)[-1]
    return label
