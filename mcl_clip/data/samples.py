"""Samples of a shard: which members of a tar file make an image-text pair, or an image, and why others are left out."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial

from mcl_clip.data.shards import is_remote
from mcl_clip.data.storage import RetryPolicy, read_range
from mcl_clip.data.tar import (
    BLOCK,
    IMAGE_FORMATS,
    MAX_IMAGE_BYTES,
    MAX_JSON_BYTES,
    MAX_NPY_BYTES,
    MAX_TXT_BYTES,
    OTHER_IMAGE_FORMATS,
    TEXT_FORMATS,
    DamagedShardError,
    Member,
    ReadAt,
    Window,
    has_captions_by_line,
    read_members,
)

MAX_MEMBERS = 16
DAMAGED = "damaged_shard"  # the reason that counts shards and not samples
FindProblem = Callable[[bytes, str], tuple[str, str] | None]  # of a text and its format: a reason and its details

_LOCAL_WINDOW = 8 << 10  # spans the end of one image, its caption and the header of the next image
_REMOTE_WINDOW = 4 << 20
_MAX_BYTES = {
    **dict.fromkeys(IMAGE_FORMATS, MAX_IMAGE_BYTES),
    "txt": MAX_TXT_BYTES,
    "json": MAX_JSON_BYTES,
    "cls": 64,
    "npy": MAX_NPY_BYTES,
}
_MAX_NAMED, _MAX_EXAMPLE = 4, 200  # members that an example names, and its bytes


@dataclass(frozen=True, kw_only=True)
class SampleRule:
    """Which members of a tar file make a sample; where one has several images or texts, the first extension counts.

    Without extensions of `texts`, a sample is an image alone: its row has a text of 0 bytes.
    """

    images: tuple[str, ...] = IMAGE_FORMATS
    texts: tuple[str, ...] = ("txt", "json")
    has_dotted_keys: bool = False  # a key ends before one of these extensions, and not at its first dot
    caption_key: str = "caption"  # of a JSON object
    needs_caption: bool = True  # leave out samples whose text has no caption
    skip_damaged: bool = False  # keep the samples before the damage of a shard, which is an error otherwise

    @cached_property
    def formats(self) -> dict[bytes, str]:
        """The format of each extension; those that are not known hold images and plain text."""
        images = {name: name if name in IMAGE_FORMATS else IMAGE_FORMATS[0] for name in self.images}
        texts = {name: name if name in TEXT_FORMATS else TEXT_FORMATS[name.endswith("json")] for name in self.texts}
        return {name.encode(): form for name, form in (images | texts).items()}


IMAGES_ALONE = SampleRule(texts=(), needs_caption=False)


@dataclass
class Samples:
    """The usable samples of a shard, and how many others were skipped for which reason, with an example of each.

    A row has the columns of an index: offset, size and format of image and text, offset and size of the sample.
    `joined_lines` counts .txt members of several lines that are one caption.
    """

    keys: list[bytes] = field(default_factory=list)
    rows: list[tuple[int, ...]] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    joined_lines: int = 0

    def skip(self, reason: str, example: str) -> None:
        """Count a sample that is not used."""
        self.skipped[reason] += 1
        self.examples.setdefault(reason, example)


def scan_shard(location: str, size: int, rule: SampleRule, *, find_problem: FindProblem, retry: RetryPolicy) -> Samples:
    """List the samples of a shard of `size` bytes, in one pass over its headers.

    `find_problem` is called with the bytes and the format of each text, and says why it has no caption.

    Raises:
        UserError: if the shard is missing, compressed, truncated or damaged.
        OSError: if reading still fails after all retries.
    """
    if is_remote(location):
        window = Window(partial(read_range, location, retry=retry), size, _REMOTE_WINDOW)
        return group_samples(read_members(window, location), rule, window.get, find_problem)
    with open(location, "rb", buffering=0) as file:
        window = Window(lambda start, end: os.pread(file.fileno(), end - start, start), size, _LOCAL_WINDOW)
        return group_samples(read_members(window, location), rule, window.get, find_problem)


def group_samples(members: Iterable[Member], rule: SampleRule, read: ReadAt, find_problem: FindProblem) -> Samples:
    """Group members into samples with an image and a text, and count the samples that are skipped.

    A sample is a run of members with the same key: names agree up to the first dot after the folder (WebDataset's
    convention) or, with `rule.has_dotted_keys`, up to the extension. `read(start, length)` returns bytes of the tar.
    """
    samples, seen = Samples(), set[bytes]()
    try:
        for sample in _group_by_key(_named_members(members, rule, samples.skipped), rule):
            image = next((name for name in rule.images if name in sample.members), None)
            text = next((name for name in rule.texts if name in sample.members), None)
            if sample.key in seen:
                samples.skip("duplicate_key", sample.name_members())
            elif sample.dotted and not sample.members:
                for stem in sample.dotted:
                    samples.skip("dotted_name", sample.name_members(stem))
            elif len(sample.extensions) > MAX_MEMBERS:
                samples.skip("too_many_members", sample.name_members())
            elif image is None or (text is None and rule.texts):
                other = next((name for name in OTHER_IMAGE_FORMATS if name.encode() in sample.extensions), None)
                missing = "missing_text" if image else f"format_{other}" if other else "missing_image"
                samples.skip(sample.problem or missing, sample.name_members())
            else:
                _add_row(samples, sample, (image, text), rule, read, find_problem)
            seen.add(sample.key)
    except DamagedShardError as error:
        if not rule.skip_damaged:
            raise
        samples.skip(DAMAGED, str(error))
    return samples


def _add_row(
    samples: Samples,
    sample: "_Sample",
    names: tuple[str, str | None],
    rule: SampleRule,
    read: ReadAt,
    find_problem: FindProblem,
) -> None:
    """Add the sample with this image and text, if any, or skip it if the text has no caption."""
    image_name, text_name = names
    image, span = sample.members[image_name], (sample.start, sample.end - sample.start)
    image_at = (image.offset, image.size, IMAGE_FORMATS.index(rule.formats[image_name.encode()]))
    if text_name is None:
        samples.keys.append(sample.key)
        samples.rows.append((*image_at, image.offset, 0, 0, *span))
        return
    text, text_format = sample.members[text_name], rule.formats[text_name.encode()]
    if rule.needs_caption:
        data = read(text.offset, text.size)
        if (problem := find_problem(data, text_format)) is not None:
            samples.skip(problem[0], ": ".join(filter(None, (sample.name_members(), problem[1]))))
            return
        if text_format == "txt" and b"\n" in data.strip():
            samples.joined_lines += not has_captions_by_line(read(text.offset - BLOCK, BLOCK))
    text_at = (text.offset, text.size, TEXT_FORMATS.index(text_format))
    samples.keys.append(sample.key)
    samples.rows.append((*image_at, *text_at, *span))


@dataclass
class _Sample:
    """Consecutive members with the same key; `members` holds the usable ones by extension.

    `extensions` are in order; `dotted` has what is between the key and a known extension, as in `a.b.jpg`.
    """

    key: bytes
    start: int
    end: int = 0
    members: dict[str, Member] = field(default_factory=dict)
    extensions: dict[bytes, None] = field(default_factory=dict)
    problem: str = ""
    dotted: dict[bytes, None] = field(default_factory=dict)

    def add(self, extension: bytes, member: Member, rule: SampleRule) -> None:
        """Add the next member of this key."""
        self.extensions[extension] = None
        self.end = member.end
        if member.problem == "oversize_header":
            self.problem = member.problem
        elif (form := rule.formats.get(extension)) is None:
            stem, _, last = extension.rpartition(b".")
            if last in rule.formats:
                self.dotted[stem] = None
        elif problem := _member_problem(member, _MAX_BYTES[form]):
            is_caption = form in TEXT_FORMATS and rule.needs_caption
            self.problem = "empty_caption" if problem == "empty_member" and is_caption else problem
        else:
            self.members[extension.decode()] = member

    def name_members(self, stem: bytes = b"") -> str:
        """Name the first members, those that begin with `stem` after the key."""
        names = [b"%s.%s" % (self.key, name) for name in self.extensions if name.startswith(stem)]
        shown = b", ".join(names[:_MAX_NAMED]) + (b" ..." if len(names) > _MAX_NAMED else b"")
        return shown[:_MAX_EXAMPLE].decode(errors="backslashreplace")


def _named_members(members: Iterable[Member], rule: SampleRule, skipped: Counter[str]) -> Iterator[Member]:
    """Yield members with a key and an extension; count other files, except what macOS writes (`._NAME`)."""
    last_stem, folder_ends = b"", tuple(b".%s/" % name for name in rule.formats)
    for original in members:
        is_folder = original.name.lower().endswith(folder_ends)  # `a.jpg/`: counted as a member that is not a file
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


def _group_by_key(members: Iterable[Member], rule: SampleRule) -> Iterator[_Sample]:
    """Group consecutive members of equal key; an extension that repeats starts a new sample."""
    sample: _Sample | None = None
    for member in members:
        key, extension = _split_name(member.name, rule, sample)
        if member.problem == "oversize_header":  # its full name is unknown
            key, extension = member.name, str(member.start).encode()
        if sample is None or key != sample.key or extension in sample.extensions:
            if sample is not None:
                yield sample
            sample = _Sample(key, member.start)
        sample.add(extension, member, rule)
    if sample is not None:
        yield sample


def _split_name(name: bytes, rule: SampleRule, sample: _Sample | None) -> tuple[bytes, bytes]:
    """Split the name of a member into the key and the extension, in lower case; `sample` is the one before it."""
    if not rule.has_dotted_keys:
        dot = name.find(b".", name.rfind(b"/") + 1)
        return name[:dot], name[dot + 1 :].lower()
    lower = name.lower()
    if known := max((end for end in rule.formats if lower.endswith(b"." + end)), key=len, default=b""):
        return name[: -len(known) - 1], known
    if sample is not None and name.startswith(sample.key + b"."):  # `a.mask.png` after `a.jpg`
        return sample.key, lower[len(sample.key) + 1 :]
    key, _, extension = name.rpartition(b".")
    return key, extension.lower()


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
