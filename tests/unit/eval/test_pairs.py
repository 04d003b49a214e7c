import io
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from mcl_clip.core.errors import UserError
from mcl_clip.eval.embed import Encoder, FileImages
from mcl_clip.eval.pairs import PairItem, PairSet, PairTask
from mcl_clip.eval.task import Task
from tests.unit.eval.sets import record_of

PATTERNS = tuple(f"pattern {number}" for number in range(9))


def made_set(items, rule, *, paths=None, num_texts=None, **options):
    """Return a set without image files, with the rows of images and texts that the items name."""
    num_images = 1 + max(row for item in items for row in item.images)
    num_texts = 1 + max(row for item in items for row in item.texts)
    paths = tuple(Path(f"{row}.jpg") for row in range(num_images)) if paths is None else paths
    texts = tuple(f"text {row}" for row in range(num_texts))
    return PairSet(rule, tuple(items), FileImages(paths), (1,) * num_images, texts, **options)


def pairs_of_two(count, group_of=lambda number: PATTERNS[number % 9]):
    return [
        PairItem(str(number), group_of(number), (2 * number, 2 * number + 1), (2 * number, 2 * number + 1))
        for number in range(count)
    ]


def choices(count, k, group_of=lambda number: f"group {number % 3}"):
    texts = [tuple(range(k * number, k * (number + 1))) for number in range(count)]
    return [PairItem(str(number), group_of(number), (number,), texts[number]) for number in range(count)]


def task_of(items, rule, **options):
    return PairTask("made", made_set(items, rule, **options))


def random_features(data, dim=256, seed=0, signal=0.0):
    """Independent features; with a signal, texts lean towards the image of their number in the item."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(len(data.source), dim, generator=generator)
    texts = torch.randn(len(data.texts), dim, generator=generator)
    for item in data.items:
        for image, text in zip(item.images, item.texts, strict=False):
            texts[text] += signal * images[image]
    return images, texts


def official_mmvp(images, texts, data):
    """The official loop: row after row, softmax over the two images of a pair, category by the number of the pair."""
    answers, right_of = [], Counter()
    num_pairs = 0
    for item in data.items:
        pair = F.normalize(torch.stack([images[row] for row in item.images]).double(), dim=-1)
        picks = []
        for row in item.texts:
            text = F.normalize(texts[row].double(), dim=-1)
            logits_per_text = 100.0 * text @ pair.T
            probability = logits_per_text.softmax(dim=-1)[0]
            picks.append("img1" if probability > 0.5 else "img2")
        answers.append(picks == ["img1", "img2"])
        right_of[num_pairs // 15] += answers[-1]
        num_pairs += 1
    shares = [100 * right_of[number] / 15 for number in range(num_pairs // 15)]
    return answers, shares


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("signal", [0.0, 0.1])
def test_pairs_are_judged_as_by_the_official_procedure(seed, stages, signal):
    """On 135 pairs each, one stage or several concatenated un-normalised, at lengths that differ by stage."""
    data = made_set(pairs_of_two(135, lambda number: PATTERNS[number // 15]), "pair_t2i", average="groups")
    features = [random_features(data, 24, 10 * seed + stage, signal) for stage in range(stages)]
    images, texts = (torch.cat([(1 + 3 * s) * f[side] for s, f in enumerate(features)], dim=1) for side in (0, 1))
    answers, shares = official_mmvp(images, texts, data)
    metrics, outcomes = PairTask("mmvp", data).score(images, texts)
    assert 0.1 < np.mean(answers) < 0.9
    assert outcomes["image_score"].tolist() == answers
    assert [100 * metrics[f"accuracy/{pattern}"] for pattern in PATTERNS] == pytest.approx(shares)
    assert 100 * metrics["accuracy"] == pytest.approx(np.mean(shares))


def test_the_official_procedure_differs_in_ties_only():
    """Its first image must win, its second may tie."""
    image = torch.eye(3)
    first, second, neither = image[0], image[1], image[2]
    data = made_set(pairs_of_two(1), "pair_t2i")
    for texts, official, strict in [
        ((first, second), True, True),
        ((first, neither), True, False),
        ((neither, second), False, False),
        ((neither, neither), False, False),
        ((second, first), False, False),
    ]:
        features = torch.stack([first, second]), torch.stack(texts)
        assert official_mmvp(*features, data)[0] == [official]
        assert PairTask("mmvp", data).score(*features)[0]["image_score"] == strict


@pytest.mark.parametrize("rule", ["pair_t2i", "winoground"])
def test_image_text_and_group_scores_are_those_of_a_loop(rule):
    task = task_of(pairs_of_two(300), rule)
    images, texts = random_features(task.data, 8, signal=0.2)
    metrics, outcomes = task.score(images, texts)
    by_text, by_image = [], []
    for item in task.data.items:
        score = {
            (image, text): float(F.cosine_similarity(images[item.images[image]], texts[item.texts[text]], dim=0))
            for image in (0, 1)
            for text in (0, 1)
        }
        by_text.append(score[0, 0] > score[1, 0] and score[1, 1] > score[0, 1])
        by_image.append(score[0, 0] > score[0, 1] and score[1, 1] > score[1, 0])
    both = np.logical_and(by_text, by_image)
    assert outcomes["image_score"].tolist() == by_text
    assert outcomes["text_score"].tolist() == by_image
    assert outcomes["group_score"].tolist() == both.tolist()
    assert 0.2 < both.mean() < min(np.mean(by_text), np.mean(by_image)) < 0.9
    assert metrics["accuracy"] == np.mean(by_text if rule == "pair_t2i" else both)


def test_choices_are_those_of_a_loop_however_many_texts_there_are():
    items, row = [], 0
    for number in range(200):
        size = 2 + number % 4
        items.append(PairItem(str(number), "all", (number // 2,), tuple(range(row, row + size))))
        row += size
    task = task_of(items, "text_choice")
    images, texts = random_features(task.data, 8, signal=0.3)
    metrics, outcomes = task.score(images, texts)
    right = []
    for item in items:
        scores = [float(F.cosine_similarity(images[item.images[0]], texts[text], dim=0)) for text in item.texts]
        right.append(scores[0] > max(scores[1:]))
    assert outcomes["accuracy"].tolist() == right
    assert 0.2 < metrics["accuracy"] == np.mean(right) < 0.9
    assert not {"image_score", "text_score", "group_score"} & metrics.keys()


RULES = {
    "pair_t2i": (pairs_of_two, {"image_score": 1 / 4, "text_score": 1 / 4, "group_score": 1 / 6, "accuracy": 1 / 4}),
    "winoground": (pairs_of_two, {"image_score": 1 / 4, "text_score": 1 / 4, "group_score": 1 / 6, "accuracy": 1 / 6}),
    "2 texts": (lambda count: choices(count, 2), {"accuracy": 1 / 2}),
    "4 texts": (lambda count: choices(count, 4), {"accuracy": 1 / 4}),
}


@pytest.mark.parametrize("name", RULES)
def test_a_random_model_is_at_chance(name):
    make, chances = RULES[name]
    count = 6000
    task = task_of(make(count), name if name in ("pair_t2i", "winoground") else "text_choice")
    metrics, _ = task.score(*random_features(task.data, 64))
    for metric, chance in chances.items():
        assert abs(metrics[metric] - chance) < 4 * math.sqrt(chance * (1 - chance) / count), metric


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("constant", ["images", "texts", "both", "zeros"])
def test_a_model_that_says_nothing_is_at_or_below_chance(name, constant):
    make, chances = RULES[name]
    task = task_of(make(3000), name if name in ("pair_t2i", "winoground") else "text_choice")
    images, texts = random_features(task.data, 67)
    if constant in ("images", "both"):
        images[:] = images[0].clone()
    if constant in ("texts", "both"):
        texts[:] = texts[0].clone()
    if constant == "zeros":
        images[:], texts[:] = 0, 0
    metrics, _ = task.score(images, texts)
    if name.endswith("texts") and constant == "images":  # one image, many texts: these still differ by chance
        assert metrics["accuracy"] < chances["accuracy"] + 0.05
    else:
        assert set(metrics.values()) == {0}


def test_where_a_text_stands_gives_no_advantage():
    """Features of equal content tie wherever they stand, at any number of items."""
    for count in (1, 7, 2100):
        task = task_of(choices(count, 3), "text_choice")
        images, texts = random_features(task.data, 67, signal=1.0)
        texts[2::3] = texts[::3]  # the last text is the right one again
        assert task.score(images, texts)[0]["accuracy"] == 0


def test_the_length_of_features_does_not_matter():
    task = task_of(pairs_of_two(90), "pair_t2i")
    images, texts = random_features(task.data, 16, signal=0.2)
    lengths = torch.linspace(0.1, 9, 180)[:, None]
    assert task.score(images, texts)[0] == task.score(images * lengths, texts * 3)[0]


def right_and_wrong(task, right):
    """Return features with which exactly these items are correct; each image belongs to one item."""
    images = torch.eye(len(task.data.source))
    texts = torch.zeros(len(task.data.texts), len(images))
    for item, is_right in zip(task.data.items, right, strict=True):
        for number, text in enumerate(item.texts):
            texts[text, item.images[0]] = (number == 0) == is_right
    return images, texts


def test_averages_are_over_items_or_groups():
    sizes = {"a": 4, "b": 10, "c": 2}
    names = [name for name, size in sizes.items() for _ in range(size)]
    right = [True] * 3 + [False] + [True] * 2 + [False] * 8 + [True] * 2
    items = choices(16, 2, names.__getitem__)
    by_items = task_of(items, "text_choice")
    metrics, outcomes = by_items.score(*right_and_wrong(by_items, right))
    assert metrics["accuracy"] == metrics["micro_accuracy"] == 7 / 16
    assert metrics["macro_accuracy"] == pytest.approx((3 / 4 + 2 / 10 + 1) / 3)
    assert [metrics[f"accuracy/{name}"] for name in sizes] == [0.75, 0.2, 1]
    assert outcomes["accuracy/b"].tolist() == right[4:14]
    by_groups = task_of(items, "text_choice", average="groups", min_group_size=3)
    metrics, outcomes = by_groups.score(*right_and_wrong(by_groups, right))
    assert metrics["accuracy"] == metrics["macro_accuracy"] == pytest.approx((0.75 + 0.2) / 2)
    assert metrics["micro_accuracy"] == 7 / 16
    assert "accuracy/c" not in metrics
    assert outcomes["accuracy"].tolist() == pytest.approx(
        [value * 16 / (2 * size) for value, size in zip(right, [4] * 4 + [10] * 10, strict=False)] + [0, 0]
    )
    assert by_groups.describe()["groups"] == {"a": 4, "b": 10}


def test_all_right_is_one():
    """In spite of groups of sizes that no float holds exactly."""
    task = task_of(choices(17, 2, lambda number: f"{number % 5}"), "text_choice", average="groups")
    metrics, _ = task.score(*right_and_wrong(task, [True] * 17))
    assert metrics["accuracy"] == pytest.approx(1, abs=1e-15)


def test_items_that_belong_together_are_right_only_together():
    names = [("x 1", "x"), ("x 1", "x"), ("x 2", "x"), ("x 2", "x"), ("y 1", "y"), ("y 1", "y")]
    together = [{"pair": pair, "set": of} for pair, of in names] + [{}, {}]
    items = [
        PairItem(item.id, item.group, item.images, item.texts, one)
        for item, one in zip(choices(8, 2), together, strict=True)
    ]
    task = task_of(items, "text_choice")
    metrics, outcomes = task.score(*right_and_wrong(task, [True, True, True, False, True, True, False, True]))
    assert metrics["accuracy"] == 6 / 8
    assert outcomes["pair_accuracy"].tolist() == [True, False, True]
    assert outcomes["set_accuracy"].tolist() == [False, True]
    assert metrics["pair_accuracy"] == pytest.approx(2 / 3)
    assert metrics["set_accuracy"] == 0.5
    assert outcomes["unit:accuracy"].tolist() == [0, 0, 0, 0, 1, 1, 2, 3]
    assert outcomes["unit:pair_accuracy"].tolist() == [0, 0, 1]
    assert "unit:set_accuracy" not in outcomes


@pytest.mark.parametrize("rule", ["pair_t2i", "winoground", "text_choice"])
@pytest.mark.parametrize("average", ["items", "groups"])
def test_each_metric_is_the_mean_of_its_outcomes(rule, average):
    items = choices(100, 3) if rule == "text_choice" else pairs_of_two(100)
    task = task_of(items, rule, average=average)
    metrics, outcomes = task.score(*random_features(task.data, 8, signal=0.3))
    assert {name for name in outcomes if not name.startswith("unit:")} == metrics.keys()
    for name, value in metrics.items():
        assert outcomes[name].dtype in (bool, np.float32)
        assert outcomes[name].mean(dtype=np.float64) == pytest.approx(value, abs=1e-7)
    groups = {item.group for item in items}
    assert metrics["macro_accuracy"] == pytest.approx(np.mean([metrics[f"accuracy/{group}"] for group in groups]))
    assert sum(len(outcomes[f"accuracy/{group}"]) for group in groups) == 100


def test_items_that_share_a_file_are_one_unit():
    """Directly, through other items, or as two boxes in one image."""
    paths = tuple(map(Path, ("a", "b", "c", "d", "b", "e")))
    items = [PairItem(str(n), "g", (n,), (0, 1)) for n in range(5)] + [PairItem("5", "g", (5,), (0, 1))]
    task = PairTask("t", made_set(items, "text_choice", paths=paths))
    outcomes = task.score(*random_features(task.data))[1]
    assert outcomes["unit:accuracy"].tolist() == [0, 1, 2, 3, 1, 4]
    assert outcomes["unit:accuracy"].dtype == np.int32
    chain = [PairItem("0", "g", (0, 1), (0, 1)), PairItem("1", "g", (2, 3), (0, 1)), PairItem("2", "g", (1, 2), (0, 1))]
    task = PairTask(
        "t", made_set([*chain, PairItem("3", "h", (4, 5), (0, 1))], "winoground", paths=tuple(map(Path, "abcdef")))
    )
    outcomes = task.score(*random_features(task.data))[1]
    assert outcomes["unit:group_score"].tolist() == [0, 0, 0, 1]
    assert outcomes["unit:accuracy/g"].tolist() == [0, 0, 0]
    assert "unit:accuracy/h" not in outcomes


def test_independent_items_have_no_units():
    task = task_of(pairs_of_two(10), "pair_t2i")
    assert not [name for name in task.score(*random_features(task.data))[1] if name.startswith("unit:")]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["image", "text"])
def test_features_that_are_not_finite_are_refused(value, side):
    task = task_of(pairs_of_two(10), "pair_t2i")
    images, texts = random_features(task.data)
    (images if side == "image" else texts)[3, 2] = value
    with pytest.raises(UserError, match=f"1 of 20 {side} features are not finite"):
        task.score(images, texts)


def test_features_of_another_set_are_refused():
    task = task_of(pairs_of_two(10), "pair_t2i")
    images, texts = random_features(task.data)
    with pytest.raises(UserError, match="19 image features for a set with 20;"):
        task.score(images[1:], texts)


def png(colour, size=(8, 6)):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


COLOURS = {"red": (250, 0, 0), "green": (0, 250, 0), "blue": (0, 0, 250)}


@pytest.fixture
def root(tmp_path):
    """Three items over three images; the texts of the second are crossed, the third has a box."""
    (tmp_path / "pictures").mkdir()
    for name, colour in COLOURS.items():
        (tmp_path / f"pictures/{name}.png").write_bytes(png(colour))
    image = Image.new("RGB", (8, 6), COLOURS["red"])
    image.paste(COLOURS["blue"], (4, 0, 8, 6))
    image.save(tmp_path / "pictures/red-blue.png")
    items = [
        {"id": "1", "group": "a", "images": ["red.png", "green.png"], "texts": ["a red thing", "a green thing"],
         "match": [[0, 0], [1, 1]]},
        {"id": "2", "group": "b", "images": ["red.png", "blue.png"], "texts": ["a blue thing", "a red thing"],
         "match": [[0, 1], [1, 0]]},
        {"id": "3", "group": "b", "images": ["red.png", {"path": "red-blue.png", "box": [4, 1, 4, 3]}],
         "texts": ["a blue thing", "a red thing"], "match": [[1, 0], [0, 1]], "together": {"set": "x"}},
    ]  # fmt: skip
    write(tmp_path / "set", items)
    return tmp_path / "set"


def write(folder, items, **settings):
    folder.mkdir(exist_ok=True)
    settings = {"format": 1, "name": "colours", "rule": "pair_t2i", "images": "../pictures", "source": "t", **settings}
    (folder / "pairs.json").write_text(json.dumps(settings))
    (folder / "pairs.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))


def change(folder, *, drop=(), line=0, **values):
    """Change values of an item or, if `line` is None, of the settings."""
    path = folder / ("pairs.json" if line is None else "pairs.jsonl")
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    one = lines[line or 0]
    one.update(values)
    for name in drop:
        del one[name]
    path.write_text("".join(json.dumps(item) + "\n" for item in lines))


class Seeing:
    """A model of the mean color of an image, and the color that a text names."""

    def encode_image(self, pixels):
        return pixels.mean((2, 3))

    def encode_text(self, tokens):
        return torch.eye(3)[tokens[:, 0]]


def embed(task, **options):
    encoder = Encoder(
        model=Seeing(),
        image_transform=lambda image: torch.from_numpy(np.array(image.resize((2, 2)))).permute(2, 0, 1) / 255,
        tokenizer=lambda texts: torch.tensor([[next(n for n, c in enumerate(COLOURS) if c in text)] for text in texts]),
        device=torch.device("cpu"),
        **{"batch_size": 3, **options},
    )
    return encoder.embed(task.data)


def test_a_set_is_read_embedded_and_scored(root):
    data = PairSet.open(root)
    assert data.texts == ("a red thing", "a green thing", "a blue thing")
    assert [item.images for item in data.items] == [(0, 1), (0, 2), (0, 3)]
    assert [item.texts for item in data.items] == [(0, 1), (0, 2), (0, 2)]  # each in the order of its images
    assert data.items[2].together == {"set": "x"}
    assert data.source.boxes == (None, None, None, (4, 1, 4, 3))
    raw = embed(PairTask("colours", data))
    assert (raw["image"].shape, raw["text"].shape) == ((4, 3), (3, 3))
    metrics, _ = PairTask("colours", data).score(raw["image"], raw["text"])
    assert set(metrics.values()) == {1}
    change(root, line=1, match=[[0, 0], [1, 1]])
    task = PairTask("colours", PairSet.open(root))
    assert task.score(**{f"{side}_features": value for side, value in embed(task).items()})[0]["accuracy"] == 2 / 3


def test_a_choice_of_texts_is_read(root):
    texts = ["a blue thing", "a green thing", "a red thing"]
    item = {"id": "1", "group": "a", "images": ["red.png"], "texts": texts, "match": [[0, 2]]}
    write(root, [item], rule="text_choice", images=str((root / "../pictures").resolve()), average="groups")
    data = PairSet.open(root)
    assert (data.texts, data.average) == (("a red thing", "a blue thing", "a green thing"), "groups")
    raw = embed(PairTask("colours", data))
    assert PairTask("colours", data).score(raw["image"], raw["text"])[0]["accuracy"] == 1


def test_the_record_says_what_was_measured(root):
    task = PairTask("colours", PairSet.open(root))
    assert isinstance(task, Task)
    record = record_of(task, {"accuracy": 0.5})
    assert (record["key"], record["task"], record["rule"]) == ("pairs/colours", "image_text_pairs", "pair_t2i")
    assert (record["n_images"], record["n_texts"], record["n_pairs"]) == (4, 3, 3)
    assert record["groups"] == {"a": 1, "b": 2}
    assert record["metrics"]["main_metric"] == 0.5
    json.dumps(record)


def test_the_digest_tells_sets_apart(root):
    digests = [PairSet.open(root).sha256]
    (root / "../pictures").rename(root / "../elsewhere")
    change(root, line=None, images="../elsewhere", name="another", source="else")
    assert PairSet.open(root).sha256 == digests[0]  # the location of the images does not count
    changes = [
        (0, {"texts": ["a red thing", "a blue thing"]}),
        (0, {"match": [[0, 1], [1, 0]]}),
        (0, {"group": "c"}),
        (2, {"images": ["red.png", "red-blue.png"]}),
        (None, {"rule": "winoground"}),
        (None, {"average": "groups"}),
        (2, {"together": {}}),
    ]
    for line, values in changes:
        change(root, line=line, **values)
        digests.append(PairSet.open(root).sha256)
    (root / "../elsewhere/blue.png").write_bytes(png(COLOURS["blue"], (90, 90)))
    digests.append(PairSet.open(root).sha256)
    assert len(set(digests)) == 9


@pytest.mark.parametrize(
    ("line", "values", "sentence"),
    [
        (None, {"format": 2}, "has the format 2; this version reads format 1"),
        (None, {"rule": "best"}, "has the rule 'best'; it must be one of pair_t2i, winoground, text_choice"),
        (None, {"average": "all"}, "has the average 'all'; it must be one of items, groups"),
        (None, {"name": 3}, "has 3 for 'name'; it must be a string"),
        (None, {"images": None}, "has None for 'images'; it must be a string"),
        (None, {"min_group_size": 0}, "has the min_group_size 0; it must be an integer, 1 or more"),
        (None, {"min_group_size": 3}, "no group in .* has 3 items; lower min_group_size"),
        (None, {"images": "nowhere"}, r"4 of 4 images are missing, the first is .*red.png; correct 'images'"),
        (None, {"rule": "text_choice"}, "line 1: 2 images and 2 texts; text_choice takes one image, two texts or more"),
        (1, {"id": "1"}, "has the id '1' twice"),
        (1, {"id": ""}, "line 2: id is ''; it must be a string that is not empty"),
        (1, {"group": 5}, "line 2: group is 5; it must be a string that is not empty"),
        (1, {"images": "red.png"}, "line 2: images is 'red.png'; it must be a list that is not empty"),
        (1, {"texts": ["x", " "]}, "line 2: the text ' ' is empty or not a string"),
        (1, {"texts": ["x", 7]}, "line 2: the text 7 is empty or not a string"),
        (1, {"texts": ["x"]}, "line 2: 2 images and 1 texts; pair_t2i takes two of each"),
        (1, {"images": ["red.png", "gone.png"]}, r"1 of 4 images are missing, the first is .*gone.png"),
        (1, {"images": ["red.png", 4]}, "line 2: the image 4 is neither a path nor an object with path and box"),
        (1, {"images": ["red.png", {"box": [0, 0, 1, 1]}]}, "line 2: the image .* is neither a path nor an object"),
        (1, {"images": ["red.png", {"path": "blue.png", "box": [0, 0, 1]}]}, r"line 2: the box \[0, 0, 1\] is not"),
        (1, {"images": ["red.png", {"path": "blue.png", "box": [0, 0, 1, 1.5]}]}, r"the box .* is not \[left, top"),
        (1, {"match": [[0, 0], [1, 2]]}, r"line 2: match has \[1, 2\], beyond 2 images and 2 texts"),
        (1, {"match": [[0, 0], [2, 1]]}, r"line 2: match has \[2, 1\], beyond 2 images and 2 texts"),
        (1, {"match": [[0, 0], [-1, 1]]}, r"line 2: match has \[-1, 1\]; it must hold pairs"),
        (1, {"match": [[0, 0], [1, True]]}, r"line 2: match has \[1, True\]; it must hold pairs"),
        (1, {"match": 3}, "line 2: match has 3; it must hold pairs"),
        (1, {"match": [[0, 0], [1, 0]]}, "line 2: match is .*; it must give each image one text of its own"),
        (1, {"match": [[0, 0], [0, 1], [1, 1]]}, "line 2: match is .*; it must give each image one text of its own"),
        (1, {"match": [[0, 0]]}, "line 2: match is .*; it must give each image one text of its own"),
        (1, {"match": []}, "line 2: match is .*; it must give each image one text of its own"),
        (1, {"together": {"set": 4}}, "line 2: together is .*; it must be an object of strings"),
        (1, {"together": {"macro": "a"}}, "line 2: together has the kind 'macro', which is reserved"),
    ],
)  # fmt: skip
def test_mistakes_in_a_set_are_named(root, line, values, sentence):
    change(root, line=line, **values)
    with pytest.raises(UserError, match=sentence):
        PairSet.open(root)


def test_sets_that_are_not_whole(root):
    lines = (root / "pairs.jsonl").read_text()
    (root / "pairs.jsonl").write_text(lines + "{")
    with pytest.raises(UserError, match=r"pairs.jsonl, line 4 is not JSON"):
        PairSet.open(root)
    (root / "pairs.jsonl").write_text("[]\n")
    with pytest.raises(UserError, match=r"line 1: an item is an object with id, group, images, texts and match"):
        PairSet.open(root)
    (root / "pairs.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"pairs.jsonl has no items"):
        PairSet.open(root)
    (root / "pairs.jsonl").write_text(lines)
    change(root, drop=["match"])
    with pytest.raises(UserError, match=r"line 1: an item is an object with id"):
        PairSet.open(root)
    (root / "pairs.jsonl").unlink()
    with pytest.raises(UserError, match=r"pairs.jsonl is missing; it has one item per line"):
        PairSet.open(root)
    (root / "pairs.json").write_text("[1]")
    with pytest.raises(UserError, match=r"pairs.json has the format None"):
        PairSet.open(root)
    (root / "pairs.json").unlink()
    with pytest.raises(UserError, match=r"pairs.json is missing; a pair set has pairs.json and pairs.jsonl"):
        PairSet.open(root)


def test_images_that_cannot_be_decoded_are_named(root):
    (root / "../pictures/blue.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"blue.png cannot be decoded"):
        embed(PairTask("colours", PairSet.open(root)))


@pytest.mark.parametrize("options", [{"num_workers": 1}, {"batch_size": 1}, {"batch_size": 100}])
def test_workers_and_batches_change_nothing(root, options):
    task = PairTask("colours", PairSet.open(root))
    expected, found = embed(task), embed(task, **options)
    assert torch.equal(found["image"], expected["image"])
    assert torch.equal(found["text"], expected["text"])


@pytest.mark.parametrize("rule", ["pair_t2i", "text_choice"])
def test_outcomes_are_stored_and_read_again(tmp_path, rule):
    """Names of metrics are names of arrays in an archive, whatever a group is called."""
    items = choices(40, 2, lambda n: ("a b", "../x", "ü/y")[n % 3]) if rule == "text_choice" else pairs_of_two(40)
    task = task_of(items, rule)
    metrics, outcomes = task.score(*random_features(task.data))
    np.savez(tmp_path / "o.npz", **outcomes)
    with np.load(tmp_path / "o.npz", allow_pickle=False) as stored:
        assert set(stored) == set(outcomes)
        for name, value in metrics.items():
            assert stored[name].mean() == pytest.approx(value, abs=1e-6)
