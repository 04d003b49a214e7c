"""Index the shards that img2dataset wrote, and summarize them in a table.

    python data_prep/from_img2dataset.py shards/cc12m
    python data_prep/from_img2dataset.py 'shards/cc12m/{00000..01242}.tar'

If `00000_stats.json` or `00000.parquet` lie beside `00000.tar`, the table also gives the number of URLs and their
outcomes, and names shards whose number of samples differs from the number of downloads.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import tyro
from tqdm import tqdm

from mcl_clip.core.errors import UserError, run_program
from mcl_clip.core.files import read_json
from mcl_clip.data.index import ShardIndex
from mcl_clip.data.shards import expand_shards, is_remote

Statistics = tuple[int, int, Mapping[str, int], Mapping[str, int]]  # of a shard: tried, succeeded, failed, errors


@dataclass
class Downloads:
    """Download statistics of img2dataset, summed over shards."""

    shards: int = 0
    tried: int = 0
    succeeded: int = 0
    failed: Counter[str] = field(default_factory=Counter)  # by step
    errors: Counter[str] = field(default_factory=Counter)  # by message
    short: list[str] = field(default_factory=list)  # shards that hold another number of samples


def read_downloads(index: ShardIndex) -> Downloads:
    """Read the statistics beside the local shards of an index.

    Raises:
        UserError: if one of them is damaged.
    """
    total = Downloads()
    for shard in tqdm(index.shards, desc="reading statistics", unit="shard", disable=None):
        stem = Path(shard.url.removesuffix(".tar"))
        as_json, as_parquet = stem.with_name(f"{stem.name}_stats.json"), stem.with_name(f"{stem.name}.parquet")
        if is_remote(shard.url) or not (as_json.exists() or as_parquet.exists()):
            continue
        if (found := _from_json(as_json) if as_json.exists() else _from_parquet(as_parquet)) is None:
            continue
        tried, succeeded, failed, errors = found
        total.shards += 1
        total.tried += tried
        total.succeeded += succeeded
        total.failed.update(failed)
        total.errors.update(errors)
        samples = shard.rows + sum(shard.skipped.values())
        if samples != succeeded:
            total.short.append(f"{Path(shard.url).name} ({samples} of {succeeded})")
    return total


def repeated_keys(index: ShardIndex) -> tuple[int, str]:
    """Count the rows whose key occurs earlier, in any shard, and return one such key."""
    digests = np.empty(len(index), np.uint64)
    for row in tqdm(range(len(index)), desc="comparing keys", unit="row", disable=None):
        digests[row] = int.from_bytes(hashlib.blake2b(index.key(row).encode(), digest_size=8).digest(), "little")
    order = np.argsort(digests, kind="stable")
    again = order[1:][digests[order][1:] == digests[order][:-1]]
    return len(again), index.key(int(again.min())) if len(again) else ""


def index_img2dataset(
    shards: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SHARDS ...")],
) -> None:
    """Write an index beside shards, and print their contents and img2dataset's statistics.

    Args:
        shards: Folders, globs, tar files or URLs, with braces like {00000..00031}.

    Raises:
        UserError: for shards that are missing or damaged, or a folder that is not writable.
    """
    for shard in map(Path, shards):
        if shard.is_dir() and not any(shard.glob("*.tar")) and any(shard.rglob("*.jpg")):
            raise UserError(
                f"{shard} has images but no tar files, as img2dataset's format `files`; write shards of it with "
                f"from_table.py {shard} OUT"
            )
    index = ShardIndex.build(expand_shards(shards))
    is_local = not all(is_remote(shard.url) for shard in index.shards)
    if is_local:
        index.write_beside()
    again, example = repeated_keys(index)
    lines = [
        ("shards", f"{len(index.shards):,}"),
        ("size", f"{sum(shard.size for shard in index.shards) / 1e9:,.2f} GB"),
        ("rows", f"{len(index):,}"),
        *((f"left out: {reason}", f"{number:,}") for reason, number in index.skipped_by_reason().items()),
        ("rows with a key of an earlier row", f"{again:,}" + (f" (e.g. {example})" if again else "")),
        ("index", "index.arrow beside the shards" if is_local else "not written: all shards are remote"),
        *_download_lines(read_downloads(index)),
    ]
    width = max(len(name) for name, _ in lines)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in lines))


def _download_lines(total: Downloads) -> list[tuple[str, str]]:
    if not total.shards:
        return [("img2dataset statistics", "none found")]
    lines = [
        ("img2dataset statistics", f"of {total.shards:,} shards"),
        ("addresses tried", f"{total.tried:,}"),
        ("downloaded", _part(total.succeeded, total.tried)),
        *((name, _part(number, total.tried)) for name, number in total.failed.items() if number),
    ]
    lines += [(f"error: {message[:60]}", f"{number:,}") for message, number in total.errors.most_common(10)]
    if total.short:
        listed = ", ".join([*total.short[:3], *["..."] * (len(total.short) > 3)])
        lines.append(("shards with another number of samples than downloads", f"{len(total.short)}: {listed}"))
    return lines


def _part(number: int, of: int) -> str:
    return f"{number:,} ({100 * number / max(of, 1):.1f} %)"


def _from_json(path: Path) -> Statistics:
    record = read_json(path)
    try:
        failed = {name: int(record[name]) for name in ("failed_to_download", "failed_to_resize")}
        errors = {text: int(number) for text, number in record.get("status_dict", {}).items() if text != "success"}
        return int(record["count"]), int(record["successes"]), failed, errors
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} does not hold statistics of img2dataset ({error!r}); delete or restore it") from error


def _from_parquet(path: Path) -> Statistics | None:
    try:
        file = pq.ParquetFile(pa.OSFile(os.fsencode(path)))  # a str would have to be UTF-8
        names = file.schema_arrow.names
        if "status" not in names:
            return None
        table = file.read(columns=["status", *(["error_message"] if "error_message" in names else [])])
    except pa.ArrowInvalid as error:
        raise UserError(f"{path} is not a whole Parquet file ({error}); delete or restore it") from error
    status = _value_counts(table["status"])
    succeeded = status.pop("success", 0)
    errors = _value_counts(table["error_message"].drop_null()) if "error_message" in names else {}
    return table.num_rows, succeeded, status, errors


def _value_counts(column: pa.ChunkedArray) -> dict[str, int]:
    return {str(one["values"]): int(one["counts"]) for one in pc.value_counts(column).to_pylist()}


if __name__ == "__main__":
    run_program(lambda: tyro.cli(index_img2dataset))
