import itertools

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import normalized_mutual_info_score

from mcl_clip.errors import UserError
from mcl_clip.multistage import cluster
from mcl_clip.multistage.cluster import Clustering, fit_whitening, spherical_kmeans, whitened_rows


def unit(features: np.ndarray) -> np.ndarray:
    return (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float16)


def planted(rows: int, clusters: int, noise: float, dim: int = 16) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    truth = draw.integers(0, clusters, rows)
    return unit(unit(draw.normal(size=(clusters, dim)))[truth] + noise * draw.normal(size=(rows, dim))), truth


def fit(features: np.ndarray, clusters: int, **options) -> Clustering:
    return spherical_kmeans(
        lambda start, stop: features[start:stop],
        num_rows=len(features),
        num_clusters=clusters,
        **{"name": (0, "test"), **options},
    )


def objective(features: np.ndarray, assignments: np.ndarray) -> float:
    """Mean of 1 - cosine to the mean direction of each cluster."""
    features = features.astype(np.float64)
    sums = np.zeros((assignments.max() + 1, features.shape[1]))
    np.add.at(sums, assignments, features)
    return 1 - np.linalg.norm(sums, axis=1).sum() / len(features)


@pytest.mark.parametrize(("clusters", "noise"), [(5, 0.1), (20, 0.15), (12, 1.0)])
def test_the_objective_is_as_good_as_scikit_learns(clusters, noise):
    features, _ = planted(3000, clusters, noise)
    found = fit(features, clusters, num_starts=16)
    mine = objective(features, found.assignments)
    theirs = objective(features, KMeans(clusters, n_init=16, random_state=0).fit(features.astype(np.float64)).labels_)
    assert mine <= 1.01 * theirs
    assert found.trace[-1]["objective"] == pytest.approx(mine, abs=1e-3)  # features in float16 are unit to 1e-3


def test_planted_clusters_are_found():
    features, truth = planted(2000, 8, 0.08)
    found = fit(features, 8)
    assert len({*zip(truth, found.assignments, strict=True)}) == 8
    np.testing.assert_allclose(np.linalg.norm(found.centroids, axis=1), 1, atol=1e-6)
    means = np.stack([features[found.assignments == k].astype(np.float64).sum(0) for k in range(8)])
    assert ((found.centroids * means).sum(1) / np.linalg.norm(means, axis=1) > 0.9999).all()


def test_each_row_is_with_its_nearest_centroid_and_passes_gain(monkeypatch):
    monkeypatch.setattr(cluster, "CHUNK_ROWS", 100)
    features, _ = planted(950, 30, 1.0)
    found = fit(features, 7)
    similarity = features.astype(np.float64) @ found.centroids.astype(np.float64).T
    np.testing.assert_array_equal(found.assignments, similarity.argmax(1))
    objectives = [step["objective"] for step in found.trace]
    assert all(later <= earlier + 1e-6 for earlier, later in itertools.pairwise(objectives))


def test_the_draw_is_seeded_and_leaves_the_global_generator_alone():
    features, _ = planted(800, 30, 1.0)
    state = torch.get_rng_state()
    one, same, other = (fit(features, 6, name=name, num_starts=1) for name in ((0, "a"), (0, "a"), (1, "a")))
    np.testing.assert_array_equal(one.assignments, same.assignments)
    assert (one.assignments != other.assignments).any()
    assert torch.equal(state, torch.get_rng_state())


def test_bad_rows_count_for_nothing(monkeypatch):
    monkeypatch.setattr(cluster, "CHUNK_ROWS", 64)
    features, truth = planted(500, 4, 0.05)
    with_bad = np.insert(features, np.arange(0, 500, 10), 0, axis=0)
    is_bad = ~with_bad.any(1)
    found = fit(with_bad, 4)
    assert (found.assignments[is_bad] == 0).all()
    assert len({*zip(truth, found.assignments[~is_bad], strict=True)}) == 4


def test_a_small_sample_still_fits_all_rows(monkeypatch):
    monkeypatch.setattr(cluster, "CHUNK_ROWS", 128)
    features, truth = planted(2000, 5, 0.05)
    found = fit(features, 5, sample_rows=60)
    assert len({*zip(truth, found.assignments, strict=True)}) == 5


def test_many_rows_are_fitted_on_the_sample_alone(monkeypatch):
    monkeypatch.setattr(cluster, "ROWS_IN_FULL_FIT", 1000)
    features, truth = planted(2000, 5, 0.05)
    found = fit(features, 5, sample_rows=300)
    assert len(found.trace) == 1
    assert len({*zip(truth, found.assignments, strict=True)}) == 5


def test_one_cluster_and_as_many_as_rows():
    features, _ = planted(40, 3, 0.5)
    assert not fit(features, 1).assignments.any()
    assert sorted(fit(features, 40).assignments) == list(range(40))


def test_too_few_distinct_rows_are_refused():
    features, _ = planted(3, 3, 0.1)
    message = "4 clusters need at least as many distinct samples, and there are 3; use a smaller --stages.K.cluster"
    for repeats in (1, 200):
        with pytest.raises(UserError, match=message):
            fit(np.repeat(features, repeats, axis=0), 4)
    with pytest.raises(UserError, match="there are 0"):
        fit(np.zeros((10, 4), np.float16), 1)


def anisotropic(num_rows=4000, dim=12):
    """Unit float16 features in which one direction varies far more than the others; row 5 is bad."""
    draw = np.random.default_rng(0)
    features = draw.normal(size=(num_rows, dim)) * np.r_[6.0, np.ones(dim - 1)] + 1.0
    features = (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float16)
    features[5] = 0
    return features


def test_whitened_features_have_mean_zero_and_equal_variance():
    features = anisotropic()
    whitening = fit_whitening(lambda start, stop: features[start:stop], len(features))
    good = np.delete(features.astype(np.float64), 5, axis=0)
    moved = (good - whitening.mean) @ whitening.matrix
    assert np.abs(moved.mean(0)).max() < 1e-3
    assert np.allclose(np.cov(moved.T), np.eye(12), atol=0.01)
    whitened = whitening(features)
    assert whitened.dtype == np.float16
    assert not whitened[5].any()
    assert np.allclose(np.linalg.norm(np.delete(whitened, 5, 0).astype(np.float64), axis=1), 1, atol=2e-3)


def test_directions_of_noise_are_not_raised():
    features = anisotropic()
    features[:, -1] = (np.random.default_rng(1).normal(size=len(features)) * 1e-3).astype(np.float16)
    whitening = fit_whitening(lambda start, stop: features[start:stop], len(features))
    moved = (np.delete(features.astype(np.float64), 5, axis=0) - whitening.mean) @ whitening.matrix
    assert moved[:, -1].var() < 0.1


def test_whitening_keeps_what_plain_clusters_mix():
    """Two codes: one in a direction of large variance, one in eight small ones; the second is found only whitened."""
    draw = np.random.default_rng(0)
    hidden = draw.integers(0, 4, 3000)
    centres = draw.normal(size=(4, 8))
    features = np.concatenate([6 * draw.normal(size=(3000, 2)), centres[hidden] + 0.1 * draw.normal(size=(3000, 8))], 1)
    features = (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float16)

    def agreement(of):
        found = spherical_kmeans(lambda a, b: of[a:b], num_rows=3000, num_clusters=8, name=("w",), num_starts=2)
        return normalized_mutual_info_score(found.assignments, hidden)

    whitened = fit_whitening(lambda a, b: features[a:b], 3000)(features)
    assert agreement(whitened) > agreement(features) + 0.2


def test_whitened_rows_are_computed_once_and_leave_no_file(tmp_path):
    features, asked = anisotropic(), []

    def rows(start, stop):
        asked.append((start, stop))
        return features[start:stop]

    whitening = fit_whitening(rows, len(features))
    asked.clear()
    with whitened_rows(rows, len(features), whitening, tmp_path / "whitened.tmp") as whitened:
        for _ in range(3):
            assert np.array_equal(whitened(100, 900), whitening(features[100:900]))
        assert asked == [(0, len(features))]
    assert not list(tmp_path.iterdir())
