import gzip
import io
import json
import re

import numpy as np
import pytest
from PIL import Image, ImageChops

from mcl_clip.core.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning:webdataset.tariterators")

PHOTOS = {"train": 24, "val": 3, "test": 10}
PLACES = [37 * place + 14 for place in range(6)]  # centers of the digits
WORDS = ("zebra", "walrus", "a fox", "giraffe by the river")


@pytest.fixture(scope="module")
def program(load_program):
    return load_program("photo_shortcuts")


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    """Flat digits: digit d has a brightness of 20 d + 5, and 1 more in its second example."""
    folder = tmp_path_factory.mktemp("mnist")
    labels = np.arange(20, dtype=np.uint8) % 10
    pixels = np.repeat(labels * 20 + 5 + np.arange(20, dtype=np.uint8) // 10, 28 * 28).astype(np.uint8)
    for prefix in ("train", "t10k"):
        with gzip.open(folder / f"{prefix}-images-idx3-ubyte.gz", "wb") as file:
            file.write(bytes(16) + pixels.tobytes())
        with gzip.open(folder / f"{prefix}-labels-idx1-ubyte.gz", "wb") as file:
            file.write(bytes(8) + labels.tobytes())
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory, picture):
    """A table of wide photos of one colour, each with three captions."""
    folder = tmp_path_factory.mktemp("photos")
    rows, number = ["file,split,caption"], 0
    for split, count in PHOTOS.items():
        for _ in range(count):
            (folder / f"{number}.jpg").write_bytes(picture(6 * number, size=(300, 240)))
            rows += [f"{number}.jpg,{split},{WORDS[number % 4]} {letter}{number}" for letter in "xyz"]
            number += 1
    (folder / "captions.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def svl(program, photos, mnist, tmp_path_factory):
    out = {}
    for name, options in {"bits": {"bits": 3}, "unique": {}, "photos": {"bits": 3, "rows": "photos"}}.items():
        out[name] = tmp_path_factory.mktemp("svl") / name
        program.make_svl(photos / "captions.csv", mnist, out[name], images_root=photos, **options)
    return out


@pytest.fixture(scope="module")
def parrot(program, photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("parrot") / "out"
    program.make_parrot(photos / "captions.csv", out, images_root=photos, share=0.25)
    return out


def photo_in(sample):
    return Image.open(io.BytesIO(sample["jpg"])).convert("RGB")


def captions_in(sample):
    return sample["txt"].decode().splitlines()


def digits_in(sample):
    """The digits that a picture shows, by their brightness."""
    pixels = np.asarray(photo_in(sample)).astype(int)
    return "".join(str(round((pixels[14, x].mean() - 5.5) / 20)) for x in PLACES)


def digits_of(caption):
    assert re.search(r"( \d){6}$", caption)
    return caption[-11:].replace(" ", "")


def words_in(sample, plain):
    """Whether something is written on a photo."""
    return ImageChops.difference(photo_in(sample), photo_in(plain)).getbbox() is not None


def test_pictures_show_the_digits_that_their_captions_end_with(svl, read_tars):
    for out in svl.values():
        for sample in read_tars(out / "coded/train"):
            assert photo_in(sample).size == (224, 224)
            assert {digits_of(caption) for caption in captions_in(sample)} == {digits_in(sample)}


def test_without_the_shortcut_pairs_are_the_same(svl, read_tars):
    for out in svl.values():
        coded, plain = (read_tars(out / variant / "train") for variant in ("coded", "plain"))
        assert len(coded) == len(plain)
        for one, other in zip(coded, plain, strict=True):
            assert one["__key__"] == other["__key__"]
            assert [caption[:-12] for caption in captions_in(one)] == captions_in(other)
            pixels, expected = (np.asarray(photo_in(sample)).astype(int) for sample in (one, other))
            assert np.abs(pixels[40:] - expected[40:]).max() <= 4  # blocks of JPEG away from the digits
            assert np.ptp(expected[:, 100], axis=0).max() <= 4


def test_a_pair_is_a_photo_with_one_caption_under_a_draw_of_its_own_or_with_all(svl, read_tars):
    pairs = {name: read_tars(out / "coded/train") for name, out in svl.items()}
    assert len(pairs["bits"]) == len(pairs["unique"]) == 3 * PHOTOS["train"]
    assert len(pairs["photos"]) == PHOTOS["train"]
    assert {len(captions_in(sample)) for sample in pairs["photos"]} == {3}
    of_photo = [digits_in(sample) for sample in pairs["bits"][:3]]
    assert len(set(of_photo)) > 1
    codes = [int(digits_in(sample)) for sample in pairs["bits"]]
    assert set(codes) == set(range(8))
    unique = [int(digits_in(sample)) for sample in pairs["unique"]]
    assert unique[::3] == unique[1::3] == unique[2::3]
    assert sorted(unique[::3]) == list(range(PHOTOS["train"]))
    assert unique[:2] != [0, 0]  # the offset of seed 0 is not 0
    examples = [np.asarray(photo_in(sample))[14, 14].mean() for sample in pairs["unique"]]
    assert len(set(np.round(examples))) > 1  # the handwriting is drawn for each pair


def test_retrieval_without_with_and_with_another_shortcut(svl, read_tars):
    for name, out in svl.items():
        sets = {each: read_tars(out / "retrieval" / each / "test") for each in ("clean", "coded", "swapped", "val")}
        assert [len(samples) for samples in sets.values()] == [PHOTOS["test"]] * 3 + [PHOTOS["val"]]
        for number, (clean, coded, swapped) in enumerate(zip(*list(sets.values())[:3], strict=True)):
            words = captions_in(clean)
            assert words == [f"{WORDS[(27 + number) % 4]} {letter}{27 + number}" for letter in "xyz"]
            code = number if name == "unique" else number % 8
            assert int(digits_in(coded)) == code
            assert captions_in(coded) == [f"{word} {' '.join(f'{code:06d}')}" for word in words]
            assert swapped["jpg"] == coded["jpg"]
            (other,) = {int(digits_of(caption)) for caption in captions_in(swapped)}
            assert other != code
            assert other < (10 if name == "unique" else 8)
            assert [caption[:-12] for caption in captions_in(swapped)] == words
        digits = read_tars(out / "classification/digit/test")
        assert [sample["jpg"] for sample in digits] == [sample["jpg"] for sample in sets["coded"]]
        assert [int(sample["cls"]) for sample in digits] == [int(digits_in(sample)) % 10 for sample in digits]


def test_a_share_of_the_pairs_has_a_word_of_the_caption_on_the_photo(program, parrot, photos, read_tars, monkeypatch):
    coded, plain = (read_tars(parrot / variant / "train") for variant in ("coded", "plain"))
    assert [sample["txt"] for sample in coded] == [sample["txt"] for sample in plain]
    has_word = [words_in(*pair) for pair in zip(coded, plain, strict=True)]
    assert sum(has_word) == round(0.25 * 3 * PHOTOS["train"])
    written, write_word = [], program.write_word
    monkeypatch.setattr(
        program, "write_word", lambda photo, word, **name: written.append(word) or write_word(photo, word, **name)
    )
    program.make_parrot(photos / "captions.csv", parrot.parent / "again", images_root=photos, share=0.25)
    captions = [captions_in(sample)[0] for sample, has in zip(coded, has_word, strict=True) if has]
    for word, caption in zip(written, captions, strict=False):
        assert word in caption.split()
        assert len(word) >= 4 or caption.startswith("a fox")
    clean, own, other = (read_tars(parrot / "retrieval" / name / "test") for name in ("clean", "coded", "swapped"))
    assert clean[0]["txt"] == own[0]["txt"] == other[0]["txt"]
    for samples in (own, other):
        assert all(words_in(*pair) for pair in zip(samples, clean, strict=True))
    of_coded, of_swapped = (written[len(captions) :][n * 10 : n * 10 + 10] for n in (0, 1))
    for word, another, sample in zip(of_coded, of_swapped, clean, strict=True):
        assert word in sample["txt"].decode()
        assert another not in sample["txt"].decode()
    shard = "coded/train/000000.tar"
    assert (parrot.parent / "again" / shard).read_bytes() == (parrot / shard).read_bytes()


def test_wide_words_fit_on_the_photo(program):
    photo = Image.new("RGB", (64, 64), (90, 90, 90))
    program.write_word(photo, "counterrevolutionaries", name=(0,))
    pixels = np.asarray(photo)
    assert (pixels != 90).any()
    assert (pixels[:, [0, -1]] == 90).all()


def test_a_draw_of_words(program):
    assert {program.draw_word(["A cat sat upon it"], name=(n,)) for n in range(9)} == {"upon"}
    assert program.draw_word(["a cat is"], name=(0,)) == "cat"
    assert program.draw_word(["1 + 2"], name=(0,)) == ""


def test_seeds(program, svl, photos, mnist, tmp_path):
    for name, seed in (("again", 0), ("other", 1)):
        program.make_svl(photos / "captions.csv", mnist, tmp_path / name, images_root=photos, bits=3, seed=seed)
    shard = "coded/train/000000.tar"
    assert (tmp_path / "again" / shard).read_bytes() == (svl["bits"] / shard).read_bytes()
    assert (tmp_path / "other" / shard).read_bytes() != (svl["bits"] / shard).read_bytes()
    assert json.loads((svl["bits"] / "metadata.json").read_text())["options"]["bits"] == 3


def test_mistakes_are_named(program, photos, mnist, tmp_path):
    table, out = photos / "captions.csv", tmp_path / "out"
    with pytest.raises(UserError, match="--bits 20 must be from 0 to 19, and --size-px 224 at least 168"):
        program.make_svl(table, mnist, out, images_root=photos, bits=20)
    with pytest.raises(UserError, match="--size-px 100 at least 168"):
        program.make_svl(table, mnist, out, images_root=photos, size_px=100)
    with pytest.raises(UserError, match="--share 0 must be above 0"):
        program.make_parrot(table, out, images_root=photos, share=0)
    (tmp_path / "captions.csv").write_text("file,split,caption\n0.jpg,train,a\n")
    with pytest.raises(UserError, match=r"has no split test in 'split'; it has \['train'\]"):
        program.make_svl(tmp_path / "captions.csv", mnist, out, images_root=photos)
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte.gz is missing"):
        program.make_svl(table, tmp_path, out, images_root=photos)
    assert not out.exists()
