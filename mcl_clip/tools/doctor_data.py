"""Checks of the training shards, of samples read from them, and of the evaluation sets."""

import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mcl_clip.core.errors import UserError
from mcl_clip.data.decode import TrainTransform
from mcl_clip.data.index import INDEX_NAME, ShardIndex
from mcl_clip.data.loader import Tokenizer, captioned_batches
from mcl_clip.data.reader import Reader
from mcl_clip.data.shards import Shard, expand_shards, is_remote
from mcl_clip.data.storage import RetryPolicy, stat
from mcl_clip.eval.task import Task
from mcl_clip.tools.findings import Finding, as_duration, attempt

SHARDS_WITHOUT_INDEX = 8
REMOTE_SHARDS_TRIED = 16
REMOTE = RetryPolicy(retries=1, timeout_s=10.0)
SAMPLES_READ = 256
BATCH_SIZE = 32
MAX_READING_S = 20.0


@dataclass(frozen=True, kw_only=True)
class RowCounts:
    """Row counts of the training shards.

    Attributes:
        index: index of the shards that were inspected.
        per_list: rows of each list of shards, extrapolated unless `is_whole`.
        is_whole: whether `index` covers all shards.
    """

    index: ShardIndex
    per_list: tuple[int, ...]
    is_whole: bool

    @property
    def total(self) -> int:
        """Rows of all lists."""
        return sum(self.per_list)

    def per_epoch(self, weights: Sequence[float], held_out: int) -> int:
        """Count the rows of an epoch: each list times its weight, without held-out rows."""
        weighted = zip(self.per_list, weights or [1.0] * len(self.per_list), strict=True)
        return max(1, sum(round(rows * weight) for rows, weight in weighted) - min(held_out, self.total // 20))


def inspect_shards(specs: Sequence[str], run_index: Path) -> tuple[RowCounts | None, list[Finding]]:
    """Count rows from stored indexes and, for shards without one, from the headers of the first few.

    Args:
        specs: lists of shards as given by the user.
        run_index: path of the index of the run, which need not exist.

    Returns:
        The counts, or None if a shard cannot be used, and the findings.
    """
    if not specs:
        text = "--data.train names no shards; give paths, URLs or folders with .tar files"
        return None, [Finding("FAIL", "shards", text)]
    lists, failures = attempt("shards", lambda: [expand_shards(spec) for spec in specs])
    if lists is None:
        return None, failures
    urls = [url for part in lists for url in part]
    if failures := _check_remote([url for url in urls if is_remote(url)]):
        return None, failures
    indexed, failures = attempt("shards", partial(_load_or_build_index, urls, run_index))
    if indexed is None:
        return None, failures
    index, scanned = indexed
    known = {shard.url: shard.rows for shard in index.shards}
    mean = len(index) / max(1, len(known))
    per_list = tuple(round(sum(known.get(url, mean) for url in part)) for part in lists)
    rows = RowCounts(index=index, per_list=per_list, is_whole=len(known) == len(urls))
    if rows.is_whole:
        source = f"{scanned} of them indexed now, in memory" if scanned else "from a stored index"
        findings = [Finding("ok", "shards", f"{len(urls):,} shards, {rows.total:,} rows ({source})")]
    else:
        text = (
            f"{len(urls):,} shards, about {rows.total:,} rows: {len(index.shards):,} shards were inspected, the others "
            f"have no index; run `mcl-clip index` to check them before the run does"
        )
        findings = [Finding("warning", "shards", text)]
    if skipped := index.skipped_by_reason():
        counts = ", ".join(f"{count:,} {reason}" for reason, count in skipped.items())
        findings.append(Finding("warning", "shards", f"samples that are not image-text pairs are skipped: {counts}"))
    return rows, findings


def _check_remote(urls: Sequence[str]) -> list[Finding]:
    """Request the headers of evenly spaced remote shards; return up to three failures."""
    if not urls:
        return []
    tried = [urls[i] for i in np.unique(np.linspace(0, len(urls) - 1, REMOTE_SHARDS_TRIED).astype(int))]
    with ThreadPoolExecutor(max_workers=len(tried)) as threads:
        answers = list(threads.map(lambda url: attempt("shards", lambda: stat(url, REMOTE))[1], tried))
    return [finding for answer in answers for finding in answer][:3]


def _load_or_build_index(urls: Sequence[str], run_index: Path) -> tuple[ShardIndex, int]:
    """Return an index of all shards with a stored index and of the first others, and the number of the latter."""
    if run_index.exists():
        index = ShardIndex.load(run_index)
        if [shard.url for shard in index.shards] == list(urls) and all(map(_is_unchanged, index.shards)):
            return index, 0
    folders = dict.fromkeys(os.path.dirname(url) for url in urls if not is_remote(url))
    paths = [path for folder in folders if (path := Path(folder, INDEX_NAME)).exists()]
    stored = {shard.url for path in paths for shard in ShardIndex.load(path).shards if _is_unchanged(shard)}
    scanned = [url for url in urls if url not in stored][:SHARDS_WITHOUT_INDEX]
    chosen = [url for url in urls if url in stored or url in scanned]
    return ShardIndex.build(chosen, retry=REMOTE), len(scanned)


def _is_unchanged(shard: Shard) -> bool:
    if is_remote(shard.url):
        return True  # a request for each takes too long, and _check_remote has tried some
    try:
        return stat(shard.url, RetryPolicy(retries=0)) == (shard.size, shard.stamp)
    except UserError:
        return False


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
    """Read and decode evenly spaced samples; report bad ones and the loading throughput.

    Args:
        index: index of the training rows.
        transform: image transform of the training.
        tokenizer: maps captions to tokens.
        max_pixels: largest image that is decoded.
        json_key: key of the caption in JSON files.
        max_bad_fraction: largest allowed share of bad samples.
        loaders: loader processes of the run that have a processor core of their own.
        batch_sizes: steps and global batch size of each stage.
        is_staged: whether remote shards are downloaded whole; these are not tried.
    """
    if is_staged and any(is_remote(shard.url) for shard in index.shards):
        yield Finding("ok", "reading", "not tried: remote shards are downloaded whole when the run needs them")
        return
    decoding = {"transform": transform, "tokenizer": tokenizer, "max_pixels": max_pixels, "json_key": json_key}
    read, failures = attempt("reading", lambda: _read_samples(index, decoding))
    yield from failures
    if read is None:
        return
    count, seconds, bad = read
    rate = count / seconds
    text = f"{count} samples at {rate:.0f}/s by one process"
    if trained := [(steps, batch) for steps, batch in batch_sizes if steps]:
        batch_s = max(batch for _, batch in trained) / (rate * loaders)
        total_s = sum(steps * batch for steps, batch in trained) / (rate * loaders)
        text += (
            f"; {loaders} loaders deliver a batch in {batch_s:.2g} s, so faster steps wait for data and training "
            f"takes at least {as_duration(total_s)}"
        )
    yield Finding("ok", "reading", text)
    if bad:
        yield judge_bad_samples(bad, count, max_bad_fraction, is_all=count == len(index))


def _read_samples(index: ShardIndex, decoding: dict[str, Any]) -> tuple[int, float, Counter[str]]:
    """Return the number of samples that were read, the seconds this took, and bad samples by reason."""
    rows = np.unique(np.linspace(0, len(index) - 1, SAMPLES_READ).astype(np.int64))
    batches = [rows[start : start + BATCH_SIZE] for start in range(0, len(rows), BATCH_SIZE)]
    bad: Counter[str] = Counter()
    count, started = 0, time.perf_counter()
    for batch, requested in zip(captioned_batches(Reader(index), batches, **decoding), batches, strict=True):
        count += len(requested)
        bad.update(sample.reason for sample in batch.bad)
        if time.perf_counter() - started > MAX_READING_S:
            break
    return count, max(time.perf_counter() - started, 1e-6), bad


def judge_bad_samples(bad: Counter[str], count: int, limit: float, *, is_all: bool) -> Finding:
    """Compare the share of bad samples with the limit above which a run stops.

    It is a `FAIL` where the share exceeds the limit by two standard errors, or at all if every sample was read.
    """
    share = bad.total() / count
    margin = 0.0 if is_all else 2 * math.sqrt(share * (1 - share) / count)
    reasons = ", ".join(f"{number} {reason}" for reason, number in bad.most_common())
    text = f"{bad.total()} of {count} samples cannot be decoded: {reasons}"
    if share - margin > limit:
        way_out = f"the run stops above --data.max-bad-fraction {limit:g}; fix the shards, or raise it"
        return Finding("FAIL", "reading", f"{text}; {way_out}")
    return Finding("warning", "reading", f"{text}; they are counted and skipped, up to a share of {limit:g}")


def open_sets(
    open_all: Callable[[], Mapping[str, Task]], open_each: Sequence[Callable[[], Mapping[str, Task]]]
) -> tuple[Mapping[str, Task] | None, list[Finding]]:
    """Open all evaluation sets, or name each that cannot be opened.

    Args:
        open_all: opens the sets of a recipe.
        open_each: each opens one of them.
    """
    tasks, failures = attempt("sets", open_all)
    if tasks is None:
        each = [failure for open_one in open_each for failure in attempt("sets", open_one)[1]]
        return None, each or failures
    if not tasks:
        text = "no evaluation set: the quality of the stages is not measured; give --eval.sets"
        return tasks, [Finding("warning", "sets", text)]
    return tasks, [Finding("ok", "sets", f"can be opened: {', '.join(tasks)}")]
