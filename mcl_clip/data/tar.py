"""The headers of a tar file: where its members lie. Payloads are skipped, never read."""

import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from mcl_clip.core.errors import UserError
from mcl_clip.data.shards import is_remote, redacted
from mcl_clip.data.storage import RetryPolicy, read_range

BLOCK = 512
MAX_EXTENDED_HEADER_BYTES = 64 << 10
MAX_EXTENDED_HEADERS = 8  # of one member: tar programs write at most three
MAX_TAIL_BYTES = 1 << 20  # zeros after the end-of-archive mark; more are what a broken download leaves
_ZEROS = bytes(BLOCK)
_NO_PAYLOAD = b"123456"  # links, devices, folders, pipes: `tarfile` ignores their size too
_RECORD = 20 * BLOCK  # the unit in which tar programs write
_TAIL_WINDOW = 64 << 10
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
ReadAt = Callable[[int, int], bytes]
IMAGE_FORMATS = ("jpg", "jpeg", "png", "webp")
TEXT_FORMATS = ("txt", "json", "cls", "npy")
LABEL_FORMATS = ("cls", "npy")  # of classification sets
MAX_IMAGE_BYTES = 32 << 20
MAX_TXT_BYTES = 64 << 10
MAX_JSON_BYTES = 1 << 20
MAX_NPY_BYTES = 1 << 20
MAX_MEMBERS = 16
_CAPS = {
    **dict.fromkeys(IMAGE_FORMATS, MAX_IMAGE_BYTES),
    "txt": MAX_TXT_BYTES,
    "json": MAX_JSON_BYTES,
    "cls": 64,
    "npy": MAX_NPY_BYTES,
}
_MEMBER_FORMATS = {name.encode(): name for name in _CAPS}
_FOLDER_ENDS = tuple(b".%s/" % name for name in _MEMBER_FORMATS)
_LOCAL_WINDOW = 8 << 10  # from the end of one image over its caption to the next image
_REMOTE_WINDOW = 4 << 20


class Header(NamedTuple):
    """A header block: the name and size it states, and its type flag (`b"0"` is a regular file)."""

    name: bytes
    size: int
    kind: bytes


class Member(NamedTuple):
    """A member: headers and padded payload fill bytes `start` to `end`, the payload `offset` to `offset + size`."""

    name: bytes
    kind: bytes
    start: int
    offset: int
    size: int
    end: int
    problem: str


def parse_header(block: bytes) -> Header:
    """What a header block of 512 bytes says.

    Raises:
        ValueError: if it is not a header, or its checksum does not fit.
    """
    if len(block) != BLOCK:
        raise ValueError("a header is cut off")
    # The low half of Adler-32 is 1 + the sum of the bytes modulo 65521: much quicker than adding them up in Python.
    total = (zlib.adler32(block) & 0xFFFF) - 1 - sum(block[148:156]) + 8 * ord(" ")
    if (total - _number(block[148:156])) % 65521:
        raise ValueError("the checksum of a header does not fit")
    name = block[:100].split(b"\0", 1)[0]
    kind = block[156:157]
    if block[257:263] == b"ustar\0" and block[345]:
        name = block[345:500].split(b"\0", 1)[0] + b"/" + name
    if kind == b"\0":
        kind = b"5" if name.endswith(b"/") else b"0"
    return Header(name, _number(block[124:136]), b"0" if kind == b"7" else kind)


def end_of_archive(size: int) -> bytes:
    """What closes a tar file of `size` bytes: two blocks of zeros, and more up to a multiple of 10,240 bytes."""
    return bytes(2 * BLOCK + -(size + 2 * BLOCK) % _RECORD)


def read_members(read_at: ReadAt, size: int, location: str, *, window: int) -> Iterator[Member]:
    """The members of a tar file of `size` bytes, in order.

    Args:
        read_at: Gives the bytes between two positions of the file.
        size: Bytes of the file.
        location: Path or URL, for messages.
        window: How many bytes to read at once; payloads beyond it are skipped.

    Raises:
        UserError: if the file is compressed, cut off or damaged; names the byte.
    """
    view = _Window(read_at, size, window)
    position = 0
    try:
        _check_uncompressed(view.get(0, 8), location)
        while True:
            member, position = _next_member(view, position)
            if member is None:
                return
            yield member
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"shard {redacted(location)} is damaged: {error} at byte {view.position} of {size}; fetch or write it again"
        ) from error


def _next_member(view: "_Window", start: int) -> tuple[Member | None, int]:
    """The member whose headers start at `start` (none at the end of the archive), and where the next one starts."""
    position, problem, count, has_link = start, "", 0, False
    records: dict[bytes, bytes] = {}
    while True:
        block = view.get(position, BLOCK)
        if block == _ZEROS:
            if position != start:
                raise ValueError("an extended header has no member")
            view.check_end(position)
            return None, position
        header = parse_header(block)
        if header.kind not in (b"x", b"g", b"L", b"K"):
            break
        count += 1
        if count > MAX_EXTENDED_HEADERS:
            raise ValueError(f"more than {MAX_EXTENDED_HEADERS} extended headers stand in a row")
        position += BLOCK
        if header.size <= MAX_EXTENDED_HEADER_BYTES:
            found = _records(header.kind, view.get(position, header.size))
            records |= found if header.kind in b"xL" else {}
        else:
            problem = "oversize_header"
        position = view.skip(position, header.size)
        if header.kind == b"g" and not records and not problem:
            start, count = position, 0  # holds for the whole archive, not for the next member
        has_link |= header.kind == b"K"
    if has_link and header.kind not in b"12":
        raise ValueError("the long name of a link is followed by no link")
    size = int(records.get(b"size", header.size))
    offset = position + BLOCK
    end = view.skip(offset, 0 if header.kind in _NO_PAYLOAD else size)
    problem = problem or _odd_size(header, size, records)
    return Member(records.get(b"path", header.name), header.kind, start, offset, size, end, problem), end


def _odd_size(header: Header, size: int, records: dict[bytes, bytes]) -> str:
    """Why the payload is not simply what the header block says; empty if it is."""
    if header.kind == b"S":
        raise ValueError("a sparse member (write the tar without --sparse) stands")
    if any(name.startswith(b"GNU.sparse") for name in records):
        return "sparse_member"
    return "" if size == header.size else "header_size"


class _Window:
    """Reads forward through a file, `window` bytes at a time."""

    def __init__(self, read_at: ReadAt, size: int, window: int):
        self.read_at, self.size, self.window = read_at, size, window
        self.data, self.data_start = b"", 0
        self.position = 0

    def get(self, start: int, length: int) -> bytes:
        """`length` bytes at `start`."""
        self.position = start
        if start + length > self.size:
            raise ValueError(f"the file ends {'without an end-of-archive mark' if start >= self.size else 'too early'}")
        if not self.data_start <= start <= start + length <= self.data_start + len(self.data):
            self.data = self.read_at(start, min(self.size, start + max(length, self.window)))
            self.data_start = start
        return self.data[start - self.data_start : start - self.data_start + length]

    def skip(self, start: int, length: int) -> int:
        """Where the next header stands, after a payload of `length` bytes at `start`."""
        if length < 0 or start + length > self.size:
            self.position = start
            raise ValueError(f"a payload of {length} bytes does not fit into the file")
        return start + -(-length // BLOCK) * BLOCK

    def check_end(self, position: int) -> None:
        """Stop unless an archive ends here: two blocks of zeros and nothing after them."""
        if self.get(position + BLOCK, BLOCK) != _ZEROS:
            raise ValueError("a single block of zeros stands inside the archive")
        start = position + 2 * BLOCK
        if self.size - start > MAX_TAIL_BYTES:
            self.position = start
            raise ValueError(f"{self.size - start} bytes follow the end-of-archive mark (a broken download?)")
        for place in range(start, self.size, _TAIL_WINDOW):
            if self.get(place, min(self.size - place, _TAIL_WINDOW)).strip(b"\0"):
                raise ValueError("data follow the end-of-archive mark (joined tar files?)")


def _check_uncompressed(start: bytes, location: str) -> None:
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            raise UserError(f"shard {redacted(location)} is compressed ({name}); unpack it to a plain .tar file")


def _number(data: bytes) -> int:
    """A number field: octal digits, or base 256 behind a byte 0x80."""
    if data[0] == 0x80:
        return int.from_bytes(data[1:], "big")
    digits = data.split(b"\0", 1)[0].strip()
    if digits and not digits.isdigit():
        raise ValueError("a number in a header is malformed")
    return int(digits or b"0", 8)


def _records(kind: bytes, data: bytes) -> dict[bytes, bytes]:
    """The records of a PAX header, or the path in a GNU long name."""
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


class Row(NamedTuple):
    """A sample: offsets are bytes in the tar; formats index IMAGE_FORMATS and TEXT_FORMATS."""

    image_offset: int
    image_size: int
    image_format: int
    text_offset: int
    text_size: int
    text_format: int
    sample_offset: int
    sample_size: int


class Samples(NamedTuple):
    """The usable samples of a shard, and how many others were skipped for which reason."""

    keys: list[bytes]
    rows: list[Row]
    skipped: Counter[str]


def scan_shard(location: str, size: int, *, text_first: str, patience: RetryPolicy) -> Samples:
    """The samples of a shard of `size` bytes, from one pass over its headers.

    Raises:
        UserError: if the shard is gone, compressed, cut off or damaged.
        OSError: if it cannot be read after all repeats.
    """
    if is_remote(location):
        members = read_members(
            lambda start, end: read_range(location, start, end, patience), size, location, window=_REMOTE_WINDOW
        )
        return group_samples(members, text_first=text_first)
    with open(location, "rb", buffering=0) as file:
        descriptor = file.fileno()
        members = read_members(
            lambda start, end: os.pread(descriptor, end - start, start), size, location, window=_LOCAL_WINDOW
        )
        return group_samples(members, text_first=text_first)


@dataclass
class _Sample:
    """The neighbouring members of one key."""

    key: bytes
    start: int
    end: int = 0
    found: dict[str, Member] = field(default_factory=dict)
    extensions: set[bytes] = field(default_factory=set)
    problem: str = ""
    is_dotted: bool = False

    def add(self, extension: bytes, member: Member) -> None:
        self.extensions.add(extension)
        self.end = member.end
        if member.problem == "oversize_header":
            self.problem = member.problem
            return
        name = _MEMBER_FORMATS.get(extension)
        if name is None:
            self.is_dotted |= extension.rpartition(b".")[2] in _MEMBER_FORMATS
        elif problem := _problem(member, name):
            self.problem = problem
        else:
            self.found[name] = member

    def missing(self, image: str | None) -> str:
        """Why there is no pair."""
        if self.problem:
            return self.problem
        if not self.found and self.is_dotted:
            return "dotted_name"  # `a.b.jpg` has the key `a` and the extension `b.jpg`
        return "missing_image" if image is None else "missing_text"


def group_samples(members: Iterable[Member], *, text_first: str) -> Samples:
    """The samples with an image and a text, and the count of the others.

    A sample is a run of members whose names agree up to the first dot after the folder (WebDataset's convention).

    Args:
        members: The members of one shard, in order.
        text_first: `txt` or `json`: which of them is the text of a sample that has both; or `cls` or `npy`, for
            the labels of a classification set.
    """
    order = (text_first,) if text_first in LABEL_FORMATS else (text_first, "json" if text_first == "txt" else "txt")
    keys: list[bytes] = []
    rows: list[Row] = []
    skipped: Counter[str] = Counter()
    seen: set[bytes] = set()
    for sample in _samples(_visible(members, skipped)):
        image = next((name for name in IMAGE_FORMATS if name in sample.found), None)
        text = next((name for name in order if name in sample.found), None)
        if sample.key in seen:
            skipped["duplicate_key"] += 1
        elif len(sample.extensions) > MAX_MEMBERS:
            skipped["too_many_members"] += 1
        elif image is None or text is None:
            skipped[sample.missing(image)] += 1
        else:
            keys.append(sample.key)
            rows.append(_row(sample, image, text))
        seen.add(sample.key)
    return Samples(keys, rows, skipped)


def _visible(members: Iterable[Member], skipped: Counter[str]) -> Iterator[Member]:
    """The members with a key and an extension. Other files are counted, but for what macOS writes (`._NAME`)."""
    last = b""
    for found in members:
        is_in_place_of_a_file = found.name.lower().endswith(_FOLDER_ENDS)
        member = found._replace(name=found.name[:-1]) if is_in_place_of_a_file else found
        stem = member.name.rpartition(b".")[0]
        base = member.name[member.name.rfind(b"/") + 1 :]
        if member.problem == "oversize_header" or (not base.startswith(b".") and b"." in base):
            yield member
        elif member.kind == b"0" and not base.startswith(b"."):
            skipped["no_extension"] += 1
        elif member.kind == b"0" and not base.startswith(b"._") and stem != last:
            skipped["hidden_name"] += 1
            last = stem


def _samples(members: Iterable[Member]) -> Iterator[_Sample]:
    sample: _Sample | None = None
    for member in members:
        key, extension = _split(member.name)
        if member.problem == "oversize_header":  # its name is not known, perhaps the start of it
            key, extension = member.name, str(member.start).encode()
        if sample is None or key != sample.key or extension in sample.extensions:
            if sample is not None:
                yield sample
            sample = _Sample(key, member.start)
        sample.add(extension, member)
    if sample is not None:
        yield sample


def _split(name: bytes) -> tuple[bytes, bytes]:
    """Key and lower-case extension."""
    dot = name.find(b".", name.rfind(b"/") + 1)
    return name[:dot], name[dot + 1 :].lower()


def _row(sample: _Sample, image: str, text: str) -> Row:
    picture, caption = sample.found[image], sample.found[text]
    return Row(
        image_offset=picture.offset,
        image_size=picture.size,
        image_format=IMAGE_FORMATS.index(image),
        text_offset=caption.offset,
        text_size=caption.size,
        text_format=TEXT_FORMATS.index(text),
        sample_offset=sample.start,
        sample_size=sample.end - sample.start,
    )


def _problem(member: Member, name: str) -> str:
    """Why a member cannot be part of a row; empty if it can."""
    if _is_unsafe(member.name):
        return "unsafe_name"
    if member.problem:
        return member.problem
    if member.kind != b"0":
        return "not_a_file"
    if member.size > _CAPS[name]:
        return "oversize_member"
    return "" if member.size else "empty_member"


def _is_unsafe(name: bytes) -> bool:
    if name.startswith(b"/") or b"\0" in name or b".." in name.split(b"/"):
        return True
    try:
        name.decode()
    except UnicodeDecodeError:
        return True
    return False
