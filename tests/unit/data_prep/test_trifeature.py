import io
import itertools
import json

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression

from mcl_clip.core.errors import UserError
from mcl_clip.data.index import ShardIndex

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning:webdataset.tariterators")


@pytest.fixture(scope="module")
def tri(load_program):
    return load_program("trifeature")


def render(tri, *values: int, size_px: int = 64, name: tuple = ("test",)) -> np.ndarray:
    return tri.render(*values, size_px=size_px, name=name)


def test_ten_values_of_each_attribute(tri):
    assert all(len(set(values)) == 10 for values in tri.VALUES.values())
    assert len({word for words in tri.WORDS.values() for word in words}) == 30
    assert tuple(tri.PATTERNS) == tri.TEXTURES
    assert len(tri.COMBINATIONS) == 1000


def test_a_picture_depends_on_its_name_and_values_only(tri):
    first = render(tri, 4, 3, 2, name=("a", 7))
    others = [render(tri, 4, 3, 2, name=("a", n)) for n in range(7)]
    assert np.array_equal(first, render(tri, 4, 3, 2, name=("a", 7)))
    assert first.shape == (64, 64, 3)
    assert first.dtype == np.uint8
    assert not any(np.array_equal(first, other) for other in others)


@pytest.mark.parametrize("size_px", [32, 64, 99])
def test_shapes_lie_wholly_inside_and_reach_every_edge(tri, size_px):
    reached = np.zeros(4, bool)
    for number in range(200):
        solid = render(tri, number % 10, 9, 0, size_px=size_px, name=("place", number))[..., 0] != tri.BACKGROUND
        rows, columns = np.flatnonzero(solid.any(1)), np.flatnonzero(solid.any(0))
        reached |= [rows[0] <= 1, columns[0] <= 1, rows[-1] >= size_px - 2, columns[-1] >= size_px - 2]
        area = solid.sum() / (tri.BOX * size_px) ** 2
        assert 0.2 < area < 1.1  # none is cut off
    assert reached.all()


def test_places_and_angles_are_spread(tri):
    tops = [np.flatnonzero((render(tri, 3, 9, 0, name=("spread", n))[..., 0] != 128).any(1))[0] for n in range(300)]
    assert np.ptp(tops) >= 25
    assert len({tuple(tri._shape_mask(0, angle, 64).shape) for angle in range(-45, 46, 5)}) > 3


def test_colours_stay_on_the_line_from_dark_to_full(tri):
    for colour in range(10):
        picture = render(tri, 1, colour, 0, name=("colour", colour))
        values, counts = np.unique(picture.reshape(-1, 3), axis=0, return_counts=True)
        two = values[np.argsort(counts)[-2:]].tolist()
        assert [128, 128, 128] in two
        assert tri.RGB[colour].astype(int).tolist() in two


@pytest.mark.parametrize(("size_px", "kept"), [(32, 0.7), (64, 0.85)])
def test_textures_keep_their_contrast_in_small_pictures(tri, size_px, kept):
    for texture in range(1, 10):
        small, large = (
            np.mean([tri._texture_tile(texture, a, px).std() for a in (-40, 0, 25)]) for px in (size_px, 256)
        )
        assert small / large > kept, tri.TEXTURES[texture]


@pytest.mark.parametrize("size_px", [32, 64])
def test_textures_can_be_told_apart_after_jpeg(tri, size_px):
    """By a linear model on rings of the spectrum and on brightness alone, which no turn or place changes."""

    def features(texture: int, number: int) -> np.ndarray:
        shape = (1, 3)[number % 2]
        file = io.BytesIO(tri._Painter(size_px, "jpg", 0)._paint((shape, 9, texture), "texture", texture, number))
        grey = np.asarray(Image.open(file).convert("L"), np.float64) / 128 - 1
        power = np.abs(np.fft.rfft2(grey)) ** 2
        radius = np.hypot(np.fft.fftfreq(size_px)[:, None], np.fft.rfftfreq(size_px)[None, :])
        rings = np.digitize(radius, np.linspace(0, 1 / 2, 25)).ravel()
        brightness = np.histogram(grey[np.abs(grey) > 0.1], bins=8, range=(-1, 1))[0]
        return np.concatenate([np.log(np.bincount(rings, power.ravel()) + 1e-9), np.sqrt(brightness)])

    labels = np.repeat(np.arange(10), 60)
    values = np.stack([features(texture, number) for texture in range(10) for number in range(60)])
    values = (values - values.mean(0)) / (values.std(0) + 1e-9)
    is_test = np.arange(600) % 3 == 0
    model = LogisticRegression(max_iter=300).fit(values[~is_test], labels[~is_test])
    score = model.score(values[is_test], labels[is_test])
    assert score > 0.8, f"{score}"  # chance is 0.1


def test_held_out_combinations_are_balanced(tri):
    for fraction in (0.1, 0.3):
        held = tri.choose_held_out(fraction, seed=5)
        assert held.sum() == 1000 * fraction
        table = held.reshape(10, 10, 10)
        for axis in range(3):
            assert (table.sum(axis) == 10 * fraction).all()
    assert tri.choose_held_out(0.0, 0).sum() == 0
    assert tri.choose_held_out(0.123, 0).sum() == 123
    assert (tri.choose_held_out(0.1, 0) != tri.choose_held_out(0.1, 1)).any()


def test_training_rows_use_every_allowed_combination_equally_and_no_other(tri):
    held = tri.choose_held_out(0.1, 0)
    counts = np.bincount(tri.training_combinations(2000, held, [], 0), minlength=1000)
    assert counts[held].sum() == 0
    assert set(counts[~held]) == {2, 3}


@pytest.mark.parametrize("probability", [0.1, 0.4, 0.7, 1.0])
def test_correlated_attributes_keep_their_marginals(tri, probability):
    (one,) = tri.parse_correlations([f"shape:texture={probability}"], 3)
    rows = tri.COMBINATIONS[tri.training_combinations(20_000, tri.choose_held_out(0.1, 3), [one], 3)]
    shape, texture = rows[:, 0], rows[:, 2]
    joint = np.zeros((10, 10))
    np.add.at(joint, (shape, texture), 1)
    is_partner = np.arange(10)[None] == np.array(one.partner)[:, None]
    assert joint[is_partner] / 2000 == pytest.approx(probability, abs=0.01)
    assert joint[~is_partner] / 2000 == pytest.approx((1 - probability) / 9, abs=0.01)
    for column in rows.T:
        assert np.bincount(column) / 2000 == pytest.approx(1, abs=0.02)


def test_without_correlation_the_partner_is_as_likely_as_any_value(tri):
    plain = tri.training_combinations(3000, tri.choose_held_out(0, 0), [], 0)
    independent = tri.training_combinations(
        3000, tri.choose_held_out(0, 0), tri.parse_correlations(["shape:texture=0.1"], 0), 0
    )
    assert np.array_equal(plain, independent)


def test_partners_are_matched_at_random_one_to_one(tri):
    partners = [tri.parse_correlations(["shape:colour=0.5"], seed)[0].partner for seed in range(3)]
    assert all(sorted(partner) == list(range(10)) for partner in partners)
    assert len(set(partners)) == 3


def test_two_correlations_hold_together(tri):
    both = tri.parse_correlations(["shape:texture=0.8", "shape:colour=0.6"], 0)
    rows = tri.COMBINATIONS[tri.training_combinations(20_000, tri.choose_held_out(0, 0), both, 0)]
    assert [tri._described(one, rows)["measured"] for one in both] == pytest.approx([0.8, 0.6], abs=0.01)


@pytest.mark.parametrize(
    "texts",
    [
        ["shape=0.5"],
        ["shape:size=0.5"],
        ["shape:shape=0.5"],
        ["shape:colour=0.05"],
        ["shape:colour=1.1"],
        ["shape:colour=x"],
    ],
)
def test_wrong_correlations_are_refused(tri, texts):
    with pytest.raises(UserError, match=r"is not of the form shape:texture=0\.7"):
        tri.parse_correlations(texts, 0)


def test_cycles_of_correlations_are_refused(tri):
    for texts in (
        ["shape:colour=0.5", "colour:shape=0.5"],
        [f"{a}:{b}=0.5" for a, b in itertools.combinations(tri.ATTRIBUTES, 2)],
    ):
        with pytest.raises(UserError, match="at most two different pairs"):
            tri.parse_correlations(texts, 0)


def test_captions_name_what_is_named_and_nothing_else(tri):
    for named in itertools.chain.from_iterable(itertools.combinations(tri.ATTRIBUTES, n) for n in range(4)):
        for wording, opening in itertools.product(range(4), tri._OPENINGS):
            text = tri.caption_of((0, 8, 1), named, opening, wording)
            words = text.split()
            expected = {"shape": "triangle", "colour": "orange", "texture": "striped"}
            assert {name for name, word in expected.items() if word in words} == set(named)
            assert ("object" in words) == ("shape" not in named)
            assert not any(article == "a" and word[0] in "aeiou" for article, word in itertools.pairwise(words))
            assert not any(article == "an" and word[0] not in "aeiou" for article, word in itertools.pairwise(words))


def test_attributes_are_named_as_often_as_asked(tri):
    painter = tri._Painter(32, "jpg", 0)
    rows = tri.COMBINATIONS[tri.training_combinations(400, tri.choose_held_out(0.1, 0), [], 0)]
    texts = [pair.captions[0] for pair in painter.training_pairs(rows, {"colour": 1.0, "shape": 0.5, "texture": 0.0})]
    named = {name: np.mean([any(w in t.split() for w in tri.WORDS[name]) for t in texts]) for name in tri.ATTRIBUTES}
    assert (named["colour"], named["texture"]) == (1.0, 0.0)
    assert 0.4 < named["shape"] < 0.6
    assert len({text.split()[0] for text in texts}) > 1


def test_training_pairs_do_not_depend_on_how_many_there_are(tri):
    painter, rows = tri._Painter(32, "jpg", 0), tri.COMBINATIONS[:20]
    few = list(painter.training_pairs(rows[:5], {"colour": 1, "shape": 0.5, "texture": 0.5}))
    many = list(painter.training_pairs(rows, {"colour": 1, "shape": 0.5, "texture": 0.5}))
    assert few == many[:5]


@pytest.fixture(scope="module")
def made(tri, tmp_path_factory):
    out = tmp_path_factory.mktemp("tri") / "out"
    tri.make_trifeature(
        out,
        pairs_train=120,
        size_px=32,
        images_per_class=3,
        samples_per_shard=50,
        correlate=("shape:texture=0.7",),
        seed=4,
    )
    return out


def test_all_sets_are_written(tri, made, read_tars):
    assert sorted(path.name for path in made.iterdir()) == ["classification", "metadata.json", "retrieval", "train"]
    index = ShardIndex.load(made / "train" / "index.arrow")
    assert (len(index), len(index.shards)) == (120, 3)
    metadata = json.loads((made / "metadata.json").read_text())
    assert metadata["counts"] == {"train": 120, "retrieval": 1000} | {f"classification/{n}": 30 for n in tri.ATTRIBUTES}
    assert metadata["options"]["correlate"] == ["shape:texture=0.7"]
    assert metadata["correlations"][0]["measured"] == pytest.approx(0.7, abs=0.1)
    held = {tuple(one) for one in metadata["held_out_combinations"]}
    assert len(held) == 100
    for sample in read_tars(made / "train"):
        attributes = json.loads(sample["json"])
        assert attributes["caption"] == sample["txt"].decode()
        assert tri.WORDS["colour"][tri.COLOURS.index(attributes["colour"])] in attributes["caption"]
        assert tuple(attributes[name] for name in tri.ATTRIBUTES) not in held


def test_the_retrieval_set_tells_every_combination_apart(tri, made, read_tars):
    samples = read_tars(made / "retrieval" / "test")
    captions = [sample["txt"].decode() for sample in samples]
    assert len(set(captions)) == len(captions) == 1000
    for key, caption in zip((made / "retrieval" / "keys.txt").read_text().split(), captions, strict=True):
        shape, colour, texture = key.split("-")
        words = (shape, colour, tri.WORDS["texture"][tri.TEXTURES.index(texture)])
        assert all(word in caption.split() for word in words)


def test_evaluation_pictures_are_not_training_pictures(tri, made, read_tars):
    sets = [
        made / "train",
        made / "retrieval" / "test",
        *(made / "classification" / n / "test" for n in tri.ATTRIBUTES),
    ]
    pictures = [sample["jpg"] for folder in sets for sample in read_tars(folder)]
    assert len(set(pictures)) == len(pictures) == 120 + 1000 + 90


def test_equal_rows_of_different_sets_are_different_renders(tri):
    painter, rows = tri._Painter(64, "png", 0), tri.COMBINATIONS[:10]
    train = [pair.image for pair in painter.training_pairs(rows, {"colour": 1, "shape": 1, "texture": 1})]
    assert not set(train) & {pair.image for pair in painter.retrieval_pairs(rows)}
    assert not set(train) & {sample.image for sample in painter.labelled("texture", rows, 1)}


def test_classification_sets_have_equal_classes_and_fitting_templates(tri, made, read_tars):
    for attribute in tri.ATTRIBUTES:
        folder = made / "classification" / attribute
        names = (folder / "classnames.txt").read_text().split()
        assert tuple(names) == tri.WORDS[attribute]
        labels = [int(sample["cls"]) for sample in read_tars(folder / "test")]
        assert np.bincount(labels).tolist() == [3] * 10
        for template, name in itertools.product(
            (folder / "zeroshot_classification_templates.txt").read_text().splitlines(), names
        ):
            words = template.replace("{c}", name).split()
            assert not any(one == "a" and other[0] in "aeiou" for one, other in itertools.pairwise(words))


def test_labels_are_those_of_the_rendered_value(tri):
    painter = tri._Painter(64, "png", 0)
    for sample in painter.labelled("colour", tri.COMBINATIONS[tri.COMBINATIONS[:, 2] == 0], 2):
        pixels = np.asarray(Image.open(io.BytesIO(sample.image)))
        assert (pixels == tri.RGB[sample.label].astype(np.uint8)).all(-1).any()


def test_the_same_options_give_the_same_files(tri, made, tmp_path):
    options = {"size_px": 32, "images_per_class": 3, "samples_per_shard": 50, "correlate": ("shape:texture=0.7",)}
    tri.make_trifeature(tmp_path / "again", pairs_train=120, seed=4, **options)
    for path in made.rglob("*"):
        if path.is_file() and path.suffix != ".arrow":
            assert path.read_bytes() == (tmp_path / "again" / path.relative_to(made)).read_bytes()


def test_evaluation_on_held_out_combinations_only(tri, tmp_path):
    tri.make_trifeature(
        tmp_path / "out", pairs_train=5, size_px=32, images_per_class=2, image_format="png", evaluate_on="held-out"
    )
    metadata = json.loads((tmp_path / "out" / "metadata.json").read_text())
    assert metadata["counts"]["retrieval"] == 100
    keys = (tmp_path / "out" / "retrieval" / "keys.txt").read_text().split()
    assert [key.split("-") for key in keys] == metadata["held_out_combinations"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size_px": 16}, "--size-px is 16; .* 32 to 512"),
        ({"name_shape": 1.5}, "--name-shape is 1.5"),
        ({"held_out_combinations": 1.0}, "--held-out-combinations is 1"),
        ({"pairs_train": 0}, "--pairs-train is 0"),
        ({"held_out_combinations": 0.005, "evaluate_on": "held-out"}, "the 5 held-out combinations do not have every"),
    ],
)
def test_values_out_of_range_are_refused_before_anything_is_written(tri, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        tri.make_trifeature(tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_golden_picture(tri):
    """Changes of the renderer change every published figure: they must be seen."""
    picture = render(tri, 7, 0, 5, name=("golden",))
    assert picture.mean((0, 1)).tolist() == pytest.approx([129.80, 115.28, 115.44], abs=0.3)
    assert (picture != tri.BACKGROUND).any(-1).sum() == pytest.approx(531, abs=8)
