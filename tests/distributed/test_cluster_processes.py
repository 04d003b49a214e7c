"""For given features, clusters do not depend on the number of processes."""

import time
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch

from mcl_clip.core.distributed import rank, world_size
from mcl_clip.stages import kmeans as cluster
from mcl_clip.stages import shared_metric
from mcl_clip.stages.kmeans import Clustering, spherical_kmeans
from mcl_clip.stages.shared_metric import fit_shared_metric, project_rows

CHUNK = 128  # 8 chunks: two for each of four processes


def planted(noise: float = 0.05) -> tuple[np.ndarray, np.ndarray]:
    """1,000 unit features around 6 directions, every 50th row a bad sample, and the direction of each."""
    draw = np.random.default_rng(1)
    truth = draw.integers(0, 6, 1000)
    features = np.linalg.qr(draw.normal(size=(24, 24)))[0][truth] + noise * draw.normal(size=(1000, 24))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    features[::50] = 0
    return features.astype(np.float16), truth


def fit(
    noise: float, *, clusters: int = 6, far_centroids: int = 0, threads: int = 1, projected: Path | None = None
) -> Clustering:
    features, _ = planted(noise)
    start = cluster._fit_sample

    def with_empty_clusters(*args) -> torch.Tensor:
        centroids = start(*args)
        if far_centroids:  # close to no row
            centroids[:far_centroids] = torch.nn.functional.normalize(-centroids.sum(0), dim=0)
        return centroids

    torch.set_num_threads(threads)
    try:
        with (
            patch.object(cluster, "CHUNK_ROWS", CHUNK),
            patch.object(shared_metric, "CHUNK_ROWS", CHUNK),
            patch.object(shared_metric, "PART_ROWS", CHUNK),
            patch.object(cluster, "_fit_sample", with_empty_clusters),
        ):
            plain: cluster.ReadRows = lambda first, last: features[first:last]  # noqa: E731
            rows = plain
            if projected:
                other: cluster.ReadRows = lambda first, last: planted(1.1)[0][first:last]  # noqa: E731
                folder = projected.with_name(f"{projected.name}-{world_size()}")
                metric, _ = fit_shared_metric(plain, other, 1000, folder=folder)
                rows = project_rows(plain, 1000, metric, folder / "image")
            return spherical_kmeans(rows, num_rows=1000, num_clusters=clusters, name=(0, "test"))
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize(
    "make",
    [
        partial(fit, 0.05),
        partial(fit, 1.0, clusters=9),
        partial(fit, 0.05, far_centroids=2),
        partial(fit, 1.0, clusters=9, projected=Path("projected")),
    ],
)
def test_clusters_are_bit_equal_at_any_number_of_processes(pool, make, tmp_path):
    if projected := make.keywords.get("projected"):
        make = partial(make, projected=tmp_path / projected)
    one = pool.run(call, 1, make)[0]
    for size in (2, 4):
        for found in pool.run(call, size, make):
            np.testing.assert_array_equal(found.assignments, one.assignments)
            assert found.centroids.tobytes() == one.centroids.tobytes()
            assert found.trace == one.trace


def call(make) -> Clustering:
    return make()


@pytest.mark.parametrize("far_centroids", [0, 1])
def test_planted_clusters_are_found_and_empty_ones_start_anew(far_centroids):
    found, (_, truth) = fit(0.05, far_centroids=far_centroids), planted(0.05)
    good = np.arange(1000) % 50 != 0
    assert len({*zip(truth[good], found.assignments[good], strict=True)}) == 6
    assert (found.assignments[~good] == 0).all()
    assert found.trace[0]["empty_clusters"] == far_centroids
    assert found.trace[-1]["empty_clusters"] == 0


def test_threads_change_nothing():
    one, two = fit(1.0, clusters=3), fit(1.0, clusters=3, threads=2)
    assert one.centroids.tobytes() == two.centroids.tobytes()


def count_work() -> tuple[int, int]:
    """The rows that this process reads for the sample, and the starts that it fits on it."""
    read, started, plus_plus = [], [], cluster._plus_plus

    def counted(features, num_clusters, generators):
        started.extend(generators)
        return plus_plus(features, num_clusters, generators)

    def rows(first, last):
        read.append(last - first)
        return planted()[0][first:last]

    with patch.object(cluster, "CHUNK_ROWS", CHUNK), patch.object(cluster, "_plus_plus", counted):
        cluster._fit_sample(rows, 1000, 6, (0, "test"), 3, 500)
    return sum(read), len(started)


def project_late(path: Path) -> tuple[int, np.ndarray]:
    """Project the planted rows, process 1 late; return how many rows this process projected, and all of them."""
    features, read = planted(1.1)[0], []

    def rows(first, last):
        time.sleep(0.05 * rank())
        read.append(last - first)
        return features[first:last]

    with patch.object(shared_metric, "CHUNK_ROWS", CHUNK), patch.object(shared_metric, "PART_ROWS", CHUNK):
        metric, _ = fit_shared_metric(rows, rows, 1000)
        read.clear()
        projected = project_rows(rows, 1000, metric, path)(0, 1000).copy()
    return sum(read), projected


def test_processes_share_the_projection_and_wait_for_each_other(pool, tmp_path):
    ((everything, alone),) = pool.run(project_late, 1, tmp_path / "one")
    (first, mine), (second, others) = pool.run(project_late, 2, tmp_path / "two")
    assert everything == first + second == 1000  # nothing twice
    np.testing.assert_array_equal(mine, alone)
    np.testing.assert_array_equal(others, alone)


def test_processes_share_the_sample_and_the_starts(pool):
    assert pool.run(count_work, 2) == [(512, 2), (488, 1)]
    assert [starts for _, starts in pool.run(count_work, 4)] == [1, 1, 1, 0]
