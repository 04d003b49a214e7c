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

from mcl_clip.artifacts import read_jsonl

SCHEMA = 1
PACKAGES = {"mcl_clip": "mcl_clip", "open_clip": "open_clip_torch", "torch": "torch"}
COLUMNS = {
    "zeroshot_retrieval": {
        f"{way} {column}": f"{side}_{metric}"
        for way, side in (("i2t", "text_retrieval"), ("t2i", "image_retrieval"))
        for column, metric in (
            ("R@1", "recall@1"),
            ("R@5", "recall@5"),
            ("R@10", "recall@10"),
            ("median", "median_rank"),
        )
    },
    "zeroshot_classification": {
        "zero-shot": "acc1",
        "top 5": "acc5",
        "linear read-out": "linear_acc1",
        "NMI of clusters": "cluster_nmi",
    },
}


@runtime_checkable
class Task(Protocol):
    """An evaluation: one file in `mcl_clip/eval/tasks`."""

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
        """Metrics, and the outcome of each query."""

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
        language: of the texts.
    """
    return {
        "schema": SCHEMA,
        **task.describe(),
        "dataset": task.name,
        "model": model,
        "pretrained": pretrained,
        "language": language,
        "stage": stage,
        "combine": combine,
        "metrics": {**metrics, "main_metric": metrics[task.main_metric]},
        "data_sha256": task.sha256,
        "dtype": dtype,
        "versions": {name: version(package) for name, package in PACKAGES.items()},
        "seconds": round(seconds, 3),
    }


def run_results(run_dir: Path) -> list[dict[str, Any]]:
    """The records of all stages and of the combined model, in order."""
    folders = sorted(run_dir.glob("stage-*/eval"), key=lambda path: int(path.parent.name.removeprefix("stage-")))
    return [record for folder in [*folders, run_dir / "combined"] for record in read_jsonl(folder / "results.jsonl")]


def results_table(run_dir: Path) -> str:
    """What a run has measured so far: a table a set, a line a model, shares in percent."""
    records = run_results(run_dir)
    lines = []
    for key in dict.fromkeys(record["key"] for record in records):
        of_set = [record for record in records if record["key"] == key]
        columns = COLUMNS[of_set[0]["task"]]
        lines.append(f"{key}: {of_set[0]['n_images']} images, {of_set[0]['n_texts']} texts")
        lines += _aligned([["", *columns], *(_row(record, columns.values()) for record in of_set)])
    return "\n".join(lines)


def _row(record: Mapping[str, Any], columns: Iterable[str]) -> list[str]:
    return [record["pretrained"].rsplit("/", 1)[-1], *(_cell(record["metrics"].get(name), name) for name in columns)]


def _cell(value: float | None, metric: str) -> str:
    if value is None:
        return "-"
    return f"{value:g}" if metric.endswith("rank") else f"{100 * value:.1f}"


def _aligned(rows: list[list[str]]) -> list[str]:
    """Lines of a table: the first column to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  " + "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
