"""Measure time and memory of the plan of an epoch, from 12 to 400 million rows.

    python benchmarks/plan.py
    python benchmarks/plan.py --large --folder /scratch

The columns are random and memory-mapped: shards of 10,000 rows, groups mixed within shards, their shares from a flat
Dirichlet distribution. Each case runs in a process of its own, which reads the columns once before anything is
counted: memory is how far the peak of the resident set rises after that, with the plan where it is in memory, and with
what is read of it where it is a file. Prints a JSON line per case: `seconds` to the plan (with CPU time, which reveals
a busy machine), to a first batch of it, to its digest and its statistics. Linux only; --large needs 4 GB of disk.
"""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import tyro
from process import memory_mb

from mcl_clip.core.distributed import random_words
from mcl_clip.core.errors import run_program
from mcl_clip.data.batch_plan import BatchPlan

CASES = {  # rows: groups, seconds and 10^6 bytes that are aimed at
    12_000_000: (100, 5, 200),
    100_000_000: (1000, 30, 2000),
    400_000_000: (1000, 120, 8000),
}
ROWS_PER_SHARD = 10_000
BLOCK_ROWS = 1 << 20
CASE_PROGRAM = "case"


def plan(*, folder: Path | None = None, large: bool = False, batches: tuple[int, ...] = (4096, 32768)) -> None:
    """Measure all cases.

    Args:
        folder: where the columns and large plans are written for the time of the measurement.
        large: with the case of 400 million rows.
        batches: global batch sizes.
    """
    for rows in list(CASES)[: None if large else 2]:
        with TemporaryDirectory(dir=folder) as scratch:
            write_columns(Path(scratch), rows, CASES[rows][0])
            for batch in batches:
                command = [sys.executable, __file__, CASE_PROGRAM, scratch, "--batch", str(batch)]
                run = subprocess.run(command, check=True, stdout=subprocess.PIPE)
                print(run.stdout.decode(), end="", flush=True)


def write_columns(folder: Path, rows: int, groups: int) -> None:
    """Write `shard_of.npy` and `groups.npy`."""
    weight = -np.log((random_words(groups, "sizes") + 1.0) / 2.0**64)
    ends = np.cumsum(weight)[:-1] / weight.sum() * 2.0**64
    shard_of, group_of = (
        np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, (rows,))
        for name, dtype in (("shard_of", np.int32), ("groups", np.int16))
    )
    for start in range(0, rows, BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, rows)
        shard_of[start:stop] = np.arange(start, stop) // ROWS_PER_SHARD
        words = random_words(stop - start, "groups", start)
        group_of[start:stop] = np.searchsorted(ends.astype(np.uint64), words)


def measure(folder: Path, /, *, batch: int) -> None:
    """Measure one case in this process."""
    shard_of, groups = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("shard_of", "groups"))
    options: dict[str, Any] = {"global_batch_size": batch, "seed": 0, "stage": 1}
    few = slice(20 * ROWS_PER_SHARD)
    BatchPlan(shard_of=shard_of[few], groups=groups[few], **options).epoch_rows(0)  # loads what loads late
    num_groups = int(groups.max()) + 1 + 0 * int(shard_of.max())  # all of them are in memory now
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = memory_mb("VmRSS")
    started = time.process_time()
    made = BatchPlan(shard_of=shard_of, groups=groups, cache_dir=folder / "plans", **options)
    seconds = {"plan": _time(lambda: made.epoch_rows(0))}
    cpu_seconds = time.process_time() - started
    seconds["first_batch"] = _time(lambda: made.batch(0))
    growth = memory_mb("VmHWM") - before
    seconds["digest"] = _time(lambda: made.digest(0))
    seconds["statistics"] = _time(lambda: made.statistics(0))
    _, target_s, target_mb = CASES[len(groups)]
    record = {
        "rows": len(groups),
        "groups": num_groups,
        "batch": batch,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_growth_mb": growth,
        "peak_growth_with_digest_and_statistics_mb": memory_mb("VmHWM") - before,
        "target": {"seconds": target_s, "mb": target_mb},
        "digest": made.digest(0),
        "statistics": asdict(made.statistics(0)),
        "cores": os.cpu_count(),
        "processor": _processor(),
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
    }
    print(json.dumps(record))


def _time(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def _processor() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else platform.machine()


if __name__ == "__main__":
    if sys.argv[1:2] == [CASE_PROGRAM]:
        del sys.argv[1]
        run_program(lambda: tyro.cli(measure))
    else:
        run_program(lambda: tyro.cli(plan, description=__doc__))
