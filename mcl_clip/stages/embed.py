"""The embedding pass: features of every row, or of every caption, under the model of one stage."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import tee
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int64
from torch import Tensor, nn

from mcl_clip.core.distributed import barrier, claim, is_main, on_main, rank, shared_counter, world_size
from mcl_clip.core.progress import Progress
from mcl_clip.data.batches import BadSample, CaptionedBatch
from mcl_clip.data.features import (
    EmbeddingTable,
    image_part_name,
    part_name,
    read_counts,
    read_piece,
    text_part_name,
    write_part,
)
from mcl_clip.data.index import ShardIndex
from mcl_clip.data.loader import content_ids
from mcl_clip.model.clip import autocast, encode_texts, to_floats

PIECE_ROWS = 4096  # rows that a process embeds and keeps at a time, in whole batches
Batches = Callable[[Iterable[np.ndarray]], Iterator[CaptionedBatch]]
PieceKey = tuple[int, int]
Piece = tuple[dict[str, np.ndarray], dict[str, Any]]  # columns, and what was counted


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
    has_texts: bool = True,
) -> None:
    """Write the embeddings of all shards that have no part file yet; processes share the rows by their speed.

    `batches` decodes the batches of an iterable of row arrays and is called once for all of them; they have
    `batch_size` rows, on a fixed grid from the start of each shard. Large shards are kept in pieces until all processes
    are done. `is_stopping` is called after each piece: once it returns True, the rest is left for a later call.
    `texts` are embeddings by the same text encoder: their text columns are copied, and the batches need no tokens. A
    model without a text encoder (not `has_texts`) has text features of width 0. A collective call.
    """
    model.eval()
    needs_texts = has_texts and texts is None

    def embed(rows: np.ndarray, batch: CaptionedBatch) -> Piece:
        columns = _embed_batch(model, batch, rows, preprocess_cfg, dim, device, precision, needs_texts=needs_texts)
        if not has_texts:
            empty: dict[str, np.ndarray] = {
                "text": np.zeros((len(rows), 0), np.float16),
                "text_norm": np.zeros(len(rows), np.float32),
            }
            columns |= {**empty, "text_id": np.zeros(len(rows), np.int64)}
        return columns, {"bad_samples": list(batch.bad), "full_captions": batch.full_captions}

    def finish(number: int, columns: dict[str, np.ndarray], counts: dict[str, Any]) -> Piece:
        if texts is not None:
            columns |= {name: getattr(texts.part(number), name) for name in ("text", "text_norm", "text_id")}
            counts["full_captions"] = read_counts(texts.folder / part_name(number))["full_captions"]
        return columns, counts

    _write_parts(index, out, part_name, embed, finish, batches, batch_size, "embed", show_progress, is_stopping)


@torch.inference_mode()
def write_text_features(
    encode: Callable[[Tensor], Tensor],
    index: ShardIndex,
    *,
    batches: Batches,
    dim: int,
    out: Path,
    batch_size: int,
    show_progress: bool = True,
    is_stopping: Callable[[], bool] | None = None,
) -> None:
    """Write the files of `TextFeatures` for all shards that have none yet; arguments as in `embed_shards`.

    `encode` maps tokens to what is stored of each caption, [captions, dim]. The batches contain the tokens of all
    captions, with padding, and need no images.
    """

    def embed(rows: np.ndarray, batch: CaptionedBatch) -> Piece:
        features = encode(batch.tokens) if len(batch.tokens) else torch.zeros(0, dim)
        captions = torch.bincount(batch.rows[batch.caption_of] - int(rows[0]), minlength=len(rows))
        columns = {"features": features.float().cpu(), "ids": content_ids(batch.tokens), "captions": captions}
        return {name: column.numpy() for name, column in columns.items()}, {}

    def finish(_: int, columns: dict[str, np.ndarray], __: dict[str, Any]) -> Piece:
        first = np.concatenate([[0], np.cumsum(columns.pop("captions"))])
        return {**columns, "first": first}, {}

    _write_parts(index, out, text_part_name, embed, finish, batches, batch_size, "texts", show_progress, is_stopping)


@torch.inference_mode()
def write_image_outputs(
    encode: Callable[[Tensor], Tensor],
    index: ShardIndex,
    *,
    batches: Batches,
    shape: Sequence[int],
    out: Path,
    batch_size: int,
    show_progress: bool = True,
    is_stopping: Callable[[], bool] | None = None,
) -> None:
    """Write the parts of a view of `ImageOutputs` for all shards that have none yet; arguments as in `embed_shards`.

    `encode` maps pixels to what is stored of each image, [images, *shape]. The batches need no tokens.
    """

    def embed(rows: np.ndarray, batch: CaptionedBatch) -> Piece:
        position = batch.rows - int(rows[0])
        outputs = encode(batch.images).float().cpu() if len(batch.rows) else torch.zeros(0, *shape)
        columns = {"outputs": outputs, "ids": batch.image_ids, "ok": torch.ones(len(position), dtype=torch.bool)}
        scattered = {
            name: values.new_zeros(len(rows), *values.shape[1:]).index_copy_(0, position, values).numpy()
            for name, values in columns.items()
        }
        return scattered, {"bad_samples": list(batch.bad), "full_captions": 0}

    def finish(_: int, columns: dict[str, np.ndarray], counts: dict[str, Any]) -> Piece:
        return columns, counts

    _write_parts(index, out, image_part_name, embed, finish, batches, batch_size, "images", show_progress, is_stopping)


def _write_parts(
    index: ShardIndex,
    out: Path,
    name_of: Callable[[int], str],
    embed: Callable[[np.ndarray, CaptionedBatch], Piece],
    finish: Callable[[int, dict[str, np.ndarray], dict[str, Any]], Piece],
    batches: Batches,
    batch_size: int,
    what: str,
    show_progress: bool,
    is_stopping: Callable[[], bool] | None,
) -> None:
    """Write the missing pieces of shards, then join them to part files; `finish` completes the columns of a part."""
    pieces = _Pieces(index=index, out=out, name_of=name_of, max_rows=batch_size * max(1, PIECE_ROWS // batch_size))

    def batch_rows(piece: PieceKey) -> Iterator[np.ndarray]:
        rows = index.shards[piece[0]].first_row + np.array(pieces.rows(piece))
        return (rows[n : n + batch_size] for n in range(0, len(rows), batch_size))

    missing = on_main(pieces.missing)
    sizes = [len(pieces.rows(piece)) for piece in missing]
    to_load, to_embed = tee(claim(missing, sizes))  # loader processes, which work ahead, need a piece first
    loaded = batches(rows for piece in to_load for rows in batch_rows(piece))
    embedded = shared_counter("embedded rows")
    with Progress(total=sum(sizes), unit="row", desc=what, show=show_progress and is_main()) as bar:
        for piece in to_embed:
            found = []
            for rows in batch_rows(piece):
                found.append(embed(rows, next(loaded)))
                bar.update(embedded("all", len(rows)) - bar.n)
            is_whole, joined = len(pieces.of(piece[0])) == 1, _join(found)
            write_part(pieces.path(piece), *(finish(piece[0], *joined) if is_whole else joined))
            if is_stopping is not None and is_stopping():
                break
    barrier()  # all pieces are written
    for number in range(rank(), len(index.shards), world_size()):
        paths = [pieces.path(piece) for piece in pieces.of(number)]
        if len(paths) > 1 and all(path.exists() for path in paths):
            write_part(out / name_of(number), *finish(number, *_join([read_piece(path) for path in paths])))
            for path in paths:
                path.unlink()


@dataclass(frozen=True, kw_only=True)
class _Pieces:
    """The pieces of at most `max_rows` rows in which shards are embedded: shard, and first row in it."""

    index: ShardIndex
    out: Path
    name_of: Callable[[int], str]
    max_rows: int

    def of(self, number: int) -> list[PieceKey]:
        return [(number, start) for start in range(0, self.index.shards[number].rows, self.max_rows)]

    def rows(self, piece: PieceKey) -> range:
        return range(piece[1], min(piece[1] + self.max_rows, self.index.shards[piece[0]].rows))

    def path(self, piece: PieceKey) -> Path:
        name = self.name_of(piece[0])
        is_whole = self.index.shards[piece[0]].rows <= self.max_rows  # of a small shard: its part file
        return self.out / (name if is_whole else f"{name}.rows-{piece[1]:012d}")

    def missing(self) -> list[PieceKey]:
        shards = [n for n in range(len(self.index.shards)) if not (self.out / self.name_of(n)).exists()]
        return [piece for number in shards for piece in self.of(number) if not self.path(piece).exists()]


def _join(pieces: list[Piece]) -> Piece:
    """Concatenate the columns of pieces, and add what was counted in them."""
    columns = {name: np.concatenate([of_one[name] for of_one, _ in pieces]) for name in pieces[0][0]}
    counts = {name: sum((of_one[name] for _, of_one in pieces[1:]), value) for name, value in pieces[0][1].items()}
    return columns, counts


def read_losses(folder: Path, index: ShardIndex) -> tuple[list[BadSample], int]:
    """Return the rows that could not be decoded, and how many captions fill the context of the text encoder."""
    counts = [read_counts(folder / part_name(number)) for number, shard in enumerate(index.shards) if shard.rows]
    bad = [BadSample(*bad) for one in counts for bad in one["bad_samples"]]
    return bad, sum(one["full_captions"] for one in counts)


def _embed_batch(
    model: nn.Module,
    batch: CaptionedBatch,
    rows: Int64[np.ndarray, "rows"],
    preprocess_cfg: dict[str, object],
    dim: int,
    device: torch.device,
    precision: str,
    *,
    needs_texts: bool,
) -> dict[str, np.ndarray]:
    """Compute the columns of `EmbeddingPart` for `rows`, without the text columns unless `needs_texts`.

    The batch lacks the bad rows, which become zeros.
    """
    position = batch.rows - int(rows[0])

    def scatter(values: Tensor) -> np.ndarray:
        return values.new_zeros(len(rows), *values.shape[1:]).index_copy_(0, position, values).numpy()

    image = captions = torch.zeros(0, dim, device=device)
    with autocast(precision, device):
        if len(position):
            image = model.encode_image(to_floats(batch.images.to(device), preprocess_cfg)).float()  # type: ignore[operator]
        if len(position) and needs_texts:
            captions = encode_texts(model, batch.tokens, device).float()
    columns = {"ok": scatter(torch.ones(len(position), dtype=torch.bool)), "image_id": scatter(batch.image_ids)}
    sides = {"image": (image, image.norm(dim=1))}
    if needs_texts:
        columns["text_id"] = scatter(batch.text_ids)
        owner = batch.caption_of.to(device)
        count = torch.bincount(owner, minlength=len(position))
        text = torch.zeros_like(image).index_add_(0, owner, F.normalize(captions, dim=1)) / count[:, None]
        norm = torch.zeros(len(position), device=device).index_add_(0, owner, captions.norm(dim=1)) / count
        sides["text"] = (text, norm)
    for side, (features, norms) in sides.items():
        columns[side] = scatter(F.normalize(features, dim=1).half().cpu())
        columns[f"{side}_norm"] = scatter(norms.cpu())
    return columns
