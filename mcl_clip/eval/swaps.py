"""Swaps: captions in which one word is replaced by another of its kind, so that they no longer hold.

A model that sees what a word says prefers the caption to the swap. Words and kinds are in `swap_words.json`, or in a
file of the same form: for each kind, groups of words or phrases that replace each other, all of one form (`two` and
`three`, but not `one`, which takes a singular); under `holds`, further words whose presence makes some words hold.

    {"color": [["red", "blue"]], "person": [["man", "woman"], ["men", "women"]],
     "holds": [{"words": ["man", "men"], "with": ["guy", "he"]}]}

A word is a replacement only if it holds in no caption of the same picture. Among those that remain it is drawn in
proportion to the number of pictures with it. For evaluation swaps are balanced: A replaces B as often as B replaces A,
so that a preference for frequent words alone is right in half of them.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mcl_clip.core.distributed import permutation, random_words
from mcl_clip.core.errors import UserError, shorten, shorten_list
from mcl_clip.core.files import read_json
from mcl_clip.core.progress import Progress
from mcl_clip.eval.pairs import write_pair_set

HOLDS = "holds"
WORDS_FILE = Path(__file__).parent / "swap_words.json"
_ARTICLE = re.compile(r"(?<![\w'-])(an?)(\s+)$", re.IGNORECASE)
_AN = re.compile(r"(?!one|uni|use|eu|ewe)[aeiou]|hour|honest|heir", re.IGNORECASE)


class Swap(NamedTuple):
    """A caption of a picture and its wrong copy, in which `replacement` stands in place of `word`."""

    picture: int
    kind: str
    caption: str
    wrong: str
    word: str
    replacement: str


@dataclass(frozen=True)
class SwapWords:
    """Words that replace each other, by kind, and the words that each of them holds with; all in lower case."""

    others: Mapping[str, Mapping[str, tuple[str, ...]]]  # by kind and word
    holds_with: Mapping[str, frozenset[str]]

    @classmethod
    def read(cls, path: Path | None = None) -> "SwapWords":
        """Read a file of words, by default the one of the package; the module's docstring describes it.

        Raises:
            UserError: if there is no such file, or it has another form.
        """
        content = read_json(path or WORDS_FILE)
        if not isinstance(content, dict) or not set(content) - {HOLDS}:
            raise UserError(f"{path} has no kinds of words; it must be an object of lists of groups of words, by kind")
        holds: defaultdict[str, set[str]] = defaultdict(set)
        for rule in content.pop(HOLDS, []):
            is_rule = isinstance(rule, dict) and rule.keys() == {"words", "with"}
            if not is_rule or not all(map(_is_words, rule.values())):
                raise UserError(
                    f"{path} has {shorten(repr(rule), 60)} in 'holds'; write {{'words': [...], 'with': []}}"
                )
            for word in _lower(rule["words"]):
                holds[word] |= {*_lower(rule["words"]), *_lower(rule["with"])}
        others: dict[str, dict[str, tuple[str, ...]]] = {}
        for kind, groups in content.items():
            if not isinstance(groups, list) or not groups or not all(_is_words(group, least=2) for group in groups):
                raise UserError(
                    f"{path} has {shorten(repr(groups), 60)} for the kind {kind!r}; write groups of at least two "
                    f'words, as [["red", "blue"], ["dark", "light"]]'
                )
            found: defaultdict[str, dict[str, None]] = defaultdict(dict)
            for group in map(_lower, groups):
                for word in group:
                    found[word] |= dict.fromkeys(other for other in group if other != word)
            others[kind] = {word: tuple(of_word) for word, of_word in found.items()}
        return cls(others, {word: frozenset(of_word) for word, of_word in holds.items()})

    def holding(self, found: set[str]) -> set[str]:
        """Return the words that hold where the words `found` occur."""
        return found | {word for word, others in self.holds_with.items() if not others.isdisjoint(found)}


def make_swaps(
    captions: Sequence[Sequence[str]],
    words: SwapWords,
    *,
    keys: Sequence[str],
    seed: int = 0,
    is_balanced: bool = True,
    most_per_kind: int = 0,
) -> list[Swap]:
    """Make at most one swap of each kind from each caption; the same ones for the same words, keys, captions and seed.

    Args:
        captions: the captions of each picture.
        keys: name of each picture.
        is_balanced: leave out swaps, drawn at random, so that a word replaces another as often as that one it.
        most_per_kind: about so many swaps of a kind, drawn from all; 0 for all of them.

    Returns:
        the swaps, in the order of the pictures.

    Raises:
        UserError: if no swap can be made.
    """
    patterns = {kind: words_pattern(of_kind) for kind, of_kind in words.others.items()}
    every = words_pattern({*chain(*words.others.values()), *chain(*words.holds_with.values())})
    found = [{match for text in texts for match in _occurring(every, text)} for texts in captions]
    pictures_with = Counter(chain.from_iterable(found))
    swaps: defaultdict[str, dict[tuple[int, str], Swap]] = defaultdict(dict)
    for picture, texts in enumerate(Progress(captions, desc="swaps", unit="picture")):
        holding = words.holding(found[picture])
        for number, caption in enumerate(texts):
            for kind, pattern in patterns.items():
                choices = [
                    (match, replacement)
                    for match in pattern.finditer(caption)
                    for replacement in words.others[kind][match[0].lower()]
                    if replacement not in holding and pictures_with[replacement]
                ]
                if choices:
                    weights = np.array([pictures_with[replacement] for _, replacement in choices])
                    drawn = int(
                        random_words(1, "swap", seed, keys[picture], number, kind)[0] % np.uint64(weights.sum())
                    )
                    match, replacement = choices[int(np.searchsorted(np.cumsum(weights), drawn, side="right"))]
                    wrong = _replaced(caption, match, replacement)
                    swap = Swap(picture, kind, caption, wrong, match[0].lower(), replacement)
                    swaps[kind].setdefault((picture, wrong), swap)
    kept = [_choose(list(of_kind.values()), seed, is_balanced, most_per_kind) for of_kind in swaps.values()]
    if not any(kept):
        raise UserError(
            f"no caption of {len(captions):,} pictures has a word of the kinds {shorten_list(words.others)} that "
            f"another of its group, from other pictures, could replace{', and be replaced by' * is_balanced}; give "
            f"--words a list with words of these captions"
        )
    order = {kind: number for number, kind in enumerate(words.others)}
    return sorted(chain(*kept), key=lambda swap: (swap.picture, order[swap.kind], swap.caption))


def write_swaps(folder: Path, swaps: Sequence[Swap], paths: Sequence[str], *, images: str, name: str) -> None:
    """Write swaps as a set that `mcl_clip.eval.pairs` reads, with a group for each kind.

    `paths` are those of the pictures below the folder `images`, which is absolute or relative to `folder`.
    """
    numbers: Counter[str] = Counter()
    items: list[dict[str, Any]] = []
    for swap in swaps:
        numbers[swap.kind] += 1
        items.append(
            {
                "id": f"{swap.kind} {numbers[swap.kind]}",
                "group": swap.kind,
                "images": [paths[swap.picture]],
                "texts": [swap.caption, swap.wrong],
                "match": [[0, 0]],
            }
        )
    source = "captions with one word replaced by another of its kind"
    write_pair_set(folder, items, name=name, rule="text_choice", images=images, source=source)


def _is_words(value: Any, least: int = 0) -> bool:
    return isinstance(value, list) and len(value) >= least and all(isinstance(w, str) and w.strip() for w in value)


def _lower(words: Sequence[str]) -> list[str]:
    return [" ".join(word.lower().split()) for word in words]


def words_pattern(words: Mapping[str, Any] | set[str]) -> re.Pattern[str]:
    """Return a pattern for whole words; of a word and a phrase that starts with it, the phrase is found."""
    longest_first = sorted(words, key=lambda word: (-len(word), word))
    # A word with a hyphen, such as red-haired, is another word; man's is man.
    return re.compile(rf"(?<![\w'-])(?:{'|'.join(map(re.escape, longest_first))})(?![\w-])", re.IGNORECASE)


def _occurring(pattern: re.Pattern[str], text: str) -> list[str]:
    """List the words that occur in a text in lower case, also those within phrases."""
    found, start = [], 0
    while match := pattern.search(text, start):
        found.append(match[0].lower())
        start = match.start() + 1
    return [*found, *(word for phrase in found if " " in phrase for word in phrase.split())]


def _replaced(text: str, match: re.Match[str], replacement: str) -> str:
    """Replace a word by another in the same case, with the article that fits."""
    word = match[0]
    if word[0].isupper():
        replacement = (
            replacement.upper() if word.isupper() and len(word) > 1 else replacement[0].upper() + replacement[1:]
        )
    before = text[: match.start()]
    if article := _ARTICLE.search(before):
        letter = article[1][0]
        before = f"{before[: article.start()]}{letter}{'n' * bool(_AN.match(replacement))}{article[2]}"
    return before + replacement + text[match.end() :]


def _choose(swaps: list[Swap], seed: int, is_balanced: bool, most: int) -> list[Swap]:
    """Draw swaps of a kind: as many of A by B as of B by A if balanced, and at most `most`, up to one more."""
    order = permutation(len(swaps), "swaps", seed, swaps[0].kind).tolist()
    by_words: defaultdict[tuple[str, str], list[Swap]] = defaultdict(list)
    for number in order:
        by_words[swaps[number].word, swaps[number].replacement].append(swaps[number])
    if not is_balanced:
        return [swaps[number] for number in order[: most or None]]
    pairs = [
        pair
        for (word, replacement), there in by_words.items()
        if word < replacement
        for pair in zip(there, by_words.get((replacement, word), ()), strict=False)
    ]
    drawn = permutation(len(pairs), "balanced swaps", seed, swaps[0].kind)[: -(-most // 2) or None]
    return [swap for number in drawn.tolist() for swap in pairs[number]]
