"""Measure what a run does with all rows beside the encoders: index, held-out rows, labels, groups, plan, clusters.

    python benchmarks/scale.py --folder /scratch
    python benchmarks/scale.py --folder /scratch --rows 400000000 --parts index held_out labels groups plan
    python benchmarks/scale.py --folder /scratch --rows 400000000 --parts metric projection clusters --dim 16

Labels, shard numbers and features are synthetic: 100 x 100 clusters, shards of 10,000 rows, and random features of
which one chunk is repeated, so that reading them takes no time. `index` puts the rows of scanned shards together, of
which 4 million are repeated, checks the file and computes its digest; it does not scan (`python benchmarks/index.py
scan` does). The processes are ranks of one job on one node, this machine.
Prints a JSON line per part, number of rows and of processes: seconds until the last process is done, CPU seconds of
all, the largest growth of anonymous memory in a process and the sum over the node (mapped files are not counted), and
the longest time that a process waited for another one. Linux only. On disk, each row takes 63 bytes for `index`, 32
for the labels, groups and plan, and 2 for each dimension of projected features.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import tyro
from index import write_index
from process import memory_mb

from mcl_clip.core import distributed
from mcl_clip.core.distributed import (
    barrier,
    gather_objects,
    is_main,
    on_main,
    random_words_between,
    sample_of_permutation,
)
from mcl_clip.core.errors import run_program
from mcl_clip.data.batch_plan import BatchPlan
from mcl_clip.data.index import RULE, ShardIndex
from mcl_clip.data.index_file import write_parts
from mcl_clip.data.scanning import Part as ScannedPart
from mcl_clip.data.storage import load_numbers, save_array
from mcl_clip.stages.kmeans import CHUNK_ROWS, ReadRows, spherical_kmeans
from mcl_clip.stages.pseudo_labels import PseudoLabels, group_labels
from mcl_clip.stages.shared_metric import fit_shared_metric, project_rows

Part = Literal["index", "held_out", "labels", "groups", "plan", "metric", "projection", "clusters"]
PARTS: tuple[Part, ...] = ("index", "held_out", "labels", "groups", "plan", "metric", "projection", "clusters")
CLUSTERS = 100  # of each of two stages
ROWS_PER_SHARD = 10_000
BATCH = 4096
BLOCK_ROWS = 1 << 20
SCANNED_ROWS = 4_000_000  # which an index repeats; whole shards
SAMPLE_S = 0.01  # between two looks at the memory


def scale(
    *,
    folder: Path | None = None,
    rows: tuple[int, ...] = (1_000_000,),
    processes: tuple[int, ...] = (1, 4),
    parts: tuple[Part, ...] = PARTS,
    dim: int = 512,
) -> None:
    """Measure all cases.

    Args:
        folder: where inputs and results are written for the time of the measurement.
        rows: numbers of rows.
        processes: numbers of processes, of one thread each.
        parts: what is measured; the plan needs the groups.
        dim: of the features.
    """
    for count in rows:
        for size in processes:
            with TemporaryDirectory(dir=folder) as scratch:
                write_inputs(Path(scratch), count, parts)
                context = get_context("spawn")
                ranks = [
                    context.Process(target=run_rank, args=(Path(scratch), number, size, count, parts, dim))
                    for number in range(size)
                ]
                for process in ranks:
                    process.start()
                for process in ranks:
                    process.join()


def write_inputs(folder: Path, rows: int, parts: tuple[Part, ...]) -> None:
    """Write what `parts` need: scanned rows; the labels of one stage, the clusters of the next, each row's shard."""
    if "index" in parts:
        write_index(folder / "scanned.arrow", min(rows, SCANNED_ROWS))
    if not {"labels", "groups", "plan"}.intersection(parts):
        return

    def blocks(make: Callable[[int, int], np.ndarray]) -> Iterator[np.ndarray]:
        return (make(start, min(start + BLOCK_ROWS, rows)) for start in range(0, rows, BLOCK_ROWS))

    for name, dtype in (("before", np.int64), ("clusters", np.int32)):
        words = blocks(lambda a, b, name=name: random_words_between(a, b, name) % np.uint64(CLUSTERS))  # type: ignore[misc]
        save_array(folder / f"{name}.npy", dtype, (rows,), words)
    save_array(folder / "shard_of.npy", np.int32, (rows,), blocks(lambda a, b: np.arange(a, b) // ROWS_PER_SHARD))


def run_rank(folder: Path, number: int, size: int, rows: int, parts: tuple[Part, ...], dim: int) -> None:
    """Measure the parts as one rank of a job."""
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(number)  # of one node
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=number, world_size=size)
    works = make_parts(folder, rows, dim)
    for part in parts:
        barrier()
        found = gather_objects(measure(works[part]))
        record = {
            "part": part,
            "rows": rows,
            "processes": size,
            "seconds": round(max(one["seconds"] for one in found), 2),
            "cpu_seconds": round(sum(one["cpu_seconds"] for one in found), 2),
            "longest_wait_s": round(max(one["waited"] for one in found), 2),
            "peak_mb_of_a_process": round(max(one["peak_mb"] for one in found)),
            "peak_mb_of_the_node": round(sum(one["peak_mb"] for one in found)),
            "cores": os.cpu_count(),
            "load": round(os.getloadavg()[0], 1),
        }
        if part in ("metric", "projection", "clusters"):
            record["dim"] = dim
        if number == 0:
            print(json.dumps(record), flush=True)


def make_parts(folder: Path, rows: int, dim: int) -> dict[Part, Callable[[], object]]:
    """Return what is measured, by name, as the phases of a run do it."""
    generator = np.random.default_rng(0)
    chunk = [generator.normal(size=(CHUNK_ROWS, dim)) for _ in range(2)]
    chunk[1] += chunk[0]  # what both sides share
    sides = [(side / np.linalg.norm(side, axis=1, keepdims=True)).astype(np.float16) for side in chunk]
    image, text = (_repeated(side) for side in sides)
    kept: dict[str, Any] = {}

    def index() -> None:
        path = folder / "index.arrow"
        on_main(lambda: write_parts(path, scanned_parts(folder, rows), RULE))
        _ = ShardIndex.load(path, check=is_main()).digest
        barrier()
        path.unlink(missing_ok=True)

    def labels() -> None:
        before, clusters = (load_numbers(folder / f"{name}.npy", rows) for name in ("before", "clusters"))

        def refined(start: int) -> np.ndarray:
            part = PseudoLabels(values=before[start : start + CHUNK_ROWS], radix=(CLUSTERS,))
            values: np.ndarray = part.refine(clusters[start : start + CHUNK_ROWS], CLUSTERS).values
            return values

        save_array(folder / "labels.npy", np.int64, (rows,), map(refined, range(0, rows, CHUNK_ROWS)))
        made = PseudoLabels(values=load_numbers(folder / "labels.npy", rows), radix=(CLUSTERS, CLUSTERS))
        made.summary()

    def groups() -> None:
        values = load_numbers(folder / "labels.npy", rows)
        found = group_labels(PseudoLabels(values=values, radix=(CLUSTERS, CLUSTERS)), min_group_size=BATCH // 8)
        save_array(folder / "groups.npy", np.int32, (rows,), [found.group_of])

    def plan() -> None:
        shard_of, group_of = (load_numbers(folder / f"{name}.npy", rows) for name in ("shard_of", "groups"))
        options: dict[str, Any] = {"global_batch_size": BATCH, "seed": 0, "stage": 1, "cache_dir": folder}
        BatchPlan(shard_of=shard_of, groups=group_of, **options).epoch_rows(0)

    def metric() -> None:
        kept["metric"] = fit_shared_metric(image, text, rows, folder=folder)[0]

    return {
        "index": index,
        "held_out": lambda: sample_of_permutation(rows, 1024, 0, "held out"),
        "labels": lambda: on_main(labels),
        "groups": lambda: on_main(groups),
        "plan": plan,
        "metric": metric,
        "projection": lambda: project_rows(image, rows, kept["metric"], folder / "image"),
        "clusters": lambda: spherical_kmeans(image, num_rows=rows, num_clusters=CLUSTERS, name=("scale",)),
    }


def scanned_parts(folder: Path, rows: int) -> list[ScannedPart]:
    """Return the rows of shards as they are kept while shards are scanned."""
    scanned, parts = ShardIndex.load(folder / "scanned.arrow", check=False), list[ScannedPart]()
    while len(parts) < -(-rows // ROWS_PER_SHARD):
        shard, table = scanned._part(len(parts) % len(scanned.shards))
        parts.append((replace(shard, url=f"/{len(parts)}.tar"), table))
    return parts


def _repeated(side: np.ndarray) -> ReadRows:
    """Return a reader of chunks that are all the same."""
    return lambda start, stop: side[: stop - start]


def measure(work: Callable[[], object]) -> dict[str, float]:
    """Return wall, CPU and waiting seconds, and the growth of anonymous memory in 10^6 bytes."""
    before, peak, is_done, waited = memory_mb("RssAnon"), [memory_mb("RssAnon")], threading.Event(), [0.0]
    wait = distributed._wait_for

    def watch() -> None:
        while not is_done.wait(SAMPLE_S):
            peak[0] = max(peak[0], memory_mb("RssAnon"))

    def timed_wait(store: Any, key: str) -> None:
        started = time.perf_counter()
        wait(store, key)
        waited[0] = max(waited[0], time.perf_counter() - started)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    distributed._wait_for = timed_wait
    started, cpu = time.perf_counter(), time.process_time()
    try:
        work()
    finally:
        distributed._wait_for = wait
        is_done.set()
        thread.join()
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu,
        "waited": waited[0],
        "peak_mb": peak[0] - before,
    }


if __name__ == "__main__":
    run_program(lambda: tyro.cli(scale, description=__doc__))
