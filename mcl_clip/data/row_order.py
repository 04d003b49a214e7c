"""In which order the rows of an epoch are dealt into batches.

Each pass over a source sorts its rows by window and by the word drawn for their unit. Memory is bounded: the order is
made in parts (a window, a range of words), each from one more look at the columns. A row travels with its group in one
number, see `row_bits`.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from jaxtyping import Int, UInt64

from mcl_clip.core.distributed import Name, random_words, random_words_between
from mcl_clip.core.errors import UserError

BLOCK_ROWS = 1 << 17  # rows that are looked at together: what is made of them stays in a cache
PART_ROWS = 1 << 22  # rows whose words are held at a time, or a third of a larger window
MOST_PARTS = 3
SORTED_ROWS = 1 << 17  # rows that are sorted together, unless that takes too many buckets
MOST_BUCKET_BITS = 8


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
class _Segments:
    """Runs of rows of one shard: where they start and stop, how many rows are drawn, and units drawn before."""

    shard: Int[np.ndarray, "segments"]
    start: Int[np.ndarray, "segments"]
    stop: Int[np.ndarray, "segments"]
    rows: Int[np.ndarray, "segments"]
    unit: Int[np.ndarray, "segments"]


class DrawnSource:
    """The rows of a source that are drawn, `rows` of them: in their order, and shuffled.

    They come with their groups in one number, see `row_bits`.
    """

    def __init__(
        self,
        *,
        shard_of: Int[np.ndarray, "all_rows"],
        groups: Int[np.ndarray, "all_rows"],
        first: int,
        stop: int,
        weight: float,
        run_rows: int,
    ) -> None:
        self.weight = weight
        self._shard_of, self._groups, self._first, self._stop, self._run_rows = shard_of, groups, first, stop, run_rows
        self._row_bits = row_bits(groups)
        self.rows = sum(int(np.count_nonzero(groups[a:b] >= 0)) for a, b in ranges(first, stop))

    @property
    def rows_per_epoch(self) -> int:
        """How many of its rows an epoch holds."""
        return Source(rows=self.rows, weight=self.weight).rows_per_epoch

    def in_order(self) -> Iterator[Int[np.ndarray, "_drawn"]]:
        """All rows in rising order, in parts."""
        return (self._drawn(start, stop) for start, stop in ranges(self._first, self._stop))

    def shuffled(self, window_shards: int, name: tuple[Name, ...]) -> Iterator[Int[np.ndarray, "_drawn"]]:
        """All rows once, in parts: windows of shuffled shards, units of `run_rows` shuffled within a window."""
        for window in self._windows(window_shards, name):
            blocks, rows = self._blocks(window), int(self._segments.rows[window].sum())
            parts = -(-rows // max(PART_ROWS, -(-rows // MOST_PARTS)))
            bucket_bits = min(MOST_BUCKET_BITS, (rows // parts // SORTED_ROWS).bit_length())
            for low, high in pairwise(2**64 * part // parts for part in range(parts + 1)):
                yield from _sorted_by_word(self._between(low, high - 1, blocks, name), low, high - 1, bucket_bits)

    def _windows(self, window_shards: int, name: tuple[Name, ...]) -> list[Int[np.ndarray, "_segments"]]:
        """The segments of each window, in the order of windows."""
        if window_shards == 0:
            return [np.arange(len(self._segments.start))]
        shards, shard = np.unique(self._segments.shard, return_inverse=True)
        place = np.empty(len(shards), np.int64)
        place[np.argsort(random_words(len(shards), *name, "shards"), kind="stable")] = np.arange(len(shards))
        window = place[shard] // window_shards
        order = np.argsort(window, kind="stable")
        return np.split(order, np.flatnonzero(np.diff(window[order])) + 1)

    def _blocks(self, window: Int[np.ndarray, "_segments"]) -> list[tuple[int, int, int]]:
        """Start, stop and first unit of the segments; small neighbours are joined."""
        start, stop, unit = (
            column[window] for column in (self._segments.start, self._segments.stop, self._segments.unit)
        )
        is_new = (start[1:] != stop[:-1]) | (start[1:] // BLOCK_ROWS != start[:-1] // BLOCK_ROWS)
        first = np.flatnonzero(np.r_[True, is_new])
        last = np.r_[first[1:], len(start)] - 1
        return list(zip(start[first].tolist(), stop[last].tolist(), unit[first].tolist(), strict=True))

    def _between(
        self, low: int, high: int, blocks: Iterable[tuple[int, int, int]], name: tuple[Name, ...]
    ) -> Iterator[tuple[Int[np.ndarray, "_drawn"], UInt64[np.ndarray, "_drawn"]]]:
        """The rows of each block whose words lie from `low` to `high`, and the words."""
        for start, stop, first_unit in blocks:
            drawn = self._drawn(start, stop)
            if self._run_rows == 1:
                words = random_words_between(first_unit, first_unit + len(drawn), *name)
            else:
                unit = self._units(drawn)
                words = random_words_between(first_unit, first_unit + int(unit[-1]) + 1, *name)[unit]
            kept = np.flatnonzero((words >= np.uint64(low)) & (words <= np.uint64(high)))
            yield drawn[kept], words[kept]

    def _drawn(self, start: int, stop: int) -> Int[np.ndarray, "_drawn"]:
        group = self._groups[start:stop].astype(np.int64)
        drawn: np.ndarray = (group << self._row_bits) + np.arange(start, stop)
        return drawn if group.min() >= 0 else drawn[group >= 0]

    def _units(self, drawn: Int[np.ndarray, "_drawn"]) -> Int[np.ndarray, "_drawn"]:
        """Number of the unit of each row, from 0: at most `run_rows` neighbours of one shard and group."""
        place = np.arange(len(drawn))
        if self._run_rows == 1 or not len(drawn):
            return place
        shard, group = self._shard_of[self._row(drawn)], drawn >> self._row_bits
        starts = np.r_[True, (shard[1:] != shard[:-1]) | (group[1:] != group[:-1])]
        first = np.maximum.accumulate(np.where(starts, place, 0))
        starts |= (place - first) % self._run_rows == 0
        return np.cumsum(starts) - 1

    def _row(self, drawn: Int[np.ndarray, "_drawn"]) -> Int[np.ndarray, "_drawn"]:
        row: np.ndarray = drawn & (2**self._row_bits - 1)
        return row

    @cached_property
    def _segments(self) -> _Segments:
        changes = [np.array([self._first])]
        for first, last in ranges(self._first, self._stop):
            before = max(self._first, first - 1)
            shard = self._shard_of[before:last]
            changes.append(np.flatnonzero(shard[1:] != shard[:-1]) + before + 1)
        if self._run_rows == 1:  # units can be cut nowhere, however large a shard is
            changes.append(np.arange(self._first, self._stop, BLOCK_ROWS))
        start: np.ndarray = np.unique(np.concatenate(changes))
        stop, units = np.r_[start[1:], self._stop], 0
        rows, unit = np.zeros(len(start), np.int64), np.zeros(len(start), np.int64)
        for some in np.split(np.arange(len(start)), np.flatnonzero(np.diff(start // BLOCK_ROWS)) + 1):
            drawn = self._drawn(int(start[some[0]]), int(stop[some[-1]]))
            number = self._units(drawn)
            numbers = np.r_[number, number[-1:] + 1 if len(number) else 0]  # the last is how many there are
            place = np.searchsorted(self._row(drawn), start[some])
            rows[some], unit[some] = np.diff(np.r_[place, len(drawn)]), units + numbers[place]
            units += int(numbers[-1])
        kept = rows > 0
        return _Segments(
            shard=self._shard_of[start[kept]], start=start[kept], stop=stop[kept], rows=rows[kept], unit=unit[kept]
        )


def drawn_sources(
    sources: Sequence[Source], shard_of: Int[np.ndarray, "rows"], groups: Int[np.ndarray, "rows"], run_rows: int
) -> list[DrawnSource]:
    """Those of which something is drawn.

    Raises:
        UserError: if the sources have other rows than the groups.
    """
    if sum(source.rows for source in sources) != len(groups):
        raise UserError(
            f"the sources have {sum(s.rows for s in sources)} rows and the labels {len(groups)}; index again"
        )
    drawn, first = [], 0
    for source in sources:
        stop = first + source.rows
        drawn.append(
            DrawnSource(
                shard_of=shard_of, groups=groups, first=first, stop=stop, weight=source.weight, run_rows=run_rows
            )
        )
        first = stop
    return [source for source in drawn if source.rows and source.weight > 0]


def _sorted_by_word(
    blocks: Iterable[tuple[Int[np.ndarray, "_drawn"], UInt64[np.ndarray, "_drawn"]]],
    low: int,
    high: int,
    bucket_bits: int,
) -> Iterator[Int[np.ndarray, "_drawn"]]:
    """What the blocks hold in the order of their words, from `low` to `high`; those of equal words in the given order.

    Buckets by the leading bits of the words are sorted one by one.
    """
    buckets: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in range(2**bucket_bits)]
    shift = np.uint64((high - low).bit_length() - bucket_bits)
    for drawn, words in blocks:
        bucket = ((words - np.uint64(low)) >> shift).astype(np.uint8)
        by_bucket = np.argsort(bucket, kind="stable")
        ends = np.cumsum(np.bincount(bucket, minlength=len(buckets)))[:-1]
        for held, *part in zip(
            buckets, np.split(drawn[by_bucket], ends), np.split(words[by_bucket], ends), strict=True
        ):
            held.append((part[0], part[1]))
    for held in buckets:
        words = np.concatenate([words for _, words in held])
        yield np.concatenate([drawn for drawn, _ in held])[np.argsort(words, kind="stable")]


def interleaved(
    orders: Sequence[Iterator[Int[np.ndarray, "_drawn"]]], counts: Sequence[int]
) -> Iterator[Int[np.ndarray, "_drawn"]]:
    """Rows of several orders, of `counts` rows, such that row r of n comes at (r + 1/2) / n, in parts."""
    parts = -(-sum(counts) // BLOCK_ROWS)
    stops = [[_rows_before(part / parts, count) for part in range(parts)] + [count] for count in counts]
    pieces = [pieces_of(order, np.diff(stop).tolist()) for order, stop in zip(orders, stops, strict=True)]
    for part in range(parts):
        place = [(np.arange(stop[part], stop[part + 1]) + 0.5) / max(1, stop[-1]) for stop in stops]
        drawn = np.concatenate([next(piece) for piece in pieces])
        yield drawn[np.argsort(np.concatenate(place), kind="stable")]


def _rows_before(place: float, count: int) -> int:
    return bisect_left(range(count), place, key=lambda row: (row + 0.5) / count)


def pieces_of(parts: Iterator[Int[np.ndarray, "_drawn"]], sizes: Iterable[int]) -> Iterator[Int[np.ndarray, "_drawn"]]:
    """The same in pieces of `sizes`."""
    held = [np.empty(0, np.int64)]
    for size in sizes:
        missing = size - len(held[0])
        while missing > 0:
            held.append(next(parts))
            missing -= len(held[-1])
        joined = held[0] if len(held) == 1 else np.concatenate(held)
        held = [joined[size:]]
        yield joined[:size]


def row_bits(groups: Int[np.ndarray, "rows"]) -> int:
    """A row and its group travel as one number: the row in so many low bits, the group above."""
    return len(groups).bit_length()


def ranges(first: int, stop: int) -> Iterator[tuple[int, int]]:
    """Starts and stops of blocks of rows."""
    return ((start, min(start + BLOCK_ROWS, stop)) for start in range(first, stop, BLOCK_ROWS))
