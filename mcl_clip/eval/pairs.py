"""Fine-grained sets, where a model must distinguish a few images and texts that differ in one respect.

A set is a folder with two files; the images may be anywhere. `pairs.json` describes the set:

    {"format": 1, "name": "mmvp-vlm", "rule": "pair_t2i", "images": "/data/MMVP_VLM/MLLM_VLM Images",
     "source": "MMVP-VLM, Questions.csv", "average": "groups", "min_group_size": 1}

`images` is the folder of the images, absolute or relative to this folder. `average` (default: `items`) is what
`accuracy` is the mean of; groups of fewer than `min_group_size` (default: 1) items have no accuracy of their own and
are not in the mean over groups. `pairs.jsonl` holds one item per line:

    {"id": "1", "group": "Texts", "images": ["Texts/1.jpg", {"path": "Texts/2.jpg", "box": [4, 0, 90, 60]}],
     "texts": ["a photo of a 7", "a photo of a 9"], "match": [[0, 0], [1, 1]], "together": {"set": "digits"}}

A box is (left, top, width, height) in pixels. `match` pairs image indices with text indices. Items with the same id
under a kind in `together` (optional) also count as one, correct only if all of them are. Texts are embedded as they
are, so they include their prompt.

Rules, with the accuracy of independent random scores. Ties count as errors: a model with constant features scores 0.

`pair_t2i` (MMVP-VLM; 1/4): two images, two texts; both texts must be nearer to their own image.
`winoground` (1/6): as above, and both images must be nearer to their own text (Thrush et al. 2022, group score).
`text_choice` (SugarCrepe, ARO, What'sUp; 1/k): one image must be nearer to its own text than to the k - 1 others.

The official MMVP procedure gives a tie to the second image. It differs from `pair_t2i` only if the second text is
equally near to both images and the first text is correct: it counts the pair as correct, `pair_t2i` as wrong.
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int32
from torch import Tensor
from torch.nn import functional as F

from mcl_clip.core.errors import UserError, shorten
from mcl_clip.core.files import read_json, write_json
from mcl_clip.eval.embed import Box, FileImages, check_finite

FORMAT = 1
RULES = ("pair_t2i", "winoground", "text_choice")
AVERAGES = ("items", "groups")
CHUNK = 512
ImageRef = tuple[str, Box | None]  # path, box
_RESERVED_KINDS = ("micro", "macro")  # `micro_accuracy` and `macro_accuracy` are metrics of every set


@dataclass(frozen=True)
class PairItem:
    """An item as rows of images and texts: text i belongs to image i, further texts to none."""

    id: str
    group: str
    images: tuple[int, ...]
    texts: tuple[int, ...]
    together: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PairSet:
    """Items over images and texts, each stored once in the order of first use."""

    rule: str
    items: tuple[PairItem, ...]
    source: FileImages
    image_sizes: tuple[int, ...]  # bytes of the files
    texts: tuple[str, ...]
    average: str = "items"
    min_group_size: int = 1

    @classmethod
    def open(cls, root: Path) -> "PairSet":
        """Open the set in `root`; the module's docstring describes the files.

        Raises:
            UserError: if a file or image is missing, or a value is invalid.
        """
        settings = _read_settings(root / "pairs.json")
        image_rows: dict[ImageRef, int] = {}
        text_rows: dict[str, int] = {}
        items = tuple(
            _parse_item(line, where, settings["rule"], image_rows, text_rows)
            for line, where in json_lines(root / "pairs.jsonl")
        )
        repeated = [name for name, count in Counter(item.id for item in items).items() if count > 1]
        if repeated or not items:
            problem = f"has the id {repeated[0]!r} twice" if repeated else "has no items"
            raise UserError(f"{root / 'pairs.jsonl'} {problem}; write the set again")
        folder = root / settings["images"]
        paths = tuple(folder / path for path, _ in image_rows)
        sizes = {path: path.stat().st_size for path in dict.fromkeys(paths) if path.is_file()}
        if missing := [path for path in dict.fromkeys(paths) if path not in sizes]:
            raise UserError(
                f"{len(missing)} of {len(set(paths))} images are missing, the first is {missing[0]}; correct 'images' "
                f"in pairs.json (now {folder}), or restore them"
            )
        pair_set = cls(
            rule=settings["rule"],
            items=items,
            source=FileImages(paths, tuple(box for _, box in image_rows)),
            image_sizes=tuple(sizes[path] for path in paths),
            texts=tuple(text_rows),
            average=settings["average"],
            min_group_size=settings["min_group_size"],
        )
        if not pair_set.group_sizes:
            raise UserError(
                f"no group in {root} has {pair_set.min_group_size} items; lower min_group_size in pairs.json"
            )
        return pair_set

    @property
    def group_sizes(self) -> dict[str, int]:
        """Items of each group that has an accuracy of its own, in order of first appearance."""
        counts = Counter(item.group for item in self.items)
        return {group: count for group, count in counts.items() if count >= self.min_group_size}

    @property
    def sha256(self) -> str:
        """Digest of rule, items, boxes, texts and the sizes of the image files, wherever these are."""
        items = [[item.id, item.group, item.images, item.texts, dict(item.together)] for item in self.items]
        content = [self.rule, self.average, self.min_group_size, items, self.source.boxes, self.image_sizes, self.texts]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_pair_set(
    folder: Path,
    items: Sequence[Mapping[str, Any]],
    *,
    name: str,
    rule: str,
    images: str,
    source: str,
    average: str = "items",
    min_group_size: int = 1,
) -> None:
    """Write pairs.json and pairs.jsonl; the module's docstring describes the settings and the items."""
    settings = {
        "format": FORMAT,
        "name": name,
        "rule": rule,
        "images": images,
        "source": source,
        "average": average,
        "min_group_size": min_group_size,
    }
    write_json(folder / "pairs.json", settings)
    with (folder / "pairs.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(item, ensure_ascii=False) + "\n" for item in items)


def _read_settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path} is missing; a pair set has pairs.json and pairs.jsonl, as data_prep/pairs.py writes")
    content = read_json(path)
    settings = {"average": "items", "min_group_size": 1, **(content if isinstance(content, dict) else {})}
    if settings.get("format") != FORMAT:
        raise UserError(f"{path} has the format {settings.get('format')!r}; this version reads format {FORMAT}")
    for name, values in (("rule", RULES), ("average", AVERAGES)):
        if settings.get(name) not in values:
            raise UserError(f"{path} has the {name} {settings.get(name)!r}; it must be one of {', '.join(values)}")
    for name in ("name", "images"):
        if not isinstance(settings.get(name), str):
            raise UserError(f"{path} has {settings.get(name)!r} for {name!r}; it must be a string")
    if not _is_int(settings["min_group_size"], 1):
        raise UserError(
            f"{path} has the min_group_size {settings['min_group_size']!r}; it must be an integer, 1 or more"
        )
    return settings


def json_lines(path: Path) -> Iterator[tuple[Any, str]]:
    """Yield the values of a JSON-lines file, each with its location for error messages.

    Raises:
        UserError: if there is no such file, or a line is not JSON.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing; it has one item per line")
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if line.strip():
            try:
                yield json.loads(line), f"{path}, line {number}"
            except ValueError as error:
                raise UserError(f"{path}, line {number} is not JSON ({error}); restore the file") from error


def _parse_item(
    line: Any, where: str, rule: str, image_rows: dict[ImageRef, int], text_rows: dict[str, int]
) -> PairItem:
    """Parse an item; new images and texts are added to `image_rows` and `text_rows`."""
    if not isinstance(line, dict) or not {"id", "group", "images", "texts", "match"} <= line.keys():
        raise UserError(f"{where}: an item is an object with id, group, images, texts and match")
    for name in ("id", "group"):
        if not isinstance(line[name], str) or not line[name]:
            raise UserError(f"{where}: {name} is {shorten(repr(line[name]))}; it must be a string that is not empty")
    for name in ("images", "texts"):
        if not isinstance(line[name], list) or not line[name]:
            raise UserError(f"{where}: {name} is {shorten(repr(line[name]))}; it must be a list that is not empty")
    if wrong := [text for text in line["texts"] if not isinstance(text, str) or not text.strip()]:
        raise UserError(f"{where}: the text {shorten(repr(wrong[0]))} is empty or not a string")
    images = [_parse_image(value, where) for value in line["images"]]
    order = _order_texts(line["match"], rule, len(images), len(line["texts"]), where)
    return PairItem(
        id=line["id"],
        group=line["group"],
        images=tuple(image_rows.setdefault(image, len(image_rows)) for image in images),
        texts=tuple(text_rows.setdefault(line["texts"][number], len(text_rows)) for number in order),
        together=_parse_together(line.get("together", {}), where),
    )


def _parse_image(value: Any, where: str) -> ImageRef:
    path, box = (value.get("path"), value.get("box")) if isinstance(value, dict) else (value, None)
    if not isinstance(path, str) or not path:
        raise UserError(f"{where}: the image {shorten(repr(value))} is neither a path nor an object with path and box")
    if box is None:
        return path, None
    if not isinstance(box, list) or len(box) != 4 or not all(_is_int(number) for number in box):
        raise UserError(f"{where}: the box {shorten(repr(box))} is not [left, top, width, height] in whole pixels")
    return path, (box[0], box[1], box[2], box[3])


def _order_texts(match: Any, rule: str, num_images: int, num_texts: int, where: str) -> list[int]:
    """Return text indices: those of the images in their order, then the others."""
    if rule == "text_choice" and (num_images != 1 or num_texts < 2):
        raise UserError(
            f"{where}: {num_images} images and {num_texts} texts; {rule} takes one image, two texts or more"
        )
    if rule != "text_choice" and (num_images, num_texts) != (2, 2):
        raise UserError(f"{where}: {num_images} images and {num_texts} texts; {rule} takes two of each")
    pairs = match if isinstance(match, list) else [match]
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or not all(_is_int(number, 0) for number in pair):
            raise UserError(
                f"{where}: match has {shorten(repr(pair))}; it must hold pairs [image, text] of indices from 0"
            )
        if pair[0] >= num_images or pair[1] >= num_texts:
            raise UserError(
                f"{where}: match has {shorten(repr(pair))}, beyond {num_images} images and {num_texts} texts"
            )
    text_of = dict(pairs)
    if sorted(image for image, _ in pairs) != list(range(num_images)) or len(set(text_of.values())) != num_images:
        raise UserError(f"{where}: match is {shorten(repr(match))}; it must give each image one text of its own")
    own = [text_of[image] for image in range(num_images)]
    return own + [number for number in range(num_texts) if number not in own]


def _parse_together(value: Any, where: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(name, str) and name for name in value.values()):
        raise UserError(f"{where}: together is {shorten(repr(value))}; it must be an object of strings")
    if reserved := [kind for kind in value if kind in _RESERVED_KINDS]:
        raise UserError(f"{where}: together has the kind {reserved[0]!r}, which is reserved; choose another name")
    return value


def _is_int(value: Any, low: int | None = None) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and (low is None or value >= low)


@dataclass(frozen=True)
class PairTask:
    """Accuracy on one pair set; see `Task`."""

    name: str
    data: PairSet
    main_metric = "accuracy"

    def score(
        self, image_features: Float[Tensor, "images dim"], text_features: Float[Tensor, "texts dim"]
    ) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Compute accuracies, and for each of them the per-item outcomes that it is the mean of.

        `micro_accuracy` is the mean over items, `macro_accuracy` over groups, and `accuracy` the one that the set
        asks for. There is `accuracy/GROUP` for each group, and `KIND_accuracy` over the ids of each kind in `together`.
        Sets of two images have `image_score` (each text retrieves its image), `text_score` (each image its text) and
        `group_score` (both), over items; the rule decides which of them makes an item correct.

        `unit:METRIC` is among the outcomes if items share an image or an id in `together`, directly or through others.

        Raises:
            UserError: if features are not finite, or their number is not that of the set's images and texts.
        """
        data, items = self.data, self.data.items
        for side, features, expected in (("image", image_features, data.source), ("text", text_features, data.texts)):
            if len(features) != len(expected):
                raise UserError(f"{len(features)} {side} features for a set with {len(expected)}; embed it again")
        check_finite(image_features, text_features)
        correct, outcomes = _apply_rule(_item_scores(image_features, text_features, items), data)
        groups = np.array([item.group for item in items])
        members_of = {group: groups == group for group in data.group_sizes}
        # Weights with which the mean over items is the mean over groups.
        weights = np.zeros(len(items))
        for members in members_of.values():
            weights[members] = len(items) / (len(members_of) * members.sum())
        outcomes["micro_accuracy"] = correct
        outcomes["macro_accuracy"] = correct * weights
        outcomes["accuracy"] = outcomes["micro_accuracy" if data.average == "items" else "macro_accuracy"]
        unit = _dependent_units(data)
        units = dict.fromkeys(outcomes, unit)
        for group, members in members_of.items():
            outcomes[f"accuracy/{group}"], units[f"accuracy/{group}"] = correct[members], unit[members]
        for kind in sorted({kind for item in items for kind in item.together}):
            rows_of: defaultdict[str, list[int]] = defaultdict(list)
            for row, item in enumerate(items):
                if kind in item.together:
                    rows_of[item.together[kind]].append(row)
            outcomes[f"{kind}_accuracy"] = np.array([correct[rows].all() for rows in rows_of.values()])
            units[f"{kind}_accuracy"] = np.array([unit[rows[0]] for rows in rows_of.values()], np.int32)
        metrics = {name: float(values.mean(dtype=np.float64)) for name, values in outcomes.items()}
        stored = {
            name: values if values.dtype == bool else values.astype(np.float32) for name, values in outcomes.items()
        }
        return metrics, stored | {f"unit:{name}": of for name, of in units.items() if len(np.unique(of)) < len(of)}

    def describe(self) -> dict[str, Any]:
        """Describe the set for the record; `groups` counts the items of each group."""
        return {
            "key": f"pairs/{self.name}",
            "task": "image_text_pairs",
            "rule": self.data.rule,
            "n_images": len(self.data.source),
            "n_texts": len(self.data.texts),
            "n_pairs": len(self.data.items),
            "groups": self.data.group_sizes,
        }


def _item_scores(
    images: Float[Tensor, "images dim"], texts: Float[Tensor, "texts dim"], items: Sequence[PairItem]
) -> Float32[np.ndarray, "scores"]:
    """Compute the cosines of every image of an item with every text of it, image by image, item by item.

    They are summed in float64 and rounded to float32, so that equal features get equal scores.
    """
    image_rows = torch.tensor([image for item in items for image in item.images for _ in item.texts])
    text_rows = torch.tensor([text for item in items for _ in item.images for text in item.texts])
    scores = torch.empty(len(image_rows))
    for start in range(0, len(scores), CHUNK):
        part = slice(start, start + CHUNK)
        image, text = F.normalize(images[image_rows[part]].double()), F.normalize(texts[text_rows[part]].double())
        scores[part] = (image * text).sum(dim=1)
    return np.asarray(scores)


def _apply_rule(
    scores: Float32[np.ndarray, "scores"], data: PairSet
) -> tuple[Bool[np.ndarray, "items"], dict[str, np.ndarray]]:
    """Return which items are correct, and by name the outcomes that only some rules have."""
    if data.rule == "text_choice":
        starts = np.cumsum([0, *(len(item.texts) for item in data.items[:-1])])
        others = scores.copy()
        others[starts] = -np.inf
        correct: np.ndarray = scores[starts] > np.maximum.reduceat(others, starts)
        return correct, {}
    by_item = scores.reshape(-1, 2, 2)  # item, image, text
    own, other_image, other_text = by_item[:, [0, 1], [0, 1]], by_item[:, [1, 0], [0, 1]], by_item[:, [0, 1], [1, 0]]
    by_text, by_image = (np.logical_and(*(own > other).T) for other in (other_image, other_text))
    outcomes = {"image_score": by_text, "text_score": by_image, "group_score": np.logical_and(by_text, by_image)}
    return outcomes["image_score" if data.rule == "pair_t2i" else "group_score"], outcomes


def _dependent_units(data: PairSet) -> Int32[np.ndarray, "items"]:
    """Label each item with its connected component: items that share an image file or an id in `together`."""
    first: dict[Hashable, int] = {}
    parent = list(range(len(data.items)))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = row = parent[parent[row]]
        return row

    for row, item in enumerate(data.items):
        for shared in (*(data.source.paths[image] for image in item.images), *item.together.items()):
            one, other = root(row), root(first.setdefault(shared, row))
            parent[max(one, other)] = min(one, other)
    roots = np.array([root(row) for row in range(len(parent))])
    return np.asarray(np.unique(roots, return_inverse=True)[1], np.int32)
