"""The pairs of an audit: a sample of shards or of a retrieval set, with the attributes that come with them."""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int
from PIL import Image

from mcl_clip.core.distributed import sample_of_permutation
from mcl_clip.core.errors import UserError, shorten_list
from mcl_clip.data.decode import BadSampleError, decode_captions, decode_image
from mcl_clip.data.index import RULE, ShardIndex
from mcl_clip.data.reader import Reader
from mcl_clip.data.samples import SampleRule
from mcl_clip.data.shards import expand_shards
from mcl_clip.eval.datasets import layout_of
from mcl_clip.eval.embed import find_shards

MIN_PAIRS = 32
NOT_ATTRIBUTES = ("caption", "negatives")


@dataclass(frozen=True, kw_only=True)
class AuditOptions:
    """What an audit looks at."""

    pictures: int = 1000
    """Pictures with captions, drawn from all."""
    words: Path | None = None
    """File of words that replace each other, by kind (JSON); by default that of the package."""
    caption_key: str = ""
    """Captions are at this key of .json members, in place of .txt members."""
    images: bool = True
    """Include small images in audit.html, and copies of the pictures in swaps."""
    seed: int = 0
    """Seed of the sample, the swaps and the random words."""


@dataclass(frozen=True)
class SampledImages:
    """The images of some rows of shards."""

    reader: Reader
    rows: Int[np.ndarray, " images"]

    def __len__(self) -> int:
        return len(self.rows)

    def images(self, rows: Int[np.ndarray, " batch"]) -> Iterator[Image.Image]:
        """Yield the images of `rows`; raise UserError for one that cannot be decoded."""
        for number, sample in zip(rows.tolist(), self.reader.read(self.rows[rows]), strict=True):
            try:
                yield decode_image(sample.image)
            except BadSampleError as error:
                raise UserError(
                    f"image {self.key(number)} cannot be decoded ({error}); write the shards again"
                ) from error

    def files(self, rows: Int[np.ndarray, " batch"]) -> list[bytes]:
        """Return the image files of `rows`."""
        return [sample.image for sample in self.reader.read(self.rows[rows])]

    def key(self, row: int) -> str:
        """Return the key of an image."""
        return self.reader.index.key(int(self.rows[row]))


@dataclass(frozen=True, kw_only=True)
class AuditData:
    """Pictures with their captions; `attributes` has values of them by name, as far as the data has any."""

    name: str
    source: SampledImages
    captions: Sequence[Sequence[str]]
    attributes: Mapping[str, Sequence[str]]
    total: int  # pictures of all data
    digest: str

    @property
    def keys(self) -> list[str]:
        """The keys of the pictures."""
        return [self.source.key(row) for row in range(len(self.source))]


def open_audit_data(data: Sequence[str], options: AuditOptions) -> AuditData:
    """Open a sample of pictures with captions; pictures that cannot be decoded are left out.

    `data` names a retrieval set, or shards as for a run.

    Raises:
        UserError: if there are no shards, no captions, fewer than 32 pictures, or it is a set of another kind.
    """
    folder, caption_key = Path(data[0]), options.caption_key
    layout = layout_of(folder) if len(data) == 1 and folder.is_dir() else ""
    if layout not in ("", "retrieval"):
        raise UserError(
            f"{folder} is a set of another kind ({layout}); an audit takes pictures with captions: a retrieval set, or "
            f"shards"
        )
    urls = [str(path) for path in find_shards(folder)] if layout else expand_shards(list(data))
    texts = RULE.texts[::-1] if caption_key else RULE.texts
    index = ShardIndex.build(urls, rule=SampleRule(texts=texts, caption_key=caption_key or RULE.caption_key))
    reader = Reader(index, captions_by_line=True)
    drawn = sample_of_permutation(len(index), min(options.pictures, len(index)), "audit", options.seed)
    kept, captions = [], []
    for sample in reader.read(drawn):
        with suppress(BadSampleError):
            found = decode_captions(sample.text, sample.text_format, json_key=caption_key or RULE.caption_key)
            decode_image(sample.image)
            kept.append(sample.row)
            captions.append(found)
    if len(kept) < MIN_PAIRS:
        raise UserError(
            f"{shorten_list(data)} has {len(kept)} pictures with captions that can be read, of {len(drawn)} looked at; "
            f"an audit takes at least {MIN_PAIRS}"
        )
    source = SampledImages(reader, np.array(kept, np.int64))
    keys = [source.key(row) for row in range(len(source))]
    return AuditData(
        name=", ".join(data),
        source=source,
        captions=captions,
        attributes=_attributes(urls, keys),
        total=len(index),
        digest=index.digest,
    )


def _attributes(urls: Sequence[str], keys: Sequence[str]) -> dict[str, list[str]]:
    """Read attributes from .json members: those with a few values, each of several pictures."""
    try:
        index = ShardIndex.build(urls, rule=SampleRule(texts=("json",), needs_caption=False))
    except UserError:
        return {}  # no .json members
    row_of = {index.key(row): row for row in range(len(index))}
    if not all(key in row_of for key in keys):
        return {}
    values: defaultdict[str, list[str]] = defaultdict(list)
    for text, _ in Reader(index).read_texts(np.array([row_of[key] for key in keys])):
        with suppress(ValueError, RecursionError):
            content = json.loads(text)
            for name, value in content.items() if isinstance(content, dict) else ():
                if name not in NOT_ATTRIBUTES and isinstance(value, str | int | bool):
                    values[name].append(str(value))
    return {
        name: of_name
        for name, of_name in values.items()
        if len(of_name) == len(keys) and 1 < len(set(of_name)) <= len(keys) / 4
    }
