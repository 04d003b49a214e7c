"""Measure indexing: time a row by number of processes, and the check and digest of an index, which each run needs.

    python benchmarks/index.py scan --folder /scratch
    python benchmarks/index.py check --folder /scratch --rows 4000000 40000000

`scan` writes shards as img2dataset does (image, JSON and .txt) with images of 3 KB, which are not read. `check` writes
an index of synthetic rows, in shards of 10,000, whose columns are filled in the file so that memory does not limit
their number (63 bytes a row), and prints the growth of anonymous memory; pages of the mapped file are not counted.
Prints one JSON line per figure. Linux only.
"""

import io
import json
import tarfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import numpy as np
import pyarrow as pa
import tyro
from process import memory_mb

from mcl_clip.core.errors import run_program
from mcl_clip.data.index import ShardIndex
from mcl_clip.data.scanning import DTYPES, SCHEMA
from mcl_clip.data.shards import Shard

ROWS_PER_SHARD = 10_000
SAMPLE_BYTES = 4096
KEY_DIGITS = 9
BLOCK_ROWS = 1 << 22
SAMPLE_S = 0.005
T = TypeVar("T")


def scan(*, folder: Path | None = None, shards: int = 8, processes: tuple[int, ...] = (1, 2)) -> None:
    """Index shards with one and with several processes."""
    with TemporaryDirectory(dir=folder) as scratch:
        urls = [str(write_shard(Path(scratch), number)) for number in range(shards)]
        for count in processes:
            start = time.perf_counter()
            index = ShardIndex.build(urls, workers=count)
            us = 1e6 * (time.perf_counter() - start) / len(index)
            print(json.dumps({"figure": "scan", "processes": count, "rows": len(index), "us_a_row": round(us, 1)}))


def write_shard(folder: Path, number: int) -> Path:
    """Write a shard of `ROWS_PER_SHARD` samples."""
    path, image = folder / f"{number:05d}.tar", bytes(3000)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for row in range(ROWS_PER_SHARD):
            caption = f"a photo of thing {row}"
            about = {
                "url": f"https://example.com/{row}.jpg",
                "caption": caption,
                "status": "success",
                "sha256": "0" * 64,
            }
            for extension, data in (("jpg", image), ("json", json.dumps(about).encode()), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{number:05d}{row:04d}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def check(*, folder: Path | None = None, rows: tuple[int, ...] = (4_000_000,)) -> None:
    """Load and check an index, and compute its digest."""
    for count in rows:
        with TemporaryDirectory(dir=folder) as scratch:
            path = Path(scratch) / "index.arrow"
            write_index(path, count)
            index = report("load and check", count, partial(ShardIndex.load, path))
            report("digest", count, partial(getattr, index, "digest"))


def report(figure: str, rows: int, work: Callable[[], T]) -> T:
    """Print time and memory of `work`, and return its result."""
    before, peak, done = memory_mb("RssAnon"), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(SAMPLE_S):
            peak[0] = max(peak[0], memory_mb("RssAnon"))

    thread = threading.Thread(target=watch)
    thread.start()
    start, cpu = time.perf_counter(), time.process_time()
    result = work()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    done.set()
    thread.join()
    grown = max(0.0, peak[0] - before)
    figures = {"seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2), "grown_mb": round(grown)}
    print(json.dumps({"figure": figure, "rows": rows, **figures}))
    return result


def write_index(path: Path, rows: int) -> None:
    """Write an index of zeros, whose pages need no memory, and then its columns in place."""
    zeros = {name: np.memmap(path.with_name(name), dtype, "w+", shape=rows) for name, dtype in DTYPES.items()}
    ends = np.memmap(path.with_name("ends"), np.int64, "w+", shape=rows + 1)
    for first in range(0, rows, BLOCK_ROWS):  # they say how many bytes of keys are written
        stop = min(first + BLOCK_ROWS, rows)
        ends[first + 1 : stop + 1] = KEY_DIGITS * np.arange(first + 1, stop + 1)
    keys = np.memmap(path.with_name("keys"), np.uint8, "w+", shape=(rows, KEY_DIGITS))
    arrays = [pa.Array.from_buffers(pa.large_string(), rows, [None, pa.py_buffer(ends), pa.py_buffer(keys)])]
    arrays += [
        pa.Array.from_buffers(SCHEMA.field(name).type, rows, [None, pa.py_buffer(column)])
        for name, column in zeros.items()
    ]
    shards = [
        asdict(Shard(f"/{first}.tar", SAMPLE_BYTES * ROWS_PER_SHARD, "", first, min(ROWS_PER_SHARD, rows - first), {}))
        for first in range(0, rows, ROWS_PER_SHARD)
    ]
    metadata = {"version": 1, "text_first": "txt", "shards": shards}
    table = pa.Table.from_arrays(arrays, schema=SCHEMA).replace_schema_metadata({b"mcl_clip": json.dumps(metadata)})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    fill(path, rows)


def fill(path: Path, rows: int) -> None:
    """Write the columns of synthetic rows into the buffers of an index file."""
    mapped = pa.memory_map(str(path))
    base, table = mapped.read_buffer(mapped.size()).address, pa.ipc.open_file(mapped).read_all()

    def column(name: str, dtype: type, shape: int | tuple[int, int], buffer: int = 1) -> np.ndarray:
        offset = table.column(name).chunk(0).buffers()[buffer].address - base
        return np.memmap(path, dtype, "r+", offset, shape)

    columns = {name: column(name, dtype, rows) for name, dtype in DTYPES.items()}
    keys = column("key", np.uint8, (rows, KEY_DIGITS), 2)
    for first in range(0, rows, BLOCK_ROWS):
        block = slice(first, min(first + BLOCK_ROWS, rows))
        row = np.arange(block.start, block.stop)
        start = row % ROWS_PER_SHARD * SAMPLE_BYTES
        values = {"shard": row // ROWS_PER_SHARD, "sample_offset": start, "sample_size": SAMPLE_BYTES}
        values |= {"image_offset": start + 512, "image_size": 1 + row % 1001, "image_format": row % 4}
        values |= {"text_offset": start + 2560, "text_size": 1 + row % 97, "text_format": row % 2}
        for name, value in values.items():
            columns[name][block] = value
        for digit in range(KEY_DIGITS):
            keys[block, digit] = ord("0") + row // 10 ** (KEY_DIGITS - 1 - digit) % 10


if __name__ == "__main__":
    run_program(lambda: tyro.extras.subcommand_cli_from_dict({"scan": scan, "check": check}))
