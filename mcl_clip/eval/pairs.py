"""Fine-grained sets, where a few images and texts that differ in one respect must be told apart.

A set is a folder with two files; the pictures may lie anywhere. `pairs.json` says what it is:

    {"format": 1, "name": "mmvp-vlm", "rule": "pair_t2i", "images": "/data/MMVP_VLM/MLLM_VLM Images",
     "source": "MMVP-VLM, Questions.csv", "average": "groups", "min_group_size": 1}

`images` is the folder that pictures are named from, absolute or seen from this folder. `average` (`items` if not given)
says what `accuracy` is the mean of; groups of fewer than `min_group_size` (1) items have no accuracy of their own and
stay out of the mean over groups. `pairs.jsonl` holds an item a line:

    {"id": "1", "group": "Texts", "images": ["Texts/1.jpg", {"path": "Texts/2.jpg", "box": [4, 0, 90, 60]}],
     "texts": ["a photo of a 7", "a photo of a 9"], "match": [[0, 0], [1, 1]], "together": {"set": "digits"}}

A box is (left, top, width, height) in pixels. `match` pairs numbers of images with numbers of texts. Items with the
same id under a kind in `together` (optional) also count as one, right only where all of them are. Texts are embedded as
they stand, so they hold their prompt.

Rules, with what independent random scores would reach. Ties count against the model: one that says nothing scores 0.

`pair_t2i` (MMVP-VLM; 1/4): two images, two texts; both texts must be nearer to their own image.
`winoground` (1/6): as above, and both images must be nearer to their own text (Thrush et al. 2022, group score).
`text_choice` (SugarCrepe, ARO, What'sUp; 1/k): one image must be nearer to its own text than to the k - 1 others.

The official MMVP procedure gives a tie to the second image. It differs from `pair_t2i` only where the second text is
exactly as near to both images and the first text chooses rightly: right there, wrong here.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int32
from torch import Tensor
from torch.nn import functional as F

from mcl_clip.core.errors import UserError
from mcl_clip.core.files import read_json
from mcl_clip.eval.embed import Box, FileImages, embed_images, embed_texts

FORMAT = 1
RULES = ("pair_t2i", "winoground", "text_choice")
AVERAGES = ("items", "groups")
CHUNK = 512
_HEADLINES = {"pair_t2i": "image_score", "winoground": "group_score"}
_RESERVED_KINDS = ("micro", "macro")


@dataclass(frozen=True)
class PairItem:
    """Row numbers of images and texts: text i belongs to image i, further texts to none."""

    id: str
    group: str
    images: tuple[int, ...]
    texts: tuple[int, ...]
    together: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PairSet:
    """Items over pictures and texts that each appear once, in the order in which the items first name them."""

    name: str
    rule: str
    items: tuple[PairItem, ...]
    images: FileImages
    image_sizes: tuple[int, ...]  # bytes of the files
    texts: tuple[str, ...]
    average: str = "items"
    min_group_size: int = 1

    @classmethod
    def open(cls, root: Path) -> "PairSet":
        """The set in `root`, see the module's docstring.

        Raises:
            UserError: if a file or picture is missing, or something in them is not as described there.
        """
        settings = _read_settings(root / "pairs.json")
        pictures: dict[_Picture, int] = {}
        texts: dict[str, int] = {}
        items = tuple(
            _parse_item(line, where, settings["rule"], pictures, texts)
            for line, where in json_lines(root / "pairs.jsonl")
        )
        repeated = [name for name, count in Counter(item.id for item in items).items() if count > 1]
        if repeated or not items:
            problem = f"has the id {repeated[0]!r} twice" if repeated else "has no items"
            raise UserError(f"{root / 'pairs.jsonl'} {problem}; write the set again")
        folder = root / settings["images"]
        paths = tuple(folder / picture.path for picture in pictures)
        found = cls(
            name=settings["name"],
            rule=settings["rule"],
            items=items,
            images=FileImages(paths, tuple(picture.box for picture in pictures)),
            image_sizes=_sizes(paths, folder),
            texts=tuple(texts),
            average=settings["average"],
            min_group_size=settings["min_group_size"],
        )
        if not found.group_sizes:
            raise UserError(f"no group in {root} has {found.min_group_size} items; lower min_group_size in pairs.json")
        return found

    @property
    def group_sizes(self) -> dict[str, int]:
        """Items of each group that has an accuracy of its own, in order of first appearance."""
        counts = Counter(item.group for item in self.items)
        return {group: count for group, count in counts.items() if count >= self.min_group_size}

    @property
    def sha256(self) -> str:
        """Digest of rule, items, boxes, texts and the sizes of the pictures' files, wherever these lie."""
        items = [[item.id, item.group, item.images, item.texts, dict(item.together)] for item in self.items]
        content = [self.rule, self.average, self.min_group_size, items, self.images.boxes, self.image_sizes, self.texts]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class _Picture(NamedTuple):
    path: str
    box: Box | None


def _read_settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path} is missing; a pair set has pairs.json and pairs.jsonl, as data_prep/pairs.py writes")
    found = read_json(path)
    found = {"average": "items", "min_group_size": 1, **(found if isinstance(found, dict) else {})}
    if found.get("format") != FORMAT:
        raise UserError(f"{path} has the format {found.get('format')!r}; this version reads format {FORMAT}")
    for name, values in (("rule", RULES), ("average", AVERAGES)):
        if found.get(name) not in values:
            raise UserError(f"{path} has the {name} {found.get(name)!r}; it must be one of {', '.join(values)}")
    for name in ("name", "images"):
        if not isinstance(found.get(name), str):
            raise UserError(f"{path} has {found.get(name)!r} for {name!r}; it must be a text")
    if not _is_count(found["min_group_size"], 1):
        raise UserError(f"{path} has the min_group_size {found['min_group_size']!r}; it must be a number from 1 on")
    return found


def json_lines(path: Path) -> Iterable[tuple[Any, str]]:
    """The values of a JSON-lines file, each with its place in words.

    Raises:
        UserError: if there is no such file, or a line is not JSON.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing; it has an item a line")
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if line.strip():
            try:
                yield json.loads(line), f"{path}, line {number}"
            except ValueError as error:
                raise UserError(f"{path}, line {number} is not JSON ({error}); restore the file") from error


def _parse_item(line: Any, where: str, rule: str, pictures: dict[_Picture, int], texts: dict[str, int]) -> PairItem:
    """An item; its pictures and texts get the next free rows where they are new."""
    if not isinstance(line, dict) or not {"id", "group", "images", "texts", "match"} <= line.keys():
        raise UserError(f"{where}: an item is an object with id, group, images, texts and match")
    for name in ("id", "group"):
        if not isinstance(line[name], str) or not line[name]:
            raise UserError(f"{where}: {name} is {line[name]!r}; it must be a text")
    for name in ("images", "texts"):
        if not isinstance(line[name], list) or not line[name]:
            raise UserError(f"{where}: {name} is {line[name]!r}; it must be a list")
    if wrong := [text for text in line["texts"] if not isinstance(text, str) or not text.strip()]:
        raise UserError(f"{where}: {wrong[0]!r} is no text")
    named = [_picture(value, where) for value in line["images"]]
    order = _order_of_texts(line["match"], rule, len(named), len(line["texts"]), where)
    return PairItem(
        id=line["id"],
        group=line["group"],
        images=tuple(pictures.setdefault(picture, len(pictures)) for picture in named),
        texts=tuple(texts.setdefault(line["texts"][number], len(texts)) for number in order),
        together=_together(line.get("together", {}), where),
    )


def _picture(value: Any, where: str) -> _Picture:
    path, box = (value.get("path"), value.get("box")) if isinstance(value, dict) else (value, None)
    if not isinstance(path, str) or not path:
        raise UserError(f"{where}: the image {value!r} is neither a path nor an object with path and box")
    if box is None:
        return _Picture(path, None)
    if not isinstance(box, list) or len(box) != 4 or not all(_is_count(number) for number in box):
        raise UserError(f"{where}: the box {box!r} is not [left, top, width, height] in whole pixels")
    return _Picture(path, (box[0], box[1], box[2], box[3]))


def _order_of_texts(match: Any, rule: str, num_images: int, num_texts: int, where: str) -> list[int]:
    """Numbers of the texts: those of the images in their order, then the others."""
    if rule == "text_choice" and (num_images != 1 or num_texts < 2):
        raise UserError(
            f"{where}: {num_images} images and {num_texts} texts; {rule} takes one image, two texts or more"
        )
    if rule != "text_choice" and (num_images, num_texts) != (2, 2):
        raise UserError(f"{where}: {num_images} images and {num_texts} texts; {rule} takes two of each")
    pairs = match if isinstance(match, list) else [match]
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or not all(_is_count(number, 0) for number in pair):
            raise UserError(f"{where}: match has {pair!r}; it must hold pairs [image, text] of numbers from 0 on")
        if pair[0] >= num_images or pair[1] >= num_texts:
            raise UserError(f"{where}: match has {pair!r}, beyond {num_images} images and {num_texts} texts")
    text_of = dict(pairs)
    if sorted(image for image, _ in pairs) != list(range(num_images)) or len(set(text_of.values())) != num_images:
        raise UserError(f"{where}: match is {match!r}; it must give each image one text of its own")
    own = [text_of[image] for image in range(num_images)]
    return own + [number for number in range(num_texts) if number not in own]


def _together(value: Any, where: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(name, str) and name for name in value.values()):
        raise UserError(f"{where}: together is {value!r}; it must be an object with texts")
    if taken := [kind for kind in value if kind in _RESERVED_KINDS]:
        raise UserError(f"{where}: together has the kind {taken[0]!r}, which means something else; choose another word")
    return value


def _is_count(value: Any, low: int | None = None) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and (low is None or value >= low)


def _sizes(paths: Sequence[Path], folder: Path) -> tuple[int, ...]:
    """Bytes of the files."""
    sizes = {path: path.stat().st_size for path in dict.fromkeys(paths) if path.is_file()}
    if missing := [path for path in dict.fromkeys(paths) if path not in sizes]:
        raise UserError(
            f"{len(missing)} of {len(set(paths))} pictures are missing, the first is {missing[0]}; correct 'images' "
            f"in pairs.json (now {folder}), or restore them"
        )
    return tuple(sizes[path] for path in paths)


@dataclass(frozen=True)
class PairTask:
    """A pair set as a task of the suite."""

    name: str
    data: PairSet
    main_metric = "accuracy"

    @property
    def sha256(self) -> str:
        """Digest of what is measured on."""
        return self.data.sha256

    def embed(
        self, model: Any, *, image_transform: Any, tokenizer: Any, num_workers: int, **options: Any
    ) -> dict[str, Tensor]:
        """Raw features: `image` of every picture (cut to its box), `text` of every text, each once."""
        images = embed_images(
            model, self.data.images, image_transform=image_transform, num_workers=num_workers, **options
        )
        return {"image": images, "text": embed_texts(model, self.data.texts, tokenizer=tokenizer, **options)}

    def score(
        self, image_features: Float[Tensor, "images dim"], text_features: Float[Tensor, "texts dim"]
    ) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Shares of the items that are right, and for each of them the outcomes that it is the mean of.

        `micro_accuracy` is the mean over items, `macro_accuracy` over groups, and `accuracy` the one that the set
        asks for; `accuracy/GROUP` for each group; `KIND_accuracy` over the ids of each kind in `together`. Sets of two
        images have `image_score` (each text finds its image), `text_score` (each image its text) and `group_score`
        (both), over items; the rule says which of them makes an item right.

        `unit:METRIC` stands beside where items share a picture or an id in `together`, directly or through others.

        Raises:
            UserError: if features are not finite, or not as many as the set has pictures and texts.
        """
        _check_features(image_features, text_features, self.data)
        scores = _item_scores(image_features, text_features, self.data.items)
        right, outcomes = _outcomes_by_rule(scores, self.data)
        groups = np.array([item.group for item in self.data.items])
        is_in = {group: groups == group for group in self.data.group_sizes}
        outcomes["micro_accuracy"] = right
        outcomes["macro_accuracy"] = _contributions_to_mean_of_groups(right, is_in)
        outcomes["accuracy"] = outcomes[{"items": "micro", "groups": "macro"}[self.data.average] + "_accuracy"]
        unit = _units(self.data)
        units = dict.fromkeys(outcomes, unit)
        for group, members in is_in.items():
            outcomes[f"accuracy/{group}"], units[f"accuracy/{group}"] = right[members], unit[members]
        for kind in sorted({kind for item in self.data.items for kind in item.together}):
            found = _items_by_id(self.data.items, kind)
            outcomes[f"{kind}_accuracy"] = np.array([right[numbers].all() for numbers in found])
            units[f"{kind}_accuracy"] = np.array([unit[numbers[0]] for numbers in found], np.int32)
        metrics = {name: float(values.mean(dtype=np.float64)) for name, values in outcomes.items()}
        stored = {
            name: values if values.dtype == bool else values.astype(np.float32) for name, values in outcomes.items()
        }
        return metrics, stored | {f"unit:{name}": of for name, of in units.items() if len(np.unique(of)) < len(of)}

    def describe(self) -> dict[str, Any]:
        """What a record says of the task; `groups` counts the items of each group."""
        return {
            "key": f"pairs/{self.name}",
            "task": "image_text_pairs",
            "rule": self.data.rule,
            "n_images": len(self.data.images),
            "n_texts": len(self.data.texts),
            "n_pairs": len(self.data.items),
            "groups": self.data.group_sizes,
        }


def _check_features(images: Tensor, texts: Tensor, data: PairSet) -> None:
    for what, features, count in (("image", images, len(data.images)), ("text", texts, len(data.texts))):
        if len(features) != count:
            raise UserError(f"{len(features)} {what} features for a set with {count} of them; embed it again")
        if broken := int((~torch.isfinite(features).all(dim=1)).sum()):
            raise UserError(f"{broken} of {count} {what} features are not finite; the model has diverged")


def _item_scores(
    images: Float[Tensor, "images dim"], texts: Float[Tensor, "texts dim"], items: Sequence[PairItem]
) -> Float32[np.ndarray, "scores"]:
    """Cosines of every image of an item with every text of it, image by image, item after item.

    In float32, summed in float64: equal features get equal scores.
    """
    image_rows = torch.tensor([image for item in items for image in item.images for _ in item.texts])
    text_rows = torch.tensor([text for item in items for _ in item.images for text in item.texts])
    scores = torch.empty(len(image_rows))
    for start in range(0, len(scores), CHUNK):
        part = slice(start, start + CHUNK)
        one, other = F.normalize(images[image_rows[part]].double()), F.normalize(texts[text_rows[part]].double())
        scores[part] = (one * other).sum(dim=1)
    found: np.ndarray = scores.numpy()
    return found


def _outcomes_by_rule(
    scores: Float32[np.ndarray, "scores"], data: PairSet
) -> tuple[Bool[np.ndarray, "items"], dict[str, np.ndarray]]:
    """Which items are right, and by name the outcomes that only some rules have."""
    if data.rule == "text_choice":
        starts = np.cumsum([0, *(len(item.texts) for item in data.items[:-1])])
        others = scores.copy()
        others[starts] = -np.inf
        right: np.ndarray = scores[starts] > np.maximum.reduceat(others, starts)
        return right, {}
    of_item = scores.reshape(-1, 2, 2)  # item, image, text
    own, other_image, other_text = of_item[:, [0, 1], [0, 1]], of_item[:, [1, 0], [0, 1]], of_item[:, [0, 1], [1, 0]]
    by_text, by_image = (np.logical_and(*(own > other).T) for other in (other_image, other_text))
    outcomes = {"image_score": by_text, "text_score": by_image, "group_score": np.logical_and(by_text, by_image)}
    return outcomes[_HEADLINES[data.rule]], outcomes


def _contributions_to_mean_of_groups(
    right: Bool[np.ndarray, "items"], is_in: Mapping[str, Bool[np.ndarray, "items"]]
) -> Float[np.ndarray, "items"]:
    """Numbers whose mean over all items is the mean of the groups' accuracies."""
    weights = np.zeros(len(right))
    for members in is_in.values():
        weights[members] = len(right) / (len(is_in) * members.sum())
    return right * weights


def _items_by_id(items: Sequence[PairItem], kind: str) -> list[list[int]]:
    """Numbers of the items that share an id of this kind, id after id."""
    found: dict[str, list[int]] = {}
    for number, item in enumerate(items):
        if kind in item.together:
            found.setdefault(item.together[kind], []).append(number)
    return list(found.values())


def _units(data: PairSet) -> Int32[np.ndarray, "items"]:
    """A number for each item, equal for those that share a picture's file or an id, directly or through others."""
    first: dict[Hashable, int] = {}
    parent = list(range(len(data.items)))

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = number = parent[parent[number]]
        return number

    for number, item in enumerate(data.items):
        for shared in (*(data.images.paths[row] for row in item.images), *item.together.items()):
            one, other = root(number), root(first.setdefault(shared, number))
            parent[max(one, other)] = min(one, other)
    roots = np.array([root(number) for number in range(len(parent))])
    numbers: np.ndarray = np.unique(roots, return_inverse=True)[1].astype(np.int32)
    return numbers
