"""Bootstrap confidence intervals and paired tests.

Resampling uses raw Philox words, so intervals are equal on every machine and with every version of numpy.
"""

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Shaped

_CHUNK_WORDS = 1 << 18

Means = Mapping[str, Mapping[str, Float64[np.ndarray, "_"]]]


class Estimate(NamedTuple):
    """A value with its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class PairedComparison:
    """The difference between two models, a and b, on the same queries."""

    difference: float  # mean of a minus mean of b
    low: float
    high: float
    n: int  # queries
    units: int  # resampled units: images if several captions of one are queries, otherwise `n`
    only_a: int | None  # queries that only a gets right; None if outcomes are not 0 or 1
    only_b: int | None
    p_value: float | None  # of McNemar's exact test; None if it does not apply


def bootstrap_interval(
    values: Shaped[np.ndarray, "queries"],
    units: Shaped[np.ndarray, "as_many"] | None = None,
    *,
    seed: int = 0,
    resamples: int = 10_000,
    level: float = 0.95,
) -> tuple[float, float]:
    """Compute the percentile bootstrap interval of the mean (Efron 1979, Annals of Statistics 7).

    Whole `units`, such as images, are resampled, so queries of one unit may be dependent; the mean is still over
    queries. `level` is the share of the resampled means inside the interval.

    Raises:
        ValueError: if there are no values, or the numbers of units and values differ.
    """
    if not len(values) or (units is not None and units.shape != values.shape):
        raise ValueError(f"{len(values)} values with {0 if units is None else len(units)} units cannot be resampled")
    unit_of = np.arange(len(values)) if units is None else np.unique(units, return_inverse=True)[1]
    sums, sizes = np.bincount(unit_of, weights=values.astype(np.float64)), np.bincount(unit_of).astype(np.float64)
    means = [(counts @ sums) / (counts @ sizes) for counts in _counts(len(sums), resamples, seed, "units")]
    return _percentiles(np.concatenate(means), level)


def resampled_means(
    values: Shaped[np.ndarray, "quantities units"], *, seed: int = 0, resamples: int = 2000
) -> Float64[np.ndarray, "quantities means"]:
    """Return the means of some quantities over the same units, then those of bootstrap samples, drawn for all alike."""
    exact = values.astype(np.float64)
    samples = [counts @ exact.T / exact.shape[1] for counts in _counts(exact.shape[1], resamples, seed, "units")]
    return np.concatenate([exact.mean(1, keepdims=True), np.concatenate(samples).T], axis=1)


def compare_paired(
    a: Shaped[np.ndarray, "queries"],
    b: Shaped[np.ndarray, "as_many"],
    units: Shaped[np.ndarray, "one_each"] | None = None,
    *,
    seed: int = 0,
    resamples: int = 10_000,
    level: float = 0.95,
) -> PairedComparison:
    """Compare two models on the same queries by a paired bootstrap interval of their difference.

    If outcomes are 0 or 1, discordant queries are counted and tested (McNemar 1947, Psychometrika 12). The test assumes
    independent queries, so it is omitted if several belong to one unit. Options are those of `bootstrap_interval`.

    Raises:
        ValueError: if the lengths differ or are 0.
    """
    if a.shape != b.shape:
        raise ValueError(f"outcomes of shape {a.shape} and {b.shape} are not of the same queries")
    differences = a.astype(np.float64) - b.astype(np.float64)
    low, high = bootstrap_interval(differences, units, seed=seed, resamples=resamples, level=level)
    num_units = len(a) if units is None else len(np.unique(units))
    only_a, only_b, p_value = None, None, None
    if all(np.isin(outcomes, (0, 1)).all() for outcomes in (a, b)):
        only_a, only_b = int((differences > 0).sum()), int((differences < 0).sum())
        p_value = mcnemar_exact(only_a, only_b) if num_units == len(a) else None
    return PairedComparison(float(differences.mean()), low, high, len(a), num_units, only_a, only_b, p_value)


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Compute the exact two-sided p-value of McNemar's test, in integer arithmetic.

    It is the probability of a split at least as uneven as `only_a` to `only_b` if each discordant query were a fair
    coin toss (McNemar 1947, Psychometrika 12).
    """
    discordant, fewer = only_a + only_b, min(only_a, only_b)
    tail, term = 0, 1
    for k in range(fewer + 1):
        tail += term
        term = term * (discordant - k) // (k + 1)  # from C(n, k) to C(n, k + 1)
    return min(1.0, 2 * tail / (1 << discordant))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for multiple testing, in the given order (Holm 1979, Scandinavian Journal of Statistics 6).

    Rejecting adjusted values below alpha bounds the family-wise error rate by alpha under any dependence.
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, largest = [0.0] * len(p_values), 0.0
    for position, number in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - position) * p_values[number]))
        adjusted[number] = largest
    return adjusted


def crossed_bootstrap(
    values: Mapping[str, Mapping[str, Shaped[np.ndarray, "_ _"]]],
    statistic: Callable[[Means], Mapping[str, Shaped[np.ndarray, "_"]]],
    *,
    seed: int = 0,
    resamples: int = 2000,
    level: float = 0.95,
) -> dict[str, Estimate]:
    """Estimate quantities of an experiment with several training seeds, with intervals over both seeds and items.

    Each resample draws seeds and items with replacement (Owen 2007, Annals of Applied Statistics 1, on crossed factors;
    Efron 1979). Metrics over equally many items share their resamples, because the items may be the same. All arms
    share them too, so differences between arms are paired. Few seeds give intervals that are too narrow: resampling S
    seeds has (S - 1) / S of their variance.

    Args:
        values: `values[arm][metric]` holds the outcome of each item under each seed: the same items for all arms and
            seeds of a metric, the same seeds, in the same order, everywhere.
        statistic: the quantities of interest from the means. It is called once, on arrays: `means[arm][metric]` has
            shape [1 + resamples], the mean over the original data, then the mean of each resample. It must
            compute element-wise, and returns arrays of this shape by name.

    Returns:
        each quantity with its interval. Resamples in which it is not finite, as a ratio to zero, are left out of its
        interval; both ends are NaN where none is left.

    Raises:
        ValueError: if arms differ in metrics, seeds or items.
    """
    arms = {arm: {metric: array.shape for metric, array in of_arm.items()} for arm, of_arm in values.items()}
    shapes = next(iter(arms.values()), {})
    for arm, other in arms.items():
        if other != shapes:
            raise ValueError(f"arm {arm!r} has outcomes of shape {other}, and {next(iter(arms))!r} of shape {shapes}")
    if not shapes or any(0 in shape for shape in shapes.values()) or len({seeds for seeds, _ in shapes.values()}) != 1:
        raise ValueError(f"outcomes of shape {shapes} do not have the same number of seeds, or are empty")
    num_seeds = next(iter(shapes.values()))[0]
    # The first row is the original sample, in which each occurs once.
    seed_counts = np.concatenate([np.ones((1, num_seeds)), *_counts(num_seeds, resamples, seed, "seeds")])
    means: dict[str, dict[str, np.ndarray]] = {arm: {} for arm in values}
    for metric, (_, num_items) in shapes.items():
        outcomes = np.concatenate([of_arm[metric] for of_arm in values.values()]).T.astype(np.float64)
        counts = chain([np.ones((1, num_items))], _counts(num_items, resamples, seed, f"{num_items} items"))
        by_seed = np.concatenate([some @ outcomes for some in counts]).reshape(-1, len(values), num_seeds)
        of_arms = (by_seed * seed_counts[:, None]).sum(2) / (num_items * num_seeds)
        for arm, mean in zip(values, of_arms.T, strict=True):
            means[arm][metric] = mean
    with np.errstate(divide="ignore", invalid="ignore"):
        quantities = statistic(means)
    return {
        name: Estimate(float(value[0]), *_percentiles(value[1:][np.isfinite(value[1:])], level))
        for name, value in quantities.items()
    }


def _counts(size: int, resamples: int, seed: int, name: str) -> Iterator[Float64[np.ndarray, "chunk size"]]:
    """Yield how often each of `size` items occurs in each bootstrap sample, in chunks of resamples.

    Half a word times `size`, shifted right by 32 bits, is the item: uniform to one part in 2**32 / size.
    """
    words = np.random.Philox(key=np.array([seed, zlib.crc32(name.encode())], np.uint64))
    rows = max(1, _CHUNK_WORDS // size)
    for start in range(0, resamples, rows):
        chunk = min(rows, resamples - start)
        halves = words.random_raw(math.ceil(chunk * size / 2)).astype("<u8").view("<u4")[: chunk * size]
        items = ((halves.astype(np.uint64) * np.uint64(size)) >> np.uint64(32)).astype(np.int64).reshape(chunk, size)
        items += size * np.arange(chunk)[:, None]
        yield np.bincount(items.ravel(), minlength=chunk * size).reshape(chunk, size).astype(np.float64)


def _percentiles(draws: Float[np.ndarray, "draws"], level: float) -> tuple[float, float]:
    """Return the ends of the central `level` of the values."""
    if not len(draws):
        return math.nan, math.nan
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def normalized_mutual_information(a: Sequence[int] | np.ndarray, b: Sequence[int] | np.ndarray) -> float:
    """Compute the mutual information of two labelings over the mean of their entropies: 0 unrelated, 1 equal."""

    def entropy(counts: np.ndarray) -> float:
        shares = counts[counts > 0] / counts.sum()
        return float(-(shares * np.log(shares)).sum())

    _, first = np.unique(a, return_inverse=True)
    _, second = np.unique(b, return_inverse=True)
    joint = np.bincount(first * (second.max() + 1) + second).astype(np.float64)
    entropies = entropy(np.bincount(first)) + entropy(np.bincount(second))
    return float(2 * (entropies - entropy(joint)) / entropies) if entropies > 0 else 1.0
