"""Which rows form global batch t.

A plan is a pure function of (shards, groups, seed, stage, epoch, batch size): no process, no worker, no position kept
anywhere. Hence any number of processes trains on the same batches, and a step number is all that a restart needs.

Passes over the sources, each in an order of its own (`order.py`), follow each other, sources are interleaved in
proportion, and the rows of each group are dealt into batches as they come: the sizes of the groups alone say which
place of the plan the next row of a group takes.
"""

import hashlib
import os
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, count
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int, Integer, Shaped, UInt64

from mcl_clip.core.distributed import Name, barrier, random_words
from mcl_clip.core.errors import UserError
from mcl_clip.core.files import atomic_path
from mcl_clip.data.row_order import BLOCK_ROWS, Source, drawn_sources, interleaved, pieces_of, ranges, row_bits

FILLER = -1
LOOKAHEAD = 64  # groups that are looked at for the next place in the packed batches
PACKING_ATTEMPTS = 32


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
            groups: group number of each row, counted from 0; a row with a negative number is never drawn.
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
        self._row_dtype = np.dtype(np.int32 if len(groups) < 2**31 else np.int64)
        self._row_bits = row_bits(groups)
        self._num_groups = int(groups.max(initial=FILLER)) + 1
        self._sources = drawn_sources(sources or (Source(rows=len(groups)),), shard_of, groups, run_rows)
        self.rows_per_epoch = sum(source.rows_per_epoch for source in self._sources)
        if self.rows_per_epoch == 0:
            raise UserError("there is no row to train on; give shards with image-text pairs and weights above 0")
        self.batches_per_epoch = -(-self.rows_per_epoch // global_batch_size)
        self._epoch, self._rows = -1, np.empty((0, global_batch_size), self._row_dtype)

    def epoch_rows(self, epoch: int) -> Int[np.ndarray, "batches batch"]:
        """Rows of all batches of an epoch, 4 bytes each; within a batch they rise, fillers (-1) come last.

        Above `rows_in_memory` rows it is a memory-mapped file that the processes of a node share, and all processes
        must ask together.
        """
        if epoch != self._epoch:
            self._epoch, self._rows = -1, self._rows[:0].copy()  # makes room
            large = self.rows_per_epoch > self.rows_in_memory and self.cache_dir is not None
            self._rows = self._stored(epoch) if large else self._compute(epoch)
            self._epoch = epoch
        return self._rows

    def batch(self, step: int) -> Int[np.ndarray, "batch"]:
        """Rows of the global batch of a step; steps count through all epochs of the stage."""
        epoch, number = divmod(step, self.batches_per_epoch)
        rows: np.ndarray = self.epoch_rows(epoch)[number].astype(np.int64)
        return rows

    def epoch_of(self, step: int) -> int:
        """The epoch that a step lies in."""
        return step // self.batches_per_epoch

    def digest(self, epoch: int) -> str:
        """BLAKE2b over the rows of an epoch, in hexadecimal: equal digests are equal batches in equal order."""
        rows = self.epoch_rows(epoch)
        digest = hashlib.blake2b(str(rows.shape).encode(), digest_size=16)
        for batches in _blocks_of_batches(rows):
            digest.update(np.ascontiguousarray(batches, dtype="<i8").data)
        return digest.hexdigest()

    def statistics(self, epoch: int = 0, *, min_negatives: int = 1) -> PlanStatistics:
        """How homogeneous the batches of an epoch are, and how many negatives a row has."""
        pairs = without_weight = homogeneous = 0
        for batches in _blocks_of_batches(self.epoch_rows(epoch)):
            batch, size = _pieces(batches, self.groups, self._num_groups)
            pairs += int((size * (size - 1)).sum())
            without_weight += int(size[size - 1 < min_negatives].sum())
            homogeneous += int(size[np.bincount(batch)[batch] == 1].sum())
        return PlanStatistics(
            batches=self.batches_per_epoch,
            rows=self.rows_per_epoch,
            fillers=self.batches_per_epoch * self.global_batch_size - self.rows_per_epoch,
            share_homogeneous=homogeneous / self.rows_per_epoch,
            mean_negatives=pairs / self.rows_per_epoch,
            rows_without_weight=without_weight,
        )

    def _compute(self, epoch: int) -> Int[np.ndarray, "batches batch"]:
        layout = _Layout(self._group_sizes(epoch), self.global_batch_size, (self.seed, self.stage, epoch))
        batches: np.ndarray = np.empty((self.batches_per_epoch, self.global_batch_size), self._row_dtype)
        sizes = (stop - start for start, stop in ranges(0, self.rows_per_epoch))
        for drawn in pieces_of(self._order(epoch), sizes):
            group = _narrow(drawn >> self._row_bits, self._num_groups)
            by_group = np.argsort(group, kind="stable")
            batches.reshape(-1)[layout.next_places(group[by_group])] = drawn[by_group] & (2**self._row_bits - 1)
        last, rows_of_last = layout.place_of[-1], self.global_batch_size - (batches.size - self.rows_per_epoch)
        batches[last, rows_of_last:] = len(self.groups)  # stays behind the rows
        for some in _blocks_of_batches(batches):
            some.sort(axis=1)
        batches[last, rows_of_last:] = FILLER
        return batches

    def _group_sizes(self, epoch: int) -> Int[np.ndarray, "groups"]:
        """How many rows of each group an epoch draws."""
        sizes = np.zeros(self._num_groups, np.int64)
        for number, source in enumerate(self._sources):
            passes, rest = divmod(source.rows_per_epoch, source.rows)
            for drawn in self._source_order(number, epoch) if rest else source.in_order():
                sizes += np.bincount(drawn >> self._row_bits, minlength=len(sizes)) * (1 if rest else passes)
        return sizes

    def _order(self, epoch: int) -> Iterator[Int[np.ndarray, "_drawn"]]:
        """The rows of an epoch, with their groups, in shuffled order, in parts; sources interleaved in proportion."""
        orders = [self._source_order(number, epoch) for number in range(len(self._sources))]
        if len(orders) == 1:
            return orders[0]
        return interleaved(orders, [source.rows_per_epoch for source in self._sources])

    def _source_order(self, number: int, epoch: int) -> Iterator[Int[np.ndarray, "_drawn"]]:
        """What an epoch draws of a source: the next `rows_per_epoch` rows of one pass after another."""
        source = self._sources[number]
        turn, start = divmod(epoch * source.rows_per_epoch, source.rows)
        stop, seen = start + source.rows_per_epoch, 0
        names = ((self.seed, self.stage, "order", number, later) for later in count(turn))
        passes = chain.from_iterable(source.shuffled(self.window_shards, name) for name in names)
        while seen < stop and start < stop:
            drawn = next(passes)
            if seen + len(drawn) > start:
                yield drawn[max(0, start - seen) : stop - seen]
            seen += len(drawn)

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
        sources = [(source.rows_per_epoch, source.weight) for source in self._sources]
        digest = hashlib.blake2b(repr((settings, sources)).encode(), digest_size=16)
        for column in (self.shard_of, self.groups):
            digest.update(str(column.dtype).encode())
            for start, stop in ranges(0, len(column)):
                digest.update(np.ascontiguousarray(column[start:stop]).data)
        return digest.hexdigest()


def _blocks_of_batches(batches: Int[np.ndarray, "batches batch"]) -> Iterator[Int[np.ndarray, "_batches batch"]]:
    step = max(1, BLOCK_ROWS // batches.shape[1])
    return (batches[start : start + step] for start in range(0, len(batches), step))


def _narrow(group: Int[np.ndarray, "*shape"], num_groups: int) -> Int[np.ndarray, "*shape"]:
    """In 16 bits where they do: those are sorted by counting."""
    return group.astype(np.int16) if num_groups <= 2**15 else group


def _pieces(
    batches: Int[np.ndarray, "batches batch"], groups: Int[np.ndarray, "rows"], num_groups: int
) -> tuple[Int[np.ndarray, "pieces"], Int[np.ndarray, "pieces"]]:
    """The batch and the size of each piece: the rows of one group in a batch."""
    group = np.where(batches == FILLER, FILLER, _narrow(groups[batches], num_groups))
    group.sort(axis=1)
    is_first: Bool[np.ndarray, "batches batch"] = np.ones(group.shape, bool)
    is_first[:, 1:] = group[:, 1:] != group[:, :-1]
    first = np.flatnonzero(is_first)
    is_piece = group.reshape(-1)[first] != FILLER
    return (first // group.shape[1])[is_piece], np.diff(np.r_[first, group.size])[is_piece]


class _Layout:
    """Where the rows of each group lie: in full batches of one group, the remainders in packed ones.

    `place_of` has the place in the epoch of each batch, full ones group after group and then packed ones.
    """

    def __init__(self, sizes: Int[np.ndarray, "groups"], batch: int, name: tuple[Name, ...]) -> None:
        numbers, self._batch = np.flatnonzero(sizes), batch
        size = sizes[numbers]
        remainder = size % batch
        # A single row left over would have no negatives: such a group packs one batch more instead.
        remainder = remainder + batch * ((remainder == 1) & (size > batch) & (len(size) > 1))
        whole = size - remainder
        sequence = np.array(_packing_order(remainder, batch, name), np.int64)
        packed_before = np.zeros(len(size), np.int64)
        packed_before[sequence] = np.cumsum(remainder[sequence]) - remainder[sequence]
        self._whole, self._start, self._packed_shift = (np.zeros(len(sizes), np.int64) for _ in range(3))
        self._whole[numbers] = whole
        self._start[numbers] = np.cumsum(whole) - whole
        self._packed_shift[numbers] = whole.sum() + packed_before - whole
        order = _batch_order(np.repeat(numbers, whole // batch), int(-(-remainder.sum() // batch)), name)
        self.place_of = np.empty(len(order), np.int64)
        self.place_of[order] = np.arange(len(order))
        self._dealt = np.zeros(len(sizes), np.int64)

    def next_places(self, group: Int[np.ndarray, "_rows"]) -> Int[np.ndarray, "_rows"]:
        """Places in the epoch, row by row through its batches, of the next rows of sorted groups."""
        count = np.bincount(group, minlength=len(self._dealt))
        number = np.arange(len(group)) + (self._dealt - np.cumsum(count) + count)[group]
        self._dealt += count
        unordered = number + np.where(number < self._whole[group], self._start[group], self._packed_shift[group])
        batch, column = np.divmod(unordered, self._batch)
        places: np.ndarray = self.place_of[batch] * self._batch + column
        return places


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
