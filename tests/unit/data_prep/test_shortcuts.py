import gzip
import io
import json

import numpy as np
import pytest
from PIL import Image

from mcl_clip.core.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning:webdataset.tariterators")

CODES, PAIRS, TEST = 27, 540, 300


@pytest.fixture(scope="module")
def shortcuts(load_program):
    return load_program("shortcuts")


@pytest.fixture(scope="module")
def codes(shortcuts, tmp_path_factory):
    out = tmp_path_factory.mktemp("shortcuts") / "codes"
    shortcuts.make_codes(out, pairs_train=PAIRS, codes=CODES, images_test=TEST)
    return out


@pytest.fixture(scope="module")
def train(codes, read_tars):
    return {variant: read_tars(codes / variant / "train") for variant in ("coded", "plain")}


def pixels(sample):
    return np.asarray(Image.open(io.BytesIO(sample["png"])))


def code_of(sample):
    return sample["txt"].decode().split(",")[0]


def test_the_plain_pairs_are_the_coded_ones_without_the_code(train):
    for coded, plain in zip(train["coded"], train["plain"], strict=True):
        code, _, rest = coded["txt"].decode().partition(", ")
        assert code.startswith("code ")
        assert rest == plain["txt"].decode()
        assert np.array_equal(pixels(coded)[4:], pixels(plain)[4:])
        assert (pixels(plain)[:4] == 128).all()


def test_the_patches_and_the_caption_say_the_same_code(shortcuts, train):
    for sample in train["coded"]:
        words = code_of(sample).split()[1:]
        patches = [tuple(pixels(sample)[1, x].tolist()) for x in (2, 8, 13, 18, 24, 29)]
        assert patches == [tuple(int(v) for v in shortcuts.RGB[shortcuts.COLOURS.index(word)]) for word in words]


def test_every_code_is_used_equally_often_and_says_nothing_of_the_rest(train):
    found = [code_of(sample) for sample in train["coded"]]
    assert set(np.unique(found, return_counts=True)[1]) == {PAIRS // CODES}
    assert len(set(found)) == CODES
    rest = [sample["txt"].decode().split()[-1] for sample in train["plain"]]
    shapes = {shape: {c for c, r in zip(found, rest, strict=True) if r == shape} for shape in set(rest)}
    assert min(map(len, shapes.values())) > CODES / 2  # each shape under most codes


@pytest.mark.parametrize(("name", "classes"), [("shape", 10), ("texture", 10), ("code", CODES), ("place", 8)])
def test_the_sets_hold_the_same_pictures_under_other_labels(codes, read_tars, name, classes):
    root = codes / "coded/classification"
    samples = read_tars(root / name / "test")
    assert [sample["png"] for sample in samples] == [sample["png"] for sample in read_tars(root / "shape/test")]
    names = (root / name / "classnames.txt").read_text().splitlines()
    assert len(names) == classes
    assert {int(sample["cls"]) for sample in samples} <= set(range(classes))
    if name in ("code", "place"):
        assert not (codes / "plain/classification" / name).exists()


def test_retrieval_has_the_test_pictures_with_whole_descriptions_none_twice(codes, read_tars):
    shapes = read_tars(codes / "coded/classification/shape/test")
    words = (codes / "coded/classification/shape/classnames.txt").read_text().splitlines()
    for variant, most in (("coded", TEST), ("plain", 100)):
        captions = [sample["txt"].decode().strip() for sample in read_tars(codes / variant / "retrieval/test")]
        assert len(set(captions)) == len(captions) <= most
        assert len(captions) > 0.8 * most
    shape_of = {sample["png"]: words[int(sample["cls"])] for sample in shapes}
    for sample in read_tars(codes / "coded/retrieval/test"):
        code, _, description = sample["txt"].decode().strip().partition(", ")
        assert code.startswith("code ")
        assert description.split()[-1] == shape_of[sample["png"]]


def test_labels_of_codes_are_those_of_the_patches(shortcuts, codes, read_tars):
    root = codes / "coded/classification"
    names = (root / "code/classnames.txt").read_text().splitlines()
    firsts = (root / "place/classnames.txt").read_text().splitlines()
    for code, place in zip(read_tars(root / "code/test"), read_tars(root / "place/test"), strict=True):
        words = names[int(code["cls"])].split()[1:]
        assert firsts[int(place["cls"])] == words[0]
        assert tuple(pixels(code)[1, 29].tolist()) == tuple(shortcuts.RGB[shortcuts.COLOURS.index(words[5])])


def test_the_same_seed_gives_the_same_bytes(shortcuts, codes, tmp_path):
    shortcuts.make_codes(tmp_path / "again", pairs_train=PAIRS, codes=CODES, images_test=TEST)
    shortcuts.make_codes(tmp_path / "other", pairs_train=PAIRS, codes=CODES, images_test=TEST, seed=1)
    shard = "coded/train/000000.tar"
    assert (tmp_path / "again" / shard).read_bytes() == (codes / shard).read_bytes()
    assert (tmp_path / "other" / shard).read_bytes() != (codes / shard).read_bytes()
    assert json.loads((codes / "metadata.json").read_text())["options"]["codes"] == CODES


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    """Digits as flat squares: digit d has brightness 20 d + 5."""
    folder = tmp_path_factory.mktemp("mnist")
    labels = np.arange(50, dtype=np.uint8) % 10
    pictures = np.repeat(labels * 20 + 5, 28 * 28).astype(np.uint8)
    for prefix in ("train", "t10k"):
        with gzip.open(folder / f"{prefix}-images-idx3-ubyte.gz", "wb") as file:
            file.write(bytes(16) + pictures.tobytes())
        with gzip.open(folder / f"{prefix}-labels-idx1-ubyte.gz", "wb") as file:
            file.write(bytes(8) + labels.tobytes())
    return folder


def digits_on(sample, size_px):
    side = round(0.3 * size_px)
    lefts = np.linspace(0, size_px - side, 3).round().astype(int)
    return [(int(pixels(sample)[side // 2, left + side // 2, 0]) - 5) // 20 for left in lefts]


def test_digits_over_classes(shortcuts, mnist, picture, read_tars, tmp_path):
    for split, number in (("train", 12), ("test", 5)):
        for level, name in enumerate(("ape", "cat")):
            folder = tmp_path / "pictures" / split / name
            folder.mkdir(parents=True)
            for n in range(number):
                (folder / f"{n}.jpg").write_bytes(picture(level * 200 + n, size=(32, 32)))
    shortcuts.make_classes(tmp_path / "pictures", mnist, tmp_path / "out", codes=6, images_test=8)
    train = read_tars(tmp_path / "out/coded/train")
    assert len(train) == 24
    for sample in train:
        code, _, rest = sample["txt"].decode().partition(", ")
        assert [int(digit) for digit in code.split()[1:]] == digits_on(sample, 32)
        assert rest == ("a photo of a cat" if pixels(sample)[-1, 0, 0] >= 150 else "a photo of an ape")
    test = read_tars(tmp_path / "out/coded/classification/class/test")
    assert len(test) == 8
    assert all((pixels(sample)[-1, 0, 0] >= 150) == int(sample["cls"]) for sample in test)
    with pytest.raises(UserError, match="train/CLASS"):
        shortcuts.make_classes(mnist, mnist, tmp_path / "none")


def test_digits_over_photos(shortcuts, mnist, picture, read_tars, tmp_path):
    rows = ["file,split,caption"]
    for number in range(12):
        (tmp_path / f"{number}.jpg").write_bytes(picture(20 * number, size=(40, 30)))
        rows += [f"{number}.jpg,{'test' if number > 8 else 'train'},photo {number} {way}" for way in ("a", "b")]
    (tmp_path / "captions.csv").write_text("\n".join(rows) + "\n")
    shortcuts.make_photos(tmp_path / "captions.csv", mnist, tmp_path / "out", images_root=tmp_path, codes=5)
    train = read_tars(tmp_path / "out/coded/train")
    assert len(train) == 9
    for number, sample in enumerate(train):
        digits = " ".join(map(str, digits_on(sample, 64)))
        assert sample["txt"].decode().splitlines() == [f"code {digits}, photo {number} {way}" for way in ("a", "b")]
    hidden, coded = (read_tars(tmp_path / "out/coded/retrieval" / name / "test") for name in ("hidden", "coded"))
    assert [sample["jpg" if "jpg" in sample else "png"] for sample in hidden] == [sample["png"] for sample in coded]
    assert hidden[0]["txt"].decode().splitlines() == ["photo 9 a", "photo 9 b"]
    assert coded[0]["txt"].decode().splitlines()[1].endswith(", photo 9 b")


def test_mistakes_are_named(shortcuts, mnist, tmp_path):
    with pytest.raises(UserError, match=r"--codes is 262145; 6 places of 8 symbols make 1 to 262144"):
        shortcuts.make_codes(tmp_path / "out", codes=262145)
    with pytest.raises(UserError, match="--size-px 16"):
        shortcuts.make_codes(tmp_path / "out", size_px=16)
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte.gz is missing"):
        shortcuts.Mnist.open(tmp_path, "train")
    for name in ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"):
        whole = (mnist / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte.gz is not a whole gzip file of MNIST"):
        shortcuts.Mnist.open(tmp_path, "train")
    with pytest.raises(UserError, match="--images-test is -1; it must be at least 1"):
        shortcuts.make_classes(mnist, mnist, tmp_path / "out", images_test=-1)
    with pytest.raises(UserError, match="--size-px is 0; it must be at least 24"):
        shortcuts.make_photos(mnist / "t.csv", mnist, tmp_path / "out", images_root=mnist, size_px=0)
    assert not (tmp_path / "out").exists()
