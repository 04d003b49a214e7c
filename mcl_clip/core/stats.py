"""How far a figure can be trusted: intervals by resampling, and paired tests between models.

Every draw is made of raw Philox words, so intervals are equal on every machine and with every version of numpy.
"""

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Shaped

_CHUNK_WORDS = 1 << 18

Means = Mapping[str, Mapping[str, Float64[np.ndarray, "_"]]]


class Interval(NamedTuple):
    """From `low` to `high`."""

    low: float
    high: float


class Estimate(NamedTuple):
    """A value with its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class PairedComparison:
    """What two models score on the same queries.

    Attributes:
        difference: mean of a less mean of b.
        low: lower end of its interval.
        high: upper end of its interval.
        n: queries.
        units: what was drawn: images, where several captions of one are queries; otherwise `n`.
        only_a: queries that only a gets right; None where outcomes are not right or wrong.
        only_b: queries that only b gets right.
        p_value: of McNemar's exact test; None where it does not apply.
    """

    difference: float
    low: float
    high: float
    n: int
    units: int
    only_a: int | None
    only_b: int | None
    p_value: float | None


def bootstrap_interval(
    values: Shaped[np.ndarray, "queries"],
    units: Shaped[np.ndarray, "as_many"] | None = None,
    *,
    seed: int = 0,
    resamples: int = 10_000,
    level: float = 0.95,
) -> Interval:
    """Percentile bootstrap interval of the mean (Efron 1979, Annals of Statistics 7).

    Args:
        values: outcome of each query, as a number or a truth value.
        units: what each query belongs to. Whole units are drawn, so that queries of one unit may depend on each other;
            the mean stays one over queries.
        seed: of the draws.
        resamples: how often to draw. 25,000 queries take a tenth of a second per 1,000.
        level: share of the resampled means inside.

    Raises:
        ValueError: if there are no values, or as many units as values are not given.
    """
    sums, sizes = _by_unit(values, units)
    means = [(counts @ sums) / (counts @ sizes) for counts in _counts(len(sums), resamples, seed, "units")]
    return Interval(*_percentiles(np.concatenate(means), level))


def compare_paired(
    a: Shaped[np.ndarray, "queries"],
    b: Shaped[np.ndarray, "as_many"],
    units: Shaped[np.ndarray, "one_each"] | None = None,
    *,
    seed: int = 0,
    resamples: int = 10_000,
    level: float = 0.95,
) -> PairedComparison:
    """The difference between two models on the same queries, with a paired bootstrap interval.

    Where outcomes are 0 or 1 the discordant queries are counted and tested (McNemar 1947, Psychometrika 12). The test
    takes queries for independent: it is left out where several belong to one unit, and the interval stands alone.

    Args:
        a: outcome of each query under the first model.
        b: the same queries under the second model.
        units: see `bootstrap_interval`.
        seed: of the draws.
        resamples: how often to draw.
        level: share of the resampled differences inside the interval.

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
    return PairedComparison(
        difference=float(differences.mean()),
        low=low,
        high=high,
        n=len(a),
        units=num_units,
        only_a=only_a,
        only_b=only_b,
        p_value=p_value,
    )


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Two-sided p-value of McNemar's test by the binomial distribution itself, in whole numbers.

    It is the chance of a split at least as uneven as `only_a` to `only_b` if each discordant query fell to either side
    like a fair coin (McNemar 1947, Psychometrika 12).
    """
    discordant, fewer = only_a + only_b, min(only_a, only_b)
    ways, term = 0, 1
    for k in range(fewer + 1):
        ways += term
        term = term * (discordant - k) // (k + 1)  # from C(n, k) to C(n, k + 1)
    return min(1.0, 2 * ways / (1 << discordant))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for their number, in the order given (Holm 1979, Scandinavian Journal of Statistics 6).

    Rejecting those below alpha keeps the chance of any false rejection below alpha, however they depend on each other.
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, largest = [0.0] * len(p_values), 0.0
    for place, number in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[number]))
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
    """Quantities of an experiment with several training seeds, with intervals over both seeds and items.

    In each resample the seeds and the items are drawn with replacement (Owen 2007, Annals of Applied Statistics 1, on
    crossed factors; Efron 1979). Metrics over equally many items see the same draw, for they may be of the same items.
    All arms see the same draws, so differences between arms are paired. Few seeds give intervals that are too narrow:
    drawing from S seeds has (S - 1) / S of their variance.

    Args:
        values: `values[arm][metric]` holds the outcome of each item under each seed: the same items for all arms and
            seeds of a metric, the same seeds, in the same order, everywhere.
        statistic: the quantities of interest from the means. It is called once, on arrays: `means[arm][metric]` has
            shape [1 + resamples], the mean over the data as they are, then the mean of each resample. It must
            calculate element by element, and returns arrays of this shape by name.
        seed: of the draws.
        resamples: how often to draw.
        level: share of the resampled quantities inside the interval.

    Returns:
        each quantity with its interval. Resamples in which it is not finite, as a ratio to zero, are left out of its
        interval; both ends are NaN where none is left.

    Raises:
        ValueError: if arms differ in metrics, seeds or items.
    """
    shapes = _shapes(values)
    num_seeds = next(iter(shapes.values()))[0]
    seed_counts = np.concatenate(list(_counts_with_first(num_seeds, resamples, seed, "seeds")))
    means: dict[str, dict[str, np.ndarray]] = {arm: {} for arm in values}
    for metric, (_, num_items) in shapes.items():
        outcomes = np.concatenate([of_arm[metric] for of_arm in values.values()]).T.astype(np.float64)
        counts = _counts_with_first(num_items, resamples, seed, f"{num_items} items")
        by_seed = np.concatenate([some @ outcomes for some in counts]).reshape(-1, len(values), num_seeds)
        of_arms = (by_seed * seed_counts[:, None]).sum(2) / (num_items * num_seeds)
        for arm, mean in zip(values, of_arms.T, strict=True):
            means[arm][metric] = mean
    with np.errstate(divide="ignore", invalid="ignore"):
        found = statistic(means)
    return {
        name: Estimate(float(drawn[0]), *_percentiles(drawn[1:][np.isfinite(drawn[1:])], level))
        for name, drawn in found.items()
    }


def _shapes(values: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, tuple[int, int]]:
    """Seeds and items of each metric."""
    arms = {arm: {metric: array.shape for metric, array in of_arm.items()} for arm, of_arm in values.items()}
    shapes = next(iter(arms.values()), {})
    for arm, other in arms.items():
        if other != shapes:
            raise ValueError(f"arm {arm!r} has outcomes of shape {other}, and {next(iter(arms))!r} of shape {shapes}")
    if not shapes or any(0 in shape for shape in shapes.values()) or len({seeds for seeds, _ in shapes.values()}) != 1:
        raise ValueError(f"outcomes of shape {shapes} do not have the same number of seeds, or are empty")
    return shapes


def _by_unit(
    values: np.ndarray, units: np.ndarray | None
) -> tuple[Float64[np.ndarray, "units"], Float64[np.ndarray, "units"]]:
    """Sum and number of the values of each unit."""
    if not len(values) or (units is not None and units.shape != values.shape):
        raise ValueError(f"{len(values)} values with {0 if units is None else len(units)} units cannot be resampled")
    values = values.astype(np.float64)
    if units is None:
        return values, np.ones(len(values))
    _, unit_of = np.unique(units, return_inverse=True)
    return np.bincount(unit_of, weights=values), np.bincount(unit_of).astype(np.float64)


def _counts_with_first(size: int, resamples: int, seed: int, name: str) -> Iterator[Float64[np.ndarray, "chunk size"]]:
    """Each thing once, and then `_counts`."""
    yield np.ones((1, size))
    yield from _counts(size, resamples, seed, name)


def _counts(size: int, resamples: int, seed: int, name: str) -> Iterator[Float64[np.ndarray, "chunk size"]]:
    """How often each of `size` things is drawn in each of `resamples` draws of `size`, some resamples at a time.

    A half word times `size`, shifted, is the thing drawn: even to one part in 2**32 / size.
    """
    words = np.random.Philox(key=np.array([seed, zlib.crc32(name.encode())], np.uint64))
    rows = max(1, _CHUNK_WORDS // size)
    for start in range(0, resamples, rows):
        chunk = min(rows, resamples - start)
        halves = words.random_raw(math.ceil(chunk * size / 2)).astype("<u8").view("<u4")[: chunk * size]
        drawn = ((halves.astype(np.uint64) * np.uint64(size)) >> np.uint64(32)).astype(np.int64).reshape(chunk, size)
        drawn += size * np.arange(chunk)[:, None]
        yield np.bincount(drawn.ravel(), minlength=chunk * size).reshape(chunk, size).astype(np.float64)


def _percentiles(draws: Float[np.ndarray, "draws"], level: float) -> tuple[float, float]:
    """The ends of the middle `level` of the draws."""
    if not len(draws):
        return math.nan, math.nan
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def normalized_mutual_information(a: Sequence[int] | np.ndarray, b: Sequence[int] | np.ndarray) -> float:
    """Mutual information of two labellings, divided by the mean of their entropies: 0 unrelated, 1 the same."""
    _, first = np.unique(a, return_inverse=True)
    _, second = np.unique(b, return_inverse=True)
    joint = np.bincount(first * (second.max() + 1) + second).astype(np.float64)
    entropies = [_entropy(np.bincount(labels)) for labels in (first, second)]
    mutual = sum(entropies) - _entropy(joint)
    return float(2 * mutual / sum(entropies)) if sum(entropies) > 0 else 1.0


def _entropy(counts: np.ndarray) -> float:
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())
