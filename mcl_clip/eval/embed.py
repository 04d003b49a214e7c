"""Image and text features of evaluation sets, embedded by all processes together, each sample exactly once."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn

from mcl_clip.core import distributed
from mcl_clip.core.errors import UserError, explain_os_error, shorten
from mcl_clip.core.progress import Progress
from mcl_clip.data.decode import BadSampleError, decode_image
from mcl_clip.data.index import RULE, ShardIndex
from mcl_clip.data.reader import RawSample, Reader
from mcl_clip.data.samples import SampleRule
from mcl_clip.data.workers import load_batches
from mcl_clip.eval.task import EvaluationSet, ImageSource
from mcl_clip.model.clip import autocast, encode_texts

MAX_BOX_PIXELS = 50_000_000
READ_ROWS = 256
PREFETCH_BATCHES = 2  # of each loader process

Box = tuple[int, int, int, int]  # left, top, width, height in pixels
T = TypeVar("T")


@dataclass(frozen=True)
class ReaderImages:
    """The images of a `Reader`."""

    reader: Reader

    def __len__(self) -> int:
        return len(self.reader.index)

    def images(self, rows: Int[np.ndarray, " batch"]) -> Iterator[Image.Image]:
        """Yield the images of `rows`; see `ImageSource`."""
        for sample in self.reader.read(rows):
            try:
                yield decode_image(sample.image)
            except BadSampleError as error:
                raise self.explain(sample.row, error) from error

    def samples(self) -> Iterator[RawSample]:
        """Yield all samples in row order."""
        for start in range(0, len(self), READ_ROWS):
            yield from self.reader.read(np.arange(start, min(start + READ_ROWS, len(self))))

    def explain(self, row: int, error: BadSampleError) -> UserError:
        """Return the error for a sample that cannot be decoded; evaluation skips none, so scores stay comparable."""
        index = self.reader.index
        shard = index.shards[int(index.shard_of[row])].url
        return UserError(f"sample {index.key(row)} in {shard} cannot be decoded ({error.reason}); write the set again")


@dataclass(frozen=True)
class FileImages:
    """Image files, each used whole or cropped to a box.

    A box is (left, top, width, height) in pixels of the upright image. The part of it outside the image is black, as in
    PIL's `crop`.
    """

    paths: tuple[Path, ...]
    boxes: tuple[Box | None, ...] | None = None

    def __post_init__(self) -> None:
        if self.boxes is not None and len(self.boxes) != len(self.paths):
            raise ValueError(f"{len(self.paths)} paths and {len(self.boxes)} boxes")

    def __len__(self) -> int:
        return len(self.paths)

    def images(self, rows: Int[np.ndarray, " batch"]) -> Iterator[Image.Image]:
        """Yield the images of `rows`; see `ImageSource`."""
        for row in rows.tolist():
            path, box = self.paths[row], self.boxes[row] if self.boxes is not None else None
            try:
                image = decode_image(path.read_bytes())
            except FileNotFoundError as error:
                raise UserError(explain_os_error(error)) from error
            except BadSampleError as error:
                raise UserError(f"{path} cannot be decoded ({error}); restore the file") from error
            left, top, width, height = box or (0, 0, *image.size)
            overlaps = left < image.width and top < image.height and left + width > 0 and top + height > 0
            if box and (width < 1 or height < 1 or not overlaps or width * height > MAX_BOX_PIXELS):
                raise UserError(
                    f"the box {list(box)} (left, top, width, height) does not fit {path}, which has {image.width} x "
                    f"{image.height} pixels; correct the box"
                )
            yield image.crop((left, top, left + width, top + height)) if box else image


def open_shards(root: Path, *, text: str = "") -> ReaderImages:
    """Open the tar files in `root/test` (CLIP_benchmark's layout, with nshards.txt), or else in `root` itself.

    `text` is the extension of labels in place of captions. A .txt member holds a caption on each line, as in
    CLIP_benchmark; an image may have none.

    Raises:
        UserError: if `root` has neither layout, a tar file is missing, or a sample is incomplete.
    """
    rule = SampleRule(texts=(text,) if text else RULE.texts, needs_caption=False)
    index = ShardIndex.build([str(path) for path in find_shards(root)], rule=rule)
    if incomplete := {reason: count for reason, count in index.skipped_by_reason().items() if count}:
        counts = ", ".join(f"{count} x {reason}" for reason, count in sorted(incomplete.items()))
        raise UserError(
            f"{root} has samples that cannot be used ({counts}); a score on the rest would not be comparable, so "
            f"write the set again"
        )
    return ReaderImages(Reader(index, captions_by_line=True))


def find_shards(root: Path) -> list[Path]:
    """List the tar files of a set, as `open_shards` reads them; raise UserError as it does."""
    folder = root / "test"
    if not folder.is_dir():
        # Natural order: 2.tar comes before 10.tar.
        shards = sorted(
            root.glob("*.tar"), key=lambda p: [(int(n or 0), t) for t, n in re.findall(r"(\D*)(\d*)", p.name)]
        )
        if not shards:
            raise UserError(f"{root} is not an evaluation set: it has neither a folder 'test' nor tar files")
        return shards
    counter = folder / "nshards.txt"
    if not counter.is_file():
        raise UserError(f"{counter} is missing; it holds the number of tar files in {folder}")
    text = counter.read_text(encoding="utf-8").strip()
    if not re.fullmatch(r"[1-9]\d*", text):
        raise UserError(f"{counter} holds {shorten(repr(text))}; it must hold the number of tar files in {folder}")
    shards = [folder / f"{number}.tar" for number in range(int(text))]
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise UserError(
            f"{counter} says {text} tar files, but {', '.join(missing[:5])} is not in {folder}; copy the set again"
        )
    if more := sorted({path.name for path in folder.glob("*.tar")} - {shard.name for shard in shards}):
        raise UserError(
            f"{counter} says {text} tar files, but {folder} also has {', '.join(more[:5])}; correct the number, or "
            f"move the others away"
        )
    return shards


def check_finite(image_features: Float[Tensor, "images dim"], text_features: Float[Tensor, "texts dim"]) -> None:
    """Raise a UserError if any row of the features has an infinite or NaN value."""
    for side, features in (("image", image_features), ("text", text_features)):
        largest = torch.linalg.vector_norm(features, torch.inf, dim=1)  # a reduction: allocates no copy of the features
        if broken := int((~torch.isfinite(largest)).sum()):
            raise UserError(f"{broken} of {len(features)} {side} features are not finite; the model has diverged")


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """A model with all that is needed to embed a set with it.

    The model is any object with `encode_image` and `encode_text`. `batch_size` counts images, and texts, per forward
    pass and process; `num_workers` loader processes, 0 for none, and `timeout_s` the longest wait for one of them.
    Batches are taken through `waiting_for`, which may give up on one that does not come.
    """

    model: Any
    image_transform: Callable[[Any], Tensor]
    tokenizer: Callable[[list[str]], Tensor]
    device: torch.device
    batch_size: int = 64
    num_workers: int = 0
    precision: str = "fp32"
    timeout_s: float = math.inf
    waiting_for: Callable[[Iterable[Tensor]], Iterator[Tensor]] = iter

    def embed(self, data: EvaluationSet) -> dict[str, Tensor]:
        """Compute the un-normalized float32 `image` and `text` features, on the CPU and identical on all processes.

        The batches do not depend on the number of processes, so neither do the features.

        Raises:
            UserError: on all processes, if an image cannot be decoded on any of them.
            RuntimeError: if the processes together did not embed each image and text exactly once.
        """
        source, texts, model, device = data.source, data.texts, self.model, self.device
        image_rows, text_rows = (_batches_of_rank(len(part), self.batch_size) for part in (source, texts))
        pixels_of_batches = load_batches(
            _ImageBatches(source, self.image_transform).make_batch,
            image_rows,
            num_workers=min(self.num_workers, len(image_rows)),
            prefetch_batches=PREFETCH_BATCHES,
            pin_memory=device.type == "cuda",
            timeout_s=self.timeout_s,
            describe=lambda rows: f"images {rows[0]} to {rows[-1]} of an evaluation set",
        )
        dtype = next(model.parameters()).dtype if isinstance(model, nn.Module) else torch.float32

        def encode_images(pixels: Tensor) -> Tensor:
            features: Tensor = model.encode_image(pixels.to(device, dtype, non_blocking=True))
            return features

        def encode_rows(rows: np.ndarray) -> Tensor:
            return encode_texts(model, self.tokenizer([texts[row] for row in rows]), device)

        with autocast(self.precision, device), _eval_mode(model), torch.no_grad():
            images = _gather_rows(map(encode_images, self.waiting_for(pixels_of_batches)), image_rows, device)
            return {"image": images, "text": _gather_rows(map(encode_rows, text_rows), text_rows, device)}


def on_all_processes(make: Callable[[], T]) -> T:
    """Return `make()`, called on every process; raise on all of them a UserError that any of them raises."""
    failure, result = "", []
    try:
        result.append(make())
    except UserError as error:
        failure = str(error)
    if failures := [message for message in distributed.gather_objects(failure) if message]:
        raise UserError(failures[0]).on_every_process()
    return result[0]


@dataclass(frozen=True)
class _ImageBatches:
    """Makes batches of transformed images in a loader process."""

    source: ImageSource
    image_transform: Callable[[Any], Tensor]

    def make_batch(self, rows: Int[np.ndarray, " batch"]) -> Float[Tensor, "batch ..."]:
        """Read, decode and transform the images of `rows`."""
        try:
            return torch.stack([self.image_transform(image) for image in self.source.images(rows)])
        except OSError as error:
            message = f"{explain_os_error(error)}; the same command continues when the storage answers"
            raise UserError(message) from error


def _batches_of_rank(
    size: int, batch_size: int, rank: int | None = None, world_size: int | None = None
) -> list[np.ndarray]:
    """Return the int64 row batches of a process: a contiguous share of a list that is the same for any world size."""
    rank = distributed.rank() if rank is None else rank
    world_size = distributed.world_size() if world_size is None else world_size
    batches = [np.arange(start, min(start + batch_size, size)) for start in range(0, size, batch_size)]
    return batches[len(batches) * rank // world_size : len(batches) * (rank + 1) // world_size]


@contextmanager
def _eval_mode(model: Any) -> Iterator[None]:
    """Put all modules in eval mode, and restore the mode of each of them afterwards."""
    modes = [(module, module.training) for module in model.modules()] if isinstance(model, nn.Module) else []
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _gather_rows(
    features: Iterable[Tensor], batches: Sequence[np.ndarray], device: torch.device
) -> Float[Tensor, "rows dim"]:
    """Compute the features of this process's batches, and concatenate those of all processes on the CPU.

    Raises:
        UserError: on all processes, if a batch raises one on any of them.
        RuntimeError: if a process has features for more or fewer rows than are in its batches.
    """
    count = sum(map(len, batches))

    def compute() -> list[Tensor]:
        parts = []
        with Progress(total=count, desc="embed", unit="sample", show=distributed.is_main()) as bar:
            for part in features:
                parts.append(part.float())
                bar.update(len(part))
        return parts

    parts = on_all_processes(compute)
    shapes = distributed.gather_objects((count, parts[0].shape[1] if parts else 0))
    # Collectives need equal shapes: all processes pad to the longest. One without batches knows no dim.
    longest, dim = (max(sizes) for sizes in zip(*shapes, strict=True))
    padded = torch.zeros(longest, dim, device=device)
    if (embedded := sum(map(len, parts))) != count:
        raise RuntimeError(f"{embedded} of {count} images or texts were embedded")
    if parts:
        padded[:count] = torch.cat(parts)
    gathered = distributed.gather(padded).cpu().view(len(shapes), longest, dim)
    # Processes have contiguous shares of the rows, see `_batches_of_rank`.
    return torch.cat([share[:rows] for share, (rows, _) in zip(gathered, shapes, strict=True)])
