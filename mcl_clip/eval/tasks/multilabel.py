"""Zero-shot classification of images that may have several labels, as CLIP_benchmark and scikit-learn define it."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from mcl_clip.errors import UserError
from mcl_clip.eval.tasks.classification import (
    CLASSNAMES,
    ClassificationSet,
    class_scores,
    open_labelled,
    read_lines,
    read_templates,
    samples_of,
)

NPY_MAGIC = b"\x93NUMPY"


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
