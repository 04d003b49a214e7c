"""Which rows form global batch t.

A plan is a pure function of (shards, groups, seed, stage, epoch, batch size): no process, no worker, no position kept
anywhere. Hence any number of processes trains on the same batches, and a step number is all that a restart needs.
"""

import hashlib
import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Int, Integer, Shaped, UInt64

from mcl_clip.artifacts import atomic_path
from mcl_clip.distributed import Name, barrier, random_words
from mcl_clip.errors import UserError

FILLER = -1
LOOKAHEAD = 64  # groups that are looked at for the next place in the packed batches
PACKING_ATTEMPTS = 32


@dataclass(frozen=True, kw_only=True)
class Source:
    """Neighbouring rows of the index that are drawn `weight` times an epoch; 0.5 is every second epoch."""

    rows: int
    weight: float = 1.0

    @property
    def rows_per_epoch(self) -> int:
        """How many rows of this source an epoch holds, the same in every epoch."""
        return round(self.rows * self.weight)


@dataclass(frozen=True, kw_only=True)
class PlanStatistics:
    """What the batches of an epoch look like, before anything is read."""

    batches: int
    rows: int
    fillers: int
    share_homogeneous: float
    mean_negatives: float
    rows_without_weight: int


class BatchPlan:
    """The global batches of a stage.

    Every row with a group of at least 0 is in exactly one batch of each epoch (`weight` times, in a mixture). The rows
    of a group are shuffled and dealt into full batches; what remains of all groups is packed into batches of several
    groups. The last packed batch is filled up with `FILLER`.
    """

    def __init__(
        self,
        *,
        shard_of: Int[np.ndarray, "rows"],
        groups: Int[np.ndarray, "rows"],
        global_batch_size: int,
        seed: int,
        stage: int,
        sources: Sequence[Source] = (),
        window_shards: int = 0,
        run_rows: int = 1,
        cache_dir: Path | None = None,
        rows_in_memory: int = 50_000_000,
    ) -> None:
        """Describe the plan; nothing is computed until a batch is asked for.

        Args:
            shard_of: shard number of each row; rows of a shard are neighbours.
            groups: group number of each row; a row with a negative number is never drawn.
            global_batch_size: rows of a batch over all processes.
            seed: seed of the run.
            stage: number of the stage.
            sources: the mixture, in index order; by default one source with all rows.
            window_shards: rows are shuffled within windows of that many shuffled shards; 0 is one window.
            run_rows: neighbouring rows of a group that stay together, for storage that reads runs faster.
            cache_dir: where plans of more than `rows_in_memory` rows are written, once per node.
            rows_in_memory: largest plan that is kept in memory, in rows.

        Raises:
            UserError: if there is no row to draw.
        """
        self.shard_of, self.groups = shard_of, groups
        self.global_batch_size, self.seed, self.stage = global_batch_size, seed, stage
        self.window_shards, self.run_rows = window_shards, run_rows
        self.cache_dir, self.rows_in_memory = cache_dir, rows_in_memory
        sources = sources or (Source(rows=len(groups)),)
        self._sources = _drawn_sources(sources, groups)
        self.rows_per_epoch = sum(source.rows_per_epoch for source, _ in self._sources)
        if self.rows_per_epoch == 0:
            raise UserError("there is no row to train on; give shards with image-text pairs and weights above 0")
        self.batches_per_epoch = -(-self.rows_per_epoch // global_batch_size)
        self._epoch, self._rows = -1, np.empty((0, global_batch_size), np.int64)

    def epoch_rows(self, epoch: int) -> Int[np.ndarray, "batches batch"]:
        """Rows of all batches of an epoch; within a batch they rise, fillers (-1) come last.

        Above `rows_in_memory` rows all processes must ask together.
        """
        if epoch != self._epoch:
            large = self.rows_per_epoch > self.rows_in_memory and self.cache_dir is not None
            self._rows = self._stored(epoch) if large else self._compute(epoch)
            self._epoch = epoch
        return self._rows

    def batch(self, step: int) -> Int[np.ndarray, "batch"]:
        """Rows of the global batch of a step; steps count through all epochs of the stage."""
        epoch, number = divmod(step, self.batches_per_epoch)
        rows: np.ndarray = self.epoch_rows(epoch)[number]
        return rows

    def epoch_of(self, step: int) -> int:
        """The epoch that a step lies in."""
        return step // self.batches_per_epoch

    def digest(self, epoch: int) -> str:
        """BLAKE2b over the rows of an epoch, in hexadecimal: equal digests are equal batches in equal order."""
        rows = self.epoch_rows(epoch)
        digest = hashlib.blake2b(str(rows.shape).encode(), digest_size=16)
        for start in range(0, len(rows), 1024):
            digest.update(np.ascontiguousarray(rows[start : start + 1024], dtype="<i8").data)
        return digest.hexdigest()

    def statistics(self, epoch: int = 0, *, min_negatives: int = 1) -> PlanStatistics:
        """How homogeneous the batches of an epoch are, and how many negatives a row has."""
        rows = self.epoch_rows(epoch)
        is_row = rows != FILLER
        batch = np.repeat(np.arange(len(rows)), is_row.sum(1))
        group = self.groups[rows[is_row]].astype(np.int64)
        pairs, size = np.unique(batch * (int(group.max()) + 1) + group, return_counts=True)
        groups_in_batch = np.bincount(pairs // (int(group.max()) + 1))
        homogeneous = is_row.sum(1)[groups_in_batch == 1].sum()
        return PlanStatistics(
            batches=len(rows),
            rows=int(is_row.sum()),
            fillers=int((~is_row).sum()),
            share_homogeneous=float(homogeneous / is_row.sum()),
            mean_negatives=float((size * (size - 1)).sum() / is_row.sum()),
            rows_without_weight=int(size[size - 1 < min_negatives].sum()),
        )

    def _compute(self, epoch: int) -> Int[np.ndarray, "batches batch"]:
        name = (self.seed, self.stage, epoch)
        order = self._read_order(epoch)
        order = order[np.argsort(self.groups[order], kind="stable")]
        whole, packed = _deal(order, self.groups[order], self.global_batch_size, name)
        rows: np.ndarray = np.concatenate([whole, packed])
        rows = rows[_batch_order(self.groups[whole[:, 0]], len(packed), name)]
        rows.sort(axis=1)
        fillers = (rows == FILLER).sum(1)
        for number in np.flatnonzero(fillers):
            rows[number] = np.roll(rows[number], -fillers[number])
        return rows

    def _read_order(self, epoch: int) -> Int[np.ndarray, "drawn"]:
        """The rows of an epoch in shuffled order, sources interleaved in proportion."""
        orders = []
        for number, (source, rows) in enumerate(self._sources):
            first, last = epoch * source.rows_per_epoch, (epoch + 1) * source.rows_per_epoch
            passes = [self._shuffled(rows, number, turn) for turn in range(first // len(rows), -(-last // len(rows)))]
            start = first % len(rows)
            orders.append(np.concatenate(passes)[start : start + last - first] if passes else rows[:0])
        if len(orders) == 1:
            only: np.ndarray = orders[0]
            return only
        place = np.concatenate([(np.arange(len(order)) + 0.5) / max(1, len(order)) for order in orders])
        mixed: np.ndarray = np.concatenate(orders)[np.argsort(place, kind="stable")]
        return mixed

    def _shuffled(self, rows: Int[np.ndarray, "rows"], source: int, turn: int) -> Int[np.ndarray, "rows"]:
        """All rows of a source once: windows of shuffled shards, units of `run_rows` shuffled within a window."""
        name = (self.seed, self.stage, "order", source, turn)
        unit = _units(self.shard_of[rows], self.groups[rows], self.run_rows)
        words: UInt64[np.ndarray, rows] = random_words(int(unit[-1]) + 1, *name)[unit]
        if self.window_shards == 0:
            mixed: np.ndarray = rows[np.argsort(words, kind="stable")]
            return mixed
        shards, shard = np.unique(self.shard_of[rows], return_inverse=True)
        place = np.empty(len(shards), np.int64)
        place[np.argsort(random_words(len(shards), *name, "shards"), kind="stable")] = np.arange(len(shards))
        shuffled: np.ndarray = rows[np.lexsort((words, place[shard] // self.window_shards))]
        return shuffled

    def _stored(self, epoch: int) -> Int[np.ndarray, "batches batch"]:
        folder, is_writer = self.cache_dir or Path(), int(os.environ.get("LOCAL_RANK", "0")) == 0
        path = folder / f"plan-{self._name}-epoch{epoch}.npy"
        if is_writer:
            with atomic_path(path) as temporary, temporary.open("wb") as file:
                np.save(file, self._compute(epoch))
        barrier()
        rows: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
        for old in folder.glob(f"plan-{self._name}-epoch*.npy") if is_writer else ():
            if old != path:
                old.unlink()  # all processes have passed it
        return rows

    @cached_property
    def _name(self) -> str:
        """What the plan is made from: runs may share `cache_dir`."""
        settings = (self.seed, self.stage, self.global_batch_size, self.window_shards, self.run_rows)
        sources = [(source.rows_per_epoch, source.weight) for source, _ in self._sources]
        digest = hashlib.blake2b(repr((settings, sources)).encode(), digest_size=16)
        for column in (self.shard_of, self.groups):
            digest.update(np.ascontiguousarray(column, dtype="<i8").data)
        return digest.hexdigest()


def _drawn_sources(
    sources: Sequence[Source], groups: Int[np.ndarray, "rows"]
) -> list[tuple[Source, Int[np.ndarray, "drawn"]]]:
    if sum(source.rows for source in sources) != len(groups):
        raise UserError(
            f"the sources have {sum(s.rows for s in sources)} rows and the labels {len(groups)}; index again"
        )
    drawn, first = [], 0
    for source in sources:
        rows = first + np.flatnonzero(groups[first : first + source.rows] >= 0)
        if len(rows) and source.weight > 0:
            drawn.append((Source(rows=len(rows), weight=source.weight), rows))
        first += source.rows
    return drawn


def _units(shard: Int[np.ndarray, "rows"], group: Int[np.ndarray, "rows"], run_rows: int) -> Int[np.ndarray, "rows"]:
    """Number of the unit of each row: at most `run_rows` neighbours of one shard and group."""
    if run_rows == 1:
        return np.arange(len(shard))
    starts = np.r_[True, (shard[1:] != shard[:-1]) | (group[1:] != group[:-1])]
    first = np.maximum.accumulate(np.where(starts, np.arange(len(shard)), 0))
    starts |= (np.arange(len(shard)) - first) % run_rows == 0
    return np.cumsum(starts) - 1


def _deal(
    order: Int[np.ndarray, "rows"], group: Int[np.ndarray, "rows"], batch: int, name: tuple[Name, ...]
) -> tuple[Int[np.ndarray, "whole batch"], Int[np.ndarray, "packed batch"]]:
    """Full batches of one group, and the packed remainders. `order` is sorted by group."""
    numbers, first, size = np.unique(group, return_index=True, return_counts=True)
    remainder = size % batch
    # A single row left over would have no negatives: such a group packs one batch more instead.
    remainder = remainder + batch * ((remainder == 1) & (size > batch) & (len(size) > 1))
    place = np.arange(len(order)) - np.repeat(first, size)
    is_whole: np.ndarray = place < np.repeat(size - remainder, size)
    whole = order[is_whole].reshape(-1, batch)
    rest, which = order[~is_whole], np.repeat(np.arange(len(numbers)), size)[~is_whole]
    turn = np.zeros(len(numbers), np.int64)
    sequence = _packing_order(remainder, batch, name)
    turn[sequence] = np.arange(len(sequence))
    rest = rest[np.argsort(turn[which], kind="stable")]
    packed = np.full(-(-len(rest) // batch) * batch, FILLER, np.int64)
    packed[: len(rest)] = rest
    return whole, packed.reshape(-1, batch)


def _packing_order(sizes: Integer[np.ndarray, "groups"], batch: int, name: tuple[Name, ...]) -> list[int]:
    """A seeded order of the groups in which no border cuts off a single row: the first, or best, of some attempts."""
    fewest, best = np.inf, list[int]()
    for attempt in range(PACKING_ATTEMPTS):
        order = _greedy_order(sizes, batch, (*name, "pack", attempt))
        ends = np.cumsum(sizes[order])
        borders = np.unique(np.r_[0, ends, np.arange(batch, ends[-1] if len(ends) else 0, batch)])
        single = int((np.diff(borders) == 1).sum() - (sizes == 1).sum())
        if single < fewest:
            fewest, best = single, order
        if single <= 0:
            break
    return best


def _greedy_order(sizes: Integer[np.ndarray, "groups"], batch: int, name: tuple[Name, ...]) -> list[int]:
    """A seeded order in which each group, if there is one, fits the place where it comes."""
    present = np.flatnonzero(sizes)
    shuffled = present[np.argsort(random_words(len(present), *name), kind="stable")]
    pending, order, space = deque(int(group) for group in shuffled), [], batch
    while pending:
        fitting = (i for i in range(min(LOOKAHEAD, len(pending))) if _fits(int(sizes[pending[i]]), space, batch))
        chosen = next(fitting, 0)
        pending.rotate(-chosen)
        group = pending.popleft()
        pending.rotate(chosen)
        order.append(group)
        space = batch - (batch - space + int(sizes[group])) % batch
    return order


def _fits(size: int, space: int, batch: int) -> bool:
    """Whether a group can follow where `space` places are free: cut once at most, no single row or place left."""
    if size <= space:
        return space - size != 1
    rest = size - space
    return space > 1 and 1 < rest <= batch and batch - rest != 1


def _batch_order(
    group_of_whole: Int[np.ndarray, "whole"], packed: int, name: tuple[Name, ...]
) -> Int[np.ndarray, "batches"]:
    """A seeded low-discrepancy order: the batches of each group, and the packed ones, spread over the whole epoch."""
    kind = np.concatenate([group_of_whole, np.full(packed, -1, group_of_whole.dtype)])
    _, start, inverse, count = np.unique(kind, return_index=True, return_inverse=True, return_counts=True)
    within = np.arange(len(kind)) - start[inverse]
    words: UInt64[np.ndarray, batches] = random_words(len(kind), *name, "batches")
    jitter: Shaped[np.ndarray, batches] = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return np.lexsort((np.arange(len(kind)), (within + jitter) / count[inverse]))
