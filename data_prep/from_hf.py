"""Write shards from a data set of the `datasets` library: on the Hub, in a local folder, or saved with `save_to_disk`.

    python data_prep/from_hf.py ORG/NAME shards/name --caption-column caption --retrieval-splits test

The data set is streamed. The training split becomes OUT/<split>/000000.tar and so on with an index, and each retrieval
split OUT/<split>/ in the layout of CLIP_benchmark. Where everything is in one split and a column says which split a row
belongs to, as in Flickr30k on the Hub, name that column:

    python data_prep/from_hf.py nlphuji/flickr30k shards/flickr30k --caption-column caption --split-column split \
        --retrieval-splits val,test

Image files are stored byte for byte. A column of URLs is not downloaded: use img2dataset, then from_img2dataset.py.
"""

import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import datasets
import fsspec
import tyro
from from_table import split_names, write_splits
from table_formats import as_captions, check_columns, refuse_url

from mcl_clip.core.errors import UserError, run_program, shorten, shorten_list
from mcl_clip.data.writing import Pair, refuse_non_empty

Builder = Literal["auto", "disk", "imagefolder", "parquet", "json"]


def open_splits(source: str, builder: Builder, config: str | None, revision: str | None) -> dict[str, Any]:
    """Open the splits of a data set by name, streamed unless it is saved on disk; one without splits is `train`.

    Raises:
        UserError: if there is no such data set, or `datasets` cannot read it.
    """
    folder = Path(source)
    if builder == "auto" and any((folder / name).exists() for name in ("dataset_dict.json", "state.json")):
        builder = "disk"  # what save_to_disk leaves
    if builder != "auto" and not folder.is_dir():
        raise UserError(f"--builder {builder} needs a local folder; {source} is none")
    try:
        if builder == "disk":
            found = datasets.load_from_disk(source)
        elif builder == "auto":
            found = datasets.load_dataset(source, name=config, revision=revision, streaming=True)
        else:
            found = datasets.load_dataset(builder, data_dir=source, streaming=True)
    except Exception as error:  # of any library that reads files for `datasets`
        if re.search("[Dd]ataset scripts|trust_remote_code", str(error)):
            raise UserError(
                f"{source} is read by a program of its own, which `datasets` no longer runs; add --revision "
                f"refs/convert/parquet for the copy that the Hub makes, or give the folder of its files"
            ) from error
        raise UserError(f"{source} cannot be opened: {_reason(error)}") from error
    return dict(found) if isinstance(found, dict) else {"train": found}


def read_pairs(
    splits: dict[str, Any], *, image_column: str, caption_column: str, root: Path, wanted: tuple[str, str] | None = None
) -> Iterator[Pair]:
    """Yield the rows of splits, keyed by their number, with the image files as they are stored.

    `wanted` is a column and its value, for some of the rows only.

    Raises:
        UserError: for a column that is not there or holds something else, or if no row has the value.
    """
    number, values = 0, dict[str, None]()
    columns = [image_column, caption_column, *(wanted[:1] if wanted else ())]
    for name, dataset in splits.items():
        for row in _rows(dataset, columns, name):
            where = f"row {number} of split {name}"
            if wanted:
                values.setdefault(str(row[wanted[0]]))
            if not wanted or str(row[wanted[0]]) == wanted[1]:
                image = image_bytes(row[image_column], root, f"{where}, column {image_column!r},")
                captions = as_captions(row[caption_column], f"{where}, column {caption_column!r},")
                path = row[image_column].get("path") if isinstance(row[image_column], dict) else row[image_column]
                source = f"{where}, {path}" if isinstance(path, str) else where
                yield Pair(key=f"{number:08d}", image=image, captions=captions, source=source)
            number += 1
    if wanted and wanted[1] not in values:
        raise UserError(f"no row has {wanted[1]!r} in column {wanted[0]!r}; it has {shorten_list(values)}")


def _rows(dataset: Any, columns: list[str], name: str) -> Iterator[dict[str, Any]]:
    """Yield rows without decoding their images; what goes wrong within `datasets` on the way is a UserError."""

    def undecoded(feature: Any) -> Any:
        if isinstance(feature, datasets.Image):
            return datasets.Image(decode=False)
        return type(feature)(undecoded(feature.feature)) if hasattr(feature, "feature") else feature

    number = 0
    try:
        check_columns(f"split {name}", columns, dataset.column_names or list(next(iter(dataset.take(1)), {})))
        dataset = dataset.select_columns(list(dict.fromkeys(columns)))
        feature = (dataset.features or {}).get(columns[0])
        if feature is not None and (plain := undecoded(feature)) != feature:
            dataset = dataset.cast_column(columns[0], plain)
        for row in dataset:
            yield row
            number += 1
    except UserError:
        raise
    except Exception as error:  # as in `open_splits`; files are read while iterating
        raise UserError(
            f"split {name} cannot be read beyond row {number}: {_reason(error)}; download the data set again, or take "
            f"the rows before it with --max-samples {max(number, 1)}"
        ) from error


def _reason(error: Exception) -> str:
    cause = error.__cause__ or error  # `datasets` wraps the cause in "An error occurred"
    return f"{type(cause).__name__}: {shorten(cause, 300)}"


def image_bytes(value: Any, root: Path, where: str) -> bytes:
    """Read the file of an image: bytes, a path, or a struct of both as `datasets` stores it; empty if there is none.

    Relative paths start from `root`. A list of one image is that image.
    """
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, dict) and {"bytes", "path"} & value.keys():
        value = value.get("bytes") or value.get("path")
    if value is None or isinstance(value, bytes):
        return value or b""
    if not isinstance(value, str):
        has = f"a list of {len(value)} values" if isinstance(value, list) else shorten(repr(value), 60)
        raise UserError(f"{where} has {has}; it must be an image, the bytes of an image file, or a path")
    refuse_url(value, where)
    if value.startswith(("hf://", "zip://")):  # as the image folder builder writes them
        with fsspec.open(value, "rb") as file:
            return bytes(file.read())
    return (root / value).read_bytes() if (root / value).is_file() else b""


def make_from_hf(
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")],
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    *,
    image_column: str = "image",
    caption_column: str = "text",
    builder: Builder = "auto",
    config: str | None = None,
    revision: str | None = None,
    split_column: str | None = None,
    split: str = "train",
    retrieval_splits: str = "",
    max_samples: int | None = None,
    max_bad_fraction: float = 0.01,
    samples_per_shard: int = 1000,
) -> None:
    """Write training shards, and retrieval sets, from a data set of the `datasets` library.

    Args:
        source: Name on the Hub, or a local folder.
        out: Folder to make; must be empty or not exist.
        image_column: Column with images, image files as bytes, or paths of local files; a list of one is that one.
        caption_column: Column with a caption or a list of captions, as text or structs with `raw`.
        builder: How to read a local folder: disk is what save_to_disk wrote; auto looks for that, then lets `datasets`
            decide.
        config: Configuration of the data set, where it has several.
        revision: Branch or commit on the Hub, such as refs/convert/parquet.
        split_column: Column that says which split a row belongs to; the rows of all splits are sorted by it.
        split: Split to write as training shards; '' for none.
        retrieval_splits: Splits to write as retrieval sets, separated by commas.
        max_samples: Number of rows to take from the start of each split; all if not given.
        max_bad_fraction: Part of the images, from 0 to 1, that may be missing or unreadable.
        samples_per_shard: Number of samples in a tar file.

    Raises:
        UserError: for unknown data sets, splits or columns, too many bad images, or a folder that is not empty.
    """
    refuse_non_empty(out)
    wanted = split_names(split, retrieval_splits)
    if max_samples is not None and max_samples < 1:
        raise UserError(f"--max-samples is {max_samples}; it must be at least 1")
    opened = open_splits(source, builder, config, revision)
    options: dict[str, Any] = {"image_column": image_column, "caption_column": caption_column, "root": Path(source)}
    chosen: dict[str, tuple[Iterator[Pair], int]] = {}
    for name in wanted:
        if split_column:
            chosen[name] = read_pairs(opened, **options, wanted=(split_column, name)), 0
        elif name in opened:
            pairs = read_pairs({name: opened[name]}, **options)
            chosen[name] = pairs, _row_count(opened[name], name)
        else:
            raise UserError(
                f"{source} has no split {name!r}; its splits are {shorten_list(opened)}; name one with --split or "
                f"--retrieval-splits, or the column that has the splits with --split-column"
            )
    write_splits(
        {
            name: (islice(pairs, max_samples), min(total, max_samples or total) if total else None)
            for name, (pairs, total) in chosen.items()
        },
        out,
        train=split,
        samples_per_shard=samples_per_shard,
        max_bad_fraction=max_bad_fraction,
    )


def _row_count(dataset: Any, split: str) -> int:
    """Return the number of rows; 0 if the data set does not state it."""
    stated = (dataset.info.splits or {}).get(split)
    rows = stated.num_examples if stated is not None else 0
    return len(dataset) if isinstance(dataset, datasets.Dataset) else rows


if __name__ == "__main__":
    run_program(lambda: tyro.cli(make_from_hf))
