"""The small pictures of the report, within a number of bytes."""

import base64
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from mcl_clip.core.errors import UserError
from mcl_clip.data.decode import BadSampleError, decode_image
from mcl_clip.data.reader import Reader
from mcl_clip.eval.embed import ImageSource, ReaderImages
from mcl_clip.eval.task import Task

SIDES_PX = (160, 112, 80, 56)  # of the longer side; the first is sharp on dense screens
QUALITY = 72
TRAINING = ""
MAX_PICTURES = 4_000
MAX_TEXT = 300  # characters of a caption

Pictures = Callable[[Sequence[int]], Iterator[Image.Image | None]]


@dataclass(frozen=True)
class Picture:
    """A place for a picture: row `number` of the training pairs (`source` is empty) or of an evaluation set."""

    source: str
    number: int
    alt: str


def shortened(text: str) -> str:
    """The first characters of a text."""
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}..."


class Thumbnails:
    """Pictures that sections ask for, the most important first, and their small copies once these are made."""

    def __init__(self, sources: Mapping[str, Pictures]) -> None:
        """No pictures yet.

        Args:
            sources: gives pictures by number, by the name of an evaluation set; `TRAINING` for the training pairs.
        """
        self._sources = sources
        self._wanted: dict[tuple[str, int], None] = {}
        self._made: dict[tuple[str, int], str] = {}
        self.left_out = 0

    def want(self, source: str, number: int, alt: str) -> Picture:
        """A place for a picture, described by `alt` where it cannot be seen."""
        if source in self._sources and len(self._wanted) < MAX_PICTURES:
            self._wanted[source, number] = None
        return Picture(source, number, shortened(alt))

    def has(self, source: str) -> bool:
        """Whether there are pictures of a source."""
        return source in self._sources

    def develop(self, max_bytes: int) -> None:
        """Make the small copies: as large as they fit into `max_bytes` of the page, and else the first ones."""
        images = self._read()
        for side in SIDES_PX:
            made = {key: _data_uri(image, side) for key, image in images.items()}
            if sum(map(len, made.values())) <= max_bytes:
                break
        kept = 0
        for key, uri in made.items():
            kept += len(uri)
            if kept <= max_bytes:
                self._made[key] = uri
        self.left_out = len(made) - len(self._made)

    def uri(self, picture: Picture) -> str:
        """The small copy as a data URI; empty if there is none."""
        return self._made.get((picture.source, picture.number), "")

    def _read(self) -> dict[tuple[str, int], Image.Image]:
        found: dict[tuple[str, int], Image.Image] = {}
        for source, pictures in self._sources.items():
            numbers = sorted(number for name, number in self._wanted if name == source)
            for number, image in zip(numbers, pictures(numbers), strict=True):
                if image is not None:
                    image.thumbnail((SIDES_PX[0], SIDES_PX[0]), Image.Resampling.LANCZOS)
                    found[source, number] = image
        return {key: found[key] for key in self._wanted if key in found}


def _data_uri(image: Image.Image, side_px: int) -> str:
    small = image.copy()
    small.thumbnail((side_px, side_px), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    is_tiny = max(small.size) <= SIDES_PX[-1]  # where each pixel can be seen
    small.save(file, "WEBP", quality=QUALITY, method=4, lossless=is_tiny)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def pictures_of_pairs(reader: Reader) -> Pictures:
    """The pictures of training pairs; none for those that cannot be decoded."""

    def pictures(numbers: Sequence[int]) -> Iterator[Image.Image | None]:
        for start in range(0, len(numbers), 64):
            for sample in reader.read(np.array(numbers[start : start + 64], np.int64)):
                try:
                    yield decode_image(sample.image)
                except BadSampleError:
                    yield None

    return pictures


def pictures_of_set(task: Task) -> Pictures | None:
    """The pictures of an evaluation set; none if it is of a kind that does not tell them."""
    source = image_source(task)
    if source is None:
        return None

    def pictures(numbers: Sequence[int]) -> Iterator[Image.Image | None]:
        for number in numbers:
            try:
                yield from source.images(np.array([number]))
            except UserError:
                yield None

    return pictures


def image_source(task: Task) -> ImageSource | None:
    """Where the pictures of an evaluation set are."""
    data = getattr(task, "data", None)
    for name in ("source", "reader", "images"):
        found = getattr(data, name, None)
        if isinstance(found, Reader):
            return ReaderImages(found)
        if isinstance(found, ImageSource):
            return found
    return None
