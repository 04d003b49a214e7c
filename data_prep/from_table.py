"""Write shards from a table of image files and captions: CSV, JSON, Parquet, or the captions of COCO or Flickr.

    python data_prep/from_table.py captions.csv shards/flickr8k --image-column file --caption-column caption \
        --images-root images --split-column split --retrieval-splits val,test

writes OUT/<split>/000000.tar and so on with an index for the training split, and OUT/<split>/ in the layout of
CLIP_benchmark for each retrieval split. Rows of the same image become one sample with several captions, in the order of
the table; samples are in the order in which their images first appear.
"""

import io
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import tyro
from PIL import Image

from mcl_clip.core.errors import UserError, run_program, shorten_list
from mcl_clip.data.decode import BadSampleError, decode_image, open_image
from mcl_clip.data.tables import Splits, group_rows, read_rows
from mcl_clip.data.writing import Pair, clean_key, new_folder, refuse_non_empty, write_pairs, write_retrieval_set

READ_AHEAD = 64


def shrink(data: bytes, max_side_px: int) -> bytes:
    """Limit the longer side of an image file to `max_side_px`: return the same bytes, or an upright JPEG of quality 95.

    What cannot be decoded comes back as it is.
    """
    try:
        if max(open_image(data).size) <= max_side_px:
            return data
        picture = decode_image(data)
    except BadSampleError:
        return data
    scale = max_side_px / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    file = io.BytesIO()
    picture.resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=95, subsampling=0)
    return file.getvalue()


def make_from_table(
    table: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="TABLE")],
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    *,
    image_column: str = "image",
    caption_column: str = "caption",
    images_root: Path | None = None,
    negatives_column: str | None = None,
    split_column: str | None = None,
    split: str = "train",
    retrieval_splits: str = "",
    separator: str = "",
    encoding: str = "",
    max_side_px: int | None = None,
    max_bad_fraction: float = 0.01,
    samples_per_shard: int = 1000,
    threads: int = 8,
) -> None:
    """Write training shards, and retrieval sets, from a table of image files and captions.

    Args:
        table: A .csv, .tsv, .txt, .jsonl, .json or .parquet file, the captions of COCO (captions_*.json, Karpathy's
            splits), Flickr8k.token.txt, Flickr30k's results.csv, or a folder of images with .txt or .json beside them.
            A TSV is read without quotes.
        out: Folder to make; must be empty or not exist.
        image_column: Column with paths of JPEG, PNG or WebP files.
        caption_column: Column with a caption or a list of captions; in CSV, a list is written as in JSON.
        images_root: Folder that the paths start from; the folder of the table, or TABLE itself, if not given.
        negatives_column: Column with a wrong caption of the image, or a list of them (hard negatives); training reads
            them with `--data.negatives-key negatives`.
        split_column: Column that says which split a row belongs to; without it all rows are for training.
        split: Split to write as training shards; '' for none.
        retrieval_splits: Splits to write as retrieval sets, separated by commas.
        separator: Character between the fields of a CSV, or tab; by default the one that gives the header the columns.
        encoding: Encoding of a CSV, such as cp1252; by default UTF-8, or what a byte order mark says.
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
    root = images_root or (table if table.is_dir() else table.parent)

    def grouped(column: str) -> Splits:
        rows = read_rows(table, list(dict.fromkeys([*columns, column])), separator=separator, encoding=encoding)
        return group_rows(rows, image_column=image_column, caption_column=column, split_column=split_column, root=root)

    splits = grouped(caption_column)
    negatives = grouped(negatives_column).get(split if split_column else "all", {}) if negatives_column else {}
    wanted = split_names(split, retrieval_splits)
    if split_column is None:
        if wanted != [split]:
            raise UserError(
                f"--retrieval-splits {retrieval_splits} needs --split-column; without it there is one split"
            )
        splits = {split: splits["all"]} if splits else {}
    for name in wanted:
        if name not in splits:
            raise UserError(f"there is no split {name!r} in the table; its splits are {shorten_list(splits)}")
    owners = Counter(image for name in wanted for image in splits[name])
    if shared := [image for image, count in owners.items() if count > 1]:
        print(f"warning: {len(shared)} images are in more than one of the splits {', '.join(wanted)}, e.g. {shared[0]}")
    write_splits(
        {
            name: (_read_pairs(splits[name], negatives, root, max_side_px, threads), len(splits[name]))
            for name in wanted
        },
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


def _read_pairs(
    captions_of: dict[str, list[str]],
    negatives_of: Mapping[str, Sequence[str]],
    root: Path,
    max_side_px: int | None,
    threads: int,
) -> Iterator[Pair]:
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
                yield Pair(key=key, image=data, captions=captions, negatives=negatives_of.get(name, ()), source=name)


if __name__ == "__main__":
    run_program(lambda: tyro.cli(make_from_table))
