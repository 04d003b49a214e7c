"""The embedding pass: features of every row, or of every caption, under the model of one stage."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int64
from torch import Tensor, nn

from mcl_clip.core.distributed import is_main, rank, world_size
from mcl_clip.core.progress import Progress
from mcl_clip.data.features import EmbeddingTable, part_name, read_counts, text_part_name, write_part
from mcl_clip.data.index import ShardIndex
from mcl_clip.data.loader import BadSample, CaptionedBatch, content_ids
from mcl_clip.model.clip import autocast, encode_texts, to_floats

Batches = Callable[[Iterable[np.ndarray]], Iterator[CaptionedBatch]]


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
    """Write the embeddings of all shards that have no part file yet; process `i mod world_size` embeds shard i.

    `batches` decodes the batches of an iterable of row arrays and is called once for all shards; they have `batch_size`
    rows, on a fixed grid from the start of each shard. `is_stopping` is called after each shard: once it returns True,
    the remaining shards are left for a later call. `texts` are embeddings by the same text encoder: their text columns
    are copied, and the batches need no tokens.
    """
    model.eval()
    shards = _own_shards(index, out, part_name, batches, batch_size, "embed", show_progress, is_stopping)
    for number, shard in shards:
        pieces: list[dict[str, np.ndarray]] = []
        bad: list[BadSample] = []
        full = 0
        for rows, batch in shard:
            bad += batch.bad
            full += batch.full_captions
            piece = _embed_batch(model, batch, rows, preprocess_cfg, dim, device, precision, has_texts=texts is None)
            pieces.append(piece)
        columns = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
        if texts is not None:
            columns |= {name: getattr(texts.part(number), name) for name in ("text", "text_norm", "text_id")}
            full = next(read_counts(texts.folder, index, number))["full_captions"]
        write_part(out / part_name(number), columns, {"bad_samples": bad, "full_captions": full})


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
    """Write the files of `TextFeatures` for all shards that have none yet; arguments as in `embed_shards`.

    The batches contain the tokens of all captions, with padding, and need no images.
    """
    model.eval()
    shards = _own_shards(index, out, text_part_name, batches, batch_size, "texts", show_progress, is_stopping)
    for number, shard in shards:
        features, ids, counts = [torch.zeros(0, dim)], [], []
        for rows, batch in shard:
            ids.append(content_ids(batch.tokens))
            counts.append(torch.bincount(batch.rows[batch.caption_of] - int(rows[0]), minlength=len(rows)))
            if len(batch.tokens):
                with autocast(precision, device):  # normalized inside, as in a training step
                    encoded = F.normalize(encode_texts(model, batch.tokens, device), dim=1)
                features.append(encoded.float().cpu())
        first = np.concatenate([[0], np.cumsum(torch.cat(counts).numpy())])
        columns = {"features": torch.cat(features).numpy(), "ids": torch.cat(ids).numpy(), "first": first}
        write_part(out / text_part_name(number), columns)


def _own_shards(
    index: ShardIndex,
    out: Path,
    name_of: Callable[[int], str],
    batches: Batches,
    batch_size: int,
    what: str,
    show_progress: bool,
    is_stopping: Callable[[], bool] | None,
) -> Iterator[tuple[int, Iterator[tuple[np.ndarray, CaptionedBatch]]]]:
    """Yield each shard of this process that has no part file yet, with the rows and the samples of its batches."""
    missing = [n for n, shard in enumerate(index.shards) if shard.rows and not (out / name_of(n)).exists()]
    mine = [n for n in missing if n % world_size() == rank()]

    def batch_rows(number: int) -> Iterator[np.ndarray]:
        first, rows = index.shards[number].first_row, index.shards[number].rows
        return (np.arange(first + n, first + min(n + batch_size, rows)) for n in range(0, rows, batch_size))

    def batches_of(number: int) -> Iterator[tuple[np.ndarray, CaptionedBatch]]:
        for rows in batch_rows(number):
            yield rows, next(loaded)
            bar.update(len(rows))

    loaded = batches(rows for number in mine for rows in batch_rows(number))
    total = sum(index.shards[n].rows for n in mine)
    with Progress(total=total, unit="row", desc=what, show=show_progress and is_main()) as bar:
        for number in mine:
            yield number, batches_of(number)
            if is_stopping is not None and is_stopping():
                return


def read_losses(folder: Path, index: ShardIndex) -> tuple[list[BadSample], int]:
    """Return the rows that could not be decoded, and how many captions fill the context of the text encoder."""
    counts = list(read_counts(folder, index))
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
    has_texts: bool,
) -> dict[str, np.ndarray]:
    """Compute the columns of `EmbeddingPart` for `rows`, without the text columns unless `has_texts`.

    The batch lacks the bad rows, which become zeros.
    """
    position = batch.rows - int(rows[0])

    def scatter(values: Tensor) -> np.ndarray:
        return values.new_zeros(len(rows), *values.shape[1:]).index_copy_(0, position, values).numpy()

    image = captions = torch.zeros(0, dim, device=device)
    with autocast(precision, device):
        if len(position):
            image = model.encode_image(to_floats(batch.images.to(device), preprocess_cfg)).float()  # type: ignore[operator]
        if len(position) and has_texts:
            captions = encode_texts(model, batch.tokens, device).float()
    columns = {"ok": scatter(torch.ones(len(position), dtype=torch.bool)), "image_id": scatter(batch.image_ids)}
    sides = {"image": (image, image.norm(dim=1))}
    if has_texts:
        columns["text_id"] = scatter(batch.text_ids)
        owner = batch.caption_of.to(device)
        count = torch.bincount(owner, minlength=len(position)).clamp(min=1)
        text = torch.zeros_like(image).index_add_(0, owner, F.normalize(captions, dim=1)) / count[:, None]
        norm = torch.zeros(len(position), device=device).index_add_(0, owner, captions.norm(dim=1)) / count
        sides["text"] = (text, norm)
    for side, (features, norms) in sides.items():
        columns[side] = scatter(F.normalize(features, dim=1).half().cpu())
        columns[f"{side}_norm"] = scatter(norms.cpu())
    return columns
