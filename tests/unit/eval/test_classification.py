import io

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from sklearn.metrics import balanced_accuracy_score
from torch.nn import functional as F

from mcl_clip.core.errors import UserError
from mcl_clip.data.writing import LabelledImage, write_classification_set
from mcl_clip.eval.classification import ClassificationSet, ClassificationTask
from mcl_clip.eval.embed import Encoder, FileImages
from mcl_clip.eval.evaluate import run_task
from mcl_clip.eval.task import Task
from tests.unit.data.tars import picture, write_tar
from tests.unit.eval.sets import (
    CLASSES,
    Constant,
    Noise,
    encoder_of,
    make_tower,
    noise_png,
    record_of,
    write_classification,
)
from tests.unit.eval.sets import TEMPLATES as PROMPTS

COLOURS = {"red": (250, 0, 0), "green": (0, 250, 0), "blue": (0, 0, 250)}
TEMPLATES = ("a {c} thing", "something {c}")


def png(colour, shade):
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), tuple(max(0, value - shade) for value in colour)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def root(tmp_path):
    """30 images of three colors in CLIP_benchmark's layout."""
    samples = (
        LabelledImage(key=f"k{number}", image=png(list(COLOURS.values())[number % 3], number), label=number % 3)
        for number in range(30)
    )
    write_classification_set(
        samples, tmp_path / "set", classnames=list(COLOURS), templates=list(TEMPLATES), samples_per_shard=12
    )
    return tmp_path / "set"


def task_of(labels, *, classes, templates=2, **options):
    """Return a task with labels but without images."""
    source = FileImages(())
    names = tuple(f"class {number}" for number in range(classes))
    data = ClassificationSet(source, np.asarray(labels, np.int64), names, ("{c}",) * templates, "digest")
    return ClassificationTask("set", data, **options)


def random_features(images, classes, templates=2, dim=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (images,), generator=generator)
    texts = torch.randn(classes * templates, dim, generator=generator)
    means = texts.view(classes, templates, dim).mean(1)
    pictures = 0.7 * means[labels] + torch.randn(images, dim, generator=generator)
    return pictures, texts, labels.numpy()


def naive(images, texts, labels, classes, templates, k):
    """Tell whether each image has its class among the top k, one image and one class at a time."""
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
    if constant == "image":  # all images get the same class
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


@pytest.mark.parametrize("labels", [[0] * 9 + [3], list(range(7)) * 8, [0, 1, 1, 2, 2, 2, 2, 2, 5, 5, 5]])
def test_metrics_are_means_of_their_outcomes(labels):
    images, texts, _ = random_features(len(labels), 7)
    images += texts.view(7, 2, -1).mean(1)[labels]
    metrics, outcomes = task_of(labels, classes=7).score(images, texts)
    assert list(metrics) == ["acc1", "mean_per_class_recall", "acc5", "linear_acc1", "knn_acc1"]
    assert outcomes.keys() == {*metrics, "ranks"}
    for name, value in metrics.items():
        assert outcomes[name].dtype in (bool, np.float32)
        assert outcomes[name].shape == (len(labels),)
        assert outcomes[name].mean() == pytest.approx(value, abs=1e-7)
    assert outcomes["ranks"].dtype == np.int32


def test_the_linear_probe_at_the_width_of_one_stage():
    images, texts, labels = random_features(60, 5, dim=12)
    wide = torch.cat([images, images.flip(1)], 1)
    at_width, _ = task_of(labels, classes=5, probe_width=12).score(wide, torch.cat([texts, texts], 1))
    assert list(at_width)[-1] == "linear_acc1_width_12"
    own, _ = task_of(labels, classes=5).score(images, texts)
    assert at_width["linear_acc1_width_12"] == pytest.approx(own["linear_acc1"], abs=0.1)
    for width in (0, 24, 99):  # nothing to compare
        metrics, _ = task_of(labels, classes=5, probe_width=width).score(wide, torch.cat([texts, texts], 1))
        assert not any("width" in name for name in metrics)


def test_sets_too_small_for_probes():
    images, texts, _ = random_features(4, 2)
    metrics, _ = task_of([0, 1, 1, 0], classes=2).score(images, texts)
    assert list(metrics) == ["acc1", "mean_per_class_recall"]
    images, texts, _ = random_features(5, 2)
    metrics, _ = task_of([0, 1, 1, 0, 1], classes=2).score(images, texts)
    assert 0 <= metrics["linear_acc1"] <= 1
    assert 0 <= metrics["knn_acc1"] <= 1


def test_blocks_change_no_score(monkeypatch):
    images, texts, labels = random_features(60, 7)
    whole, outcomes = task_of(labels, classes=7).score(images, texts)
    monkeypatch.setattr("mcl_clip.eval.classification.SCORED_IMAGES", 7)
    monkeypatch.setattr("mcl_clip.eval.classification.AVERAGED_CLASSES", 2)
    parts, parts_outcomes = task_of(labels, classes=7).score(images, texts)
    assert parts == whole
    assert np.array_equal(parts_outcomes["ranks"], outcomes["ranks"])


def test_metrics_are_those_of_open_clip_torch_and_scikit_learn(tmp_path):
    """From tar files to metrics, against open_clip's classifier, topk and balanced accuracy."""
    labels = np.random.default_rng(0).integers(0, 7, 60)
    labels[labels == 4] = 3  # a class without images
    task = ClassificationTask("set", ClassificationSet.open(write_classification(tmp_path / "set", labels)))
    tower = make_tower()
    with torch.no_grad():
        weights = open_clip.build_zero_shot_classifier(
            tower.model,
            tower.tokenizer,
            CLASSES,
            [lambda c, template=template: template.format(c=c) for template in PROMPTS],
        )
        pictures = [Image.open(io.BytesIO(noise_png(number))) for number in range(60)]
        pixels = torch.stack([tower.image_transform(picture) for picture in pictures])
        logits = 100 * tower.model.eval().encode_image(pixels, normalize=True) @ weights
    top = logits.topk(5).indices.numpy()
    encoder = Encoder(
        model=tower.model,
        image_transform=tower.image_transform,
        tokenizer=tower.tokenizer,
        device=torch.device("cpu"),
        batch_size=13,
    )
    metrics = run_task(task, encoder)[0]
    assert metrics["acc1"] == (top[:, 0] == labels).mean()
    assert metrics["acc5"] == (top == labels[:, None]).any(1).mean()
    assert metrics["mean_per_class_recall"] == pytest.approx(balanced_accuracy_score(labels, top[:, 0]))
    assert 0 < metrics["acc1"] < metrics["acc5"] < 1


def test_models_that_know_nothing_are_at_chance(tmp_path):
    labels = np.arange(210) % 7
    task = ClassificationTask("set", ClassificationSet.open(write_classification(tmp_path / "set", labels)))
    constant = run_task(task, encoder_of(Constant()))[0]
    assert (constant["acc1"], constant["acc5"], constant["mean_per_class_recall"]) == (0, 0, 0)
    assert constant["linear_acc1"] <= 1 / 7
    assert constant["knn_acc1"] <= 1 / 7
    noise = run_task(task, encoder_of(Noise()))[0]
    for name in ("acc1", "mean_per_class_recall", "linear_acc1", "knn_acc1"):
        assert noise[name] == pytest.approx(1 / 7, abs=0.07)  # three standard deviations
    assert noise["acc5"] == pytest.approx(5 / 7, abs=0.1)


class Seeing:
    """A model of the mean color of an image, and the color that a text names."""

    def encode_image(self, pixels):
        return pixels.mean((2, 3))

    def encode_text(self, tokens):
        return torch.eye(3)[tokens[:, 0]]


def test_a_set_is_read_embedded_and_scored(root):
    task = ClassificationTask("colours", ClassificationSet.open(root))
    assert task.data.texts == [t.replace("{c}", name) for name in COLOURS for t in TEMPLATES]
    assert task.data.labels.tolist() == [number % 3 for number in range(30)]
    encoder = Encoder(
        model=Seeing(),
        image_transform=lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255,
        tokenizer=lambda texts: torch.tensor([[next(n for n, c in enumerate(COLOURS) if c in text)] for text in texts]),
        device=torch.device("cpu"),
        batch_size=7,
    )
    raw = encoder.embed(task.data)
    assert (raw["image"].shape, raw["text"].shape) == ((30, 3), (6, 3))
    metrics, _ = task.score(raw["image"], raw["text"])
    assert metrics == {"acc1": 1, "mean_per_class_recall": 1, "linear_acc1": 1, "knn_acc1": 1}


def test_the_record_says_what_was_measured(root):
    task = ClassificationTask("colours", ClassificationSet.open(root))
    assert isinstance(task, Task)
    record = record_of(task, {"acc1": 0.5})
    assert record["key"] == "classification/colours"
    assert (record["n_images"], record["n_texts"], record["n_classes"]) == (30, 6, 3)
    assert record["metrics"]["main_metric"] == 0.5
    assert record["data_sha256"] == task.data.sha256


def test_the_digest_tells_prompts_and_labels_apart(root):
    digest = ClassificationTask("colours", ClassificationSet.open(root)).data.sha256
    assert ClassificationTask("other", ClassificationSet.open(root)).data.sha256 == digest
    (root / "zeroshot_classification_templates.txt").write_text("a {c} thing\nanything {c}\n")
    assert ClassificationTask("colours", ClassificationSet.open(root)).data.sha256 != digest


@pytest.mark.parametrize(
    ("file", "text", "sentence"),
    [
        ("classnames.txt", None, r"classnames.txt is missing; a classification set has one name, or template, per"),
        ("classnames.txt", "\n \n", r"classnames.txt is empty; write one name, or template, per line"),
        ("classnames.txt", "red\n \nblue\ngreen\n\n", r"line 2 of .*classnames.txt is blank; write the name"),
        ("classnames.txt", "red\ngreen\n", r"has the label '2'; labels are numbers below 2, the number of classes"),
        ("zeroshot_classification_templates.txt", "a photo\n", r"the template 'a photo' in .* has no \{c\}"),
        ("zeroshot_classification_templates.txt", None, r"zeroshot_classification_templates.txt is missing"),
        ("test/nshards.txt", "9\n", r"says 9 tar files, but 3.tar, 4.tar"),
        ("test/nshards.txt", "1\n", r"says 1 tar files, but .* also has 1.tar, 2.tar; correct the number, or move"),
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
    with pytest.raises(
        UserError, match=r"has samples that cannot be used \(1 x missing_text\); .* write the set again"
    ):
        ClassificationSet.open(root)
    write_tar(root / "test/2.tar", [("a.png", picture(kind="PNG")), ("a.cls", b"x")])
    with pytest.raises(UserError, match="has the label 'x'; labels are numbers below 3"):
        ClassificationSet.open(root)
