import io
from unittest.mock import create_autospec

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import normalized_mutual_info_score
from torch.nn import functional as F

from mcl_clip.data.reader import Reader
from mcl_clip.data.writing import LabelledImage, write_classification_set
from mcl_clip.errors import UserError
from mcl_clip.eval.suite import Task, result_record
from mcl_clip.eval.tasks.classification import (
    ClassificationSet,
    ClassificationTask,
    linear_accuracy,
    normalized_mutual_information,
)
from tests.unit.data.tars import picture, write_tar

COLOURS = {"red": (250, 0, 0), "green": (0, 250, 0), "blue": (0, 0, 250)}
TEMPLATES = ("a {c} thing", "something {c}")


def png(colour, shade):
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), tuple(max(0, value - shade) for value in colour)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def root(tmp_path):
    """30 pictures of three colours in the layout of CLIP_benchmark."""
    samples = (
        LabelledImage(key=f"k{number}", image=png(list(COLOURS.values())[number % 3], number), label=number % 3)
        for number in range(30)
    )
    write_classification_set(
        samples, tmp_path / "set", classnames=list(COLOURS), templates=list(TEMPLATES), samples_per_shard=12
    )
    return tmp_path / "set"


def task_of(labels, *, classes, templates=2):
    """A task with labels but without pictures."""
    reader = create_autospec(Reader, instance=True)
    names = tuple(f"class {number}" for number in range(classes))
    return ClassificationTask(
        "set", ClassificationSet(reader, np.asarray(labels, np.int64), names, ("{c}",) * templates)
    )


def random_features(images, classes, templates=2, dim=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (images,), generator=generator)
    texts = torch.randn(classes * templates, dim, generator=generator)
    means = texts.view(classes, templates, dim).mean(1)
    pictures = 0.7 * means[labels] + torch.randn(images, dim, generator=generator)
    return pictures, texts, labels.numpy()


def naive(images, texts, labels, classes, templates, k):
    """Whether each image has its class among the k best, one image and one class at a time."""
    weights = []
    for number in range(classes):
        prompts = [F.normalize(texts[number * templates + t].double(), dim=0) for t in range(templates)]
        weights.append(F.normalize(sum(prompts), dim=0))
    found = []
    for image, label in zip(images, labels, strict=True):
        scores = [float(F.normalize(image.double(), dim=0) @ weight) for weight in weights]
        found.append(label in np.argsort(scores)[::-1][:k])
    return np.array(found)


@pytest.mark.parametrize(("classes", "templates"), [(7, 2), (5, 1), (3, 4)])
def test_accuracies_are_those_of_a_loop(classes, templates):
    images, texts, labels = random_features(60, classes, templates)
    metrics, outcomes = task_of(labels, classes=classes, templates=templates).score(images, texts)
    first = naive(images, texts, labels, classes, templates, 1)
    assert 0.1 < metrics["acc1"] < 0.9
    assert metrics["acc1"] == first.mean()
    assert metrics["mean_per_class_recall"] == pytest.approx(np.mean([first[labels == c].mean() for c in set(labels)]))
    assert np.array_equal(outcomes["ranks"] == 0, first)
    if classes >= 5:
        assert metrics["acc5"] == naive(images, texts, labels, classes, templates, 5).mean()
    else:
        assert "acc5" not in metrics


def test_classes_count_alike_in_the_mean_recall():
    texts = torch.eye(2)
    images = torch.eye(2)[[0] * 9 + [0]]  # nine right, the only one of class 1 wrong
    metrics, _ = task_of([0] * 9 + [1], classes=2, templates=1).score(images, texts)
    assert metrics["acc1"] == 0.9
    assert metrics["mean_per_class_recall"] == 0.5


def test_the_length_of_features_does_not_matter():
    images, texts, labels = random_features(40, 6)
    task = task_of(labels, classes=6)
    lengths = torch.linspace(0.1, 9, 40)[:, None]
    assert task.score(images, texts)[0]["acc1"] == task.score(images * lengths, texts * 3)[0]["acc1"]


@pytest.mark.parametrize("constant", ["image", "text", "both"])
def test_equal_features_score_nothing(constant):
    images, texts, labels = random_features(40, 6)
    images = images[:1].expand(40, -1) if constant in ("image", "both") else images
    texts = texts[:1].expand(12, -1) if constant in ("text", "both") else texts
    metrics, _ = task_of(labels, classes=6).score(images, texts)
    if constant == "image":  # all pictures get the same class
        assert metrics["acc1"] in np.bincount(labels) / 40
        assert metrics["linear_acc1"] <= np.bincount(labels).max() / 40
    else:  # all classes tie, and ties count against the model
        assert (metrics["acc1"], metrics["acc5"]) == (0, 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["image", "text"])
def test_features_that_are_not_finite_are_refused(value, side):
    images, texts, labels = random_features(40, 6)
    (images if side == "image" else texts)[3, 2] = value
    with pytest.raises(UserError, match=f"1 of {40 if side == 'image' else 12} {side} features are not finite"):
        task_of(labels, classes=6).score(images, texts)


def test_a_linear_read_out_finds_what_is_there():
    labels = torch.arange(200) % 4
    images = torch.randn(200, 32, generator=torch.Generator().manual_seed(0)).double()
    images[:, 5:9] += 20 * F.one_hot(labels, 4)
    assert linear_accuracy(images, labels, 4) == 1


@pytest.mark.parametrize("dim", [4, 300])
def test_a_linear_read_out_finds_nothing_in_noise(dim):
    labels = torch.arange(400) % 4
    images = torch.randn(400, dim, generator=torch.Generator().manual_seed(1)).double()
    assert linear_accuracy(images, labels, 4) == pytest.approx(0.25, abs=0.1)  # predicted from other rows


def test_a_linear_read_out_of_equal_features_takes_the_most_frequent_class():
    labels = torch.tensor([0] * 30 + [1] * 10)
    assert linear_accuracy(torch.ones(40, 3).double(), labels, 2) == 0.75


@pytest.mark.parametrize("seed", range(4))
def test_mutual_information_is_that_of_scikit_learn(seed):
    numbers = np.random.default_rng(seed)
    a = numbers.integers(0, 5, 300)
    b = np.where(numbers.random(300) < 0.6, a, numbers.integers(10, 14, 300))
    assert normalized_mutual_information(a, b) == pytest.approx(normalized_mutual_info_score(a, b), abs=1e-12)
    assert normalized_mutual_information(a, a + 7) == pytest.approx(1)


def test_mutual_information_without_any():
    assert normalized_mutual_information([0, 0, 1, 1], [0, 1, 0, 1]) == pytest.approx(0)
    assert (
        normalized_mutual_information([0, 0, 0], [5, 5, 5]) == normalized_mutual_info_score([0, 0, 0], [5, 5, 5]) == 1
    )
    assert (
        normalized_mutual_information([0, 0, 0], [0, 1, 2]) == normalized_mutual_info_score([0, 0, 0], [0, 1, 2]) == 0
    )


class Seeing:
    """The mean colour of a picture, and the colour that a text names."""

    def encode_image(self, pixels):
        return pixels.mean((2, 3))

    def encode_text(self, tokens):
        return torch.eye(3)[tokens[:, 0]]


def test_a_set_is_read_embedded_and_scored(root):
    task = ClassificationTask("colours", ClassificationSet.open(root))
    assert task.data.prompts == [t.replace("{c}", name) for name in COLOURS for t in TEMPLATES]
    assert task.data.labels.tolist() == [number % 3 for number in range(30)]
    raw = task.embed(
        Seeing(),
        image_transform=lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255,
        tokenizer=lambda texts: torch.tensor([[next(n for n, c in enumerate(COLOURS) if c in text)] for text in texts]),
        num_workers=0,
        device="cpu",
        batch_size=7,
    )
    assert (raw["image"].shape, raw["text"].shape) == ((30, 3), (6, 3))
    metrics, _ = task.score(raw["image"], raw["text"])
    assert metrics == {"acc1": 1, "mean_per_class_recall": 1, "linear_acc1": 1}


def test_the_record_says_what_was_measured(root):
    task = ClassificationTask("colours", ClassificationSet.open(root))
    assert isinstance(task, Task)
    record = result_record(
        task, {"acc1": 0.5}, model="ViT", pretrained="run/stage-0", stage=0, combine=None, dtype="fp32", seconds=1.0
    )
    assert record["key"] == "classification/colours"
    assert (record["n_images"], record["n_texts"], record["n_classes"]) == (30, 6, 3)
    assert record["metrics"]["main_metric"] == 0.5
    assert record["data_sha256"] == task.sha256


def test_the_digest_tells_prompts_and_labels_apart(root):
    digest = ClassificationTask("colours", ClassificationSet.open(root)).sha256
    assert ClassificationTask("other", ClassificationSet.open(root)).sha256 == digest
    (root / "zeroshot_classification_templates.txt").write_text("a {c} thing\nanything {c}\n")
    assert ClassificationTask("colours", ClassificationSet.open(root)).sha256 != digest


@pytest.mark.parametrize(
    ("file", "text", "sentence"),
    [
        ("classnames.txt", None, r"classnames.txt is missing; a classification set has one name, or template, a line"),
        ("classnames.txt", "\n \n", r"classnames.txt is empty; write one name, or template, a line"),
        ("classnames.txt", "red\ngreen\n", r"has the label '2'; labels are numbers below 2, the number of classes"),
        ("zeroshot_classification_templates.txt", "a photo\n", r"the template 'a photo' in .* has no \{c\}"),
        ("zeroshot_classification_templates.txt", None, r"zeroshot_classification_templates.txt is missing"),
        ("test/nshards.txt", "9\n", r"says 9 tar files, but 3.tar, 4.tar"),
        ("test/nshards.txt", None, r"nshards.txt is missing"),
    ],
)  # fmt: skip
def test_sets_that_are_not_whole(root, file, text, sentence):
    if text is None:
        (root / file).unlink()
    else:
        (root / file).write_text(text)
    with pytest.raises(UserError, match=sentence):
        ClassificationSet.open(root)


def test_a_folder_that_is_no_set(tmp_path):
    with pytest.raises(UserError, match=r"classnames.txt is missing"):
        ClassificationSet.open(tmp_path)


def test_samples_without_a_label_are_refused(root, tmp_path):
    write_tar(root / "test/2.tar", [("a.png", picture(kind="PNG")), ("a.cls", b"x"), ("b.png", picture(kind="PNG"))])
    with pytest.raises(UserError, match=r"has samples that cannot be used: \{.*\}; write the set again"):
        ClassificationSet.open(root)
    write_tar(root / "test/2.tar", [("a.png", picture(kind="PNG")), ("a.cls", b"x")])
    with pytest.raises(UserError, match="has the label 'x'; labels are numbers below 3"):
        ClassificationSet.open(root)
