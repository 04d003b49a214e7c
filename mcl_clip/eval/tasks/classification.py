"""Zero-shot classification as CLIP_benchmark and DataComp define it, and a linear read-out of the same features."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from mcl_clip.data.index import ShardIndex
from mcl_clip.data.reader import Reader
from mcl_clip.distributed import permutation
from mcl_clip.errors import UserError
from mcl_clip.eval.embed import embed_images, embed_texts, find_shards

READ_ROWS = 256


@dataclass(frozen=True)
class ClassificationSet:
    """Labelled images, class names, and templates with `{c}` in the place of the name."""

    reader: Reader
    labels: Int64[np.ndarray, "images"]
    classnames: tuple[str, ...]
    templates: tuple[str, ...]

    @classmethod
    def open(cls, root: Path, *, split: str = "test") -> "ClassificationSet":
        """The set in `root`: classnames.txt, zeroshot_classification_templates.txt and tar files with `.cls` members.

        Raises:
            UserError: if the layout is not that, or a label is not a class.
        """
        classnames = _lines(root / "classnames.txt")
        templates = _lines(root / "zeroshot_classification_templates.txt")
        if wrong := [template for template in templates if "{c}" not in template]:
            raise UserError(f"the template {wrong[0]!r} in {root} has no {{c}} for the class name")
        index = ShardIndex.build([str(path) for path in find_shards(root, split)], text_first="cls")
        if skipped := index.skipped_by_reason():
            raise UserError(f"{root} has samples that cannot be used: {skipped}; write the set again")
        reader = Reader(index)
        labels = np.array([_label(sample.text, root, len(classnames)) for sample in _samples(reader)], np.int64)
        return cls(reader, labels, classnames, templates)

    @property
    def prompts(self) -> list[str]:
        """All templates of the first class, then of the second, and so on."""
        return [template.replace("{c}", name) for name in self.classnames for template in self.templates]


def _samples(reader: Reader) -> Any:
    size = len(reader.index)
    for start in range(0, size, READ_ROWS):
        yield from reader.read(np.arange(start, min(start + READ_ROWS, size)))


def _lines(path: Path) -> tuple[str, ...]:
    if not path.is_file():
        raise UserError(f"{path} is missing; a classification set has one name, or template, a line in it")
    lines = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    if not lines:
        raise UserError(f"{path} is empty; write one name, or template, a line")
    return lines


def _label(data: bytes, root: Path, num_classes: int) -> int:
    text = data.decode("ascii", "replace").strip()
    if not text.isdigit() or int(text) >= num_classes:
        raise UserError(f"{root} has the label {text!r}; labels are numbers below {num_classes}, the number of classes")
    return int(text)


@dataclass(frozen=True)
class ClassificationTask:
    """Zero-shot classification on one set, as a task of the suite."""

    name: str
    data: ClassificationSet
    main_metric = "acc1"

    @property
    def sha256(self) -> str:
        """Digest of index, labels and prompts."""
        index = self.data.reader.index
        digest = hashlib.sha256(index.digest.encode() + self.data.labels.tobytes())
        digest.update("\n".join(self.data.prompts).encode())
        return digest.hexdigest()

    def embed(
        self, model: Any, *, image_transform: Any, tokenizer: Any, num_workers: int, **options: Any
    ) -> dict[str, Tensor]:
        """Raw features: `image` of every image, `text` of every prompt."""
        images = embed_images(
            model, self.data.reader, image_transform=image_transform, num_workers=num_workers, **options
        )
        return {"image": images, "text": embed_texts(model, self.data.prompts, tokenizer=tokenizer, **options)}

    def score(
        self, image_features: Float[Tensor, "images dim"], text_features: Float[Tensor, "prompts dim"]
    ) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """acc1, acc5 (with five classes or more), mean per-class recall, and the accuracy of a linear read-out.

        The weights of a class are the normalised mean of its prompts' unit features. Ties count against the model.
        """
        for what, features in (("image", image_features), ("text", text_features)):
            if broken := int((~torch.isfinite(features).all(dim=1)).sum()):
                raise UserError(f"{broken} of {len(features)} {what} features are not finite; the model has diverged")
        labels = torch.from_numpy(self.data.labels)
        images = F.normalize(image_features.double())
        prompts = F.normalize(text_features.double()).view(len(self.data.classnames), len(self.data.templates), -1)
        scores = (images @ F.normalize(prompts.mean(1)).T).float()  # summed in float64: equal classes get equal scores
        own = scores.gather(1, labels[:, None])
        ranks = ((scores >= own).sum(1) - 1).numpy()
        right = ranks == 0
        recalls = [right[self.data.labels == label].mean() for label in np.unique(self.data.labels)]
        metrics = {"acc1": float(right.mean()), "mean_per_class_recall": float(np.mean(recalls))}
        if len(self.data.classnames) >= 5:
            metrics["acc5"] = float((ranks < 5).mean())
        metrics["linear_acc1"] = linear_accuracy(images, labels, len(self.data.classnames))
        return metrics, {"ranks": ranks.astype(np.int32)}

    def describe(self) -> dict[str, Any]:
        """What a record says of the task."""
        return {
            "key": f"classification/{self.name}",
            "task": "zeroshot_classification",
            "n_images": len(self.data.labels),
            "n_texts": len(self.data.prompts),
            "n_classes": len(self.data.classnames),
        }


def linear_accuracy(
    features: Float[Tensor, "images dim"], labels: Int64[Tensor, "images"], num_classes: int, *, folds: int = 5
) -> float:
    """Accuracy of a ridge regression to one-hot labels, each fold predicted from the others.

    It says whether the information is in the features, not whether the text tower can name it. The penalty is a
    thousandth of the mean eigenvalue of the covariance.
    """
    fold = torch.from_numpy(permutation(len(features), "folds", len(features))) % folds
    targets = F.one_hot(labels, num_classes).to(features.dtype)
    right = 0
    for number in range(folds):
        train = fold != number
        x, y = features[train] - features[train].mean(0), targets[train] - targets[train].mean(0)
        covariance = x.T @ x
        penalty = (1e-3 * covariance.diagonal().mean()).clamp(min=1e-12)  # above 0 for features that are all equal
        weights = torch.linalg.solve(covariance + penalty * torch.eye(len(covariance), dtype=features.dtype), x.T @ y)
        scores = (features[~train] - features[train].mean(0)) @ weights + targets[train].mean(0)
        right += int((scores.argmax(1) == labels[~train]).sum())
    return right / len(features)


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
