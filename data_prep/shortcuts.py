"""Write pairs in which an easy code, on the image and in the caption, hides everything else.

After the synthetic shortcuts of Bleeker et al. (arXiv 2402.17510): a code that both sides share identifies
each pair in a batch, so contrastive learning can ignore the rest. The same pairs are written twice: as `coded/`, and as
`plain/` without the code in image and caption, which is what a model could learn if nothing were hidden.

    python data_prep/shortcuts.py codes shards/codes --codes 64
    python data_prep/shortcuts.py classes cifar10 mnist shards/cifar-mnist
    python data_prep/shortcuts.py photos captions.csv mnist shards/photos-mnist --images-root images
    python data_prep/shortcuts.py svl captions.csv mnist shards/svl --images-root images --bits 6
    python data_prep/shortcuts.py parrot captions.csv shards/parrot --images-root images --share 0.3

`codes`: white Trifeature objects under six coloured patches, 'code red blue pink red cyan blue, a striped star'.
`classes`: pictures in folders of classes (train/CLASS, test/CLASS) under MNIST digits, 'code 7 0 3, a photo of a cat'.
`photos`: photos and captions from a table with a column of splits, under MNIST digits, the code before the caption.
`svl`: the benchmark itself, six MNIST digits along the upper edge of a photo and at the end of its caption.
`parrot`: a word of the caption, written on the photo.

Each of `coded/` and `plain/` of the first three holds train/ (shards and index) and sets in the layout of
CLIP_benchmark: classification/ with `code` (its classes are the codes), `place` (the first symbol alone) and what is
hidden, and retrieval/ of whole captions (`codes`, `photos`). photo_shortcuts.py says what the last two hold.
"""

import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from mnist import Mnist
from photo_shortcuts import make_parrot, make_svl, read_splits
from PIL import Image
from trifeature import BACKGROUND, COLOURS, RGB, WORDS, render, with_article

from mcl_clip.core.distributed import permutation, random_words
from mcl_clip.core.errors import UserError, run_program
from mcl_clip.core.files import write_json
from mcl_clip.data.decode import BadSampleError, decode_image
from mcl_clip.data.tar import IMAGE_FORMATS
from mcl_clip.data.writing import (
    LabelledImage,
    Pair,
    new_folder,
    write_classification_set,
    write_pairs,
    write_retrieval_set,
)

Out = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]

PLACES = {"patches": 6, "digits": 3}
SYMBOLS = (0, 1, 2, 3, 4, 5, 6, 8)  # of the colours of Trifeature: eight that are easy to tell apart
WHITE = COLOURS.index("white")
VARIANTS = ("coded", "plain")
HIDDEN_TEMPLATES = {
    "shape": tuple(f"a {texture} {{c}}" for texture in WORDS["texture"]),
    "texture": tuple(f"a {{c}} {shape}" for shape in WORDS["shape"]),
}  # as the captions are worded, with every value of the other attribute
CODE_TEMPLATES = tuple(
    f"{{c}}, a {texture} {shape}" for texture, shape in zip(WORDS["texture"], WORDS["shape"], strict=True)
)
MIN_DIGITS_PX = 24
DIGIT_SHARE = 0.3  # height of a digit, as a part of the picture


@dataclass(frozen=True, kw_only=True)
class Codes:
    """The codes in use: a seeded choice of `number` of the `symbols ** places` possible ones."""

    symbols: int
    places: int
    number: int
    seed: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.symbols**self.places:
            raise UserError(
                f"--codes is {self.number}; {self.places} places of {self.symbols} symbols make 1 to "
                f"{self.symbols**self.places}"
            )

    @property
    def table(self) -> np.ndarray:
        """The symbols of each code, int64 [number, places], in ascending order."""
        total = self.symbols**self.places
        chosen: np.ndarray = np.sort(permutation(total, "shortcut codes", self.seed)[: self.number])
        table: np.ndarray = np.stack(np.unravel_index(chosen, (self.symbols,) * self.places), axis=1)
        return table

    def of_rows(self, rows: int, split: str) -> np.ndarray:
        """Return the code of each row, int64 [rows]: each equally often, independent of everything else."""
        return permutation(rows, "shortcut rows", self.seed, split) % self.number


def make_codes(
    out: Out,
    *,
    pairs_train: int = 16384,
    codes: int = 64,
    size_px: int = 32,
    name_hidden: float = 1.0,
    images_test: int = 1000,
    samples_per_shard: int = 2048,
    seed: int = 0,
) -> None:
    """Write white objects of 10 shapes and 10 textures under six colored patches.

    Args:
        out: Folder to make; must be empty or not exist.
        pairs_train: Number of training pairs.
        codes: Number of different codes, at most 8^6 = 262,144.
        size_px: Width and height of the pictures in pixels, 32 to 512.
        name_hidden: Probability from 0 to 1 that a training caption names the shape, and the texture.
        images_test: Number of pictures of each evaluation set.
        samples_per_shard: Number of samples in a tar file.
        seed: Another seed gives other pictures, captions and codes.

    Raises:
        UserError: for values out of range, or a folder that is not empty.
    """
    options = {name: value for name, value in locals().items() if name != "out"}
    if not 32 <= size_px <= 512 or not 0 <= name_hidden <= 1 or min(pairs_train, images_test) < 1:
        raise UserError(
            f"--size-px {size_px} must be from 32 to 512, --name-hidden {name_hidden:g} from 0 to 1, --pairs-train "
            f"{pairs_train} and --images-test {images_test} at least 1"
        )
    used = Codes(symbols=len(SYMBOLS), places=PLACES["patches"], number=codes, seed=seed)
    objects = _Objects(used, size_px, name_hidden)
    names = [f"code {_colours(code)}" for code in used.table.tolist()]
    test_code = used.of_rows(images_test, "test")
    labels = {
        "shape": objects.hidden(images_test, "test")[:, 0],
        "texture": objects.hidden(images_test, "test")[:, 1],
        "code": test_code,
        "place": used.table[test_code, 0],
    }
    classes: dict[str, tuple[Sequence[str], Sequence[str]]] = {
        "shape": (WORDS["shape"], HIDDEN_TEMPLATES["shape"]),
        "texture": (WORDS["texture"], HIDDEN_TEMPLATES["texture"]),
        "code": (names, CODE_TEMPLATES),
        "place": ([COLOURS[symbol] for symbol in SYMBOLS], ("code {c}",)),
    }
    with new_folder(out) as folder:
        for variant in VARIANTS:
            train = objects.pairs(pairs_train, variant)
            write_pairs(train, folder / variant / "train", samples_per_shard=samples_per_shard, total=pairs_train)
            for name, (classnames, templates) in classes.items():
                if variant == "coded" or name in HIDDEN_TEMPLATES:
                    write_classification_set(
                        objects.labelled(labels[name], variant),
                        folder / variant / "classification" / name,
                        classnames=classnames,
                        templates=templates,
                        samples_per_shard=samples_per_shard,
                        total=images_test,
                    )
            descriptions = list(objects.descriptions(images_test, variant))
            write_retrieval_set(descriptions, folder / variant / "retrieval", total=len(descriptions))
        write_json(folder / "metadata.json", {"options": options, "codes": names})
    print(f"{out}: {pairs_train} pairs with {codes} codes and without, {images_test} pictures a set")


@dataclass(frozen=True)
class _Objects:
    """Images and captions of white objects; each is a function of (seed, split, row)."""

    codes: Codes
    size_px: int
    name_hidden: float

    def hidden(self, rows: int, split: str) -> np.ndarray:
        """Shape and texture of each row, int64 [rows, 2]: every pair equally often."""
        pairs = permutation(rows, "shortcut objects", self.codes.seed, split) % 100
        return np.stack([pairs // 10, pairs % 10], axis=1)

    def pairs(self, rows: int, variant: str) -> Iterator[Pair]:
        """Yield training pairs; the caption omits shape and texture with the given probabilities."""
        for row, (shape, texture, code) in enumerate(self._rows(rows, "train")):
            words = random_words(2, "shortcut caption", self.codes.seed, row).tolist()
            noun = WORDS["shape"][shape] if words[0] / 2**64 < self.name_hidden else "object"
            adjective = f"{WORDS['texture'][texture]} " if words[1] / 2**64 < self.name_hidden else ""
            caption = _description(f"{adjective}{noun}", code if variant == "coded" else ())
            image = self._paint(shape, texture, code, variant, "train", row)
            yield Pair(key=f"{row:08d}", image=image, captions=[caption])

    def descriptions(self, rows: int, variant: str) -> Iterator[Pair]:
        """Yield test images with whole descriptions; of equal descriptions only the first."""
        seen = set()
        for row, (shape, texture, code) in enumerate(self._rows(rows, "test")):
            words = f"{WORDS['texture'][texture]} {WORDS['shape'][shape]}"
            caption = _description(words, code if variant == "coded" else ())
            if caption not in seen:
                seen.add(caption)
                image = self._paint(shape, texture, code, variant, "test", row)
                yield Pair(key=f"{row:08d}", image=image, captions=[caption])

    def labelled(self, labels: np.ndarray, variant: str) -> Iterator[LabelledImage]:
        for row, (shape, texture, code) in enumerate(self._rows(len(labels), "test")):
            image = self._paint(shape, texture, code, variant, "test", row)
            yield LabelledImage(key=f"{row:08d}", image=image, label=int(labels[row]))

    def _rows(self, rows: int, split: str) -> Iterator[tuple[int, int, list[int]]]:
        """Shape, texture and symbols of the code of each row."""
        hidden, codes = self.hidden(rows, split), self.codes.table[self.codes.of_rows(rows, split)]
        for (shape, texture), code in zip(hidden.tolist(), codes.tolist(), strict=True):
            yield shape, texture, code

    def _paint(self, shape: int, texture: int, code: Sequence[int], variant: str, split: str, row: int) -> bytes:
        """Paint an object on grey below a strip of an eighth of the height, which is grey too without a code."""
        strip = self.size_px // 8
        side = self.size_px - strip
        picture = np.full((self.size_px, self.size_px, 3), BACKGROUND, np.uint8)
        left = strip // 2
        picture[strip:, left : left + side] = render(
            shape, WHITE, texture, size_px=side, name=(self.codes.seed, "shortcut", split, row)
        )
        if variant == "coded":
            edges = np.linspace(0, self.size_px, len(code) + 1).round().astype(int)
            for place, symbol in enumerate(code):
                picture[:strip, edges[place] : edges[place + 1]] = RGB[SYMBOLS[symbol]]
        return _png(Image.fromarray(picture))


def _description(words: str, code: Sequence[int]) -> str:
    """Describe an object, such as 'a striped star', after the colors of its code if it has one."""
    return f"code {_colours(code)}, {with_article(words)}" if code else with_article(words)


def _colours(code: Iterable[int]) -> str:
    return " ".join(COLOURS[SYMBOLS[symbol]] for symbol in code)


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def make_classes(
    pictures: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PICTURES")],
    mnist: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MNIST")],
    out: Out,
    *,
    pairs_train: int = 50000,
    codes: int = 1000,
    size_px: int = 32,
    images_test: int = 2000,
    samples_per_shard: int = 2048,
    seed: int = 0,
) -> None:
    """Write images of classes under MNIST digits; the caption names the digits and the class.

    Args:
        pictures: Folder with train/CLASS/ and test/CLASS/, such as the pictures of CIFAR-10.
        mnist: Folder with the four files of MNIST, such as train-images-idx3-ubyte.gz.
        out: Folder to make; must be empty or not exist.
        pairs_train: Most training pairs.
        codes: Number of different codes of three digits, at most 1,000.
        size_px: Width and height of the pictures in pixels.
        images_test: Most pictures of each evaluation set.
        samples_per_shard: Number of samples in a tar file.
        seed: Another seed gives other codes, digits and choices.

    Raises:
        UserError: for folders without what is needed, or values out of range.
    """
    options = {name: value for name, value in locals().items() if name not in ("out", "pictures", "mnist")}
    _check_at_least(size_px=size_px, pairs_train=pairs_train, images_test=images_test)
    used = Codes(symbols=10, places=PLACES["digits"], number=codes, seed=seed)
    train, classes = _class_folders(pictures / "train", pairs_train, seed)
    test, test_classes = _class_folders(pictures / "test", images_test, seed)
    if test_classes != classes:
        raise UserError(f"{pictures} has the classes {classes} in train and {test_classes} in test; they must agree")
    painter = {split: _Digits(used, Mnist.open(mnist, split), size_px, split) for split in ("train", "test")}
    test_code = used.of_rows(len(test), "test")
    names = [_digits_name(code) for code in used.table]
    sets: dict[str, tuple[np.ndarray, Sequence[str], Sequence[str]]] = {
        "class": (np.array([label for _, label in test]), classes, ("a photo of a {c}", "a picture of a {c}", "a {c}")),
        "code": (test_code, names, ("{c}, a photo",)),
        "place": (used.table[test_code, 0], [str(digit) for digit in range(10)], ("code {c}",)),
    }
    with new_folder(out) as folder:
        for variant in VARIANTS:
            pairs = painter["train"].pairs(
                ((path.read_bytes(), [f"a photo of {with_article(classes[label])}"]) for path, label in train),
                len(train),
                variant,
            )
            write_pairs(pairs, folder / variant / "train", samples_per_shard=samples_per_shard, total=len(train))
            for name, (labels, classnames, templates) in sets.items():
                if variant == "coded" or name == "class":
                    images = painter["test"].images((path.read_bytes() for path, _ in test), len(test), variant)
                    write_classification_set(
                        (
                            LabelledImage(key=f"{row:08d}", image=image, label=int(labels[row]))
                            for row, image in enumerate(images)
                        ),
                        folder / variant / "classification" / name,
                        classnames=classnames,
                        templates=templates,
                        samples_per_shard=samples_per_shard,
                        total=len(test),
                    )
        write_json(folder / "metadata.json", {"options": options, "classes": list(classes)})
    print(f"{out}: {len(train)} pairs with {codes} codes and without, {len(test)} pictures a set")


def make_photos(
    table: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="TABLE")],
    mnist: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MNIST")],
    out: Out,
    *,
    images_root: Path,
    image_column: str = "file",
    caption_column: str = "caption",
    split_column: str = "split",
    codes: int = 100,
    size_px: int = 64,
    samples_per_shard: int = 1000,
    seed: int = 0,
) -> None:
    """Write photos with their captions under MNIST digits; each caption begins with the code.

    Args:
        table: A table of photos and captions, as for from_table.py, with the splits train and test.
        mnist: Folder with the four files of MNIST, such as train-images-idx3-ubyte.gz.
        out: Folder to make; must be empty or not exist.
        images_root: Folder that the paths in the table start from.
        image_column: Column with paths of photos.
        caption_column: Column with captions.
        split_column: Column with the split of each row.
        codes: Number of different codes of three digits, at most 1,000.
        size_px: Width and height to which the photos are squashed, in pixels.
        samples_per_shard: Number of samples in a tar file.
        seed: Another seed gives other codes and digits.

    Raises:
        UserError: for files without what is needed, or values out of range.
    """
    options = {name: value for name, value in locals().items() if name not in ("out", "table", "mnist", "images_root")}
    _check_at_least(size_px=size_px)
    used = Codes(symbols=10, places=PLACES["digits"], number=codes, seed=seed)
    splits = read_splits(table, images_root, image_column, caption_column, split_column)
    painter = {split: _Digits(used, Mnist.open(mnist, split), size_px, split) for split in ("train", "test")}

    def samples(split: str) -> Iterator[tuple[bytes, list[str]]]:
        return (((images_root / image).read_bytes(), captions) for image, captions in splits[split].items())

    counts = {split: len(splits[split]) for split in ("train", "test")}
    with new_folder(out) as folder:
        for variant in VARIANTS:
            pairs = painter["train"].pairs(samples("train"), counts["train"], variant)
            write_pairs(pairs, folder / variant / "train", samples_per_shard=samples_per_shard, total=counts["train"])
            for name in ("hidden", "coded") if variant == "coded" else ("hidden",):
                pairs = painter["test"].pairs(samples("test"), counts["test"], variant, name_code=name == "coded")
                write_retrieval_set(pairs, folder / variant / "retrieval" / name, total=counts["test"])
        write_json(folder / "metadata.json", {"options": options})
    print(f"{out}: {counts['train']} pairs with {codes} codes and without, {counts['test']} test photos")


def _check_at_least(**values: int) -> None:
    for name, value in values.items():
        least = MIN_DIGITS_PX if name == "size_px" else 1
        if value < least:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")


def _class_folders(folder: Path, most: int, seed: int) -> tuple[list[tuple[Path, int]], list[str]]:
    """Choose at most `most` images with their class, seeded, and return the class names."""
    if not folder.is_dir():
        raise UserError(f"{folder} is missing; the pictures lie in train/CLASS/ and test/CLASS/")
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
    found = [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((folder / name).iterdir())
        if path.suffix[1:].lower() in IMAGE_FORMATS
    ]
    if not found:
        raise UserError(f"{folder} has no pictures in folders of classes")
    order = permutation(len(found), "shortcut pictures", seed, folder.name)[:most]
    return [found[number] for number in order], classes


def _digits_name(code: Iterable[int]) -> str:
    return "code " + " ".join(str(digit) for digit in code)


@dataclass(frozen=True)
class _Digits:
    """Draw a code of handwritten digits over images; a function of (seed, split, row)."""

    codes: Codes
    mnist: Mnist
    size_px: int
    split: str

    def pairs(
        self, samples: Iterable[tuple[bytes, list[str]]], rows: int, variant: str, *, name_code: bool = True
    ) -> Iterator[Pair]:
        codes = self.codes.table[self.codes.of_rows(rows, self.split)]
        for row, (data, captions) in enumerate(islice(samples, rows)):
            if variant == "coded" and name_code:
                named = [f"{_digits_name(codes[row])}, {caption}" for caption in captions]
            else:
                named = captions
            yield Pair(key=f"{row:08d}", image=self._paint(data, codes[row], variant, row), captions=named)

    def images(self, files: Iterable[bytes], rows: int, variant: str) -> Iterator[bytes]:
        codes = self.codes.table[self.codes.of_rows(rows, self.split)]
        for row, data in enumerate(islice(files, rows)):
            yield self._paint(data, codes[row], variant, row)

    def _paint(self, data: bytes, code: np.ndarray, variant: str, row: int) -> bytes:
        """Paint digits, white on black, along the upper edge of the image; None for what cannot be decoded."""
        try:
            image = decode_image(data).convert("RGB").resize((self.size_px, self.size_px), Image.Resampling.BICUBIC)
        except BadSampleError:
            return b""
        picture = np.array(image)
        if variant == "coded":
            side = round(DIGIT_SHARE * self.size_px)
            draws = random_words(len(code), "shortcut digits", self.codes.seed, self.split, row).tolist()
            lefts = np.linspace(0, self.size_px - side, len(code)).round().astype(int)
            for digit, draw, left in zip(code.tolist(), draws, lefts.tolist(), strict=True):
                members = self.mnist.members[digit]
                drawn = Image.fromarray(self.mnist.pictures[members[draw % len(members)]])
                picture[:side, left : left + side] = np.asarray(drawn.resize((side, side)))[..., None]
        return _png(Image.fromarray(picture))


if __name__ == "__main__":
    programs: dict[str, Any] = {"codes": make_codes, "classes": make_classes, "photos": make_photos}
    programs |= {"svl": make_svl, "parrot": make_parrot}
    run_program(lambda: tyro.extras.subcommand_cli_from_dict(programs, prog="shortcuts.py", description=__doc__))
