"""Scanning of shards for an index: in processes where they are local, as parsing their headers takes all the time."""

import multiprocessing
import os
from collections.abc import Generator, Iterable, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa

from mcl_clip.core.errors import UserError
from mcl_clip.data.decode import missing_caption
from mcl_clip.data.samples import SampleRule, scan_shard
from mcl_clip.data.shards import Shard, is_remote, redacted
from mcl_clip.data.storage import RetryPolicy, stat
from mcl_clip.data.workers import leave_signals_to_parent

Part: TypeAlias = tuple[Shard, pa.Table]  # a shard, and its rows as in an index

DTYPES = {
    "shard": np.int32,
    "image_offset": np.int64,
    "image_size": np.int32,
    "image_format": np.uint8,
    "text_offset": np.int64,
    "text_size": np.int32,
    "text_format": np.uint8,
    "sample_offset": np.int64,
    "sample_size": np.int64,
}
SCHEMA = pa.schema(
    [("key", pa.large_string()), *((name, pa.from_numpy_dtype(dtype)) for name, dtype in DTYPES.items())]
)
THREADS = 16
_MIN_BYTES = 256 << 20  # of local shards: fewer are read faster than processes start


def scan_shards(
    urls: Sequence[str], rule: SampleRule, *, workers: int, retry: RetryPolicy
) -> Generator[Part, None, None]:
    """Yield the rows of each shard, in order.

    Local shards are scanned in `workers` processes unless they are small, remote ones in threads.

    Raises:
        UserError: if a shard is missing, compressed, truncated, damaged or changed meanwhile.
        OSError: if a shard cannot be read after all retries.
    """
    is_large = workers > 1 and not any(map(is_remote, urls)) and sum(map(_size, urls)) >= _MIN_BYTES
    pool: Executor = (
        ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), leave_signals_to_parent)
        if is_large
        else ThreadPoolExecutor(THREADS)
    )
    try:
        yield from pool.map(partial(_scan, rule=rule, retry=retry), urls)
    except BrokenProcessPool as error:
        raise UserError(
            f"a process that indexes shards was killed ({error}), perhaps for want of memory; start again, which "
            f"continues with the shards that are left"
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _size(path: str) -> int:
    return os.path.getsize(path) if os.path.exists(path) else 0


def _scan(url: str, rule: SampleRule, retry: RetryPolicy) -> Part:
    before = stat(url, retry)
    find_problem = partial(missing_caption, json_key=rule.caption_key)
    found = scan_shard(url, before[0], rule, find_problem=find_problem, retry=retry)
    if stat(url, retry) != before:
        raise UserError(f"shard {redacted(url)} changed while it was read; wait until it is complete, then try again")
    columns = np.array([(0, *row) for row in found.rows], np.int64).reshape(-1, len(DTYPES)).T
    table = make_table(found.keys, dict(zip(DTYPES, columns, strict=True)))
    counts: dict[str, Any] = {
        "skipped": dict(found.skipped),
        "examples": found.examples,
        "joined_lines": found.joined_lines,
    }
    return Shard(url, *before, first_row=0, rows=len(found.rows), **counts), table


def make_table(keys: Iterable[bytes], columns: Mapping[str, np.ndarray]) -> pa.Table:
    """Create the table of an index from UTF-8 keys and the other columns by name."""
    keys = list(keys)
    ends = np.cumsum([0, *map(len, keys)], dtype=np.int64)
    buffers = [None, pa.py_buffer(ends), pa.py_buffer(b"".join(keys))]
    arrays = [pa.Array.from_buffers(pa.large_binary(), len(keys), buffers).cast(pa.large_string())]
    arrays += [column_of(np.asarray(columns[name]).astype(dtype), name) for name, dtype in DTYPES.items()]
    return pa.Table.from_arrays(arrays, schema=SCHEMA)


def column_of(values: np.ndarray, name: str) -> pa.Array:
    """Wrap an array as a column; `pa.array` and `to_numpy` would import pandas, which takes half a second."""
    return pa.Array.from_buffers(SCHEMA.field(name).type, len(values), [None, pa.py_buffer(values)])
