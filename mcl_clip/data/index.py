"""The index of a shard list: one row per sample, with the offsets and sizes of its members in the tar files."""

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from jaxtyping import Int32, Int64, Integer, UInt8

from mcl_clip.core.distributed import count_cores, is_main
from mcl_clip.core.errors import UserError
from mcl_clip.core.files import fingerprint
from mcl_clip.core.progress import Progress
from mcl_clip.data.index_file import METADATA, VERSION, number_shards, write_parts, write_table
from mcl_clip.data.samples import DAMAGED, SampleRule
from mcl_clip.data.scanning import DTYPES, SCHEMA, THREADS, Part, column_of, make_table, scan_shards
from mcl_clip.data.shards import Shard, check_location, is_remote, redacted
from mcl_clip.data.storage import RetryPolicy, stat
from mcl_clip.data.tar import BLOCK, IMAGE_FORMATS, TEXT_FORMATS

INDEX_NAME = "index.arrow"

_CHUNK_ROWS = 1 << 20  # read at a time, in memory that does not grow with the index
SAVE_S = 30.0  # between writes of what was scanned
RULE = SampleRule()
OLD_RULE = SampleRule(images=("jpg", "jpeg", "png", "webp"), needs_caption=False)  # of version 0.6 and earlier


_File: TypeAlias = tuple[str, int, int]  # the file that an index was loaded from: path, size, modification time in ns


class ShardIndex:
    """All samples of a shard list by row, in the order of the shards and of the samples within each.

    Columns are read-only numpy arrays with one entry per row; offsets are bytes in the tar, of payloads. The columns
    of a loaded index are views of the memory-mapped file, and a pickled one carries only the path.
    """

    shard_of: Int32[np.ndarray, "rows"]
    image_offset: Int64[np.ndarray, "rows"]
    image_size: Int32[np.ndarray, "rows"]
    image_format: UInt8[np.ndarray, "rows"]  # index into mcl_clip.data.tar.IMAGE_FORMATS
    text_offset: Int64[np.ndarray, "rows"]
    text_size: Int32[np.ndarray, "rows"]
    text_format: UInt8[np.ndarray, "rows"]  # index into mcl_clip.data.tar.TEXT_FORMATS
    sample_offset: Int64[np.ndarray, "rows"]  # of the sample's first header
    sample_size: Int64[np.ndarray, "rows"]  # of all its members, with headers and padding

    def __init__(self, shards: Sequence[Shard], table: pa.Table, *, rule: SampleRule = RULE):
        """Create an index from its parts; users call `build` or `load`. Raise UserError if rows and shards differ."""
        self.shards = tuple(shards)
        self.rule = rule
        # A table without rows may have columns without chunks.
        self._table = table.combine_chunks() if table.num_rows else make_table([], dict.fromkeys(DTYPES, np.zeros(0)))
        self._file: _File | None = None
        firsts = np.cumsum([0, *(shard.rows for shard in self.shards)])
        if [shard.first_row for shard in self.shards] != firsts[:-1].tolist() or firsts[-1] != table.num_rows:
            raise UserError("the index is damaged: its shards and rows do not match; delete it and build it again")
        self.shard_of = _to_numpy(self._table, "shard")
        for name in DTYPES.keys() - {"shard"}:
            setattr(self, name, _to_numpy(self._table, name))
        keys = self._table.column("key").chunk(0)
        _, ends, data = keys.buffers()
        self._key_ends = np.frombuffer(ends, np.int64)[keys.offset : keys.offset + len(keys) + 1]
        self._key_bytes = np.frombuffer(data, np.uint8)

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def key(self, row: int | np.integer) -> str:
        """Return the WebDataset key of a row; it is unique within its shard only."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of an index with {len(self)} rows")
        return bytes(self._key_bytes[self._key_ends[row] : self._key_ends[row + 1]]).decode(errors="backslashreplace")

    def key_numbers(self) -> Int32[np.ndarray, "rows"]:
        """Return a number for each row; equal keys have equal numbers."""
        return np.from_dlpack(self._table.column("key").chunk(0).dictionary_encode().indices)

    @cached_property
    def digest(self) -> str:
        """16 bytes in hexadecimal over keys, member sizes and formats in row order; it does not depend on paths."""
        digest = hashlib.blake2b(digest_size=16)
        columns = (self.image_size, self.text_size, self.image_format, self.text_format)
        for start in range(0, len(self), _CHUNK_ROWS):
            end = min(start + _CHUNK_ROWS, len(self))
            for column in (np.diff(self._key_ends[start : end + 1]), *(column[start:end] for column in columns)):
                digest.update(np.ascontiguousarray(column, dtype="<i8").data)
            digest.update(self._key_bytes[self._key_ends[start] : self._key_ends[end]].data)
        return digest.hexdigest()

    def skipped_by_reason(self) -> dict[str, int]:
        """Count the samples of all shards that are not rows, by reason, most frequent first.

        How many samples a damaged shard has lost is not known; it is taken to have had as many as the average shard.
        """
        skipped = sum((Counter(shard.skipped) for shard in self.shards), Counter[str]())
        if damaged := [shard for shard in self.shards if DAMAGED in shard.skipped]:
            whole = [shard.rows + sum(shard.skipped.values()) for shard in self.shards if DAMAGED not in shard.skipped]
            usual = sum(whole) // len(whole) if whole else 0
            skipped[DAMAGED] = sum(max(1, usual - shard.rows) for shard in damaged)
        return dict(skipped.most_common())

    def text_counts(self) -> str:
        """Describe the members that captions come from: `9,990 .txt, 10 .json (key 'caption')`."""
        if not self.rule.texts:
            return "none are read"
        counts = zip(TEXT_FORMATS, np.bincount(self.text_format, minlength=len(TEXT_FORMATS)).tolist(), strict=True)
        named = {"json": f".json (key {self.rule.caption_key!r})"}
        text = ", ".join(f"{count:,} {named.get(name, f'.{name}')}" for name, count in counts if count)
        joined = sum(shard.joined_lines for shard in self.shards)
        return text + (f"; {joined:,} .txt of several lines, each one caption" if joined else "")

    def describe_skipped(self) -> str:
        """List the counts of skipped samples by reason, each with the first example."""
        examples: dict[str, str] = {}
        for shard in reversed(self.shards):
            examples |= shard.examples
        return ", ".join(
            f"{count:,} {reason}" + (f" ({examples[reason]})" if reason in examples else "")
            for reason, count in self.skipped_by_reason().items()
        )

    @classmethod
    def build(
        cls,
        urls: Sequence[str],
        *,
        rule: SampleRule = RULE,
        reuse: bool = True,
        kept: Path | None = None,
        workers: int | None = None,
        retry: RetryPolicy | None = None,
    ) -> "ShardIndex":
        """Index shards, in one pass over their tar headers; locations are those that `expand_shards` returns.

        With `reuse`, the rows of unchanged shards are taken from the `index.arrow` in their folder and from the folder
        `kept`; what is scanned is kept there as it proceeds, for the next call, and in the end the result, which then
        is mapped and takes little memory. Local shards are scanned by `workers` processes, by default one for each
        core; the result does not depend on their number.

        Raises:
            UserError: if a shard is missing, compressed, truncated or damaged, or no sample has an image and a text.
            OSError: if a shard cannot be read after all retries.
        """
        locations = _locations(urls)
        stored = _stored_indexes(locations, rule, kept) if reuse else []
        index = next((one for one in stored if one._is_of(locations)), None)
        if index is None:
            parts = collect_parts(urls, rule, stored=stored, kept=kept, workers=workers, retry=retry)
            chosen = [parts[url] for url in locations]
            index = _assemble(chosen, rule) if kept is None else _assemble_in(kept, chosen, rule)
        if not len(index):
            raise UserError(_describe_empty(index))
        return index

    def save(self, path: Path) -> None:
        """Write the index as an Arrow file, see `mcl_clip.data.index_file`."""
        write_table(path, self._table, self.shards, self.rule)

    @classmethod
    def load(cls, path: Path, *, check: bool = True) -> "ShardIndex":
        """Load an index file, memory-mapped so that the processes of a machine share it, and check all rows.

        Without `check`, another process must have checked them.

        Raises:
            UserError: if there is no such file, it is damaged or of another version, or a row lies outside its shard.
        """
        index = cls._read(Path(path).absolute())
        try:
            if check:
                _check_rows(index)
        except ValueError as error:
            raise UserError(f"the index {path} is damaged ({error}); delete it and build it again") from error
        return index

    @classmethod
    def _read(cls, path: Path) -> "ShardIndex":
        try:
            status = path.stat()
            table = pa.ipc.open_file(pa.memory_map(os.fsencode(path))).read_all()
            metadata = json.loads(table.schema.metadata[METADATA])
            if metadata["version"] != VERSION:
                raise UserError(
                    f"{path} is an index of version {metadata['version']!r}, expected {VERSION}; build it again"
                )
            if not table.schema.equals(SCHEMA):
                raise KeyError("columns")
            if any(chunk.buffers()[0] is not None for column in table.columns for chunk in column.chunks):
                raise ValueError("it has a bitmap of nulls")  # which `build` never writes; counts of nulls can lie
            shards = [_stored_shard(shard, path.parent) for shard in metadata["shards"]]
            index = cls(shards, table, rule=_stored_rule(metadata))
        except FileNotFoundError as error:
            raise UserError(f"the index {path} does not exist; build it with `mcl-clip index`") from error
        except UserError:
            raise
        except Exception as error:  # a damaged file fails in many ways
            raise UserError(f"{path} is not a complete index file ({error}); delete it and build it again") from error
        index._file = (str(path), status.st_size, status.st_mtime_ns)
        return index

    def write_beside(self) -> None:
        """Write an `index.arrow` into each folder with local shards of this index, for `build` to reuse.

        Raises:
            UserError: if there are no local shards, or a folder is not writable.
        """
        folders: dict[str, list[int]] = {}
        for number, shard in enumerate(self.shards):
            if not is_remote(shard.url):
                folders.setdefault(os.path.dirname(shard.url), []).append(number)
        if not folders:
            raise UserError("all shards of the index are remote; save the index to a local file instead")
        for folder, numbers in folders.items():
            try:
                write_parts(Path(folder, INDEX_NAME), [self._part(number) for number in numbers], self.rule)
            except PermissionError as error:
                raise UserError(f"{folder} is not writable ({error}); save the index elsewhere") from error

    def check_unchanged(self, *, retry: RetryPolicy | None = None) -> None:
        """Raise UserError if a shard is missing, or its size, modification time or ETag is not that in the index."""
        policy = retry or RetryPolicy()
        with ThreadPoolExecutor(THREADS) as threads:
            for shard, now in zip(self.shards, threads.map(lambda s: stat(s.url, policy), self.shards), strict=True):
                if now != (shard.size, shard.stamp):
                    raise UserError(
                        f"shard {redacted(shard.url)} changed since it was indexed: it had {shard.size} bytes "
                        f"({shard.stamp}), now {now[0]} ({now[1]}); rebuild the index, or restore the shard"
                    )

    def relocated(
        self,
        rows: Integer[np.ndarray, "new_rows"],
        shards: Sequence[Shard],
        sample_offset: Int64[np.ndarray, "new_rows"],
    ) -> "ShardIndex":
        """Return the index of copies of `rows` in new shards, where each sample starts at its `sample_offset`."""
        table = self._table.take(pa.array(rows)).combine_chunks()
        shift = sample_offset - self.sample_offset[rows]
        for name in ("image_offset", "text_offset", "sample_offset"):
            column = pa.array(_to_numpy(table, name) + shift)
            table = table.set_column(SCHEMA.get_field_index(name), SCHEMA.field(name), column)
        firsts = np.cumsum([0, *(shard.rows for shard in shards)])
        parts = [(shard, table.slice(first, shard.rows)) for shard, first in zip(shards, firsts.tolist(), strict=False)]
        return _assemble(parts, self.rule)

    def __reduce__(self) -> tuple[Any, ...]:
        if self._file is not None:
            return _reload, (self._file,)
        return partial(ShardIndex, rule=self.rule), (self.shards, self._table)

    def _is_of(self, locations: Sequence[str]) -> bool:
        """Return whether this is the index of these shards, and none has changed."""
        if [shard.url for shard in self.shards] == locations:
            with suppress(UserError):  # what is wrong with a shard is reported when it is scanned
                self.check_unchanged(retry=RetryPolicy(retries=0))
                return True
        return False

    def _part(self, number: int) -> Part:
        shard = self.shards[number]
        return shard, self._table.slice(shard.first_row, shard.rows)


def collect_parts(
    urls: Sequence[str],
    rule: SampleRule,
    *,
    stored: Sequence[ShardIndex] | None = None,
    kept: Path | None = None,
    workers: int | None = None,
    retry: RetryPolicy | None = None,
    is_stopping: Callable[[], bool] = lambda: False,
) -> dict[str, Part]:
    """Return the rows of each shard by location, without the shards that were left when `is_stopping` was true.

    Unchanged shards are those of `stored`, by default of the files that `ShardIndex.build` looks for; other arguments
    and errors are its own. Several processes may share the folder `kept`, which the rows are read from once they are
    there.
    """
    locations = _locations(urls)
    parts = _unchanged_parts(_stored_indexes(locations, rule, kept) if stored is None else stored, set(locations))
    missing, unsaved, saved_s = [url for url in locations if url not in parts], dict[str, Part](), time.monotonic()
    scans = scan_shards(missing, rule, workers=workers or count_cores(), retry=retry or RetryPolicy())
    bar = Progress(total=len(missing), desc="indexing shards", unit="shard", show=is_main() and bool(missing))
    with bar, closing(scans):
        try:
            for url, part in zip(missing, scans, strict=True):
                parts[url] = unsaved[url] = part
                bar.update()
                if kept is not None and time.monotonic() - saved_s > SAVE_S:
                    parts |= _keep_parts(unsaved, rule, kept)
                    unsaved, saved_s = {}, time.monotonic()
                if is_stopping():
                    break
        finally:
            if kept is not None and unsaved:
                parts |= _keep_parts(unsaved, rule, kept)
    return parts


def _keep_parts(parts: Mapping[str, Part], rule: SampleRule, folder: Path) -> dict[str, Part]:
    """Write an index of these shards and return its rows by location, which are mapped."""
    index = _keep(folder, list(parts.values()), rule)
    return {url: index._part(number) for number, url in enumerate(parts)}


def _keep(folder: Path, parts: Sequence[Part], rule: SampleRule) -> ShardIndex:
    """Write an index of these shards to a file that is named after them, and return it, mapped."""
    path = folder / f"{fingerprint([asdict(shard) for shard, _ in parts])}.arrow"
    try:
        write_parts(path, parts, rule)
    except PermissionError as error:
        raise UserError(f"{folder.parent} is not writable ({error}); the index cannot be kept there") from error
    return ShardIndex.load(path, check=False)


def _locations(urls: Sequence[str]) -> list[str]:
    for url in urls:
        check_location(url)
    return [url if is_remote(url) else os.path.abspath(url) for url in urls]


def _stored_indexes(locations: Sequence[str], rule: SampleRule, kept: Path | None) -> list[ShardIndex]:
    """Load the `index.arrow` in the folders of local shards, and the indexes in `kept`, if they follow `rule`."""
    files = {Path(os.path.dirname(url), INDEX_NAME) for url in locations if not is_remote(url)}
    stored = [ShardIndex.load(file) for file in sorted(files) if file.exists()]
    for file in sorted(kept.glob("*.arrow")) if kept is not None else ():
        with suppress(UserError):  # what a kill has cut off is scanned again
            stored.append(ShardIndex.load(file))
    return [index for index in stored if index.rule == rule]


def _unchanged_parts(stored: Sequence[ShardIndex], wanted: Container[str]) -> dict[str, Part]:
    known = {}
    for index in stored:
        for number, shard in enumerate(index.shards):
            with suppress(UserError):  # a missing shard is reported when it is scanned
                if shard.url in wanted and stat(shard.url, RetryPolicy(retries=0)) == (shard.size, shard.stamp):
                    known[shard.url] = index._part(number)
    return known


def _assemble(parts: Sequence[Part], rule: SampleRule) -> ShardIndex:
    shards = number_shards(parts)
    numbers = np.repeat(np.arange(len(parts), dtype=np.int32), [shard.rows for shard in shards])
    tables = [table.replace_schema_metadata(None) for _, table in parts]
    table = pa.concat_tables(tables) if tables else SCHEMA.empty_table()
    table = table.set_column(1, SCHEMA.field("shard"), column_of(numbers, "shard"))
    return ShardIndex(shards, table, rule=rule)


def _assemble_in(folder: Path, parts: Sequence[Part], rule: SampleRule) -> ShardIndex:
    """Do as `_assemble`, but in a file, which replaces those that the parts are in."""
    index = _keep(folder, parts, rule)
    for file in folder.glob("*.arrow"):
        if index._file is not None and str(file.absolute()) != index._file[0]:
            file.unlink()
    return index


def _describe_empty(index: ShardIndex) -> str:
    if not index.shards:
        return "an empty list of shards has no samples"
    skipped, more = index.skipped_by_reason(), len(index.shards) - 1
    where = redacted(index.shards[0].url) + (f" and {more} more" if more else "")
    if images := skipped.get("missing_text", 0):
        what = f"has no captions: {images} samples have an image but no {' or '.join(index.rule.texts)} member"
    else:
        what = f"has no sample with an image{' and a text' if index.rule.texts else ''}"
    hint = "; the members of a sample must be adjacent in the tar" if "duplicate_key" in skipped else ""
    if index.rule.needs_caption and skipped.keys() & {"missing_image", "missing_text", "dotted_name"}:
        hint += "; name the extensions of images and captions by --data.image-member and --data.text-member"
    elif not index.rule.texts:
        hint += "; name the extension of images by --data.image-member"
    if images:
        hint += "; to learn from images alone, give --tower.image timm:NAME without --tower.text"
    return f"{where} {what} (skipped: {index.describe_skipped()}){hint}"


def _to_numpy(table: pa.Table, name: str) -> np.ndarray:
    return np.from_dlpack(table.column(name).chunk(0))


def _stored_shard(values: Any, folder: Path) -> Shard:
    """Read the description of a shard in an index file; raise ValueError or UserError if it is malformed."""
    url, stamp, skipped = (values[name] for name in ("url", "stamp", "skipped"))
    if not isinstance(url, str) or not isinstance(stamp, str) or "\0" in url:
        raise ValueError("a shard without a name")
    numbers = (values["size"], values["rows"], values.get("joined_lines", 0), *skipped.values())
    if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
        raise ValueError("a shard without a size")
    if not all(isinstance(text, str) for text in values.get("examples", {}).values()):
        raise ValueError("an example that is no text")
    check_location(url)
    return replace(Shard(**values), url=url if is_remote(url) else os.path.join(folder, url))


def _stored_rule(metadata: Mapping[str, Any]) -> SampleRule:
    """Read by which rule an index was made; earlier versions stored which text comes first."""
    if "rule" not in metadata:
        first = str(metadata["text_first"])
        return replace(OLD_RULE, texts=(first,) if first not in RULE.texts else (first, *{*RULE.texts} - {first}))
    values: dict[str, Any] = metadata["rule"]
    return SampleRule(**values | {name: tuple(values[name]) for name in ("images", "texts")})


def _check_rows(index: ShardIndex) -> None:
    """Raise ValueError unless every row lies within its shard and all columns hold values that `build` can write."""
    ends = index._key_ends
    if len(ends) != len(index) + 1 or ends[0] < 0 or ends[-1] > len(index._key_bytes):
        raise ValueError("keys")
    firsts = np.cumsum([0, *(shard.rows for shard in index.shards)])
    shard_sizes = np.array([shard.size for shard in index.shards], np.int64)
    for first in range(0, len(index), _CHUNK_ROWS):
        rows = slice(first, min(first + _CHUNK_ROWS, len(index)))
        if (ends[rows.start + 1 : rows.stop + 1] <= ends[rows]).any():
            raise ValueError("keys")
        numbers = np.searchsorted(firsts, np.arange(rows.start, rows.stop), side="right") - 1
        if not np.array_equal(index.shard_of[rows], numbers):
            raise ValueError("shard numbers")
        image_formats, text_formats = index.image_format[rows], index.text_format[rows]
        if (image_formats >= len(IMAGE_FORMATS)).any() or (text_formats >= len(TEXT_FORMATS)).any():
            raise ValueError("formats")
        sizes, start, length = shard_sizes[numbers], index.sample_offset[rows], index.sample_size[rows]
        end = start + length
        for member in ("image", "text") if index.rule.texts else ("image",):
            offset, size = (getattr(index, f"{member}_{what}")[rows] for what in ("offset", "size"))
            inside = (size > 0) & (start + BLOCK <= offset) & (offset <= sizes) & (offset + size <= end)
            if not (inside & (start >= 0) & (length <= sizes) & (end <= sizes)).all():
                raise ValueError("member offsets")


def _reload(file: _File) -> ShardIndex:
    index = ShardIndex._read(Path(file[0]))
    if index._file != file:
        raise UserError(f"the index {file[0]} was overwritten while it was in use; start again")
    return index
