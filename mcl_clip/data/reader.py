"""From row numbers to the bytes of images and texts, from local files and remote stores."""

import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Integer

from mcl_clip.core.errors import UserError
from mcl_clip.data.index import ShardIndex
from mcl_clip.data.shards import Shard, is_remote, redacted
from mcl_clip.data.storage import RetryPolicy, ShardCache, read_range
from mcl_clip.data.tar import BLOCK, TEXT_FORMATS, parse_header

_LOCAL_GAP = 16 << 10
_REMOTE_GAP = 256 << 10
_MAX_SPAN = 16 << 20
_RANGES_IN_FLIGHT = 64
_SHARDS_IN_FLIGHT = 4
_NAME_FITS = 90  # longer names stand in an extended header, and the header block holds what its writer made of them


@dataclass(frozen=True)
class RawSample:
    """The undecoded members of a row; `text_format` is `txt` or `json`."""

    row: int
    image: bytes
    text: bytes
    text_format: str


_Columns: TypeAlias = tuple[np.ndarray, np.ndarray]  # offsets and sizes of members, by row


class _Range(NamedTuple):
    shard: int
    start: int
    end: int


class Reader:
    """Reads rows of an index.

    Local shards are read in place; remote ones by ranges, or from a cache of whole shards. Files and connections are
    opened in the process that reads, so a reader may be pickled and may cross a fork. One thread at a time.
    """

    def __init__(
        self,
        index: ShardIndex,
        *,
        remote: Literal["range", "stage"] = "range",
        cache_dir: Path | None = None,
        cache_gb: float = 50.0,
        retries: int = 3,
        timeout_s: float = 60.0,
        backoff_s: float = 0.5,
        max_open_files: int = 256,
    ):
        """A reader for local and remote shards.

        Args:
            index: What to read.
            remote: `range` merges neighbouring ranges and keeps many in flight; `stage` fetches whole shards once.
            cache_dir: Folder for whole shards, on a local disk; `stage` needs it. Processes of a machine share it.
            cache_gb: Limit of the cache in 10^9 bytes; it must hold at least one shard for each reading process.
            retries: Repeats after a failure that may pass.
            timeout_s: Longest wait for the next byte of a remote file.
            backoff_s: First pause before a repeat; it doubles.
            max_open_files: Local shards kept open.

        Raises:
            UserError: for settings that cannot work.
        """
        if remote not in ("range", "stage"):
            raise UserError(f"remote is {remote!r}; it must be 'range' or 'stage'")
        if remote == "stage" and cache_dir is None:
            raise UserError("remote='stage' keeps whole shards in a folder; name one with cache_dir")
        self.index = index
        self.patience = RetryPolicy(retries=retries, backoff_s=backoff_s, timeout_s=timeout_s)
        self.cache = (
            ShardCache(cache_dir, int(cache_gb * 1e9), self.patience) if remote == "stage" and cache_dir else None
        )
        self.max_open_files = max_open_files
        self._files: OrderedDict[int, int] = OrderedDict()
        self._threads: tuple[int, ThreadPoolExecutor] | None = None

    def read(self, rows: Integer[np.ndarray, "n"]) -> list[RawSample]:
        """The samples of `rows`, in their order.

        Raises:
            UserError: if a shard is gone, may not be read, or changed since the index was made.
            OSError: if reading still fails after all repeats.
            IndexError: for a number that is not a row.
        """
        index = self.index
        images, texts = self._members(rows, (index.image_offset, index.image_size), self._texts)
        return [
            RawSample(row, image, text, text_format)
            for row, image, text, text_format in zip(rows.tolist(), images, texts, self._formats(rows), strict=True)
        ]

    def read_texts(self, rows: Integer[np.ndarray, "n"]) -> list[tuple[bytes, str]]:
        """The text members of `rows` with their formats, in their order, without the images.

        Raises:
            UserError, OSError, IndexError: as `read`.
        """
        (texts,) = self._members(rows, self._texts)
        return list(zip(texts, self._formats(rows), strict=True))

    @property
    def _texts(self) -> _Columns:
        return self.index.text_offset, self.index.text_size

    def _formats(self, rows: Integer[np.ndarray, "n"]) -> list[str]:
        return [TEXT_FORMATS[number] for number in self.index.text_format[rows].tolist()]

    def _members(self, rows: Integer[np.ndarray, "n"], *kinds: _Columns) -> list[list[bytes]]:
        """One or more members of each row, given by columns of offsets and sizes; all are fetched together."""
        self._check_rows(rows)
        shards = self.index.shard_of[rows].tolist()
        sizes = [size[rows].tolist() for _, size in kinds]
        ranges = [
            _Range(shard, start - BLOCK, start + length)
            for (offset, _), of_kind in zip(kinds, sizes, strict=True)
            for shard, start, length in zip(shards, offset[rows].tolist(), of_kind, strict=True)
        ]
        found, members = iter(self._fetch(ranges)), []
        for of_kind in sizes:
            of_rows = []
            for row, size in zip(rows.tolist(), of_kind, strict=True):
                member = next(found)
                self._check(row, member[:BLOCK], size)
                of_rows.append(bytes(member[BLOCK:]))
            members.append(of_rows)
        return members

    def read_whole(self, rows: Integer[np.ndarray, "n"]) -> list[bytes]:
        """All members of the samples of `rows` as they stand in the tar, headers and padding included.

        Raises:
            UserError, OSError, IndexError: as `read`.
        """
        index = self.index
        self._check_rows(rows)
        starts = index.sample_offset[rows]
        ends = starts + index.sample_size[rows]
        wholes = self._fetch(list(map(_Range, index.shard_of[rows].tolist(), starts.tolist(), ends.tolist())))
        for row, whole in zip(rows.tolist(), wholes, strict=True):
            for offset, size in ((index.image_offset, index.image_size), (index.text_offset, index.text_size)):
                header = int(offset[row] - index.sample_offset[row]) - BLOCK
                self._check(row, whole[header : header + BLOCK], int(size[row]))
        return [bytes(whole) for whole in wholes]

    def close(self) -> None:
        """Close files and threads; the next read opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])
        if self._threads is not None and self._threads[0] == os.getpid():
            self._threads[1].shutdown(wait=False)
        self._threads = None

    def __del__(self) -> None:
        if hasattr(self, "_threads"):
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict(), "_threads": None}

    def _check_rows(self, rows: np.ndarray) -> None:
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self.index):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of an index with {len(self.index)} rows")

    def _check(self, row: int, header: memoryview, size: int) -> None:
        """Stop if a header is not the one that the index saw: same size, a regular file, the same key."""
        key = self.index.key(row)
        try:
            found = parse_header(bytes(header))
            same = found.size == size and found.kind == b"0"
            if key.isascii() and len(key) <= _NAME_FITS:
                same &= found.name.startswith(key.encode() + b".")
        except ValueError:
            same = False
        if not same:
            raise self._changed(int(self.index.shard_of[row]), f"row {row} (key {key!r}) is not where it was")

    def _check_file(self, number: int, now: os.stat_result) -> None:
        """Stop if a local shard is not the file that the index saw, even where all headers stand as they did."""
        shard = self.index.shards[number]
        if now.st_size != shard.size or (
            shard.stamp.startswith("mtime:") and shard.stamp != f"mtime:{now.st_mtime_ns}"
        ):
            raise self._changed(
                number, f"it had {shard.size} bytes ({shard.stamp}), now {now.st_size} (mtime:{now.st_mtime_ns})"
            )

    def _changed(self, shard: int, what: str) -> UserError:
        return UserError(
            f"shard {redacted(self.index.shards[shard].url)} changed since its index was made: {what}; "
            f"build the index again, or restore the shard"
        )

    def _fetch(self, ranges: Sequence[_Range]) -> list[memoryview]:
        """The bytes of each range; ranges that lie close together are read at once."""
        spans, places = _merge(ranges, self._gap)
        reads: list[Callable[[], list[bytes]]] = []
        futures: list[Future[list[bytes]]] = []
        for number, group in groupby(spans, key=lambda span: span.shard):
            shard, parts = self.index.shards[number], list(group)
            if not is_remote(shard.url):
                reads.append(partial(self.patience.run, partial(self._read_local, number, parts), shard.url))
                continue
            started = self._start(shard, parts)
            futures += started
            reads += [future.result for future in started]
        try:
            data = [memoryview(part) for read in reads for part in read()]
        finally:
            for future in futures:
                future.cancel()
        return [
            data[place][wanted.start - spans[place].start : wanted.end - spans[place].start]
            for wanted, place in zip(ranges, places, strict=True)
        ]

    def _gap(self, shard: int) -> int:
        by_request = self.cache is None and is_remote(self.index.shards[shard].url)
        return _REMOTE_GAP if by_request else _LOCAL_GAP

    def _start(self, shard: Shard, spans: list[_Range]) -> list[Future[list[bytes]]]:
        """Begin to read spans of a remote shard in other threads."""
        if self._threads is None or self._threads[0] != os.getpid():  # threads do not survive a fork
            count = _RANGES_IN_FLIGHT if self.cache is None else _SHARDS_IN_FLIGHT
            self._threads = (os.getpid(), ThreadPoolExecutor(max_workers=count))
        submit = self._threads[1].submit
        if self.cache is not None:
            return [submit(self._read_staged, self.cache, shard, spans)]
        return [submit(_read_remote, shard.url, span, self.patience) for span in spans]

    def _read_staged(self, cache: ShardCache, shard: Shard, spans: list[_Range]) -> list[bytes]:
        descriptor = cache.open(shard)
        try:
            return self._read_spans(descriptor, spans)
        finally:
            os.close(descriptor)

    def _read_local(self, number: int, spans: list[_Range]) -> list[bytes]:
        descriptor = self._files.pop(number, None)
        if descriptor is None:
            descriptor = os.open(self.index.shards[number].url, os.O_RDONLY)
        try:
            parts = self._read_spans(descriptor, spans)
            self._check_file(number, os.fstat(descriptor))
        except (OSError, UserError):
            os.close(descriptor)  # a stale handle would fail for ever
            raise
        self._files[number] = descriptor
        while len(self._files) > self.max_open_files:
            os.close(self._files.popitem(last=False)[1])
        return parts

    def _read_spans(self, descriptor: int, spans: list[_Range]) -> list[bytes]:
        if hasattr(os, "posix_fadvise"):  # lets the kernel fetch all of them at once
            for span in spans:
                os.posix_fadvise(descriptor, span.start, span.end - span.start, os.POSIX_FADV_WILLNEED)
        return [self._pread(descriptor, span) for span in spans]

    def _pread(self, descriptor: int, span: _Range) -> bytes:
        data = os.pread(descriptor, span.end - span.start, span.start)
        while len(data) < span.end - span.start:
            more = os.pread(descriptor, span.end - span.start - len(data), span.start + len(data))
            if not more:
                raise self._changed(span.shard, f"it ends before byte {span.end}")
            data += more
        return data


def _read_remote(url: str, span: _Range, patience: RetryPolicy) -> list[bytes]:
    return [read_range(url, span.start, span.end, patience)]


def _merge(ranges: Sequence[_Range], gap_of: Callable[[int], int]) -> tuple[list[_Range], list[int]]:
    """Spans that cover the ranges, sorted by shard and start, and for each range the number of its span.

    Ranges at most `gap_of(shard)` bytes apart share a span, up to a largest size of span.
    """
    spans: list[_Range] = []
    places = [0] * len(ranges)
    for number in sorted(range(len(ranges)), key=ranges.__getitem__):
        wanted = ranges[number]
        last = spans[-1] if spans else None
        if (
            last is not None
            and wanted.shard == last.shard
            and wanted.start <= last.end + gap_of(wanted.shard)
            and max(wanted.end, last.end) - last.start <= _MAX_SPAN
        ):
            spans[-1] = last._replace(end=max(wanted.end, last.end))
        else:
            spans.append(wanted)
        places[number] = len(spans) - 1
    return spans, places
