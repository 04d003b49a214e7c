"""Which samples a tar file holds: runs of members with one key, an image and a text."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from mcl_clip.data.files import Patience, read_range
from mcl_clip.data.shards import is_remote
from mcl_clip.data.tar import Member, read_members

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


def scan_shard(location: str, size: int, *, text_first: str, patience: Patience) -> Samples:
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
