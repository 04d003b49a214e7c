"""Batches of pixels and tokens, decoded in DataLoader workers.

`TrainingLoader` yields this process's part of each global batch of a plan; `captioned_batches` yields given rows with
all their captions, for embedding and evaluation. A training batch is a function of (seed, stage, step) alone, not of
the number of workers. The loaders are not passed to `accelerator.prepare`, which would drop or repeat data silently.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int, Int64
from torch import Tensor

from mcl_clip.core.distributed import Name, check_same, permutation, random_words, rank, world_size
from mcl_clip.core.errors import UserError
from mcl_clip.data.batch_plan import FILLER, BatchPlan
from mcl_clip.data.batches import BadSample, CaptionedBatch, PairBatch, join_parts
from mcl_clip.data.decode import (
    MAX_PIXELS,
    BadSampleError,
    EvaluationTransform,
    TrainTransform,
    decode_captions,
    decode_negatives,
)
from mcl_clip.data.features import ImageOutputs, TextFeatures
from mcl_clip.data.reader import Reader
from mcl_clip.data.shards import redacted
from mcl_clip.data.workers import load_batches

Tokenizer = Callable[[list[str]], Tensor]
CPU = torch.device("cpu")
LOADER_TIMEOUT_S = 1800.0  # longer than all retries of a read together
PART_ROWS = 256  # of a local batch; larger ones are decoded in parts by several workers
LENGTH_MULTIPLE = 8  # of trimmed texts: few distinct lengths, for which kernels are chosen or compiled


class TrainingLoader:
    """Iterates over the local batches of a plan; which rows of a global batch are local follows from the rank."""

    def __init__(
        self,
        plan: BatchPlan,
        reader: Reader,
        *,
        transform: TrainTransform,
        tokenizer: Tokenizer | None,
        num_views: int = 1,
        short_texts: bool = False,
        images: ImageOutputs | None = None,
        texts: TextFeatures | None = None,
        num_workers: int = 0,
        prefetch_batches: int = 4,
        device: torch.device = CPU,
        timeout_s: float = LOADER_TIMEOUT_S,
        max_pixels: int = MAX_PIXELS,
        json_key: str = "caption",
        negatives_key: str = "",
        num_negatives: int = 0,
    ) -> None:
        """Prepare a loader; raise UserError if the global batch is not divisible by the number of processes.

        `short_texts` trims the padding after the longest caption of a batch. Stored `images` replace pixels and stored
        `texts` replace tokens, and nothing is read from the shards that these have. Each of `num_workers` keeps
        `prefetch_batches` ready and must deliver one within `timeout_s`; 0 decodes in this process. Images are copied
        to `device`; the rest of a batch stays on the CPU, page-locked if that is a GPU. Images over `max_pixels` are
        bad samples; `json_key` is the key of the captions in a .json member. With `num_negatives`, batches have so many
        of the wrong captions of each row, which are at `negatives_key`. Without a `tokenizer` and `texts`, batches have
        `num_views` views of images alone.
        """
        if plan.global_batch_size % world_size():
            raise UserError(
                f"a global batch of {plan.global_batch_size} rows is not divisible by {world_size()} processes; "
                f"use a multiple of {world_size()}"
            )
        self.plan = plan
        maker = _PairBatches(
            reader=reader, transform=transform, tokenizer=tokenizer, short_texts=short_texts, max_pixels=max_pixels,
            json_key=json_key, images=images, texts=texts, name=(plan.seed, plan.stage),
            negatives_key=negatives_key, num_negatives=num_negatives, num_views=num_views,
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
            yield join_parts(parts, self._device)

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
    images: ImageOutputs | None = None,
    texts: TextFeatures | None = None,
    view: int = 0,
    name: tuple[Name, ...] = (),
) -> Iterator[CaptionedBatch]:
    """Yield one `CaptionedBatch` for each array of rows, in order; raise UserError if a shard cannot be read.

    See `TrainingLoader` for the arguments. Without a `transform` images are not decoded and have no pixels; without a
    `tokenizer` texts have no tokens. A `TrainTransform` gives the `view` that it draws under a `name`.
    """
    maker = _CaptionedBatches(
        reader=reader, transform=transform, tokenizer=tokenizer, short_texts=short_texts, max_pixels=max_pixels,
        json_key=json_key, images=images, texts=texts, name=name, view=view,
    )  # fmt: skip
    yield from load_batches(
        maker.make_batch, batches, describe=maker.describe, num_workers=num_workers, prefetch_batches=prefetch_batches,
        pin_memory=device.type == "cuda", timeout_s=timeout_s,
    )  # fmt: skip


class _Sample(NamedTuple):
    """A decoded row: pixels or stored output, text member, captions and wrong ones; all empty if nothing was read."""

    row: int
    image: Tensor
    image_id: int
    text: bytes
    captions: list[str]
    wrong: list[str]


@dataclass(frozen=True, kw_only=True)
class _BatchMaker:
    """Makes batches in a loader process; `name` and the row name every random draw."""

    reader: Reader
    transform: EvaluationTransform | TrainTransform | None
    tokenizer: Tokenizer | None
    short_texts: bool
    max_pixels: int
    json_key: str
    images: ImageOutputs | None
    texts: TextFeatures | None
    name: tuple[Name, ...]
    negatives_key: str = ""

    def describe(self, request: Any) -> str:
        """Name the rows of a request and the shards they are in."""
        rows = np.asarray(request[-1] if isinstance(request, tuple) else request)
        index, rows = self.reader.index, rows[rows != FILLER]
        shards = np.unique(index.shard_of[rows])
        urls = ", ".join(redacted(index.shards[number].url) for number in shards[:3].tolist())
        more = f" and {len(shards) - 3} more shards" if len(shards) > 3 else ""
        return f"rows {rows.min(initial=len(index))} to {rows.max(initial=0)} of {urls}{more}"

    def samples(
        self, rows: Int[np.ndarray, "rows"], views: Iterable[int], *, needs_texts: bool = True
    ) -> Iterator[_Sample | BadSample]:
        """Yield a sample, or a BadSample, for each row, with the given view of its image.

        Stored images are not read from the shards, and texts only if they are needed.
        """
        if self.images is None:
            read = [((raw.text, raw.text_format), raw.image) for raw in self.reader.read(rows)]
        else:
            texts = self.reader.read_texts(rows) if needs_texts else [(b"", "")] * len(rows)
            read = [(text, b"") for text in texts]
        for row, view, ((text, text_format), image) in zip(rows.tolist(), views, read, strict=True):
            try:
                pixels, image_id = self._image(row, view, image)
                captions = decode_captions(text, text_format, json_key=self.json_key) if text_format else []
                wrong = decode_negatives(text, text_format, json_key=self.negatives_key) if self.negatives_key else []
                yield _Sample(row, pixels, image_id, text, captions, wrong)
            except BadSampleError as error:
                yield self.bad_sample(row, error)

    def bad_sample(self, row: int, error: BadSampleError) -> BadSample:
        """Return the record of a row that cannot be decoded."""
        index = self.reader.index
        return BadSample(row, redacted(index.shards[int(index.shard_of[row])].url), error.reason)

    def _image(self, row: int, view: int, data: bytes) -> tuple[Tensor, int]:
        """Return pixels or stored output of an image, and the hash of its file; raise BadSampleError without them."""
        if self.images is not None:
            output, image_id = self.images.take(row, view)
            if output is None:
                raise BadSampleError(self.images.reason(row, view))
            return output, image_id
        pixels = torch.zeros(3, 0, 0, dtype=torch.uint8)
        if isinstance(self.transform, TrainTransform):
            pixels = self.transform.decode_view(data, view, row=row, name=self.name, max_pixels=self.max_pixels)
        elif self.transform is not None:
            pixels = self.transform.decode(data, max_pixels=self.max_pixels)
        return pixels, content_id(data)


@dataclass(frozen=True, kw_only=True)
class _PairBatches(_BatchMaker):
    """Makes parts of local batches."""

    transform: TrainTransform
    num_negatives: int
    num_views: int

    def make_batch(self, request: tuple[int, int, Int[np.ndarray, "_part"]]) -> PairBatch:
        if self.tokenizer is None and self.texts is None:
            return self._image_batch(*request)
        step, epoch, planned_rows = request
        rows = torch.from_numpy(planned_rows.astype(np.int64))
        planned = np.flatnonzero(planned_rows != FILLER)
        image_ids, text_ids = torch.zeros_like(rows), torch.zeros_like(rows)
        places, images, captions, caption_numbers, negatives, bad = [], [], [], [], list[str](), []
        views = [self.transform.view(epoch, row) for row in planned_rows[planned].tolist()]
        samples = self.samples(planned_rows[planned], views, needs_texts=self.texts is None)
        for place, sample in zip(planned.tolist(), samples, strict=True):
            if isinstance(sample, BadSample):
                bad.append(sample)
                rows[place] = FILLER
                continue
            places.append(place)
            images.append(sample.image)
            num_captions = len(sample.captions) if self.texts is None else self.texts.num_captions(sample.row)
            word = random_words(1, *self.name, epoch, sample.row, "caption")[0]
            caption_numbers.append(int(word % np.uint64(num_captions)))
            captions += sample.captions[caption_numbers[-1] :][:1]
            image_ids[place] = sample.image_id
            if self.num_negatives:
                candidates = [text for text in dict.fromkeys(sample.wrong) if text not in sample.captions]
                order = permutation(len(candidates), *self.name, epoch, sample.row, "negatives")[: self.num_negatives]
                drawn = [candidates[number] for number in order.tolist()]
                # The caption itself, recognized by its tokens, stands for those that are missing: it is a valid text.
                negatives += drawn + captions[-1:] * (self.num_negatives - len(drawn))
        # A process with nothing but fillers still takes part in the backward pass: one image of zeros of weight 0.
        empty = torch.zeros(3, *self.transform.size_px, dtype=torch.uint8)
        images = images or [empty if self.images is None else torch.zeros(self.images.shape)]
        tokens, text_features = torch.zeros(len(images), 0, dtype=torch.int64), None
        negative_tokens = is_negative = None
        if self.texts is None:
            if self.tokenizer is None:
                raise ValueError("texts without a tokenizer")
            tokens = self.tokenizer([*(captions or [""]), *(negatives or [""] * self.num_negatives)])
            ids = content_ids(tokens)
            text_ids[places] = ids[: len(places)]
            tokens = trim_padding(tokens) if self.short_texts else tokens
            if self.num_negatives:
                ids, negative_ids = ids[: len(images)], ids[len(images) :].view(len(images), self.num_negatives)
                is_negative = negative_ids != ids[:, None]
                tokens, negative_tokens = tokens[: len(images)], tokens[len(images) :].view(*is_negative.shape, -1)
        else:
            stored, text_ids[places] = self.texts.take(rows[places].tolist(), caption_numbers)
            stored = stored if places else torch.zeros(1, self.texts.dim)
            tokens, text_features = (stored, None) if self.texts.of_trunk else (tokens, stored)
        return PairBatch(
            step=step,
            rows=rows,
            text_ids=text_ids,
            image_ids=image_ids,
            images=torch.stack(images),
            tokens=tokens,
            places=torch.tensor(places or [0]),
            text_features=text_features,
            negative_tokens=negative_tokens,
            is_negative=is_negative,
            bad=tuple(bad),
        )

    def _image_batch(self, step: int, epoch: int, planned_rows: Int[np.ndarray, "_part"]) -> PairBatch:
        """Make a part of a batch of images alone; view v of a row in epoch e is its draw e * num_views + v."""
        rows = torch.from_numpy(planned_rows.astype(np.int64))
        planned = np.flatnonzero(planned_rows != FILLER)
        image_ids = torch.zeros_like(rows)
        places, images, bad = [], [], []
        for place, raw in zip(planned.tolist(), self.reader.read(planned_rows[planned]), strict=True):
            try:
                draws = range(epoch * self.num_views, (epoch + 1) * self.num_views)
                views, ids = zip(*(self._image(raw.row, draw, raw.image) for draw in draws), strict=True)
            except BadSampleError as error:
                bad.append(self.bad_sample(raw.row, error))
                rows[place] = FILLER
                continue
            places.append(place)
            images.append(torch.stack(views))
            image_ids[place] = ids[0]
        images = images or [torch.zeros(self.num_views, 3, *self.transform.size_px, dtype=torch.uint8)]
        return PairBatch(
            step=step,
            rows=rows,
            text_ids=image_ids.clone(),
            image_ids=image_ids,
            images=torch.stack(images),
            tokens=torch.zeros(len(images), 0, dtype=torch.int64),
            places=torch.tensor(places or [0]),
            bad=tuple(bad),
        )


@dataclass(frozen=True, kw_only=True)
class _CaptionedBatches(_BatchMaker):
    """Makes batches with all captions of their rows."""

    view: int

    def make_batch(self, request: Int[np.ndarray, "_rows"]) -> CaptionedBatch:
        rows: list[int] = []
        images, image_ids, text_ids, captions, caption_of, bad = [], [], [], [], [], []
        for sample in self.samples(request, [self.view] * len(request)):
            if isinstance(sample, BadSample):
                bad.append(sample)
                continue
            caption_of += [len(rows)] * len(sample.captions)
            captions += sample.captions
            rows.append(sample.row)
            images.append(sample.image)
            image_ids.append(sample.image_id)
            text_ids.append(content_id(sample.text))
        tokens, full_captions = torch.zeros(len(captions), 0, dtype=torch.int64), 0
        if self.texts is not None:
            tokens = self.texts.take_all(rows)
        elif self.tokenizer is not None and captions:
            tokens = self.tokenizer(captions)
            full_captions = int(tokens[:, -1].ne(0).sum())
        return CaptionedBatch(
            rows=torch.tensor(rows, dtype=torch.int64),
            images=torch.stack(images) if images else torch.zeros(0, 3, 1, 1, dtype=torch.uint8),
            image_ids=torch.tensor(image_ids, dtype=torch.int64),
            tokens=trim_padding(tokens) if self.short_texts and self.texts is None else tokens,
            caption_of=torch.tensor(caption_of, dtype=torch.int64),
            text_ids=torch.tensor(text_ids, dtype=torch.int64),
            full_captions=full_captions,
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
