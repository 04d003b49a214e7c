"""Make swaps of a table of captions: one word replaced by another of its kind, so that the caption no longer holds.

    python data_prep/swaps.py pairs captions.csv sets/swaps --images-root images --split-column split --split test
    python data_prep/swaps.py negatives captions.csv wrong.csv --split-column split --split train
    python data_prep/from_table.py wrong.csv shards/swaps --images-root images --split-column split \
        --negatives-column negatives

`pairs` writes a set for `--eval.sets` and `mcl-clip eval`: does a picture prefer its caption to the swap? `negatives`
copies the table, with a column of wrong captions for training. mcl_clip/eval/swaps.py describes how a swap is made,
and the file of words.
"""

import csv
import json
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tyro

from mcl_clip.core.errors import UserError, run_program, shorten_list
from mcl_clip.core.files import atomic_path
from mcl_clip.data.tables import as_captions, group_rows, read_rows
from mcl_clip.data.writing import clean_captions, new_folder, refuse_non_empty
from mcl_clip.eval.pairs import PairSet
from mcl_clip.eval.swaps import SwapWords, make_swaps, write_swaps

NEGATIVES = "negatives"
Table = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="TABLE")]
Out = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]


def make_pairs(
    table: Table,
    out: Out,
    *,
    image_column: str = "image",
    caption_column: str = "caption",
    images_root: Path | None = None,
    split_column: str | None = None,
    split: str = "test",
    words: Path | None = None,
    most_per_kind: int = 1000,
    seed: int = 0,
) -> None:
    """Write an evaluation set of captions and their swaps, with a group for each kind of word.

    Args:
        table: A table as from_table.py reads it.
        out: Folder to make; must be empty or not exist. It refers to the images, which stay where they are.
        image_column: Column with paths of images.
        caption_column: Column with a caption or a list of captions.
        images_root: Folder that the paths start from; by default the folder of the table.
        split_column: Column that says which split a row belongs to; without it all rows are used.
        split: Split to use.
        words: File of words and kinds (JSON); by default that of the package.
        most_per_kind: Swaps of each kind at most, drawn from all; 0 for all of them.
        seed: Another seed gives other swaps.

    Raises:
        UserError: for unknown columns or splits, missing images, or words of which no caption has any.
    """
    refuse_non_empty(out)
    root = images_root or (table if table.is_dir() else table.parent)
    columns = [image_column, caption_column, *([split_column] if split_column else [])]
    splits = group_rows(
        read_rows(table, columns), image_column=image_column, caption_column=caption_column, split_column=split_column,
        root=root,
    )  # fmt: skip
    name = split if split_column else "all"
    if name not in splits:
        raise UserError(f"there is no split {name!r} in the table; its splits are {shorten_list(splits)}")
    paths = list(splits[name])
    captions = [clean_captions(texts) for texts in splits[name].values()]
    swaps = make_swaps(captions, SwapWords.read(words), keys=paths, seed=seed, most_per_kind=most_per_kind)
    with new_folder(out) as folder:
        write_swaps(folder, swaps, paths, images=str(root.resolve()), name=out.resolve().name)
        PairSet.open(folder)
    pictures = len({swap.picture for swap in swaps})
    print(f"{out}: {len(swaps):,} swaps of {pictures:,} pictures ({_by_kind(Counter(swap.kind for swap in swaps))})")


def make_negatives(
    table: Table,
    out: Out,
    *,
    image_column: str = "image",
    caption_column: str = "caption",
    split_column: str | None = None,
    split: str = "train",
    words: Path | None = None,
    seed: int = 0,
) -> None:
    """Copy a table as CSV, with the swaps of each row's captions as a list in the column `negatives`.

    Each caption has at most one swap of each kind of word; rows without any, and those of other splits, have an empty
    cell.

    Args:
        table: A table as from_table.py reads it.
        out: CSV to write; no file is overwritten.
        image_column: Column with paths of images.
        caption_column: Column with a caption or a list of captions.
        split_column: Column that says which split a row belongs to; without it all rows are used.
        split: Split to use; its rows alone say which words are there.
        words: File of words and kinds (JSON); by default that of the package.
        seed: Another seed gives other swaps.

    Raises:
        UserError: for unknown columns or splits, words of which no caption has any, or an output file that exists.
    """
    if out.exists():
        raise UserError(f"{out} exists already; give another name, or delete it first")
    columns = [image_column, caption_column, *([split_column] if split_column else [])]
    rows = list(read_rows(table, columns))
    pictures: defaultdict[str, list[str]] = defaultdict(list)
    for number, row in enumerate(rows, start=1):
        if split_column is None or str(row[split_column]) == split:
            pictures[str(row[image_column])] += _captions(row, number, caption_column)
    if not pictures:
        raise UserError(f"{table} has no row of the split {split!r}; name one of its splits with --split")
    names = list(pictures)
    swaps = make_swaps(list(pictures.values()), SwapWords.read(words), keys=names, seed=seed, is_balanced=False)
    wrong: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for swap in swaps:
        wrong[names[swap.picture], swap.caption].append(swap.wrong)
    with atomic_path(out) as path, path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*(name for name in rows[0] if name != NEGATIVES), NEGATIVES])
        writer.writeheader()
        for number, row in enumerate(rows, start=1):
            is_used = split_column is None or str(row[split_column]) == split
            captions = _captions(row, number, caption_column) if is_used else []
            found = [text for caption in captions for text in wrong[str(row[image_column]), caption]]
            cells = {name: _cell(value) for name, value in row.items() if name in writer.fieldnames}
            writer.writerow({**cells, NEGATIVES: json.dumps(found, ensure_ascii=False) if found else ""})
    print(
        f"{out}: {len(swaps):,} wrong captions for {len(names):,} pictures ({_by_kind(Counter(s.kind for s in swaps))})"
    )


def _captions(row: dict[str, Any], number: int, column: str) -> list[str]:
    return clean_captions(as_captions(row[column], f"row {number}, column {column!r},"))


def _cell(value: Any) -> str:
    """Return a cell as text: a list, as of JSON or Parquet, as JSON."""
    return value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)


def _by_kind(counts: Counter[str]) -> str:
    return ", ".join(f"{kind} {count:,}" for kind, count in counts.items())


if __name__ == "__main__":
    commands: dict[str, Callable[..., None]] = {"pairs": make_pairs, "negatives": make_negatives}
    run_program(lambda: tyro.extras.subcommand_cli_from_dict(commands, description=__doc__))
