"""Image and text features of evaluation sets, embedded by all processes together, each sample exactly once."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from mcl_clip.core import distributed
from mcl_clip.core.errors import UserError, explain_os_error
from mcl_clip.core.progress import Progress
from mcl_clip.data.decode import BadSampleError, decode_image
from mcl_clip.data.reader import RawSample, Reader
from mcl_clip.model.clip import encode_texts

MAX_BOX_PIXELS = 50_000_000
READ_ROWS = 256

Box = tuple[int, int, int, int]  # left, top, width, height in pixels


@runtime_checkable
class ImageSource(Protocol):
    """Images addressed by row. It must be picklable, because loader workers read from copies of it."""

    def __len__(self) -> int:
        """Return the number of images."""

    def images(self, rows: Int[np.ndarray, " batch"]) -> Iterator[Image.Image]:
        """Yield the images of `rows` as RGB, in the given order.

        Raises:
            UserError: if an image cannot be decoded.
        """


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
                raise bad_sample(self.reader, sample.row, error) from error


@dataclass(frozen=True)
class FileImages:
    """Image files, each used whole or cropped to a box.

    A box is (left, top, width, height) in pixels. The part of it outside the image is black, as in PIL's `crop`.
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


def find_shards(root: Path, split: str) -> list[Path]:
    """List the tar files in `root/split` (CLIP_benchmark's layout, with nshards.txt), or else in `root` itself.

    Raises:
        UserError: if `root` has neither layout, or a tar file is missing.
    """
    folder = root / split
    if not folder.is_dir():
        # Natural order: 2.tar comes before 10.tar.
        shards = sorted(
            root.glob("*.tar"), key=lambda p: [(int(n or 0), t) for t, n in re.findall(r"(\D*)(\d*)", p.name)]
        )
        if not shards:
            raise UserError(f"{root} is not an evaluation set: it has neither a folder {split!r} nor tar files")
        return shards
    counter = folder / "nshards.txt"
    if not counter.is_file():
        raise UserError(f"{counter} is missing; it holds the number of tar files in {folder}")
    text = counter.read_text(encoding="utf-8").strip()
    if not re.fullmatch(r"[1-9]\d*", text):
        raise UserError(f"{counter} holds {text!r}; it must hold the number of tar files in {folder}")
    shards = [folder / f"{number}.tar" for number in range(int(text))]
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise UserError(
            f"{counter} says {text} tar files, but {', '.join(missing[:5])} is not in {folder}; copy the set again"
        )
    return shards


def read_samples(reader: Reader) -> Iterator[RawSample]:
    """Yield all samples of a reader in row order."""
    size = len(reader.index)
    for start in range(0, size, READ_ROWS):
        yield from reader.read(np.arange(start, min(start + READ_ROWS, size)))


def bad_sample(reader: Reader, row: int, error: BadSampleError) -> UserError:
    """Return the error for a sample that cannot be decoded; evaluation skips no samples, so scores stay comparable."""
    index = reader.index
    shard = index.shards[int(index.shard_of[row])].url
    return UserError(f"sample {index.key(row)} in {shard} cannot be decoded ({error.reason}); write the set again")


def check_finite(features: Float[Tensor, "rows dim"], side: str) -> None:
    """Raise a UserError if any row of the `image` or `text` features has an infinite or NaN value."""
    largest = torch.linalg.vector_norm(features, torch.inf, dim=1)  # a reduction: allocates no copy of the features
    if broken := int((~torch.isfinite(largest)).sum()):
        raise UserError(f"{broken} of {len(features)} {side} features are not finite; the model has diverged")


def embed_set(
    model: Any,
    source: Reader | ImageSource,
    texts: Sequence[str],
    *,
    image_transform: Any,
    tokenizer: Any,
    num_workers: int,
    **options: Any,
) -> dict[str, Tensor]:
    """Compute the `image` and `text` features of a set; see `embed_images` and `embed_texts` for the options."""
    images = embed_images(model, source, image_transform=image_transform, num_workers=num_workers, **options)
    return {"image": images, "text": embed_texts(model, texts, tokenizer=tokenizer, **options)}


def embed_images(
    model: Any,
    source: Reader | ImageSource,
    *,
    image_transform: Callable[[Any], Tensor],
    device: torch.device | str,
    batch_size: int,
    num_workers: int,
) -> Float[Tensor, "images dim"]:
    """Compute un-normalized float32 features of all images, on the CPU and identical on all processes.

    The batches do not depend on the number of processes, so neither do the features.

    Args:
        model: any object with `encode_image`; a module is in eval mode meanwhile.
        source: the images, or a reader of samples with images.
        image_transform: maps a PIL image to a float tensor.
        device: the device of the model.
        batch_size: images per forward pass and process.
        num_workers: loader worker processes; 0 loads in the main process.

    Raises:
        UserError: on all processes, if an image cannot be decoded on any of them.
        RuntimeError: if the processes together did not embed each image exactly once.
    """
    source = ReaderImages(source) if isinstance(source, Reader) else source
    device, size = torch.device(device), len(source)
    batches = _batches_of_rank(size, batch_size)
    loader = DataLoader(
        _ImageBatches(source, image_transform),
        batch_size=None,
        sampler=batches,
        num_workers=min(num_workers, len(batches)),
        pin_memory=device.type == "cuda",
        generator=distributed.torch_generator("evaluation"),
    )
    parts, failure = [], ""
    with _eval_mode(model), torch.no_grad(), _progress_bar(batches, "images") as bar:
        dtype = next(model.parameters()).dtype if isinstance(model, nn.Module) else torch.float32
        for pixels in loader:
            if isinstance(pixels, UserError):
                failure = str(pixels)
                break
            parts.append(model.encode_image(pixels.to(device, dtype, non_blocking=True)).float())
            bar.update(len(pixels))
    raise_on_all_processes(failure)
    return _gather_rows(parts, batches, size, "images", device)


def embed_texts(
    model: Any,
    texts: Sequence[str],
    *,
    tokenizer: Callable[[list[str]], Tensor],
    device: torch.device | str,
    batch_size: int,
) -> Float[Tensor, "texts dim"]:
    """Compute un-normalized float32 features of texts, on the CPU and identical on all processes.

    See `embed_images`.
    """
    device = torch.device(device)
    batches = _batches_of_rank(len(texts), batch_size)
    parts = []
    with _eval_mode(model), torch.no_grad(), _progress_bar(batches, "texts") as bar:
        for batch in batches:
            tokens = tokenizer([texts[row] for row in batch])
            parts.append(encode_texts(model, tokens, device).float())
            bar.update(len(batch))
    return _gather_rows(parts, batches, len(texts), "texts", device)


def raise_on_all_processes(failure: str) -> None:
    """Raise the same UserError on every process if any of them passes a message; called by all with "" for none."""
    if failures := [message for message in distributed.gather_objects(failure) if message]:
        raise UserError(failures[0]).on_every_process()


class _ImageBatches(Dataset[Tensor | UserError]):
    """Map rows to a batch of transformed images, in a loader worker.

    User errors are returned as values: one raised in a worker would carry the worker's traceback in its message.
    """

    def __init__(self, source: ImageSource, image_transform: Callable[[Any], Tensor]):
        self.source, self.image_transform = source, image_transform

    def __getitem__(self, rows: Int[np.ndarray, " batch"]) -> Float[Tensor, "batch 3 height width"] | UserError:
        try:
            return torch.stack([self.image_transform(image) for image in self.source.images(rows)])
        except UserError as error:
            return error
        except OSError as error:
            return UserError(f"{explain_os_error(error)}; the same command continues when the storage answers")


def _batches_of_rank(
    size: int, batch_size: int, rank: int | None = None, world_size: int | None = None
) -> list[np.ndarray]:
    """Return the int64 row batches of a process: a contiguous share of a list that is the same for any world size."""
    rank = distributed.rank() if rank is None else rank
    world_size = distributed.world_size() if world_size is None else world_size
    batches = [np.arange(start, min(start + batch_size, size)) for start in range(0, size, batch_size)]
    return batches[len(batches) * rank // world_size : len(batches) * (rank + 1) // world_size]


def _progress_bar(batches: Sequence[np.ndarray], unit: str) -> Any:
    return Progress(total=sum(map(len, batches)), desc=unit, unit=unit[:-1], show=distributed.is_main())


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
    parts: list[Tensor], batches: list[np.ndarray], size: int, unit: str, device: torch.device
) -> Float[Tensor, "size dim"]:
    """Gather the features of all processes on the CPU, in row order.

    Raises:
        RuntimeError: if a row is missing or occurs twice.
    """
    local_rows = torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int64), *batches]))
    shapes = distributed.gather_objects((len(local_rows), parts[0].shape[1] if parts else 0))
    # Collectives need equal shapes: all processes pad to the longest, with row -1. One without batches knows no dim.
    longest, dim = max(count for count, _ in shapes), max(dim for _, dim in shapes)
    padded = torch.zeros(longest, dim, device=device)
    padded_rows = torch.full((longest,), -1, device=device)
    if parts:
        padded[: len(local_rows)] = torch.cat(parts)
        padded_rows[: len(local_rows)] = local_rows.to(device)
    features, rows = distributed.gather(padded).cpu(), distributed.gather(padded_rows).cpu()
    is_row = rows >= 0
    counts = torch.bincount(rows[is_row], minlength=size)
    if len(counts) != size or not bool((counts == 1).all()):
        raise RuntimeError(
            f"{int((counts == 0).sum())} of {size} {unit} were not embedded, {int((counts > 1).sum())} more than once"
        )
    ordered = torch.empty(size, dim)
    ordered[rows[is_row]] = features[is_row]
    return ordered
