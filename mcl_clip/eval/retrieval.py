"""Zero-shot retrieval with several captions an image, as CLIP_benchmark defines it.

Embedding and scoring are apart: raw features of several stages, embedded once, can be combined and scored in any way.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mcl_clip.core.errors import UserError
from mcl_clip.data.decode import BadSampleError, decode_captions
from mcl_clip.data.index import ShardIndex
from mcl_clip.data.reader import Reader
from mcl_clip.eval.embed import bad_sample, embed_images, embed_texts, find_shards

READ_ROWS = 256
IMAGE_BLOCK = 4096  # images scored at once, and texts against them
TEXT_CHUNK = 256
ROWS_AT_ONCE = 2048  # of features, where there is no product to make
DENSE_SHARE = 1 / 128  # of scores close to one that decides; with more, a product in float64 is faster


@dataclass(frozen=True)
class RetrievalSet:
    """Images with their captions, in the order of the shards.

    `captions[i]` are the captions of the image in row i; `texts` are all of them in this order.
    """

    index: ShardIndex
    reader: Reader
    captions: tuple[tuple[str, ...], ...]

    @classmethod
    def open(cls, root: Path, *, split: str = "test") -> "RetrievalSet":
        """The set in `root`: `root/test/nshards.txt` with `root/test/0.tar, 1.tar ...`, or tar files in `root` itself.

        Raises:
            UserError: if the layout is not that, a sample is incomplete, or there are no captions.
        """
        index = ShardIndex.build([str(path) for path in find_shards(Path(root), split)])
        incomplete = {reason: count for reason, count in index.skipped_by_reason().items() if count}
        if incomplete:
            raise UserError(
                f"{root} has samples that cannot be used ({_counts_text(incomplete)}); a score on the rest would not "
                f"be comparable, so write the set again"
            )
        reader = Reader(index)
        captions = tuple(_read_captions(index, reader))
        if not any(captions):
            raise UserError(f"the {len(index)} samples in {root} have no captions; a retrieval set has a .txt a sample")
        return cls(index, reader, captions)

    @property
    def keys(self) -> list[str]:
        """The key of each image."""
        return [self.index.key(row) for row in range(len(self.index))]

    @property
    def texts(self) -> list[str]:
        """All captions, image after image."""
        return [caption for captions in self.captions for caption in captions]

    @property
    def image_of_text(self) -> Int[np.ndarray, " texts"]:
        """The row of the image that each caption belongs to."""
        return np.repeat(np.arange(len(self.captions)), [len(captions) for captions in self.captions])

    @property
    def sha256(self) -> str:
        """Digest of keys, member sizes and captions in order: numbers are comparable only where it is equal."""
        digest = hashlib.sha256(self.index.digest.encode())
        for key, captions in zip(self.keys, self.captions, strict=True):
            digest.update("\0".join((key, *captions)).encode() + b"\n\0")
        return digest.hexdigest()


def _counts_text(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} x {reason}" for reason, count in sorted(counts.items()))


def _read_captions(index: ShardIndex, reader: Reader) -> Iterator[tuple[str, ...]]:
    for start in range(0, len(index), READ_ROWS):
        for sample in reader.read(np.arange(start, min(start + READ_ROWS, len(index)))):
            try:
                yield tuple(decode_captions(sample.text, sample.text_format))
            except BadSampleError as error:
                if error.reason != "empty_caption":
                    raise bad_sample(index, sample.row, error) from error
                yield ()


@dataclass(frozen=True)
class RawFeatures:
    """Un-normalised float32 features of a whole retrieval set, on the CPU, equal on all processes."""

    image: Float[Tensor, "images dim"]
    text: Float[Tensor, "texts dim"]
    keys: list[str]
    image_of_text: Int[np.ndarray, " texts"]


def embed_retrieval(
    model: Any,
    retrieval_set: RetrievalSet,
    *,
    image_transform: Callable[[Any], Tensor],
    tokenizer: Callable[[list[str]], Tensor],
    device: torch.device | str,
    batch_size: int,
    num_workers: int,
) -> RawFeatures:
    """Features of all images and captions; every process does its part and gets them all.

    Batches are cut at the same places whatever the number of processes, so that it does not change the features.

    Args:
        model: anything with `encode_image` and `encode_text`; set to eval mode meanwhile.
        retrieval_set: what to embed.
        image_transform: from a PIL image to floats.
        tokenizer: from texts to tokens.
        device: where the model is.
        batch_size: images, and texts, in a forward pass of one process.
        num_workers: processes that read and transform images; 0 for none.

    Raises:
        UserError: if an image cannot be decoded.
        RuntimeError: if the processes together have not embedded each sample exactly once.
    """
    return RawFeatures(
        image=embed_images(
            model,
            retrieval_set.reader,
            image_transform=image_transform,
            device=device,
            batch_size=batch_size,
            num_workers=num_workers,
        ),
        text=embed_texts(model, retrieval_set.texts, tokenizer=tokenizer, device=device, batch_size=batch_size),
        keys=retrieval_set.keys,
        image_of_text=retrieval_set.image_of_text,
    )


def recall_metrics(
    image_features: Float[Tensor, "images dim"],
    text_features: Float[Tensor, "texts dim"],
    image_of_text: Int[np.ndarray, " pairs"],
    *,
    ks: Sequence[int] = (1, 5, 10),
    chunk: int = TEXT_CHUNK,
    normalize: bool = True,
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Recalls and ranks of cross-modal retrieval, and the outcome of each query.

    `image_retrieval_recall@k` is the share of captions whose image is among the k best images;
    `text_retrieval_recall@k` the share of images with at least one caption among the k best captions. Ties count
    against the model. An image without captions is a miss. Median ranks start at 1.

    Args:
        image_features: of either length.
        text_features: of either length.
        image_of_text: the row of each caption's image.
        ks: the k of the recalls.
        chunk: captions scored at once, against at most 4096 images; changes no result. Needs some
            4096 x (`chunk` x 10 + dimensions x 12) bytes, however many images and captions there are.
        normalize: score by cosine; otherwise by the inner product of the features as they are.

    Returns:
        metrics by name, and outcomes: under `image_retrieval` (by caption) and `text_retrieval` (by image) the number
        of wrong items ahead of the best right one, int32; under the name of each recall and mean reciprocal rank what
        it is the mean of, by caption, or by image; with `unit:` before the name of one by caption, the images.
        `mean_recall@k` is by image: half is whether its captions are found, half is its share in the other recall.

    Raises:
        UserError: if features are not finite, or do not fit to each other.
    """
    _check_features(image_features, text_features, image_of_text)
    images, texts = (_FeatureRows.of(features, normalize=normalize) for features in (image_features, text_features))
    of = torch.from_numpy(image_of_text).to(image_features.device, torch.int64)
    sides = {
        side: ranks.to(torch.int32).cpu().numpy()
        for side, ranks in zip(("image_retrieval", "text_retrieval"), _ranks(images, texts, of, chunk), strict=True)
    }
    galleries = {"image_retrieval": len(image_features), "text_retrieval": len(text_features)}
    outcomes = _outcomes(sides, galleries, image_of_text, ks)
    metrics = {name: float(values.mean()) for name, values in outcomes.items()}
    for k in ks:  # without the rounding of shares that are not whole
        metrics[f"mean_recall@{k}"] = sum(metrics[f"{side}_recall@{k}"] for side in sides) / 2
    for side, ranks in sides.items():
        metrics[f"{side}_median_rank"] = float(np.floor(np.median(ranks)) + 1)
    units = {f"unit:{name}": image_of_text.astype(np.int32) for name in outcomes if name.startswith("image_retrieval")}
    return metrics, {**sides, **{name: _small(values) for name, values in outcomes.items()}, **units}


def _outcomes(
    sides: Mapping[str, np.ndarray], galleries: Mapping[str, int], image_of_text: np.ndarray, ks: Sequence[int]
) -> dict[str, np.ndarray]:
    """For each metric that is a mean, what it is the mean of."""
    found: dict[str, np.ndarray] = {
        f"{side}_recall@{k}": ranks < min(k, galleries[side]) for side, ranks in sides.items() for k in ks
    }
    num_images, num_texts = galleries["image_retrieval"], galleries["text_retrieval"]
    for k in ks:
        hits = np.bincount(image_of_text, weights=found[f"image_retrieval_recall@{k}"], minlength=num_images)
        found[f"mean_recall@{k}"] = (found[f"text_retrieval_recall@{k}"] + hits * num_images / num_texts) / 2
    for side, ranks in sides.items():
        found[f"{side}_mean_reciprocal_rank"] = 1 / (ranks + 1.0)
    return found


def _small(values: np.ndarray) -> np.ndarray:
    return values if values.dtype == bool else values.astype(np.float32)


def _check_features(images: Tensor, texts: Tensor, image_of_text: np.ndarray) -> None:
    for what, features in (("image", images), ("text", texts)):
        broken = sum(
            int((~torch.isfinite(features[rows]).all(dim=1)).sum()) for rows in _slices(len(features), ROWS_AT_ONCE)
        )
        if broken:
            raise UserError(f"{broken} of {len(features)} {what} features are not finite; the model has diverged")
    if len(texts) != len(image_of_text) or not len(texts) or not len(images):
        raise UserError(f"{len(images)} images, {len(texts)} texts and {len(image_of_text)} pairs do not fit together")
    if image_of_text.min() < 0 or image_of_text.max() >= len(images):
        raise UserError(f"captions belong to images 0 to {len(images) - 1}, not to {image_of_text.max()}")


@dataclass(frozen=True)
class _FeatureRows:
    """Features of one side; they are divided only where they are used, so that no copy of them is kept."""

    features: Float[Tensor, "rows dim"]
    divisors: Float[Tensor, "rows 1"]

    @classmethod
    def of(cls, features: Float[Tensor, "rows dim"], *, normalize: bool) -> "_FeatureRows":
        """Rows over their lengths, or all over one power of two, which keeps their order and the sums finite."""
        if normalize:
            features = features.float()
            return cls(features, torch.linalg.vector_norm(features, dim=1, keepdim=True).clamp_min(1e-12))
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        _, exponent = torch.frexp(torch.linalg.vector_norm(features, torch.inf))
        return cls(features, torch.ldexp(features.new_ones(()), exponent - 1).expand(len(features), 1))

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, rows: slice | Int[Tensor, " some"]) -> Float[Tensor, "some dim"]:
        return self.features[rows] / self.divisors[rows]

    def longest(self) -> Float[Tensor, ""]:
        """The greatest length of a divided row."""
        parts = _slices(len(self), ROWS_AT_ONCE)
        return torch.stack([torch.linalg.vector_norm(self[rows], dim=1).amax() for rows in parts]).amax()


def _slices(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def _ranks(
    images: _FeatureRows, texts: _FeatureRows, image_of_text: Int[Tensor, " texts"], chunk: int
) -> tuple[Int[Tensor, " texts"], Int[Tensor, " images"]]:
    """Wrong items scored at least as high as the best right one, by text and by image; each product is made once.

    Nothing is sorted: scores are compared with the best right one's, known before. What the order hangs on are inner
    products in float64, rounded to float32, so that equal items get equal scores wherever they stand.
    """
    best_of_text = torch.cat(
        [_pair_scores(texts[rows], images[image_of_text[rows]]) for rows in _slices(len(texts), ROWS_AT_ONCE)]
    )
    best_of_image = best_of_text.new_full((len(images),), -torch.inf)  # with nothing right, all are ahead
    best_of_image.scatter_reduce_(0, image_of_text, best_of_text, "amax")
    ahead_of_text, ahead_of_image = (
        torch.zeros_like(best, dtype=torch.int64) for best in (best_of_text, best_of_image)
    )
    scorer = _Scorer.of(images, texts, chunk)
    for block in _slices(len(images), IMAGE_BLOCK):
        gallery, best_image = images[block], best_of_image[block]
        for rows in _slices(len(texts), chunk):
            best_text = best_of_text[rows, None]
            scores, spare = scorer.scores(texts[rows], gallery, best_text, best_image)
            _forget(scores, image_of_text[rows] - block.start)
            # Sums of zeros and ones in float32: several times as fast as of booleans, and exact up to 2^24.
            ahead_of_text[rows] += torch.ge(scores, best_text, out=spare).sum(dim=1).long()
            ahead_of_image[block] += torch.ge(scores, best_image, out=spare).sum(dim=0).long()
    return ahead_of_text, ahead_of_image


def _forget(scores: Float[Tensor, "texts images"], right: Int[Tensor, " texts"]) -> None:
    """Make the scores at `right`, a column for each row that may lie outside, minus infinity."""
    inside = right.clamp(0, scores.shape[1] - 1)
    found = scores.gather(1, inside[:, None])
    scores.scatter_(1, inside[:, None], found.masked_fill_((inside == right)[:, None], -torch.inf))


@dataclass(frozen=True)
class _Scorer:
    """Scores of a chunk of texts and a block of images, exact wherever they are close to one that decides."""

    buffer: Float[Tensor, " size"]
    spare: Float[Tensor, " size"]
    near: Bool[Tensor, " size"]
    bound: Float[Tensor, ""]
    is_fast: bool

    @classmethod
    def of(cls, images: _FeatureRows, texts: _FeatureRows, chunk: int) -> "_Scorer":
        """With room for `chunk` texts."""
        device, size = images.features.device, min(chunk, len(texts)) * min(IMAGE_BLOCK, len(images))
        buffer, spare = (torch.empty(size, device=device) for _ in range(2))
        # A sum of n products in float32 is off by at most n * eps / 2 times the product of the lengths (Higham,
        # Accuracy and Stability of Numerical Algorithms, section 3.1); twice that, and some for the other roundings.
        bound = images.longest() * texts.longest() * (images.features.shape[1] + 8) * torch.finfo(torch.float32).eps
        near = torch.empty(size, dtype=torch.bool, device=device)
        return cls(buffer, spare, near, bound.float(), is_fast=_float32_is_whole())

    def scores(
        self,
        queries: Float[Tensor, "texts dim"],
        gallery: Float[Tensor, "images dim"],
        best_text: Float[Tensor, "texts 1"],
        best_image: Float[Tensor, " images"],
    ) -> tuple[Float[Tensor, "texts images"], Float[Tensor, "texts images"]]:
        """The scores, valid until the next call, and another buffer of their shape.

        What compares with `best_text` and `best_image` by `>=` compares as the exact scores do.
        """
        shape = (len(queries), len(gallery))
        scores, spare, near = (part[: shape[0] * shape[1]].view(shape) for part in (self.buffer, self.spare, self.near))
        if self.is_fast:
            torch.mm(queries.float(), gallery.float().T, out=scores)
            torch.le(torch.sub(scores, best_text, out=spare).abs_(), self.bound, out=near)
            near |= torch.sub(scores, best_image, out=spare).abs_() <= self.bound
            pairs = near.view(-1).nonzero()[:, 0]
            if len(pairs) <= DENSE_SHARE * scores.numel():
                for part in _slices(len(pairs), ROWS_AT_ONCE):
                    some = pairs[part]
                    scores.view(-1)[some] = _pair_scores(queries[some // shape[1]], gallery[some % shape[1]])
                return scores, spare
        exact = queries.double()
        for columns in _slices(shape[1], ROWS_AT_ONCE):
            scores[:, columns] = exact @ gallery[columns].double().T
        return scores, spare


def _pair_scores(queries: Float[Tensor, "pairs dim"], gallery: Float[Tensor, "pairs dim"]) -> Float[Tensor, " pairs"]:
    """The score of each row with the row beside it: the inner product in float64, rounded to float32."""
    return queries.double().mul_(gallery).sum(dim=1).float()


def _float32_is_whole() -> bool:
    """Whether products of float32 are made in float32, and not in TF32 or bfloat16."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set for each backend apart
        return False


@dataclass(frozen=True)
class RetrievalTask:
    """Retrieval on one set, as a task of the suite."""

    name: str
    data: RetrievalSet
    main_metric = "mean_recall@1"

    @property
    def sha256(self) -> str:
        """Digest of what is measured on."""
        return self.data.sha256

    def embed(self, model: Any, **options: Any) -> dict[str, Tensor]:
        """Raw `image` and `text` features, see `embed_retrieval`."""
        raw = embed_retrieval(model, self.data, **options)
        return {"image": raw.image, "text": raw.text}

    def score(
        self, image_features: Float[Tensor, "images dim"], text_features: Float[Tensor, "texts dim"]
    ) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Metrics, and the outcomes of all queries."""
        return recall_metrics(image_features, text_features, self.data.image_of_text)

    def describe(self) -> dict[str, Any]:
        """What a record says of the task; `captions_per_image` counts images by their number of captions."""
        counts = Counter(len(captions) for captions in self.data.captions)
        return {
            "key": f"retrieval/{self.name.removeprefix('wds/')}",
            "task": "zeroshot_retrieval",
            "n_images": len(self.data.captions),
            "n_texts": len(self.data.texts),
            "captions_per_image": {str(number): counts[number] for number in sorted(counts)},
        }
