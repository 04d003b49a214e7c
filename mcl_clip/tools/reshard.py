"""Copy samples into group order, so that the batches of a later stage read runs of neighboring rows."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer

from mcl_clip.core.distributed import is_main, permutation
from mcl_clip.core.errors import UserError
from mcl_clip.core.files import atomic_dir
from mcl_clip.core.progress import Progress
from mcl_clip.data.index import INDEX_NAME, ShardIndex
from mcl_clip.data.reader import Reader
from mcl_clip.data.shards import Shard
from mcl_clip.data.storage import RetryPolicy, stat
from mcl_clip.data.tar import end_of_archive
from mcl_clip.runs.train_phase import ROW_MAP

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
    """Write shards to `out` with the samples of `index` group after group, shuffled within each; return their index.

    All members of a sample are copied byte by byte. The folder, which appears when everything is written, also gets
    `index.arrow`, and `row_map.npy` with the old row of each new row. A shard has at most `rows_per_shard` samples, and
    fewer where keys repeat, because a key may occur only once in a shard.

    Raises:
        UserError: if the folder is not empty, the disk is too small, or an argument is invalid.
    """
    out, total = out.absolute(), int(index.sample_size.sum())
    reader = Reader(index) if reader is None else reader
    if not len(index) or groups.shape != (len(index),):
        raise UserError(f"groups has shape {groups.shape} for {len(index)} rows; give one group for each row")
    if rows_per_shard < 1:
        raise UserError(f"--rows-per-shard must be at least 1, not {rows_per_shard}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not empty; name a new folder, since nothing is overwritten")
    existing = next(folder for folder in (out, *out.parents) if folder.exists())
    if (free := shutil.disk_usage(existing).free) < total:
        raise UserError(
            f"{out} needs {total / 1e9:.3g} GB and its disk has {free / 1e9:.3g} GB free; choose another disk"
        )
    if reader.index is not index:
        raise UserError("the reader reads another index than the one to reshard; create it from the same index")

    row_map = _group_order(index, groups, seed)
    keys, seen, ends = index.key_numbers()[row_map].tolist(), set[int](), list[int]()
    for row, key in enumerate(keys):
        if len(seen) == rows_per_shard or key in seen:  # a shard is full, or has a sample of this key already
            ends.append(row)
            seen = set()
        seen.add(key)
    bar = Progress(total=total, desc="resharding", unit="B", unit_scale=True, show=is_main())
    with atomic_dir(out) as folder, bar:
        shards, offsets = [], []
        for number, rows in enumerate(np.split(row_map, ends)):
            path = folder / f"{number:06d}.tar"
            offsets.append(_write_shard(reader, rows, path, bar))
            size, stamp = stat(str(path), RetryPolicy())
            shards.append(Shard(str(path), size, stamp, first_row=0, rows=len(rows), skipped={}))
        np.save(folder / ROW_MAP, row_map, allow_pickle=False)
        index.relocated(row_map, shards, np.concatenate(offsets)).save(folder / INDEX_NAME)
    return ShardIndex.load(out / INDEX_NAME)


def _group_order(index: ShardIndex, groups: np.ndarray, seed: int) -> np.ndarray:
    """Return the rows in their new order: sorted by group, shuffled within each.

    Where keys repeat in a group, the first rows of all keys come before all second rows, and so on. This gives the
    longest runs of different keys, and hence the fewest short shards.
    """
    order = permutation(len(index), seed, "reshard")
    order = order[np.argsort(groups[order], kind="stable")]
    groups, keys = groups[order], index.key_numbers()[order]
    # Number the occurrences of each (group, key) pair: in pair order, the distance to the first row of the pair.
    by_pair = np.lexsort((keys, groups))  # stable, so that equal pairs keep their order
    positions = np.arange(len(order))
    is_first = np.append(True, (np.diff(keys[by_pair]) != 0) | (np.diff(groups[by_pair]) != 0))
    occurrence = np.empty_like(positions)
    occurrence[by_pair] = positions - np.maximum.accumulate(np.where(is_first, positions, 0))
    ordered: np.ndarray = order[np.lexsort((occurrence, groups))]
    return ordered


def _write_shard(reader: Reader, rows: np.ndarray, path: Path, bar: Any) -> np.ndarray:
    """Write the samples of `rows` to the shard at `path`; return the offset of each."""
    sizes: np.ndarray = reader.index.sample_size[rows]
    ends: np.ndarray = np.cumsum(sizes)
    with path.open("wb") as file:
        for batch in np.split(rows, np.flatnonzero(np.diff(ends // _BATCH_BYTES)) + 1):
            for sample in reader.read_whole(batch):
                file.write(sample)
                bar.update(len(sample))
        file.write(end_of_archive(int(ends[-1])))
    starts: np.ndarray = ends - sizes
    return starts
