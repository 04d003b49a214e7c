"""Write shards from a table of image files and captions: CSV, TSV, JSON lines or Parquet.

    python data_prep/from_table.py captions.csv shards/flickr8k --image-column file --caption-column caption \
        --images-root images --split-column split --retrieval-splits val,test

writes OUT/<split>/000000.tar and so on with an index for the training split, and OUT/<split>/ in the layout of
CLIP_benchmark for each retrieval split. Rows of the same image become one sample with several captions, in the order of
the table; samples are in the order in which their images first appear.
"""

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from PIL import Image, ImageOps

from mcl_clip.core.errors import UserError, run_program
from mcl_clip.data.decode import BadSampleError, decode_image
from mcl_clip.data.writing import Pair, clean_key, new_folder, refuse_non_empty, write_pairs, write_retrieval_set

Row = dict[str, Any]
Splits = dict[str, dict[str, list[str]]]  # split -> image -> captions
READ_AHEAD = 64


def read_rows(table: Path, columns: Sequence[str]) -> Iterator[Row]:
    """Yield the rows of a table, in order, with at least `columns`.

    A TSV has no quotes: a quotation mark in it is part of the text.

    Raises:
        UserError: for an unknown kind of file, a column that is not there, or a row that does not fit the header.
    """
    readers = {".csv": _csv_rows, ".tsv": _csv_rows, ".jsonl": _json_rows, ".parquet": _parquet_rows}
    if table.suffix.lower() not in readers:
        raise UserError(f"{table} does not end in one of {', '.join(readers)}; convert it to one of them")
    yield from readers[table.suffix.lower()](table, columns)


def group_rows(rows: Iterable[Row], *, image_column: str, caption_column: str, split_column: str | None) -> Splits:
    """Group captions by split and image, in the order of their first rows. Without a split column the split is `all`.

    A caption may be a string or a list of strings.
    """
    splits: Splits = {}
    for number, row in enumerate(rows, start=1):
        image, captions = row[image_column], row[caption_column]
        if not isinstance(image, str) or not image:
            raise UserError(f"row {number} has {image!r} in column {image_column!r}; it must be the path of an image")
        group = splits.setdefault(str(row[split_column]) if split_column else "all", {}).setdefault(image, [])
        group.extend(as_captions(captions, number, caption_column))
    return splits


def as_captions(value: Any, number: int, column: str) -> list[str]:
    """Return the captions of a row: a string or a list of strings, either of which may be null."""
    captions = value if isinstance(value, list) else [value]
    for caption in captions:
        if not isinstance(caption, str | None):
            raise UserError(
                f"row {number} has {caption!r} in column {column!r}; a caption must be text or a list of texts"
            )
    return [caption or "" for caption in captions]


def shrink(data: bytes, max_side_px: int) -> bytes:
    """Limit the longer side of an image file to `max_side_px`: return the same bytes, or an upright JPEG of quality 95.

    What cannot be decoded comes back as it is.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as header:
            size, orientation = header.size, header.getexif().get(0x0112, 1)
        if max(size) <= max_side_px:
            return data
        picture = decode_image(data)
    except (BadSampleError, OSError, SyntaxError, ValueError):
        return data
    picture.getexif()[0x0112] = orientation
    picture = ImageOps.exif_transpose(picture)
    scale = max_side_px / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    file = io.BytesIO()
    picture.resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=95, subsampling=0)
    return file.getvalue()


def make_from_table(
    table: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="TABLE")],
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    *,
    image_column: str,
    caption_column: str,
    images_root: Path | None = None,
    split_column: str | None = None,
    split: str = "train",
    retrieval_splits: str = "",
    max_side_px: int | None = None,
    max_bad_fraction: float = 0.01,
    samples_per_shard: int = 1000,
    threads: int = 8,
) -> None:
    """Write training shards, and retrieval sets, from a table of image files and captions.

    Args:
        table: A .csv, .tsv, .jsonl or .parquet file. A TSV is read without quotes.
        out: Folder to make; must be empty or not exist.
        image_column: Column with paths of JPEG, PNG or WebP files.
        caption_column: Column with a caption, or (JSON lines, Parquet) a list of captions.
        images_root: Folder that the paths start from; the folder of the table if not given.
        split_column: Column that says which split a row belongs to; without it all rows are for training.
        split: Split to write as training shards; '' for none.
        retrieval_splits: Splits to write as retrieval sets, separated by commas.
        max_side_px: Shrink larger images until their longer side has this many pixels (bicubic, upright, JPEG quality
            95); otherwise image files are stored byte for byte.
        max_bad_fraction: Part of the images, from 0 to 1, that may be missing or unreadable.
        samples_per_shard: Number of samples in a tar file.
        threads: Files read at the same time.

    Raises:
        UserError: for unknown columns or splits, too many bad images, or a folder that is not empty.
    """
    refuse_non_empty(out)
    if max_side_px is not None and max_side_px < 1:
        raise UserError(f"--max-side-px is {max_side_px}; it must be at least 1")
    columns = [image_column, caption_column, *([split_column] if split_column else [])]
    rows = read_rows(table, columns)
    splits = group_rows(rows, image_column=image_column, caption_column=caption_column, split_column=split_column)
    wanted = split_names(split, retrieval_splits)
    if split_column is None:
        if wanted != [split]:
            raise UserError(
                f"--retrieval-splits {retrieval_splits} needs --split-column; without it there is one split"
            )
        splits = {split: splits["all"]} if splits else {}
    for name in wanted:
        if name not in splits:
            raise UserError(f"there is no split {name!r} in the table; its splits are {', '.join(splits) or 'none'}")
    owners = Counter(image for name in wanted for image in splits[name])
    if shared := [image for image, count in owners.items() if count > 1]:
        print(f"warning: {len(shared)} images are in more than one of the splits {', '.join(wanted)}, e.g. {shared[0]}")
    root = images_root if images_root is not None else table.parent
    write_splits(
        {name: (_read_pairs(splits[name], root, max_side_px, threads), len(splits[name])) for name in wanted},
        out,
        train=split,
        samples_per_shard=samples_per_shard,
        max_bad_fraction=max_bad_fraction,
    )


def split_names(split: str, retrieval_splits: str) -> list[str]:
    """Return the names of the training split and the retrieval splits.

    Raises:
        UserError: if there is none, or a split is both.
    """
    retrieval = [name.strip() for name in retrieval_splits.split(",") if name.strip()]
    if split and split in retrieval:
        raise UserError(
            f"the split {split!r} is both --split and in --retrieval-splits; train and test on different rows"
        )
    if not split and not retrieval:
        raise UserError("--split is empty and there are no --retrieval-splits; name at least one split")
    return list(dict.fromkeys(filter(None, [split, *retrieval])))


def write_splits(
    splits: Mapping[str, tuple[Iterator[Pair], int | None]], out: Path, *, train: str, **options: Any
) -> None:
    """Write the split `train` as training shards and the others as retrieval sets; print their sizes.

    Each split is its samples and their number, if known; `options` are those of `write_pairs`.
    """
    reports = []
    with new_folder(out) as folder:
        for name, (pairs, total) in splits.items():
            path = folder / clean_key(name)
            if name == train:
                index = write_pairs(pairs, path, total=total, **options)
                reports.append(f"{path.name}/ {len(index)} pairs in {len(index.shards)} shards")
            else:
                size = write_retrieval_set(pairs, path, total=total, **options)
                reports.append(f"{path.name}/ {size.images} images with {size.captions} captions (retrieval)")
    print(f"{out}: {', '.join(reports)}")


def _csv_rows(table: Path, columns: Sequence[str]) -> Iterator[Row]:
    dialect: dict[str, Any] = {"strict": True}
    if table.suffix.lower() == ".tsv":
        dialect = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file, **dialect)
            header = next(lines, [])
            _check_columns(table, columns, header)
            for fields in lines:
                if not fields:
                    continue
                if len(fields) != len(header):
                    raise UserError(
                        f"{table}, line {lines.line_num}: {len(fields)} fields, the header has {len(header)}; put "
                        f"fields that hold the separator in quotes (CSV), or use JSON lines"
                    )
                yield dict(zip(header, fields, strict=True))
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{table} is not a UTF-8 table with a header ({error}); save it as one") from error


def _json_rows(table: Path, columns: Sequence[str]) -> Iterator[Row]:
    with table.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{table}, line {number} is not JSON ({error}); correct or delete it") from error
            if not isinstance(row, dict):
                raise UserError(f"{table}, line {number} is not a JSON object; write one object per line")
            _check_columns(table, columns, list(row), f", line {number},")
            yield row


def _parquet_rows(table: Path, columns: Sequence[str]) -> Iterator[Row]:
    try:
        file = pq.ParquetFile(table)
        _check_columns(table, columns, file.schema_arrow.names)
        for batch in file.iter_batches(columns=list(dict.fromkeys(columns))):
            yield from batch.to_pylist()
    except pa.ArrowInvalid as error:
        raise UserError(f"{table} is not a whole Parquet file ({error}); make it anew") from error


def _check_columns(table: Path, columns: Sequence[str], there: Sequence[str], place: str = "") -> None:
    for column in columns:
        if column not in there:
            raise UserError(f"{table}{place} has no column {column!r}; its columns are {', '.join(there)}")


def _read_pairs(captions_of: dict[str, list[str]], root: Path, max_side_px: int | None, threads: int) -> Iterator[Pair]:
    """Yield samples in the order of `captions_of`, with files read ahead by threads."""

    def read(item: tuple[str, list[str]]) -> tuple[str, bytes, list[str]]:
        path = root / item[0]
        data = path.read_bytes() if path.is_file() else b""
        return item[0], data if max_side_px is None else shrink(data, max_side_px), item[1]

    items, used = iter(captions_of.items()), set[str]()
    with ThreadPoolExecutor(threads) as pool:
        while chunk := list(islice(items, READ_AHEAD)):
            for name, data, captions in pool.map(read, chunk):
                key = clean_key(os.path.splitext(name)[0])
                key = key if key not in used else clean_key(name)
                used.add(key)
                yield Pair(key=key, image=data, captions=captions)


if __name__ == "__main__":
    run_program(lambda: tyro.cli(make_from_table))
