"""Writers of shards: training sets, and retrieval and classification sets in the layout of CLIP_benchmark.

The same samples give the same bytes. Output is written into a temporary folder beside its destination and renamed at
the end.
"""

import hashlib
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import webdataset as wds
from tqdm import tqdm

from mcl_clip.core.errors import UserError, shorten
from mcl_clip.core.files import atomic_dir
from mcl_clip.core.progress import Progress
from mcl_clip.data.decode import BadSampleError, decode_image, read_header
from mcl_clip.data.index import INDEX_NAME, ShardIndex
from mcl_clip.data.samples import IMAGES_ALONE
from mcl_clip.data.shards import expand_shards
from mcl_clip.data.tar import MAX_IMAGE_BYTES, MAX_JSON_BYTES, MAX_TXT_BYTES

EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # MPO: a JPEG followed by further images
MAX_KEY_LENGTH = 80  # a tar name holds 100 characters, extension included
CLEAN_KEY = re.compile(rf"[A-Za-z0-9_-]{{1,{MAX_KEY_LENGTH}}}")

Members = dict[str, str | bytes]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """An image and its captions, to be written as `key.jpg|png|webp`, `key.txt` and, with attributes, `key.json`.

    With wrong captions, `key.json` also has the captions at `caption`, and the wrong ones at `negatives`.
    """

    key: str
    image: bytes  # a JPEG, PNG or WebP file, stored as it is; of other formats the first frame as PNG; empty if missing
    captions: Sequence[str]
    attributes: Mapping[str, Any] | None = None
    negatives: Sequence[str] = ()
    source: str = ""  # path or row that the image comes from, shown in messages in place of the key


@dataclass(frozen=True, kw_only=True)
class LabelledImage:
    """An image file and the number of its class."""

    key: str
    image: bytes
    label: int


@dataclass(frozen=True, kw_only=True)
class LoneImage:
    """An image file without captions."""

    key: str
    image: bytes  # as in `Pair`
    source: str = ""  # as in `Pair`


class SetSize(NamedTuple):
    """Numbers of images and captions written."""

    images: int
    captions: int


def refuse_non_empty(folder: Path) -> None:
    """Raise UserError if there is a file or a non-empty folder at this path."""
    if folder.is_dir():
        if next(folder.iterdir(), None) is not None:
            raise UserError(f"the output folder {folder} is not empty; choose a new one, or delete it first")
    elif folder.exists():
        raise UserError(f"the output folder {folder} is a file; choose a folder that does not exist yet")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `out` if the block ends without an error and is deleted otherwise.

    Raises:
        UserError: if `out` is not empty, or cannot be replaced because it is a mount point or the current folder.
    """
    out = out.resolve()
    refuse_non_empty(out)
    if out.is_mount() or out == Path.cwd():
        raise UserError(
            f"the output folder {out} is a mount point or the current folder and cannot be replaced; choose a new "
            f"folder inside it"
        )
    with atomic_dir(out) as folder:
        yield folder


def clean_key(name: str) -> str:
    """Return a key for `name` of letters, digits, '_' and '-' only; different names give different keys.

    If a character had to be replaced, or the name is too long, a hash of the name is appended.
    """
    if CLEAN_KEY.fullmatch(name):
        return name
    digest = hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=6).hexdigest()
    return f"{re.sub('[^A-Za-z0-9_-]', '_', name)[: MAX_KEY_LENGTH - 13]}-{digest}"


def clean_captions(captions: Iterable[str]) -> list[str]:
    """Strip captions, join their lines, and drop empty ones.

    All line separators of `str.splitlines` become spaces, since readers take each line for a caption.
    """
    lines = (" ".join(caption.splitlines()).strip() for caption in captions)
    return [line.encode(errors="replace").decode() for line in lines if line]


def image_extension(data: bytes) -> str:
    """Return `jpg`, `png` or `webp`, judging by the content of an image file; empty if it is none of them."""
    try:
        return EXTENSIONS.get(read_header(data, max_pixels=sys.maxsize).format, "")
    except BadSampleError:
        return ""


def write_pairs(
    samples: Iterable[Pair],
    out: Path,
    *,
    samples_per_shard: int = 1000,
    total: int | None = None,
    max_bad_fraction: float = 0.01,
) -> ShardIndex:
    """Write `out`/000000.tar and so on in the order of the samples, with an index beside them; return the index.

    Samples without a usable image or caption are left out; a line at the end reports how many. A shard also ends at
    3 GB. `total`, the number of samples, is for the progress bar and to stop early at too many bad images.

    Raises:
        UserError: for an invalid or repeated key, more than `max_bad_fraction` of the images missing or unreadable, or
            if no sample is left.
    """
    checks = _Checks(out, total, max_bad_fraction)
    with new_folder(out) as folder:
        _write_shards(filter(None, map(checks.members_of, checks.follow(samples))), folder, "%06d", samples_per_shard)
        checks.finish()
        index = ShardIndex.build(expand_shards(folder))
        if len(index) != checks.images:
            raise RuntimeError(f"{checks.images} samples were written, {len(index)} found: {index.skipped_by_reason()}")
        index.save(folder / INDEX_NAME)
    return ShardIndex.load(out / INDEX_NAME, check=False)


def write_images(
    samples: Iterable[LoneImage],
    out: Path,
    *,
    samples_per_shard: int = 1000,
    total: int | None = None,
    max_bad_fraction: float = 0.01,
) -> ShardIndex:
    """Write shards of images alone, without captions; see `write_pairs`."""
    checks = _Checks(out, total, max_bad_fraction)

    def members() -> Iterator[Members]:
        for sample in checks.follow(samples):
            extension, image = checks.stored(sample.key, sample.image, sample.source)
            if extension:
                yield {extension: image, "__key__": sample.key}
                checks.images += 1

    with new_folder(out) as folder:
        _write_shards(members(), folder, "%06d", samples_per_shard)
        checks.finish()
        ShardIndex.build(expand_shards(folder), rule=IMAGES_ALONE).save(folder / INDEX_NAME)
    return ShardIndex.load(out / INDEX_NAME, check=False)


def write_retrieval_set(
    samples: Iterable[Pair],
    out: Path,
    *,
    samples_per_shard: int = 1000,
    total: int | None = None,
    max_bad_fraction: float = 0.01,
) -> SetSize:
    """Write a retrieval set as CLIP_benchmark reads it: `out`/test/0.tar and so on, with images and captions only.

    Samples are named s0000000 and so on; line n of `keys.txt`, counted from 0, is the original key of sample n.
    Arguments and errors as for `write_pairs`.
    """
    checks = _Checks(out, total, max_bad_fraction)
    keys: list[str] = []

    def numbered() -> Iterator[Members]:
        for pair in checks.follow(samples):
            if members := checks.members_of(pair):
                members.pop("json", None)
                yield {**members, "__key__": f"s{len(keys):07d}"}
                keys.append(pair.key)

    files = {"dataset_type.txt": ["retrieval"], "keys.txt": keys}
    return _write_test_set(numbered(), checks, samples_per_shard, files)


def write_classification_set(
    samples: Iterable[LabelledImage],
    out: Path,
    *,
    classnames: Sequence[str],
    templates: Sequence[str],
    samples_per_shard: int = 1000,
    total: int | None = None,
) -> SetSize:
    """Write a zero-shot classification set as CLIP_benchmark reads it: images with `.cls`, class names and templates.

    Labels count from 0 in the order of `classnames`; each template has `{c}` in place of the class name. Other
    arguments are those of `write_pairs`.

    Raises:
        UserError: for a label without a class, a template without `{c}`, and as `write_pairs`.
    """
    _check_names(classnames, templates)
    checks = _Checks(out, total)

    def numbered() -> Iterator[Members]:
        for sample in checks.follow(samples):
            if not 0 <= sample.label < len(classnames):
                raise UserError(f"{sample.key} has the label {sample.label}; there are {len(classnames)} class names")
            extension, image = checks.stored(sample.key, sample.image)
            if extension:
                yield {extension: image, "cls": str(sample.label).encode(), "__key__": f"s{checks.images:07d}"}
                checks.images += 1

    files = {"classnames.txt": classnames, "zeroshot_classification_templates.txt": templates}
    return _write_test_set(numbered(), checks, samples_per_shard, files)


def _check_names(classnames: Sequence[str], templates: Sequence[str]) -> None:
    for name in (*classnames, *templates):
        if clean_captions([name]) != [name]:
            raise UserError(
                f"the class name or template {shorten(repr(name))} is empty, padded or longer than a line; correct it"
            )
    if again := [name for name, count in Counter(classnames).items() if count > 1]:
        raise UserError(f"class names must differ; {shorten(repr(again[0]))} occurs twice")
    for template in templates:
        if "{c}" not in template:
            raise UserError(
                f"the template {shorten(repr(template))} has no {{c}} for the class name; write 'a photo of a {{c}}'"
            )
    if not classnames or not templates:
        raise UserError("a classification set needs at least one class name and one template")


@dataclass
class _Checks:
    """Validates the samples of a set one by one, and counts what is left out, by reason."""

    out: Path
    total: int | None
    max_bad_fraction: float = 0.01
    images: int = 0
    captions: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    bad_images: Counter[str] = field(default_factory=Counter)
    first_bad: str = ""
    turned: int = 0
    keys: set[str] = field(default_factory=set)

    def follow(self, samples: Iterable[Any]) -> Iterator[Any]:
        """Yield the samples with a progress bar."""
        return iter(Progress(samples, total=self.total, desc=f"writing {self.out.name}", unit="sample"))

    def members_of(self, pair: Pair) -> Members | None:
        """Return the members of a sample, or None if it is left out."""
        extension, image = self.stored(pair.key, pair.image, pair.source)
        captions = clean_captions(pair.captions)
        self.left_out["empty captions dropped"] += len(pair.captions) - len(captions)
        if not extension:
            return None
        text = "\n".join(captions).encode()
        stored = pair.attributes
        if negatives := clean_captions(pair.negatives):
            stored = {**(stored or {}), "caption": captions, "negatives": negatives}
        attributes = b"" if stored is None else json.dumps(stored, ensure_ascii=False).encode()
        if not captions or len(text) > MAX_TXT_BYTES or len(attributes) > MAX_JSON_BYTES:
            reason = "samples with too long a text left out" if captions else "samples without captions left out"
            self.left_out[reason] += 1
            return None
        self.images += 1
        self.captions += len(captions)
        members: Members = {"__key__": pair.key, extension: image, "txt": text}
        return members | {"json": attributes} if attributes else members

    def stored(self, key: str, image: bytes, source: str = "") -> tuple[str, bytes]:
        """Check key and image of a sample; return the extension and content of the image, both empty if it is bad."""
        if not CLEAN_KEY.fullmatch(key):
            raise UserError(
                f"the key {shorten(repr(key))} is not 1 to {MAX_KEY_LENGTH} letters, digits, '_' and '-'; use "
                f"clean_key(name)"
            )
        if key in self.keys:
            raise UserError(f"the key {key!r} occurs twice; give every sample a unique key")
        self.keys.add(key)
        if not image or len(image) > MAX_IMAGE_BYTES:
            reason = f"images over {MAX_IMAGE_BYTES >> 20} MiB" if image else "missing images"
        elif extension := image_extension(image):
            self.turned += read_header(image, max_pixels=sys.maxsize).orientation != 1
            return extension, image
        else:
            try:
                file = io.BytesIO()
                decode_image(image).save(file, "PNG")
                self.left_out["images of other formats stored as PNG"] += 1
                return "png", file.getvalue()
            except BadSampleError as error:
                name = error.reason.removeprefix("format_")
                reason = "unreadable images" if name == error.reason else f"files of format {name}"
        self.bad_images[reason] += 1
        self.first_bad = self.first_bad or f"{shorten(source or key)} ({reason})"
        if self.total:
            self._check_bad(self.total)
        return "", b""

    def finish(self) -> None:
        """Report what was left out; raise UserError if too many images were bad, or no sample is left."""
        seen = len(self.keys)
        self._check_bad(seen)
        left_out = _format_counts(self.left_out + self.bad_images)
        if not self.images:
            raise UserError(f"no sample is left for {self.out}: {seen} given, {left_out or 'none left out'}")
        if left_out:
            tqdm.write(f"{self.out.name}: {self.images} of {seen} samples written ({left_out})")
        if self.turned:
            tqdm.write(
                f"{self.out.name}: {self.turned} images are stored turned, with an EXIF orientation by which they are "
                f"read upright"
            )

    def _check_bad(self, of: int) -> None:
        if self.bad_images.total() > self.max_bad_fraction * of:
            raise UserError(
                f"{self.bad_images.total()} of {of} images are bad ({_format_counts(self.bad_images)}), more than "
                f"--max-bad-fraction {self.max_bad_fraction:g} allows; the first is {self.first_bad}; fix them or "
                f"raise the limit"
            )


def _format_counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {reason}" for reason, number in counts.items() if number)


def _write_shards(samples: Iterable[Members], folder: Path, pattern: str, samples_per_shard: int) -> int:
    """Write tar files with fixed dates and owners, and return their number."""
    if samples_per_shard < 1:
        raise UserError(f"--samples-per-shard is {samples_per_shard}; it must be at least 1")
    files: list[IO[bytes]] = []

    def opener(name: str) -> IO[bytes]:  # webdataset's own opener takes names with '#', '?' and ':' for URLs
        files.append((folder / name).open("wb"))
        return files[-1]

    settings: dict[str, Any] = {"mtime": 0, "user": "", "group": "", "mode": 0o444, "encoder": False, "verbose": 0}
    settings |= {"maxcount": samples_per_shard, "opener": opener, "post": lambda _: files[-1].close()}
    try:
        with wds.ShardWriter(f"{pattern}.tar", **settings) as writer:
            for sample in samples:
                writer.write(sample)
    finally:
        for file in files:
            file.close()
    return len(files)


def _write_test_set(
    samples: Iterable[Members], checks: _Checks, samples_per_shard: int, files: Mapping[str, Sequence[str]]
) -> SetSize:
    """Write a set of CLIP_benchmark: shards in test/, and lines of text in `files`, read once all samples are there."""
    with new_folder(checks.out) as folder:
        (folder / "test").mkdir()
        shards = _write_shards(samples, folder / "test", "%d", samples_per_shard)
        checks.finish()
        for name, lines in {**files, "test/nshards.txt": [str(shards)]}.items():
            (folder / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return SetSize(checks.images, checks.captions)
