"""Batches of pixels and tokens, made in loader workers.

A worker makes local batches from row numbers, or parts of large ones, which the main process joins. A batch is a
function of (seed, stage, step) alone, not of the number of workers. The loader is not given to `accelerator.prepare`,
which would drop or repeat data silently.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float32, Int, Int64, UInt8
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from mcl_clip.core.console import leave_signals_to_parent
from mcl_clip.core.distributed import Name, check_same, random_words, rank, world_size
from mcl_clip.core.errors import UserError, explain_os_error
from mcl_clip.data.batch_plan import FILLER, BatchPlan
from mcl_clip.data.decode import BadSampleError, EvaluationTransform, TrainTransform, decode_captions, empty_images
from mcl_clip.data.features import TextFeatures
from mcl_clip.data.reader import RawSample, Reader
from mcl_clip.data.shards import redacted

Tokenizer = Callable[[list[str]], Tensor]
Batch = TypeVar("Batch", "PairBatch", "CaptionedBatch")
CPU = torch.device("cpu")
PART_ROWS = 256  # of a batch that a worker makes at a time
LENGTH_MULTIPLE = 8  # of texts without padding: few lengths, for which kernels are chosen or compiled


class BadSample(NamedTuple):
    """A row that could not be decoded and became a filler."""

    row: int
    shard: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class PairBatch:
    """The part of a global batch that one process holds.

    `rows`, `text_ids` and `image_ids` have a place for every row, fillers too (row -1). `images` and `tokens` hold only
    what could be decoded; `places` says where each belongs. Ids are hashes of the tokens and of the image bytes. Where
    text features come from disk, `text_features` holds them and `tokens` have length 0.
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

    def pin_memory(self) -> "PairBatch":
        """The same batch in page-locked memory (called by the DataLoader)."""
        return _each(self, lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device) -> "PairBatch":
        """The same batch on a device."""
        return _each(self, lambda tensor: tensor.to(device, non_blocking=True))


@dataclass(frozen=True, kw_only=True)
class CaptionedBatch:
    """Rows with all their captions: `tokens[j]` belongs to `rows[caption_of[j]]`. Rows that are bad are left out.

    `full_captions` is the number of captions without padding: what was longer is cut.
    """

    rows: Int64[Tensor, "images"]
    images: UInt8[Tensor, "images 3 height width"]
    image_ids: Int64[Tensor, "images"]
    tokens: Int[Tensor, "captions length"]
    caption_of: Int64[Tensor, "captions"]
    text_ids: Int64[Tensor, "images"]
    full_captions: int
    bad: tuple[BadSample, ...]

    def pin_memory(self) -> "CaptionedBatch":
        """The same batch in page-locked memory (called by the DataLoader)."""
        return _each(self, lambda tensor: tensor.pin_memory())


def _each(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """The batch with all its tensors changed."""
    values: dict[str, Any] = {field.name: getattr(batch, field.name) for field in fields(batch)}
    tensors: dict[str, Any] = {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}
    return replace(batch, **tensors)


def without_padding(tokens: Int[Tensor, "texts length"]) -> Int[Tensor, "texts shorter"]:
    """The texts without the columns of zeros at the end, but for some up to a multiple of 8."""
    used = int(tokens.any(0).nonzero().max()) + 1 if tokens.any() else 0
    return tokens[:, : min(-(-used // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, tokens.shape[1])]


class _Request(NamedTuple):
    step: int
    epoch: int
    rows: Int[np.ndarray, "part"]


@dataclass(frozen=True, kw_only=True)
class _Decoder:
    """From rows to decoded samples; what cannot be decoded is named."""

    reader: Reader
    max_pixels: int
    json_key: str

    def samples(
        self, rows: Int[np.ndarray, "rows"], pixels_of: Callable[[RawSample], Tensor]
    ) -> Iterator[tuple[int, Any]]:
        """(place, (raw sample, pixels, captions)) or (place, BadSample) for each row."""
        for place, raw in enumerate(self.reader.read(rows)):
            try:
                pixels = pixels_of(raw)
                yield place, (raw, pixels, decode_captions(raw.text, raw.text_format, json_key=self.json_key))
            except BadSampleError as error:
                index = self.reader.index
                shard = redacted(index.shards[int(index.shard_of[raw.row])].url)
                yield place, BadSample(raw.row, shard, error.reason)


@dataclass(frozen=True, kw_only=True)
class _TrainingBatches(Dataset[Any]):
    """One request, one part of a batch. A UserError is returned, for a DataLoader would bury it in a traceback."""

    decoder: _Decoder
    transform: TrainTransform
    tokenizer: Tokenizer
    short_texts: bool
    texts: TextFeatures | None
    name: tuple[Name, ...]

    def __getitem__(self, request: _Request) -> PairBatch | UserError:
        try:
            return self._batch(request)
        except UserError as error:
            return error
        except OSError as error:
            return UserError(f"{explain_os_error(error)}; the same command continues when the storage answers")

    def _batch(self, request: _Request) -> PairBatch:
        rows = torch.from_numpy(request.rows.astype(np.int64))
        wanted = np.flatnonzero(request.rows != FILLER)
        image_ids, text_ids = torch.zeros_like(rows), torch.zeros_like(rows)
        places, images, captions, numbers, bad = [], [], [], [], []

        def pixels_of(raw: RawSample) -> Tensor:
            name = (*self.name, request.epoch, raw.row, "augment")
            return self.transform.of_file(raw.image, *name, max_pixels=self.decoder.max_pixels)

        for number, sample in self.decoder.samples(request.rows[wanted], pixels_of):
            place = int(wanted[number])
            if isinstance(sample, BadSample):
                bad.append(sample)
                rows[place] = FILLER
                continue
            raw, pixels, texts = sample
            places.append(place)
            images.append(pixels)
            drawn = random_words(1, *self.name, request.epoch, raw.row, "caption")[0]
            numbers.append(int(drawn % np.uint64(len(texts))))
            captions.append(texts[numbers[-1]])
            image_ids[place] = content_id(raw.image)
        tokens, text_features = torch.zeros(len(captions) or 1, 0, dtype=torch.int64), None
        if self.texts is None:
            tokens = self.tokenizer(captions or [""])
            text_ids[places] = content_ids(tokens[: len(places)])
            tokens = without_padding(tokens) if self.short_texts else tokens
        else:
            text_features, text_ids[places] = self.texts.take(rows[places].tolist(), numbers)
            text_features = text_features if places else torch.zeros(1, self.texts.dim)
        return PairBatch(
            step=request.step,
            rows=rows,
            text_ids=text_ids,
            image_ids=image_ids,
            # A process with nothing but fillers still takes part in the backward pass: one black picture of weight 0.
            images=torch.stack(images) if images else empty_images(1, self.transform.size_px),
            tokens=tokens,
            places=torch.tensor(places or [0]),
            text_features=text_features,
            bad=tuple(bad),
        )


@dataclass(frozen=True, kw_only=True)
class _CaptionedBatches(Dataset[Any]):
    decoder: _Decoder
    transform: EvaluationTransform | TrainTransform | None
    tokenizer: Tokenizer | None
    short_texts: bool

    def __getitem__(self, rows: Int[np.ndarray, "rows"]) -> CaptionedBatch | UserError | None:
        try:
            return self._batch(rows)
        except UserError as error:
            return error
        except OSError as error:
            return UserError(f"{explain_os_error(error)}; the same command continues when the storage answers")

    def _batch(self, rows: Int[np.ndarray, "rows"]) -> CaptionedBatch:
        kept: list[int] = []
        images, image_ids, text_ids, captions, caption_of, bad = [], [], [], [], [], []

        def pixels_of(raw: RawSample) -> Tensor:
            if self.transform is None:
                return empty_images(1, (0, 0))[0]
            return self.transform.of_file(raw.image, max_pixels=self.decoder.max_pixels)

        for _, sample in self.decoder.samples(rows, pixels_of):
            if isinstance(sample, BadSample):
                bad.append(sample)
                continue
            raw, pixels, texts = sample
            caption_of += [len(kept)] * len(texts)
            captions += texts
            kept.append(raw.row)
            images.append(pixels)
            image_ids.append(content_id(raw.image))
            text_ids.append(content_id(raw.text))
        tokens = torch.zeros(len(captions), 0, dtype=torch.int64)
        if self.tokenizer is not None and captions:
            tokens = self.tokenizer(captions)
        return CaptionedBatch(
            rows=torch.tensor(kept, dtype=torch.int64),
            images=torch.stack(images) if images else empty_images(0, (1, 1)),
            image_ids=torch.tensor(image_ids, dtype=torch.int64),
            tokens=without_padding(tokens) if self.short_texts else tokens,
            caption_of=torch.tensor(caption_of, dtype=torch.int64),
            text_ids=torch.tensor(text_ids, dtype=torch.int64),
            full_captions=int(tokens[:, -1].ne(0).sum()) if tokens.numel() else 0,
            bad=tuple(bad),
        )


class TrainingLoader:
    """Iterates over the local batches of steps `start_step` to `stop_step - 1`."""

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
        max_pixels: int = 50_000_000,
        json_key: str = "caption",
    ) -> None:
        """Prepare a loader; the slice of each global batch follows from this process's rank.

        Args:
            plan: which rows form a batch.
            reader: their bytes.
            transform: from an image file to pixels.
            tokenizer: from captions to tokens.
            short_texts: leave out the padding behind the longest caption of a batch.
            texts: features of the captions, in place of tokens.
            num_workers: processes that decode; 0 is this one.
            prefetch_batches: batches that each worker keeps ready, or as many parts as they have.
            device: where the pictures are to be; the rest of a batch stays here, page-locked if that helps.
            max_pixels: pictures with more are bad samples.
            json_key: where a .json member holds the captions.

        Raises:
            UserError: if the global batch is not divisible by the number of processes.
        """
        if plan.global_batch_size % world_size():
            raise UserError(
                f"a global batch of {plan.global_batch_size} rows does not divide by {world_size()} processes; "
                f"use a multiple of {world_size()}"
            )
        self.plan = plan
        self._dataset = _TrainingBatches(
            decoder=_Decoder(reader=reader, max_pixels=max_pixels, json_key=json_key),
            transform=transform,
            tokenizer=tokenizer,
            short_texts=short_texts,
            texts=texts,
            name=(plan.seed, plan.stage),
        )
        self._local_rows = plan.global_batch_size // world_size()
        self._parts = -(-self._local_rows // PART_ROWS)
        self._device, self._options = device, _loader_options(num_workers, prefetch_batches * self._parts, device)

    def steps(self, start_step: int, stop_step: int) -> Iterator[PairBatch]:
        """The batches from one step up to, and without, another.

        Raises:
            UserError: if the plans of the processes differ, or a shard cannot be read.
        """
        loader = DataLoader(
            self._dataset, batch_size=None, sampler=self._requests(start_step, stop_step), **self._options
        )
        found = _raising(loader)
        while parts := tuple(itertools.islice(found, self._parts)):
            yield _joined(parts, self._device)

    def _requests(self, start_step: int, stop_step: int) -> Iterator[_Request]:
        checked = -1
        for step in range(start_step, stop_step):
            epoch = self.plan.epoch_of(step)
            if epoch != checked and world_size() > 1:
                check_same(self.plan.digest(epoch), f"the plan of epoch {epoch}")
            checked = epoch
            local = self.plan.batch(step)[rank() * self._local_rows : (rank() + 1) * self._local_rows]
            for start in range(0, len(local), PART_ROWS):
                yield _Request(step, epoch, local[start : start + PART_ROWS])


def _joined(parts: tuple[PairBatch, ...], device: torch.device) -> PairBatch:
    """The batch of which these are the parts, with its pictures on a device."""
    starts = np.cumsum([0, *(len(part.rows) for part in parts)]).tolist()
    decoded = [(part, start) for part, start in zip(parts, starts, strict=False) if (part.rows != FILLER).any()]
    decoded = decoded or [(parts[0], 0)]
    kept = [part for part, _ in decoded]
    length = max(part.tokens.shape[1] for part in kept)
    features = [part.text_features for part in kept if part.text_features is not None]
    return PairBatch(
        step=parts[0].step,
        **{name: _cat([getattr(part, name) for part in parts]) for name in ("rows", "text_ids", "image_ids")},
        images=_cat([part.images.to(device, non_blocking=True) for part in kept]),
        tokens=_cat([F.pad(part.tokens, (0, length - part.tokens.shape[1])) for part in kept]),
        places=_cat([part.places + start for part, start in decoded]),
        text_features=_cat(features) if features else None,
        bad=tuple(bad for part in parts for bad in part.bad),
    )


def _cat(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


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
    max_pixels: int = 50_000_000,
    json_key: str = "caption",
) -> Iterator[CaptionedBatch]:
    """One `CaptionedBatch` for each array of rows, in order, for embedding and evaluation; see `TrainingLoader`.

    Without a `transform` pictures are not decoded and have no pixels; without a `tokenizer` texts have no tokens.

    Raises:
        UserError: if a shard cannot be read.
    """
    dataset = _CaptionedBatches(
        decoder=_Decoder(reader=reader, max_pixels=max_pixels, json_key=json_key),
        transform=transform,
        tokenizer=tokenizer,
        short_texts=short_texts,
    )
    options = _loader_options(num_workers, prefetch_batches, device)
    yield from _raising(DataLoader(dataset, batch_size=None, sampler=batches, **options))


def content_ids(tokens: Int[Tensor, "texts length"]) -> Int64[Tensor, "texts"]:
    """The `content_id` of the tokens of each text."""
    return torch.tensor([content_id(sequence.numpy().tobytes()) for sequence in tokens], dtype=torch.int64)


def content_id(data: bytes) -> int:
    """A 64-bit signed hash of bytes: equal content, equal number."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


def _raising(loader: Iterable[Any]) -> Iterator[Any]:
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


def _loader_options(num_workers: int, prefetch_batches: int, device: torch.device) -> dict[str, Any]:
    # A loader draws a seed for its workers, here not from the global generator. Nothing in them uses it.
    options: dict[str, Any] = {"num_workers": num_workers, "generator": torch.Generator()}
    options["pin_memory"] = device.type == "cuda"
    if num_workers:
        options |= {"prefetch_factor": max(1, prefetch_batches), "worker_init_fn": _start_worker}
    return options


def _start_worker(worker: int) -> None:  # noqa: ARG001
    torch.set_num_threads(1)
    leave_signals_to_parent()
