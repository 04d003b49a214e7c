"""The shared metric: weights each direction of the features by how well image and caption agree in it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float16, Float32, Float64, Shaped

from mcl_clip.core.distributed import barrier, is_main, on_main
from mcl_clip.stages.kmeans import ReadRows, all_chunks

VARIANCE_FLOOR = 1e-3  # of the largest variance
UNEXPLAINED_FLOOR = 1e-3  # of 1 - correlation^2


@dataclass(frozen=True, kw_only=True)
class Projection:
    """Projects features so that their cosine weighs what image and caption share; see `fit_shared_metric`.

    Attributes:
        mean: mean of the unit features.
        matrix: canonical directions, each times the square root of its weight.
    """

    mean: Float32[np.ndarray, "dim"]
    matrix: Float32[np.ndarray, "dim directions"]

    def __call__(self, features: Shaped[np.ndarray, "rows dim"]) -> Float16[np.ndarray, "rows directions"]:
        """Project and normalize features; bad samples stay zeros."""
        # In float64, so that the order of summation, which depends on threads, does not change the float16 result.
        moved = (features.astype(np.float64) - self.mean) @ self.matrix.astype(np.float64)
        norms = np.linalg.norm(moved, axis=1, keepdims=True)
        good = features.any(1, keepdims=True) & (norms > 0)
        projected: Float16[np.ndarray, "rows directions"] = np.where(good, moved / np.where(good, norms, 1), 0).astype(
            np.float16
        )
        return projected


def fit_shared_metric(image: ReadRows, text: ReadRows, num_rows: int) -> tuple[Projection, Projection]:
    """Fit the metric in which rows are close that a stage cannot distinguish; for image and for text features.

    Clusters of plain features follow the directions of largest variance, and mix values that the stage distinguishes
    well. Under the Gaussian model of two views with common causes (probabilistic canonical correlation analysis,
    Bach & Jordan 2005), the log odds that two rows have the same cause are, up to terms of one row alone, an inner
    product with the weight rho / (1 - rho^2) on the canonical direction of correlation rho. These are the weights here
    (those of probabilistic linear discriminant analysis, Ioffe 2006, with pairs in place of classes).

    Computed on the main process from all good rows in a fixed order. It needs several rows per dimension: with fewer
    rows than the two sides have dimensions, all correlations are 1 and features are only whitened.
    """

    def fit() -> tuple[Projection, Projection]:
        dim = image(0, 1).shape[1]
        count, total, second = 0, np.zeros(2 * dim), np.zeros((2 * dim, 2 * dim))
        for start, stop in all_chunks(num_rows):
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
    """Compute the symmetric inverse square root, with a floor on variances so that noise is not amplified."""
    variances, directions = np.linalg.eigh(covariance)
    variances = np.maximum(variances, max(VARIANCE_FLOOR * variances.max(), np.finfo(np.float32).tiny))
    root: Float64[np.ndarray, "dim dim"] = (directions / np.sqrt(variances)) @ directions.T
    return root


@contextmanager
def projected_rows(rows: ReadRows, num_rows: int, projection: Projection, path: Path) -> Iterator[ReadRows]:
    """Yield a reader of the projected rows, from a temporary file at `path` that every process must see.

    Projecting a row costs more than a pass over it, so it is done once.
    """

    def write() -> None:  # not through a memory map: on a full disk that ends in a bus error
        shape = (num_rows, projection.matrix.shape[1])
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float16)), "fortran_order": False, "shape": shape}
        with path.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for start, stop in all_chunks(num_rows):
                file.write(projection(rows(start, stop)).tobytes())

    try:
        on_main(write)
        memory = np.load(path, mmap_mode="c", allow_pickle=False)
        barrier()
        yield lambda start, stop: memory[start:stop]
    finally:
        if is_main():
            path.unlink(missing_ok=True)
