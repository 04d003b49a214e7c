"""Pictures with captions from wherever a user has them: a table, a folder, a data set of `datasets`, or shards."""

import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mcl_clip.core.errors import UserError, shorten_list
from mcl_clip.data.decode import BadSampleError, decode_captions
from mcl_clip.data.hf_datasets import image_bytes, open_splits, undecoded
from mcl_clip.data.index import RULE, ShardIndex
from mcl_clip.data.reader import Reader
from mcl_clip.data.shards import expand_shards
from mcl_clip.data.tables import IMAGES, as_captions, check_columns, column_names, group_rows, read_rows
from mcl_clip.data.writing import clean_captions

IMAGE_COLUMNS = (
    *("image", "file", "filename", "file_name", "filepath", "file_path", "image_path", "image_file"),
    *("image_name", "path", "img", "picture", "photo", "jpg", "png"),
)
CAPTION_COLUMNS = (
    *("caption", "captions", "text", "texts", "title", "sentence", "sentences", "description", "prompt"),
    *("alt_text", "label", "comment", "raw", "txt"),
)
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
TEXTS_AT_ONCE = 1000  # rows of shards whose captions are read together


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns of a table or data set hold what, and how a text file is written."""

    image_column: str = ""
    """Column with the images, or their paths; by default the first of image, file, filename, path and the like."""
    caption_column: str = ""
    """Column with a caption or a list of captions; by default the first of caption, text, title and the like."""
    split_column: str = ""
    """Column that says train, validation or test; by default pictures are split at random."""
    images_root: Path | None = None
    """Folder that paths of images start from; by default that of the table."""
    separator: str = ""
    """Character between the fields of a CSV, or tab; by default the one that fits."""
    encoding: str = ""
    """Encoding of a CSV or of caption files, such as cp1252; by default UTF-8, or what a byte order mark says."""


class Picture(NamedTuple):
    """A picture: its path or row, its captions (at least one), and the split it belongs to, if that is stated."""

    name: str
    captions: tuple[str, ...]
    split: str = ""


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Pictures in the order of their source; `read` returns the image file of a number, empty if it is missing.

    `read` may be called by several threads. `missing` are the numbers of those that are known to be missing, as far as
    that is known without reading. `without_caption` counts pictures that are left out.
    """

    kind: str
    pictures: Sequence[Picture]
    read: Callable[[int], bytes]
    missing: Sequence[int] = ()
    without_caption: int = 0


def open_pictures(data: str, columns: Columns) -> Pictures:
    """Open pictures with captions.

    Args:
        data: a table (see `mcl_clip.data.tables`), a folder of images with captions beside them, a data set of
            `datasets` (a folder or a name on the Hub), or shards (a folder, glob or URL with braces).
        columns: which columns hold what.

    Raises:
        UserError: if there is nothing of this kind, a column is not there, or no picture has a caption.
    """
    path = Path(data)
    if data.endswith(".tar") or "://" in data or (path.is_dir() and any(path.glob("*.tar"))):
        opened = _open_shards(data)
    elif path.is_file() or (path.is_dir() and _has_captions_beside(path)):
        opened = _open_table(path, columns)
    elif path.is_dir() or HUB_NAME.fullmatch(data):
        opened = _open_data_set(data, columns)
    else:
        raise UserError(
            f"there is no {data}; give a table of images and captions, a folder of images with captions beside them, "
            f"a data set of `datasets` (a folder or ORG/NAME), or shards"
        )
    if not opened.pictures:
        raise UserError(f"{data} has no picture with a caption ({opened.without_caption} without)")
    return opened


def _has_captions_beside(folder: Path) -> bool:
    """Return whether an image in a folder, or below it, has a text or JSON file beside it."""
    images = (path for path in folder.rglob("*") if path.suffix.lower() in IMAGES and not path.name.startswith("."))
    return any(path.with_suffix(".txt").is_file() or path.with_suffix(".json").is_file() for path in images)


def _open_table(table: Path, columns: Columns) -> Pictures:
    form: dict[str, Any] = {"separator": columns.separator, "encoding": columns.encoding}
    there = column_names(table, **form)
    if not there:
        raise UserError(f"{table} has no rows; give a table with a header and a row for each caption")
    where = str(table)
    image = find_column("image", columns.image_column, IMAGE_COLUMNS, there, where)
    caption = find_column("caption", columns.caption_column, CAPTION_COLUMNS, there, where)
    wanted = [image, caption, *([columns.split_column] if columns.split_column else [])]
    check_columns(where, wanted, there)
    root = columns.images_root or (table if table.is_dir() else table.parent)
    splits = group_rows(
        read_rows(table, wanted, **form), image_column=image, caption_column=caption,
        split_column=columns.split_column or None, root=root,
    )  # fmt: skip
    named = (
        (name, captions, split if columns.split_column else "")
        for split, images in splits.items()
        for name, captions in images.items()
    )
    pictures, _, without = _with_captions(named)

    def read(number: int) -> bytes:
        path = root / pictures[number].name
        return path.read_bytes() if path.is_file() else b""

    kind = "folder of images" if table.is_dir() else f"columns {image} and {caption}"
    missing = [number for number, picture in enumerate(pictures) if not (root / picture.name).is_file()]
    return Pictures(kind=kind, pictures=pictures, read=read, missing=missing, without_caption=without)


def find_column(what: str, given: str, usual: Sequence[str], there: Sequence[str], where: str) -> str:
    """Return the column of a table that holds `what`: the `given` one, or the first of the `usual` names.

    Raises:
        UserError: naming the columns that are there.
    """
    if given:
        check_columns(where, [given], there)
        return given
    by_name = {name.lower(): name for name in reversed(there)}
    found = next((by_name[name] for name in usual if name in by_name), None)
    if found is None:
        raise UserError(
            f"{where} has no column called {usual[0]} or the like; name the one with --{what}-column: its columns are "
            f"{shorten_list(there, 20)}"
        )
    return found


def _open_data_set(source: str, columns: Columns) -> Pictures:
    splits = open_splits(source, streaming=False)
    first = next(iter(splits.values()))
    there, where = list(first.column_names), f"the data set {source}"
    images = [name for name, feature in (first.features or {}).items() if type(feature).__name__ == "Image"]
    image = columns.image_column or next(iter(images), "") or find_column("image", "", IMAGE_COLUMNS, there, where)
    caption = find_column("caption", columns.caption_column, CAPTION_COLUMNS, [n for n in there if n != image], where)
    wanted = [image, caption, *([columns.split_column] if columns.split_column else [])]
    check_columns(where, wanted, there)

    def rows() -> Iterator[tuple[str, Sequence[str], str]]:
        for name, data_set in splits.items():
            check_columns(f"split {name} of {where}", wanted, data_set.column_names)
            for number, row in enumerate(data_set.select_columns(wanted[1:])):
                place = f"row {number} of split {name}"
                split = str(row[columns.split_column]) if columns.split_column else name
                yield place, as_captions(row[caption], f"{place}, column {caption!r},"), split

    pictures, numbers, without = _with_captions(rows())
    if len(splits) == 1 and not columns.split_column:
        pictures = [picture._replace(split="") for picture in pictures]
    files = [undecoded(data_set.select_columns([image]), image) for data_set in splits.values()]
    starts, lock = np.cumsum([0, *map(len, files)]), threading.Lock()

    def read(number: int) -> bytes:
        position = numbers[number]
        part = int(np.searchsorted(starts, position, side="right")) - 1
        with lock:
            value = files[part][int(position - starts[part])][image]
        return image_bytes(value, Path(source), f"{pictures[number].name}, column {image!r},")

    kind = f"data set with columns {image} and {caption}"
    return Pictures(kind=kind, pictures=pictures, read=read, without_caption=without)


def _open_shards(data: str) -> Pictures:
    index = ShardIndex.build(expand_shards(data))
    reader, lock = Reader(index), threading.Lock()

    def rows() -> Iterator[tuple[str, Sequence[str], str]]:
        for start in range(0, len(index), TEXTS_AT_ONCE):
            numbers = np.arange(start, min(start + TEXTS_AT_ONCE, len(index)))
            for row, (text, text_format) in zip(numbers, reader.read_texts(numbers), strict=True):
                try:
                    captions = decode_captions(text, text_format, json_key=RULE.caption_key)
                except BadSampleError:
                    captions = []
                yield f"row {row}, {index.key(row)}", captions, ""

    pictures, numbers, without = _with_captions(rows())

    def read(number: int) -> bytes:
        with lock:
            return reader.read(np.array([numbers[number]]))[0].image

    return Pictures(kind="shards", pictures=pictures, read=read, without_caption=without)


def _with_captions(named: Iterable[tuple[str, Sequence[str], str]]) -> tuple[list[Picture], list[int], int]:
    """Return the pictures that have a caption, their numbers among all, and how many have none."""
    pictures, numbers, count = [], [], 0
    for name, captions, split in named:
        if clean := tuple(clean_captions(captions)):
            pictures.append(Picture(name, clean, split))
            numbers.append(count)
        count += 1
    return pictures, numbers, count - len(pictures)
