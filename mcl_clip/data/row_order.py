"""The shuffled order in which an epoch visits the rows of its sources.

Each pass over a source draws one random 64-bit word per unit of rows and sorts rows by (window, word). For ten rows in
two shards, where the words' leading bits are those below:

    row                       0    1    2    3    4  |  5    6    7    8    9
    shard                     0    0    0    0    0  |  1    1    1    1    1
    group                     0    0    1    0    2  |  0    1    0    0    2
    word of each row          1  119   78  123   57  | 95   55   73   47   96
    order                     0    8    6    4    7     2    5    9    1    3
    order, window_shards=1    0    4    2    1    3  |  8    6    7    5    9
    order, run_rows=2        (0    1)  (7    8)  5     9    3    6    2    4

Without windows all rows are sorted by word. With `window_shards=1` each shard is a window of its own; the windows
follow each other in an order drawn separately. With `run_rows=2`, up to two neighboring rows of one shard and group,
here (0, 1) and (7, 8), form a unit: they share a word and stay together. Rows of negative groups are not used.

Memory is bounded: an order is made in parts (a window, then a range of words), each from another scan of the columns.
While it is shuffled, a row travels with its group in a single integer, its *code*: the row in the low `row_bits`, the
group above them. With ten rows these are 4 bits, so row 6 of group 1 has the code 1 * 16 + 6 = 22.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import numpy as np
from jaxtyping import Int, UInt64

from mcl_clip.core.distributed import Name, random_words, random_words_between
from mcl_clip.core.errors import UserError

BLOCK_ROWS = 1 << 17  # rows processed together: their arrays fit a CPU cache
PART_ROWS = 1 << 22  # rows whose words are held at a time, unless a window would need more than MAX_PARTS parts
MAX_PARTS = 3
SORTED_ROWS = 1 << 17  # rows sorted together, unless a part would need more than 2**MAX_BUCKET_BITS buckets
MAX_BUCKET_BITS = 8


@dataclass(frozen=True, kw_only=True)
class Source:
    """Consecutive rows of the index that are sampled `weight` times an epoch; 0.5 is every second epoch."""

    rows: int
    weight: float = 1.0

    @property
    def rows_per_epoch(self) -> int:
        """How many rows of this source an epoch holds, the same in every epoch."""
        return round(self.rows * self.weight)


class SourceRows:
    """The usable rows of a source (those of non-negative groups), as codes, in rising or in shuffled order.

    `first` is its first row in the columns `shard_of` and `groups`, which hold the rows of all sources.
    """

    def __init__(
        self,
        source: Source,
        first: int,
        shard_of: Int[np.ndarray, "all_rows"],
        groups: Int[np.ndarray, "all_rows"],
        run_rows: int,
    ) -> None:
        self._shard_of, self._groups, self._run_rows = shard_of, groups, run_rows
        self._first, self._stop = first, first + source.rows
        self._row_bits = len(groups).bit_length()
        self.rows = sum(int(np.count_nonzero(groups[a:b] >= 0)) for a, b in block_ranges(first, self._stop))
        self.weight = source.weight
        self.rows_per_epoch = Source(rows=self.rows, weight=self.weight).rows_per_epoch

    def in_order(self) -> Iterator[Int[np.ndarray, "_rows"]]:
        """Yield all rows once, in rising order, in parts."""
        return (self._codes(start, stop) for start, stop in block_ranges(self._first, self._stop))

    def shuffled(self, window_shards: int, name: tuple[Name, ...]) -> Iterator[Int[np.ndarray, "_rows"]]:
        """Yield all rows once, in parts: windows of shuffled shards, and units of `run_rows` shuffled within each."""
        for rows, blocks in self._windows(window_shards, name):
            parts = -(-rows // max(PART_ROWS, -(-rows // MAX_PARTS)))
            bucket_bits = min(MAX_BUCKET_BITS, (rows // parts // SORTED_ROWS).bit_length())
            for low, high in pairwise(2**64 * part // parts for part in range(parts + 1)):
                yield from _sort_by_word(self._between(low, high - 1, blocks, name), low, high - 1, bucket_bits)

    def _windows(self, window_shards: int, name: tuple[Name, ...]) -> Iterator[tuple[int, list[tuple[int, int, int]]]]:
        """Yield the number of rows and the blocks (start, stop and first unit) of each window, in shuffled order."""
        shard, start, stop, rows, unit = self._segments
        shards, number = np.unique(shard, return_inverse=True)
        position = np.zeros(len(shards), np.int64)
        if window_shards:
            by_word = np.argsort(random_words(len(shards), *name, "shards"), kind="stable")
            position[by_word] = np.arange(len(shards)) // window_shards
        window = position[number]
        order = np.argsort(window, kind="stable")
        for segments in np.split(order, np.flatnonzero(np.diff(window[order])) + 1):
            starts, stops = start[segments], stop[segments]
            is_new = (starts[1:] != stops[:-1]) | (starts[1:] // BLOCK_ROWS != starts[:-1] // BLOCK_ROWS)
            first = np.flatnonzero(np.r_[True, is_new])  # small adjacent segments are joined
            last = np.r_[first[1:], len(segments)] - 1
            blocks = zip(starts[first].tolist(), stops[last].tolist(), unit[segments][first].tolist(), strict=True)
            yield int(rows[segments].sum()), list(blocks)

    def _between(
        self, low: int, high: int, blocks: Iterable[tuple[int, int, int]], name: tuple[Name, ...]
    ) -> Iterator[tuple[Int[np.ndarray, "_rows"], UInt64[np.ndarray, "_rows"]]]:
        """Yield the codes and words of each block's rows whose words lie between `low` and `high` inclusive."""
        for start, stop, first_unit in blocks:
            codes = self._codes(start, stop)
            if self._run_rows == 1:
                words = random_words_between(first_unit, first_unit + len(codes), *name)
            else:
                unit = self._units(codes)
                words = random_words_between(first_unit, first_unit + int(unit[-1]) + 1, *name)[unit]
            kept = np.flatnonzero((words >= np.uint64(low)) & (words <= np.uint64(high)))
            yield codes[kept], words[kept]

    def _codes(self, start: int, stop: int) -> Int[np.ndarray, "_rows"]:
        """Return the codes of the usable rows between `start` and `stop`."""
        group = self._groups[start:stop].astype(np.int64)
        codes: np.ndarray = (group << self._row_bits) + np.arange(start, stop)
        return codes if group.min() >= 0 else codes[group >= 0]

    def _units(self, codes: Int[np.ndarray, "_rows"]) -> Int[np.ndarray, "_rows"]:
        """Return the unit of each row, counted from 0: at most `run_rows` neighbors of one shard and group."""
        number = np.arange(len(codes))
        if self._run_rows == 1 or not len(codes):
            return number
        shard, group = self._shard_of[codes & (2**self._row_bits - 1)], codes >> self._row_bits
        is_start = np.r_[True, (shard[1:] != shard[:-1]) | (group[1:] != group[:-1])]
        first = np.maximum.accumulate(np.where(is_start, number, 0))
        is_start |= (number - first) % self._run_rows == 0
        return np.cumsum(is_start) - 1

    @cached_property
    def _segments(self) -> tuple[Int[np.ndarray, "segments"], ...]:
        """Row ranges that lie within one shard: shard, start, stop, usable rows, and number of units before each."""
        bounds = [np.array([self._first])]
        for first, last in block_ranges(self._first, self._stop):
            before = max(self._first, first - 1)
            shard = self._shard_of[before:last]
            bounds.append(np.flatnonzero(shard[1:] != shard[:-1]) + before + 1)
        if self._run_rows == 1:  # larger units may be cut at the borders of shards only
            bounds.append(np.arange(self._first, self._stop, BLOCK_ROWS))
        start: np.ndarray = np.unique(np.concatenate(bounds))
        stop, units = np.r_[start[1:], self._stop], 0
        rows, unit = np.zeros(len(start), np.int64), np.zeros(len(start), np.int64)
        for block in np.split(np.arange(len(start)), np.flatnonzero(np.diff(start // BLOCK_ROWS)) + 1):
            codes = self._codes(int(start[block[0]]), int(stop[block[-1]]))
            number = self._units(codes)
            number = np.r_[number, number[-1:] + 1 if len(number) else 0]  # the last entry is how many there are
            position = np.searchsorted(codes & (2**self._row_bits - 1), start[block])
            rows[block], unit[block] = np.diff(np.r_[position, len(codes)]), units + number[position]
            units += int(number[-1])
        kept = rows > 0
        return self._shard_of[start[kept]], start[kept], stop[kept], rows[kept], unit[kept]


def usable_sources(
    sources: Sequence[Source], shard_of: Int[np.ndarray, "rows"], groups: Int[np.ndarray, "rows"], run_rows: int
) -> list[SourceRows]:
    """Return the rows of each source, without sources that have no usable row or no weight.

    Raises:
        UserError: if the sources and `groups` have different numbers of rows.
    """
    if sum(source.rows for source in sources) != len(groups):
        raise UserError(
            f"the sources have {sum(s.rows for s in sources)} rows and the labels {len(groups)}; index again"
        )
    stops = accumulate(source.rows for source in sources)
    rows = [SourceRows(s, stop - s.rows, shard_of, groups, run_rows) for s, stop in zip(sources, stops, strict=True)]
    return [one for one in rows if one.rows and one.weight > 0]


def _sort_by_word(
    blocks: Iterable[tuple[Int[np.ndarray, "_rows"], UInt64[np.ndarray, "_rows"]]],
    low: int,
    high: int,
    bucket_bits: int,
) -> Iterator[Int[np.ndarray, "_rows"]]:
    """Yield the codes of all blocks by rising word, which lie between `low` and `high`; equal words keep their order.

    A bucket sort by the leading bits of the words, so that each part to be sorted is small.
    """
    buckets: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in range(2**bucket_bits)]
    shift = np.uint64((high - low).bit_length() - bucket_bits)
    for codes, words in blocks:
        number = ((words - np.uint64(low)) >> shift).astype(np.uint8)
        by_bucket = np.argsort(number, kind="stable")
        ends = np.cumsum(np.bincount(number, minlength=len(buckets)))[:-1]
        pieces = zip(np.split(codes[by_bucket], ends), np.split(words[by_bucket], ends), strict=True)
        for bucket, piece in zip(buckets, pieces, strict=True):
            bucket.append(piece)
    for bucket in buckets:
        words = np.concatenate([words for _, words in bucket])
        yield np.concatenate([codes for codes, _ in bucket])[np.argsort(words, kind="stable")]


def interleave(
    orders: Sequence[Iterator[Int[np.ndarray, "_rows"]]], counts: Sequence[int]
) -> Iterator[Int[np.ndarray, "_rows"]]:
    """Merge orders of `counts` rows so that row r of n comes at the fraction (r + 1/2) / n of the whole, in parts."""

    def rows_before(fraction: float, count: int) -> int:
        return bisect_left(range(count), fraction, key=lambda row: (row + 0.5) / count)

    if len(orders) == 1:
        yield from orders[0]
        return
    parts = -(-sum(counts) // BLOCK_ROWS)
    stops = [[rows_before(part / parts, count) for part in range(parts)] + [count] for count in counts]
    chunks = [rechunk(order, np.diff(stop).tolist()) for order, stop in zip(orders, stops, strict=True)]
    for part in range(parts):
        fraction = [(np.arange(stop[part], stop[part + 1]) + 0.5) / max(1, stop[-1]) for stop in stops]
        codes = np.concatenate([next(chunk) for chunk in chunks])
        yield codes[np.argsort(np.concatenate(fraction), kind="stable")]


def rechunk(parts: Iterator[Int[np.ndarray, "_rows"]], sizes: Iterable[int]) -> Iterator[Int[np.ndarray, "_rows"]]:
    """Yield the concatenation of `parts` in chunks of `sizes`."""
    held = [np.empty(0, np.int64)]
    for size in sizes:
        missing = size - len(held[0])
        while missing > 0:
            held.append(next(parts))
            missing -= len(held[-1])
        joined = held[0] if len(held) == 1 else np.concatenate(held)
        held = [joined[size:]]
        yield joined[:size]


def block_ranges(first: int, stop: int) -> Iterator[tuple[int, int]]:
    """Yield start and stop of consecutive blocks of at most `BLOCK_ROWS` rows."""
    return ((start, min(start + BLOCK_ROWS, stop)) for start in range(first, stop, BLOCK_ROWS))
