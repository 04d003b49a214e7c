"""Copy samples into group order, so that the batches of a later stage read runs of neighbours."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer, Shaped

from mcl_clip.core.distributed import is_main, permutation
from mcl_clip.core.errors import UserError
from mcl_clip.core.files import atomic_dir
from mcl_clip.core.progress import Progress
from mcl_clip.data.index import INDEX_NAME, ShardIndex
from mcl_clip.data.reader import Reader
from mcl_clip.data.shards import Shard
from mcl_clip.data.storage import RetryPolicy, stat
from mcl_clip.data.tar import end_of_archive

ROW_MAP_NAME = "row_map.npy"
_BATCH_BYTES = 64 << 20


def reshard(
    index: ShardIndex,
    groups: Integer[np.ndarray, "rows"],
    out: Path,
    *,
    rows_per_shard: int,
    seed: int,
    reader: Reader | None = None,
) -> ShardIndex:
    """The index of new shards in `out` that hold the samples of `index`, group after group, shuffled within each.

    Samples keep every byte of all their members. Beside the shards stand `index.arrow` and `row_map.npy`, which holds
    the old row of each new one. Where keys repeat, shards come out smaller: a key may stand in a shard only once.

    Args:
        index: The samples to copy.
        groups: The group of each row.
        out: A folder that is empty or does not exist; it appears when all is written.
        rows_per_shard: Most samples in a shard.
        seed: Names the shuffle.
        reader: How to read remote shards; made with its defaults if not given.

    Raises:
        UserError: if the folder holds something, the disk is too small, or an argument does not fit.
    """
    out = Path(out).absolute()
    _check(index, groups, out, rows_per_shard)
    source = Reader(index) if reader is None else reader
    if source.index is not index:
        raise UserError("the reader reads another index than the one to reshard; make it from the same index")
    row_map, counts = _order(index, groups, rows_per_shard, seed)
    total = int(index.sample_size.sum())
    with (
        atomic_dir(out) as folder,
        Progress(total=total, desc="resharding", unit="B", unit_scale=True, show=is_main()) as bar,
    ):
        shards, offsets = [], []
        for number, rows in enumerate(np.split(row_map, np.cumsum(counts)[:-1])):
            path = folder / f"{number:06d}.tar"
            offsets.append(_write_shard(source, rows, path, bar))
            size, stamp = stat(str(path), RetryPolicy())
            shards.append(Shard(str(path), size, stamp, first_row=0, rows=len(rows), skipped={}))
        np.save(folder / ROW_MAP_NAME, row_map, allow_pickle=False)
        index.relocated(row_map, shards, np.concatenate(offsets)).save(folder / INDEX_NAME)
    return ShardIndex.load(out / INDEX_NAME)


def carry_labels(labels: Shaped[np.ndarray, "old *columns"], row_map: Integer[np.ndarray, "new"]) -> np.ndarray:
    """Values by old row as values by new row.

    Raises:
        UserError: if there is not one value for each row.
    """
    if len(labels) != len(row_map):
        raise UserError(
            f"{len(labels)} labels do not fit {len(row_map)} rows; use those of the index that was resharded"
        )
    carried: np.ndarray = labels[row_map]
    return carried


def _check(index: ShardIndex, groups: np.ndarray, out: Path, rows_per_shard: int) -> None:
    if not len(index) or groups.shape != (len(index),):
        raise UserError(f"groups has shape {groups.shape} for {len(index)} rows; give one group for each row")
    if rows_per_shard < 1:
        raise UserError(f"rows_per_shard is {rows_per_shard}; it must be at least 1")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not empty; name a new folder, since nothing is overwritten")
    needed = int(index.sample_size.sum())
    existing = next(folder for folder in (out, *out.parents) if folder.exists())
    if (free := shutil.disk_usage(existing).free) < needed:
        raise UserError(
            f"{out} needs {needed / 1e9:.3g} GB and its disk has {free / 1e9:.3g} GB free; choose another disk"
        )


def _order(index: ShardIndex, groups: np.ndarray, rows_per_shard: int, seed: int) -> tuple[np.ndarray, list[int]]:
    """Old rows in new order, and how many of them each shard takes.

    Where keys repeat in a group, all first rows of a key come before all second ones, and so on: the longest runs of
    different keys, hence the fewest short shards.
    """
    shuffled = permutation(len(index), seed, "reshard")
    order = shuffled[np.argsort(groups[shuffled], kind="stable")]
    keys = index.key_numbers()
    repeats = _repeats(groups[order], keys[order])
    order = order[np.lexsort((repeats, groups[order]))]
    return order, _cut(keys[order], rows_per_shard)


def _repeats(groups: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """How often the same key stood before in the same group."""
    order = np.lexsort((keys, groups))  # stable: equal pairs stay in their order
    places = np.arange(len(order))
    is_first = np.ones(len(order), bool)
    is_first[1:] = (np.diff(keys[order]) != 0) | (np.diff(groups[order]) != 0)
    repeats = np.empty_like(places)
    repeats[order] = places - np.maximum.accumulate(np.where(is_first, places, 0))
    return repeats


def _cut(keys: np.ndarray, rows_per_shard: int) -> list[int]:
    """Sizes of runs of at most `rows_per_shard` different keys."""
    counts: list[int] = []
    seen: set[int] = set()
    for key in keys.tolist():
        if len(seen) == rows_per_shard or key in seen:
            counts.append(len(seen))
            seen = set()
        seen.add(key)
    return [*counts, len(seen)]


def _write_shard(reader: Reader, rows: np.ndarray, path: Path, bar: Any) -> np.ndarray:
    """Where each sample starts in the shard at `path` that now holds them."""
    sizes: np.ndarray = reader.index.sample_size[rows]
    ends: np.ndarray = np.cumsum(sizes)
    with path.open("wb") as file:
        for batch in np.split(rows, np.flatnonzero(np.diff(ends // _BATCH_BYTES)) + 1):
            for whole in reader.read_whole(batch):
                file.write(whole)
                bar.update(len(whole))
        file.write(end_of_archive(int(ends[-1])))
    starts: np.ndarray = ends - sizes
    return starts
