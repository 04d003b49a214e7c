"""Features of evaluation sets: images and texts shared among processes, each exactly once."""

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
from mcl_clip.data.index import ShardIndex
from mcl_clip.data.reader import Reader
from mcl_clip.model.clip import encode_texts

MAX_BOX_PIXELS = 50_000_000

Box = tuple[int, int, int, int]  # left, top, width, height in pixels


@runtime_checkable
class ImageSource(Protocol):
    """Pictures by number. It must be picklable: workers read from copies of it."""

    def __len__(self) -> int:
        """How many pictures there are."""

    def images(self, rows: Int[np.ndarray, " batch"]) -> Iterator[Image.Image]:
        """The pictures of `rows` as RGB, in their order.

        Raises:
            UserError: for one that cannot be decoded.
        """


@dataclass(frozen=True)
class ReaderImages:
    """The images of a reader's rows."""

    reader: Reader

    def __len__(self) -> int:
        return len(self.reader.index)

    def images(self, rows: Int[np.ndarray, " batch"]) -> Iterator[Image.Image]:
        """The pictures of `rows`, decoded strictly."""
        for sample in self.reader.read(rows):
            try:
                yield decode_image(sample.image)
            except BadSampleError as error:
                raise bad_sample(self.reader.index, sample.row, error) from error


@dataclass(frozen=True)
class FileImages:
    """Pictures in files of their own, each whole or cut to a box.

    A box is (left, top, width, height) in pixels. What it holds beyond the border of the picture is black, as with
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
        """The pictures of `rows`; see `ImageSource`."""
        for row in rows.tolist():
            path, box = self.paths[row], self.boxes[row] if self.boxes is not None else None
            try:
                image = decode_image(path.read_bytes())
            except FileNotFoundError as error:
                raise UserError(explain_os_error(error)) from error
            except BadSampleError as error:
                raise UserError(f"{path} cannot be decoded ({error}); restore the file") from error
            yield image if box is None else _crop(image, box, path)


def _crop(image: Image.Image, box: Box, path: Path) -> Image.Image:
    left, top, width, height = box
    overlaps = left < image.width and top < image.height and left + width > 0 and top + height > 0
    if width < 1 or height < 1 or not overlaps or width * height > MAX_BOX_PIXELS:
        raise UserError(
            f"the box {list(box)} (left, top, width, height) does not fit {path}, which has {image.width} x "
            f"{image.height} pixels; correct the box"
        )
    return image.crop((left, top, left + width, top + height))


def embed_images(
    model: Any,
    source: Reader | ImageSource,
    *,
    image_transform: Callable[[Any], Tensor],
    device: torch.device | str,
    batch_size: int,
    num_workers: int,
) -> Float[Tensor, "images dim"]:
    """Un-normalised float32 features of all images of a source, on the CPU, equal on all processes.

    Batches are cut at the same places whatever the number of processes, so that it does not change the features.

    Args:
        model: anything with `encode_image`; set to eval mode meanwhile.
        source: the images, or a reader of them.
        image_transform: from a PIL image to floats.
        device: where the model is.
        batch_size: images in a forward pass of one process.
        num_workers: processes that read and transform images; 0 for none.

    Raises:
        UserError: if an image cannot be decoded.
        RuntimeError: if the processes together have not embedded each image exactly once.
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
    with _evaluating(model), torch.no_grad(), _bar(batches, "images") as bar:
        dtype = next(model.parameters()).dtype if isinstance(model, nn.Module) else torch.float32
        for pixels in loader:
            if isinstance(pixels, UserError):
                failure = str(pixels)
                break
            parts.append(model.encode_image(pixels.to(device, dtype, non_blocking=True)).float())
            bar.update(len(pixels))
    failures = [other for other in distributed.gather_objects(failure) if other]
    if failures:
        raise UserError(failures[0]).on_every_process()
    return _gather_rows(parts, batches, size, "images", device)


def embed_texts(
    model: Any,
    texts: Sequence[str],
    *,
    tokenizer: Callable[[list[str]], Tensor],
    device: torch.device | str,
    batch_size: int,
) -> Float[Tensor, "texts dim"]:
    """Un-normalised float32 features of texts, on the CPU, equal on all processes; see `embed_images`."""
    device = torch.device(device)
    batches = _batches_of_rank(len(texts), batch_size)
    parts = []
    with _evaluating(model), torch.no_grad(), _bar(batches, "texts") as bar:
        for batch in batches:
            tokens = tokenizer([texts[number] for number in batch])
            parts.append(encode_texts(model, tokens, device).float())
            bar.update(len(batch))
    return _gather_rows(parts, batches, len(texts), "texts", device)


def _bar(batches: Sequence[np.ndarray], unit: str) -> Any:
    return Progress(total=sum(map(len, batches)), desc=unit, unit=unit[:-1], show=distributed.is_main())


def find_shards(root: Path, split: str) -> list[Path]:
    """The tar files of `root/split` (CLIP_benchmark's layout, with nshards.txt), or of `root` itself.

    Raises:
        UserError: if the layout is neither.
    """
    folder = root / split
    if not folder.is_dir():
        shards = sorted(root.glob("*.tar"), key=_natural_order)
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
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise UserError(
            f"{counter} says {text} tar files, but {', '.join(missing[:5])} is not in {folder}; copy it anew"
        )
    return shards


def _natural_order(path: Path) -> list[tuple[int, str]]:
    return [(int(part or 0), text) for text, part in re.findall(r"(\D*)(\d*)", path.name)]


def bad_sample(index: ShardIndex, row: int, error: BadSampleError) -> UserError:
    """Evaluation is strict: a sample that cannot be decoded is an error."""
    shard = index.shards[int(index.shard_of[row])].url
    return UserError(f"sample {index.key(row)} in {shard} cannot be decoded ({error.reason}); write the set again")


class _ImageBatches(Dataset[Tensor | UserError]):
    """Rows to a batch of images, in a worker.

    User errors are handed over as values: raised in a worker they would arrive with its traceback in their message.
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
    """The batches of a process, int64 row numbers: neighbours among batches that no number of processes changes."""
    rank = distributed.rank() if rank is None else rank
    world_size = distributed.world_size() if world_size is None else world_size
    batches = [np.arange(start, min(start + batch_size, size)) for start in range(0, size, batch_size)]
    return batches[len(batches) * rank // world_size : len(batches) * (rank + 1) // world_size]


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Eval mode, and afterwards the mode that each module was in."""
    modes = [(module, module.training) for module in model.modules()] if isinstance(model, nn.Module) else []
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _gather_rows(
    parts: list[Tensor], batches: list[np.ndarray], size: int, what: str, device: torch.device
) -> Float[Tensor, "size dim"]:
    """Rows of all processes in order of their numbers, on the CPU."""
    rows = torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int64), *batches]))
    shapes = distributed.gather_objects((len(rows), parts[0].shape[1] if parts else 0))
    longest, dim = max(count for count, _ in shapes), max(dim for _, dim in shapes)
    features = torch.zeros(longest, dim, device=device)
    numbers = torch.full((longest,), -1, device=device)
    if parts:
        features[: len(rows)] = torch.cat(parts)
        numbers[: len(rows)] = rows.to(device)
    return _in_order(distributed.gather(features).cpu(), distributed.gather(numbers).cpu(), size, what)


def _in_order(
    features: Float[Tensor, "padded dim"], numbers: Int[Tensor, " padded"], size: int, what: str
) -> Float[Tensor, "size dim"]:
    """Rows by number; number -1 is padding."""
    is_row = numbers >= 0
    seen = torch.bincount(numbers[is_row], minlength=size)
    if len(seen) != size or not bool((seen == 1).all()):
        raise RuntimeError(
            f"{int((seen == 0).sum())} of {size} {what} were not embedded, {int((seen > 1).sum())} more than once"
        )
    ordered = torch.empty(size, features.shape[1])
    ordered[numbers[is_row]] = features[is_row]
    return ordered
