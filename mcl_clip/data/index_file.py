"""The Arrow file of an index: one record batch of all rows, so that a process reads columns from the mapped file.

The metadata has the rule and the shards. Paths of local shards below the folder of the file are relative, so that both
can be moved together. A file with signed URLs is readable by its owner only.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from mcl_clip.core.files import atomic_path
from mcl_clip.data.samples import SampleRule
from mcl_clip.data.scanning import DTYPES, SCHEMA, Part
from mcl_clip.data.shards import Shard, redacted

VERSION = 1
METADATA = b"mcl_clip"


def write_table(path: Path, table: pa.Table, shards: Sequence[Shard], rule: SampleRule) -> None:
    """Write an index file from a table with one chunk, atomically."""
    path = Path(path).absolute()
    with atomic_path(path) as temporary:
        _write(temporary, table, _metadata(shards, rule, path.parent))
    _hide_signed(path, shards)


def number_shards(parts: Sequence[Part]) -> list[Shard]:
    """Return the shards of parts with the first row that each has when they are put together."""
    firsts = np.cumsum([0, *(shard.rows for shard, _ in parts)])
    return [replace(shard, first_row=int(first)) for (shard, _), first in zip(parts, firsts, strict=False)]


def write_parts(path: Path, parts: Sequence[Part], rule: SampleRule) -> None:
    """Write an index file from the rows of shards, atomically, in memory that does not grow with their number.

    A batch is written from columns that are in memory as a whole. Hence the file is written with zeros first, which
    take no memory as long as nobody changes them, and then shard by shard.
    """
    path, shards = Path(path).absolute(), number_shards(parts)
    filled = [(number, table) for number, (_, table) in enumerate(parts) if len(table)]
    rows, key_bytes = sum(len(table) for _, table in filled), sum(len(_keys(table)[1]) for _, table in filled)
    with atomic_path(path) as temporary:
        _write(temporary, _zeros(rows, key_bytes), _metadata(shards, rule, path.parent))
        starts = _buffer_starts(temporary) if rows else {}  # a table without rows has no buffers
        row = key_byte = 0
        with temporary.open("r+b") as file:  # not through a memory map: on a full disk that ends in a bus error

            def write(name: str, buffer: int, offset: int, values: np.ndarray) -> None:
                file.seek(starts[name][buffer] + offset)
                file.write(values.data)

            for number, table in filled:
                ends, keys = _keys(table)
                write("key", 1, 8 * (row + 1), ends[1:] + key_byte)
                write("key", 2, key_byte, keys)
                for name, dtype in DTYPES.items():
                    column = np.from_dlpack(table.column(name).chunk(0))
                    values = np.full(len(table), number, dtype) if name == "shard" else column
                    write(name, 1, values.itemsize * row, values)
                row, key_byte = row + len(table), key_byte + len(keys)
    _hide_signed(path, shards)


def _metadata(shards: Sequence[Shard], rule: SampleRule, folder: Path) -> str:
    described = [asdict(shard) | {"url": shard.url.removeprefix(f"{folder}{os.sep}")} for shard in shards]
    return json.dumps({"version": VERSION, "rule": asdict(rule), "shards": described})


def _write(path: Path, table: pa.Table, metadata: str) -> None:
    table = table.replace_schema_metadata({METADATA: metadata})
    with pa.OSFile(os.fsencode(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def _hide_signed(path: Path, shards: Sequence[Shard]) -> None:
    if any(redacted(shard.url) != shard.url for shard in shards):
        path.chmod(0o600)


def _keys(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Return where each key of a table with one chunk ends, behind a 0, and the bytes of all keys."""
    keys = table.column("key").chunk(0)
    _, ends, data = keys.buffers()
    ends = np.frombuffer(ends, np.int64)[keys.offset : keys.offset + len(keys) + 1]
    return ends - ends[0], np.frombuffer(data, np.uint8)[ends[0] : ends[-1]]


def _zeros(rows: int, key_bytes: int) -> pa.Table:
    """Return a table whose columns share untouched pages, which need no memory."""
    zeros = pa.py_buffer(np.zeros(max(key_bytes, 8 * rows), np.uint8))
    ends = np.zeros(rows + 1, np.int64)
    ends[-1] = key_bytes  # the writer reads from it how many bytes of keys there are
    arrays = [pa.Array.from_buffers(pa.large_string(), rows, [None, pa.py_buffer(ends), zeros])]
    sizes = {name: np.dtype(dtype).itemsize * rows for name, dtype in DTYPES.items()}
    arrays += [
        pa.Array.from_buffers(SCHEMA.field(name).type, rows, [None, zeros[:size]]) for name, size in sizes.items()
    ]
    return pa.Table.from_arrays(arrays, schema=SCHEMA)


def _buffer_starts(path: Path) -> dict[str, list[int]]:
    """Return the byte of the file at which each buffer of each column starts; 0 for those that are not there."""
    mapped = pa.memory_map(os.fsencode(path))
    base, table = mapped.read_buffer(mapped.size()).address, pa.ipc.open_file(mapped).read_all()
    buffers = {name: table.column(name).chunk(0).buffers() for name in table.column_names}
    return {name: [one.address - base if one else 0 for one in of_column] for name, of_column in buffers.items()}
