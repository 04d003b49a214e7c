"""The plan of a stage: which rows form global batch t.

A plan is a pure function of (shards, groups, seed, stage, epoch, batch size). It depends on no process, worker or
stored position, so that any number of processes trains on the same batches, and a step number is all that a restart
needs. An epoch is planned as follows, here for the ten rows of `row_order.py` and batches of four:

    order of the rows      0  8  6  4  7  2  5  9  1  3        (sources are interleaved in proportion)
    their groups           0  0  1  2  0  1  0  2  0  0        sizes: 6, 2, 2

    full batches           A = 0 8 7 5                         the first rows of group 0
    remainders             group 0: 1 3   group 1: 6 2   group 2: 4 9
    packed batches         B = 1 3 4 9    C = 6 2 . .          packed in the seeded order 0, 2, 1; '.' is a filler

    the epoch              B, C, A                             a seeded order that spreads each group's batches
    rows of the batches    1 3 4 9 | 2 6 -1 -1 | 0 5 7 8       sorted within each batch; fillers are -1

With several groups per batch, the same is done with parts of a batch in place of batches, and that many consecutive
parts make a batch: the spread of each group over the epoch brings different groups together.

The sizes of the groups alone determine this layout. Hence rows are written to their positions as they come, block by
block, and never sorted by group as a whole: the n-th row of a group has a known position.
"""

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, count
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int, Integer, Shaped, UInt64

from mcl_clip.core.distributed import Name, barrier, place_on_node, random_words
from mcl_clip.core.errors import UserError
from mcl_clip.core.files import atomic_path
from mcl_clip.data.row_order import BLOCK_ROWS, Source, block_ranges, interleave, rechunk, usable_sources

FILLER = -1
LOOKAHEAD = 64  # groups considered for the next position in the packed batches
PACKING_ATTEMPTS = 32


@dataclass(frozen=True, kw_only=True)
class PlanStatistics:
    """Properties of the batches of an epoch, known before any sample is read."""

    batches: int
    rows: int
    fillers: int
    share_homogeneous: float
    mean_negatives: float
    rows_without_weight: int


class BatchPlan:
    """The global batches of a stage.

    Every row with a group of at least 0 is in exactly one batch of each epoch (`weight` times, in a mixture). The rows
    of a group are shuffled and split into full batches; the remainders of all groups are packed into batches of several
    groups. The last packed batch is completed with `FILLER`. With `groups_per_batch` above 1, this is how equal parts
    of batches are made, and batches are made of that many parts, usually of different groups.
    """

    def __init__(
        self,
        *,
        shard_of: Int[np.ndarray, "rows"],
        groups: Int[np.ndarray, "rows"],
        global_batch_size: int,
        seed: int,
        stage: int,
        groups_per_batch: int = 1,
        sources: Sequence[Source] = (),
        window_shards: int = 0,
        run_rows: int = 1,
        cache_dir: Path | None = None,
        rows_in_memory: int = 50_000_000,
    ) -> None:
        """Describe the plan; nothing is computed before a batch is requested.

        `shard_of` and `groups` hold the shard of each row (the rows of a shard are consecutive) and its group from 0;
        rows of negative groups are never used. `sources` is the mixture in index order, by default one source with all
        rows. Rows are shuffled within windows of `window_shards` shards (0: one window), in units of `run_rows`
        neighboring rows of a group, for storage that reads runs faster. Plans of more than `rows_in_memory` rows are
        written to `cache_dir`, once per node.

        Raises:
            UserError: if there is no row to train on.
        """
        self.shard_of, self.groups = shard_of, groups
        self.global_batch_size, self.seed, self.stage = global_batch_size, seed, stage
        self.window_shards, self.run_rows = window_shards, run_rows
        self._part_rows = global_batch_size // groups_per_batch  # a batch is so many rows of one group, several times
        self.cache_dir = cache_dir
        self._row_dtype = np.dtype(np.int32 if len(groups) < 2**31 else np.int64)
        self._row_bits = len(groups).bit_length()
        self._num_groups = int(groups.max(initial=FILLER)) + 1
        self._group_dtype = np.int16 if self._num_groups <= 2**15 else np.int64  # numpy sorts 16 bits by counting: fast
        self._sources = usable_sources(sources or (Source(rows=len(groups)),), shard_of, groups, run_rows)
        self.rows_per_epoch = sum(source.rows_per_epoch for source in self._sources)
        if self.rows_per_epoch == 0:
            raise UserError("there is no row to train on; give shards with image-text pairs and weights above 0")
        self._is_large = self.rows_per_epoch > rows_in_memory
        self.batches_per_epoch = -(-self.rows_per_epoch // global_batch_size)
        self._epoch, self._rows = -1, np.empty((0, global_batch_size), self._row_dtype)

    def epoch_rows(self, epoch: int) -> Int[np.ndarray, "batches batch"]:
        """Return the rows of all batches of an epoch, rising within each batch, fillers (-1) last.

        Above `rows_in_memory` rows it is a memory-mapped file that the processes of a node share, and the call is
        collective.
        """
        if epoch != self._epoch:
            self._epoch, self._rows = -1, self._rows[:0].copy()  # free the memory of the last epoch first
            self._rows = self._stored(epoch) if self._is_large and self.cache_dir else self._compute(epoch)
            self._epoch = epoch
        return self._rows

    def batch(self, step: int) -> Int[np.ndarray, "batch"]:
        """Return the rows of the global batch of a step; steps count through all epochs of the stage."""
        epoch, number = divmod(step, self.batches_per_epoch)
        rows: np.ndarray = self.epoch_rows(epoch)[number].astype(np.int64)
        return rows

    def epoch_of(self, step: int) -> int:
        """Return the epoch of a step."""
        return step // self.batches_per_epoch

    def digest(self, epoch: int) -> str:
        """Compute BLAKE2b over the rows of an epoch, in hexadecimal: equal for equal batches in equal order."""
        rows = self.epoch_rows(epoch)
        digest = hashlib.blake2b(str(rows.shape).encode(), digest_size=16)
        for batches in _blocks_of_batches(rows):
            digest.update(np.ascontiguousarray(batches, dtype="<i8").data)
        return digest.hexdigest()

    def statistics(self, epoch: int = 0, *, min_negatives: int = 1) -> PlanStatistics:
        """Measure how homogeneous the batches of an epoch are, and how many negatives a row has."""
        pairs = without_weight = homogeneous = 0
        for batches in _blocks_of_batches(self.epoch_rows(epoch)):
            # A piece is the rows of one group in a batch.
            group = np.where(batches == FILLER, FILLER, self.groups[batches].astype(self._group_dtype))
            group.sort(axis=1)
            is_first: Bool[np.ndarray, "batches batch"] = np.ones(group.shape, bool)
            is_first[:, 1:] = group[:, 1:] != group[:, :-1]
            first = np.flatnonzero(is_first)
            is_piece = group.reshape(-1)[first] != FILLER
            batch, size = (first // group.shape[1])[is_piece], np.diff(np.r_[first, group.size])[is_piece]
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
        layout = _Layout(self._group_sizes(epoch), self._part_rows, (self.seed, self.stage, epoch))
        batches: np.ndarray = np.empty((self.batches_per_epoch, self.global_batch_size), self._row_dtype)
        sizes = (stop - start for start, stop in block_ranges(0, self.rows_per_epoch))
        for codes in rechunk(self._order(epoch), sizes):
            group = (codes >> self._row_bits).astype(self._group_dtype)
            by_group = np.argsort(group, kind="stable")
            batches.reshape(-1)[layout.next_positions(group[by_group])] = codes[by_group] & (2**self._row_bits - 1)
        fillers = layout.empty_positions(self.rows_per_epoch, batches.size)
        batches.reshape(-1)[fillers] = len(self.groups)  # above all rows, so that sorting leaves fillers last
        for block in _blocks_of_batches(batches):
            block.sort(axis=1)
        for number in np.unique(fillers // self.global_batch_size):
            batches[number][batches[number] == len(self.groups)] = FILLER
        return batches

    def _group_sizes(self, epoch: int) -> Int[np.ndarray, "groups"]:
        """Count the rows of each group in an epoch."""
        sizes = np.zeros(self._num_groups, np.int64)
        for number, source in enumerate(self._sources):
            passes, rest = divmod(source.rows_per_epoch, source.rows)
            for codes in self._source_order(number, epoch) if rest else source.in_order():
                sizes += np.bincount(codes >> self._row_bits, minlength=len(sizes)) * (1 if rest else passes)
        return sizes

    def _order(self, epoch: int) -> Iterator[Int[np.ndarray, "_rows"]]:
        """Yield the codes of the rows of an epoch in shuffled order, in parts; sources are interleaved."""
        orders = [self._source_order(number, epoch) for number in range(len(self._sources))]
        return interleave(orders, [source.rows_per_epoch for source in self._sources])

    def _source_order(self, number: int, epoch: int) -> Iterator[Int[np.ndarray, "_rows"]]:
        """Yield an epoch's share of a source: the next `rows_per_epoch` rows of consecutive passes."""
        source = self._sources[number]
        first_pass, start = divmod(epoch * source.rows_per_epoch, source.rows)
        stop, seen = start + source.rows_per_epoch, 0
        names = ((self.seed, self.stage, "order", number, later) for later in count(first_pass))
        passes = chain.from_iterable(source.shuffled(self.window_shards, name) for name in names)
        while seen < stop and start < stop:
            codes = next(passes)
            if seen + len(codes) > start:
                yield codes[max(0, start - seen) : stop - seen]
            seen += len(codes)

    def _stored(self, epoch: int) -> Int[np.ndarray, "batches batch"]:
        """Compute an epoch on one process of the node, and map the file on all of them.

        Nodes may share the file system of the folder: each has files of its own, which the others never touch.
        """
        folder, node, is_writer = self.cache_dir or Path(), *place_on_node()
        path = folder / f"plan-{self._name}-node{node}-epoch{epoch}.npy"
        if is_writer:
            with atomic_path(path) as temporary, temporary.open("wb") as file:
                np.save(file, self._compute(epoch))
        barrier()
        rows: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
        for old in folder.glob(f"plan-{self._name}-node{node}-epoch*.npy") if is_writer else ():
            if old != path:
                old.unlink()  # all processes of the node are past it
        return rows

    def remove_files(self) -> None:
        """Remove the files of this plan once no process needs it any more. A collective call."""
        if self.cache_dir is None or not self._is_large:
            return
        self._epoch, self._rows = -1, self._rows[:0].copy()
        barrier()
        if place_on_node()[1]:
            for path in self.cache_dir.glob(f"plan-{self._name}-node*.npy"):
                path.unlink(missing_ok=True)  # nodes that share the folder do the same

    @cached_property
    def _name(self) -> str:
        """A digest of all inputs of the plan: several runs may share `cache_dir`."""
        settings: tuple[int, ...] = (self.seed, self.stage, self.global_batch_size, self.window_shards, self.run_rows)
        if self._part_rows < self.global_batch_size:  # which earlier versions did not have
            settings += (self._part_rows,)
        sources = [(source.rows_per_epoch, source.weight) for source in self._sources]
        digest = hashlib.blake2b(repr((settings, sources)).encode(), digest_size=16)
        for column in (self.shard_of, self.groups):
            digest.update(str(column.dtype).encode())
            for start, stop in block_ranges(0, len(column)):
                digest.update(np.ascontiguousarray(column[start:stop]).data)
        return digest.hexdigest()


def _blocks_of_batches(batches: Int[np.ndarray, "batches batch"]) -> Iterator[Int[np.ndarray, "_batches batch"]]:
    step = max(1, BLOCK_ROWS // batches.shape[1])
    return (batches[start : start + step] for start in range(0, len(batches), step))


class _Layout:
    """Positions of the rows of each group, which follow from the sizes of the groups alone.

    Batches are first numbered group after group: all full batches, then the packed ones. `position_of` maps these
    numbers to positions in the epoch ([2, 0, 1] for A, B, C in the example above).
    """

    def __init__(self, sizes: Int[np.ndarray, "groups"], batch: int, name: tuple[Name, ...]) -> None:
        numbers, self._batch = np.flatnonzero(sizes), batch
        size = sizes[numbers]
        remainder = size % batch
        # A single remaining row would have no negatives: such a group packs one batch more instead.
        remainder = remainder + batch * ((remainder == 1) & (size > batch) & (len(size) > 1))
        full = size - remainder
        sequence = np.array(_packing_order(remainder, batch, name), np.int64)
        packed_before = np.zeros(len(size), np.int64)
        packed_before[sequence] = np.cumsum(remainder[sequence]) - remainder[sequence]
        # Row n of a group is row n + shift of the numbered batches; the shift differs for full and packed rows.
        self._full, self._full_shift, self._packed_shift = (np.zeros(len(sizes), np.int64) for _ in range(3))
        self._full[numbers] = full
        self._full_shift[numbers] = np.cumsum(full) - full
        self._packed_shift[numbers] = full.sum() + packed_before - full
        order = _batch_order(np.repeat(numbers, full // batch), int(-(-remainder.sum() // batch)), name)
        self.position_of = np.empty(len(order), np.int64)
        self.position_of[order] = np.arange(len(order))
        self._placed = np.zeros(len(sizes), np.int64)

    def next_positions(self, group: Int[np.ndarray, "_rows"]) -> Int[np.ndarray, "_rows"]:
        """Return positions in the flattened epoch for the next rows, which are sorted by group."""
        count = np.bincount(group, minlength=len(self._placed))
        number = np.arange(len(group)) + (self._placed - np.cumsum(count) + count)[group]
        self._placed += count
        numbered = number + np.where(number < self._full[group], self._full_shift[group], self._packed_shift[group])
        batch, column = np.divmod(numbered, self._batch)
        positions: np.ndarray = self.position_of[batch] * self._batch + column
        return positions

    def empty_positions(self, rows: int, size: int) -> Int[np.ndarray, "fillers"]:
        """Return the positions that `rows` rows leave empty in a flattened epoch of `size` positions."""
        batches, last = len(self.position_of), int(self.position_of[-1])
        rows_of_last = rows - (batches - 1) * self._batch  # the last of the packed batches, wherever it is in the epoch
        of_last = np.arange(last * self._batch + rows_of_last, (last + 1) * self._batch)
        return np.concatenate([of_last, np.arange(batches * self._batch, size)])


def _packing_order(sizes: Integer[np.ndarray, "groups"], batch: int, name: tuple[Name, ...]) -> list[int]:
    """Return a seeded order of the groups in which no batch border cuts off a single row, or the best one found."""
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
    """Return a seeded order in which each group fits the space that is left, as far as there is such a group."""
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
    """Return whether a group can be put into `space`: cut at most once, leaving no single row and no single space."""
    if size <= space:
        return space - size != 1
    rest = size - space
    return space > 1 and 1 < rest <= batch and batch - rest != 1


def _batch_order(
    group_of_full: Int[np.ndarray, "full"], packed: int, name: tuple[Name, ...]
) -> Int[np.ndarray, "batches"]:
    """Return a seeded low-discrepancy order: each group's batches, and the packed ones, spread over the epoch."""
    kind = np.concatenate([group_of_full, np.full(packed, -1, group_of_full.dtype)])
    _, start, inverse, count = np.unique(kind, return_index=True, return_inverse=True, return_counts=True)
    within = np.arange(len(kind)) - start[inverse]
    words: UInt64[np.ndarray, batches] = random_words(len(kind), *name, "batches")
    jitter: Shaped[np.ndarray, batches] = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return np.lexsort((np.arange(len(kind)), (within + jitter) / count[inverse]))
