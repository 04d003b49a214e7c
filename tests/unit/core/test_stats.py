import math
from itertools import product

import numpy as np
import pytest
from sklearn.metrics import normalized_mutual_info_score

from mcl_clip.core.stats import (
    _counts,
    bootstrap_interval,
    compare_paired,
    crossed_bootstrap,
    holm,
    mcnemar_exact,
    normalized_mutual_information,
)


def uniform(shape, seed):
    words = np.random.Philox(key=seed).random_raw(math.prod(shape))
    return ((words >> np.uint64(11)) / 2**53).reshape(shape)


def normal(shape, seed):
    first, second = uniform((2, *shape), seed)
    return np.sqrt(-2 * np.log1p(-first)) * np.cos(2 * np.pi * second)


def counts_of(size, resamples, seed, name):
    return np.concatenate(list(_counts(size, resamples, seed, name)))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100, 1001])
def test_each_resample_draws_as_many_as_there_are(size):
    counts = counts_of(size, 700, 3, "x")
    assert counts.shape == (700, size)
    assert (counts.sum(1) == size).all()
    assert (counts >= 0).all()
    assert np.abs(counts.mean(0) - 1).max() < 5 / math.sqrt(700)
    if size > 1:
        assert counts.var(0).mean() == pytest.approx(1 - 1 / size, rel=0.1)
        assert len(np.unique(counts, axis=0)) > min(2, size - 1)


def test_draws_have_names_and_continue_over_chunks():
    few, many = counts_of(100_000, 3, 0, "a"), counts_of(100_000, 6, 0, "a")
    assert np.array_equal(few, many[:3])
    assert not np.array_equal(few, counts_of(100_000, 3, 0, "b"))
    assert not np.array_equal(few, counts_of(100_000, 3, 1, "a"))
    assert not np.array_equal(many[2], many[3])


def test_the_draws_are_those_written_here():
    """Raw Philox words: a change would change every published interval."""
    assert counts_of(5, 3, 0, "units").astype(int).tolist() == [[0, 0, 1, 2, 2], [4, 0, 0, 0, 1], [2, 0, 0, 1, 2]]


def test_interval_is_that_of_all_possible_resamples():
    values = np.array([0.0, 1.0, 1.0, 5.0])
    means = [np.mean(drawn) for drawn in product(values, repeat=4)]
    for level in (0.5, 0.8, 0.95):
        expected = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
        found = bootstrap_interval(values, resamples=40_000, level=level)
        assert found == pytest.approx(expected, abs=0.26)  # one step of the mean's grid
        assert found[0] < values.mean() < found[1]


def test_interval_of_whole_units_is_that_of_all_possible_resamples():
    values, units = np.array([1.0, 0.0, 1.0, 1.0, 0.0, 0.0]), np.array([7, 3, 7, 7, 3, 9])
    parts = [values[units == unit] for unit in np.unique(units)]
    means = [np.concatenate(drawn).mean() for drawn in product(parts, repeat=3)]
    for level in (0.3, 0.6, 0.9):
        expected = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], method="nearest")
        assert bootstrap_interval(values, units, resamples=40_001, level=level) == pytest.approx(expected, abs=1e-9)


def test_many_values_give_the_normal_interval():
    values = normal((20_000,), 0) * 3 + 1
    low, high = bootstrap_interval(values, resamples=2000)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.06 * half)


def test_coverage_is_what_it_says():
    truth, inside = 0.3, 0
    for seed in range(400):
        values = uniform((80,), seed) < truth
        low, high = bootstrap_interval(values, seed=seed, resamples=500)
        inside += low <= truth <= high
    assert 0.92 <= inside / 400 <= 0.97


def test_coverage_of_correlated_queries_needs_units():
    """Five queries a unit that are nearly equal: without units the interval is far too narrow."""
    covered = {"units": 0, "queries": 0}
    units = np.repeat(np.arange(60), 5)
    for seed in range(400):
        values = np.repeat(normal((60,), 2 * seed), 5) + 0.3 * normal((300,), 2 * seed + 1)
        for name, of in (("units", units), ("queries", None)):
            low, high = bootstrap_interval(values, of, resamples=400)
            covered[name] += low <= 0 <= high
    assert 0.92 <= covered["units"] / 400 <= 0.97
    assert covered["queries"] / 400 < 0.75


def test_units_of_one_query_change_nothing():
    values = uniform((50,), 0)
    assert bootstrap_interval(values, np.arange(50)) == bootstrap_interval(values)


def test_intervals_are_repeated_exactly_and_depend_on_the_seed():
    values = uniform((50,), 0)
    assert bootstrap_interval(values, seed=4) == bootstrap_interval(values, seed=4)
    assert bootstrap_interval(values, seed=4) != bootstrap_interval(values, seed=5)
    assert bootstrap_interval(np.ones(9, bool)) == (1, 1)


def test_nothing_to_resample():
    with pytest.raises(ValueError, match="0 values"):
        bootstrap_interval(np.zeros(0))
    with pytest.raises(ValueError, match="3 values with 2 units"):
        bootstrap_interval(np.zeros(3), np.zeros(2, int))


def test_comparison_is_paired():
    a = uniform((200,), 0)
    b = a - 0.1 + 0.01 * (uniform((200,), 1) - 0.5)
    found = compare_paired(a, b, resamples=1000)
    assert found.difference == pytest.approx((a - b).mean())
    assert found.high - found.low < 0.002
    assert found.low < found.difference < found.high
    alone = bootstrap_interval(a, resamples=1000)
    assert alone[1] - alone[0] > 0.05
    back = compare_paired(b, a, resamples=1000)
    assert (back.low, back.high) == pytest.approx((-found.high, -found.low))
    assert (found.n, found.units) == (200, 200)
    assert (found.only_a, found.only_b, found.p_value) == (None, None, None)


def test_right_and_wrong_are_counted_and_tested():
    a = np.array([1, 1, 1, 1, 1, 0, 1, 0, 0], bool)
    b = np.array([0, 0, 0, 0, 0, 1, 1, 0, 0], np.float32)
    found = compare_paired(a, b)
    assert (found.only_a, found.only_b, found.n) == (5, 1, 9)
    assert found.p_value == 2 * (1 + 6) / 2**6
    assert found.difference == pytest.approx(4 / 9)
    same = compare_paired(a, a)
    assert (same.difference, same.low, same.high, same.only_a, same.only_b, same.p_value) == (0, 0, 0, 0, 0, 1)


def test_queries_of_one_unit_are_not_tested_as_if_independent():
    a, b = np.array([1, 1, 0, 1], bool), np.array([0, 0, 1, 1], bool)
    found = compare_paired(a, b, np.array([0, 0, 1, 1]))
    assert (found.only_a, found.only_b, found.p_value) == (2, 1, None)
    assert (found.n, found.units) == (4, 2)
    alone = compare_paired(a, b, np.array([4, 2, 1, 3]))
    assert (alone.p_value, alone.units) == (1.0, 4)
    units = np.repeat(np.arange(40), 5)
    right = np.repeat(uniform((40,), 0) < 0.5, 5)
    clustered, plain = (compare_paired(right, np.zeros(200), of) for of in (units, None))
    assert clustered.high - clustered.low > 1.8 * (plain.high - plain.low)


def test_comparison_of_different_queries():
    with pytest.raises(ValueError, match=r"shape \(3,\) and \(4,\) are not of the same queries"):
        compare_paired(np.zeros(3), np.zeros(4))


def test_coverage_of_a_difference():
    inside = 0
    for seed in range(400):
        common, first, second = uniform((3, 100), seed)
        a, b = (common + first) < 0.9, (common + second) < 0.8
        found = compare_paired(a, b, resamples=400)
        inside += found.low <= 0.9**2 / 2 - 0.8**2 / 2 <= found.high
    assert 0.92 <= inside / 400 <= 0.97


@pytest.mark.parametrize(
    ("only_a", "only_b", "expected"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (0, 5, 2 / 32),
        (5, 0, 2 / 32),
        (6, 0, 2 / 64),
        (1, 1, 1.0),
        (1, 7, 2 * (1 + 8) / 256),
        (2, 8, 2 * (1 + 10 + 45) / 1024),
        (10, 2, 2 * (1 + 12 + 66) / 4096),
        (3, 4, 1.0),
    ],
)
def test_mcnemar_is_the_binomial_by_hand(only_a, only_b, expected):
    assert mcnemar_exact(only_a, only_b) == expected


def test_mcnemar_of_many():
    """Against the normal approximation with continuity correction, which is good here."""
    z = (abs(12_700 - 12_300) - 1) / math.sqrt(25_000)
    assert mcnemar_exact(12_300, 12_700) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=1e-3)
    assert mcnemar_exact(0, 5000) == 0.0


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.4, 0.9]) == [1.0, 1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []
    assert holm([0.01, 0.0101]) == pytest.approx([0.02, 0.02])


def experiment(seeds=3, items=(40, 25), seed=0):
    base = {metric: uniform((1, size), seed + 10 * number) for number, (metric, size) in enumerate(
        zip(("recall", "accuracy"), items, strict=True))}  # fmt: skip
    return {
        arm: {
            metric: (base[metric] + 0.3 * normal((seeds, base[metric].shape[1]), seed + 100 * place + 7)) < level
            for metric in base
        }
        for place, (arm, level) in enumerate({"control": 0.4, "grouped": 0.8}.items())
    }


def gains(means):
    gain = {metric: means["grouped"][metric] - means["control"][metric] for metric in ("recall", "accuracy")}
    return {**gain, "ratio": gain["recall"] / gain["accuracy"], "level": means["control"]["recall"]}


def test_crossed_bootstrap_is_a_loop_over_the_same_draws():
    values = experiment()
    found = crossed_bootstrap(values, gains, seed=5, resamples=60, level=0.8)
    seed_counts = counts_of(3, 60, 5, "seeds").astype(int)
    item_counts = {metric: counts_of(size, 60, 5, f"{size} items").astype(int)
                   for metric, size in (("recall", 40), ("accuracy", 25))}  # fmt: skip
    draws = []
    for r in range(60):
        seeds = np.repeat(np.arange(3), seed_counts[r])
        items = {metric: np.repeat(np.arange(counts.shape[1]), counts[r]) for metric, counts in item_counts.items()}
        draws.append(gains({
            arm: {metric: np.mean([[of_arm[metric][s, i] for i in items[metric]] for s in seeds]) for metric in of_arm}
            for arm, of_arm in values.items()
        }))  # fmt: skip
    plain = gains({arm: {metric: array.mean() for metric, array in of_arm.items()} for arm, of_arm in values.items()})
    assert list(found) == ["recall", "accuracy", "ratio", "level"]
    for name, estimate in found.items():
        assert estimate.value == pytest.approx(plain[name])
        expected = np.quantile([draw[name] for draw in draws], [0.1, 0.9])
        assert (estimate.low, estimate.high) == pytest.approx(expected)


def test_crossed_bootstrap_with_one_seed_is_the_bootstrap_over_items():
    values = {"a": {"m": uniform((1, 300), 0)}}
    found = crossed_bootstrap(values, lambda means: {"mean": means["a"]["m"]})["mean"]
    assert found.value == pytest.approx(values["a"]["m"].mean())
    expected = bootstrap_interval(values["a"]["m"][0])
    assert (found.low, found.high) == pytest.approx(expected, abs=0.15 * (expected[1] - expected[0]))


def test_seeds_that_differ_widen_the_interval():
    same = np.repeat(uniform((1, 300), 0), 5, axis=0)
    different = same + np.array([-0.4, -0.2, 0.0, 0.2, 0.4])[:, None]
    widths = []
    for outcomes in (same, different):
        found = crossed_bootstrap({"a": {"m": outcomes}}, lambda means: {"mean": means["a"]["m"]})["mean"]
        widths.append(found.high - found.low)
    assert widths[1] > 3 * widths[0]
    assert widths[1] == pytest.approx(2 * 1.96 * 0.283 / math.sqrt(5), rel=0.15)


def test_arms_are_paired():
    """What seeds and items share between arms does not blur the difference."""
    control = normal((4, 50), 0) * 5
    arms = {"control": {"m": control}, "grouped": {"m": control + 1}}
    found = crossed_bootstrap(arms, lambda m: {"gain": m["grouped"]["m"] - m["control"]["m"], "m": m["control"]["m"]})
    assert found["gain"] == pytest.approx((1, 1, 1))
    assert found["m"].high - found["m"].low > 1


def test_metrics_of_the_same_items_share_their_draws():
    values = {"a": {"m": uniform((1, 100), 0), "copy": uniform((1, 100), 0), "longer": uniform((1, 101), 0)}}
    found = crossed_bootstrap(
        values, lambda m: {name: m["a"]["m"] - m["a"][name] for name in ("copy", "longer")} | {"m": m["a"]["m"]}
    )
    assert found["copy"] == (0, 0, 0)
    width = found["m"].high - found["m"].low
    assert found["longer"].high - found["longer"].low > 1.2 * width  # two draws of their own: the square root of two


def test_ratios_to_zero_are_left_out():
    values = {"a": {"m": np.array([[0.0, 0.0, 1.0]]), "zero": np.zeros((1, 4)), "one": np.ones((1, 2))}}
    found = crossed_bootstrap(
        values,
        lambda m: {"some": m["a"]["one"] / m["a"]["m"], "none": m["a"]["m"] / m["a"]["zero"]},
        resamples=500,
    )
    assert found["some"] == pytest.approx((3, 1, 3))
    assert math.isinf(found["none"].value)
    assert all(map(math.isnan, found["none"][1:]))


def test_crossed_bootstrap_is_repeated_exactly():
    assert crossed_bootstrap(experiment(), gains, resamples=50) == crossed_bootstrap(experiment(), gains, resamples=50)
    other = crossed_bootstrap(experiment(), gains, resamples=50, seed=1)
    assert other["recall"].value == crossed_bootstrap(experiment(), gains, resamples=50)["recall"].value
    assert other != crossed_bootstrap(experiment(), gains, resamples=50)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "are empty"),
        ({"a": {}}, "are empty"),
        ({"a": {"m": np.zeros((2, 0))}}, "are empty"),
        ({"a": {"m": np.zeros((2, 3)), "n": np.zeros((3, 3))}}, "do not have the same number of seeds"),
        ({"a": {"m": np.zeros((2, 3))}, "b": {"m": np.zeros((2, 4))}}, r"arm 'b' has .*\(2, 4\).* 'a' of shape"),
        ({"a": {"m": np.zeros((2, 3))}, "b": {"n": np.zeros((2, 3))}}, "arm 'b' has"),
    ],
)
def test_arms_that_do_not_fit_together(values, message):
    with pytest.raises(ValueError, match=message):
        crossed_bootstrap(values, lambda means: {})


@pytest.mark.parametrize("seed", range(4))
def test_mutual_information_is_that_of_scikit_learn(seed):
    numbers = np.random.default_rng(seed)
    a = numbers.integers(0, 5, 300)
    b = np.where(numbers.random(300) < 0.6, a, numbers.integers(10, 14, 300))
    assert normalized_mutual_information(a, b) == pytest.approx(normalized_mutual_info_score(a, b), abs=1e-12)
    assert normalized_mutual_information(a, a + 7) == pytest.approx(1)


def test_mutual_information_without_any():
    assert normalized_mutual_information([0, 0, 1, 1], [0, 1, 0, 1]) == pytest.approx(0)
    assert (
        normalized_mutual_information([0, 0, 0], [5, 5, 5]) == normalized_mutual_info_score([0, 0, 0], [5, 5, 5]) == 1
    )
    assert (
        normalized_mutual_information([0, 0, 0], [0, 1, 2]) == normalized_mutual_info_score([0, 0, 0], [0, 1, 2]) == 0
    )
