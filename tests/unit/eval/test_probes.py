import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from torch.nn import functional as F

from mcl_clip.core.distributed import permutation
from mcl_clip.eval.probes import knn_predictions, linear_predictions, project


def linear_accuracy(features, labels, num_classes):
    return float(linear_predictions(features, labels, num_classes).double().mean())


def clusters(images=120, classes=4, dim=24, strength=1.0, seed=0):
    """Return float64 noise around a center for each class, and the labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (images,), generator=generator)
    centres = torch.randn(classes, dim, generator=generator, dtype=torch.float64)
    noise = torch.randn(images, dim, generator=generator, dtype=torch.float64)
    return strength * centres[labels] + noise, labels


def folds(size):
    return permutation(size, "folds", size) % 5


def ridge_by_scikit_learn(features, labels, classes, width=None):
    """Tell which images are correct, fold by fold."""
    features, labels, fold = features.numpy(), labels.numpy(), folds(len(features))
    right = np.zeros(len(features), bool)
    for number in range(5):
        train, test = features[fold != number], features[fold == number]
        if width:
            pca = PCA(width, svd_solver="full").fit(train)
            train, test = pca.transform(train), pca.transform(test)
        penalty = 1e-3 * ((train - train.mean(0)) ** 2).sum(0).mean()
        fitted = Ridge(penalty).fit(train, np.eye(classes)[labels[fold != number]])
        right[fold == number] = fitted.predict(test).argmax(1) == labels[fold == number]
    return right


@pytest.mark.parametrize("width", [None, 6, 23])
@pytest.mark.parametrize("seed", range(3))
def test_the_linear_probe_is_that_of_scikit_learn(width, seed):
    features, labels = clusters(strength=0.5, seed=seed)
    right = linear_predictions(features, labels, 4, width=width).numpy()
    assert 0.3 < right.mean() < 0.95
    assert np.array_equal(right, ridge_by_scikit_learn(features, labels, 4, width))
    if width is None:
        assert linear_accuracy(features, labels, 4) == pytest.approx(right.mean())


def test_a_linear_probe_finds_what_is_there():
    labels = torch.arange(200) % 4
    images = torch.randn(200, 32, generator=torch.Generator().manual_seed(0)).double()
    images[:, 5:9] += 20 * F.one_hot(labels, 4)
    assert linear_accuracy(images, labels, 4) == 1
    assert knn_predictions(images, labels, 4).double().mean() == 1


@pytest.mark.parametrize("dim", [4, 300])
def test_probes_find_nothing_in_noise(dim):
    labels = torch.arange(400) % 4
    images = torch.randn(400, dim, generator=torch.Generator().manual_seed(1)).double()
    assert linear_accuracy(images, labels, 4) == pytest.approx(0.25, abs=0.1)  # predicted from other rows
    assert knn_predictions(images, labels, 4).double().mean() == pytest.approx(0.25, abs=0.1)


def test_probes_of_equal_features():
    labels = torch.tensor([0] * 30 + [1] * 10)
    assert linear_accuracy(torch.ones(40, 3).double(), labels, 2) == 0.75  # the most frequent class
    assert knn_predictions(torch.ones(40, 3).double(), labels, 2).double().mean() <= 0.75


def test_the_width_is_that_of_the_leading_directions():
    features, labels = clusters(strength=0)
    features[:, 3] += 9 * (labels == 1) - 9 * (labels == 2)  # the widest direction separates two of the classes
    in_train = torch.arange(120) % 3 > 0
    narrow = project(features, 1, fitted_on=in_train)
    assert narrow.shape == (120, 1)
    assert abs(np.corrcoef(narrow[:, 0], features[:, 3])[0, 1]) > 0.99
    assert torch.equal(project(features, 24, fitted_on=in_train), features)
    assert torch.equal(project(features, 99, fitted_on=in_train), features)


def test_the_projection_does_not_see_the_other_images():
    features, _ = clusters()
    in_train = torch.arange(120) % 3 > 0
    other = torch.where(in_train[:, None], features, 1e6)
    one, two = (project(values, 5, fitted_on=in_train)[in_train] for values in (features, other))
    assert torch.equal(one, two)


def test_a_doubled_model_probed_at_its_own_width_is_the_single_one():
    """Two equal stages side by side hold nothing more than one, and the projection finds just that."""
    features, labels = clusters(strength=0.5)
    twice = torch.cat([features, features], 1)
    assert torch.equal(linear_predictions(twice, labels, 4, width=24), linear_predictions(features, labels, 4))


def naive_knn(features, labels, classes, neighbours):
    """One image and one neighbour at a time."""
    unit, fold, right = F.normalize(features).float(), folds(len(features)), []
    for number in range(len(unit)):
        others = np.flatnonzero(fold != fold[number])
        cosine = (unit[others] @ unit[number]).double().numpy()
        votes = np.zeros(classes)
        for index in np.argsort(-cosine)[:neighbours]:
            votes[labels[others[index]]] += np.exp(cosine[index] / 0.07)
        right.append(votes.argmax() == labels[number])
    return np.array(right)


@pytest.mark.parametrize(("images", "neighbours"), [(120, 20), (120, 3), (18, 20)])
@pytest.mark.parametrize("chunk", [7, 1024])
def test_neighbours_vote_as_in_a_loop(images, neighbours, chunk):
    features, labels = clusters(images, strength=0.5)
    right = knn_predictions(features, labels, 4, neighbours=neighbours, chunk=chunk).numpy()
    assert 0.1 < right.mean() < 0.95
    assert np.array_equal(right, naive_knn(features, labels.numpy(), 4, neighbours))


def test_an_image_has_no_vote_in_its_own_fold():
    features, _ = clusters(60, classes=2, strength=0)
    fold = torch.from_numpy(folds(60))
    features = torch.eye(5, dtype=torch.float64)[fold] + 0.01 * features[:, :5]  # nearest are those of the same fold
    assert knn_predictions(features, fold, 5).sum() == 0


def test_ties_count_against_the_model():
    assert knn_predictions(torch.ones(10, 2).double(), torch.arange(10) % 2, 2, neighbours=8).double().mean() <= 0.5
