"""The shared metric: weights each direction of the features by how well image and caption agree in it.

The work is cut into parts of rows that do not depend on the number of processes. Each part is done by one process,
which keeps it in a file, so that a run that is killed continues with the next part.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float16, Float32, Float64, Int64, Shaped
from torch import Tensor

from mcl_clip.core.distributed import all_reduce_sum, barrier, claim, on_main
from mcl_clip.data.storage import save_array
from mcl_clip.stages.kmeans import CHUNK_ROWS, ReadRows

VARIANCE_FLOOR = 1e-3  # of the largest variance
UNEXPLAINED_FLOOR = 1e-3  # of 1 - correlation^2
PART_ROWS = 8 * CHUNK_ROWS  # of a part of the work, unless that would make more than MAX_PARTS
MAX_PARTS = 256
BLOCK_ROWS = 4096  # rows whose products are added in float64
FEATURE_UNIT = 2.0**20  # features times this are rounded to integers: exact for all float16 above 0.001
MOMENT_SHIFT = 8  # products in units of 2^-40 are added in units of 2^-32, which int64 holds for 2^31 rows


@dataclass(frozen=True, kw_only=True)
class Projection:
    """Projects features so that their cosine weighs what image and caption share; see `fit_shared_metric`.

    Attributes:
        mean: mean of the unit features.
        matrix: canonical directions, each times the square root of its weight.
    """

    mean: Float32[np.ndarray, "dim"]
    matrix: Float32[np.ndarray, "dim directions"]

    def __call__(
        self, features: Shaped[np.ndarray, "rows dim"], device: torch.device | None = None
    ) -> Float16[np.ndarray, "rows directions"]:
        """Project and normalize features; bad samples stay zeros."""
        # In float64, so that the order of summation, which depends on threads, does not change the float16 result.
        mean, matrix = (torch.from_numpy(array).to(device).double() for array in (self.mean, self.matrix))
        rows = torch.from_numpy(np.ascontiguousarray(features)).to(device).double()
        moved = (rows - mean) @ matrix
        norms = torch.linalg.vector_norm(moved, dim=1, keepdim=True)
        is_good = rows.any(1, keepdim=True) & (norms > 0)
        projected: np.ndarray = torch.where(is_good, moved / norms, 0).half().cpu().numpy()
        return projected


def fit_shared_metric(
    image: ReadRows,
    text: ReadRows,
    num_rows: int,
    *,
    folder: Path | None = None,
    device: torch.device | None = None,
    is_stopping: Callable[[], bool] = lambda: False,
    check_stop: Callable[[], object] = lambda: None,
) -> tuple[Projection, Projection]:
    """Fit the metric in which rows are close that a stage cannot distinguish; for image and for text features.

    Clusters of plain features follow the directions of largest variance, and mix values that the stage distinguishes
    well. Under the Gaussian model of two views with common causes (probabilistic canonical correlation analysis,
    Bach & Jordan 2005), the log odds that two rows have the same cause are, up to terms of one row alone, an inner
    product with the weight rho / (1 - rho^2) on the canonical direction of correlation rho. These are the weights here
    (those of probabilistic linear discriminant analysis, Ioffe 2006, with pairs in place of classes).

    It needs several rows per dimension: with fewer rows than the two sides have dimensions, all correlations are 1 and
    features are only whitened. Processes add the products of the parts that they claim, as integers, so that the result
    does not depend on their number; in `folder` those of finished parts are kept. Once `is_stopping()` is True, the
    rest is left to a later call; then `check_stop()`, a collective call, must raise on all processes.
    """
    dim = image(0, 1).shape[1]
    total = torch.zeros(2 * dim + 1, 2 * dim + 1, dtype=torch.int64)
    with suppress(_StoppingError):
        for start, stop in _claim_parts(num_rows):
            path = folder and folder / f"products-{start:012d}.npy"
            if path and path.exists():
                total += torch.from_numpy(np.load(path, allow_pickle=False))
                continue
            products = _add_products(image, text, dim, _chunks(start, stop, is_stopping), device)
            if path:
                save_array(path, np.int64, tuple(products.shape), [products.numpy()])
            total += products
    check_stop()
    sums: np.ndarray = all_reduce_sum(total.to(device)).cpu().numpy()
    return on_main(lambda: _solve(sums, dim))


def _claim_parts(num_rows: int) -> Iterator[tuple[int, int]]:
    """Yield start and stop of the parts that this process is to work on."""
    starts = range(0, num_rows, part_rows(num_rows))
    parts = [(start, min(start + starts.step, num_rows)) for start in starts]
    return claim(parts, [stop - start for start, stop in parts])


def part_rows(num_rows: int) -> int:
    """Return the number of rows of each part but the last: whole chunks of k-means."""
    return max(PART_ROWS, -(-num_rows // (MAX_PARTS * CHUNK_ROWS)) * CHUNK_ROWS)


class _StoppingError(Exception):
    """Ends a part of which nothing is kept."""


def _chunks(start: int, stop: int, is_stopping: Callable[[], bool]) -> Iterator[tuple[int, int]]:
    """Yield start and stop of the chunks of a part; raise `_StoppingError` once the job is asked to stop."""
    for first in range(start, stop, CHUNK_ROWS):
        if is_stopping():
            raise _StoppingError
        yield first, min(first + CHUNK_ROWS, stop)


def _add_products(
    image: ReadRows, text: ReadRows, dim: int, chunks: Iterable[tuple[int, int]], device: torch.device | None
) -> Int64[Tensor, "columns columns"]:
    """Return the sum over good rows of all products of (image, text, 1) in units of 2^-32.

    Block by block the sums in float64 are integers below 2^53, hence exact in any order, on any device.
    """
    total = torch.zeros(2 * dim + 1, 2 * dim + 1, dtype=torch.int64, device=device)
    for start, stop in chunks:
        sides = [torch.from_numpy(side(start, stop)).to(device) for side in (image, text)]
        is_good = sides[0].any(1) & sides[1].any(1)
        pairs = torch.cat([*sides, torch.ones_like(sides[0][:, :1])], dim=1)[is_good]
        for block in torch.split(pairs, BLOCK_ROWS):
            integers = block.double().mul_(FEATURE_UNIT).round_()
            if integers.is_cuda:
                products = integers.T @ integers
            else:  # numpy computes half of a product that it knows to be symmetric
                products = torch.from_numpy(integers.numpy().T @ integers.numpy())
            total += products.long().add_(1 << (MOMENT_SHIFT - 1)) >> MOMENT_SHIFT
    return total.cpu()


def _solve(sums: Int64[np.ndarray, "columns columns"], dim: int) -> tuple[Projection, Projection]:
    """Compute the projections of both sides from the sums of products."""
    second = sums / (FEATURE_UNIT**2 / 2**MOMENT_SHIFT)
    mean = second[:-1, -1] / max(1, second[-1, -1])
    covariance = second[:-1, :-1] / max(1, second[-1, -1]) - np.outer(mean, mean)
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


def _inverse_root(covariance: Float64[np.ndarray, "dim dim"]) -> Float64[np.ndarray, "dim dim"]:
    """Compute the symmetric inverse square root, with a floor on variances so that noise is not amplified."""
    variances, directions = np.linalg.eigh(covariance)
    variances = np.maximum(variances, max(VARIANCE_FLOOR * variances.max(), np.finfo(np.float32).tiny))
    root: Float64[np.ndarray, "dim dim"] = (directions / np.sqrt(variances)) @ directions.T
    return root


def project_rows(
    rows: ReadRows,
    num_rows: int,
    projection: Projection,
    path: Path,
    *,
    device: torch.device | None = None,
    is_stopping: Callable[[], bool] = lambda: False,
    check_stop: Callable[[], object] = lambda: None,
) -> ReadRows:
    """Write the projected rows to files `path-START.npy`, those that exist excepted, and return their reader.

    Projecting a row costs more than a pass over it, so it is done once. Every process must see the files. Stopping is
    as in `fit_shared_metric`.
    """
    size, width = part_rows(num_rows), projection.matrix.shape[1]

    def part(start: int) -> Path:
        return path.with_name(f"{path.name}-{start:012d}.npy")

    with suppress(_StoppingError):
        for start, stop in _claim_parts(num_rows):
            if not part(start).exists():
                blocks = (projection(rows(a, b), device) for a, b in _chunks(start, stop, is_stopping))
                save_array(part(start), np.float16, (stop - start, width), blocks)
    barrier()
    check_stop()
    memory = [np.load(part(start), mmap_mode="c", allow_pickle=False) for start in range(0, num_rows, size)]

    def read(start: int, stop: int) -> Float16[np.ndarray, "rows directions"]:
        pieces = [memory[n][max(0, start - n * size) : stop - n * size] for n in range(start // size, -(-stop // size))]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    return read
