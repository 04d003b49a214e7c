import itertools
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import normalized_mutual_info_score

from mcl_clip.core.distributed import torch_generator
from mcl_clip.core.errors import UserError
from mcl_clip.stages import kmeans as cluster
from mcl_clip.stages import shared_metric as shared_metric_module
from mcl_clip.stages.kmeans import Clustering, spherical_kmeans
from mcl_clip.stages.shared_metric import fit_shared_metric, project_rows


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


@pytest.fixture
def looked_at(monkeypatch):
    """How many rows were compared with centroids in each call."""
    counts, nearest = [], cluster._nearest

    def counted(features, centroids):
        counts.append(len(features))
        return nearest(features, centroids)

    monkeypatch.setattr(cluster, "_nearest", counted)
    return counts


@pytest.mark.parametrize(("clusters", "noise"), [(1, 1.0), (7, 1.0), (20, 0.3)])
def test_rows_that_are_not_looked_at_again_would_not_have_moved(monkeypatch, looked_at, clusters, noise):
    monkeypatch.setattr(cluster, "CHUNK_ROWS", 500)
    monkeypatch.setattr(cluster, "BLOCK_ROWS", 64)
    features, _ = planted(3000, 30, noise)
    features[::70] = 0
    some, calls = fit(features, clusters, tolerance=0.0, sample_rows=200), sum(looked_at)
    monkeypatch.setattr(cluster, "UNIT_LIMIT", 1e6)  # every centroid may have come near every row
    every = fit(features, clusters, tolerance=0.0, sample_rows=200)
    np.testing.assert_array_equal(some.assignments, every.assignments)
    assert some.centroids.tobytes() == every.centroids.tobytes()
    assert some.trace == every.trace
    assert calls < (0.9 * (sum(looked_at) - calls) if clusters > 1 else 2 * (200 + 3000))


def test_sums_stay_exact_while_rows_move():
    features, _ = planted(3000, 30, 1.0)
    directions = torch.from_numpy(planted(60, 60, 0.0)[0]).float()
    members = cluster._Members(lambda start, stop: features[start:stop], [(0, 1000), (1000, 3000)], directions[:6])
    for number in range(10):
        members.move_to(directions[6 * number : 6 * number + 6])
        assignments = torch.cat(members.clusters).numpy()
        whole = (features.astype(np.float64) * 2**24).astype(np.int64)
        expected = np.stack([whole[assignments == k].sum(0) for k in range(6)])
        np.testing.assert_array_equal(members.sums().numpy(), expected)
        assert members.sizes().tolist() == np.bincount(assignments, minlength=6).tolist()


def test_a_row_as_near_to_two_centroids_goes_to_the_first_in_any_company():
    draw = np.random.default_rng(0)
    half = unit(draw.normal(size=(300, 256)))
    features = torch.from_numpy(np.concatenate([half, half], axis=1)).float() / 2**0.5
    left, right = torch.nn.functional.normalize(torch.from_numpy(draw.normal(size=(2, 256))), dim=1).float()
    centroids = torch.stack([torch.cat([left, right]), torch.cat([right, left])])
    for size in (1, 7, 300):
        for some in features.split(size):
            assert not cluster._nearest(some, centroids)[0].any()


@pytest.mark.parametrize("clusters", [1, 6])
def test_the_objective_is_that_of_each_row_with_its_centroid(clusters):
    features, _ = planted(2000, 30, 1.0)
    features[::50] = 0
    found = fit(features, clusters)
    own = (features.astype(np.float64) * found.centroids[found.assignments]).sum(1)
    assert found.trace[-1]["objective"] == pytest.approx(np.mean(1 - own[features.any(1)]), abs=1e-7)


def test_a_start_does_not_depend_on_those_beside_it():
    features = torch.from_numpy(planted(1000, 30, 1.0)[0]).float()

    def generators():
        return [torch_generator("test", start) for start in range(3)]

    together = cluster._plus_plus(features, 9, generators())
    alone = [cluster._plus_plus(features, 9, [generator])[0] for generator in generators()]
    assert all(torch.equal(one, other) for one, other in zip(together, alone, strict=True))
    assert not torch.equal(together[0], together[1])


def test_starts_reach_small_clusters_and_take_no_row_twice():
    """Candidates are drawn by their distance to the nearest row so far: rarely from a thousand equal rows."""
    rare = torch.eye(5)[1:]
    features = torch.cat([torch.eye(5)[:1].expand(1000, 5), rare])
    for start in range(3):
        (found,) = cluster._plus_plus(features, 5, [torch_generator("test", start)])
        assert len(found.unique(dim=0)) == 5
    shorter = 0.5 * unit_rows(5)  # as far from themselves as from others, nearly
    (found,) = cluster._plus_plus(shorter, 5, [torch_generator("test")])
    assert len(found.unique(dim=0)) == 5


def unit_rows(rows: int) -> torch.Tensor:
    return torch.from_numpy(planted(rows, rows, 1.0)[0]).float()


def test_starts_have_generators_of_their_own(monkeypatch):
    seeds, plus_plus = [], cluster._plus_plus

    def recorded(features, num_clusters, generators):
        seeds.extend(generator.initial_seed() for generator in generators)
        return plus_plus(features, num_clusters, generators)

    monkeypatch.setattr(cluster, "_plus_plus", recorded)
    fit(planted(200, 5, 0.5)[0], 5, num_starts=4)
    assert len(set(seeds)) == 4


def test_an_empty_cluster_starts_at_the_farthest_row_of_the_largest():
    features, _ = planted(1000, 30, 1.0)
    directions = unit_rows(3)
    far = -torch.nn.functional.normalize(directions.sum(0, keepdim=True))
    centroids = torch.cat([directions, 1e3 * far, 1e3 * far])
    centroids[3:] = 0  # nearer than these to no row but those that point away from all
    members = cluster._Members(lambda a, b: features[a:b], [(0, 400), (400, 1000)], centroids)
    members.move_to(centroids)
    members.clusters = [clusters.clamp(max=2) for clusters in members.clusters]
    sizes = members.sizes()
    found = cluster._new_centroids(members, members.sums(), sizes)
    largest, assigned = int(sizes.argmax()), torch.cat(members.clusters)
    cosines = torch.from_numpy(features).double() @ centroids[largest].double()
    farthest = cosines.where(assigned == largest, torch.inf).argsort()[:2]
    assert sizes[3:].tolist() == [0, 0]
    assert farthest.max() >= 400
    expected = torch.nn.functional.normalize(torch.from_numpy(features)[farthest].float())
    torch.testing.assert_close(found[3:], expected, rtol=0, atol=0)


def test_a_cluster_without_rows_keeps_its_direction_in_the_sample():
    found = cluster._directions(torch.tensor([[3, 4], [0, 0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert found.tolist() == [[pytest.approx(0.6), pytest.approx(0.8)], [0.0, 1.0]]


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
    hard, _ = planted(2000, 30, 1.0)
    alone = fit(hard, 12, sample_rows=2000, num_starts=1)
    monkeypatch.setattr(cluster, "ROWS_IN_FULL_FIT", 2000)
    whole = fit(hard, 12, sample_rows=2000, num_starts=1)
    assert alone.trace[-1]["objective"] < 1.005 * whole.trace[-1]["objective"]  # it has converged on the sample


def test_one_cluster_and_as_many_as_rows():
    features, _ = planted(40, 3, 0.5)
    assert not fit(features, 1).assignments.any()
    assert sorted(fit(features, 40).assignments) == list(range(40))
    assert sorted(fit(np.array([[0.6, 0.8, 0], [0.6, 0, 0.8]], np.float16), 2).assignments) == [0, 1]


def test_too_few_distinct_rows_are_refused():
    features, _ = planted(3, 3, 0.1)
    message = "4 clusters need at least as many distinct samples, and there are 3; use a smaller --stages.K.cluster"
    for repeats in (1, 200):
        with pytest.raises(UserError, match=message):
            fit(np.repeat(features, repeats, axis=0), 4)
    with pytest.raises(UserError, match="there are 0"):
        fit(np.zeros((10, 4), np.float16), 1)


def two_views(num_rows=4000, dim=12, correlations=(0.95, 0.6), seed=0):
    """Image and text features that share two causes under much noise of their own; row 5 has a bad picture.

    Returns float16 unit features of both sides, and the causes.
    """
    draw = np.random.default_rng(seed)
    causes = draw.normal(size=(num_rows, 2))
    sides = []
    for _ in range(2):
        kept = np.sqrt(correlations)
        shared = kept * causes + np.sqrt(1 - kept**2) * draw.normal(size=causes.shape)
        own = draw.normal(size=(num_rows, dim - 2)) * np.r_[3.0, np.ones(dim - 3)]
        features = np.concatenate([shared, own], axis=1) @ np.linalg.qr(draw.normal(size=(dim, dim)))[0] + 0.5
        sides.append((features / 10).astype(np.float16))  # of any length: the metric is one of given features
    sides[0][5] = 0
    return *sides, causes


def shared_metric(image, text):
    return fit_shared_metric(lambda a, b: image[a:b], lambda a, b: text[a:b], len(image))


def test_the_metric_weighs_directions_by_the_odds_of_a_common_cause():
    """rho / (1 - rho^2) on each canonical direction, and next to nothing on what only one side has."""
    image, text, _ = two_views()
    good = np.arange(len(image)) != 5
    projections = shared_metric(image, text)
    moved = [
        (side[good].astype(np.float64) - projection.mean) @ projection.matrix
        for side, projection in zip((image, text), projections, strict=True)
    ]
    rho = np.array([0.95, 0.6])
    for side in moved:
        assert np.abs(side.mean(0)).max() < 0.02
        assert np.allclose(side.var(0)[:2], rho / (1 - rho**2), rtol=0.1)
        assert side.var(0)[2:].max() < 0.1
    assert np.allclose([np.corrcoef(moved[0][:, i], moved[1][:, i])[0, 1] for i in range(2)], rho, atol=0.03)


def test_projected_features_are_unit_vectors_and_bad_rows_stay_zeros():
    image, text, _ = two_views()
    image_side, text_side = shared_metric(image, text)
    projected = image_side(image)
    assert projected.dtype == np.float16
    assert not projected[5].any()
    moved = (image.astype(np.float64) - image_side.mean) @ image_side.matrix
    np.testing.assert_allclose(projected[:5], (moved / np.linalg.norm(moved, axis=1, keepdims=True))[:5], atol=1e-3)
    assert np.allclose(np.linalg.norm(np.delete(projected, 5, 0).astype(np.float64), axis=1), 1, atol=2e-3)
    assert text_side(text)[5].any()


def test_a_row_with_one_bad_side_does_not_move_the_metric():
    image, text, _ = two_views()
    absurd = text.copy()
    absurd[5] = 100
    for found, expected in zip(shared_metric(image, absurd), shared_metric(image, text), strict=True):
        np.testing.assert_array_equal(found.matrix, expected.matrix)


def test_the_metric_is_finite_where_both_sides_agree_entirely_or_nothing_varies():
    image, _, _ = two_views(400)
    for text in (image, image[:, ::-1]):  # all correlations are 1
        for projection in shared_metric(image, np.ascontiguousarray(text)):
            assert np.isfinite(projection.matrix).all()
            assert 1 < np.abs(projection.matrix).max() < 1e4
    constant = np.full((100, 4), 0.5, np.float16)
    projection, _ = shared_metric(constant, constant)
    assert np.isfinite(projection.matrix).all()
    assert not projection(constant).any()  # a row at the mean has no direction


def test_products_are_added_in_blocks_that_float64_holds():
    """A sum of more rows, each a product of almost 2^40, would be rounded."""
    rows = np.full((16_384, 1), 0.9995, np.float16)
    found = shared_metric_module._add_products(lambda a, b: rows[a:b], lambda a, b: rows[a:b], 1, [(0, 16_384)], None)
    unit = round(float(rows[0, 0]) * 2**20)
    assert found[0, 1] == 4 * ((4096 * unit**2 + 128) // 256)
    assert shared_metric_module.BLOCK_ROWS * 2**40 <= 2**53


def test_parts_are_whole_chunks_and_at_most_256():
    chunk, most = shared_metric_module.CHUNK_ROWS, shared_metric_module.MAX_PARTS
    for rows in (1, 10**6, 8 * chunk * most, 8 * chunk * most + 1, 4 * 10**8, 10**9):
        size = shared_metric_module.part_rows(rows)
        assert size % chunk == 0
        assert -(-rows // size) <= most
        assert size == 8 * chunk or -(-rows // (size - chunk)) > most  # no larger than that takes


def test_directions_of_noise_are_not_raised():
    image, text, _ = two_views()
    tiny = (np.random.default_rng(1).normal(size=(len(image), 1)) * 1e-4).astype(np.float16)
    image, text = np.concatenate([image, tiny], axis=1), np.concatenate([text, tiny], axis=1)
    projection = shared_metric(image, text)[0]
    without = projection.matrix.copy()
    without[-1] = 0
    weight = ((image[:, -1:].astype(np.float64) @ projection.matrix[-1:]).var(0)).sum()
    assert weight < 0.1 * (image.astype(np.float64) @ without).var(0).sum()


def test_the_metric_keeps_what_plain_clusters_mix():
    """What both sides share is in small directions; clusters of the features as they are follow the large ones."""
    draw = np.random.default_rng(0)
    shared = draw.integers(0, 4, 3000)
    centres = draw.normal(size=(4, 8))

    def side():
        own = 6 * draw.normal(size=(3000, 2))
        features = np.concatenate([own, centres[shared] + 0.1 * draw.normal(size=(3000, 8))], axis=1)
        return (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float16)

    def agreement(of):
        found = spherical_kmeans(lambda a, b: of[a:b], num_rows=3000, num_clusters=8, name=("w",), num_starts=2)
        return normalized_mutual_info_score(found.assignments, shared)

    image, text = side(), side()
    for features, projection in zip((image, text), shared_metric(image, text), strict=True):
        assert agreement(projection(features)) > agreement(features) + 0.2


@pytest.fixture
def small_parts(monkeypatch):
    """8 parts of 5 chunks for 4,000 rows."""
    monkeypatch.setattr(shared_metric_module, "CHUNK_ROWS", 100)
    monkeypatch.setattr(shared_metric_module, "PART_ROWS", 500)


@pytest.mark.usefixtures("small_parts")
def test_projected_rows_are_computed_once(tmp_path):
    image, text, _ = two_views()
    projection, asked = shared_metric(image, text)[0], []

    def rows(start, stop):
        asked.append((start, stop))
        return image[start:stop]

    for _ in range(2):
        projected = project_rows(rows, len(image), projection, tmp_path / "image")
        for start, stop in ((100, 900), (0, 500), (499, 501), (3900, 4000), (0, 4000)):
            assert np.array_equal(projected(start, stop), projection(image[start:stop]))
    assert asked == [(start, start + 100) for start in range(0, 4000, 100)]


class Stop:
    """A request to stop that arrives at the n-th look."""

    def __init__(self, at: int) -> None:
        self.left = at

    def is_stopping(self) -> bool:
        self.left -= 1
        return self.left < 0

    def check_stop(self) -> None:
        if self.left < 0:
            raise KeyboardInterrupt


def stopped(make, at: int):
    stop = Stop(at)
    with pytest.raises(KeyboardInterrupt):
        make(is_stopping=stop.is_stopping, check_stop=stop.check_stop)


@pytest.mark.usefixtures("small_parts")
def test_metric_and_projection_continue_with_the_next_part(tmp_path):
    image, text, _ = two_views()
    whole, asked = shared_metric(image, text), []

    def rows(start, stop):
        asked.append(start)
        return image[start:stop]

    fit = partial(fit_shared_metric, rows, lambda a, b: text[a:b], len(image), folder=tmp_path)
    stopped(fit, 13)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"products-{n:012d}.npy" for n in (0, 500)]
    asked.clear()
    for found, expected in zip(fit(), whole, strict=True):
        np.testing.assert_array_equal(found.matrix, expected.matrix)
        np.testing.assert_array_equal(found.mean, expected.mean)
    assert min(set(asked) - {0}) == 1000  # the first two parts are read from their files; row 0 tells the dimension

    project = partial(project_rows, rows, len(image), whole[0], tmp_path / "image")
    stopped(project, 27)
    assert len(list(tmp_path.glob("image-*"))) == 5
    asked.clear()
    assert np.array_equal(project()(0, 4000), whole[0](image))
    assert min(asked) == 2500


def test_the_sums_of_products_are_exact_on_the_grid():
    """Rounded to 2^-20 for features, and to 2^-32 for the sum of a block."""
    draw = np.random.default_rng(0)
    image, text = (unit(draw.normal(size=(3000, 9))) for _ in range(2))
    text[7] = 0
    found = shared_metric_module._add_products(
        lambda a, b: image[a:b], lambda a, b: text[a:b], 9, [(0, 1000), (1000, 3000)], None
    ).numpy()
    pairs = np.concatenate([image, text, np.ones((3000, 1))], axis=1)[np.arange(3000) != 7].astype(np.float64)
    assert found[-1, -1] == 2999 << 32
    integers = np.round(pairs * 2**20).astype(np.int64).astype(object)
    blocks = np.split(integers, [999])  # no chunk has more rows than a block
    expected = sum((block.T @ block + 128) // 256 for block in blocks)
    assert (found == expected).all()


def set_per_backend():
    raise RuntimeError("mix of the legacy and new APIs")


@pytest.mark.parametrize("precision", [lambda: "medium", set_per_backend])
def test_clusters_do_not_presume_exact_float32(monkeypatch, precision):
    """TF32 and bfloat16 err by more than the margin within which ties are decided in float64."""
    features, _ = planted(2000, 30, 1.0)
    expected = fit(features, 7)
    real = torch.Tensor.__matmul__

    def coarse(a, b):
        return real(a.bfloat16(), b.bfloat16()).float() if a.dtype == torch.float32 else real(a, b)

    before = cluster._fit_sample
    start = before(lambda a, b: features[a:b], 2000, 7, (0, "test"), 8, 20_000)
    monkeypatch.setattr(cluster, "_fit_sample", lambda *args: start)  # on the main process alone: any start is right
    monkeypatch.setattr(torch.Tensor, "__matmul__", coarse)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", precision)
    found = fit(features, 7)
    np.testing.assert_array_equal(found.assignments, expected.assignments)
    assert found.centroids.tobytes() == expected.centroids.tobytes()


@pytest.mark.parametrize("at", [3, 25])
def test_k_means_stops_between_chunks(monkeypatch, at):
    monkeypatch.setattr(cluster, "CHUNK_ROWS", 100)
    features, _ = planted(1000, 30, 1.0)
    stopped(partial(fit, features, 7, tolerance=0.0), at)
