"""Spherical k-means over the features of one stage.

For given features the result does not depend on the number of processes: chunks of rows lie on a fixed grid, and their
sums are exact. Float16 features are multiples of 2^-24, so a float64 sum of up to 2^28 of them is exact in any order;
processes add the sums as integers.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float16, Float32, Float64, Int64, Shaped
from torch import Tensor

from mcl_clip.distributed import (
    Name,
    all_reduce_sum,
    barrier,
    gather_objects,
    is_main,
    on_main,
    permutation,
    rank,
    torch_generator,
    world_size,
)
from mcl_clip.errors import UserError

CHUNK_ROWS = 16_384
FEATURE_UNIT = 2.0**24
SIMILARITY_UNIT = 2.0**32
TIE_MARGIN = 1e-5
VARIANCE_FLOOR = 1e-3  # of the largest
UNEXPLAINED_FLOOR = 1e-3  # of 1 - correlation^2
ROWS_IN_FULL_FIT = 20_000_000

Rows = Callable[[int, int], Float16[np.ndarray, "rows dim"]]


@dataclass(frozen=True, kw_only=True)
class Clustering:
    """K unit centroids, the cluster of every row, and how the fit went.

    Attributes:
        centroids: float32, unit.
        assignments: cluster of each row; rows that are zero (bad samples) are in cluster 0.
        trace: objective (mean of 1 - cosine) and number of empty clusters of each pass.
    """

    centroids: Float32[np.ndarray, "clusters dim"]
    assignments: Int64[np.ndarray, "rows"]
    trace: list[dict[str, float]] = field(default_factory=list)


@dataclass
class _Pass:
    """What one pass over all rows gives; assignments and similarities of this process's chunks only."""

    sums: Int64[Tensor, "clusters dim"]
    sizes: Int64[Tensor, "clusters"]
    objective: float
    assignments: dict[int, Tensor]
    similarities: dict[int, Tensor]


@dataclass(frozen=True, kw_only=True)
class Projection:
    """Moves features so that their cosine weighs what picture and caption share; see `fit_shared_metric`.

    Attributes:
        mean: of the unit features.
        matrix: canonical directions, each times the root of its weight.
    """

    mean: Float32[np.ndarray, "dim"]
    matrix: Float32[np.ndarray, "dim directions"]

    def __call__(self, features: Shaped[np.ndarray, "rows dim"]) -> Float16[np.ndarray, "rows directions"]:
        """Projected unit features; bad samples stay zeros. In float64, so that threads do not show in float16."""
        moved = (features.astype(np.float64) - self.mean) @ self.matrix.astype(np.float64)
        norms = np.linalg.norm(moved, axis=1, keepdims=True)
        good = features.any(1, keepdims=True) & (norms > 0)
        projected: Float16[np.ndarray, "rows directions"] = np.where(good, moved / np.where(good, norms, 1), 0).astype(
            np.float16
        )
        return projected


def fit_shared_metric(image: Rows, text: Rows, num_rows: int) -> tuple[Projection, Projection]:
    """The metric in which rows are near that a stage cannot tell apart; for image and for text features.

    Clusters of plain features follow the directions in which features vary most, and mix values that the stage tells
    apart well. Under the Gaussian model of two views with common causes (probabilistic canonical correlation analysis,
    Bach & Jordan 2005), the log odds that two rows have the same cause are, up to terms of one row alone, an inner
    product with the weight rho / (1 - rho^2) on the canonical direction of correlation rho. These are the weights here
    (those of probabilistic linear discriminant analysis, Ioffe 2006, with pairs in place of classes).

    Computed on the main process from all good rows in a fixed order. It wants several rows for each dimension: with
    fewer rows than the two sides have dimensions all correlations are 1, and features are only whitened.
    """

    def fit() -> tuple[Projection, Projection]:
        dim = image(0, 1).shape[1]
        count, total, second = 0, np.zeros(2 * dim), np.zeros((2 * dim, 2 * dim))
        for _, start, stop in _all_chunks(num_rows):
            sides = image(start, stop), text(start, stop)
            good = sides[0].any(1) & sides[1].any(1)
            pairs = np.concatenate(sides, axis=1)[good].astype(np.float64)
            count, total, second = count + len(pairs), total + pairs.sum(0), second + pairs.T @ pairs
        mean = total / max(1, count)
        covariance = second / max(1, count) - np.outer(mean, mean)
        to_image, to_text = _inverse_root(covariance[:dim, :dim]), _inverse_root(covariance[dim:, dim:])
        left, correlations, right = np.linalg.svd(to_image @ covariance[:dim, dim:] @ to_text)
        correlations = np.minimum(correlations, 1)
        weights = np.sqrt(correlations / (1 - correlations**2 + UNEXPLAINED_FLOOR))
        matrices = to_image @ left * weights, to_text @ right.T * weights
        image_side, text_side = (
            Projection(mean=side_mean.astype(np.float32), matrix=matrix.astype(np.float32))
            for side_mean, matrix in zip((mean[:dim], mean[dim:]), matrices, strict=True)
        )
        return image_side, text_side

    return on_main(fit)


def _inverse_root(covariance: Float64[np.ndarray, "dim dim"]) -> Float64[np.ndarray, "dim dim"]:
    """The symmetric inverse square root; directions with little variance, which hold noise, are not raised further."""
    variances, directions = np.linalg.eigh(covariance)
    variances = np.maximum(variances, max(VARIANCE_FLOOR * variances.max(), np.finfo(np.float32).tiny))
    root: Float64[np.ndarray, "dim dim"] = (directions / np.sqrt(variances)) @ directions.T
    return root


@contextmanager
def projected_rows(rows: Rows, num_rows: int, projection: Projection, path: Path) -> Iterator[Rows]:
    """The projected rows, from a file at `path` that exists meanwhile and that every process must see.

    Projecting a row costs more than a pass over it, so it is done once.
    """

    def write() -> None:  # not into a map of the file: on a full disk that is a bus error
        shape = (num_rows, projection.matrix.shape[1])
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float16)), "fortran_order": False, "shape": shape}
        with path.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for _, start, stop in _all_chunks(num_rows):
                file.write(projection(rows(start, stop)).tobytes())

    try:
        on_main(write)
        memory = np.load(path, mmap_mode="c", allow_pickle=False)
        barrier()
        yield lambda start, stop: memory[start:stop]
    finally:
        if is_main():
            path.unlink(missing_ok=True)


def spherical_kmeans(
    rows: Rows,
    *,
    num_rows: int,
    num_clusters: int,
    name: tuple[Name, ...],
    num_starts: int = 8,
    max_passes: int = 20,
    tolerance: float = 1e-5,
    sample_rows: int = 0,
    device: torch.device | None = None,
) -> Clustering:
    """Cluster unit features by cosine: k-means++ starts on a sample, then Lloyd passes over all rows.

    Above 20 million rows the fit is on the sample alone, with one pass for the assignments. Every process must be able
    to read every row.

    Args:
        rows: gives the float16 unit features of rows start to stop - 1; zeros are bad samples and ignored.
        num_rows: how many rows there are.
        num_clusters: K.
        name: name of the draws.
        num_starts: k-means++ starts on the sample, of which the best goes on.
        max_passes: most passes over all rows.
        tolerance: stop when the objective gains less than this share.
        sample_rows: size of the sample; 0 means 256 K, at least 20,000.
        device: where distances are computed.

    Raises:
        UserError: if there are fewer distinct good rows than clusters.
    """
    device = device or torch.device("cpu")
    wanted = sample_rows or max(20_000, 256 * num_clusters)
    centroids = on_main(lambda: _fit_sample(rows, num_rows, num_clusters, name, num_starts, wanted)).to(device)
    trace: list[dict[str, float]] = []
    passes = max_passes if num_rows <= ROWS_IN_FULL_FIT else 0
    for number in range(passes):
        result = _pass_over(rows, num_rows, centroids)
        empty = int((result.sizes == 0).sum())
        trace.append({"pass": number, "objective": result.objective, "empty_clusters": empty})
        centroids = _new_centroids(rows, result, centroids)
        gain = trace[-2]["objective"] - result.objective if number else np.inf
        if not empty and gain < tolerance * max(result.objective, 1e-12):
            break
    result = _pass_over(rows, num_rows, centroids)
    trace.append({"pass": len(trace), "objective": result.objective, "empty_clusters": int((result.sizes == 0).sum())})
    assignments = torch.zeros(num_rows, dtype=torch.int32, device=device)
    for number, _, stop in _chunks(num_rows):
        assignments[number * CHUNK_ROWS : stop] = result.assignments[number]
    all_reduce_sum(assignments)
    return Clustering(centroids=centroids.cpu().numpy(), assignments=assignments.long().cpu().numpy(), trace=trace)


def _chunks(num_rows: int) -> Iterator[tuple[int, int, int]]:
    """Number, start and end of this process's chunks of the fixed grid."""
    for number, start in enumerate(range(0, num_rows, CHUNK_ROWS)):
        if number % world_size() == rank():
            yield number, start, min(start + CHUNK_ROWS, num_rows)


def _pass_over(rows: Rows, num_rows: int, centroids: Float32[Tensor, "clusters dim"]) -> _Pass:
    clusters, dim = centroids.shape
    sums = torch.zeros(clusters, dim, dtype=torch.float64, device=centroids.device)
    sizes = torch.zeros(clusters, dtype=torch.int64, device=centroids.device)
    total = torch.zeros(2, dtype=torch.int64, device=centroids.device)
    assignments, similarities = {}, {}
    for number, start, stop in _chunks(num_rows):
        features = torch.from_numpy(np.ascontiguousarray(rows(start, stop))).to(centroids.device)
        good = features.ne(0).any(1)
        best, cluster = _nearest(features.float(), centroids)
        cluster[~good] = 0
        sums.index_add_(0, cluster[good], features[good].double())
        sizes += torch.bincount(cluster[good], minlength=clusters)
        total[0] += ((1 - best[good].double()) * SIMILARITY_UNIT).round().long().sum()
        total[1] += good.sum()
        assignments[number] = cluster
        similarities[number] = torch.where(good, best, torch.inf)
    exact = (sums * FEATURE_UNIT).long()
    all_reduce_sum(exact)
    all_reduce_sum(sizes)
    all_reduce_sum(total)
    objective = int(total[0]) / SIMILARITY_UNIT / max(1, int(total[1]))
    return _Pass(exact, sizes, objective, assignments, similarities)


def _nearest(
    features: Float32[Tensor, "rows dim"], centroids: Float32[Tensor, "clusters dim"]
) -> tuple[Float32[Tensor, "rows"], Int64[Tensor, "rows"]]:
    """Cosine and number of the nearest centroid. Near ties are decided in float64, so that threads cannot matter."""
    similarity = features @ centroids.T
    if similarity.shape[1] == 1:
        return similarity[:, 0], torch.zeros(len(features), dtype=torch.int64, device=features.device)
    best, cluster = similarity.topk(2, dim=1)
    near = (best[:, 0] - best[:, 1] < TIE_MARGIN).nonzero()[:, 0]
    cluster = cluster[:, 0].clone()
    cluster[near] = (features[near].double() @ centroids.double().T).argmax(1)
    exact = (features.double() * centroids[cluster].double()).sum(1)
    return exact.float(), cluster


def _new_centroids(
    rows: Rows, result: _Pass, centroids: Float32[Tensor, "clusters dim"]
) -> Float32[Tensor, "clusters dim"]:
    """Mean directions; an empty cluster starts anew from a far point of the biggest cluster."""
    sums = result.sums.double()
    fresh = torch.nn.functional.normalize(sums, dim=1).float()
    fresh = torch.where((sums.norm(dim=1) > 0)[:, None], fresh, centroids)
    empty = (result.sizes == 0).nonzero()[:, 0].tolist()
    if not empty:
        return fresh
    biggest = int(result.sizes.argmax())
    for cluster, row in zip(empty, _farthest(result, biggest, len(empty)), strict=False):
        fresh[cluster] = torch.nn.functional.normalize(torch.from_numpy(rows(row, row + 1)).float().to(fresh.device))[0]
    return fresh


def _farthest(result: _Pass, cluster: int, count: int) -> list[int]:
    """The rows of a cluster that are least like its centroid, over all processes."""
    candidates = []
    for number, assignment in result.assignments.items():
        inside = ((assignment == cluster) & result.similarities[number].isfinite()).nonzero()[:, 0]
        values, order = result.similarities[number][inside].sort(stable=True)
        rows = number * CHUNK_ROWS + inside[order[:count]]
        candidates += list(zip(values[:count].tolist(), rows.tolist(), strict=True))
    return [row for _, row in sorted(pair for mine in gather_objects(candidates) for pair in mine)[:count]]


def _fit_sample(
    rows: Rows, num_rows: int, num_clusters: int, name: tuple[Name, ...], num_starts: int, wanted: int
) -> Float32[Tensor, "clusters dim"]:
    """The best of several k-means++ starts, each followed by Lloyd steps, on a fixed sample."""
    chosen = np.sort(permutation(num_rows, *name, "sample")[:wanted]) if num_rows > wanted else np.arange(num_rows)
    sample = np.concatenate([_some(rows, chosen, start, stop) for _, start, stop in _all_chunks(num_rows)])
    features = torch.from_numpy(sample).float()
    features = features[features.ne(0).any(1)]
    distinct: set[bytes] = set()
    for feature in features.numpy():
        distinct.add(feature.tobytes())
        if len(distinct) == num_clusters:
            break
    else:
        raise UserError(
            f"{num_clusters} clusters need at least as many distinct samples, and there are {len(distinct)}; use a "
            f"smaller --stages.K.cluster.num-clusters"
        )
    best_objective, best = np.inf, features[:num_clusters]
    for start in range(num_starts):
        centroids = _plus_plus(features, num_clusters, torch_generator(*name, "start", start))
        for _ in range(30):
            similarity, cluster = _nearest(features, centroids)
            sums = torch.zeros_like(centroids, dtype=torch.float64).index_add_(0, cluster, features.double())
            moved = torch.nn.functional.normalize(sums, dim=1).float()
            moved = torch.where((sums.norm(dim=1) > 0)[:, None], moved, centroids)
            if torch.equal(moved, centroids):
                break
            centroids = moved
        objective = float((1 - similarity.double()).mean())
        if objective < best_objective - 1e-9:
            best_objective, best = objective, centroids
    return best


def _all_chunks(num_rows: int) -> Iterator[tuple[int, int, int]]:
    for number, start in enumerate(range(0, num_rows, CHUNK_ROWS)):
        yield number, start, min(start + CHUNK_ROWS, num_rows)


def _some(rows: Rows, chosen: np.ndarray, start: int, stop: int) -> Float16[np.ndarray, "chosen dim"]:
    inside = chosen[(chosen >= start) & (chosen < stop)] - start
    picked: np.ndarray = rows(start, stop)[inside]
    return picked


def _plus_plus(
    features: Float32[Tensor, "rows dim"], num_clusters: int, generator: torch.Generator
) -> Float32[Tensor, "clusters dim"]:
    """Greedy k-means++ starts (Arthur & Vassilvitskii 2007) for the distance 1 - cosine.

    Of several candidates, each drawn in proportion to its distance from what is chosen, the one that helps most.
    """
    trials = 2 + int(math.log(num_clusters))
    chosen = [int(torch.randint(len(features), (1,), generator=generator))]
    distance = _distances(features, chosen)[:, 0]
    while len(chosen) < num_clusters:
        distance[chosen] = 0
        mass = distance.cumsum(0)
        points = torch.rand(trials, generator=generator, dtype=torch.float64) * mass[-1]
        candidates = torch.searchsorted(mass, points, right=True).clamp(max=len(features) - 1)
        nearer = torch.minimum(distance[:, None], _distances(features, candidates.tolist()))
        best = int(nearer.sum(0).argmin())
        chosen.append(int(candidates[best]))
        distance = nearer[:, best].clone()
    return features[chosen]


def _distances(features: Float32[Tensor, "rows dim"], others: list[int]) -> Float64[Tensor, "rows others"]:
    return (1 - features @ features[others].T).clamp(min=0).double()
