"""Batches of pixels and tokens, decoded in DataLoader workers.

`TrainingLoader` yields this process's part of each global batch of a plan; `captioned_batches` yields given rows with
all their captions, for embedding and evaluation. A training batch is a function of (seed, stage, step) alone, not of
the number of workers. The loaders are not passed to `accelerator.prepare`, which would drop or repeat data silently.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float32, Int, Int64, UInt8
from torch import Tensor
from torch.nn import functional as F

from mcl_clip.core.distributed import Name, check_same, random_words, rank, world_size
from mcl_clip.core.errors import UserError
from mcl_clip.data.batch_plan import FILLER, BatchPlan
from mcl_clip.data.decode import MAX_PIXELS, BadSampleError, EvaluationTransform, TrainTransform, decode_captions
from mcl_clip.data.features import TextFeatures
from mcl_clip.data.reader import RawSample, Reader
from mcl_clip.data.shards import redacted
from mcl_clip.data.workers import load_batches

Tokenizer = Callable[[list[str]], Tensor]
Batch = TypeVar("Batch", bound="_Batch")
CPU = torch.device("cpu")
LOADER_TIMEOUT_S = 1800.0  # longer than all retries of a read together
PART_ROWS = 256  # of a local batch; larger ones are decoded in parts by several workers
LENGTH_MULTIPLE = 8  # of trimmed texts: few distinct lengths, for which kernels are chosen or compiled


class BadSample(NamedTuple):
    """A row that could not be decoded and became a filler."""

    row: int
    shard: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class _Batch:
    def pin_memory(self: Batch) -> Batch:
        """Copy the batch to page-locked memory (called by the DataLoader)."""
        return self._map_tensors(lambda tensor: tensor.pin_memory())

    def share_memory_(self: Batch) -> Batch:
        """Move the batch to memory that other processes read (called in loader processes)."""
        return self._map_tensors(lambda tensor: tensor.share_memory_())  # type: ignore[no-untyped-call]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in vars(self).values() if isinstance(tensor, Tensor))

    def to(self: Batch, device: torch.device) -> Batch:
        """Copy the batch to a device."""
        return self._map_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def _map_tensors(self: Batch, function: Callable[[Tensor], Tensor]) -> Batch:
        tensors: dict[str, Any] = {name: function(t) for name, t in vars(self).items() if isinstance(t, Tensor)}
        return replace(self, **tensors)


@dataclass(frozen=True, kw_only=True)
class PairBatch(_Batch):
    """The part of a global batch that one process holds.

    `rows`, `text_ids` and `image_ids` have an entry for every row, fillers (row -1) included. `images` and `tokens`
    hold decoded samples only, and `places` the index of each among `rows`. Ids are hashes of the tokens and of the
    image bytes. Where text features come from disk, `text_features` holds them and `tokens` have length 0.
    """

    step: int
    rows: Int64[Tensor, "local"]
    text_ids: Int64[Tensor, "local"]
    image_ids: Int64[Tensor, "local"]
    images: UInt8[Tensor, "decoded 3 height width"]
    tokens: Int[Tensor, "decoded length"]
    places: Int64[Tensor, "decoded"]
    text_features: Float32[Tensor, "decoded dim"] | None = None
    bad: tuple[BadSample, ...]


@dataclass(frozen=True, kw_only=True)
class CaptionedBatch(_Batch):
    """Rows with all their captions: `tokens[j]` belongs to `rows[caption_of[j]]`. Bad rows are left out.

    `full_captions` counts captions without padding, that is, those that may have been truncated.
    """

    rows: Int64[Tensor, "images"]
    images: UInt8[Tensor, "images 3 height width"]
    image_ids: Int64[Tensor, "images"]
    tokens: Int[Tensor, "captions length"]
    caption_of: Int64[Tensor, "captions"]
    text_ids: Int64[Tensor, "images"]
    full_captions: int
    bad: tuple[BadSample, ...]


class TrainingLoader:
    """Iterates over the local batches of a plan; which rows of a global batch are local follows from the rank."""

    def __init__(
        self,
        plan: BatchPlan,
        reader: Reader,
        *,
        transform: TrainTransform,
        tokenizer: Tokenizer,
        short_texts: bool = False,
        texts: TextFeatures | None = None,
        num_workers: int = 0,
        prefetch_batches: int = 4,
        device: torch.device = CPU,
        timeout_s: float = LOADER_TIMEOUT_S,
        max_pixels: int = MAX_PIXELS,
        json_key: str = "caption",
    ) -> None:
        """Prepare a loader; raise UserError if the global batch is not divisible by the number of processes.

        `short_texts` trims the padding after the longest caption of a batch; features `texts` replace tokens. Each of
        `num_workers` keeps `prefetch_batches` ready and must deliver one within `timeout_s`; 0 decodes in this process.
        Images are copied to `device`; the rest of a batch stays on the CPU, page-locked if that is a GPU. Images over
        `max_pixels` are bad samples; `json_key` is the key of the captions in a .json member.
        """
        if plan.global_batch_size % world_size():
            raise UserError(
                f"a global batch of {plan.global_batch_size} rows is not divisible by {world_size()} processes; "
                f"use a multiple of {world_size()}"
            )
        self.plan = plan
        maker = _PairBatches(
            reader=reader, transform=transform, tokenizer=tokenizer, short_texts=short_texts, max_pixels=max_pixels,
            json_key=json_key, texts=texts, name=(plan.seed, plan.stage),
        )  # fmt: skip
        self._local_rows = plan.global_batch_size // world_size()
        self._parts = -(-self._local_rows // PART_ROWS)
        self._device = device
        self._load = partial(
            load_batches, maker.make_batch, describe=maker.describe, num_workers=num_workers,
            prefetch_batches=prefetch_batches * self._parts, pin_memory=device.type == "cuda", timeout_s=timeout_s,
        )  # fmt: skip

    def steps(self, start_step: int, stop_step: int) -> Iterator[PairBatch]:
        """Yield the batches of `start_step` to `stop_step - 1`; raise UserError if plans differ or reading fails."""
        batches = self._load(self._requests(start_step, stop_step))
        while parts := tuple(itertools.islice(batches, self._parts)):
            yield _join_parts(parts, self._device)

    def _requests(self, start_step: int, stop_step: int) -> Iterator[tuple[int, int, Int[np.ndarray, "_part"]]]:
        """Yield step, epoch and rows of each part of the local batches."""
        checked = -1
        for step in range(start_step, stop_step):
            epoch = self.plan.epoch_of(step)
            if epoch != checked and world_size() > 1:
                check_same(self.plan.digest(epoch), f"the plan of epoch {epoch}")
            checked = epoch
            local = self.plan.batch(step)[rank() * self._local_rows : (rank() + 1) * self._local_rows]
            for start in range(0, len(local), PART_ROWS):
                yield step, epoch, local[start : start + PART_ROWS]


def pin(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to page-locked memory, if it is not there, for a GPU that copies it while this process goes on."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


def _join_parts(parts: tuple[PairBatch, ...], device: torch.device) -> PairBatch:
    """Join the parts of a local batch, with the images on a device."""

    def cat(tensors: list[Tensor]) -> Tensor:
        return pin(torch.cat(tensors), device)

    starts = np.cumsum([0, *(len(part.rows) for part in parts)]).tolist()
    decoded = [(part, start) for part, start in zip(parts, starts, strict=False) if (part.rows != FILLER).any()]
    decoded = decoded or [(parts[0], 0)]  # a part without a decoded row holds one black image
    length = max(part.tokens.shape[1] for part, _ in decoded)
    features = [part.text_features for part, _ in decoded if part.text_features is not None]
    return PairBatch(
        step=parts[0].step,
        **{name: cat([getattr(part, name) for part in parts]) for name in ("rows", "text_ids", "image_ids")},
        images=torch.cat([part.images.to(device, non_blocking=True) for part, _ in decoded]),
        tokens=cat([F.pad(part.tokens, (0, length - part.tokens.shape[1])) for part, _ in decoded]),
        places=cat([part.places + start for part, start in decoded]),
        text_features=cat(features) if features else None,
        bad=tuple(bad for part in parts for bad in part.bad),
    )


def captioned_batches(
    reader: Reader,
    batches: Iterable[Int[np.ndarray, "_rows"]],
    *,
    transform: EvaluationTransform | TrainTransform | None,
    tokenizer: Tokenizer | None,
    short_texts: bool = False,
    num_workers: int = 0,
    prefetch_batches: int = 4,
    device: torch.device = CPU,
    timeout_s: float = LOADER_TIMEOUT_S,
    max_pixels: int = MAX_PIXELS,
    json_key: str = "caption",
) -> Iterator[CaptionedBatch]:
    """Yield one `CaptionedBatch` for each array of rows, in order; raise UserError if a shard cannot be read.

    See `TrainingLoader` for the arguments. Without a `transform` images are not decoded and have no pixels; without a
    `tokenizer` texts have no tokens.
    """
    maker = _CaptionedBatches(
        reader=reader, transform=transform, tokenizer=tokenizer, short_texts=short_texts, max_pixels=max_pixels,
        json_key=json_key,
    )  # fmt: skip
    yield from load_batches(
        maker.make_batch, batches, describe=maker.describe, num_workers=num_workers, prefetch_batches=prefetch_batches,
        pin_memory=device.type == "cuda", timeout_s=timeout_s,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _BatchMaker:
    """Makes batches in a loader process."""

    reader: Reader
    transform: EvaluationTransform | TrainTransform | None
    tokenizer: Tokenizer | None
    short_texts: bool
    max_pixels: int
    json_key: str

    def describe(self, request: Any) -> str:
        """Name the rows of a request and the shards they are in."""
        rows = np.asarray(request[-1] if isinstance(request, tuple) else request)
        index, rows = self.reader.index, rows[rows != FILLER]
        shards = np.unique(index.shard_of[rows])
        urls = ", ".join(redacted(index.shards[number].url) for number in shards[:3].tolist())
        more = f" and {len(shards) - 3} more shards" if len(shards) > 3 else ""
        return f"rows {rows.min(initial=len(index))} to {rows.max(initial=0)} of {urls}{more}"

    def decode(
        self, rows: Int[np.ndarray, "rows"], *name: Name
    ) -> Iterator[tuple[RawSample, Tensor, list[str]] | BadSample]:
        """Yield (raw sample, pixels, captions) or a BadSample for each row; `name` identifies random transforms."""
        pixels = torch.zeros(3, 0, 0, dtype=torch.uint8)
        for raw in self.reader.read(rows):
            try:
                if isinstance(self.transform, TrainTransform):
                    pixels = self.transform.decode(raw.image, *name, raw.row, "augment", max_pixels=self.max_pixels)
                elif self.transform is not None:
                    pixels = self.transform.decode(raw.image, max_pixels=self.max_pixels)
                yield raw, pixels, decode_captions(raw.text, raw.text_format, json_key=self.json_key)
            except BadSampleError as error:
                index = self.reader.index
                shard = redacted(index.shards[int(index.shard_of[raw.row])].url)
                yield BadSample(raw.row, shard, error.reason)


@dataclass(frozen=True, kw_only=True)
class _PairBatches(_BatchMaker):
    """Makes parts of local batches; `name` and the row name every random draw."""

    transform: TrainTransform
    tokenizer: Tokenizer
    texts: TextFeatures | None
    name: tuple[Name, ...]

    def make_batch(self, request: tuple[int, int, Int[np.ndarray, "_part"]]) -> PairBatch:
        step, epoch, planned_rows = request
        rows = torch.from_numpy(planned_rows.astype(np.int64))
        planned = np.flatnonzero(planned_rows != FILLER)
        image_ids, text_ids = torch.zeros_like(rows), torch.zeros_like(rows)
        places, images, captions, caption_numbers, bad = [], [], [], [], []
        samples = self.decode(planned_rows[planned], *self.name, epoch)
        for place, sample in zip(planned.tolist(), samples, strict=True):
            if isinstance(sample, BadSample):
                bad.append(sample)
                rows[place] = FILLER
                continue
            raw, pixels, texts = sample
            places.append(place)
            images.append(pixels)
            word = random_words(1, *self.name, epoch, raw.row, "caption")[0]
            caption_numbers.append(int(word % np.uint64(len(texts))))
            captions.append(texts[caption_numbers[-1]])
            image_ids[place] = content_id(raw.image)
        # A process with nothing but fillers still takes part in the backward pass: one black image of weight 0.
        images = images or [torch.zeros(3, *self.transform.size_px, dtype=torch.uint8)]
        tokens, text_features = torch.zeros(len(images), 0, dtype=torch.int64), None
        if self.texts is None:
            tokens = self.tokenizer(captions or [""])
            text_ids[places] = content_ids(tokens[: len(places)])
            tokens = trim_padding(tokens) if self.short_texts else tokens
        else:
            text_features, text_ids[places] = self.texts.take(rows[places].tolist(), caption_numbers)
            text_features = text_features if places else torch.zeros(1, self.texts.dim)
        return PairBatch(
            step=step,
            rows=rows,
            text_ids=text_ids,
            image_ids=image_ids,
            images=torch.stack(images),
            tokens=tokens,
            places=torch.tensor(places or [0]),
            text_features=text_features,
            bad=tuple(bad),
        )


class _CaptionedBatches(_BatchMaker):
    """Makes batches with all captions of their rows."""

    def make_batch(self, request: Int[np.ndarray, "_rows"]) -> CaptionedBatch:
        rows: list[int] = []
        images, image_ids, text_ids, captions, caption_of, bad = [], [], [], [], [], []
        for sample in self.decode(request):
            if isinstance(sample, BadSample):
                bad.append(sample)
                continue
            raw, pixels, texts = sample
            caption_of += [len(rows)] * len(texts)
            captions += texts
            rows.append(raw.row)
            images.append(pixels)
            image_ids.append(content_id(raw.image))
            text_ids.append(content_id(raw.text))
        tokens = torch.zeros(len(captions), 0, dtype=torch.int64)
        if self.tokenizer is not None and captions:
            tokens = self.tokenizer(captions)
        return CaptionedBatch(
            rows=torch.tensor(rows, dtype=torch.int64),
            images=torch.stack(images) if images else torch.zeros(0, 3, 1, 1, dtype=torch.uint8),
            image_ids=torch.tensor(image_ids, dtype=torch.int64),
            tokens=trim_padding(tokens) if self.short_texts else tokens,
            caption_of=torch.tensor(caption_of, dtype=torch.int64),
            text_ids=torch.tensor(text_ids, dtype=torch.int64),
            full_captions=int(tokens[:, -1].ne(0).sum()) if tokens.numel() else 0,
            bad=tuple(bad),
        )


def trim_padding(tokens: Int[Tensor, "texts length"]) -> Int[Tensor, "texts shorter"]:
    """Trim columns of zeros at the end, to a multiple of 8."""
    used = int(tokens.any(0).nonzero().max()) + 1 if tokens.any() else 0
    return tokens[:, : min(-(-used // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, tokens.shape[1])]


def content_ids(tokens: Int[Tensor, "texts length"]) -> Int64[Tensor, "texts"]:
    """Compute the `content_id` of the tokens of each text."""
    return torch.tensor([content_id(sequence.numpy().tobytes()) for sequence in tokens], dtype=torch.int64)


def content_id(data: bytes) -> int:
    """Compute a 64-bit signed hash; equal bytes have equal ids."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)
