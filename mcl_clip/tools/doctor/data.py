"""Training shards, samples read from them, and evaluation sets."""

import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from mcl_clip.core.errors import UserError
from mcl_clip.data.decode import TrainTransform
from mcl_clip.data.index import INDEX_NAME, ShardIndex
from mcl_clip.data.loader import Tokenizer, captioned_batches
from mcl_clip.data.reader import Reader
from mcl_clip.data.shards import Shard, expand_shards, is_remote
from mcl_clip.data.storage import RetryPolicy, stat
from mcl_clip.eval.task import Task
from mcl_clip.tools.doctor.findings import Finding, as_duration, attempt

SHARDS_WITHOUT_INDEX = 8
REMOTE_SHARDS_TRIED = 16
TIMEOUT_S = 10.0  # for a remote shard
SAMPLES_READ = 256
SAMPLES_OF_A_BATCH = 32
SECONDS_OF_READING = 20.0


@dataclass(frozen=True, kw_only=True)
class RowCounts:
    """The rows of the training shards.

    Attributes:
        index: of the shards that were looked at.
        per_list: rows of each list of shards, estimated unless `is_whole`.
        is_whole: whether the index has all shards.
    """

    index: ShardIndex
    per_list: tuple[int, ...]
    is_whole: bool

    @property
    def total(self) -> int:
        """The rows of all lists."""
        return sum(self.per_list)

    def per_epoch(self, weights: Sequence[float], held_out: int) -> int:
        """Rows of an epoch: each list by its weight, without those that are held out."""
        drawn = zip(self.per_list, weights or [1.0] * len(self.per_list), strict=True)
        return max(1, sum(round(rows * weight) for rows, weight in drawn) - min(held_out, self.total // 20))


def look_at_shards(specs: Sequence[str], run_index: Path) -> tuple[RowCounts | None, list[Finding]]:
    """The rows of lists of shards, by the indexes that are stored and, for the rest, of the first shards.

    Args:
        specs: lists of shards as a user names them.
        run_index: where a run keeps its index.
    """
    if not specs:
        wrong = "--data.train names no shards; give paths, URLs or folders with .tar files"
        return None, [Finding("FAIL", "shards", wrong)]
    lists, wrongs = attempt("shards", lambda: [expand_shards(spec) for spec in specs])
    if lists is None:
        return None, wrongs
    urls = [url for part in lists for url in part]
    if wrongs := _check_remote([url for url in urls if is_remote(url)]):
        return None, wrongs
    found, wrongs = attempt("shards", partial(_index_of, urls, run_index))
    if found is None:
        return None, wrongs
    index, scanned = found
    known = {shard.url: shard.rows for shard in index.shards}
    mean = len(index) / max(1, len(known))
    per_list = tuple(round(sum(known.get(url, mean) for url in part)) for part in lists)
    rows = RowCounts(index=index, per_list=per_list, is_whole=len(known) == len(urls))
    return rows, [*_describe(rows, len(urls), scanned), *_left_out(index)]


def _index_of(urls: Sequence[str], run_index: Path) -> tuple[ShardIndex, int]:
    """The index of the shards that have one stored, and of the first others; how many of these there are."""
    if run_index.exists():
        index = ShardIndex.load(run_index)
        if [shard.url for shard in index.shards] == list(urls) and all(map(_is_unchanged, index.shards)):
            return index, 0
    stored = {url for folder in _folders(urls) for url in _indexed(Path(folder, INDEX_NAME))}
    without = [url for url in urls if url not in stored][:SHARDS_WITHOUT_INDEX]
    chosen = [url for url in urls if url in stored or url in without]
    return ShardIndex.build(chosen, retry=RetryPolicy(retries=1, timeout_s=TIMEOUT_S)), len(without)


def _folders(urls: Iterable[str]) -> Iterable[str]:
    return dict.fromkeys(os.path.dirname(url) for url in urls if not is_remote(url))


def _indexed(path: Path) -> Iterator[str]:
    """The shards that an index beside them describes as they are."""
    if path.exists():
        yield from (shard.url for shard in ShardIndex.load(path).shards if _is_unchanged(shard))


def _is_unchanged(shard: Shard) -> bool:
    if is_remote(shard.url):
        return True  # asking for each takes too long; some were asked for before
    try:
        return stat(shard.url, RetryPolicy(retries=0)) == (shard.size, shard.stamp)
    except UserError:
        return False


def _check_remote(urls: Sequence[str]) -> list[Finding]:
    """Whether some of the remote shards, from the first to the last, answer."""
    if not urls:
        return []
    tried = [urls[place] for place in np.unique(np.linspace(0, len(urls) - 1, REMOTE_SHARDS_TRIED).astype(int))]
    retry = RetryPolicy(retries=1, timeout_s=TIMEOUT_S)
    with ThreadPoolExecutor(max_workers=len(tried)) as threads:
        answers = list(threads.map(lambda url: attempt("shards", lambda: stat(url, retry))[1], tried))
    wrongs = [finding for answer in answers for finding in answer]
    return wrongs[:3]


def _describe(rows: RowCounts, shards: int, scanned: int) -> Iterator[Finding]:
    if rows.is_whole:
        how = f"{scanned} of them indexed now, in memory" if scanned else "from a stored index"
        yield Finding("ok", "shards", f"{shards:,} shards, {rows.total:,} rows ({how})")
    else:
        yield Finding(
            "warning",
            "shards",
            f"{shards:,} shards, about {rows.total:,} rows: {len(rows.index.shards):,} shards were looked at, for the "
            f"others there is no index. What is wrong with them shows only when the run makes it, or `mcl-clip index`",
        )


def _left_out(index: ShardIndex) -> Iterator[Finding]:
    if skipped := index.skipped_by_reason():
        counts = ", ".join(f"{count:,} {reason}" for reason, count in skipped.items())
        yield Finding("warning", "shards", f"samples that are not pairs are left out: {counts}")


def check_reading(
    index: ShardIndex,
    *,
    transform: TrainTransform,
    tokenizer: Tokenizer,
    max_pixels: int,
    json_key: str,
    max_bad_fraction: float,
    loaders: int,
    batch_sizes: Sequence[tuple[int, int]],
    is_staged: bool,
) -> Iterator[Finding]:
    """Read and decode a sample: what is bad in it, and how fast batches can come.

    Args:
        index: the rows, of which some are read, evenly spread.
        transform: of the training, which reads most.
        tokenizer: from captions to tokens.
        max_pixels: as in a run.
        json_key: as in a run.
        max_bad_fraction: share of samples that may be bad.
        loaders: loader processes of the run that have a core of their own.
        batch_sizes: steps and global batch size of each stage.
        is_staged: whether remote shards are fetched whole; these are not tried.
    """
    if is_staged and any(is_remote(shard.url) for shard in index.shards):
        yield Finding("ok", "reading", "not tried: remote shards are fetched whole when the run needs them")
        return
    decoding = {"transform": transform, "tokenizer": tokenizer, "max_pixels": max_pixels, "json_key": json_key}
    tried, wrongs = attempt("reading", lambda: _read_some(index, decoding))
    yield from wrongs
    if tried is None:
        return
    count, seconds, bad = tried
    rate = count / seconds
    steps = [(number, batch) for number, batch in batch_sizes if number]
    total_s = sum(number * batch for number, batch in steps) / (rate * loaders)
    slowest = max((batch for _, batch in steps), default=0) / (rate * loaders)
    feeds = (
        f"; {loaders} loaders bring a batch in {slowest:.2g} s, so faster steps wait for data, and all steps take "
        f"{as_duration(total_s)} at least"
    )
    yield Finding("ok", "reading", f"{count} samples at {rate:.0f}/s by one process{feeds if steps else ''}")
    if bad:
        yield _bad_finding(bad, count, max_bad_fraction, is_all=count == len(index))


def _read_some(index: ShardIndex, decoding: dict[str, Any]) -> tuple[int, float, Counter[str]]:
    """How many samples were read, in how many seconds, and the bad ones by reason."""
    rows: Int64[np.ndarray, some] = np.unique(np.linspace(0, len(index) - 1, SAMPLES_READ).astype(np.int64))
    batches = [rows[start : start + SAMPLES_OF_A_BATCH] for start in range(0, len(rows), SAMPLES_OF_A_BATCH)]
    bad: Counter[str] = Counter()
    count, started = 0, time.perf_counter()
    for batch, asked in zip(captioned_batches(Reader(index), batches, **decoding), batches, strict=True):
        count += len(asked)
        bad.update(sample.reason for sample in batch.bad)
        if time.perf_counter() - started > SECONDS_OF_READING:
            break
    return count, max(time.perf_counter() - started, 1e-6), bad


def _bad_finding(bad: Counter[str], count: int, most: float, *, is_all: bool) -> Finding:
    """More bad samples than a run allows will stop it, as far as a sample can tell: two standard errors."""
    share = bad.total() / count
    doubt = 0.0 if is_all else 2 * math.sqrt(share * (1 - share) / count)
    reasons = ", ".join(f"{number} {reason}" for reason, number in bad.most_common())
    text = f"{bad.total()} of {count} samples cannot be decoded: {reasons}"
    if share - doubt > most:
        end = f"the run stops above --data.max-bad-fraction {most:g}; mend the shards, or raise it"
        return Finding("FAIL", "reading", f"{text}; {end}")
    return Finding("warning", "reading", f"{text}; they are counted and left out, up to a share of {most:g}")


def open_sets(
    open_all: Callable[[], Mapping[str, Task]], open_each: Sequence[Callable[[], Mapping[str, Task]]]
) -> tuple[Mapping[str, Task] | None, list[Finding]]:
    """The evaluation sets, if all can be opened; what is wrong with those that cannot.

    Args:
        open_all: opens the sets of a recipe.
        open_each: opens one of them.
    """
    tasks, wrongs = attempt("sets", open_all)
    if tasks is None:
        each = [wrong for open_one in open_each for wrong in attempt("sets", open_one)[1]]
        return None, each or wrongs
    if not tasks:
        text = "no evaluation set: nothing will say what a stage has learned; give --eval.sets"
        return tasks, [Finding("warning", "sets", text)]
    return tasks, [Finding("ok", "sets", f"can be opened: {', '.join(tasks)}")]
