"""Metrics of a stage: loss and throughput in `metrics.jsonl`, time by span, bad samples in `bad_samples.jsonl`."""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.profiler import record_function

from mcl_clip.core.distributed import all_reduce_sum, gather_objects, is_main, on_main
from mcl_clip.core.errors import UserError
from mcl_clip.core.files import append_jsonl, atomic_path, read_jsonl

MIN_ROWS_TO_JUDGE = 10_000  # a bad start of a large data set is not yet a bad data set
QUANTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9}  # of the mean loss of each group
OTHER = "other"


class Spans:
    """Elapsed time of a loop by named span.

    `with spans("forward"): ...` adds the duration of the block to the span, without that of spans opened inside it, and
    marks the block for `torch.profiler`. Time outside of all spans counts as `other`, so the spans add up to the
    elapsed time.

    Usually nothing waits for the device: on a GPU, a span measures how long the host takes to launch the work, and
    the work itself shows up where the host waits for a result. With a `device`, for profiling, each border waits for
    it, and `history` has every (span, seconds) in order, one entry between two borders.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device
        self.history: list[tuple[str, float]] = []
        self._seconds: dict[str, float] = {}
        self._open = [OTHER]
        self._since = self.now()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Charge the block to a span."""
        self.begin(name)
        try:
            with record_function(name):
                yield
        finally:
            self.end()

    def begin(self, name: str) -> None:
        """Open a span inside the current one."""
        self._charge()
        self._open.append(name)

    def end(self) -> None:
        """Close the innermost span."""
        self._charge()
        self._open.pop()

    def switch(self, name: str, *, wait: bool = True) -> None:
        """Charge the rest of the innermost span to another name.

        Without `wait`, work that is still pending on the device counts for the new name.
        """
        self._charge(wait=wait)
        self._open[-1] = name

    def take(self) -> dict[str, float]:
        """Return the seconds by span since the last call, and start again at 0."""
        self._charge()
        seconds, self._seconds = self._seconds, {}
        return seconds

    def now(self, *, wait: bool = True) -> float:
        """Return the time in seconds; when profiling with `wait`, once the device is idle."""
        if wait and self.device is not None and self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        return time.perf_counter()

    def _charge(self, *, wait: bool = True) -> None:
        now = self.now(wait=wait)
        name, seconds, self._since = self._open[-1], now - self._since, now
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds
        if self.device is not None:
            self.history.append((name, seconds))


class Meter:
    """Sums over the `steps` since the last record, kept on the device so that a step never waits for the host."""

    def __init__(self, names: Iterable[str], device: torch.device, *, num_groups: int = 1) -> None:
        self._names = tuple(names)
        self._groups = torch.zeros(2, num_groups, dtype=torch.float64, device=device)  # weighted losses, and weights
        self._sums = torch.zeros(len(self._names), dtype=torch.float64, device=device)
        self.steps, self._started = 0, time.perf_counter()

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add this process's values of one step, and its `row_losses` by `row_groups` with `row_weights`."""
        self._sums += torch.stack([values[name].detach().double() for name in self._names])
        self.steps += 1
        weights = values["row_weights"].double()
        groups = values["row_groups"].clamp(min=0)  # rows without a group have weight 0
        self._groups.index_add_(1, groups, torch.stack([values["row_losses"].double() * weights, weights]))

    def take(self) -> tuple[dict[str, float], dict[str, float], int, float]:
        """Return the values since the last call, and start again at 0. A collective call.

        Returns:
            Sums over processes and steps; quantiles over groups of the mean loss of a group, without groups that have
            no row, and empty for a single group; the number of steps; and the seconds.
        """
        sums = all_reduce_sum(self._sums.clone()).tolist()
        spread = {}
        if self._groups.shape[1] > 1:
            losses, rows = all_reduce_sum(self._groups.clone())
            means = (losses / rows)[rows > 0].cpu().numpy()
            spread = {name: float(np.quantile(means, q)) for name, q in QUANTILES.items()} if len(means) else {}
        seconds, steps = time.perf_counter() - self._started, self.steps
        self._sums.zero_()
        self._groups.zero_()
        self.steps, self._started = 0, time.perf_counter()
        return dict(zip(self._names, sums, strict=True)), spread, steps, seconds


class StepLog:
    """A JSON-lines file of records with a `step`; a resumed run drops the records after its checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rewind(self, step: int) -> list[dict[str, Any]]:
        """Drop the records after `step` and return the others; raise UserError without steps. For the main process."""
        records = read_jsonl(self.path)
        if not all(type(record.get("step")) is int for record in records):
            raise UserError(f"{self.path} has a record without a step; restore the file or delete it")
        records = [record for record in records if record["step"] <= step]
        if self.path.exists():
            with atomic_path(self.path) as temporary:
                temporary.touch()
                for record in records:
                    append_jsonl(temporary, record)
        return records

    def add(self, record: Mapping[str, Any]) -> None:
        """Append a record, on the main process."""
        if is_main():
            append_jsonl(self.path, record)


class BadSamples:
    """Rows that could not be decoded and became fillers; stops the run when there are too many."""

    def __init__(self, path: Path, *, max_fraction: float, rows: int, step: int = 0) -> None:
        """Resume the file at `path` from a step, for `rows` rows; raise UserError for a bad record. Collective."""
        self._log = StepLog(path)
        self.max_fraction, self.rows = max_fraction, rows
        self._bad: dict[int, tuple[str, str]] = {}
        for record in on_main(partial(self._log.rewind, step)):
            row, shard, reason = (record.get(name) for name in ("row", "shard", "reason"))
            if type(row) is not int or not isinstance(shard, str) or not isinstance(reason, str):
                raise UserError(f"{path} has a record without row, shard and reason; restore the file or delete it")
            self._bad[row] = (shard, reason)
        self._pending: list[tuple[int, str, str]] = []

    @property
    def count(self) -> int:
        """Number of distinct bad rows over all processes, as of the last `flush`."""
        return len(self._bad)

    def add(self, bad: Iterable[tuple[int, str, str]]) -> None:
        """Add (row, shard, reason) of this process."""
        self._pending += bad

    def flush(self, step: int, rows_seen: int) -> None:
        """Write the new bad rows of all processes. A collective call.

        Raise UserError if more than `max_fraction` of the rows seen (at least of 10,000) are bad.
        """
        pending = [bad for process in gather_objects(self._pending) for bad in process]
        self._pending = []
        for row, shard, reason in sorted(pending):
            if row not in self._bad:
                self._bad[row] = (shard, reason)
                self._log.add({"step": step, "row": row, "shard": shard, "reason": reason})
        limit = self.max_fraction * max(min(rows_seen, self.rows), min(self.rows, MIN_ROWS_TO_JUDGE))
        if len(self._bad) > limit:
            shards = Counter(shard for shard, _ in self._bad.values()).most_common(5)
            raise UserError(
                f"{len(self._bad)} of about {min(rows_seen, self.rows)} samples could not be decoded "
                f"{self.by_reason()}, more than --data.max-bad-fraction {self.max_fraction:g} allows; most in "
                f"{', '.join(f'{shard} ({count})' for shard, count in shards)}. Fix or remove these shards, or raise "
                f"the limit"
            ).on_every_process()

    def by_reason(self) -> dict[str, int]:
        """Count distinct bad rows by reason."""
        return dict(Counter(reason for _, reason in self._bad.values()).most_common())
