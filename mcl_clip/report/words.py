"""The words that tell a cluster from the others."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Integer

_WORD = re.compile(r"[^\W_]{1,40}(?:['\u2019-][^\W_]{1,20})*")
MOST_WORDS = 200  # of the captions of a pair
LEAST_SHARE = 0.15  # of a cluster's pairs have a telling word
LEAST_LIFT = 1.5  # a telling word is so many times as frequent in the cluster as among all pairs


@dataclass(frozen=True)
class Word:
    """A word with the share of a cluster's pairs that have it, and that of all pairs."""

    word: str
    share: float
    share_of_all: float

    def __str__(self) -> str:
        return f"{self.word} {100 * self.share:.0f} % (all: {100 * self.share_of_all:.0f} %)"


def words_of(texts: Iterable[str]) -> set[str]:
    """The different words, and pairs of neighbouring words, of the captions of a pair; lower case, in any script."""
    found: set[str] = set()
    for text in texts:
        words = [match[0] for match in _WORD.finditer(text.lower())]
        found.update(words)
        found.update(f"{one} {two}" for one, two in pairwise(words))
        if len(found) > MOST_WORDS:
            break
    return found


def telling_words(
    captions: Sequence[Sequence[str]], clusters: Integer[np.ndarray, "pairs"], most: int = 5
) -> dict[int, list[Word]]:
    """The most telling words of each cluster, by class-based tf-idf (BERTopic, Grootendorst 2022, arXiv 2203.05794).

    A word scores tf log(1 + A / f): tf is its share of the words of the cluster, f its count over all clusters, A the
    mean number of words of a cluster. A pair counts a word once, whatever number of captions has it. Left out are words
    of few pairs, words that are hardly more frequent in the cluster than elsewhere, and words inside a better pair.
    """
    of_cluster: dict[int, Counter[str]] = {}
    for texts, cluster in zip(captions, clusters.tolist(), strict=True):
        of_cluster.setdefault(cluster, Counter()).update(words_of(texts))
    totals = sum(of_cluster.values(), Counter())
    mean = totals.total() / max(1, len(of_cluster))
    weights = {word: math.log1p(mean / count) for word, count in totals.items()}
    sizes = np.bincount(clusters) if len(clusters) else np.zeros(0, np.int64)
    telling = {}
    for cluster, counts in of_cluster.items():
        found = [
            (count * weights[word], Word(word, count / int(sizes[cluster]), totals[word] / len(captions)))
            for word, count in counts.items()
            if count > 1
        ]
        ranked = sorted(
            (pair for pair in found if pair[1].share >= max(LEAST_SHARE, LEAST_LIFT * pair[1].share_of_all)),
            key=lambda pair: (-pair[0], pair[1].word),
        )
        telling[cluster] = _without_repeats([word for _, word in ranked], most)
    return telling


def _without_repeats(words: Iterable[Word], most: int) -> list[Word]:
    """The first words that share nothing with one before."""
    kept: list[Word] = []
    for word in words:
        if len(kept) == most:
            break
        parts = set(word.word.split())
        if not any(parts & set(other.word.split()) for other in kept):
            kept.append(word)
    return kept
