"""Measure retrieval scores from given features: time, memory and recalls beside CLIP_benchmark's.

    python benchmarks/retrieval.py --clip-benchmark-python PEER/bin/python
    python benchmarks/retrieval.py --growth

PEER is an environment with `clip_benchmark`. Random features of 5,000 images and 25,000 captions, five of each image,
of 512 dimensions. Each round starts one process per side, alternating, on the same features. CLIP_benchmark gets them
at unit length, as its loop over batches leaves them, and does what its `evaluate` does from there on: all scores, the
matrix of right pairs, `recall_at_k` in batches of 64 for k of 1, 5 and 10 both ways. Ours gets them as generated and
computes, besides these six recalls, their means, reciprocal and median ranks, and the rank and the outcome of every
query. Prints a JSON line: seconds and CPU seconds, growth of the resident memory at its peak, the recalls, and the
medians of the ratios of each round. Recalls can differ where scores are equal, or closer than float32 can tell: ours
adds in float64 and counts ties against the model, `topk` takes whichever it finds.

With `--growth`, ours alone with 1,000, 5,000 and 25,000 images: the memory should stay, the time grow with the number
of pairs. Linux only.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from mcl_clip.core.distributed import count_cores, torch_generator
from mcl_clip.core.errors import UserError, run_program

CAPTIONS_PER_IMAGE = 5
AGREEMENT = 0.15  # of a caption with its image: about half of the images are found
GROWTH_IMAGES = (1_000, 5_000, 25_000)
FIGURES = ("seconds", "cpu_seconds", "peak_growth_mb")
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "1000000"}  # freed memory leaves the process, so that its peak is what it used
MEASURE = """
import json, sys, time
from pathlib import Path
import numpy as np, torch
{score}
def memory_mb(name):
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024 / 1e6
folder = Path(sys.argv[1])
torch.set_num_threads(int(sys.argv[2]))
images, texts, of = (np.load(folder / (name + ".npy")) for name in ("images", "texts", "of"))
images, texts = prepare(torch.from_numpy(images)), prepare(torch.from_numpy(texts))
few = of < 64
score(images[:64], texts[few], of[few])  # loads what loads late
Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
before, started, started_cpu = memory_mb("VmRSS"), time.perf_counter(), time.process_time()
recalls = score(images, texts, of)
found = {{"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - started_cpu}}
found["peak_growth_mb"] = memory_mb("VmHWM") - before
print(json.dumps({{**found, "recalls": recalls, "versions": {{"torch": torch.__version__, **versions}}}}))
"""
OURS = """
from mcl_clip.eval.retrieval import recall_metrics
versions = {}
prepare = lambda features: features
def score(images, texts, of):
    metrics, outcomes = recall_metrics(images, texts, of)
    return {name: value for name, value in metrics.items() if "retrieval_recall@" in name}
"""
PEER = """
from importlib.metadata import version
from clip_benchmark.metrics.zeroshot_retrieval import batchify, recall_at_k
versions = {"clip_benchmark": version("clip_benchmark")}
prepare = lambda features: torch.nn.functional.normalize(features, dim=-1)
def score(images, texts, of):
    scores = texts @ images.t()
    positive = torch.zeros_like(scores, dtype=bool)
    positive[torch.arange(len(scores)), of.tolist()] = True
    recalls = {}
    for k in (1, 5, 10):
        for side, x, y in (("image", scores, positive), ("text", scores.T, positive.T)):
            found = batchify(recall_at_k, x, y, 64, "cpu", k=k)
            recalls[f"{side}_retrieval_recall@{k}"] = (found > 0).float().mean().item()
    return recalls
"""


def retrieval(
    *,
    clip_benchmark_python: Path | None = None,
    growth: bool = False,
    images: int = 5_000,
    dim: int = 512,
    threads: int = 1,
    rounds: int = 3,
) -> None:
    """Measure both sides, or how ours grows.

    Args:
        clip_benchmark_python: interpreter of the environment with clip_benchmark.
        growth: measure ours alone at three sizes.
        images: how many, with five captions each.
        dim: width of the features.
        threads: of either side.
        rounds: runs of each side, in turn.
    """
    if growth:
        for size in GROWTH_IMAGES:
            print(json.dumps(_grown(size, dim, threads, rounds)), flush=True)
        return
    if clip_benchmark_python is None:
        raise UserError("there is nothing to compare with; give --clip-benchmark-python PEER/bin/python, or --growth")
    sides = {"ours": (sys.executable, OURS), "clip_benchmark": (str(clip_benchmark_python), PEER)}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder), images, dim)
        for _ in range(rounds):
            for name, (python, score) in sides.items():
                found[name].append(run(python, score, Path(folder), threads))
    recalls = {name: runs[0]["recalls"] for name, runs in found.items()}
    record = {
        **_sizes(images, dim, threads, rounds),
        **{
            figure: {name: round(statistics.median(run[figure] for run in runs), 2) for name, runs in found.items()}
            for figure in FIGURES
        },
        "clip_benchmark_by_ours": {
            figure: round(statistics.median(b[figure] / a[figure] for a, b in zip(*found.values(), strict=True)), 1)
            for figure in FIGURES
        },
        "recalls": recalls,
        "difference_in_hits": {
            name: round(abs(value - recalls["clip_benchmark"][name]) * queries_of(name, images))
            for name, value in recalls["ours"].items()
        },
        "versions": {name: runs[0]["versions"] for name, runs in found.items()},
    }
    print(json.dumps(record))


def queries_of(name: str, images: int) -> int:
    """How many queries a recall is the mean over: images are found by captions."""
    return images * CAPTIONS_PER_IMAGE if name.startswith("image_retrieval") else images


def draw(folder: Path, images: int, dim: int) -> None:
    """Write drawn features and the image of each caption."""
    generator = torch_generator("retrieval benchmark", images, dim)
    drawn = torch.randn(images, dim, generator=generator)
    of = torch.arange(images).repeat_interleave(CAPTIONS_PER_IMAGE)
    texts = torch.randn(len(of), dim, generator=generator).add_(drawn[of], alpha=AGREEMENT)
    for name, values in (("images", drawn), ("texts", texts), ("of", of)):
        np.save(folder / f"{name}.npy", values.numpy())


def run(python: str, score: str, folder: Path, threads: int) -> dict[str, Any]:
    """Run one side in a process of its own and return its results."""
    command = [python, "-c", MEASURE.format(score=score), str(folder), str(threads)]
    done = subprocess.run(command, env={**os.environ, **GIVE_BACK}, check=True, stdout=subprocess.PIPE)
    record: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return record


def _grown(images: int, dim: int, threads: int, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder), images, dim)
        runs = [run(sys.executable, OURS, Path(folder), threads) for _ in range(rounds)]
    medians = {figure: statistics.median(run[figure] for run in runs) for figure in FIGURES}
    per_pair = medians["cpu_seconds"] / (images * images * CAPTIONS_PER_IMAGE)
    return {
        **_sizes(images, dim, threads, rounds),
        **{figure: round(value, 2) for figure, value in medians.items()},
        "cpu_ns_per_pair": round(per_pair * 1e9, 1),
        "peak_growth_mb_by_features": round(
            medians["peak_growth_mb"] / (images * (1 + CAPTIONS_PER_IMAGE) * dim * 4 / 1e6), 3
        ),
        "versions": {"torch": torch.__version__},
    }


def _sizes(images: int, dim: int, threads: int, rounds: int) -> dict[str, Any]:
    return {
        "images": images,
        "texts": images * CAPTIONS_PER_IMAGE,
        "dim": dim,
        "threads": threads,
        "rounds": rounds,
        "cores": count_cores(),
        "processor": processor(),
    }


def processor() -> str:
    """Its name as the kernel gives it."""
    lines = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return lines[0].split(":", 1)[1].strip() if lines else platform.machine()


if __name__ == "__main__":
    run_program(lambda: tyro.cli(retrieval, description=__doc__))
