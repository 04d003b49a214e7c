import io
import pickle

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from mcl_clip.core.errors import UserError
from mcl_clip.data.reader import Reader
from mcl_clip.eval.classification import ClassificationSet, MultilabelTask, average_precision
from mcl_clip.eval.datasets import open_set
from mcl_clip.eval.embed import FileImages
from mcl_clip.eval.evaluate import run_task
from mcl_clip.eval.task import Task
from tests.unit.data.tars import write_tar
from tests.unit.eval.sets import CLASSES, TEMPLATES, Constant, Noise, encoder_of, noise_png, npy, write_multilabel


def open_multilabel(root):
    return ClassificationSet.open(root, is_multilabel=True)


def draw(images=40, classes=7, seed=0, share=0.3):
    """Labels; class 2 has no image."""
    labels = np.random.default_rng(seed).random((images, classes)) < share
    labels[:, 2] = False
    return labels


def task_of(labels):
    names = tuple(f"class {number}" for number in range(labels.shape[1]))
    return MultilabelTask("set", ClassificationSet(FileImages(()), labels, names, ("{c}", "a {c}"), "digest"))


@pytest.mark.parametrize("levels", [1, 2, 5, 1000])
@pytest.mark.parametrize("seed", range(5))
def test_average_precision_is_that_of_scikit_learn(seed, levels):
    """With few levels of score most images tie."""
    numbers = np.random.default_rng(seed)
    scores = (numbers.integers(0, levels, 60) / levels).astype(np.float32)
    is_positive = numbers.random(60) < 0.3
    assert average_precision(scores, is_positive) == pytest.approx(average_precision_score(is_positive, scores))


def average_precision_of_clip_benchmark(scores, targets):
    """Its formula, for scores that all differ."""
    truth = torch.from_numpy(targets[np.argsort(-scores)])
    precision = truth.float().cumsum(0) / torch.arange(1, len(truth) + 1)
    return float(precision[truth].sum() / max(float(truth.sum()), 1))


@pytest.mark.parametrize("seed", range(3))
def test_the_mean_leaves_out_classes_without_images(seed):
    labels = draw(seed=seed)
    generator = torch.Generator().manual_seed(seed)
    images, texts = torch.randn(40, 12, generator=generator), torch.randn(14, 12, generator=generator)
    metrics, outcomes = task_of(labels).score(images, texts)
    prompts = torch.nn.functional.normalize(texts.double(), dim=1).view(7, 2, 12).mean(1)
    scores = torch.nn.functional.cosine_similarity(images.double()[:, None], prompts[None], dim=2).numpy()
    there = [c for c in range(7) if c != 2]
    expected = average_precision_score(labels[:, there], scores[:, there], average=None)
    assert outcomes["mean_average_precision"] == pytest.approx(expected, abs=1e-6)
    assert outcomes["mean_average_precision"].dtype == np.float32
    assert metrics == {"mean_average_precision": pytest.approx(expected.mean())}
    by_formula = [average_precision_of_clip_benchmark(scores[:, c], labels[:, c]) for c in there]
    assert metrics["mean_average_precision"] == pytest.approx(np.mean(by_formula))


def test_models_that_know_nothing_are_at_chance(tmp_path):
    labels = draw(200)
    task = open_set(write_multilabel(tmp_path / "set", labels))
    chance = labels.mean(0)[labels.any(0)].mean()
    assert run_task(task, encoder_of(Constant()))[0]["mean_average_precision"] == pytest.approx(chance)
    noise = [run_task(task, encoder_of(Noise(seed)))[0]["mean_average_precision"] for seed in range(5)]
    assert np.mean(noise) == pytest.approx(chance, abs=0.04)


def test_features_that_are_not_finite_are_refused():
    with pytest.raises(UserError, match="1 of 40 image features are not finite"):
        task_of(draw()).score(torch.ones(40, 3).index_fill(0, torch.tensor([4]), torch.nan), torch.ones(14, 3))


def test_a_set_is_read(tmp_path):
    labels = draw()
    root = write_multilabel(tmp_path / "set", labels)
    data = open_multilabel(root)
    assert isinstance(data.source.reader, Reader)
    assert np.array_equal(data.labels, labels)
    assert (data.classnames, data.templates) == (CLASSES, TEMPLATES)
    task = MultilabelTask("voc", data)
    assert isinstance(task, Task)
    assert task.describe() == {
        "key": "multilabel/voc", "task": "zeroshot_classification", "n_images": 40, "n_texts": 14, "n_classes": 7
    }  # fmt: skip
    labels[3, 3] ^= True
    again = open_multilabel(write_multilabel(tmp_path / "other", labels))
    assert MultilabelTask("voc", again).data.sha256 != task.data.sha256


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64, np.float32])
def test_types_of_labels(tmp_path, dtype):
    root = write_multilabel(tmp_path / "set", draw())
    values = [1, 0, 0, 1, 0, 0, 0]
    write_tar(root / "test/1.tar", [("x.png", noise_png(1)), ("x.npy", npy(values, dtype))])
    labels = open_multilabel(root).labels
    assert labels.dtype == bool
    assert labels[-1].tolist() == [bool(value) for value in values]


class Bomb:
    def __reduce__(self):
        return exit, ()


def archive():
    buffer = io.BytesIO()
    np.savez(buffer, np.zeros(7))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("member", "sentence"),
    [
        (npy([0, 1]), r"x.npy in .* has the shape \(2,\) and values from 0 to 1; it must hold a 0 or a 1 for"),
        (npy([[0] * 7]), r"has the shape \(1, 7\)"),
        (npy([0, 1, 2, 0, 0, 0, 0]), r"and values from 0 to 2; it must hold a 0 or a 1"),
        (npy([0.5] * 7, np.float64), r"and values from 0.0 to 0.5; it must"),
        (npy([np.nan] * 7, np.float32), r"it must hold a 0 or a 1"),
        (npy(["a"] * 7, np.str_), r"is not a plain numpy array \(of <U1, not of numbers\); write the set again"),
        (npy([Bomb()] * 7, object), r"is not a plain numpy array \(Object arrays cannot be loaded"),
        (pickle.dumps(Bomb()), r"is not a plain numpy array \(not an array\)"),
        (archive(), r"is not a plain numpy array \(not an array\)"),
        (npy([0] * 7)[:-3], r"is not a plain numpy array"),
        (b"\x93NUMPY\x01\x00v\x00{'descr': '<i8', 'fortran_order': False, 'shape': (9**15,), }", r"is not a plain"),
    ],
    ids=["few", "matrix", "two", "half", "nan", "text", "objects", "pickle", "archive", "short", "huge"],
)  # fmt: skip
def test_labels_that_are_none(tmp_path, member, sentence):
    root = write_multilabel(tmp_path / "set", draw())
    write_tar(root / "test/1.tar", [("x.png", noise_png(1)), ("x.npy", member)])
    with pytest.raises(UserError, match=sentence):
        open_multilabel(root)


def test_sets_that_are_not_whole(tmp_path):
    root = write_multilabel(tmp_path / "set", draw())
    write_tar(root / "test/1.tar", [("x.png", noise_png(1)), ("x.cls", b"1")])
    with pytest.raises(
        UserError, match=r"has samples that cannot be used \(1 x missing_text\); .* write the set again"
    ):
        open_multilabel(root)
    none = write_multilabel(tmp_path / "none", np.zeros((8, 7), bool))
    with pytest.raises(UserError, match=r"none of the 8 images in .* has any of the 7 classes"):
        open_multilabel(none)
    (none / "classnames.txt").unlink()
    with pytest.raises(UserError, match=r"classnames.txt is missing"):
        open_multilabel(none)
