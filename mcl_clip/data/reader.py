"""Reader of samples by row: the bytes of images and texts from local files and remote stores."""

import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Integer

from mcl_clip.core.errors import UserError
from mcl_clip.data.index import ShardIndex
from mcl_clip.data.shards import is_remote, redacted
from mcl_clip.data.storage import RetryPolicy, ShardCache, read_range
from mcl_clip.data.tar import BLOCK, TEXT_FORMATS, has_captions_by_line, parse_header

_LOCAL_GAP = 16 << 10
_REMOTE_GAP = 256 << 10
_MAX_SPAN = 16 << 20
_RANGES_IN_FLIGHT = 64
_SHARDS_IN_FLIGHT = 4
_MAX_OPEN_FILES = 256
_MAX_NAME = 90  # longer names are in an extended header, and what the header block holds depends on the writer


class RawSample(NamedTuple):
    """The undecoded members of a row; `text_format` is `txt`, `lines` (a caption on each line), `json`, or empty.

    Without a text, as in an index of images alone, the text is empty, too.
    """

    row: int
    image: bytes
    text: bytes
    text_format: str


_Payload: TypeAlias = tuple[bytes, bytes]  # the header block of a member, and its content


class _Range(NamedTuple):
    shard: int
    start: int
    end: int


class Reader:
    """Reads rows of an index.

    Local shards are read in place; remote ones by ranges, or from a cache of whole shards. Files and connections are
    opened in the process that reads, so that a reader can be pickled and survives a fork. It is not thread-safe.
    """

    def __init__(
        self,
        index: ShardIndex,
        *,
        remote: Literal["range", "stage"] = "range",
        cache_dir: Path | None = None,
        cache_gb: float = 50.0,
        retry: RetryPolicy | None = None,
        captions_by_line: bool = False,
    ):
        """Create a reader; raise UserError for invalid settings.

        Of remote shards, `range` merges adjacent ranges and requests many at a time; `stage` fetches whole shards once,
        into `cache_dir` on a local disk, which the processes of a machine share. `cache_gb`, in 10^9 bytes, must hold
        at least one shard per reading process. With `captions_by_line`, a .txt member holds a caption on each line in
        all shards, and not only in those that say so.
        """
        if remote not in ("range", "stage"):
            raise UserError(f"remote is {remote!r}; it must be 'range' or 'stage'")
        if remote == "stage" and cache_dir is None:
            raise UserError("--machine.remote stage stores whole shards; name a folder as --machine.cache-dir")
        self.index = index
        self.retry = retry or RetryPolicy()
        self.captions_by_line = captions_by_line
        self.cache = ShardCache(cache_dir, int(cache_gb * 1e9), self.retry) if remote == "stage" and cache_dir else None
        self._files: OrderedDict[int, int] = OrderedDict()
        self._threads: tuple[int, ThreadPoolExecutor] | None = None

    def read(self, rows: Integer[np.ndarray, "n"]) -> list[RawSample]:
        """Read the samples of `rows`, in their order.

        Raises:
            UserError: if a shard is missing, may not be read, or changed since it was indexed.
            OSError: if reading still fails after all retries.
            IndexError: for a number that is not a row.
        """
        if not self.index.rule.texts:
            images = self._members(rows, "image")
            return [RawSample(row, image, b"", "") for row, (_, image) in zip(rows.tolist(), images, strict=True)]
        members = self._members(rows, "image", "text")
        images, texts = members[: len(rows)], self._with_formats(rows, members[len(rows) :])
        return [
            RawSample(row, image, *text) for row, (_, image), text in zip(rows.tolist(), images, texts, strict=True)
        ]

    def read_texts(self, rows: Integer[np.ndarray, "n"]) -> list[tuple[bytes, str]]:
        """Read the text members of `rows` with their formats, in their order, without the images; raise as `read`."""
        if not self.index.rule.texts:
            return [(b"", "")] * len(rows)
        return self._with_formats(rows, self._members(rows, "text"))

    def read_whole(self, rows: Integer[np.ndarray, "n"]) -> list[bytes]:
        """Read all members of the samples of `rows`, with headers and padding as in the tar; raise as `read`."""
        index = self.index
        self._check_rows(rows)
        starts = index.sample_offset[rows]
        ends = starts + index.sample_size[rows]
        wholes = self._fetch(list(map(_Range, index.shard_of[rows].tolist(), starts.tolist(), ends.tolist())))
        for row, whole in zip(rows.tolist(), wholes, strict=True):
            members = [(index.image_offset, index.image_size), (index.text_offset, index.text_size)]
            for offset, size in members if index.rule.texts else members[:1]:
                header = int(offset[row] - index.sample_offset[row]) - BLOCK
                self._check_header(row, whole[header : header + BLOCK], int(size[row]))
        return [bytes(whole) for whole in wholes]

    def _with_formats(self, rows: Integer[np.ndarray, "n"], members: list[_Payload]) -> list[tuple[bytes, str]]:
        """Return the payloads of the texts of `rows` with their formats."""
        formats = [TEXT_FORMATS[number] for number in self.index.text_format[rows].tolist()]
        return [
            (data, "lines" if form == "txt" and (self.captions_by_line or has_captions_by_line(header)) else form)
            for (header, data), form in zip(members, formats, strict=True)
        ]

    def _members(self, rows: Integer[np.ndarray, "n"], *kinds: str) -> list[_Payload]:
        """Read the members of one kind (`image` or `text`) of all rows, then those of the next; all in one fetch."""
        self._check_rows(rows)
        shards = self.index.shard_of[rows].tolist() * len(kinds)
        offsets = [offset for kind in kinds for offset in getattr(self.index, f"{kind}_offset")[rows].tolist()]
        sizes = [size for kind in kinds for size in getattr(self.index, f"{kind}_size")[rows].tolist()]
        ranges = [  # with the headers, by which a changed shard is noticed
            _Range(shard, offset - BLOCK, offset + size)
            for shard, offset, size in zip(shards, offsets, sizes, strict=True)
        ]
        members = []
        for row, size, data in zip(rows.tolist() * len(kinds), sizes, self._fetch(ranges), strict=True):
            self._check_header(row, data[:BLOCK], size)
            members.append((bytes(data[:BLOCK]), bytes(data[BLOCK:])))
        return members

    def close(self) -> None:
        """Close files and threads; the next read reopens them."""
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
            raise IndexError(f"rows {rows.min()} to {rows.max()} requested from an index with {len(self.index)} rows")

    def _check_header(self, row: int, data: memoryview, size: int) -> None:
        """Raise if a header is not the one that was indexed: a regular file of the same size and key."""
        key = self.index.key(row)
        try:
            header = parse_header(bytes(data))
            is_same = header.size == size and header.kind == b"0"
            if key.isascii() and len(key) <= _MAX_NAME:
                is_same &= header.name.startswith(key.encode() + b".")
        except ValueError:
            is_same = False
        if not is_same:
            raise self._changed(int(self.index.shard_of[row]), f"row {row} (key {key!r}) is no longer at its offset")

    def _changed(self, shard: int, what: str) -> UserError:
        return UserError(
            f"shard {redacted(self.index.shards[shard].url)} changed since it was indexed: {what}; "
            f"rebuild the index, or restore the shard"
        )

    def _fetch(self, ranges: Sequence[_Range]) -> list[memoryview]:
        """Read the bytes of each range; ranges that are close together are read as one span."""
        spans, span_of = _merge_ranges(ranges, self._max_gap)
        reads: list[Callable[[], list[bytes]]] = []
        futures: list[Future[list[bytes]]] = []
        for number, group in groupby(spans, key=lambda span: span.shard):
            url, parts = self.index.shards[number].url, list(group)
            if not is_remote(url):
                reads.append(partial(self.retry.run, partial(self._read_local, number, parts), url))
                continue
            requests = [[part] for part in parts] if self.cache is None else [parts]
            submitted = [self._executor().submit(self._read_remote, request) for request in requests]
            futures += submitted
            reads += [future.result for future in submitted]
        try:
            data = [memoryview(part) for read in reads for part in read()]
        finally:
            for future in futures:
                future.cancel()
        return [
            data[number][wanted.start - spans[number].start : wanted.end - spans[number].start]
            for wanted, number in zip(ranges, span_of, strict=True)
        ]

    def _max_gap(self, shard: int) -> int:
        is_request = self.cache is None and is_remote(self.index.shards[shard].url)
        return _REMOTE_GAP if is_request else _LOCAL_GAP

    def _executor(self) -> ThreadPoolExecutor:
        if self._threads is None or self._threads[0] != os.getpid():  # threads do not survive a fork
            count = _RANGES_IN_FLIGHT if self.cache is None else _SHARDS_IN_FLIGHT
            self._threads = (os.getpid(), ThreadPoolExecutor(max_workers=count))
        return self._threads[1]

    def _read_remote(self, spans: list[_Range]) -> list[bytes]:
        """Read spans of a remote shard by requests, or all from the cache."""
        shard = self.index.shards[spans[0].shard]
        if self.cache is None:
            return [read_range(shard.url, span.start, span.end, self.retry) for span in spans]
        descriptor = self.cache.open(shard)
        try:
            return self._read_spans(descriptor, spans)
        finally:
            os.close(descriptor)

    def _read_local(self, number: int, spans: list[_Range]) -> list[bytes]:
        shard, descriptor = self.index.shards[number], self._files.pop(number, None)
        if descriptor is None:
            descriptor = os.open(shard.url, os.O_RDONLY)
        try:
            parts = self._read_spans(descriptor, spans)
            now = os.fstat(descriptor)
            size, stamp = now.st_size, f"mtime:{now.st_mtime_ns}"
            # All headers that were read may be as before in a file that was changed elsewhere.
            if size != shard.size or (shard.stamp.startswith("mtime:") and shard.stamp != stamp):
                raise self._changed(number, f"it had {shard.size} bytes ({shard.stamp}), now {size} ({stamp})")
        except (OSError, UserError):
            os.close(descriptor)  # a stale handle would fail forever
            raise
        self._files[number] = descriptor
        while len(self._files) > _MAX_OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        return parts

    def _read_spans(self, descriptor: int, spans: list[_Range]) -> list[bytes]:
        if hasattr(os, "posix_fadvise"):  # lets the kernel read all of them ahead
            for span in spans:
                os.posix_fadvise(descriptor, span.start, span.end - span.start, os.POSIX_FADV_WILLNEED)
        parts = []
        for span in spans:
            data = os.pread(descriptor, span.end - span.start, span.start)
            while (position := span.start + len(data)) < span.end:
                more = os.pread(descriptor, span.end - position, position)
                if not more:
                    raise self._changed(span.shard, f"it ends before byte {span.end}")
                data += more
            parts.append(data)
        return parts


def _merge_ranges(ranges: Sequence[_Range], max_gap: Callable[[int], int]) -> tuple[list[_Range], list[int]]:
    """Return spans that cover the ranges, sorted by shard and start, and for each range the number of its span.

    Ranges at most `max_gap(shard)` bytes apart share a span, up to a maximum size of the span.
    """
    spans: list[_Range] = []
    span_of = [0] * len(ranges)
    for number in sorted(range(len(ranges)), key=ranges.__getitem__):
        wanted = ranges[number]
        last = spans[-1] if spans else None
        if (
            last is not None
            and wanted.shard == last.shard
            and wanted.start <= last.end + max_gap(wanted.shard)
            and max(wanted.end, last.end) - last.start <= _MAX_SPAN
        ):
            spans[-1] = last._replace(end=max(wanted.end, last.end))
        else:
            spans.append(wanted)
        span_of[number] = len(spans) - 1
    return spans, span_of
