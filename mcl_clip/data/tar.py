"""The headers of a tar file: where its members lie. Payloads are skipped, never read."""

import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from mcl_clip.data.shards import redacted
from mcl_clip.errors import UserError

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
