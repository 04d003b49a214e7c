"""Shortcuts: parts of caption and picture that explain most of what tells a pair from others.

With unit features f of pictures and t of captions, and their means F and T, the margin of pair i is
<f_i - F, t_i - T>: by how much its cosine is above that of other pairs. A class of words is exchanged with that of
another caption, or a region of the picture is covered by the mean picture; the share of the margin that is left is
compared with what is left after as many random words, or other regions of the same shape. Where the first is small and
the second is not, the model tells pairs apart by this part. Single frequent words are left out.

Whether the model reads text in pictures is measured by writing a word of another caption on each picture: the share
of the mean margin that this caption gains (arXiv 2312.14232).
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from mcl_clip.core.distributed import permutation
from mcl_clip.core.stats import resampled_means
from mcl_clip.eval.embed import Encoder, FileImages
from mcl_clip.eval.swaps import SwapWords, words_pattern
from mcl_clip.eval.task import ImageSource

DIGITS = "digits"  # a class of words
MIN_COVERAGE = 0.5  # of the captions, from which a class of words can be what a model goes by
FREQUENT_SHARE, MAX_WORDS = 0.05, 40  # of the captions with a word that is left out by itself
TELLING_CLASSES = 3
POSITIONS = (1, 2, 4, 6)
MAX_LEFT_OUT = 0.5  # of the words of a mean caption
EDGE, CORNER = 1 / 8, 1 / 4
SMALLEST_FONT = 6  # pixels
SMALLEST_SHARE = 1e-3  # of the margin; what is left is compared with no less
_TOKEN = re.compile(r"\S+")
_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")
Span = tuple[int, int]


@dataclass(frozen=True)
class Region:
    """A rectangle of a picture, in parts of its height and width; those of one shape are compared with each other."""

    name: str
    shape: str
    box: tuple[float, float, float, float]  # top, left, bottom, right

    def pixels(self, height: int, width: int) -> tuple[slice, slice]:
        """Return its rows and columns, at least one of each."""
        top, left, bottom, right = self.box
        sides = (top, bottom, height), (left, right, width)
        starts = [min(round(start * size), size - 1) for start, _, size in sides]
        stops = [max(round(stop * size), start + 1) for (_, stop, size), start in zip(sides, starts, strict=True)]
        return slice(starts[0], stops[0]), slice(starts[1], stops[1])


REGIONS = (
    Region("upper edge", "edge", (0, 0, EDGE, 1)),
    Region("lower edge", "edge", (1 - EDGE, 0, 1, 1)),
    Region("left edge", "edge", (0, 0, 1, EDGE)),
    Region("right edge", "edge", (0, 1 - EDGE, 1, 1)),
    Region("upper left corner", "corner", (0, 0, CORNER, CORNER)),
    Region("upper right corner", "corner", (0, 1 - CORNER, CORNER, 1)),
    Region("lower left corner", "corner", (1 - CORNER, 0, 1, CORNER)),
    Region("lower right corner", "corner", (1 - CORNER, 1 - CORNER, 1, 1)),
    Region("center", "center", (0.25, 0.25, 0.75, 0.75)),
)
WRITTEN = Region("written word", "text", (1 - EDGE, 0, 1, 1))


@dataclass(frozen=True, kw_only=True)
class Part:
    """What is left of the margin without a part of captions or pictures.

    Attributes:
        name: the part.
        kind: `words` (a class of words), `word`, or the shape of a region.
        coverage: share of the pairs that have it; the other figures are over these.
        left: share of the margin that is left without it.
        left_otherwise: the same without as many random words, or without other regions of the shape (their median);
            None for a single word and the center.
        ratio: `left` of `left_otherwise`, with its 95 % interval: how much less is left than by chance.
        size: words of a caption that are exchanged or left out, mean; or share of the area.
        words: of a region: classes of words that go with it, the most telling first, with the share of the margin lost
            by covering it that is in these words, and the same for as many random words.
    """

    name: str
    kind: str
    coverage: float
    left: float
    left_otherwise: float | None
    ratio: tuple[float, float, float] | None
    size: float
    words: Sequence[tuple[str, float, float]] = ()


@dataclass(frozen=True, kw_only=True)
class Shortcuts:
    """The parts of captions and pictures, and the margin that they are shares of."""

    margin: float  # mean
    interval: tuple[float, float]
    words: Sequence[Part]
    regions: Sequence[Part]
    reads: float  # share of the margin that a written word gives to another caption
    reads_interval: tuple[float, float]


def find_shortcuts(
    encoder: Encoder,
    images: ImageSource,
    captions: Sequence[str],
    features: Mapping[str, Float[Tensor, "pairs dim"]],
    means: Mapping[str, Float[Tensor, " dim"]],
    words: SwapWords,
    *,
    white_and_black: Float[Tensor, "2 3"],
    seed: int = 0,
) -> Shortcuts:
    """Measure how much of the margin of some pairs each part of captions and pictures explains.

    Args:
        encoder: the model.
        images: a picture for each caption.
        captions: a caption for each picture.
        features: their unit `image` and `text` features.
        means: mean unit features of a larger sample of pictures and captions.
        words: classes of words that are left out.
        white_and_black: values of white and black pixels after the image transform, by channel.
        seed: seed of the random words.
    """
    centered = {side: features[side].double() - means[side].double() for side in ("image", "text")}
    margins = (centered["image"] * centered["text"]).sum(1).numpy()
    edits = word_edits(captions, words, seed=seed)
    texts = [text for edit in edits for text in chain(edit.edited, edit.otherwise)]
    encoded = F.normalize(encoder.embed(ToEmbed(texts=texts))["text"].double()) - means["text"].double()
    without, start = [], 0
    for edit in edits:
        stops = start + len(edit.edited), start + len(edit.edited) + len(edit.otherwise)
        without.append((encoded[start : stops[0]], encoded[stops[0] : stops[1]]))
        start = stops[1]
    parts = []
    for edit, of_edit in zip(edits, without, strict=True):
        left = [(centered["image"][edit.rows] * some).sum(1).numpy() for some in of_edit if len(some)]
        parts.append(
            _part(edit.name, edit.kind, [margins[edit.rows], *left], edit.size, len(edit.rows) / len(captions))
        )
    covered, reads = _cover(encoder, images, captions, centered, means["image"].double(), white_and_black)
    classes = [(edit, *of_edit) for edit, of_edit in zip(edits, without, strict=True) if edit.kind == "words"]
    regions = _region_parts(centered, covered, margins, classes)
    whole = _means([margins])[0]
    return Shortcuts(
        margin=float(whole[0]), interval=_interval(whole), words=parts, regions=regions, reads=reads[0],
        reads_interval=reads[1],
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ToEmbed:
    """Pictures and texts to embed that are no evaluation set."""

    source: ImageSource = field(default_factory=lambda: FileImages(()))
    texts: Sequence[str] = ()
    sha256: str = ""


@dataclass(frozen=True)
class WordEdit:
    """Captions with the part of another, and with as many random words of another; `rows` are those with the part.

    Single words are left out, and have no random words beside them.
    """

    name: str
    kind: str
    rows: Sequence[int]
    edited: Sequence[str]
    otherwise: Sequence[str]
    size: float


def word_edits(captions: Sequence[str], words: SwapWords, *, seed: int = 0) -> list[WordEdit]:
    """Exchange classes of words between captions, and leave frequent words out; a caption keeps at least one word.

    Classes are digits, the words of each kind, and the first and last words up to `MAX_LEFT_OUT` of a mean caption.
    """
    tokens = [[match.span() for match in _TOKEN.finditer(caption)] for caption in captions]
    longest = MAX_LEFT_OUT * float(np.mean([len(spans) for spans in tokens])) if tokens else 0.0
    patterns = {f"{kind} words": words_pattern(of_kind) for kind, of_kind in words.others.items()}
    classes: dict[str, Callable[[int], list[Span]]] = {
        DIGITS: lambda row: [s for s in tokens[row] if captions[row][slice(*s)].strip(".,;:()").isdecimal()],
        **{name: lambda row, p=pattern: _hit(tokens[row], p, captions[row]) for name, pattern in patterns.items()},  # type: ignore[misc]
    }
    for count in (number for number in POSITIONS if number <= longest):
        plural = "s" * (count > 1)
        classes[f"first {count} word{plural}" if count > 1 else "first word"] = lambda row, n=count: tokens[row][:n]  # type: ignore[misc]
        classes[f"last {count} word{plural}" if count > 1 else "last word"] = lambda row, n=count: tokens[row][-n:]  # type: ignore[misc]
    edits = []
    for name, find in classes.items():
        spans = {row: found for row in range(len(captions)) if 0 < len(found := find(row)) < len(tokens[row])}
        if len(spans) < max(2, FREQUENT_SHARE * len(captions)):
            continue
        rows = list(spans)
        drawn = {
            row: sorted(
                tokens[row][n]
                for n in permutation(len(tokens[row]), "random words", seed, name, row)[: len(spans[row])]
            )
            for row in rows
        }
        edited, otherwise = (
            [
                _exchanged(captions, row, other, of_part)
                for row, other in zip(rows, np.roll(rows, 1).tolist(), strict=True)
            ]
            for of_part in (spans, drawn)
        )
        edits.append(WordEdit(name, "words", rows, edited, otherwise, float(np.mean([len(s) for s in spans.values()]))))
    return edits + _frequent_words(captions, tokens)


def _frequent_words(captions: Sequence[str], tokens: Sequence[Sequence[Span]]) -> list[WordEdit]:
    """Leave out single words, the most frequent first."""
    normal = [
        [_normal(caption[slice(*span)]) for span in spans] for caption, spans in zip(captions, tokens, strict=True)
    ]
    counts = Counter(word for of_caption in normal for word in dict.fromkeys(of_caption) if word)
    edits = []
    for word, count in counts.most_common(MAX_WORDS):
        if count < max(2, FREQUENT_SHARE * len(captions)):
            break
        spans = {
            row: [span for span, one in zip(tokens[row], normal[row], strict=True) if one == word]
            for row in range(len(captions))
        }
        rows = [row for row, found in spans.items() if 0 < len(found) < len(tokens[row])]
        if rows:
            edited = [_without(captions[row], spans[row]) for row in rows]
            edits.append(WordEdit(word, "word", rows, edited, [], float(np.mean([len(spans[row]) for row in rows]))))
    return edits


def _normal(token: str) -> str:
    match = _WORD.search(token.lower())
    return match[0] if match else ""


def _hit(tokens: Sequence[Span], pattern: re.Pattern[str], caption: str) -> list[Span]:
    """Return the tokens that a pattern finds."""
    found = [match.span() for match in pattern.finditer(caption)]
    return [span for span in tokens if any(span[0] < end and start < span[1] for start, end in found)]


def _exchanged(captions: Sequence[str], row: int, other: int, spans: Mapping[int, Sequence[Span]]) -> str:
    """Put the part of another caption in the place of a caption's own, word by word; of a shorter part in turn."""
    words = [captions[other][slice(*span)] for span in spans[other]]
    kept = captions[row]
    for number, (start, end) in reversed([*enumerate(spans[row])]):
        kept = kept[:start] + words[number % len(words)] + kept[end:]
    return kept


def _without(text: str, spans: Sequence[Span]) -> str:
    """Leave parts out of a text."""
    kept = list(text)
    for start, end in spans:
        kept[start:end] = [""] * (end - start)
    return " ".join("".join(kept).split())


def _part(
    name: str, kind: str, margins: Sequence[Float64[np.ndarray, " pairs"]], size: float, coverage: float = 1.0
) -> Part:
    """Summarize the margins of pairs: as they are, without the part and, if given, without another part."""
    means = _means(margins)
    left = _divide(means[1], means[0])
    others = _divide(np.median(means[2:], axis=0), means[0]) if len(means) > 2 else None
    ratio = None if others is None else np.maximum(left, 0) / np.maximum(others, SMALLEST_SHARE)
    return Part(
        name=name,
        kind=kind,
        coverage=coverage,
        left=float(left[0]),
        left_otherwise=None if others is None else float(others[0]),
        ratio=None if ratio is None else (float(ratio[0]), *_interval(ratio)),
        size=size,
    )


def _divide(a: Float64[np.ndarray, " n"], b: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    """Divide means by means; 0 where the divisor is 0, as for a model with constant features."""
    quotient: np.ndarray = np.divide(a, b, out=np.zeros_like(a), where=b != 0)
    return quotient


def _means(values: Sequence[Float64[np.ndarray, " pairs"]]) -> Float64[np.ndarray, "values resamples"]:
    """Return the means of values over the pairs and, from the second column on, over bootstrap samples of these."""
    return resampled_means(np.stack(values))


def _interval(resampled: Float64[np.ndarray, " resamples"]) -> tuple[float, float]:
    low, high = np.quantile(resampled[1:], [0.025, 0.975])
    return float(low), float(high)


@dataclass(frozen=True)
class _EditedImages:
    """Every picture with every edit, one edit after the other: what is yielded is a picture and its edit."""

    pictures: ImageSource
    edits: Sequence[Sequence[tuple[Region, str]]]  # each has a region, and a word or none, for each picture

    def __len__(self) -> int:
        return len(self.edits) * len(self.pictures)

    def images(self, rows: Int[np.ndarray, " batch"]) -> Iterator[Any]:
        """Yield the pictures of `rows` with their edits."""
        count = len(self.pictures)
        for row, picture in zip(rows.tolist(), self.pictures.images(rows % count), strict=True):
            yield picture, self.edits[row // count][row % count]


@dataclass(frozen=True)
class _Edit:
    """The image transform, then the mean picture over a region or a word written into it."""

    transform: Callable[[Any], Tensor]
    mean_picture: Float[Tensor, "3 height width"]
    white_and_black: Float[Tensor, "2 3"]

    def __call__(self, picture_and_edit: tuple[Image.Image, tuple[Region, str]]) -> Float[Tensor, "3 height width"]:
        picture, (region, word) = picture_and_edit
        pixels = self.transform(picture).clone()
        rows, columns = region.pixels(*pixels.shape[1:])
        target = pixels[:, rows, columns]
        if word:
            ink = torch.from_numpy(write_word(word, *target.shape[1:]))
            white, black = (color[:, None, None] for color in self.white_and_black)
            target.copy_(white + ink * (black - white))
        else:
            target.copy_(self.mean_picture[:, rows, columns])
        return pixels


def write_word(word: str, height: int, width: int) -> np.ndarray:
    """Draw a word as large as it fits, float32 [height, width]: 0 is paper, 1 is ink."""
    canvas = Image.new("L", (width, height))
    for size in range(max(height, SMALLEST_FONT), SMALLEST_FONT - 1, -1):
        font = ImageFont.load_default(size)
        left, top, right, bottom = font.getbbox(word)
        if right - left <= width and bottom - top <= height:
            break
    ImageDraw.Draw(canvas).text(
        ((width - right + left) / 2 - left, (height - bottom + top) / 2 - top), word, fill=255, font=font
    )
    return np.asarray(canvas, np.float32) / 255


def _cover(
    encoder: Encoder,
    images: ImageSource,
    captions: Sequence[str],
    centered: Mapping[str, Float[Tensor, "pairs dim"]],
    mean: Float[Tensor, " dim"],
    white_and_black: Float[Tensor, "2 3"],
) -> tuple[Float[Tensor, "regions pairs dim"], tuple[float, tuple[float, float]]]:
    """Return the centered features of pictures without each region, and what a written word gives to its caption."""
    count = len(captions)
    written = telling_words(captions)
    other = np.roll(np.arange(count), 1)  # whose word is written on a picture
    edits = [[(region, "")] * count for region in REGIONS] + [[(WRITTEN, written[row]) for row in other]]
    edit = _Edit(encoder.image_transform, mean_pixels(encoder.image_transform, images), white_and_black)
    editing = replace(encoder, image_transform=edit)
    edited = editing.embed(ToEmbed(source=_EditedImages(images, edits)))["image"]
    encoded = F.normalize(edited.double()).view(len(edits), count, -1)
    # Only what differs between written words counts, not the box with a word in it.
    image, text = centered["image"], centered["text"]
    gain = encoded[-1] - encoded[-1].mean(0) - (image - image.mean(0))
    gained = _means([(image * text).sum(1).numpy(), (gain * text[torch.from_numpy(other)]).sum(1).numpy()])
    reads = _divide(gained[1], gained[0])
    return encoded[:-1] - mean, (float(reads[0]), _interval(reads))


def telling_words(captions: Sequence[str]) -> list[str]:
    """Return a word of each caption that few others have, but some: one in a single caption may be misspelled."""
    words = [[word.lower() for word in _WORD.findall(caption)] or ["?"] for caption in captions]
    counts = Counter(word for of_caption in words for word in dict.fromkeys(of_caption))
    return [min(of_caption, key=lambda word: (counts[word] == 1, counts[word], -len(word))) for of_caption in words]


def _region_parts(
    centered: Mapping[str, Float[Tensor, "pairs dim"]],
    covered: Float[Tensor, "regions pairs dim"],
    margins: Float64[np.ndarray, " pairs"],
    classes: Sequence[tuple[WordEdit, Float[Tensor, "_ dim"], Float[Tensor, "_ dim"]]],
) -> list[Part]:
    """Summarize regions, with the classes of words that go with each."""
    image, text = centered["image"], centered["text"]
    left = {region: (some * text).sum(1).numpy() for region, some in zip(REGIONS, covered, strict=True)}
    parts = []
    for number, region in enumerate(REGIONS):
        lost = image - covered[number]
        found: list[tuple[str, float, float]] = []
        for edit, exchanged, otherwise in classes:
            rows = edit.rows
            whole = float((lost[rows] * text[rows]).sum())
            if len(rows) >= MIN_COVERAGE * len(margins) and whole > 0:
                own, random = (
                    float((lost[rows] * (text[rows] - some)).sum()) / whole for some in (exchanged, otherwise)
                )
                found.append((edit.name, own, random))
        found.sort(key=lambda one: one[2] - one[1])
        others = [left[one] for one in REGIONS if one.shape == region.shape and one is not region]
        top, start, bottom, end = region.box
        part = _part(region.name, region.shape, [margins, left[region], *others], (bottom - top) * (end - start))
        parts.append(replace(part, words=tuple(found[:TELLING_CLASSES])))
    return parts


def mean_pixels(transform: Callable[[Any], Tensor], images: ImageSource) -> Float[Tensor, "3 height width"]:
    """Return the mean of pictures after the image transform."""
    total = torch.zeros(())
    for row in range(len(images)):
        (picture,) = images.images(np.array([row]))
        total = total + transform(picture)
    return total / len(images)
