"""Zero-shot classification, single-label and multi-label, as CLIP_benchmark and DataComp define it.

Single-label sets also get a linear and a k-NN probe of the same image features.
"""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor
from torch.nn import functional as F

from mcl_clip.core.errors import UserError, shorten
from mcl_clip.eval.embed import check_finite, open_shards
from mcl_clip.eval.probes import FOLDS, knn_predictions, linear_predictions
from mcl_clip.eval.task import ImageSource, Task

CLASSNAMES = "classnames.txt"
TEMPLATES = "zeroshot_classification_templates.txt"
SCORED_IMAGES = 8192
AVERAGED_CLASSES = 64
NPY_MAGIC = b"\x93NUMPY"


@dataclass(frozen=True)
class ClassificationSet:
    """Labeled images, class names, and prompt templates with `{c}` for the class name.

    `labels` holds the class index of each image or, in a multi-label set, a boolean for each image and class.
    `images_digest` identifies the images.
    """

    source: ImageSource
    labels: Int64[np.ndarray, "images"] | Bool[np.ndarray, "images classes"]
    classnames: tuple[str, ...]
    templates: tuple[str, ...]
    images_digest: str

    @classmethod
    def open(cls, root: Path, *, is_multilabel: bool = False) -> "ClassificationSet":
        """Open a set with classnames.txt, zeroshot_classification_templates.txt and tar files of images with labels.

        The label of an image is a `.cls` member with the class index or, in a multi-label set, a `.npy` member with a 0
        or a 1 for each class.

        Raises:
            UserError: if the layout is another, a label is invalid, or no image of a multi-label set has any class.
        """
        classnames, templates = read_lines(root / CLASSNAMES), read_templates(root)
        member, parse = ("npy", _parse_multilabel) if is_multilabel else ("cls", _parse_label)
        source = open_shards(root, text=member)
        index = source.reader.index
        labels = np.array(
            [parse(s.text, f"{index.key(s.row)}.{member} in {root}", len(classnames)) for s in source.samples()]
        )
        if is_multilabel and not labels.any():
            raise UserError(f"none of the {len(labels)} images in {root} has any of the {len(classnames)} classes")
        return cls(source, labels, classnames, templates, index.digest)

    @property
    def texts(self) -> list[str]:
        """The prompts of the first class, then of the second, and so on."""
        return [template.replace("{c}", name) for name in self.classnames for template in self.templates]

    @property
    def sha256(self) -> str:
        """Digest of images, labels and prompts."""
        digest = hashlib.sha256(self.images_digest.encode() + self.labels.tobytes())
        digest.update("\n".join(self.texts).encode())
        return digest.hexdigest()

    def describe(self, kind: str, name: str) -> dict[str, Any]:
        """Describe the set for the record of a task of this kind."""
        return {
            "key": f"{kind}/{name.removeprefix(f'{kind}/')}",
            "task": "zeroshot_classification",
            "n_images": len(self.labels),
            "n_texts": len(self.texts),
            "n_classes": len(self.classnames),
        }


def read_lines(path: Path) -> tuple[str, ...]:
    """Read class names or templates, one per line, stripped; blank lines are allowed at the end only.

    Raises:
        UserError: if the file is missing, or a line before the last is blank.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing; a classification set has one name, or template, per line in it")
    lines = tuple(line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().splitlines())
    if not lines:
        raise UserError(f"{path} is empty; write one name, or template, per line")
    if "" in lines:  # leaving it out would give the classes after it each other's labels
        raise UserError(
            f"line {lines.index('') + 1} of {path} is blank; write the name of the class there, or delete it"
        )
    return lines


def read_templates(root: Path) -> tuple[str, ...]:
    """Read the templates of a set; raise UserError for one without `{c}`."""
    templates = read_lines(root / TEMPLATES)
    if wrong := [template for template in templates if "{c}" not in template]:
        raise UserError(f"the template {shorten(repr(wrong[0]))} in {root} has no {{c}} for the class name")
    return templates


def _parse_label(data: bytes, where: str, num_classes: int) -> np.int64:
    text = data.decode("ascii", "replace").strip()
    if not text.isdigit() or int(text) >= num_classes:
        raise UserError(
            f"{where} has the label {shorten(repr(text))}; labels are numbers below {num_classes}, the "
            f"number of classes"
        )
    return np.int64(text)


def _parse_multilabel(data: bytes, where: str, num_classes: int) -> Bool[np.ndarray, "classes"]:
    try:
        if not data.startswith(NPY_MAGIC):  # np.load would also unpack .npz archives
            raise ValueError("not an array")
        values = np.load(io.BytesIO(data), allow_pickle=False)
        if values.dtype.kind not in "biuf":
            raise ValueError(f"of {values.dtype}, not of numbers")
    except (ValueError, EOFError, OSError, MemoryError) as error:
        raise UserError(f"{where} is not a plain numpy array ({error}); write the set again") from error
    if values.shape != (num_classes,) or not np.isin(values, (0, 1)).all():
        raise UserError(
            f"{where} has the shape {values.shape} and values from {values.min(initial=0)} to "
            f"{values.max(initial=0)}; it must hold a 0 or a 1 for each of the {num_classes} classes"
        )
    return np.asarray(values, bool)


def class_scores(
    image_features: Float[Tensor, "images dim"], text_features: Float[Tensor, "prompts dim"], num_classes: int
) -> Float32[Tensor, "images classes"]:
    """Compute the cosine similarity of every image with every class.

    The embedding of a class is the normalized mean of the unit features of its prompts.

    Raises:
        UserError: if features are not finite.
    """
    check_finite(image_features, text_features)
    prompts = text_features.view(num_classes, -1, text_features.shape[1])
    weights = torch.cat(
        [F.normalize(F.normalize(part.double(), dim=-1).mean(1)) for part in torch.split(prompts, AVERAGED_CLASSES)]
    )
    images = (F.normalize(part.double()) for part in torch.split(image_features, SCORED_IMAGES))
    # Summed in float64 and rounded, so that equal classes get equal scores and tie.
    return torch.cat([(part @ weights.T).float() for part in images])


@dataclass(frozen=True)
class ClassificationTask:
    """Zero-shot classification on one single-label set, with probes; see `Task`.

    For features wider than `probe_width` dimensions (0: never), there is another linear probe at that width.
    """

    name: str
    data: ClassificationSet
    probe_width: int = 0
    main_metric = "acc1"

    def score(
        self, image_features: Float[Tensor, "images dim"], text_features: Float[Tensor, "prompts dim"]
    ) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Compute acc1, acc5 (for five classes or more), mean per-class recall and probe accuracies.

        Ties count as errors. Probes (`mcl_clip.eval.probes`) need five images or more. Outcomes are per image; `ranks`
        counts the classes that score at least as high as the correct one.
        """
        num_classes, labels = len(self.data.classnames), torch.from_numpy(self.data.labels)
        scores = class_scores(image_features, text_features, num_classes)
        ranks = ((scores >= scores.gather(1, labels[:, None])).sum(1) - 1).numpy()
        # Weights with which the mean over images is the mean over the classes that have images.
        class_sizes = np.bincount(self.data.labels)
        weights = len(labels) / (np.count_nonzero(class_sizes) * class_sizes[self.data.labels])
        outcomes: dict[str, np.ndarray] = {"acc1": ranks == 0, "mean_per_class_recall": (ranks == 0) * weights}
        if num_classes >= 5:
            outcomes["acc5"] = ranks < 5
        if len(labels) >= FOLDS:
            outcomes |= probe_outcomes(image_features, labels, num_classes, self.probe_width)
        metrics = {name: float(np.mean(values, dtype=np.float64)) for name, values in outcomes.items()}
        outcomes["mean_per_class_recall"] = outcomes["mean_per_class_recall"].astype(np.float32)
        return metrics, {**outcomes, "ranks": ranks.astype(np.int32)}

    def describe(self) -> dict[str, Any]:
        """Describe the set for the record."""
        return self.data.describe("classification", self.name)


@dataclass(frozen=True)
class ProbeTask:
    """Linear and k-NN probes on one single-label set, for models without a text tower; see `Task`.

    For features wider than `probe_width` dimensions (0: never), there is another linear probe at that width.
    """

    name: str
    data: ClassificationSet  # without templates, so that there are no texts
    probe_width: int = 0
    main_metric = "linear_acc1"

    def score(
        self,
        image_features: Float[Tensor, "images dim"],
        text_features: Float[Tensor, "none _"],  # noqa: ARG002
    ) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Compute the accuracies of the probes (`mcl_clip.eval.probes`); outcomes are per image."""
        check_finite(image_features, image_features[:0])
        labels = torch.from_numpy(self.data.labels)
        outcomes = probe_outcomes(image_features, labels, len(self.data.classnames), self.probe_width)
        return {name: float(np.mean(values, dtype=np.float64)) for name, values in outcomes.items()}, outcomes

    def describe(self) -> dict[str, Any]:
        """Describe the set for the record."""
        return {**self.data.describe("probe", self.name), "task": "image_probe"}


def probe_outcomes(
    image_features: Float[Tensor, "images dim"], labels: Int64[Tensor, "images"], num_classes: int, width: int
) -> dict[str, np.ndarray]:
    """Return for each probe which images it classifies correctly; unless `width` is 0, also for one at this width."""
    images = F.normalize(image_features.double())
    outcomes = {
        "linear_acc1": linear_predictions(images, labels, num_classes).numpy(),
        "knn_acc1": knn_predictions(images, labels, num_classes).numpy(),
    }
    if 0 < width < images.shape[1]:
        narrow = linear_predictions(images, labels, num_classes, width=width)
        outcomes[f"linear_acc1_width_{width}"] = narrow.numpy()
    return outcomes


def as_probe(task: Task) -> ProbeTask:
    """Return the probes of the images of a classification set, for a model without a text tower.

    Raises:
        UserError: for a set of another kind, or with fewer images than the probes have folds.
    """
    if not isinstance(task, ClassificationTask):
        raise UserError(
            f"the set {task.name} needs a text tower, and this model has learned from images alone; evaluate it on "
            f"classification sets of one label per image, whose images are probed"
        )
    if len(task.data.labels) < FOLDS:
        raise UserError(
            f"the set {task.name} has {len(task.data.labels)} images, and probes need {FOLDS} or more; add images"
        )
    return ProbeTask(task.name, replace(task.data, templates=()))


def probe_at_stage_width(task: Task, stage_dims: Sequence[int]) -> Task:
    """Add a linear probe at the width of one stage to the classification or probe task of a model of several stages.

    Other tasks, and those of single stages, are returned unchanged.
    """
    if len(stage_dims) > 1 and isinstance(task, ClassificationTask | ProbeTask):
        return replace(task, probe_width=max(stage_dims))
    return task


@dataclass(frozen=True)
class MultilabelTask:
    """Zero-shot classification of images with several labels each; see `Task`."""

    name: str
    data: ClassificationSet
    main_metric = "mean_average_precision"

    def score(
        self, image_features: Float[Tensor, "images dim"], text_features: Float[Tensor, "prompts dim"]
    ) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Compute the mean average precision over the classes that have images; outcomes are per class."""
        scores = class_scores(image_features, text_features, len(self.data.classnames)).numpy()
        labels = self.data.labels
        precisions = np.array(
            [average_precision(scores[:, c], labels[:, c]) for c in np.flatnonzero(labels.any(0))], np.float64
        )
        metric = self.main_metric
        return {metric: float(precisions.mean())}, {metric: precisions.astype(np.float32)}

    def describe(self) -> dict[str, Any]:
        """Describe the set for the record."""
        return self.data.describe("multilabel", self.name)


def average_precision(scores: Float[np.ndarray, "images"], is_positive: Bool[np.ndarray, "images"]) -> float:
    """Compute the average precision of one class, sum over thresholds of (R_n - R_{n-1}) P_n.

    Equal to scikit-learn's `average_precision_score`: images of equal score share one threshold, so their order does
    not matter and a constant score gives the share of positives. At least one image must be positive.
    """
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))  # the last image at each threshold
    true_positives = np.cumsum(is_positive[order])[ends]
    return float((np.diff(true_positives, prepend=0) * true_positives / (ends + 1)).sum() / true_positives[-1])
