"""Measure time, size and memory of the report of a large run.

    python benchmarks/report.py --rows 1000000

Writes the artifacts of a run of two stages in a temporary folder: shards of 10,000 small images with captions (links
to one file), features and clusters around random centers, ten thousand records of training. Each size runs in a
process of its own. Prints a JSON line per size: seconds, size of the page in MB, and the peak of the resident set in
MB, imports included. There are no evaluation sets. Linux only.
"""

import io
import json
import os
import resource
import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import tyro
from PIL import Image
from safetensors.numpy import save_file

from mcl_clip.core.distributed import random_words
from mcl_clip.core.errors import run_program
from mcl_clip.core.files import DONE, append_jsonl, write_json
from mcl_clip.data.features import part_name
from mcl_clip.data.index import INDEX_NAME, ShardIndex
from mcl_clip.data.writing import Pair, write_pairs
from mcl_clip.report.page import write_report

ROWS_PER_SHARD = 10_000
PICTURE_PX = 64
RECORDS = 10_000
PHASES = ("train", "embed", "cluster", "labels")
WORDS = (
    "red",
    "green",
    "blue",
    "dog",
    "cat",
    "house",
    "tree",
    "snow",
    "water",
    "man",
    "woman",
    "small",
    "large",
    "new",
)


def measure(
    *,
    rows: tuple[int, ...] = (10_000, 100_000, 1_000_000),
    dim: int = 512,
    clusters: int = 256,
    folder: Path | None = None,
) -> None:
    """Measure reports of runs of several sizes.

    Args:
        rows: pairs of each run, multiples of 10,000.
        dim: dimensions of the features; a row takes 4 bytes a dimension and stage on disk.
        clusters: of each stage.
        folder: where temporary files go.
    """
    context = get_context("spawn")
    for count in rows:
        with TemporaryDirectory(dir=folder) as temporary:
            make_run(Path(temporary), count, dim, clusters)
            with context.Pool(1) as pool:
                seconds, size_mb, memory_mb = pool.apply(cost, (Path(temporary) / "run",))
        record = {"rows": count, "dim": dim, "clusters": clusters, "seconds": round(seconds, 2)}
        print(json.dumps({**record, "size_mb": round(size_mb, 2), "peak_memory_mb": round(memory_mb)}), flush=True)


def cost(run: Path) -> tuple[float, float, float]:
    """Seconds, size of the page and peak memory, both in 10^6 bytes."""
    started = time.perf_counter()
    page = write_report(run)
    seconds = time.perf_counter() - started
    return seconds, page.stat().st_size / 1e6, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def make_run(folder: Path, rows: int, dim: int, clusters: int) -> None:
    """Write the artifacts of two stages over `rows` pairs."""
    index = _index(folder, rows // ROWS_PER_SHARD)
    run = folder / "run"
    index.save(run / "index" / INDEX_NAME)
    stages = [{"train": {"steps": RECORDS, "global_batch_size": 1024}, "cluster": {"num_clusters": clusters}}] * 2
    write_json(run / "config.json", {"stages": stages, "seed": 0, "combine": "mean_cosine", "tower": {}})
    for s in range(2):
        for phase in PHASES:
            (run / f"stage-{s}" / phase).mkdir(parents=True)
            write_json(run / f"stage-{s}" / phase / DONE, {})
        centres = _unit(_floats(clusters * dim, "centres", s).reshape(clusters, dim))
        assignments = (random_words(rows, "clusters", s) % clusters).astype(np.int32)
        cluster = run / f"stage-{s}" / "cluster"
        np.save(cluster / "assignments-image.npy", assignments)
        save_file({"image": centres}, cluster / "centroids.safetensors")
        for number in range(rows // ROWS_PER_SHARD):
            part = slice(number * ROWS_PER_SHARD, (number + 1) * ROWS_PER_SHARD)
            _save_part(run / f"stage-{s}" / "embed" / part_name(number), centres[assignments[part]], (s, number))
        for step in range(1, RECORDS + 1):
            append_jsonl(run / f"stage-{s}" / "train" / "metrics.jsonl", _record(step))


def _index(folder: Path, shards: int) -> ShardIndex:
    write_pairs(_pairs(), folder / "written", samples_per_shard=ROWS_PER_SHARD, total=ROWS_PER_SHARD)
    (folder / "shards").mkdir()
    paths = [folder / "shards" / f"{number:06d}.tar" for number in range(shards)]
    for path in paths:
        os.link(folder / "written" / "000000.tar", path)
    return ShardIndex.build([str(path) for path in paths])


def _pairs() -> Iterator[Pair]:
    draws = random_words(ROWS_PER_SHARD * 12, "pairs").reshape(ROWS_PER_SHARD, 12)
    for number, draw in enumerate(draws):
        file = io.BytesIO()
        colours = (draw[:4, None] >> np.array([0, 8, 16], np.uint64)).astype(np.uint8).reshape(2, 2, 3)
        Image.fromarray(colours).resize((PICTURE_PX, PICTURE_PX)).save(file, "JPEG")
        words = " ".join(WORDS[int(word) % len(WORDS)] for word in draw)
        yield Pair(key=f"{number:06d}", image=file.getvalue(), captions=[words])


def _save_part(path: Path, centres: np.ndarray, name: tuple[int, int]) -> None:
    """Features near the centres of their clusters, the same noise in every part of a stage."""
    columns: dict[str, np.ndarray] = {}
    for side in ("image", "text"):
        noise = _floats(centres.size, "noise", name[0], side).reshape(centres.shape)
        columns[side] = _unit(centres + noise / np.sqrt(centres.shape[1])).astype(np.float16)
        columns[f"{side}_norm"] = np.ones(len(centres), np.float32)
        columns[f"{side}_id"] = np.arange(len(centres), dtype=np.int64)
    save_file(
        {**columns, "ok": np.ones(len(centres), bool)},
        path,
        metadata={"counts": '{"bad_samples": [], "full_captions": 0}'},
    )


def _floats(count: int, *name: str | int) -> np.ndarray:
    """Numbers between -1 and 1."""
    found: np.ndarray = (random_words(count, *name) >> np.uint64(40)).astype(np.float32) / 2**23 - 1
    return found


def _unit(rows: np.ndarray) -> np.ndarray:
    unit: np.ndarray = torch.nn.functional.normalize(torch.from_numpy(rows)).numpy()
    return unit


def _record(step: int) -> dict[str, float]:
    constant = {"lr": 1e-3, "logit_scale": 14.0, "samples_per_s": 900.0, "negatives_per_row": 1000.0, "duplicates": 3.0}
    counted = {"samples_seen": 1024 * step, "seconds": float(step), "rows_without_weight": 0.0}
    return {"step": step, "loss": 5.0 / step, **constant, **counted}


if __name__ == "__main__":
    run_program(lambda: tyro.cli(measure))
