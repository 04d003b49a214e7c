"""What retrieval must beat to have learned anything: chance, and a ridge map from 8 x 8 pixels to bags of words.

    python benchmarks/retrieval_floor.py shards/photos/train shards/photos/test

The map is fitted on the pairs of the training shards: 192 pooled pixel values of a picture to the words of its
captions, each word weighted by its inverse document frequency. Prints a JSON line for each. Linear algebra only; a
minute on a CPU.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image
from tqdm import tqdm

from mcl_clip.core.errors import run_program
from mcl_clip.data.decode import decode_captions, decode_image
from mcl_clip.data.index import ShardIndex
from mcl_clip.data.reader import Reader
from mcl_clip.data.shards import expand_shards
from mcl_clip.eval.retrieval import RetrievalSet, recall_metrics

SIDE_PX = 8
MIN_COUNT = 5
PENALTIES = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)


def floor(train: str, test: Path, /) -> None:
    """Print the recalls of chance and of the ridge map.

    Args:
        train: training shards.
        test: a retrieval set in the layout of CLIP_benchmark.
    """
    pixels, captions = read_pairs(Reader(ShardIndex.build(expand_shards(train))))
    weights = word_weights(captions)
    target = torch.stack([bag_of_words(" ".join(texts), weights) for texts in captions])
    found = RetrievalSet.open(test)
    images, _ = read_pairs(found.source.reader)
    texts = torch.stack([bag_of_words(text, weights) for text in found.texts])
    held_out = len(pixels) // 10
    penalty = min(PENALTIES, key=lambda value: -_recall(pixels[held_out:], target[held_out:], pixels[:held_out],
                                                        target[:held_out], np.arange(held_out), value))  # fmt: skip
    metrics, _ = recall_metrics(ridge(pixels, target, images, penalty), texts - target.mean(0), found.image_of_text)
    sizes = {"n_images": len(images), "n_texts": len(texts), "data_sha256": found.sha256}
    print(json.dumps({"model": "ridge", "penalty": penalty, "words": len(weights), **sizes, "metrics": metrics}))
    print(json.dumps({"model": "chance", **sizes, "metrics": chance(found)}))


def read_pairs(reader: Reader) -> tuple[torch.Tensor, list[list[str]]]:
    """Pooled pixels [rows, 192] of all rows, and their captions."""
    pixels, captions = [], []
    for start in tqdm(range(0, len(reader.index), 256), desc="read", disable=None):
        for sample in reader.read(np.arange(start, min(start + 256, len(reader.index)))):
            small = decode_image(sample.image).resize((SIDE_PX, SIDE_PX), Image.Resampling.BOX)
            pixels.append(torch.from_numpy(np.asarray(small, np.float64).ravel() / 255))
            captions.append(decode_captions(sample.text, sample.text_format))
    return torch.stack(pixels), captions


def words(text: str) -> Iterator[str]:
    """Lower-case words."""
    return (match.group() for match in re.finditer(r"[a-z]+", text.lower()))


def word_weights(captions: list[list[str]]) -> dict[str, float]:
    """Words in at least five rows, with their inverse document frequency, in order."""
    counts = Counter(word for texts in captions for word in set(words(" ".join(texts))))
    return {word: float(np.log(len(captions) / n)) for word, n in sorted(counts.items()) if n >= MIN_COUNT}


def bag_of_words(text: str, weights: dict[str, float]) -> torch.Tensor:
    """Weights of the words that occur, of unit length."""
    present = set(words(text))
    bag = torch.tensor([weight if word in present else 0.0 for word, weight in weights.items()], dtype=torch.float64)
    return torch.nn.functional.normalize(bag, dim=0)


def ridge(x: torch.Tensor, y: torch.Tensor, queries: torch.Tensor, penalty: float) -> torch.Tensor:
    """Predictions, centred, for `queries` of a ridge regression of y on x."""
    mean = x.mean(0)
    x, y, queries = x - mean, y - y.mean(0), queries - mean
    predicted: torch.Tensor = queries @ torch.linalg.solve(
        x.T @ x + penalty * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y
    )
    return predicted


def _recall(
    x: torch.Tensor, y: torch.Tensor, images: torch.Tensor, texts: torch.Tensor, of: np.ndarray, penalty: float
) -> float:
    metrics, _ = recall_metrics(ridge(x, y, images, penalty), texts - y.mean(0), of)
    return metrics["mean_recall@10"]


def chance(found: RetrievalSet) -> dict[str, float]:
    """Return the expected recalls of a random order."""
    texts, metrics = len(found.texts), {}
    for k in (1, 5, 10):
        metrics[f"image_retrieval_recall@{k}"] = k / len(found.captions)
        misses = [np.prod([1 - len(own) / (texts - i) for i in range(k)]) for own in found.captions]
        metrics[f"text_retrieval_recall@{k}"] = float(1 - np.mean(misses))
    return metrics


if __name__ == "__main__":
    run_program(lambda: tyro.cli(floor, description=__doc__))
