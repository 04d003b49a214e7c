"""Write shards from a data set of the `datasets` library: on the Hub, in a local folder, or saved with `save_to_disk`.

    python data_prep/from_hf.py nlphuji/flickr30k shards/flickr30k --image-column image --caption-column caption

The data set is streamed. The training split becomes OUT/<split>/000000.tar and so on with an index, and each retrieval
split OUT/<split>/ in the layout of CLIP_benchmark. Image files are stored byte for byte. A column of URLs is not
downloaded: use img2dataset, then from_img2dataset.py.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import datasets
import fsspec
import tyro
from from_table import split_names, write_splits
from table_formats import as_captions

from mcl_clip.core.errors import UserError, run_program
from mcl_clip.data.writing import Pair, refuse_non_empty

Builder = Literal["auto", "disk", "imagefolder", "parquet", "json"]


def open_split(source: str, builder: Builder, config: str | None, split: str) -> Any:
    """Open a split of a data set, streamed unless it is saved on disk.

    Raises:
        UserError: if there is no such data set or split.
    """
    folder = Path(source)
    if builder == "auto" and any(
        (folder / name).exists() for name in ("dataset_dict.json", "state.json")
    ):  # of save_to_disk
        builder = "disk"
    if builder != "auto" and not folder.is_dir():
        raise UserError(f"--builder {builder} needs a local folder; {source} is none")
    try:
        if builder == "disk":
            saved = datasets.load_from_disk(source)
            if not isinstance(saved, datasets.DatasetDict):
                return saved
            if split not in saved:
                raise UserError(f"{source} has no split {split!r}; its splits are {', '.join(saved)}")
            return saved[split]
        if builder == "auto":
            return datasets.load_dataset(source, name=config, split=split, streaming=True)
        return datasets.load_dataset(builder, data_dir=source, split=split, streaming=True)
    except UserError:
        raise
    except (ValueError, OSError) as error:  # no such data set, configuration or split; no network
        raise UserError(f"split {split!r} of {source} cannot be opened: {error}") from error


def read_pairs(dataset: Any, *, image_column: str, caption_column: str, root: Path) -> Iterator[Pair]:
    """Yield the rows of a split, keyed by their number, with the image files as they are stored.

    Raises:
        UserError: for a column that is not there or holds something else.
    """
    columns = dataset.column_names or list(next(iter(dataset.take(1)), {}))
    for column in (image_column, caption_column):
        if column not in columns:
            raise UserError(f"the data set has no column {column!r}; its columns are {', '.join(columns)}")
    dataset = dataset.select_columns([image_column, caption_column])
    dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
    for number, row in enumerate(dataset):
        captions = as_captions(row[caption_column], f"row {number}, column {caption_column!r},")
        yield Pair(
            key=f"{number:08d}", image=image_bytes(row[image_column], root), captions=captions, source=f"row {number}"
        )


def image_bytes(value: dict[str, Any] | None, root: Path) -> bytes:
    """Read the file of an undecoded image, or None if there is none. Relative paths start from `root`."""
    if value is None:
        return b""
    if value["bytes"]:
        return bytes(value["bytes"])
    path = value["path"] or ""
    if path.startswith(("hf://", "zip://")):  # as the image folder builder writes them
        with fsspec.open(path, "rb") as file:
            return bytes(file.read())
    return (root / path).read_bytes() if (root / path).is_file() else b""


def make_from_hf(
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")],
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    *,
    image_column: str = "image",
    caption_column: str = "text",
    builder: Builder = "auto",
    config: str | None = None,
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
        image_column: Column with images, image files as bytes, or paths of local files.
        caption_column: Column with a caption or a list of captions.
        builder: How to read a local folder: disk is what save_to_disk wrote; auto looks for that, then lets `datasets`
            decide.
        config: Configuration of the data set, where it has several.
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
    opened = {name: open_split(source, builder, config, name) for name in wanted}
    pairs = {
        name: read_pairs(
            dataset, image_column=image_column, caption_column=caption_column, root=Path(source).absolute()
        )
        for name, dataset in opened.items()
    }
    write_splits(
        {
            name: (islice(pairs[name], max_samples), _row_count(dataset, name, max_samples))
            for name, dataset in opened.items()
        },
        out,
        train=split,
        samples_per_shard=samples_per_shard,
        max_bad_fraction=max_bad_fraction,
    )


def _row_count(dataset: Any, split: str, max_samples: int | None) -> int | None:
    """Return the number of rows, if the data set states it."""
    stated = (dataset.info.splits or {}).get(split)
    rows = stated.num_examples if stated is not None else 0
    rows = len(dataset) if isinstance(dataset, datasets.Dataset) else rows
    return min(rows, max_samples or rows) or None


if __name__ == "__main__":
    run_program(lambda: tyro.cli(make_from_hf))
