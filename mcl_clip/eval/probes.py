"""Read-outs of frozen image features: whether the information is there, not whether a text tower can name it.

Every read-out predicts each of five folds from the other four; the folds are a named draw.
"""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F

from mcl_clip.core.distributed import permutation

FOLDS = 5
NEIGHBOURS = 20
TEMPERATURE = 0.07
CHUNK = 1024


def linear_predictions(
    features: Float[Tensor, "images dim"],
    labels: Int64[Tensor, "images"],
    num_classes: int,
    *,
    width: int | None = None,
    folds: int = FOLDS,
) -> Bool[Tensor, "images"]:
    """Which images a ridge regression to one-hot labels gets right.

    The penalty is a thousandth of the mean eigenvalue of the covariance.

    Args:
        features: in float64.
        labels: numbers of the classes.
        num_classes: how many classes there are.
        width: compare at this many dimensions: wider features are reduced to their leading principal directions.
        folds: parts of the images, each predicted from the others; at most one a image.
    """
    fold = _folds(len(features), folds)
    right = torch.zeros(len(features), dtype=torch.bool)
    for number in range(folds):
        train = fold != number
        x = features if width is None else project(features, width, fitted_on=train)
        scores = _ridge(x[train], labels[train], x[~train], num_classes)
        right[~train] = scores.argmax(1) == labels[~train]
    return right


def _ridge(
    features: Float[Tensor, "train dim"],
    labels: Int64[Tensor, "train"],
    queries: Float[Tensor, "queries dim"],
    num_classes: int,
) -> Float[Tensor, "queries classes"]:
    """What a ridge regression predicts for each class; the one-hot labels are never spread out in memory."""
    mean = features.mean(0)
    x = features - mean
    shares = torch.bincount(labels, minlength=num_classes).to(x.dtype) / len(x)
    covariance = x.T @ x
    penalty = (1e-3 * covariance.diagonal().mean()).clamp(min=1e-12)  # above 0 for features that are all equal
    sums = torch.zeros(num_classes, x.shape[1], dtype=x.dtype).index_add_(0, labels, x)  # one-hot.T @ x
    weights = torch.linalg.solve(covariance + penalty * torch.eye(len(covariance), dtype=x.dtype), sums.T)
    scores: Tensor = (queries - mean) @ weights + shares
    return scores


def project(
    features: Float[Tensor, "images dim"], dim: int, *, fitted_on: Bool[Tensor, "images"]
) -> Float[Tensor, "images _reduced"]:
    """The features in their `dim` leading principal directions, found on a part of them, without labels.

    A model of several stages has a wider feature than each stage; at equal width a read-out has equally many weights.
    Features that are not wider than `dim` are returned as they are.
    """
    if features.shape[1] <= dim:
        return features
    mean = features[fitted_on].mean(0)
    x = features[fitted_on] - mean
    _, directions = torch.linalg.eigh(x.T @ x)  # eigenvalues rise
    return torch.mm(features - mean, directions[:, -dim:])


def knn_predictions(
    features: Float[Tensor, "images dim"],
    labels: Int64[Tensor, "images"],
    num_classes: int,
    *,
    neighbours: int = NEIGHBOURS,
    folds: int = FOLDS,
    chunk: int = CHUNK,
) -> Bool[Tensor, "images"]:
    """Which images their nearest neighbours by cosine get right: Wu et al. 2018 (arXiv 1805.01978), as in DINO.

    Each neighbour votes for its class with weight exp(cosine / 0.07). Ties count against the model.

    Args:
        features: of any length.
        labels: numbers of the classes.
        num_classes: how many classes there are.
        neighbours: how many vote; fewer where the other folds have fewer images.
        folds: parts of the images; the neighbours come from the other parts.
        chunk: queries at once; needs `chunk` x images x 5 bytes and changes no result.
    """
    unit, fold = F.normalize(features).float(), _folds(len(features), folds)
    count = min(neighbours, len(fold) - int(torch.bincount(fold).max()))
    right = []
    for start in range(0, len(unit), chunk):
        here = slice(start, start + chunk)
        cosine = (unit[here] @ unit.T).masked_fill_(fold[here, None] == fold, -torch.inf)
        nearest, places = cosine.topk(count)
        weights = (nearest.double() / TEMPERATURE).exp()
        votes = weights.new_zeros(len(weights), num_classes).scatter_add_(1, labels[places], weights)
        own = votes.gather(1, labels[here, None])
        right.append((votes >= own).sum(1) == 1)
    return torch.cat(right)


def _folds(size: int, folds: int) -> Int64[Tensor, "size"]:
    return torch.from_numpy(permutation(size, "folds", size)) % folds
