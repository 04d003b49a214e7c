"""Photos whose captions can be told from a code or a word in the picture: the sets `svl` and `parrot`.

`svl` is the benchmark of Bleeker et al. (arXiv 2402.17510): six MNIST digits along the upper edge of a photo, and the
same digits at the end of its caption. `parrot` has photos with a word of their caption written on them, a common
shortcut of web data ('parrot captions', arXiv 2312.14232). Models are trained with the shortcut and evaluated without.

Both make coded/train/ and plain/train/ (shards and index), the same pairs with and without the shortcut, and
retrieval/ with the test photos and all their captions: `clean` without the shortcut, `coded` with it, `swapped` with
the shortcut of another photo; `val` is clean, and made if the table has that split.
"""

import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from mnist import Mnist
from PIL import Image, ImageDraw, ImageFont, ImageOps

from mcl_clip.core.distributed import Name, permutation, random_words
from mcl_clip.core.errors import UserError
from mcl_clip.core.files import write_json
from mcl_clip.data.decode import BadSampleError, decode_image
from mcl_clip.data.tables import Splits, group_rows, read_rows
from mcl_clip.data.writing import (
    LabelledImage,
    Pair,
    new_folder,
    write_classification_set,
    write_pairs,
    write_retrieval_set,
)

Table = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="TABLE")]
MnistFolder = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MNIST")]
Out = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
Rows = Literal["captions", "photos"]

NUM_DIGITS = 6
DIGIT_PX = 28
MAX_BITS = 19  # 2^19 = 524,288 codes have six digits
MIN_LETTERS = 4  # of a word to be written on a photo, where the caption has one
WORD_SHARE = 1 / 8  # height of a written word, as a part of the photo
JPEG_QUALITY = 95
NOT_OPTIONS = ("table", "mnist", "out", "images_root")

Paint = Callable[[int, Image.Image], None]  # changes the photo of a row, which is given by its number, in place
Reword = Callable[[int, str], str]  # returns a caption of a row with the shortcut


def make_svl(
    table: Table,
    mnist: MnistFolder,
    out: Out,
    *,
    images_root: Path,
    bits: int = 0,
    rows: Rows = "captions",
    image_column: str = "file",
    caption_column: str = "caption",
    split_column: str = "split",
    size_px: int = 224,
    samples_per_shard: int = 1000,
    seed: int = 0,
) -> None:
    """Write the SVL benchmark: photos under six MNIST digits, with which their captions end.

    Args:
        table: A table of photos and captions, as for from_table.py, with the splits train and test, and perhaps val.
        mnist: Folder with the four files of MNIST, such as train-images-idx3-ubyte.gz.
        out: Folder to make; must be empty or not exist.
        images_root: Folder that the paths in the table start from.
        bits: Draw the code of each training pair from 2^bits codes; 0 gives each photo a code of its own.
        rows: A training pair is a photo with one of its captions, under its own draw of code and digits, as published
            (where they are drawn anew in each epoch); or a photo with all its captions under one code.
        image_column: Column with paths of photos.
        caption_column: Column with captions.
        split_column: Column with the split of each row.
        size_px: Pixels of the photos: the shorter side is resized to it, and the center is cropped.
        samples_per_shard: Number of samples in a tar file.
        seed: Another seed gives other codes and digits.

    Raises:
        UserError: for files without what is needed, or values out of range.
    """
    options = {name: value for name, value in locals().items() if name not in NOT_OPTIONS}
    if not 0 <= bits <= MAX_BITS or size_px < NUM_DIGITS * DIGIT_PX:
        raise UserError(
            f"--bits {bits} must be from 0 to {MAX_BITS}, and --size-px {size_px} at least {NUM_DIGITS * DIGIT_PX}, "
            f"the width of {NUM_DIGITS} digits"
        )
    splits = read_splits(table, images_root, image_column, caption_column, split_column)
    digits = {split: Mnist.open(mnist, split) for split in ("train", "test")}
    train, test = (_Photos(splits[name], images_root, size_px) for name in ("train", "test"))
    pairs = train.pairs(rows)
    train_codes = _train_codes(np.array([pair.photo for pair in pairs]), len(train), bits, seed)
    num_codes = min(2**bits, len(test)) if bits else len(test)
    test_codes = np.arange(len(test)) % num_codes
    other_codes = (test_codes + 1 + _draw("svl swaps", seed) % max(1, num_codes - 1)) % num_codes

    def painting(split: str, codes: np.ndarray) -> Paint:
        return lambda row, photo: paste_digits(photo, int(codes[row]), digits[split], name=(seed, split, row))

    def ending_in(codes: np.ndarray) -> Reword:
        return lambda row, caption: f"{caption} {' '.join(_digits_of(int(codes[row])))}"

    painted = painting("test", test_codes)
    with new_folder(out) as folder:
        write = partial(write_pairs, samples_per_shard=samples_per_shard, total=len(pairs))
        write(train.written(pairs), folder / "plain" / "train")
        coded = train.written(pairs, painting("train", train_codes), ending_in(train_codes))
        write(coded, folder / "coded" / "train")
        _write_retrieval(splits, images_root, size_px, folder / "retrieval", {
            "clean": (None, None),
            "coded": (painted, ending_in(test_codes)),
            "swapped": (painted, ending_in(other_codes)),
        })  # fmt: skip
        images = test.written(test.pairs("photos"), painted)
        write_classification_set(
            (
                LabelledImage(key=pair.key, image=pair.image, label=int(code % 10))
                for pair, code in zip(images, test_codes, strict=True)
            ),
            folder / "classification" / "digit",
            classnames=[str(digit) for digit in range(10)],
            templates=[f"a photo {'0 ' * (NUM_DIGITS - 1)}{{c}}"],
            total=len(test),
        )
        write_json(folder / "metadata.json", {"options": options})
    codes = f"2^{bits} codes" if bits else "a code for each photo"
    print(f"{out}: {len(pairs)} pairs with {codes} and without, {len(test)} test photos")


def _train_codes(photo_of: np.ndarray, photos: int, bits: int, seed: int) -> np.ndarray:
    """Return the code of each pair, int64 [pairs]: drawn, or with 0 bits the number of its photo and an offset."""
    if bits:
        drawn: np.ndarray = (random_words(len(photo_of), "svl codes", seed) % 2**bits).astype(np.int64)
        return drawn
    return (photo_of + _draw("svl offset", seed)) % photos


def _draw(*name: Name) -> int:
    return int(random_words(1, *name)[0] >> 32)


def _digits_of(code: int) -> str:
    return f"{code:0{NUM_DIGITS}d}"


def paste_digits(photo: Image.Image, code: int, mnist: Mnist, *, name: tuple[Name, ...]) -> None:
    """Paste the six digits of a code along the upper edge of a photo, each a drawn example of MNIST, in place."""
    draws = random_words(NUM_DIGITS, "svl digits", *name).tolist()
    for place, (digit, draw) in enumerate(zip(_digits_of(code), draws, strict=True)):
        members = mnist.members[int(digit)]
        digit_image = Image.fromarray(mnist.pictures[members[draw % len(members)]])
        photo.paste(digit_image, (place * (photo.width // NUM_DIGITS), 0))


def make_parrot(
    table: Table,
    out: Out,
    *,
    images_root: Path,
    share: float = 0.3,
    rows: Rows = "captions",
    image_column: str = "file",
    caption_column: str = "caption",
    split_column: str = "split",
    size_px: int = 224,
    samples_per_shard: int = 1000,
    seed: int = 0,
) -> None:
    """Write photos of which a share has a word of the caption written on them.

    The word is drawn among those of at least four letters, and stands in white with a black edge at a drawn place.

    Args:
        table: A table of photos and captions, as for from_table.py, with the splits train and test, and perhaps val.
        out: Folder to make; must be empty or not exist.
        images_root: Folder that the paths in the table start from.
        share: Share of the training pairs with a word on the photo, above 0 and up to 1; of the test photos of `coded`
            and `swapped` all have one.
        rows: A training pair is a photo with one of its captions, or a photo with all its captions.
        image_column: Column with paths of photos.
        caption_column: Column with captions.
        split_column: Column with the split of each row.
        size_px: Pixels of the photos: the shorter side is resized to it, and the center is cropped.
        samples_per_shard: Number of samples in a tar file.
        seed: Another seed gives other words, places and photos with a word.

    Raises:
        UserError: for files without what is needed, or values out of range.
    """
    options = {name: value for name, value in locals().items() if name not in NOT_OPTIONS}
    if not 0 < share <= 1 or size_px < 32:
        raise UserError(f"--share {share:g} must be above 0 and at most 1, and --size-px {size_px} at least 32")
    splits = read_splits(table, images_root, image_column, caption_column, split_column)
    train, test = (_Photos(splits[name], images_root, size_px) for name in ("train", "test"))
    pairs = train.pairs(rows)
    has_word = permutation(len(pairs), "parrot pairs", seed) < round(share * len(pairs))
    words = [draw_word(pair.captions, name=(seed, "train", row)) for row, pair in enumerate(pairs)]
    tested = test.pairs("photos")
    test_words = [draw_word(pair.captions, name=(seed, "test", row)) for row, pair in enumerate(tested)]
    other_words = [_other_word(row, tested, test_words, seed) for row in range(len(tested))]

    def writing(split: str, words: Sequence[str], has_word: np.ndarray) -> Paint:
        def paint(row: int, photo: Image.Image) -> None:
            if has_word[row]:
                write_word(photo, words[row], name=(seed, split, row))

        return paint

    always = np.ones(len(tested), bool)
    with new_folder(out) as folder:
        write = partial(write_pairs, samples_per_shard=samples_per_shard, total=len(pairs))
        write(train.written(pairs), folder / "plain" / "train")
        write(train.written(pairs, writing("train", words, has_word)), folder / "coded" / "train")
        _write_retrieval(splits, images_root, size_px, folder / "retrieval", {
            "clean": (None, None),
            "coded": (writing("test", test_words, always), None),
            "swapped": (writing("test", other_words, always), None),
        })  # fmt: skip
        write_json(folder / "metadata.json", {"options": options})
    print(f"{out}: {len(pairs)} pairs, {has_word.sum()} of them with a word, and without; {len(test)} test photos")


def draw_word(captions: Sequence[str], *, name: tuple[Name, ...]) -> str:
    """Draw a word of the captions of a pair: one of at least four letters, or else the longest; empty without words."""
    words = [word for caption in captions for word in re.findall(r"[^\W\d_]+", caption.lower())]
    drawn = [word for word in words if len(word) >= MIN_LETTERS] or sorted(words, key=len)[-1:]
    return drawn[_draw("parrot word", *name) % len(drawn)] if drawn else ""


def _other_word(row: int, tested: Sequence["_Row"], words: Sequence[str], seed: int) -> str:
    """Return the word of another test photo that is in no caption of photo `row`; empty if there is none."""
    own, start = " ".join(tested[row].captions).lower(), _draw("parrot swap", seed, row)
    others = (words[(start + step) % len(words)] for step in range(len(words)))
    return next((word for word in others if word not in own), "")


def write_word(photo: Image.Image, word: str, *, name: tuple[Name, ...]) -> None:
    """Write a word on a photo at a drawn place, in white with a black edge, in place; wide words in smaller letters."""
    draw, height = ImageDraw.Draw(photo), WORD_SHARE * photo.height
    edge = max(1, photo.height // 100)
    font: Any = ImageFont.load_default(height)
    room = photo.width - 4 * edge
    if (width := draw.textlength(word, font)) > room:
        font = ImageFont.load_default(height * room / width)
    words = random_words(2, "parrot place", *name).tolist()
    free = (max(0.0, room - draw.textlength(word, font)), photo.height - 1.5 * height)
    place = (2 * edge + int(words[0] / 2**64 * free[0]), int(words[1] / 2**64 * free[1]))
    draw.text(place, word, "white", font, stroke_width=edge, stroke_fill="black")


def read_splits(table: Path, root: Path, image_column: str, caption_column: str, split_column: str) -> Splits:
    """Return the captions of each photo by split; raise UserError without the splits train and test."""
    rows = read_rows(table, (image_column, caption_column, split_column))
    splits = group_rows(
        rows, image_column=image_column, caption_column=caption_column, split_column=split_column, root=root
    )
    if missing := {"train", "test"} - splits.keys():
        raise UserError(
            f"{table} has no split {', '.join(sorted(missing))} in {split_column!r}; it has {sorted(splits)}"
        )
    return splits


@dataclass(frozen=True, kw_only=True)
class _Row:
    """A pair to be written: the number and path of its photo, and captions."""

    key: str
    photo: int
    path: str
    captions: Sequence[str]


@dataclass(frozen=True)
class _Photos:
    """The photos of a split, by their path, with captions."""

    captions: dict[str, list[str]]
    root: Path
    size_px: int

    def __len__(self) -> int:
        return len(self.captions)

    def pairs(self, rows: Rows) -> list[_Row]:
        """Return a pair for each photo, or for each caption."""
        found = []
        for photo, (path, captions) in enumerate(self.captions.items()):
            parts = [captions] if rows == "photos" else [[caption] for caption in captions]
            keys = [f"{photo:06d}" if rows == "photos" else f"{photo:06d}-{number}" for number in range(len(parts))]
            found += [
                _Row(key=key, photo=photo, path=path, captions=part) for key, part in zip(keys, parts, strict=True)
            ]
        return found

    def written(
        self, pairs: Sequence[_Row], paint: Paint | None = None, reword: Reword | None = None
    ) -> Iterator[Pair]:
        """Yield pairs with the shortcut in photo and captions; a photo that cannot be decoded is empty."""
        for row, pair in enumerate(pairs):
            captions = [reword(row, caption) for caption in pair.captions] if reword else pair.captions
            yield Pair(key=pair.key, image=self._image(row, pair.path, paint), captions=captions, source=pair.path)

    def _image(self, row: int, path: str, paint: Paint | None) -> bytes:
        try:
            photo = decode_image((self.root / path).read_bytes()).convert("RGB")
        except (BadSampleError, OSError):
            return b""
        photo = ImageOps.fit(photo, (self.size_px, self.size_px), Image.Resampling.BICUBIC)
        if paint:
            paint(row, photo)
        file = io.BytesIO()
        photo.save(file, "JPEG", quality=JPEG_QUALITY)
        return file.getvalue()


def _write_retrieval(
    splits: Splits, root: Path, size_px: int, out: Path, shortcuts: dict[str, tuple[Paint | None, Reword | None]]
) -> None:
    """Write a retrieval set of the test photos for each shortcut, and one of the validation photos if there are any."""
    sets = [(name, "test", shortcut) for name, shortcut in shortcuts.items()]
    for name, split, (paint, reword) in [*sets, ("val", "val", (None, None))]:
        if split in splits:
            photos = _Photos(splits[split], root, size_px)
            write_retrieval_set(photos.written(photos.pairs("photos"), paint, reword), out / name, total=len(photos))
