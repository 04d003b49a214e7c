"""Measure how time and memory of index, plans and labels grow with samples and groups.

    python benchmarks/growth.py

Indexes shards of 10,000 samples of two tiny members (links to one file), plans an epoch, and refines and groups
labels. Each case runs in a process of its own: the median time of some runs, and how far the peak of the resident set
rises over what it was with the inputs. Prints a JSON line per case and one per part: the cost of a sample at the
largest number of samples over that at the smallest, and at the largest number of groups over one group. Linux only.
"""

import json
import os
import statistics
import tarfile
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import tyro
from process import memory_mb

from mcl_clip.core.distributed import random_words
from mcl_clip.core.errors import run_program
from mcl_clip.data.batch_plan import BatchPlan
from mcl_clip.data.index import ShardIndex
from mcl_clip.stages.pseudo_labels import group_labels, no_labels

ROWS = (10_000, 100_000, 1_000_000)
GROUPS = (1, 10, 100, 1000)
ROWS_PER_SHARD = 10_000
BATCH = 1024


def growth(*, rows: tuple[int, ...] = ROWS, groups: tuple[int, ...] = GROUPS, rounds: int = 3) -> None:
    """Measure all cases.

    Args:
        rows: numbers of samples, multiples of 10,000.
        groups: numbers of groups and of clusters.
        rounds: runs of a case.
    """
    parts: dict[str, tuple[Callable[[int, int], Callable[[], object]], tuple[int, ...]]] = {
        "plan": (prepare_plan, groups),
        "labels": (prepare_labels, groups),
    }
    with TemporaryDirectory() as folder:
        write_shards(Path(folder), max(rows) // ROWS_PER_SHARD)
        parts = {"index": (lambda count, _: prepare_index(Path(folder), count), (1,)), **parts}
        for part, (prepare, counts) in parts.items():
            found = dict(measured(part, prepare, rows, counts, rounds))
            print(json.dumps(verdict(part, found, rows, counts)), flush=True)


def measured(
    part: str,
    prepare: Callable[[int, int], Callable[[], object]],
    rows: tuple[int, ...],
    groups: tuple[int, ...],
    rounds: int,
) -> Iterator[tuple[tuple[int, int], dict[str, Any]]]:
    """Cost by samples and groups, which it prints."""
    context = get_context("fork")
    for count in rows:
        for number in groups:
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=lambda: sender.send(cost(prepare(count, number), rounds)))  # noqa: B023
            process.start()
            seconds, memory_mb = receiver.recv()
            process.join()
            record = {
                "part": part,
                "rows": count,
                "groups": number,
                "seconds": seconds,
                "microseconds_a_sample": 1e6 * seconds / count,
                "peak_growth_mb": memory_mb,
                "bytes_a_sample": 1e6 * memory_mb / count,
                "cores": os.cpu_count(),
            }
            print(json.dumps(record), flush=True)
            yield (count, number), record


def verdict(
    part: str, found: dict[tuple[int, int], dict[str, Any]], rows: tuple[int, ...], groups: tuple[int, ...]
) -> dict[str, Any]:
    """Return the cost per sample at the largest size over that at the smallest."""
    corner = (max(rows), max(groups))
    record: dict[str, Any] = {"verdict": part}
    for what in ("microseconds_a_sample", "bytes_a_sample"):
        ratios = {f"{max(rows)} over {min(rows)} rows": found[corner][what] / found[min(rows), max(groups)][what]}
        if len(groups) > 1:
            few = found[max(rows), min(groups)][what]
            ratios[f"{max(groups)} over {min(groups)} groups"] = found[corner][what] / few
        record[what] = ratios
    return record


def cost(action: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Median seconds, and growth of the peak of the resident set in 10^6 bytes, of the first run."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = memory_mb("VmRSS")
    seconds, peaks = [], []
    for _ in range(rounds):
        started = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - started)
        peaks.append(memory_mb("VmHWM") - before)
    return statistics.median(seconds), peaks[0]


def write_shards(folder: Path, shards: int) -> None:
    """Shards with the same samples."""
    with tarfile.open(folder / "00000.tar", "w:", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(ROWS_PER_SHARD):
            for suffix in ("jpg", "txt"):
                info = tarfile.TarInfo(f"{number:06d}.{suffix}")
                info.size = 3
                tar.addfile(info, BytesIO(b"abc"))
    for number in range(1, shards):
        (folder / f"{number:05d}.tar").hardlink_to(folder / "00000.tar")


def prepare_index(folder: Path, rows: int) -> Callable[[], object]:
    """To index so many samples."""
    urls = [str(path) for path in sorted(folder.iterdir())[: rows // ROWS_PER_SHARD]]
    return lambda: ShardIndex.build(urls, reuse=False)


def prepare_plan(rows: int, groups: int) -> Callable[[], object]:
    """To plan an epoch."""
    shard_of, group = np.arange(rows, dtype=np.int32) // ROWS_PER_SHARD, _numbers(rows, groups).astype(np.int32)

    def make() -> object:
        plan = BatchPlan(shard_of=shard_of, groups=group, global_batch_size=BATCH, seed=0, stage=1)
        return plan.epoch_rows(0)

    return make


def prepare_labels(rows: int, groups: int) -> Callable[[], object]:
    """To refine labels by so many clusters, and to group them."""
    labels, clusters = no_labels(rows), _numbers(rows, groups)
    return lambda: group_labels(labels.refine(clusters, groups), min_group_size=BATCH // 8)


def _numbers(rows: int, groups: int) -> np.ndarray:
    return (random_words(rows, "group", groups) % np.uint64(groups)).astype(np.int64)


if __name__ == "__main__":
    run_program(lambda: tyro.cli(growth, description=__doc__))
