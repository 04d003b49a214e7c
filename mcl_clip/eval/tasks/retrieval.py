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
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from mcl_clip.data.decode import BadSampleError, decode_captions
from mcl_clip.data.index import ShardIndex
from mcl_clip.data.reader import Reader
from mcl_clip.errors import UserError
from mcl_clip.eval.embed import bad_sample, embed_images, embed_texts, find_shards

READ_ROWS = 256
GALLERY_BLOCK = 8192


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
    chunk: int = 256,
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
        chunk: queries scored at once; needs `chunk` x gallery x 10 bytes and changes no result.
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
    if normalize:
        image_features, text_features = F.normalize(image_features.float()), F.normalize(text_features.float())
    of_text = torch.from_numpy(image_of_text).to(image_features.device)
    of_image = torch.arange(len(image_features), device=image_features.device)
    sides = {
        "image_retrieval": _best_ranks(text_features, image_features, of_text, of_image, chunk),
        "text_retrieval": _best_ranks(image_features, text_features, of_image, of_text, chunk),
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
        broken = int((~torch.isfinite(features).all(dim=1)).sum())
        if broken:
            raise UserError(f"{broken} of {len(features)} {what} features are not finite; the model has diverged")
    if len(texts) != len(image_of_text) or not len(texts) or not len(images):
        raise UserError(f"{len(images)} images, {len(texts)} texts and {len(image_of_text)} pairs do not fit together")
    if image_of_text.min() < 0 or image_of_text.max() >= len(images):
        raise UserError(f"captions belong to images 0 to {len(images) - 1}, not to {image_of_text.max()}")


def _best_ranks(
    queries: Tensor, gallery: Tensor, query_labels: Tensor, gallery_labels: Tensor, chunk: int
) -> np.ndarray:
    """Wrong items scored at least as high as the best right one, by query, int32; right means of equal label."""
    ranks = []
    for start in range(0, len(queries), chunk):
        scores = _scores(queries[start : start + chunk], gallery)
        is_right = query_labels[start : start + chunk, None] == gallery_labels
        best = scores.masked_fill(~is_right, -torch.inf).amax(dim=1, keepdim=True)
        # With nothing right, all are ahead: the best is then minus infinity.
        ranks.append(((scores >= best) & ~is_right).sum(dim=1))
    result: np.ndarray = torch.cat(ranks).to(torch.int32).cpu().numpy()
    return result


def _scores(
    queries: Float[Tensor, "chunk dim"], gallery: Float[Tensor, "gallery dim"]
) -> Float[Tensor, "chunk gallery"]:
    """Inner products in float32, summed in float64: equal items get equal scores wherever they stand."""
    scores = torch.empty(len(queries), len(gallery), device=queries.device)
    exact = queries.double()
    for start in range(0, len(gallery), GALLERY_BLOCK):
        scores[:, start : start + GALLERY_BLOCK] = exact @ gallery[start : start + GALLERY_BLOCK].double().T
    return scores


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
