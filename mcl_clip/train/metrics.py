"""Counts of a stage: losses and rates for `metrics.jsonl`, bad samples for `bad_samples.jsonl`."""

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from mcl_clip.core.distributed import all_reduce_sum, gather_objects, is_main
from mcl_clip.core.errors import UserError
from mcl_clip.core.files import append_jsonl, atomic_path, read_jsonl

ROWS_BEFORE_JUDGEMENT = 10_000
SPREAD = {"p10": 0.1, "p50": 0.5, "p90": 0.9}  # of the loss over groups


class Meter:
    """Sums over the steps since the last record, kept on the device so that a step never waits for the host."""

    def __init__(self, names: Iterable[str], device: torch.device, *, num_groups: int = 1) -> None:
        self._names = tuple(names)
        self._groups = torch.zeros(2, num_groups, dtype=torch.float64, device=device)  # losses and rows of each
        self._sums = torch.zeros(len(self._names), dtype=torch.float64, device=device)
        self._steps = 0
        self._started = time.perf_counter()
        self.data_wait_s = 0.0
        self.last: dict[str, str] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Take in this process's values of one step."""
        self._sums += torch.stack([values[name].detach().double() for name in self._names])
        self._steps += 1

    def add_rows(self, groups: Tensor, losses: Tensor, weights: Tensor) -> None:
        """Take in the losses of this process's rows of one step."""
        counted = weights.double()
        for sums, values in zip(self._groups, (losses.double() * counted, counted), strict=True):
            sums.index_add_(0, groups.clamp(min=0), values)  # rows of no group have no weight

    def take_spread(self) -> dict[str, float]:
        """The loss of the lower, the middle and the upper group since the last call; nothing for a single group.

        Quantiles over groups of the mean loss of each group that had rows. A collective call.
        """
        if self._groups.shape[1] < 2:
            return {}
        losses, rows = all_reduce_sum(self._groups.clone())
        self._groups.zero_()
        means = (losses / rows)[rows > 0].cpu().numpy()
        return {name: float(np.quantile(means, share)) for name, share in SPREAD.items()} if len(means) else {}

    def take(self) -> tuple[dict[str, float], int, float]:
        """Sums over processes and steps, the number of steps, and the seconds since the last call; then start anew."""
        sums: Float64[Tensor, names] = all_reduce_sum(self._sums.clone())
        seconds, steps = time.perf_counter() - self._started, self._steps
        self._sums.zero_()
        self._steps, self._started, self.data_wait_s = 0, time.perf_counter(), 0.0
        return dict(zip(self._names, sums.tolist(), strict=True)), steps, seconds


class StepLog:
    """A JSON-lines file of records with a `step`; a restart takes back what came after its checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rewind(self, step: int) -> list[dict[str, Any]]:
        """Drop the records after `step`; the ones that stay."""
        records = read_jsonl(self.path)
        if not all(type(record.get("step")) is int for record in records):
            raise UserError(f"{self.path} has a record without a step; restore the file or delete it")
        records = [record for record in records if record["step"] <= step]
        if is_main() and self.path.exists():
            with atomic_path(self.path) as temporary:
                temporary.touch()
                for record in records:
                    append_jsonl(temporary, record)
        return records

    def add(self, record: Mapping[str, Any]) -> None:
        """Add a record (main process only)."""
        if is_main():
            append_jsonl(self.path, record)


class BadSamples:
    """Rows that became fillers, by shard and reason; stops the run when they are too many."""

    def __init__(self, path: Path, *, max_fraction: float, rows: int, step: int = 0) -> None:
        """Continue the file at `path`.

        Args:
            path: the JSON-lines file.
            max_fraction: share of rows that may be bad.
            rows: rows of the data set.
            step: the step from which training goes on; what was written after it is taken back.
        """
        self._log = StepLog(path)
        self.max_fraction, self.rows = max_fraction, rows
        self._found: dict[int, tuple[str, str]] = {}
        for record in self._log.rewind(step):
            row, shard, reason = (record.get(name) for name in ("row", "shard", "reason"))
            if type(row) is not int or not isinstance(shard, str) or not isinstance(reason, str):
                raise UserError(f"{path} has a record without row, shard and reason; restore the file or delete it")
            self._found[row] = (shard, reason)
        self._pending: list[tuple[int, str, str]] = []

    @property
    def count(self) -> int:
        """Distinct bad rows so far, over all processes as of the last `flush`."""
        return len(self._found)

    def add(self, bad: Iterable[tuple[int, str, str]]) -> None:
        """Note rows of this process."""
        self._pending += bad

    def flush(self, step: int, rows_seen: int) -> None:
        """Write down what all processes found. A collective call.

        Raises:
            UserError: if more than `max_fraction` of the rows seen (at first, of 10,000) are bad.
        """
        pending = [bad for process in gather_objects(self._pending) for bad in process]
        self._pending = []
        for row, shard, reason in sorted(pending):
            if row not in self._found:
                self._found[row] = (shard, reason)
                self._log.add({"step": step, "row": row, "shard": shard, "reason": reason})
        limit = self.max_fraction * max(min(rows_seen, self.rows), min(self.rows, ROWS_BEFORE_JUDGEMENT))
        if len(self._found) > limit:
            raise UserError(self._complaint(min(rows_seen, self.rows))).on_every_process()

    def by_reason(self) -> dict[str, int]:
        """Number of distinct bad rows by reason."""
        return dict(Counter(reason for _, reason in self._found.values()).most_common())

    def _complaint(self, seen: int) -> str:
        shards = Counter(shard for shard, _ in self._found.values()).most_common(5)
        return (
            f"{len(self._found)} of about {seen} samples could not be decoded {self.by_reason()}, more than "
            f"max_bad_fraction = {self.max_fraction:g}; most in {', '.join(f'{s} ({n})' for s, n in shards)}. "
            f"Mend or leave out these shards, or raise --data.max-bad-fraction"
        )
