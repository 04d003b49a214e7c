"""Linear and k-NN probes of frozen image features: what the features hold, whatever a text encoder can name.

Every probe is cross-validated: it predicts each of five folds from the other four. The folds are a named random
permutation, so they are the same for every model.
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
) -> Bool[Tensor, "images"]:
    """Tell for each image whether a linear probe, a ridge regression to one-hot labels, classifies it correctly.

    The penalty is a thousandth of the mean eigenvalue of the covariance. Features are float64; those wider than `width`
    are projected to that many leading principal directions first.
    """
    fold = _assign_folds(len(features))
    correct = torch.zeros(len(features), dtype=torch.bool)
    for number in range(FOLDS):
        train = fold != number
        x = features if width is None else project(features, width, fitted_on=train)
        scores = _ridge_scores(x[train], labels[train], x[~train], num_classes)
        correct[~train] = scores.argmax(1) == labels[~train]
    return correct


def _ridge_scores(
    features: Float[Tensor, "train dim"],
    labels: Int64[Tensor, "train"],
    queries: Float[Tensor, "queries dim"],
    num_classes: int,
) -> Float[Tensor, "queries classes"]:
    mean = features.mean(0)
    x = features - mean
    class_shares = torch.bincount(labels, minlength=num_classes).to(x.dtype) / len(x)
    covariance = x.T @ x
    penalty = (1e-3 * covariance.diagonal().mean()).clamp(min=1e-12)  # above 0 for features that are all equal
    # one-hot.T @ x, without a one-hot matrix in memory
    sums = torch.zeros(num_classes, x.shape[1], dtype=x.dtype).index_add_(0, labels, x)
    weights = torch.linalg.solve(covariance + penalty * torch.eye(len(covariance), dtype=x.dtype), sums.T)
    scores: Tensor = (queries - mean) @ weights + class_shares
    return scores


def project(
    features: Float[Tensor, "images dim"], dim: int, *, fitted_on: Bool[Tensor, "images"]
) -> Float[Tensor, "images _reduced"]:
    """Project features to the `dim` leading principal directions of the rows `fitted_on` (PCA without labels).

    The features of a multistage model are wider than those of a stage; at equal width a linear probe has equally many
    weights. Features that are not wider than `dim` are returned unchanged.
    """
    if features.shape[1] <= dim:
        return features
    mean = features[fitted_on].mean(0)
    x = features[fitted_on] - mean
    _, directions = torch.linalg.eigh(x.T @ x)  # eigenvalues are in ascending order
    return torch.mm(features - mean, directions[:, -dim:])


def knn_predictions(
    features: Float[Tensor, "images dim"],
    labels: Int64[Tensor, "images"],
    num_classes: int,
    *,
    neighbours: int = NEIGHBOURS,
    chunk: int = CHUNK,
) -> Bool[Tensor, "images"]:
    """Tell for each image whether a weighted k-NN probe by cosine classifies it correctly.

    As in Wu et al. 2018 (arXiv 1805.01978) and DINO, each neighbor, from another fold, votes for its class with weight
    exp(cosine / 0.07). Ties count as errors. Fewer than `neighbours` vote if the other folds have fewer images. The
    queries of a step, `chunk`, do not change the result; they use `chunk` x images x 5 bytes.
    """
    unit, fold = F.normalize(features).float(), _assign_folds(len(features))
    count = min(neighbours, len(fold) - int(torch.bincount(fold).max()))
    correct = []
    for start in range(0, len(unit), chunk):
        rows = slice(start, start + chunk)
        cosine = (unit[rows] @ unit.T).masked_fill_(fold[rows, None] == fold, -torch.inf)
        nearest, indices = cosine.topk(count)
        weights = (nearest.double() / TEMPERATURE).exp()
        votes = weights.new_zeros(len(weights), num_classes).scatter_add_(1, labels[indices], weights)
        own = votes.gather(1, labels[rows, None])
        correct.append((votes >= own).sum(1) == 1)
    return torch.cat(correct)


def _assign_folds(size: int) -> Int64[Tensor, "size"]:
    return torch.from_numpy(permutation(size, "folds", size)) % FOLDS
