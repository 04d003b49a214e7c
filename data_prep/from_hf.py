"""Write shards from a data set of the `datasets` library: on the Hub, in a local folder, or saved with `save_to_disk`.

    python data_prep/from_hf.py ORG/NAME shards/name --caption-column caption --retrieval-splits test

The data set is streamed. The training split becomes OUT/<split>/000000.tar and so on with an index, and each retrieval
split OUT/<split>/ in the layout of CLIP_benchmark. Where everything is in one split and a column says which split a row
belongs to, as in Flickr30k on the Hub, name that column:

    python data_prep/from_hf.py nlphuji/flickr30k shards/flickr30k --caption-column caption --split-column split \
        --retrieval-splits val,test

Image files are stored byte for byte. A column of URLs is not downloaded: use img2dataset, then from_img2dataset.py.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import datasets
import tyro
from from_table import split_names, write_splits

from mcl_clip.core.errors import UserError, run_program, shorten_list
from mcl_clip.data.hf_datasets import Builder, open_splits, read_pairs
from mcl_clip.data.writing import Pair, refuse_non_empty


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
