"""Spherical k-means over the features of one stage.

For given features the result does not depend on the number of processes or threads: near ties are decided in float64,
and sums are exact. Float16 features are multiples of 2^-24, so a float64 sum of up to 2^28 of them is exact in any
order, and rows can be subtracted again without error; processes add the sums as integers.

A row is compared with the centroids again only if its cluster may change (Hamerly 2010): the cosine of a unit vector
with a centroid changes by at most the distance that the centroid moves.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter

import numpy as np
import torch
from jaxtyping import Float, Float16, Float32, Int32, Int64
from torch import Tensor

from mcl_clip.core.distributed import (
    Name,
    all_reduce_sum,
    gather_objects,
    is_main,
    rank,
    sample_of_permutation,
    torch_generator,
    world_size,
)
from mcl_clip.core.errors import UserError
from mcl_clip.core.progress import Progress

CHUNK_ROWS = 16_384  # a fixed grid, whatever the number of processes
BLOCK_ROWS = 2048  # temporaries of this size stay in the cache, and in memory that is already allocated
FEATURE_UNIT = 2.0**24  # float16 features times this are integers
SIMILARITY_UNIT = 2.0**32  # cosines are rounded to integers in this unit before they are added
TIE_MARGIN = 1e-5  # more than the float32 error of a cosine: closer calls are decided in float64
TIE_UNIT = 2.0**-40  # cosines closer than this in float64 count as equal, and the first centroid wins
UNIT_LIMIT = 1.001  # longest unit feature after rounding to float16
ROWS_IN_FULL_FIT = 20_000_000
SAMPLE_STEPS = 30
ReadRows = Callable[[int, int], Float16[np.ndarray, "rows dim"]]


@dataclass(frozen=True, kw_only=True)
class Clustering:
    """The result of k-means.

    Attributes:
        centroids: unit vectors.
        assignments: cluster of each row; zero rows (bad samples) are in cluster 0.
        trace: objective (mean of 1 - cosine) and number of empty clusters of each pass.
    """

    centroids: Float32[np.ndarray, "clusters dim"]
    assignments: Int32[np.ndarray, "rows"]
    trace: list[dict[str, float]]


def spherical_kmeans(
    rows: ReadRows,
    *,
    num_rows: int,
    num_clusters: int,
    name: tuple[Name, ...],
    num_starts: int = 8,
    max_passes: int = 20,
    tolerance: float = 1e-5,
    sample_rows: int = 0,
    device: torch.device | None = None,
    is_stopping: Callable[[], bool] = lambda: False,
    check_stop: Callable[[], object] = lambda: None,
) -> Clustering:
    """Cluster unit features by cosine: k-means++ starts on a sample, then Lloyd passes over all rows.

    Above 20 million rows only the sample is fitted, with one pass for the assignments. Every process must be able to
    read every row: `rows(start, stop)` returns float16 unit features, or zeros, which are bad samples and ignored.

    The sample has `sample_rows` rows, by default 256 for each cluster and at least 20,000; the best of `num_starts`
    starts on it is kept. After at most `max_passes` passes over all rows, or when the objective improves by less than
    the share `tolerance`, the fit ends. `name` names the random streams; cosines are computed on `device`. A pass ends
    early once `is_stopping()` is True; then `check_stop()`, a collective call after each pass, must raise on all
    processes.

    Raises:
        UserError: if there are fewer distinct good rows than clusters.
    """
    device = device or torch.device("cpu")
    sample_size = sample_rows or max(20_000, 256 * num_clusters)
    centroids = _fit_sample(rows, num_rows, num_clusters, name, num_starts, sample_size).to(device)
    members = _Members(rows, all_chunks(num_rows)[rank() :: world_size()], centroids)
    trace: list[dict[str, float]] = []
    passes, done = max_passes if num_rows <= ROWS_IN_FULL_FIT else 0, False
    for number in Progress(range(passes + 1), desc="k-means", unit="pass", show=is_main()):
        members.move_to(centroids, is_stopping)
        check_stop()
        sums, sizes = all_reduce_sum(members.sums()), all_reduce_sum(members.sizes())
        empty, objective = int((sizes == 0).sum()), _objective(sums, sizes, centroids)
        gain = trace[-1]["objective"] - objective if number else np.inf
        trace.append({"pass": number, "objective": objective, "empty_clusters": empty})
        if number == passes or done:
            break
        done = not empty and gain < tolerance * max(objective, 1e-12)
        centroids = _new_centroids(members, sums, sizes)
    assignments = torch.zeros(num_rows, dtype=torch.int32, device=device)
    for (start, stop), cluster in zip(members.chunks, members.clusters, strict=True):
        assignments[start:stop] = cluster.where(cluster < num_clusters, 0)
    all_reduce_sum(assignments)
    return Clustering(centroids=centroids.cpu().numpy(), assignments=assignments.cpu().numpy(), trace=trace)


class _Members:
    """The cluster of each row of some chunks, and the exact sum of the features of each cluster.

    Attributes:
        chunks: start and end of each chunk.
        clusters: int64 for each chunk; K for bad samples, and for rows before the first pass.
        leads: float32 for each chunk; lower bound of the cosine with the own centroid minus that with any other.
    """

    def __init__(
        self, rows: ReadRows, chunks: list[tuple[int, int]], centroids: Float32[Tensor, "clusters dim"]
    ) -> None:
        self.rows, self.chunks, self.centroids = rows, chunks, centroids
        sizes, device = [stop - start for start, stop in chunks], centroids.device
        self.clusters = [torch.full((size,), len(centroids), device=device) for size in sizes]
        self.leads = [torch.full((size,), -torch.inf, device=device) for size in sizes]
        self._sums = torch.zeros(len(centroids) + 1, centroids.shape[1], dtype=torch.float64, device=device)

    def move_to(
        self, centroids: Float32[Tensor, "clusters dim"], is_stopping: Callable[[], bool] = lambda: False
    ) -> None:
        """Assign each row to its nearest centroid, and update the sums of the clusters, unless stopping."""
        # The own cosine falls by at most the own centroid's move, and another rises by at most the largest move.
        shift = (centroids.double() - self.centroids.double()).norm(dim=1) * UNIT_LIMIT
        lost = torch.cat([shift + shift.max(), shift.new_zeros(1)]).float()  # bad samples have index K and lose nothing
        self.centroids = centroids
        for (start, stop), clusters, leads in zip(self.chunks, self.clusters, self.leads, strict=True):
            if is_stopping():
                return
            uncertain = (leads.sub_(lost[clusters]) < TIE_MARGIN).nonzero()[:, 0]
            if not len(uncertain):
                continue
            chunk = self.rows(start, stop)
            for block in torch.split(uncertain, BLOCK_ROWS):
                features = torch.from_numpy(chunk[block.cpu().numpy()]).to(centroids.device).float()
                nearest, leads[block] = _nearest(features, centroids)
                changed = (nearest != clusters[block]).nonzero()[:, 0]
                # Exact in float64, so that subtracting a row later restores the sum without it.
                self._sums.index_add_(0, clusters[block[changed]], features[changed].double(), alpha=-1)
                self._sums.index_add_(0, nearest[changed], features[changed].double())
                clusters[block] = nearest

    def sums(self) -> Int64[Tensor, "clusters dim"]:
        """Return the sum of each cluster, in units of 2^-24."""
        return (self._sums[:-1] * FEATURE_UNIT).long()

    def sizes(self) -> Int64[Tensor, "clusters"]:
        """Return the number of rows in each cluster."""
        sizes = torch.zeros(len(self._sums), dtype=torch.int64, device=self._sums.device)
        for clusters in self.clusters:
            sizes += clusters.bincount(minlength=len(sizes))
        return sizes[:-1]


def _nearest(
    features: Float32[Tensor, "rows dim"], centroids: Float32[Tensor, "clusters dim"]
) -> tuple[Int64[Tensor, "rows"], Float32[Tensor, "rows"]]:
    """Find the nearest centroid of each row, and the lead of its cosine over all others; K and infinity for zeros."""
    if _is_float32_exact():
        similarity: Float[Tensor, "rows clusters"] = features @ centroids.T
    else:
        similarity = features.double() @ centroids.double().T
    best, cluster = similarity.max(1)
    lead = best - similarity.scatter_(1, cluster[:, None], -torch.inf).amax(1)
    # Float32 rounding depends on the shape of the product: near ties are decided in float64, on a grid.
    near = ((lead < TIE_MARGIN) | (best == 0)).nonzero()[:, 0]
    cluster[near] = (features[near].double() @ centroids.double().T / TIE_UNIT).round().argmax(1)
    bad = near[~features[near].any(1)]
    cluster[bad], lead[bad] = len(centroids), torch.inf
    return cluster, lead.float()


def _is_float32_exact() -> bool:
    """Return whether products are computed in float32, and not in TF32 or bfloat16, whose errors exceed TIE_MARGIN."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set per backend
        return False


def _objective(
    sums: Int64[Tensor, "clusters dim"], sizes: Int64[Tensor, "clusters"], centroids: Float32[Tensor, "clusters dim"]
) -> float:
    """Compute the mean of 1 - cosine with the own centroid, as a sum of integers, whose order does not matter."""
    products = sums.double() / FEATURE_UNIT * centroids.double()
    total = int((products * SIMILARITY_UNIT).round().long().sum())
    return 1 - total / SIMILARITY_UNIT / max(1, int(sizes.sum()))


def _directions(
    sums: Int64[Tensor, "clusters dim"], fallback: Float32[Tensor, "clusters dim"]
) -> Float32[Tensor, "clusters dim"]:
    """Normalize the sums; where a sum is zero, return `fallback`."""
    directions = torch.nn.functional.normalize(sums.double(), dim=1).float()
    return torch.where(sums.any(1)[:, None], directions, fallback)


def _new_centroids(
    members: _Members, sums: Int64[Tensor, "clusters dim"], sizes: Int64[Tensor, "clusters"]
) -> Float32[Tensor, "clusters dim"]:
    """Compute mean directions; an empty cluster restarts at a far point of the largest cluster."""
    updated = _directions(sums, members.centroids)
    empty, largest = (sizes == 0).nonzero()[:, 0].tolist(), int(sizes.argmax())
    if not empty:
        return updated
    candidates: list[tuple[float, int]] = []  # cosine with the centroid of the largest cluster, and row
    centroid = members.centroids[largest].double()
    for (start, stop), clusters in zip(members.chunks, members.clusters, strict=True):
        inside = (clusters == largest).nonzero()[:, 0].cpu()
        features = torch.from_numpy(members.rows(start, stop)[inside.numpy()]).to(centroid.device)
        values, order = (features.double() * centroid).sum(1).float().cpu().sort(stable=True)
        rows = start + inside[order[: len(empty)]]
        candidates += zip(values[: len(empty)].tolist(), rows.tolist(), strict=True)
    farthest = sorted(pair for mine in gather_objects(candidates) for pair in mine)
    for cluster, (_, row) in zip(empty, farthest, strict=False):
        point = torch.from_numpy(members.rows(row, row + 1)).float().to(updated.device)
        updated[cluster] = torch.nn.functional.normalize(point)[0]
    return updated


def _fit_sample(
    rows: ReadRows, num_rows: int, num_clusters: int, name: tuple[Name, ...], num_starts: int, sample_size: int
) -> Float32[Tensor, "clusters dim"]:
    """Return the best of several k-means++ starts, each followed by Lloyd steps, on a fixed sample.

    The processes share the reading of the sample and the starts. A collective call.
    """
    chosen = sample_of_permutation(num_rows, sample_size, *name, "sample")
    own = [
        (start, rows(start, stop)[chosen[(chosen >= start) & (chosen < stop)] - start])
        for start, stop in all_chunks(num_rows)[rank() :: world_size()]
    ]
    pieces = sorted((piece for of_one in gather_objects(own) for piece in of_one), key=itemgetter(0))
    sample: np.ndarray = np.concatenate([features for _, features in pieces])
    sample = sample[sample.any(1)]
    distinct: set[bytes] = set()
    for feature in sample:
        distinct.add(feature.tobytes())
        if len(distinct) == num_clusters:
            break
    else:
        raise UserError(
            f"{num_clusters} clusters need at least as many distinct samples, and there are {len(distinct)}; use a "
            f"smaller --stages.K.cluster.num-clusters"
        ).on_every_process()
    numbers = range(num_starts)[rank() :: world_size()]
    generators = [torch_generator(*name, "start", number) for number in numbers]
    starts = _plus_plus(torch.from_numpy(sample).float(), num_clusters, generators) if numbers else []
    fits: list[tuple[int, float, Float32[Tensor, "clusters dim"]]] = []
    for number, centroids in zip(numbers, starts, strict=True):
        members = _Members(lambda start, stop: sample[start:stop], all_chunks(len(sample)), centroids)
        updated = centroids
        for _ in range(SAMPLE_STEPS):
            members.move_to(updated)
            updated = _directions(members.sums(), members.centroids)
            if torch.equal(updated, members.centroids):
                break
        fits.append((number, _objective(members.sums(), members.sizes(), members.centroids), updated))
    best_objective, best = math.inf, torch.empty(0, 0)
    for _, objective, centroids in sorted(
        (fit for of_one in gather_objects(fits) for fit in of_one), key=itemgetter(0)
    ):
        if objective < best_objective - 1e-9:  # equal fits found from two starts: the first wins on every machine
            best_objective, best = objective, centroids
    return best


def all_chunks(num_rows: int) -> list[tuple[int, int]]:
    """Return start and stop of the fixed chunks of `num_rows` rows."""
    return [(start, min(start + CHUNK_ROWS, num_rows)) for start in range(0, num_rows, CHUNK_ROWS)]


def _plus_plus(
    features: Float32[Tensor, "rows dim"], num_clusters: int, generators: list[torch.Generator]
) -> list[Float32[Tensor, "clusters dim"]]:
    """Choose greedy k-means++ starts (Arthur & Vassilvitskii 2007) for the distance 1 - cosine, one for each generator.

    Candidates are sampled in proportion to their distance from the chosen points; the one that reduces the total
    distance most is added. All starts advance together, so that the features are read once for all of them.
    """
    trials = 2 + int(math.log(num_clusters))
    chosen = [[int(torch.randint(len(features), (1,), generator=generator))] for generator in generators]

    def distances_to(others: list[int]) -> Float32[Tensor, "others rows"]:
        return (1 - features[others] @ features.T).clamp_(min=0)

    distances = list(distances_to([numbers[0] for numbers in chosen]))
    while len(chosen[0]) < num_clusters:
        candidates: list[int] = []
        for numbers, distance, generator in zip(chosen, distances, generators, strict=True):
            distance[numbers] = 0
            mass = distance.cumsum(0, dtype=torch.float64)
            points = torch.rand(trials, generator=generator, dtype=torch.float64) * mass[-1]
            candidates += torch.searchsorted(mass, points, right=True).clamp(max=len(features) - 1).tolist()
        candidate_distances = torch.split(distances_to(candidates), trials)
        for number, numbers in enumerate(chosen):
            nearer = torch.minimum(distances[number], candidate_distances[number])
            best = int(nearer.sum(1, dtype=torch.float64).argmin())
            numbers.append(candidates[number * trials + best])
            distances[number] = nearer[best].clone()
    return [features[numbers] for numbers in chosen]
