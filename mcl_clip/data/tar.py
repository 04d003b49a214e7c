"""Tar files: parse headers into members, without reading payloads."""

import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from mcl_clip.core.errors import UserError
from mcl_clip.data.shards import redacted

BLOCK = 512
MAX_EXTENDED_HEADER_BYTES = 64 << 10
MAX_EXTENDED_HEADERS = 8  # of one member: tar programs write at most three
MAX_TAIL_BYTES = 1 << 20  # zeros after the end-of-archive marker; more are typical of an incomplete download
IMAGE_FORMATS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "avif")  # an index stores positions: add at the end
OTHER_IMAGE_FORMATS = ("heic", "heif", "ico", "jp2", "jxl", "pgm", "ppm", "psd", "svg", "tif", "tiff")  # not decoded
TEXT_FORMATS = ("txt", "json", "cls", "npy")
MAX_IMAGE_BYTES = 32 << 20
MAX_TXT_BYTES = 64 << 10
MAX_JSON_BYTES = 1 << 20
MAX_NPY_BYTES = 1 << 20
ReadAt = Callable[[int, int], bytes]

_ZEROS = bytes(BLOCK)
_NO_PAYLOAD = b"123456"  # links, devices, folders, pipes: `tarfile` ignores their size too
_RECORD = 20 * BLOCK  # the unit in which tar programs write
_TAIL_WINDOW = 64 << 10
_COMPRESSED = "compressed ({}); decompress it to a plain .tar file"
_OTHER_FILES = {
    b"\x1f\x8b": _COMPRESSED.format("gzip"),
    b"BZh": _COMPRESSED.format("bzip2"),
    b"\xfd7zXZ": _COMPRESSED.format("xz"),
    b"\x28\xb5\x2f\xfd": _COMPRESSED.format("zstd"),
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself; fetch it with `git lfs pull`",
    b"<!doctype html": "an HTML page, as servers send for errors and logins; download the file itself",
    b"<html": "an HTML page, as servers send for errors and logins; download the file itself",
}
# What `mcl_clip.data.writing` writes, and hardly any other program: mode 0444, no owner, group, date or names of them.
_OWN_FIELDS = {100: b"0000444\0" + 2 * b"0000000\0", 136: b"00000000000\0", 265: bytes(64)}


class DamagedShardError(UserError):
    """A tar file that ends early, or holds bytes that are no tar headers."""


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


def has_captions_by_line(header: bytes) -> bool:
    """Return whether the text member with this header block holds a caption on each line.

    In shards of others a .txt member is one caption, whose line ends mean nothing; several are a list in a JSON member.
    """
    return all(header[start : start + len(value)] == value for start, value in _OWN_FIELDS.items())


def end_of_archive(size: int) -> bytes:
    """Return the bytes that close a tar file of `size` bytes: two zero blocks, padded to a multiple of 10,240 bytes."""
    return bytes(2 * BLOCK + -(size + 2 * BLOCK) % _RECORD)


def read_members(view: "Window", location: str) -> Iterator[Member]:
    """Yield the members of a tar file in order; payloads that reach beyond the window are skipped.

    Raises:
        UserError: if the file is compressed, truncated or damaged; the message gives the byte.
    """
    try:
        start = view.get(0, min(view.size, BLOCK)).lower()
        if other := next((text for prefix, text in _OTHER_FILES.items() if start.startswith(prefix.lower())), ""):
            raise UserError(f"shard {redacted(location)} is {other}")
        position = 0
        while (member := _next_member(view, position)) is not None:
            position = member.end
            yield member
    except UserError:
        raise
    except ValueError as error:
        raise DamagedShardError(
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


class Window:
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
        if start < self.data_start:  # a caption before the image of its sample
            return self.read_at(start, start + length)
        if start + length > self.data_start + len(self.data):
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


def _next_member(view: Window, start: int) -> Member | None:
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
