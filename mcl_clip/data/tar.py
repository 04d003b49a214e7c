"""Tar shards: parse headers into members, and group members into WebDataset samples.

Only headers are read; payloads are skipped. `scan_shard` does both steps for the shard at a path or URL.
"""

import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from mcl_clip.core.errors import UserError
from mcl_clip.data.shards import is_remote, redacted
from mcl_clip.data.storage import RetryPolicy, read_range

BLOCK = 512
MAX_EXTENDED_HEADER_BYTES = 64 << 10
MAX_EXTENDED_HEADERS = 8  # of one member: tar programs write at most three
MAX_TAIL_BYTES = 1 << 20  # zeros after the end-of-archive marker; more are typical of an incomplete download
IMAGE_FORMATS = ("jpg", "jpeg", "png", "webp")
TEXT_FORMATS = ("txt", "json", "cls", "npy")
LABEL_FORMATS = ("cls", "npy")  # of classification sets
MAX_IMAGE_BYTES = 32 << 20
MAX_TXT_BYTES = 64 << 10
MAX_JSON_BYTES = 1 << 20
MAX_NPY_BYTES = 1 << 20
MAX_MEMBERS = 16
ReadAt = Callable[[int, int], bytes]

_ZEROS = bytes(BLOCK)
_NO_PAYLOAD = b"123456"  # links, devices, folders, pipes: `tarfile` ignores their size too
_RECORD = 20 * BLOCK  # the unit in which tar programs write
_TAIL_WINDOW = 64 << 10
_LOCAL_WINDOW = 8 << 10  # spans the end of one image, its caption and the header of the next image
_REMOTE_WINDOW = 4 << 20
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_MAX_BYTES = {
    **dict.fromkeys(IMAGE_FORMATS, MAX_IMAGE_BYTES),
    "txt": MAX_TXT_BYTES,
    "json": MAX_JSON_BYTES,
    "cls": 64,
    "npy": MAX_NPY_BYTES,
}
_FORMAT_OF = {name.encode(): name for name in _MAX_BYTES}
_FOLDER_ENDS = tuple(b".%s/" % name for name in _FORMAT_OF)


class Header(NamedTuple):
    """A header block: the name and size it states, and its type flag (`b"0"` is a regular file)."""

    name: bytes
    size: int
    kind: bytes


class Member(NamedTuple):
    """A member: headers and padded payload fill bytes `start` to `end`, the payload `offset` to `offset + size`.

    `problem` says why the payload cannot be used; empty if it can.
    """

    name: bytes
    kind: bytes
    start: int
    offset: int
    size: int
    end: int
    problem: str


class Samples(NamedTuple):
    """The usable samples of a shard, and how many others were skipped for which reason.

    A row has the columns of an index: offset, size and format of image and text, offset and size of the sample.
    """

    keys: list[bytes]
    rows: list[tuple[int, ...]]
    skipped: Counter[str]


def scan_shard(location: str, size: int, *, text_first: str, retry: RetryPolicy) -> Samples:
    """List the samples of a shard of `size` bytes, in one pass over its headers.

    Raises:
        UserError: if the shard is missing, compressed, truncated or damaged.
        OSError: if reading still fails after all retries.
    """
    if is_remote(location):
        window = _Window(partial(read_range, location, retry=retry), size, _REMOTE_WINDOW)
        return group_samples(read_members(window, location), text_first=text_first)
    with open(location, "rb", buffering=0) as file:
        window = _Window(lambda start, end: os.pread(file.fileno(), end - start, start), size, _LOCAL_WINDOW)
        return group_samples(read_members(window, location), text_first=text_first)


def end_of_archive(size: int) -> bytes:
    """Return the bytes that close a tar file of `size` bytes: two zero blocks, padded to a multiple of 10,240 bytes."""
    return bytes(2 * BLOCK + -(size + 2 * BLOCK) % _RECORD)


def read_members(view: "_Window", location: str) -> Iterator[Member]:
    """Yield the members of a tar file in order; payloads that reach beyond the window are skipped.

    Raises:
        UserError: if the file is compressed, truncated or damaged; the message gives the byte.
    """
    try:
        magic = view.get(0, 8)
        if compression := next((name for prefix, name in _COMPRESSED.items() if magic.startswith(prefix)), ""):
            raise UserError(
                f"shard {redacted(location)} is compressed ({compression}); decompress it to a plain .tar file"
            )
        position = 0
        while (member := _next_member(view, position)) is not None:
            position = member.end
            yield member
    except UserError:
        raise
    except ValueError as error:
        raise UserError(
            f"shard {redacted(location)} is damaged at byte {view.position} of {view.size}: {error}; download or write "
            f"it again"
        ) from error


def parse_header(block: bytes) -> Header:
    """Parse a header block of 512 bytes; raise ValueError if it is not one, or its checksum does not match."""
    if len(block) != BLOCK:
        raise ValueError("a header is truncated")
    # The low half of Adler-32 is 1 + the sum of the bytes modulo 65521: much faster than adding them up in Python.
    # The checksum counts its own field as spaces.
    total = (zlib.adler32(block) & 0xFFFF) - 1 - sum(block[148:156]) + 8 * ord(" ")
    if (total - _parse_number(block[148:156])) % 65521:
        raise ValueError("the checksum of a header does not match")
    name = block[:100].split(b"\0", 1)[0]
    kind = block[156:157]
    if block[257:263] == b"ustar\0" and block[345]:
        name = block[345:500].split(b"\0", 1)[0] + b"/" + name
    if kind == b"\0":  # old archives mark folders by their name only
        kind = b"5" if name.endswith(b"/") else b"0"
    return Header(name, _parse_number(block[124:136]), b"0" if kind == b"7" else kind)


def _parse_number(data: bytes) -> int:
    """Parse a numeric field: octal digits, or base 256 after a byte 0x80."""
    if data[0] == 0x80:
        return int.from_bytes(data[1:], "big")
    digits = data.split(b"\0", 1)[0].strip()
    if digits and not digits.isdigit():
        raise ValueError("a number in a header is malformed")
    return int(digits or b"0", 8)


def _parse_records(kind: bytes, data: bytes) -> dict[bytes, bytes]:
    """Parse the records of a PAX header, or the path in a GNU long name."""
    if kind in b"LK":
        return {b"path": data.split(b"\0", 1)[0]}
    records, start, end = {}, 0, len(data.rstrip(b"\0"))
    while start < end:
        digits, _, _ = data[start : start + 20].partition(b" ")
        stop = start + int(digits) if digits.isdigit() else 0
        if not start + len(digits) + 2 < stop <= len(data) or data[stop - 1] != ord("\n"):
            raise ValueError("a PAX header is malformed")
        name, _, value = data[start + len(digits) + 1 : stop - 1].partition(b"=")
        records[name] = value
        start = stop
    if not records.get(b"size", b"0").isdigit():
        raise ValueError("the size in a PAX header is malformed")
    return records


class _Window:
    """Forward reader that fetches `window` bytes at a time; `position` is the byte that an error refers to."""

    def __init__(self, read_at: ReadAt, size: int, window: int):
        self.read_at, self.size, self.window = read_at, size, window
        self.data, self.data_start = b"", 0
        self.position = 0

    def get(self, start: int, length: int) -> bytes:
        """Return `length` bytes from `start`."""
        self.position = start
        if start + length > self.size:
            raise ValueError(
                "the file ends without an end-of-archive marker" if start >= self.size else "the file is truncated"
            )
        if not self.data_start <= start <= start + length <= self.data_start + len(self.data):
            self.data = self.read_at(start, min(self.size, start + max(length, self.window)))
            self.data_start = start
        return self.data[start - self.data_start : start - self.data_start + length]

    def skip(self, start: int, length: int) -> int:
        """Return the position of the header that follows a payload of `length` bytes at `start`."""
        if length < 0 or start + length > self.size:
            self.position = start
            raise ValueError(f"a payload of {length} bytes does not fit into the file")
        return start + -(-length // BLOCK) * BLOCK

    def check_end(self, position: int) -> None:
        """Check that the archive ends at `position`: two zero blocks, then only a limited number of zeros."""
        if self.get(position + BLOCK, BLOCK) != _ZEROS:
            raise ValueError("a single block of zeros lies inside the archive")
        start = position + 2 * BLOCK
        if self.size - start > MAX_TAIL_BYTES:
            self.position = start
            raise ValueError(f"{self.size - start} bytes follow the end-of-archive marker (incomplete download?)")
        for chunk in range(start, self.size, _TAIL_WINDOW):
            if self.get(chunk, min(self.size - chunk, _TAIL_WINDOW)).strip(b"\0"):
                raise ValueError("data follow the end-of-archive marker (concatenated tar files?)")


def _next_member(view: _Window, start: int) -> Member | None:
    """Read the member whose headers begin at `start`; None at the end of the archive."""
    position, problem, count, has_long_link = start, "", 0, False
    records: dict[bytes, bytes] = {}
    while True:
        block = view.get(position, BLOCK)
        if block == _ZEROS:
            if position != start:
                raise ValueError("an extended header is followed by no member")
            view.check_end(position)
            return None
        header = parse_header(block)
        if header.kind not in (b"x", b"g", b"L", b"K"):
            break
        count += 1
        if count > MAX_EXTENDED_HEADERS:
            raise ValueError(f"more than {MAX_EXTENDED_HEADERS} extended headers follow each other")
        position += BLOCK
        if header.size <= MAX_EXTENDED_HEADER_BYTES:
            parsed = _parse_records(header.kind, view.get(position, header.size))
            records |= parsed if header.kind in b"xL" else {}
        else:
            problem = "oversize_header"
        position = view.skip(position, header.size)
        if header.kind == b"g" and not records and not problem:
            start, count = position, 0  # applies to the whole archive, so it is not part of the next sample
        has_long_link |= header.kind == b"K"
    if has_long_link and header.kind not in b"12":
        raise ValueError("a long link name is followed by no link")
    size = int(records.get(b"size", header.size))
    offset = position + BLOCK
    end = view.skip(offset, 0 if header.kind in _NO_PAYLOAD else size)
    problem = problem or _payload_problem(header, size, records)
    return Member(records.get(b"path", header.name), header.kind, start, offset, size, end, problem)


def _payload_problem(header: Header, size: int, records: dict[bytes, bytes]) -> str:
    """Return why the payload is not simply the bytes that the header block announces; empty if it is."""
    if header.kind == b"S":
        raise ValueError("sparse members are not supported (write the tar without --sparse)")
    if any(name.startswith(b"GNU.sparse") for name in records):
        return "sparse_member"
    return "" if size == header.size else "header_size"


def group_samples(members: Iterable[Member], *, text_first: str) -> Samples:
    """Group members into samples with an image and a text, and count the samples that are skipped.

    A sample is a run of members whose names agree up to the first dot after the folder (WebDataset's convention).
    `text_first` is `txt` or `json`, the text of a sample that has both, or `cls` or `npy` for labels instead.
    """
    texts = (text_first,) if text_first in LABEL_FORMATS else (text_first, "json" if text_first == "txt" else "txt")
    samples = Samples([], [], Counter())
    seen: set[bytes] = set()
    for sample in _group_by_key(_named_members(members, samples.skipped)):
        image = next((name for name in IMAGE_FORMATS if name in sample.members), None)
        text = next((name for name in texts if name in sample.members), None)
        if sample.key in seen:
            samples.skipped["duplicate_key"] += 1
        elif len(sample.extensions) > MAX_MEMBERS:
            samples.skipped["too_many_members"] += 1
        elif image is None or text is None:
            samples.skipped[sample.reason_to_skip(has_image=image is not None)] += 1
        else:
            image_at = (sample.members[image].offset, sample.members[image].size, IMAGE_FORMATS.index(image))
            text_at = (sample.members[text].offset, sample.members[text].size, TEXT_FORMATS.index(text))
            samples.keys.append(sample.key)
            samples.rows.append((*image_at, *text_at, sample.start, sample.end - sample.start))
        seen.add(sample.key)
    return samples


@dataclass
class _Sample:
    """Consecutive members with the same key; `members` holds the usable ones by format."""

    key: bytes
    start: int
    end: int = 0
    members: dict[str, Member] = field(default_factory=dict)
    extensions: set[bytes] = field(default_factory=set)
    problem: str = ""
    is_dotted: bool = False

    def add(self, extension: bytes, member: Member) -> None:
        """Add the next member of this key."""
        self.extensions.add(extension)
        self.end = member.end
        if member.problem == "oversize_header":
            self.problem = member.problem
            return
        name = _FORMAT_OF.get(extension)
        if name is None:
            self.is_dotted |= extension.rpartition(b".")[2] in _FORMAT_OF
        elif problem := _member_problem(member, _MAX_BYTES[name]):
            self.problem = problem
        else:
            self.members[name] = member

    def reason_to_skip(self, *, has_image: bool) -> str:
        """Return why the sample has no image or no text."""
        if self.problem:
            return self.problem
        if not self.members and self.is_dotted:
            return "dotted_name"  # `a.b.jpg` has the key `a` and the extension `b.jpg`
        return "missing_text" if has_image else "missing_image"


def _named_members(members: Iterable[Member], skipped: Counter[str]) -> Iterator[Member]:
    """Yield members with a key and an extension; count other files, except what macOS writes (`._NAME`)."""
    last_stem = b""
    for original in members:
        is_folder = original.name.lower().endswith(_FOLDER_ENDS)  # `a.jpg/`: counted as a member that is not a file
        member = original._replace(name=original.name[:-1]) if is_folder else original
        base = member.name[member.name.rfind(b"/") + 1 :]
        stem = member.name.rpartition(b".")[0]
        if member.problem == "oversize_header" or (not base.startswith(b".") and b"." in base):
            yield member
        elif member.kind == b"0" and not base.startswith(b"."):
            skipped["no_extension"] += 1
        elif member.kind == b"0" and not base.startswith(b"._") and stem != last_stem:
            skipped["hidden_name"] += 1
            last_stem = stem


def _group_by_key(members: Iterable[Member]) -> Iterator[_Sample]:
    """Group consecutive members of equal key; an extension that repeats starts a new sample."""
    sample: _Sample | None = None
    for member in members:
        dot = member.name.find(b".", member.name.rfind(b"/") + 1)
        key, extension = member.name[:dot], member.name[dot + 1 :].lower()
        if member.problem == "oversize_header":  # its full name is unknown
            key, extension = member.name, str(member.start).encode()
        if sample is None or key != sample.key or extension in sample.extensions:
            if sample is not None:
                yield sample
            sample = _Sample(key, member.start)
        sample.add(extension, member)
    if sample is not None:
        yield sample


def _member_problem(member: Member, max_bytes: int) -> str:
    """Return why a member cannot be part of a sample; empty if it can."""
    try:
        member.name.decode()
    except UnicodeDecodeError:
        return "unsafe_name"
    if member.name.startswith(b"/") or b"\0" in member.name or b".." in member.name.split(b"/"):
        return "unsafe_name"
    if member.problem:
        return member.problem
    if member.kind != b"0":
        return "not_a_file"
    if not member.size:
        return "empty_member"
    return "oversize_member" if member.size > max_bytes else ""
