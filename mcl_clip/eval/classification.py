"""Zero-shot classification as CLIP_benchmark and DataComp define it, and read-outs of the same features."""

import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor
from torch.nn import functional as F

from mcl_clip.core.errors import UserError
from mcl_clip.data.index import ShardIndex
from mcl_clip.data.reader import RawSample, Reader
from mcl_clip.eval.embed import ImageSource, embed_images, embed_texts, find_shards
from mcl_clip.eval.probes import FOLDS, knn_predictions, linear_predictions
from mcl_clip.eval.task import Task

CLASSNAMES = "classnames.txt"
TEMPLATES = "zeroshot_classification_templates.txt"
READ_ROWS = 256
SCORED_IMAGES = 8192
AVERAGED_CLASSES = 64
NPY_MAGIC = b"\x93NUMPY"


@dataclass(frozen=True)
class ClassificationSet:
    """Labelled images, class names, and templates with `{c}` in the place of the name.

    `labels` holds the number of each image's class or, where an image may have several, whether it has each of them.
    `images_digest` tells the images from others.
    """

    source: Reader | ImageSource
    labels: Int64[np.ndarray, "images"] | Bool[np.ndarray, "images classes"]
    classnames: tuple[str, ...]
    templates: tuple[str, ...]
    images_digest: str

    @classmethod
    def open(cls, root: Path, *, split: str = "test") -> "ClassificationSet":
        """The set in `root`: classnames.txt, zeroshot_classification_templates.txt and tar files with `.cls` members.

        Raises:
            UserError: if the layout is not that, or a label is not a class.
        """
        classnames, templates = read_lines(root / CLASSNAMES), read_templates(root)
        reader = open_labelled(root, split, "cls")
        labels = [_label(sample.text, root, len(classnames)) for sample in samples_of(reader)]
        return cls(reader, np.array(labels, np.int64), classnames, templates, reader.index.digest)

    @property
    def prompts(self) -> list[str]:
        """All templates of the first class, then of the second, and so on."""
        return [template.replace("{c}", name) for name in self.classnames for template in self.templates]

    @property
    def sha256(self) -> str:
        """Digest of images, labels and prompts."""
        digest = hashlib.sha256(self.images_digest.encode() + self.labels.tobytes())
        digest.update("\n".join(self.prompts).encode())
        return digest.hexdigest()

    def embed(
        self, model: Any, *, image_transform: Any, tokenizer: Any, num_workers: int, **options: Any
    ) -> dict[str, Tensor]:
        """Raw features: `image` of every image, `text` of every prompt."""
        images = embed_images(model, self.source, image_transform=image_transform, num_workers=num_workers, **options)
        return {"image": images, "text": embed_texts(model, self.prompts, tokenizer=tokenizer, **options)}

    def counts(self) -> dict[str, int]:
        """Sizes, for the record."""
        return {"n_images": len(self.labels), "n_texts": len(self.prompts), "n_classes": len(self.classnames)}


def read_lines(path: Path) -> tuple[str, ...]:
    """The lines of a file of names or templates, stripped, without blank ones; at least one."""
    if not path.is_file():
        raise UserError(f"{path} is missing; a classification set has one name, or template, a line in it")
    lines = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    if not lines:
        raise UserError(f"{path} is empty; write one name, or template, a line")
    return lines


def read_templates(root: Path) -> tuple[str, ...]:
    """The templates of a set, each with `{c}`."""
    templates = read_lines(root / TEMPLATES)
    if wrong := [template for template in templates if "{c}" not in template]:
        raise UserError(f"the template {wrong[0]!r} in {root} has no {{c}} for the class name")
    return templates


def open_labelled(root: Path, split: str, member: str) -> Reader:
    """The samples of a set's tar files, each an image and a label in a member `cls` or `npy`."""
    index = ShardIndex.build([str(path) for path in find_shards(root, split)], text_first=member)
    if skipped := index.skipped_by_reason():
        raise UserError(f"{root} has samples that cannot be used: {skipped}; write the set again")
    return Reader(index)


def samples_of(reader: Reader) -> Iterator[RawSample]:
    """All samples, in order."""
    size = len(reader.index)
    for start in range(0, size, READ_ROWS):
        yield from reader.read(np.arange(start, min(start + READ_ROWS, size)))


def _label(data: bytes, root: Path, num_classes: int) -> int:
    text = data.decode("ascii", "replace").strip()
    if not text.isdigit() or int(text) >= num_classes:
        raise UserError(f"{root} has the label {text!r}; labels are numbers below {num_classes}, the number of classes")
    return int(text)


@dataclass(frozen=True)
class ClassificationTask:
    """Zero-shot classification on one set, as a task of the suite.

    Where features are wider than `readout_width` dimensions (0: never), there is also a linear read-out at that width.
    """

    name: str
    data: ClassificationSet
    readout_width: int = 0
    main_metric = "acc1"

    @property
    def sha256(self) -> str:
        """Digest of what is measured on."""
        return self.data.sha256

    def embed(self, model: Any, **options: Any) -> dict[str, Tensor]:
        """Raw features, see `ClassificationSet.embed`."""
        return self.data.embed(model, **options)

    def score(
        self, image_features: Float[Tensor, "images dim"], text_features: Float[Tensor, "prompts dim"]
    ) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """acc1, acc5 (with five classes or more), mean per-class recall, and read-outs; outcomes by image.

        The weights of a class are the normalised mean of its prompts' unit features. Ties count against the model.
        Read-outs (`mcl_clip.eval.probes`) need five images or more. `ranks` are the classes ahead of the right one.
        """
        labels = torch.from_numpy(self.data.labels)
        scores = class_scores(image_features, text_features, len(self.data.classnames))
        ranks = ((scores >= scores.gather(1, labels[:, None])).sum(1) - 1).numpy()
        outcomes: dict[str, np.ndarray] = {
            "acc1": ranks == 0,
            "mean_per_class_recall": (ranks == 0) * _recall_weights(self.data.labels),
        }
        if len(self.data.classnames) >= 5:
            outcomes["acc5"] = ranks < 5
        if len(labels) >= FOLDS:
            outcomes |= self._read_out(F.normalize(image_features.double()), labels)
        metrics = {name: float(np.mean(values, dtype=np.float64)) for name, values in outcomes.items()}
        outcomes["mean_per_class_recall"] = outcomes["mean_per_class_recall"].astype(np.float32)
        return metrics, {**outcomes, "ranks": ranks.astype(np.int32)}

    def _read_out(
        self, images: Float[Tensor, "images dim"], labels: Int64[Tensor, "images"]
    ) -> dict[str, Bool[np.ndarray, "images"]]:
        classes, width = len(self.data.classnames), self.readout_width
        right = {
            "linear_acc1": linear_predictions(images, labels, classes),
            "knn_acc1": knn_predictions(images, labels, classes),
        }
        if 0 < width < images.shape[1]:
            right[f"linear_acc1_width_{width}"] = linear_predictions(images, labels, classes, width=width)
        return {name: values.numpy() for name, values in right.items()}

    def describe(self) -> dict[str, Any]:
        """What a record says of the task."""
        key = f"classification/{self.name.removeprefix('classification/')}"
        return {"key": key, "task": "zeroshot_classification", **self.data.counts()}


def at_width_of_one_stage(task: Task, stage_dims: Sequence[int]) -> Task:
    """The task with a read-out of several stages at the width of one; other tasks, and single stages, as they are."""
    if len(stage_dims) > 1 and isinstance(task, ClassificationTask):
        return replace(task, readout_width=max(stage_dims))
    return task


def class_scores(
    image_features: Float[Tensor, "images dim"], text_features: Float[Tensor, "prompts dim"], num_classes: int
) -> Float32[Tensor, "images classes"]:
    """Cosine of every image with every class, whose weights are the normalised mean of its prompts' unit features.

    Raises:
        UserError: if features are not finite.
    """
    for what, features in (("image", image_features), ("text", text_features)):
        if broken := int((~torch.isfinite(features).all(dim=1)).sum()):
            raise UserError(f"{broken} of {len(features)} {what} features are not finite; the model has diverged")
    prompts = text_features.view(num_classes, -1, text_features.shape[1])
    weights = torch.cat(
        [F.normalize(F.normalize(part.double(), dim=-1).mean(1)) for part in torch.split(prompts, AVERAGED_CLASSES)]
    )
    images = (F.normalize(part.double()) for part in torch.split(image_features, SCORED_IMAGES))
    return torch.cat([(part @ weights.T).float() for part in images])  # summed in float64: equal classes score equally


def _recall_weights(labels: Int64[np.ndarray, "images"]) -> Float[np.ndarray, "images"]:
    """What each image counts for, so that the mean over images is the mean over the classes that there are."""
    sizes = np.bincount(labels)
    weights: np.ndarray = len(labels) / (np.count_nonzero(sizes) * sizes[labels])
    return weights


def open_multilabel(root: Path, *, split: str = "test") -> ClassificationSet:
    """The set in `root`: as for `ClassificationSet.open`, with `.npy` members that hold a 0 or a 1 for each class.

    Raises:
        UserError: if the layout is not that, or no image has any of the classes.
    """
    classnames, templates = read_lines(root / CLASSNAMES), read_templates(root)
    reader = open_labelled(root, split, "npy")
    labels = np.stack(
        [_multi_hot(sample.text, reader.index.key(sample.row), root, len(classnames)) for sample in samples_of(reader)]
    )
    if not labels.any():
        raise UserError(f"none of the {len(labels)} images in {root} has any of the {len(classnames)} classes")
    return ClassificationSet(reader, labels, classnames, templates, reader.index.digest)


def _multi_hot(data: bytes, key: str, root: Path, num_classes: int) -> Bool[np.ndarray, "classes"]:
    """Which classes an image has; no pickles, and no archives, which `np.load` would unpack."""
    try:
        if not data.startswith(NPY_MAGIC):
            raise ValueError("not an array")
        values = np.load(io.BytesIO(data), allow_pickle=False)
        if values.dtype.kind not in "biuf":
            raise ValueError(f"of {values.dtype}, not of numbers")
    except (ValueError, EOFError, OSError, MemoryError) as error:
        raise UserError(f"{key}.npy in {root} is not a plain numpy array ({error}); write the set again") from error
    if values.shape != (num_classes,) or not np.isin(values, (0, 1)).all():
        raise UserError(
            f"{key}.npy in {root} has the shape {values.shape} and values from {values.min(initial=0)} to "
            f"{values.max(initial=0)}; it must hold a 0 or a 1 for each of the {num_classes} classes"
        )
    multi_hot: np.ndarray = values.astype(bool)
    return multi_hot


@dataclass(frozen=True)
class MultilabelTask:
    """Zero-shot classification with several labels an image, as a task of the suite."""

    name: str
    data: ClassificationSet
    main_metric = "mean_average_precision"

    @property
    def sha256(self) -> str:
        """Digest of what is measured on."""
        return self.data.sha256

    def embed(self, model: Any, **options: Any) -> dict[str, Tensor]:
        """Raw features, see `ClassificationSet.embed`."""
        return self.data.embed(model, **options)

    def score(
        self, image_features: Float[Tensor, "images dim"], text_features: Float[Tensor, "prompts dim"]
    ) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Mean average precision over the classes that some image has; outcomes by class, in the order of the names."""
        scores = class_scores(image_features, text_features, len(self.data.classnames)).numpy()
        labels = self.data.labels
        precisions = np.array(
            [average_precision(scores[:, c], labels[:, c]) for c in np.flatnonzero(labels.any(0))], np.float64
        )
        metric = "mean_average_precision"
        return {metric: float(precisions.mean())}, {metric: precisions.astype(np.float32)}

    def describe(self) -> dict[str, Any]:
        """What a record says of the task."""
        key = f"multilabel/{self.name.removeprefix('multilabel/')}"
        return {"key": key, "task": "zeroshot_classification", **self.data.counts()}


def average_precision(scores: Float[np.ndarray, "images"], is_positive: Bool[np.ndarray, "images"]) -> float:
    """The area under the steps of precision over recall: sum over thresholds of (R_n - R_{n-1}) P_n.

    Images of equal score are taken together, so that a constant score gets the share of the positives, their order
    never matters, and the result is scikit-learn's `average_precision_score`. At least one image must be positive.
    """
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))  # the last image at each threshold
    found = np.cumsum(is_positive[order])[ends]
    return float((np.diff(found, prepend=0) * found / (ends + 1)).sum() / found[-1])
