"""One task by one model."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mcl_clip.distributed import on_main
from mcl_clip.eval.suite import Task
from mcl_clip.model.encode import autocast


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """A model with all that is needed to embed a set by it.

    `batch_size` counts images, and texts, of a forward pass of one process; `num_workers` are its loader processes.
    """

    model: Any
    image_transform: Callable[[Any], Tensor]
    tokenizer: Callable[[list[str]], Tensor]
    device: torch.device
    batch_size: int = 64
    num_workers: int = 0
    precision: str = "fp32"

    def embed(self, task: Task) -> dict[str, Tensor]:
        """The raw features of a task's set, equal on all processes."""
        with autocast(self.precision, self.device):
            return task.embed(
                self.model,
                image_transform=self.image_transform,
                tokenizer=self.tokenizer,
                device=self.device,
                batch_size=self.batch_size,
                num_workers=self.num_workers,
            )


def run_task(
    task: Task, encoder: Encoder, *, outcomes: dict[str, np.ndarray] | None = None
) -> Iterator[tuple[str, float]]:
    """Metrics by name. All processes embed and get the metrics; the main process alone scores.

    Args:
        task: what to measure.
        encoder: the model.
        outcomes: filled on the main process with the outcome of each query.

    Raises:
        UserError: on all processes, if an image cannot be decoded or features are not finite.
    """
    features = encoder.embed(task)
    metrics, found = on_main(partial(task.score, features["image"], features["text"]))
    if outcomes is not None:
        outcomes.update(found)
    yield from metrics.items()
