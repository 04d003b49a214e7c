"""Features of every row under one stage's model, one file a shard, and their reader."""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float16, Float32, Int64
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

from mcl_clip.core.distributed import is_main, rank, world_size
from mcl_clip.core.errors import UserError
from mcl_clip.core.files import atomic_path
from mcl_clip.core.progress import Progress
from mcl_clip.data.features import text_part_name as texts_part_name
from mcl_clip.data.index import ShardIndex
from mcl_clip.data.loader import BadSample, CaptionedBatch, content_ids
from mcl_clip.model.clip import autocast, encode_texts, to_floats

SIDES = ("image", "text")
_COLUMNS = {  # of a part: data type and dimensions
    **dict.fromkeys(("image", "text"), ("<f2", 2)),
    **dict.fromkeys(("image_norm", "text_norm"), ("<f4", 1)),
    **dict.fromkeys(("image_id", "text_id"), ("<i8", 1)),
    "ok": ("|b1", 1),
}
Batches = Callable[[Iterable[np.ndarray]], Iterator[CaptionedBatch]]


@dataclass(frozen=True, kw_only=True)
class EmbeddingPart:
    """Features of neighbouring rows: unit vectors in float16 and the norms they had, in float32.

    The text feature of a row is the normalised mean of its captions' unit features; its norm is the mean of theirs. Bad
    rows are zeros and not `ok`. `image_id` and `text_id` are hashes of the bytes of the members.
    """

    image: Float16[np.ndarray, "rows dim"]
    text: Float16[np.ndarray, "rows dim"]
    image_norm: Float32[np.ndarray, "rows"]
    text_norm: Float32[np.ndarray, "rows"]
    image_id: Int64[np.ndarray, "rows"]
    text_id: Int64[np.ndarray, "rows"]
    ok: Bool[np.ndarray, "rows"]


class EmbeddingTable:
    """All parts of a stage in row order."""

    def __init__(self, folder: Path, index: ShardIndex) -> None:
        self.folder = folder
        self.first = np.array([shard.first_row for shard in index.shards] + [len(index)])
        self._cache: tuple[int, EmbeddingPart] | None = None

    def __len__(self) -> int:
        return int(self.first[-1])

    def part(self, shard: int) -> EmbeddingPart:
        """Features of a shard's rows.

        Raises:
            UserError: if the file is missing or has another number of rows.
        """
        if self._cache is None or self._cache[0] != shard:
            self._cache = (shard, read_part(self.folder / part_name(shard), int(np.diff(self.first)[shard])))
        return self._cache[1]

    def rows(self, start: int, stop: int, side: str) -> Float16[np.ndarray, "rows dim"]:
        """Unit features of rows `start` to `stop - 1`."""
        return self._between(start, stop, side)

    def norms(self, start: int, stop: int, side: str) -> Float32[np.ndarray, "rows"]:
        """Norms of rows `start` to `stop - 1` before they were normalised."""
        return self._between(start, stop, f"{side}_norm")

    def ok(self, start: int, stop: int) -> Bool[np.ndarray, "rows"]:
        """Whether rows `start` to `stop - 1` could be decoded."""
        return self._between(start, stop, "ok")

    def take(self, rows: Int64[np.ndarray, "rows"], side: str) -> Float32[np.ndarray, "rows dim"]:
        """Features of chosen rows with the norms they had, in the order asked for."""
        order = np.argsort(rows, kind="stable")
        chunks = []
        for shard in np.unique(np.searchsorted(self.first, rows, side="right") - 1):
            part, first = self.part(int(shard)), self.first[shard]
            inside = rows[order][(rows[order] >= first) & (rows[order] < self.first[shard + 1])] - first
            norm = getattr(part, f"{side}_norm")[inside, None]
            chunks.append(getattr(part, side)[inside].astype(np.float32) * norm)
        result = np.empty((len(rows), chunks[0].shape[1]), np.float32)
        result[order] = np.concatenate(chunks)
        return result

    def _between(self, start: int, stop: int, column: str) -> np.ndarray:
        shards = range(
            int(np.searchsorted(self.first, start, side="right")) - 1,
            int(np.searchsorted(self.first, stop, side="left")),
        )
        pieces = [
            getattr(self.part(shard), column)[max(0, start - self.first[shard]) : stop - self.first[shard]]
            for shard in shards
            if self.first[shard] < self.first[shard + 1]  # a shard without rows has no part
        ]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def part_name(shard: int) -> str:
    """File name of a shard's features."""
    return f"part-{shard:06d}.safetensors"


def read_part(path: Path, rows: int) -> EmbeddingPart:
    """One shard's features.

    Raises:
        UserError: if the file is missing, damaged, or has another number of rows.
    """
    if not path.exists():
        raise UserError(f"{path} is missing; run the recipe again to embed this shard")
    try:
        columns = load_file(path)
        kinds = {name: (columns[name].dtype.str, columns[name].ndim) for name in _COLUMNS}
        sizes = {len(columns[name]) for name in _COLUMNS}
        if kinds != _COLUMNS or len(sizes) > 1 or columns["image"].shape != columns["text"].shape:
            raise ValueError(f"its columns are {kinds}")
        if not all(np.isfinite(columns[name]).all() for name in ("image", "text", "image_norm", "text_norm")):
            raise ValueError("a feature is not a finite number")
    except Exception as error:  # damaged files raise errors of several kinds
        raise UserError(f"{path} is not a whole part ({error}); delete it and run the recipe again") from error
    part = EmbeddingPart(**{name: columns[name] for name in _COLUMNS})
    if len(part.ok) != rows:
        raise UserError(f"{path} has {len(part.ok)} rows and the index {rows}; delete it and run the recipe again")
    return part


@torch.inference_mode()
def embed_shards(
    model: nn.Module,
    index: ShardIndex,
    *,
    batches: Batches,
    preprocess_cfg: dict[str, object],
    dim: int,
    out: Path,
    device: torch.device,
    batch_size: int,
    precision: str = "fp32",
    show_progress: bool = True,
    is_stopping: Callable[[], bool] | None = None,
    texts: EmbeddingTable | None = None,
) -> None:
    """Write the features of all shards that are not there yet, shard i by process i mod world size.

    Args:
        model: open_clip towers, on `device`.
        index: the rows.
        batches: gives the decoded batches for arrays of rows, those of all shards in one go.
        preprocess_cfg: mean and std of the pixels.
        dim: dimensions of the features.
        out: folder of the parts.
        device: where the model is.
        batch_size: rows of a forward pass, on a fixed grid from the start of each shard.
        precision: `fp32` or `bf16`.
        show_progress: show a bar on the main process.
        is_stopping: asked after each shard; if so, the others are left for later.
        texts: features by the same text tower, which are taken over; the batches then need no tokens.
    """
    model.eval()
    with _embedding_bar(index, out, part_name, "embed", show_progress) as (bar, mine):
        found = batches(_grids(index, mine, batch_size))
        for number in mine:
            pieces: list[dict[str, np.ndarray]] = []
            bad: list[BadSample] = []
            full = 0
            for rows, batch in zip(_grids(index, [number], batch_size), found, strict=False):
                bad += batch.bad
                full += batch.full_captions
                pieces.append(
                    _embed_batch(model, batch, rows, preprocess_cfg, dim, device, precision, has_texts=texts is None)
                )
                bar.update(len(rows))
            columns = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
            if texts is not None:
                columns |= {name: getattr(texts.part(number), name) for name in ("text", "text_norm", "text_id")}
                full = _counts_of(texts.folder / part_name(number))["full_captions"]
            counts = {"bad_samples": bad, "full_captions": full}  # under one key: safetensors keeps no order of several
            with atomic_path(out / part_name(number)) as temporary:
                save_file(columns, temporary, metadata={"counts": json.dumps(counts)})
            if is_stopping is not None and is_stopping():
                return


@torch.inference_mode()
def write_text_features(
    model: nn.Module,
    index: ShardIndex,
    *,
    batches: Batches,
    dim: int,
    out: Path,
    device: torch.device,
    batch_size: int,
    precision: str = "fp32",
    show_progress: bool = True,
    is_stopping: Callable[[], bool] | None = None,
) -> None:
    """Write the files of `TextFeatures` for all shards that are not there yet; arguments as in `embed_shards`.

    The batches have all tokens, with padding, and need no pictures.
    """
    model.eval()
    with _embedding_bar(index, out, texts_part_name, "texts", show_progress) as (bar, mine):
        found = batches(_grids(index, mine, batch_size))
        for number in mine:
            features, ids, counts = [torch.zeros(0, dim)], [], []
            for rows, batch in zip(_grids(index, [number], batch_size), found, strict=False):
                ids.append(content_ids(batch.tokens))
                counts.append(torch.bincount(batch.rows[batch.caption_of] - int(rows[0]), minlength=len(rows)))
                if len(batch.tokens):
                    with autocast(precision, device):
                        encoded = F.normalize(encode_texts(model, batch.tokens, device), dim=1)  # as the towers do it
                    features.append(encoded.float().cpu())
                bar.update(len(rows))
            columns = {
                "features": torch.cat(features).numpy(),
                "ids": torch.cat(ids).numpy(),
                "first": np.concatenate([[0], np.cumsum(torch.cat(counts).numpy())]),
            }
            with atomic_path(out / texts_part_name(number)) as temporary:
                save_file(columns, temporary)
            if is_stopping is not None and is_stopping():
                return


@contextmanager
def _embedding_bar(
    index: ShardIndex, out: Path, name_of: Callable[[int], str], what: str, show: bool
) -> Iterator[tuple[Any, list[int]]]:
    """A bar over the rows, and the numbers, of this process's shards that have no file yet."""
    missing = [n for n, shard in enumerate(index.shards) if shard.rows and not (out / name_of(n)).exists()]
    mine = [n for n in missing if n % world_size() == rank()]
    total = sum(index.shards[n].rows for n in mine)
    with Progress(total=total, unit="row", desc=what, show=show and is_main()) as bar:
        yield bar, mine


def _grids(index: ShardIndex, numbers: Iterable[int], batch_size: int) -> Iterator[np.ndarray]:
    """The rows of each batch of some shards, in order."""
    for shard in (index.shards[number] for number in numbers):
        end = shard.first_row + shard.rows
        for start in range(shard.first_row, end, batch_size):
            yield np.arange(start, min(start + batch_size, end))


def bad_samples(folder: Path, index: ShardIndex) -> list[BadSample]:
    """The rows that could not be decoded, from all parts."""
    return [BadSample(*bad) for counts in _counts(folder, index) for bad in counts["bad_samples"]]


def full_captions(folder: Path, index: ShardIndex) -> int:
    """How many captions fill the context of the text tower; what is longer was cut. For tokenizers that pad with 0."""
    return sum(int(counts["full_captions"]) for counts in _counts(folder, index))


def _counts(folder: Path, index: ShardIndex) -> Iterator[dict[str, Any]]:
    for number in (n for n, shard in enumerate(index.shards) if shard.rows):
        yield _counts_of(folder / part_name(number))


def _counts_of(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="numpy") as part:
        return _parsed_counts((part.metadata() or {}).get("counts", ""), path)


def _parsed_counts(text: str, path: Path) -> dict[str, Any]:
    try:
        counts = json.loads(text)
        kinds = [tuple(type(value) for value in bad) for bad in counts["bad_samples"]]
        if type(counts["full_captions"]) is not int or any(kind != (int, str, str) for kind in kinds):
            raise ValueError("bad_samples")
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(f"{path} has no counts of bad samples; delete it and run the recipe again") from error
    found: dict[str, Any] = counts
    return found


def _embed_batch(
    model: nn.Module,
    batch: CaptionedBatch,
    rows: Int64[np.ndarray, "rows"],
    preprocess_cfg: dict[str, object],
    dim: int,
    device: torch.device,
    precision: str,
    *,
    has_texts: bool,
) -> dict[str, np.ndarray]:
    """The columns of `EmbeddingPart` for `rows`, those of texts if asked for; the batch lacks bad rows."""
    place = batch.rows - int(rows[0])
    columns: dict[str, np.ndarray] = {"ok": np.zeros(len(rows), bool)}
    columns["ok"][place] = True
    columns["image_id"] = _scatter(batch.image_ids, place, len(rows)).numpy()
    image = captions = torch.zeros(0, dim, device=device)
    with autocast(precision, device):
        if len(place):
            image = model.encode_image(to_floats(batch.images.to(device), preprocess_cfg)).float()  # type: ignore[operator]
        if len(place) and has_texts:
            captions = encode_texts(model, batch.tokens, device).float()
    sides = {"image": (image, image.norm(dim=1))}
    if has_texts:
        columns["text_id"] = _scatter(batch.text_ids, place, len(rows)).numpy()
        of = batch.caption_of.to(device)
        count = torch.bincount(of, minlength=len(place)).clamp(min=1)
        text = torch.zeros_like(image).index_add_(0, of, F.normalize(captions, dim=1)) / count[:, None]
        norm = torch.zeros(len(place), device=device).index_add_(0, of, captions.norm(dim=1)) / count
        sides["text"] = (text, norm)
    for side, (features, norms) in sides.items():
        columns[side] = _scatter(F.normalize(features, dim=1).half().cpu(), place, len(rows)).numpy()
        columns[f"{side}_norm"] = _scatter(norms.cpu(), place, len(rows)).numpy()
    return columns


def _scatter(values: Tensor, place: Tensor, size: int) -> Tensor:
    return values.new_zeros(size, *values.shape[1:]).index_copy_(0, place, values)
