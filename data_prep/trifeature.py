"""Render Trifeature pairs: images of one shape in one color and one texture, and captions that need not name all three.

After Hermann & Lampinen, "What shapes feature representations?" (2020, arXiv 2006.12433): 10 shapes, 10 colours and
10 textures on mid-grey; a shape is drawn in a box of 128/224 of the image, rotated by up to 45 degrees and put at a
random position wholly inside; the texture is rotated independently. Everything scales with the image size. Unlike
there, a period of a texture is a quarter of the shape, so that textures remain distinguishable at 32 px.

    python data_prep/trifeature.py shards/trifeature --pairs-train 12000 --size-px 64

writes train/ (shards and index), retrieval/ and classification/{shape,colour,texture}/ (layout of CLIP_benchmark) and
metadata.json. An image is a function of (seed, set, row) alone.
"""

import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import tyro
from PIL import Image, ImageDraw

from mcl_clip.core.distributed import Name, permutation, random_words
from mcl_clip.core.errors import UserError, run_program
from mcl_clip.core.files import write_json
from mcl_clip.data.writing import (
    LabelledImage,
    Pair,
    new_folder,
    write_classification_set,
    write_pairs,
    write_retrieval_set,
)

SHAPES = ("triangle", "square", "plus", "circle", "tee", "rhombus", "pentagon", "star", "fivesquare", "trapezoid")
TEXTURES = ("solid", "stripes", "grid", "hexgrid", "dots", "noise", "triangles", "zigzags", "rain", "pluses")
COLOURS = ("red", "green", "blue", "yellow", "pink", "cyan", "purple", "ocean", "orange", "white")
RGB = np.array(
    [(228, 26, 28), (30, 150, 40), (35, 60, 225), (250, 225, 30), (255, 130, 190), (40, 225, 235), (140, 35, 190),
     (0, 115, 135), (250, 130, 15), (255, 255, 255)],
    np.float32,
)  # fmt: skip
BACKGROUND = 128
DARK = 0.2  # brightness of the dark parts of a texture
BOX = 128 / 224  # side of the box a shape is drawn in, as a part of the picture
PERIOD = 0.16  # of a texture, as a part of the picture
MAX_ANGLE = 45  # degrees
SIZES_PX = (32, 512)
_ANGLES = 2 * MAX_ANGLE + 1


def render(shape: int, colour: int, texture: int, *, size_px: int, name: Sequence[Name]) -> np.ndarray:
    """Render an image, uint8 [size_px, size_px, 3].

    Angles (whole degrees), place and phase are drawn by `name`: the same name gives the same picture.
    """
    words = random_words(6, "trifeature picture", *name).tolist()
    mask = _shape_mask(shape, words[0] % _ANGLES - MAX_ANGLE, size_px)
    tile = _texture_tile(texture, words[1] % _ANGLES - MAX_ANGLE, size_px)
    height, width = mask.shape
    top, left = words[2] % (size_px - height + 1), words[3] % (size_px - width + 1)
    down, right = words[4] % (tile.shape[0] - height + 1), words[5] % (tile.shape[1] - width + 1)
    brightness = tile[down : down + height, right : right + width, None] * (RGB[colour] / 255)
    inside = BACKGROUND + (mask[..., None] / np.float32(255)) * (brightness - BACKGROUND)
    picture = np.full((size_px, size_px, 3), BACKGROUND, np.uint8)
    picture[top : top + height, left : left + width] = (inside + 0.5).astype(np.uint8)
    return picture


@lru_cache(maxsize=len(SHAPES) * _ANGLES)
def _shape_mask(shape: int, angle: int, size_px: int) -> np.ndarray:
    """Return the coverage of each pixel by a rotated shape, uint8, cropped to the shape."""
    fine = max(2, 256 // size_px)  # supersampling
    side = math.ceil(math.sqrt(2) * BOX * size_px) + 2
    canvas = Image.new("L", (side * fine, side * fine))
    turn = _turn(angle) * BOX * size_px * fine
    for outline in _outlines(SHAPES[shape]):
        corners = (np.array(outline) - 0.5) @ turn.T + side * fine / 2
        ImageDraw.Draw(canvas).polygon([(float(x), float(y)) for x, y in corners], fill=255)
    cover = np.asarray(canvas.reduce(fine))
    rows, columns = np.flatnonzero(cover.any(1)), np.flatnonzero(cover.any(0))
    return cover[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


@lru_cache(maxsize=len(TEXTURES) * _ANGLES)
def _texture_tile(texture: int, angle: int, size_px: int) -> np.ndarray:
    """Return the brightness of a rotated texture, uint8 [side, side], large enough for any shape at any phase."""
    fine = max(2, 256 // size_px)  # supersampling
    side = math.ceil((math.sqrt(2) * BOX + 2 * PERIOD) * size_px) + 2
    grid = (np.arange(side * fine, dtype=np.float32) + 0.5) / (fine * PERIOD * size_px)
    (a, b), (c, d) = _turn(angle).astype(np.float32)
    across, down = grid[None, :], grid[:, None]
    bright = PATTERNS[TEXTURES[texture]](a * across + b * down, c * across + d * down)
    return np.asarray(Image.fromarray(np.where(bright, 255, round(255 * DARK)).astype(np.uint8)).reduce(fine))


def _turn(angle: int) -> np.ndarray:
    sine, cosine = math.sin(math.radians(angle)), math.cos(math.radians(angle))
    return np.array([[cosine, -sine], [sine, cosine]])


Outline = list[tuple[float, float]]


@cache
def _outlines(shape: str) -> list[Outline]:
    """Return the polygons of a shape in the unit square, y downwards."""
    third, far = 1 / 3, 2 / 3
    polygons: dict[str, list[Outline]] = {
        "triangle": [[(0.5, 0.03), (1, 0.9), (0, 0.9)]],
        "square": [[(0.1, 0.1), (0.9, 0.1), (0.9, 0.9), (0.1, 0.9)]],
        "plus": [
            [(third, 0), (far, 0), (far, 1), (third, 1)],
            [(0, third), (1, third), (1, far), (0, far)],
        ],
        "circle": [_regular(90, 0.47)],
        "tee": [[(0, 0), (1, 0), (1, third), (far, third), (far, 1), (third, 1), (third, third), (0, third)]],
        "rhombus": [[(0.5, 0), (0.81, 0.5), (0.5, 1), (0.19, 0.5)]],
        "pentagon": [_regular(5, 0.5)],
        "star": [[point for pair in zip(_regular(5, 0.53), _regular(5, 0.22, 36), strict=True) for point in pair]],
        "fivesquare": [
            [(x, y), (x + third, y), (x + third, y + third), (x, y + third)]
            for x, y in ((0, 0), (far, 0), (third, third), (0, far), (far, far))
        ],
        "trapezoid": [[(0.28, 0.2), (0.72, 0.2), (1, 0.8), (0, 0.8)]],
    }
    return polygons[shape]


def _regular(corners: int, radius: float, offset: float = 0.0) -> Outline:
    angles = [math.radians(360 * corner / corners + offset) for corner in range(corners)]
    return [(0.5 + radius * math.sin(angle), 0.5 - radius * math.cos(angle)) for angle in angles]


def _cell(values: np.ndarray) -> np.ndarray:
    """Map a coordinate to its position within a period, in [-0.5, 0.5)."""
    place: np.ndarray = values - np.floor(values + 0.5)
    return place


def _hexgrid(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Dark lines around bright hexagons, 1.25 periods apart."""
    u, v = u / 1.25, v / 1.25
    height = math.sqrt(3)

    def inner_distance(du: np.ndarray, dv: np.ndarray) -> np.ndarray:
        distance: np.ndarray = np.maximum(np.abs(du), np.abs(du) / 2 + np.abs(dv) * height / 2)
        return distance

    first = inner_distance(_cell(u), height * _cell(v / height))
    second = inner_distance(_cell(u + 0.5), height * _cell(v / height + 0.5))
    bright: np.ndarray = np.minimum(first, second) < 0.38
    return bright


def _noise(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Squares of a third of a period, each bright or dark at random."""
    cells = (random_words(64 * 64, "trifeature noise") >> np.uint64(63)).astype(bool).reshape(64, 64)
    bright: np.ndarray = cells[np.floor(3 * u).astype(int) % 64, np.floor(3 * v).astype(int) % 64]
    return bright


def _triangles(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Bright triangles, 1.2 periods wide, in rows shifted by half."""
    v = v / 1.1
    u = u / 1.2 + 0.5 * (np.floor(v) % 2)
    bright: np.ndarray = np.abs(_cell(u)) < 0.5 * (v - np.floor(v)) - 0.04
    return bright


def _rain(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Dark upright dashes on bright, in columns shifted by half."""
    column = np.floor(2 * u)
    bright: np.ndarray = ~((np.abs(_cell(2 * u + 0.5)) < 0.27) & (np.abs(_cell(v / 1.4 + 0.5 * (column % 2))) < 0.3))
    return bright


def _pluses(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Bright pluses on dark, 1.25 periods apart."""
    u, v = np.abs(_cell(u / 1.25)), np.abs(_cell(v / 1.25))
    bright: np.ndarray = (np.minimum(u, v) < 0.12) & (np.maximum(u, v) < 0.4)
    return bright


PATTERNS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "solid": lambda u, v: np.ones(np.broadcast_shapes(u.shape, v.shape), bool),
    "stripes": lambda u, v: _cell(u + 0 * v) < 0,
    "grid": lambda u, v: (np.abs(_cell(u)) < 0.12) | (np.abs(_cell(v)) < 0.12),
    "hexgrid": _hexgrid,
    "dots": lambda u, v: np.hypot(_cell(u), _cell(v)) > 0.28,
    "noise": _noise,
    "triangles": _triangles,
    "zigzags": lambda u, v: _cell(v + np.abs(_cell(u / 1.5) * 1.5)) < 0,
    "rain": _rain,
    "pluses": _pluses,
}


ATTRIBUTES = ("shape", "colour", "texture")
VALUES = {"shape": SHAPES, "colour": COLOURS, "texture": TEXTURES}
WORDS = {
    "shape": SHAPES,
    "colour": COLOURS,
    "texture": (
        *("solid", "striped", "gridded", "hexgridded", "dotted", "noisy"),
        *("tessellated", "zigzagged", "rainy", "crossed"),
    ),
}  # as captions and class names say it; no shape is in a word for a texture
COMBINATIONS = np.stack(np.unravel_index(np.arange(1000), (10, 10, 10)), axis=1)  # [1000, 3] in the order of ATTRIBUTES

_OPENINGS = ("", "a picture of ", "this is ")
_RETRIEVAL_OPENING = "this is a picture of "
_TEMPLATES = {
    "shape": ("a {c}", "a picture of a {c}", "this is a {c}"),
    "colour": ("an object that is {c}", "a picture of an object that is {c}", "this is an object that is {c}"),
    "texture": ("a {c} object", "a picture of a {c} object", "this is a {c} object", "an object that is {c}"),
}  # articles fit every class name


class Correlation(NamedTuple):
    """`second` is the partner of `first` with this probability; `partner[value of first]` is a value of `second`."""

    first: str
    second: str
    probability: float
    partner: tuple[int, ...]


def choose_held_out(fraction: float, seed: int) -> np.ndarray:
    """Choose the combinations that are held out of training, bool [1000].

    At multiples of 0.1 every value, and every pair of values, loses the same part: the combinations are taken by the
    symbols of a random Latin square.
    """
    orders = [permutation(10, "trifeature held out", seed, attribute) for attribute in ATTRIBUTES]
    symbols = np.sum([order[column] for order, column in zip(orders, COMBINATIONS.T, strict=True)], axis=0) % 10
    ranks = np.lexsort((permutation(1000, "trifeature held out", seed), symbols))
    is_held_out = np.zeros(1000, bool)
    is_held_out[ranks[: round(1000 * fraction)]] = True
    return is_held_out


def parse_correlations(texts: Sequence[str], seed: int) -> list[Correlation]:
    """Parse correlations written as `shape:texture=0.7`; partners are a seeded random matching.

    Raises:
        UserError: for another form, unknown attributes, probabilities outside [0.1, 1], or pairs that form a cycle.
    """
    correlations = []
    for text in texts:
        first, _, rest = text.partition(":")
        second, _, number = rest.partition("=")
        try:
            probability = float(number)
        except ValueError:
            probability = math.nan
        if not {first, second} <= set(ATTRIBUTES) or first == second or not 0.1 <= probability <= 1:
            raise UserError(
                f"--correlate {text!r} is not of the form shape:texture=0.7, with two of {', '.join(ATTRIBUTES)} "
                f"and a probability from 0.1 (independent) to 1"
            )
        partner = tuple(permutation(10, "trifeature partners", seed, *sorted((first, second))).tolist())
        correlations.append(Correlation(first, second, probability, partner))
    pairs = {frozenset((one.first, one.second)) for one in correlations}
    if len(pairs) < len(correlations) or len(pairs) > 2:
        raise UserError(f"--correlate {' '.join(texts)}: at most two different pairs of attributes can be correlated")
    return correlations


def training_combinations(
    rows: int, is_held_out: np.ndarray, correlations: Sequence[Correlation], seed: int
) -> np.ndarray:
    """Return the combination of each training row, int64 [rows], shuffled: counts follow the weights up to one."""
    weights = training_weights(is_held_out, correlations)
    order = permutation(1000, "trifeature combinations", seed)
    ends = np.cumsum(weights[order])
    # the golden ratio keeps the places off the ends, where rounding would decide
    places = np.searchsorted(ends, (np.arange(rows) + 0.618) / rows * ends[-1], side="right")
    combinations: np.ndarray = order[places][permutation(rows, "trifeature rows", seed)]
    return combinations


def training_weights(is_held_out: np.ndarray, correlations: Sequence[Correlation]) -> np.ndarray:
    """Return the probability of each combination, float64 [1000].

    Every value of every attribute has 0.1. The partner of a value has the probability of the correlation, the other
    nine share the rest evenly. Leaving combinations out upsets this, so the rest is fitted to these margins in turn.

    Raises:
        UserError: if the combinations that are not held out cannot have these margins.
    """
    groups = [column.astype(np.int64) for column in COMBINATIONS.T]
    targets = [np.full(10, 0.1)] * 3
    for one in correlations:
        first, second = (groups[ATTRIBUTES.index(name)] for name in (one.first, one.second))
        is_partner = np.arange(10) == np.array(one.partner)[:, None]
        groups.append(10 * first + second)
        targets.append(np.where(is_partner, one.probability, (1 - one.probability) / 9).ravel() / 10)
    weights = np.where(is_held_out, 0.0, 1e-3)
    for _ in range(2000):
        worst = 0.0
        for group, target in zip(groups, targets, strict=True):
            now = np.bincount(group, weights, minlength=len(target))
            worst = max(worst, float(np.abs(now - target).max()))
            weights = weights * (target / np.where(now > 0, now, 1))[group]
        if worst < 1e-12:
            return weights
    raise UserError(
        "the combinations that are not held out cannot give every value the same weight with these correlations; lower "
        "--held-out-combinations or --correlate, or take another --seed"
    )


def caption_of(combination: Sequence[int], named: Sequence[str], opening: str, wording: int) -> str:
    """Build a caption that names the attributes in `named`, or 'an object' if none is named.

    `wording`, 0 to 3, sets the order of colour and texture, and whether they stand before or after the noun.
    """
    word = {name: WORDS[name][value] for name, value in zip(ATTRIBUTES, combination, strict=True)}
    adjectives = [word[name] for name in ("colour", "texture") if name in named]
    if wording % 2:
        adjectives.reverse()
    noun = word["shape"] if "shape" in named else "object"
    phrase = (
        f"{noun} that is {' and '.join(adjectives)}" if wording >= 2 and adjectives else " ".join([*adjectives, noun])
    )
    return opening + with_article(phrase)


def with_article(noun: str) -> str:
    """Put `a` or `an` before a noun."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def make_trifeature(
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    *,
    pairs_train: int = 12000,
    size_px: int = 64,
    image_format: Literal["jpg", "png"] = "jpg",
    name_colour: float = 1.0,
    name_shape: float = 0.5,
    name_texture: float = 0.5,
    correlate: tuple[str, ...] = (),
    held_out_combinations: float = 0.1,
    evaluate_on: Literal["all", "held-out"] = "all",
    images_per_class: int = 100,
    samples_per_shard: int = 1000,
    seed: int = 0,
) -> None:
    """Render Trifeature pairs: training shards, a retrieval set, and a classification set for each attribute.

    Args:
        out: Folder to make; must be empty or not exist.
        pairs_train: Number of training pairs.
        size_px: Width and height of the pictures in pixels, 32 to 512.
        image_format: jpg is quality 95 without colour subsampling.
        name_colour: Probability from 0 to 1 that a training caption names the colour.
        name_shape: The same for the shape.
        name_texture: The same for the texture.
        correlate: Attributes that go together in training, e.g. shape:texture=0.7: the texture is the partner of the
            shape with probability 0.7 (0.1 is independent). Evaluation sets stay uncorrelated.
        held_out_combinations: Part of the 1,000 combinations that training never sees (balanced at multiples of 0.1).
        evaluate_on: Render the evaluation sets from all combinations, or from the held-out ones only.
        images_per_class: Number of pictures of each of the 10 classes in each classification set.
        samples_per_shard: Number of samples in a tar file.
        seed: Another seed gives other pictures, captions, partners and held-out combinations.

    Raises:
        UserError: for values out of range, or a folder that is not empty.
    """
    options = {name: value for name, value in locals().items() if name != "out"}
    probabilities = {"colour": name_colour, "shape": name_shape, "texture": name_texture}
    _check_numbers(options, probabilities)
    is_held_out = choose_held_out(held_out_combinations, seed)
    correlations = parse_correlations(correlate, seed)
    train = training_combinations(pairs_train, is_held_out, correlations, seed)
    pool = COMBINATIONS[is_held_out] if evaluate_on == "held-out" else COMBINATIONS
    if any(len(np.unique(column)) < 10 for column in pool.T):
        raise UserError(
            f"--evaluate-on held-out: the {len(pool)} held-out combinations do not have every shape, colour and "
            f"texture; use --held-out-combinations 0.1 or more, or --evaluate-on all"
        )
    painter = _Painter(size_px, image_format, seed)
    with new_folder(out) as folder:
        pairs = painter.training_pairs(COMBINATIONS[train], probabilities)
        index = write_pairs(pairs, folder / "train", samples_per_shard=samples_per_shard, total=pairs_train)
        counts = {"train": len(index), **_write_evaluation(folder, painter, pool, images_per_class, samples_per_shard)}
        metadata = {
            "options": options,
            "counts": counts,
            "attributes": VALUES,
            "words": WORDS,
            "correlations": [_described(one, COMBINATIONS[train]) for one in correlations],
            "held_out_combinations": [list(_values(one).values()) for one in COMBINATIONS[is_held_out]],
        }
        write_json(folder / "metadata.json", metadata)
    print(f"{out}: " + ", ".join(f"{name} {number}" for name, number in counts.items()))


def _write_evaluation(
    folder: Path, painter: "_Painter", pool: np.ndarray, images_per_class: int, samples_per_shard: int
) -> dict[str, int]:
    """Write the retrieval and classification sets, and return the number of images of each."""
    pairs = painter.retrieval_pairs(pool)
    written = write_retrieval_set(pairs, folder / "retrieval", samples_per_shard=samples_per_shard, total=len(pool))
    counts = {"retrieval": written.images}
    for attribute in ATTRIBUTES:
        written = write_classification_set(
            painter.labelled(attribute, pool, images_per_class),
            folder / "classification" / attribute,
            classnames=WORDS[attribute],
            templates=_TEMPLATES[attribute],
            samples_per_shard=samples_per_shard,
            total=10 * images_per_class,
        )
        counts[f"classification/{attribute}"] = written.images
    return counts


class _Painter(NamedTuple):
    """Paint samples; each is a function of (seed, set, row)."""

    size_px: int
    image_format: str
    seed: int

    def training_pairs(self, combinations: np.ndarray, probabilities: Mapping[str, float]) -> Iterator[Pair]:
        for row, combination in enumerate(combinations.tolist()):
            words = random_words(5, "trifeature caption", self.seed, row).tolist()
            named = [name for name, word in zip(ATTRIBUTES, words, strict=False) if word / 2**64 < probabilities[name]]
            text = caption_of(combination, named, _OPENINGS[words[3] % len(_OPENINGS)], words[4] % 4)
            attributes = {**_values(combination), "caption": text}
            image = self._paint(combination, "train", row)
            yield Pair(key=f"{row:08d}", image=image, captions=[text], attributes=attributes)

    def retrieval_pairs(self, combinations: np.ndarray) -> Iterator[Pair]:
        for row, combination in enumerate(combinations.tolist()):
            wording = int(random_words(1, "trifeature retrieval", self.seed, row)[0] % 4)
            text = caption_of(combination, ATTRIBUTES, _RETRIEVAL_OPENING, wording)
            image = self._paint(combination, "retrieval", row)
            yield Pair(key="-".join(_values(combination).values()), image=image, captions=[text])

    def labelled(self, attribute: str, combinations: np.ndarray, images_per_class: int) -> Iterator[LabelledImage]:
        values = combinations[:, ATTRIBUTES.index(attribute)]
        order = permutation(len(combinations), "trifeature classification", self.seed, attribute)
        members = [order[values[order] == label] for label in range(10)]
        for number in range(10 * images_per_class):
            label, turn = number % 10, number // 10
            combination = combinations[members[label][turn % len(members[label])]].tolist()
            image = self._paint(combination, "classification", attribute, number)
            yield LabelledImage(key=f"{number:08d}", image=image, label=label)

    def _paint(self, combination: Sequence[int], *name: Name) -> bytes:
        shape, colour, texture = combination
        pixels = render(shape, colour, texture, size_px=self.size_px, name=(self.seed, *name))
        file = io.BytesIO()
        if self.image_format == "png":
            Image.fromarray(pixels).save(file, "PNG")
        else:
            Image.fromarray(pixels).save(file, "JPEG", quality=95, subsampling=0)
        return file.getvalue()


def _values(combination: Sequence[int]) -> dict[str, str]:
    return {name: VALUES[name][value] for name, value in zip(ATTRIBUTES, combination, strict=True)}


def _described(one: Correlation, combinations: np.ndarray) -> dict[str, Any]:
    names, partners = VALUES[one.first], VALUES[one.second]
    first, second = combinations[:, ATTRIBUTES.index(one.first)], combinations[:, ATTRIBUTES.index(one.second)]
    return {
        "of": one.first,
        "with": one.second,
        "probability": one.probability,
        "measured": round(float((np.array(one.partner)[first] == second).mean()), 4),
        "partners": {name: partners[value] for name, value in zip(names, one.partner, strict=True)},
    }


def _check_numbers(options: Mapping[str, Any], probabilities: Mapping[str, float]) -> None:
    for name, value in probabilities.items():
        if not 0 <= value <= 1:
            raise UserError(f"--name-{name} is {value:g}; a probability is from 0 to 1")
    if not SIZES_PX[0] <= options["size_px"] <= SIZES_PX[1]:
        raise UserError(f"--size-px is {options['size_px']}; textures and memory allow {SIZES_PX[0]} to {SIZES_PX[1]}")
    if not 0 <= options["held_out_combinations"] <= 0.9:
        raise UserError(f"--held-out-combinations is {options['held_out_combinations']:g}; it must be from 0 to 0.9")
    for name in ("pairs_train", "images_per_class"):
        if options[name] < 1:
            raise UserError(f"--{name.replace('_', '-')} is {options[name]}; it must be at least 1")


if __name__ == "__main__":
    run_program(lambda: tyro.cli(make_trifeature))
