"""Measure spherical k-means beside scikit-learn's and faiss's on the same features, and how its cost grows.

    python benchmarks/kmeans.py --peer-python PEER/bin/python
    python benchmarks/kmeans.py --growth

PEER is an environment with `scikit-learn faiss-cpu numpy`. Random features: float16, unit, around 400 random
directions, with noise as long as the direction. Peers get them in float32, converted before the clock runs. In each
round every side runs once, in a process of its own, in turn, with as many threads and as many starts:

- ours: `spherical_kmeans` as the toolkit calls it;
- scikit-learn: `KMeans(K, n_init=STARTS)` with its own stopping rule, on Euclidean distance;
- faiss: `Kmeans(dim, K, spherical=True, nredo=STARTS, max_points_per_centroid=N)`, its own 25 iterations, and the
  assignment of all rows.

Objectives are computed from the labels, in one way for all: the mean of 1 - cosine with the mean direction of the
cluster. `ratio` is the peer's time over ours, the median over rounds; `until_as_good` counts of faiss's time only what
it took until its objective was within 0.1 % of ours, had it known when to stop, for each round (null: it never was).
Where other jobs hold a core, threads that wait by spinning cost many times the work: OMP_WAIT_POLICY=PASSIVE in the
environment holds for all sides, and is printed. Prints a JSON line for each K and peer.

With --growth: processor time for each row and pass, of ten passes that follow the first one, the least of three fits,
and the peak of resident memory beyond the features, over rows (of 64 dimensions, K = 100) and over K (10^5 rows).
Linux only.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
import tyro
from jaxtyping import Float16
from process import memory_mb

from mcl_clip.core.distributed import count_cores, random_words, torch_generator
from mcl_clip.core.errors import UserError, run_program
from mcl_clip.stages.kmeans import Clustering, spherical_kmeans

DIRECTIONS, DRAWN_ROWS = 400, 16_384
CLOSE = 1.001
ONE_SIDE, GROWTH = "one-side", "growth"
GROWTH_DIM, GROWTH_ROWS, GROWTH_CLUSTERS = 64, (10_000, 100_000, 1_000_000), (1, 10, 100, 1000)
GROWTH_PASSES, GROWTH_REPEATS = 10, 3
PEER = """
import json, sys, time
import numpy as np
peer, path, out, clusters, starts, seed = *sys.argv[1:4], *map(int, sys.argv[4:])
features = np.load(path).astype(np.float32)
trace = []
if peer == "faiss":
    import faiss
    version = faiss.__version__
    wall, cpu = time.perf_counter(), time.process_time()
    made = faiss.Kmeans(
        features.shape[1], clusters, spherical=True, nredo=starts, seed=seed + 1, max_points_per_centroid=len(features)
    )
    made.train(features)
    labels = made.index.search(features, 1)[1][:, 0]
    for step in made.iteration_stats:
        trace.append([1 - float(step["obj"]) / len(features), step["time"]])
else:
    import sklearn
    from sklearn.cluster import KMeans
    version = sklearn.__version__
    wall, cpu = time.perf_counter(), time.process_time()
    labels = KMeans(clusters, n_init=starts, random_state=seed).fit(features).labels_
seconds = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
np.save(out, labels.astype(np.int32))
print(json.dumps({"seconds": seconds, "trace": trace, "version": version}))
"""


def compare(
    *,
    peer_python: Path | None = None,
    peers: tuple[Literal["scikit-learn", "faiss"], ...] = ("scikit-learn", "faiss"),
    rows: int = 200_000,
    dim: int = 512,
    clusters: tuple[int, ...] = (10, 100),
    starts: int = 8,
    threads: int = 0,
    rounds: int = 3,
    growth: bool = False,
) -> None:
    """Measure all sides.

    Args:
        peer_python: interpreter of the environment with scikit-learn and faiss.
        peers: which of them.
        rows: features.
        dim: their width.
        clusters: values of K.
        starts: of each side.
        threads: of each side; 0 means all cores.
        rounds: times that all sides run in turn.
        growth: measure how cost grows instead, without peers.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads or count_cores())}
    with TemporaryDirectory() as folder:
        if growth:
            measure_growth(Path(folder), environment)
            return
        if peer_python is None:
            raise UserError("the peers need an interpreter; name one with --peer-python, or use --growth")
        features = Path(folder) / "features.npy"
        np.save(features, draw_features(rows, dim))
        for number in clusters:
            arguments = [str(features), str(Path(folder) / "labels.npy"), str(number), str(starts)]
            sides: dict[str, list[str]] = {
                "ours": [sys.executable, __file__, ONE_SIDE, *arguments],
                **{str(peer): [str(peer_python), "-c", PEER, peer, *arguments] for peer in peers},
            }
            runs: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
            for seed in range(rounds):
                for name, command in sides.items():
                    run = run_side([*command, str(seed)], environment)
                    runs[name].append({**run, "objective": objective_of(features, Path(arguments[1]))})
            for peer in peers:
                record = {"rows": rows, "dim": dim, "clusters": number, "starts": starts, "peer": peer}
                record |= against(runs["ours"], runs[peer]) | machine(environment)
                print(json.dumps(record), flush=True)


def against(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, Any]:
    """Median seconds and objective of both sides, and the median of the ratios of each round."""
    sides = {"ours": ours, "peer": theirs}
    pairs = list(zip(ours, theirs, strict=True))
    ratios = {
        clock: [peer["seconds"][clock] / mine["seconds"][clock] for mine, peer in pairs] for clock in ("wall", "cpu")
    }
    record: dict[str, Any] = {
        **{
            f"{clock}_s": {
                name: round(statistics.median(run["seconds"][clock] for run in runs), 2) for name, runs in sides.items()
            }
            for clock in ratios
        },
        "objective": {
            name: round(statistics.median(run["objective"] for run in runs), 6) for name, runs in sides.items()
        },
        "ratio": {clock: round(statistics.median(values), 2) for clock, values in ratios.items()},
    }
    if theirs[0]["trace"]:
        shares = [share_until_as_good(peer["trace"], CLOSE * mine["objective"]) for mine, peer in pairs]
        record["until_as_good"] = {
            clock: [round(ratio * share, 2) if share else None for ratio, share in zip(values, shares, strict=True)]
            for clock, values in ratios.items()
        }
    record["peer_version"] = theirs[0]["version"]
    return record


def share_until_as_good(trace: list[list[float]], objective: float) -> float | None:
    """Return the share of the total time after which the objective was reached."""
    reached = [seconds for value, seconds in trace if value <= objective]
    return reached[0] / trace[-1][1] if reached else None


def objective_of(features: Path, labels: Path) -> float:
    """Mean of 1 - cosine with the mean direction of the own cluster."""
    rows, numbers = np.load(features, mmap_mode="r"), np.load(labels)
    sums = np.zeros((int(numbers.max()) + 1, rows.shape[1]))
    for start in range(0, len(rows), DRAWN_ROWS):
        np.add.at(sums, numbers[start : start + DRAWN_ROWS], rows[start : start + DRAWN_ROWS].astype(np.float64))
    return float(1 - np.linalg.norm(sums, axis=1).sum() / len(rows))


def draw_features(rows: int, dim: int) -> Float16[np.ndarray, "rows dim"]:
    """Draw unit features around random directions, with noise of the same norm as the direction."""
    centres = torch.randn(DIRECTIONS, dim, generator=torch_generator("kmeans", "directions"))
    centres = torch.nn.functional.normalize(centres)
    place = torch.from_numpy((random_words(rows, "kmeans", "place") % DIRECTIONS).astype(np.int64))
    features = np.empty((rows, dim), np.float16)
    for start in range(0, rows, DRAWN_ROWS):
        some = place[start : start + DRAWN_ROWS]
        noise = torch.randn(len(some), dim, generator=torch_generator("kmeans", "noise", start)) / dim**0.5
        features[start : start + DRAWN_ROWS] = torch.nn.functional.normalize(centres[some] + noise).numpy()
    return features


def run_side(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """Run one side and parse the last line that it prints."""
    run = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def machine(environment: dict[str, str]) -> dict[str, Any]:
    """Describe the machine and the versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cores": count_cores(),
        "threads": int(environment["OMP_NUM_THREADS"]),
        "waiting": environment.get("OMP_WAIT_POLICY", "default"),
        "processor": names[0] if names else platform.machine(),
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
    }


def measure_growth(folder: Path, environment: dict[str, str]) -> None:
    """Print a line for each number of rows, and for each K."""
    sizes = [*((rows, 100) for rows in GROWTH_ROWS), *((GROWTH_ROWS[1], number) for number in GROWTH_CLUSTERS)]
    for rows, number in sizes:
        features = folder / f"{rows}.npy"
        if not features.exists():
            np.save(features, draw_features(rows, GROWTH_DIM))
        found = run_side([sys.executable, __file__, GROWTH, str(features), str(number)], environment)
        record = {"rows": rows, "dim": GROWTH_DIM, "clusters": number, "starts": 1} | found
        print(json.dumps(record | machine(environment)), flush=True)


def fit(
    features: Float16[np.ndarray, "rows dim"], clusters: int, **options: Any
) -> tuple[dict[str, float], Clustering]:
    """Fit, and return the result with its seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = spherical_kmeans(
        lambda start, stop: features[start:stop], num_rows=len(features), num_clusters=clusters, **options
    )
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}, found


def measure(path: str, out: str, clusters: int, starts: int, seed: int) -> None:
    """Our side, in this process."""
    seconds, found = fit(np.load(path), clusters, num_starts=starts, name=("kmeans", seed))
    np.save(out, found.assignments.astype(np.int32))
    print(json.dumps({"seconds": seconds, "trace": []}))


def measure_one_size(path: str, clusters: int) -> None:
    """Cost of the sample with the first pass, and of each further pass, in this process."""
    features = np.load(path)
    fit(features[: clusters + 1000], clusters, num_starts=1, name=("warm",), max_passes=1)  # loads what loads late
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = memory_mb("VmRSS")
    options = {"num_starts": 1, "name": ("kmeans",), "tolerance": -1.0}
    first, all_passes = (
        min(fit(features, clusters, max_passes=passes, **options)[0]["cpu"] for _ in range(GROWTH_REPEATS))
        for passes in (0, GROWTH_PASSES)
    )
    record = {
        "sample_and_first_pass_cpu_s": round(first, 3),
        "ns_per_row_and_pass": round((all_passes - first) / GROWTH_PASSES / len(features) * 1e9, 1),
        "features_mb": round(features.nbytes / 1e6, 1),
        "peak_beyond_features_mb": round(memory_mb("VmHWM") - before, 1),
    }
    print(json.dumps(record))


if __name__ == "__main__":
    if sys.argv[1:2] == [ONE_SIDE]:
        measure(sys.argv[2], sys.argv[3], *(int(text) for text in sys.argv[4:]))
    elif sys.argv[1:2] == [GROWTH]:
        measure_one_size(sys.argv[2], int(sys.argv[3]))
    else:
        run_program(lambda: tyro.cli(compare, description=__doc__))
