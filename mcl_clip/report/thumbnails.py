"""Small images for the report, within a budget of bytes."""

import base64
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from mcl_clip.core.errors import UserError
from mcl_clip.data.decode import BadSampleError, decode_image
from mcl_clip.data.reader import Reader
from mcl_clip.eval.task import Task

SIDES_PX = (160, 112, 80, 56)  # of the longer side; the first is sharp on high-density screens
QUALITY = 72
TRAINING = ""  # the source of training pairs; other sources are names of evaluation sets
MAX_IMAGES = 4_000
MAX_TEXT = 300  # characters of a caption
READ_ROWS = 64

ImageLoader = Callable[[Sequence[int]], Iterator[Image.Image | None]]


@dataclass(frozen=True)
class Thumbnail:
    """A place in the page for image `number` of a source; `alt` describes it, and stands there without an image."""

    source: str
    number: int
    alt: str


def shortened(text: str) -> str:
    """Return the first `MAX_TEXT` characters of a text."""
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}..."


class Thumbnails:
    """Images that sections request, the most important first, and their small copies once these are encoded."""

    def __init__(self, loaders: Mapping[str, ImageLoader]) -> None:
        """Start without images; `loaders` load them by number, for `TRAINING` and evaluation sets by name."""
        self._loaders = loaders
        self._requested: dict[tuple[str, int], None] = {}
        self._uris: dict[tuple[str, int], str] = {}
        self.left_out = 0

    def request(self, source: str, number: int, alt: str) -> Thumbnail:
        """Request an image; return its place in the page, described by `alt`."""
        if source in self._loaders and len(self._requested) < MAX_IMAGES:
            self._requested[source, number] = None
        return Thumbnail(source, number, shortened(alt))

    def encode(self, max_bytes: int) -> None:
        """Load and encode the requested images, as large as fits into `max_bytes` of the page, else only the first."""
        loaded: dict[tuple[str, int], Image.Image] = {}
        for source, load in self._loaders.items():
            numbers = sorted(number for name, number in self._requested if name == source)
            for number, image in zip(numbers, load(numbers), strict=True):
                if image is not None:
                    image.thumbnail((SIDES_PX[0], SIDES_PX[0]), Image.Resampling.LANCZOS)
                    loaded[source, number] = image
        images = {key: loaded[key] for key in self._requested if key in loaded}  # in order of importance
        for side in SIDES_PX:
            uris = {key: _data_uri(image, side) for key, image in images.items()}
            if sum(map(len, uris.values())) <= max_bytes:
                break
        used = 0
        for key, uri in uris.items():
            used += len(uri)
            if used <= max_bytes:
                self._uris[key] = uri
        self.left_out = len(uris) - len(self._uris)

    def uri(self, thumbnail: Thumbnail) -> str:
        """Return the small copy as a data URI; empty if there is none."""
        return self._uris.get((thumbnail.source, thumbnail.number), "")


def _data_uri(image: Image.Image, side_px: int) -> str:
    small = image.copy()
    small.thumbnail((side_px, side_px), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    is_tiny = max(small.size) <= SIDES_PX[-1]  # single pixels are visible
    small.save(file, "WEBP", quality=QUALITY, method=4, lossless=is_tiny)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def training_images(reader: Reader) -> ImageLoader:
    """Return a loader of the images of training pairs; None for those that cannot be decoded."""

    def load(numbers: Sequence[int]) -> Iterator[Image.Image | None]:
        for start in range(0, len(numbers), READ_ROWS):
            for sample in reader.read(np.array(numbers[start : start + READ_ROWS], np.int64)):
                try:
                    yield decode_image(sample.image)
                except BadSampleError:
                    yield None

    return load


def task_images(task: Task) -> ImageLoader:
    """Return a loader of the images of an evaluation set."""

    def load(numbers: Sequence[int]) -> Iterator[Image.Image | None]:
        for number in numbers:
            try:
                yield from task.data.source.images(np.array([number]))
            except UserError:
                yield None

    return load
