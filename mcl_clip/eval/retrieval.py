"""Zero-shot image-text retrieval with several captions per image, as CLIP_benchmark defines it."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mcl_clip.core.errors import UserError
from mcl_clip.data.decode import BadSampleError, decode_captions
from mcl_clip.eval.embed import ReaderImages, check_finite, open_shards

IMAGE_BLOCK = 4096  # images scored at once, against TEXT_CHUNK texts
TEXT_CHUNK = 256
ROWS_AT_ONCE = 2048  # feature rows at once where no score matrix is computed
DENSE_SHARE = 1 / 128  # share of scores to recompute above which a whole float64 product is faster


@dataclass(frozen=True)
class RetrievalSet:
    """Images with their captions, in shard order.

    `captions[i]` are the captions of the image in row i; `texts` are all of them, image by image.
    """

    source: ReaderImages
    captions: tuple[tuple[str, ...], ...]

    @classmethod
    def open(cls, root: Path) -> "RetrievalSet":
        """Open `root/test/0.tar, 1.tar ...` with `root/test/nshards.txt`, or the tar files in `root` itself.

        Raises:
            UserError: if `root` has neither layout, a sample is incomplete or broken, or there are no captions.
        """
        source = open_shards(root)
        captions: list[tuple[str, ...]] = []
        for sample in source.samples():
            try:
                captions.append(tuple(decode_captions(sample.text, sample.text_format)))
            except BadSampleError as error:
                if error.reason != "empty_caption":  # an image without captions stays in the gallery
                    raise source.explain(sample.row, error) from error
                captions.append(())
        if not any(captions):
            raise UserError(
                f"the {len(source)} samples in {root} have no captions; a retrieval set has a .txt a sample"
            )
        return cls(source, tuple(captions))

    @property
    def texts(self) -> list[str]:
        """All captions, image by image."""
        return [caption for captions in self.captions for caption in captions]

    @property
    def image_of_text(self) -> Int[np.ndarray, " texts"]:
        """The image row of each caption."""
        return np.repeat(np.arange(len(self.captions)), [len(captions) for captions in self.captions])

    @property
    def sha256(self) -> str:
        """Digest of keys, member sizes and captions in order."""
        index = self.source.reader.index
        digest = hashlib.sha256(index.digest.encode())
        for row, captions in enumerate(self.captions):
            digest.update("\0".join((index.key(row), *captions)).encode() + b"\n\0")
        return digest.hexdigest()


@dataclass(frozen=True)
class RetrievalTask:
    """Text-to-image and image-to-text retrieval on one set; see `Task`."""

    name: str
    data: RetrievalSet
    main_metric = "mean_recall@1"

    def score(
        self, image_features: Float[Tensor, "images dim"], text_features: Float[Tensor, "texts dim"]
    ) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Return metrics and outcomes; see `recall_metrics`."""
        return recall_metrics(image_features, text_features, self.data.image_of_text)

    def describe(self) -> dict[str, Any]:
        """Describe the set for the record; `captions_per_image` counts images by their number of captions."""
        counts = Counter(len(captions) for captions in self.data.captions)
        return {
            "key": f"retrieval/{self.name.removeprefix('wds/')}",
            "task": "zeroshot_retrieval",
            "n_images": len(self.data.captions),
            "n_texts": len(self.data.texts),
            "captions_per_image": {str(number): counts[number] for number in sorted(counts)},
        }


def recall_metrics(
    image_features: Float[Tensor, "images dim"],
    text_features: Float[Tensor, "texts dim"],
    image_of_text: Int[np.ndarray, " pairs"],
    *,
    ks: Sequence[int] = (1, 5, 10),
    chunk: int = TEXT_CHUNK,
    normalize: bool = True,
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Compute recalls and ranks of cross-modal retrieval, and the outcome of each query.

    `image_retrieval_recall@k` is the share of captions whose image is among the top k images, and
    `text_retrieval_recall@k` the share of images with at least one caption among the top k captions. Ties count as
    errors, and so does an image without captions. Median ranks start at 1.

    Args:
        image_of_text: image row of each caption.
        ks: the k of the recalls.
        chunk: captions scored at once, against at most 4096 images; does not change the result. Uses about
            4096 x (`chunk` x 10 + dim x 12) bytes, whatever the number of images and captions.
        normalize: score by cosine similarity; otherwise by the inner product of the given features.

    Returns:
        metrics by name, and outcomes by name: `image_retrieval` (per caption) and `text_retrieval` (per image) are
        int32 counts of negatives ranked ahead of the best positive; each recall and mean reciprocal rank has the values
        it is the mean of, per caption or per image, and per-caption ones have their images under `unit:NAME`.
        `mean_recall@k` is per image: the average of its own hit and its share of the caption recall.

    Raises:
        UserError: if features are not finite, or the sizes do not match.
    """
    check_finite(image_features, text_features)
    num_images, num_texts = len(image_features), len(text_features)
    if num_texts != len(image_of_text) or not num_texts or not num_images:
        raise UserError(f"{num_images} images, {num_texts} texts and {len(image_of_text)} pairs do not fit together")
    if image_of_text.min() < 0 or image_of_text.max() >= num_images:
        raise UserError(f"captions belong to images 0 to {num_images - 1}, not to {image_of_text.max()}")
    images, texts = (_FeatureRows(part, normalize=normalize) for part in (image_features, text_features))
    positives = torch.from_numpy(image_of_text).to(image_features.device, torch.int64)
    by_text, by_image = (part.to(torch.int32).cpu().numpy() for part in _ranks(images, texts, positives, chunk))
    ranks = {"image_retrieval": by_text, "text_retrieval": by_image}

    outcomes: dict[str, np.ndarray] = {}
    for side, gallery_size in (("image_retrieval", num_images), ("text_retrieval", num_texts)):
        # Without a positive the rank is the size of the gallery, which is a miss for any k.
        outcomes |= {f"{side}_recall@{k}": ranks[side] < min(k, gallery_size) for k in ks}
    for k in ks:
        hits = np.bincount(image_of_text, weights=outcomes[f"image_retrieval_recall@{k}"], minlength=num_images)
        outcomes[f"mean_recall@{k}"] = (outcomes[f"text_retrieval_recall@{k}"] + hits * num_images / num_texts) / 2
    for side in ranks:
        outcomes[f"{side}_mean_reciprocal_rank"] = 1 / (ranks[side] + 1.0)
    metrics = {name: float(values.mean()) for name, values in outcomes.items()}
    for k in ks:  # from the two recalls, so without the rounding of per-image shares
        metrics[f"mean_recall@{k}"] = sum(metrics[f"{side}_recall@{k}"] for side in ranks) / 2
    for side in ranks:
        metrics[f"{side}_median_rank"] = float(np.floor(np.median(ranks[side])) + 1)
    units = {f"unit:{name}": image_of_text.astype(np.int32) for name in outcomes if name.startswith("image_retrieval")}
    stored = {name: values if values.dtype == bool else values.astype(np.float32) for name, values in outcomes.items()}
    return metrics, ranks | stored | units


class _FeatureRows:
    """Features of one side, scaled row by row on access, so that no scaled copy of them all exists.

    Rows are divided by their norms, or all by one power of two, which keeps their order and prevents overflow.
    """

    def __init__(self, features: Float[Tensor, "rows dim"], *, normalize: bool) -> None:
        if normalize:
            self.features = features.float()
            self.divisors = torch.linalg.vector_norm(self.features, dim=1, keepdim=True).clamp_min(1e-12)
        else:
            self.features = features.to(torch.promote_types(features.dtype, torch.float32))
            _, exponent = torch.frexp(torch.linalg.vector_norm(self.features, torch.inf))
            self.divisors = torch.ldexp(self.features.new_ones(()), exponent - 1).expand(len(features), 1)

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, rows: slice | Int[Tensor, " some"]) -> Float[Tensor, "some dim"]:
        scaled: Tensor = self.features[rows] / self.divisors[rows]
        return scaled

    def max_norm(self) -> Float[Tensor, ""]:
        """Return the largest norm of a scaled row."""
        parts = _slices(len(self), ROWS_AT_ONCE)
        return torch.stack([torch.linalg.vector_norm(self[rows], dim=1).amax() for rows in parts]).amax()


def _ranks(
    images: _FeatureRows, texts: _FeatureRows, image_of_text: Int[Tensor, " texts"], chunk: int
) -> tuple[Int[Tensor, " texts"], Int[Tensor, " images"]]:
    """Count, by text and by image, the negatives that score at least as high as the best positive.

    Nothing is sorted: the scores of positives are computed first, and each block of the score matrix is compared with
    them in both directions. The comparisons are as exact as inner products in float64, rounded to float32, so equal
    items get equal scores in any block.
    """
    best_of_text = torch.cat(
        [_pair_scores(texts[rows], images[image_of_text[rows]]) for rows in _slices(len(texts), ROWS_AT_ONCE)]
    )
    best_of_image = best_of_text.new_full((len(images),), -torch.inf)  # without a positive, all texts are ahead
    best_of_image.scatter_reduce_(0, image_of_text, best_of_text, "amax")
    ahead_of_text, ahead_of_image = (
        torch.zeros_like(best, dtype=torch.int64) for best in (best_of_text, best_of_image)
    )
    scorer = _Scorer(images, texts, chunk)
    for block in _slices(len(images), IMAGE_BLOCK):
        gallery, best_image = images[block], best_of_image[block]
        for rows in _slices(len(texts), chunk):
            best_text = best_of_text[rows, None]
            scores, spare = scorer.scores(texts[rows], gallery, best_text, best_image)
            # Mask the positive of each text, whose column may lie outside this block.
            column = image_of_text[rows] - block.start
            inside = column.clamp(0, scores.shape[1] - 1)
            masked = scores.gather(1, inside[:, None]).masked_fill_((inside == column)[:, None], -torch.inf)
            scores.scatter_(1, inside[:, None], masked)
            # Sums of zeros and ones in float32 are several times as fast as of booleans, and exact up to 2^24.
            ahead_of_text[rows] += torch.ge(scores, best_text, out=spare).sum(dim=1).long()
            ahead_of_image[block] += torch.ge(scores, best_image, out=spare).sum(dim=0).long()
    return ahead_of_text, ahead_of_image


class _Scorer:
    """Reusable buffers for score blocks, and the rounding error `bound` of a float32 score.

    Scores are computed in float32, and recomputed in float64 where they are within `bound` of a score that they are
    compared with.
    """

    def __init__(self, images: _FeatureRows, texts: _FeatureRows, chunk: int) -> None:
        device, size = images.features.device, min(chunk, len(texts)) * min(IMAGE_BLOCK, len(images))
        self.buffer, self.spare = (torch.empty(size, device=device) for _ in range(2))
        self.near = torch.empty(size, dtype=torch.bool, device=device)
        # A float32 sum of n products is off by at most n * eps / 2 times the product of the norms (Higham, Accuracy
        # and Stability of Numerical Algorithms, section 3.1); twice that, and some more for the other roundings.
        bound = images.max_norm() * texts.max_norm() * (images.features.shape[1] + 8) * torch.finfo(torch.float32).eps
        self.bound = bound.float()
        try:  # the bound does not hold for products in TF32 or bfloat16
            self.is_fast = torch.get_float32_matmul_precision() == "highest"
        except RuntimeError:  # set per backend
            self.is_fast = False

    def scores(
        self,
        queries: Float[Tensor, "texts dim"],
        gallery: Float[Tensor, "images dim"],
        best_text: Float[Tensor, "texts 1"],
        best_image: Float[Tensor, " images"],
    ) -> tuple[Float[Tensor, "texts images"], Float[Tensor, "texts images"]]:
        """Return the scores, valid until the next call, and a scratch buffer of the same shape.

        Comparisons of the scores with `best_text` and `best_image` by `>=` give the same result as exact scores.
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
    """Return the inner product of corresponding rows, computed in float64 and rounded to float32."""
    return queries.double().mul_(gallery).sum(dim=1).float()


def _slices(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]
