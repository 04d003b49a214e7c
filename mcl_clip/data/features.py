"""The feature store: one safetensors file a shard, its readers, and the file layout that both stores share.

`EmbeddingTable` reads the image and text features of all rows under the model of a stage. `TextFeatures` and
`ImageOutputs` read what locked encoders, or their locked lower parts, compute of single captions and images.
"""

import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float16, Float32, Int64, Shaped
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch import Tensor

from mcl_clip.core.errors import UserError
from mcl_clip.core.files import atomic_path
from mcl_clip.data.index import ShardIndex

SIDES = ("image", "text")
MAX_MAPPED_PARTS = 256  # of `TextFeatures`, in a process
_COLUMNS = {  # of an embedding part: data type and number of dimensions
    **dict.fromkeys(("image", "text"), ("<f2", 2)),
    **dict.fromkeys(("image_norm", "text_norm"), ("<f4", 1)),
    **dict.fromkeys(("image_id", "text_id"), ("<i8", 1)),
    "ok": ("|b1", 1),
}


def part_name(shard: int) -> str:
    """Return the file name of the embeddings of a shard."""
    return f"part-{shard:06d}.safetensors"


def text_part_name(shard: int) -> str:
    """Return the file name of the caption features of a shard."""
    return f"texts-{shard:06d}.safetensors"


def image_part_name(shard: int) -> str:
    """Return the file name of what the frozen part of an image tower makes of the images of a shard."""
    return f"images-{shard:06d}.safetensors"


def first_rows(index: ShardIndex) -> Int64[np.ndarray, "shards_and_end"]:
    """Return the first row of each shard, and the number of rows."""
    return np.array([shard.first_row for shard in index.shards] + [len(index)])


def write_part(path: Path, columns: Mapping[str, np.ndarray], counts: Mapping[str, Any]) -> None:
    """Write the columns of a part or a piece atomically, with what was counted in it as metadata."""
    # All counts under one key: safetensors does not keep the order of several, and files would differ between runs.
    metadata = {"counts": json.dumps(counts)} if counts else None
    with atomic_path(path) as temporary:
        save_file(dict(columns), temporary, metadata=metadata)


def read_piece(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read what `write_part` wrote of a large shard; raise UserError if the file is damaged."""
    try:
        with safe_open(path, framework="numpy") as file:
            counts = json.loads((file.metadata() or {}).get("counts", "{}"))
        return load_file(path), counts
    except Exception as error:  # damaged files raise errors of several types
        raise UserError(f"{path} is damaged ({error}); delete it and run the recipe again") from error


def read_counts(path: Path) -> dict[str, Any]:
    """Read `bad_samples` and `full_captions` of an embedding part; raise UserError without them.

    `bad_samples` are the rows that could not be decoded, as [row, key, reason]. `full_captions` counts the captions
    that fill the context of the text encoder, for tokenizers that pad with 0; longer ones were truncated.
    """
    with safe_open(path, framework="numpy") as part:
        text = (part.metadata() or {}).get("counts", "")
    try:
        counts: dict[str, Any] = json.loads(text)
        types = [tuple(type(value) for value in bad) for bad in counts["bad_samples"]]
        if type(counts["full_captions"]) is not int or any(of_one != (int, str, str) for of_one in types):
            raise ValueError("bad_samples")
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(f"{path} has no counts of bad samples; delete it and run the recipe again") from error
    return counts


@dataclass(frozen=True, kw_only=True)
class EmbeddingPart:
    """Features of the rows of a shard: unit vectors in float16, and in float32 their norms before normalization.

    The text feature of a row is the normalized mean of the unit features of its captions; its norm is the mean of their
    norms. Bad rows are zeros and not `ok`. `image_id` and `text_id` are hashes of the bytes of the tar members. Of a
    model without a text tower, text features have width 0.
    """

    image: Float16[np.ndarray, "rows dim"]
    text: Float16[np.ndarray, "rows _text_dim"]
    image_norm: Float32[np.ndarray, "rows"]
    text_norm: Float32[np.ndarray, "rows"]
    image_id: Int64[np.ndarray, "rows"]
    text_id: Int64[np.ndarray, "rows"]
    ok: Bool[np.ndarray, "rows"]


def read_part(path: Path, rows: int) -> EmbeddingPart:
    """Read the embeddings of a shard; raise UserError if the file is missing, damaged, or of other `rows`."""
    if not path.exists():
        raise UserError(f"{path} is missing; run the recipe again to embed this shard")
    try:
        columns = load_file(path)
        layout = {name: (columns[name].dtype.str, columns[name].ndim) for name in _COLUMNS}
        sizes = {len(columns[name]) for name in _COLUMNS}
        widths = {columns["image"].shape[1:], (0,)}  # of texts; 0 for a model without a text tower
        if layout != _COLUMNS or len(sizes) > 1 or columns["text"].shape[1:] not in widths:
            raise ValueError(f"its columns are {layout}")
        if not all(np.isfinite(columns[name]).all() for name in ("image", "text", "image_norm", "text_norm")):
            raise ValueError("a feature is not a finite number")
    except Exception as error:  # damaged files raise errors of several types
        raise UserError(f"{path} is not a whole part ({error}); delete it and run the recipe again") from error
    part = EmbeddingPart(**{name: columns[name] for name in _COLUMNS})
    if len(part.ok) != rows:
        raise UserError(f"{path} has {len(part.ok)} rows and the index {rows}; delete it and run the recipe again")
    return part


class EmbeddingTable:
    """The embeddings of all rows under the model of a stage, read shard by shard; the last shard read is cached."""

    def __init__(self, folder: Path, index: ShardIndex) -> None:
        self.folder = folder
        self.first = first_rows(index)
        self._cache: tuple[int, EmbeddingPart] | None = None

    def __len__(self) -> int:
        return int(self.first[-1])

    def part(self, shard: int) -> EmbeddingPart:
        """Return the embeddings of a shard; raise as `read_part`."""
        if self._cache is None or self._cache[0] != shard:
            self._cache = (shard, read_part(self.folder / part_name(shard), int(np.diff(self.first)[shard])))
        return self._cache[1]

    def rows(self, start: int, stop: int, column: str) -> Shaped[np.ndarray, "rows *dim"]:
        """Return a column of `EmbeddingPart`, such as the unit features `image`, of rows `start` to `stop - 1`."""
        first_shard = int(np.searchsorted(self.first, start, side="right")) - 1
        pieces = [
            getattr(self.part(shard), column)[max(0, start - self.first[shard]) : stop - self.first[shard]]
            for shard in range(first_shard, int(np.searchsorted(self.first, stop, side="left")))
            if self.first[shard] < self.first[shard + 1]  # a shard without rows has no part
        ]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def take(self, rows: Int64[np.ndarray, "rows"], side: str) -> Float32[np.ndarray, "rows dim"]:
        """Return the features of `rows` with their original norms, in the order of `rows`."""
        order = np.argsort(rows, kind="stable")
        chunks = []
        for shard in np.unique(np.searchsorted(self.first, rows, side="right") - 1):
            part, first = self.part(int(shard)), self.first[shard]
            inside = rows[order][(rows[order] >= first) & (rows[order] < self.first[shard + 1])] - first
            norm = getattr(part, f"{side}_norm")[inside, None]
            chunks.append(getattr(part, side)[inside].astype(np.float32) * norm)
        result = np.empty((len(rows), chunks[0].shape[1]), np.float32)
        result[order] = np.concatenate(chunks)
        return result


class _PartReader:
    """Columns of part files, mapped in the process that reads them, so that it can be pickled and survives a fork."""

    def __init__(self, folder: Path, index: ShardIndex) -> None:
        self.folder = folder
        self.first_row = first_rows(index)
        self._mapped: OrderedDict[str, tuple[Any, ...]] = OrderedDict()  # least recently used first

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": OrderedDict()}

    def place(self, row: int) -> tuple[int, int]:
        """Return the shard of a row, and its number in the shard."""
        shard = int(np.searchsorted(self.first_row, row, side="right")) - 1
        return shard, int(row - self.first_row[shard])

    def columns(self, name: str, columns: Sequence[str], check: Callable[..., bool]) -> tuple[Any, ...]:
        """Return lazy slices of columns of a part; the most recently used parts stay mapped.

        `check` takes the slices and returns whether their shapes are right.

        Raises:
            UserError: if the part is missing or damaged.
        """
        if name in self._mapped:
            self._mapped.move_to_end(name)
            return self._mapped[name]
        try:
            file: Any = safe_open(self.folder / name, framework="pt")
            part = tuple(file.get_slice(column) for column in columns)
            if not check(*part):
                raise ValueError(f"its columns have the shapes {[column.get_shape() for column in part]}")
        except Exception as error:  # damaged files raise errors of several types
            raise self.damaged(name, str(error)) from error
        self._mapped[name] = part
        if len(self._mapped) > MAX_MAPPED_PARTS:
            self._mapped.popitem(last=False)
        return part

    def damaged(self, name: str, reason: str) -> UserError:
        """Return the error for a part that cannot be used."""
        return UserError(
            f"{self.folder / name} does not hold the features of its shard ({reason}); delete it and run the recipe "
            f"again"
        )


class TextFeatures(_PartReader):
    """The captions of an index: for each a vector in float32 and a hash of its tokens.

    Parts hold `features` [captions, dim], `ids` [captions] and `first` [rows + 1], the position of the first caption of
    each row of the shard. A bad row has no captions. The vectors are unit features of a locked text tower or, with
    `of_trunk`, outputs of the frozen part of a text tower.
    """

    def __init__(self, folder: Path, index: ShardIndex, dim: int, *, of_trunk: bool = False) -> None:
        super().__init__(folder, index)
        self.dim, self.of_trunk = dim, of_trunk

    def take(
        self, rows: Sequence[int], captions: Sequence[int]
    ) -> tuple[Float32[Tensor, "texts dim"], Int64[Tensor, "texts"]]:
        """Return vector and id of one caption of each row, by its number among the captions of the row.

        Raises:
            UserError: if a part is missing or damaged, or a row has no such caption.
        """
        features, ids = [torch.zeros(0, self.dim)], [torch.zeros(0, dtype=torch.int64)]
        for row, caption in zip(rows, captions, strict=True):
            part_features, part_ids, first, end = self._captions(row)
            position = first + caption
            if position >= end:
                raise self.damaged(text_part_name(self.place(row)[0]), f"row {row} has no caption {caption}")
            features.append(part_features[position : position + 1])
            ids.append(part_ids[position : position + 1])
        return torch.cat(features), torch.cat(ids)

    def take_all(self, rows: Sequence[int]) -> Float32[Tensor, "texts dim"]:
        """Return the vectors of all captions of the rows; raise as `take`."""
        parts = [features[first:end] for features, _, first, end in map(self._captions, rows)]
        return torch.cat([torch.zeros(0, self.dim), *parts])

    def num_captions(self, row: int) -> int:
        """Return the number of captions of a row; raise as `take`."""
        _, _, first, end = self._captions(row)
        return end - first

    def _captions(self, row: int) -> tuple[Any, Any, int, int]:
        """Return features and ids of the shard of a row, and the positions of its first caption and of the next row."""
        shard, row_in_shard = self.place(row)
        rows = int(self.first_row[shard + 1] - self.first_row[shard])

        def check(features: Any, ids: Any, firsts: Any) -> bool:
            captions = ids.get_shape()[0]
            shapes = [features.get_shape(), ids.get_shape(), firsts.get_shape()]
            return shapes == [[captions, self.dim], [captions], [rows + 1]] and int(firsts[rows:][0]) == captions

        features, ids, firsts = self.columns(text_part_name(shard), ("features", "ids", "first"), check)
        first, end = firsts[row_in_shard : row_in_shard + 2].tolist()
        return features, ids, first, end


class ImageOutputs(_PartReader):
    """What the frozen part of an image tower computes of fixed views of each image, in float32.

    Each view has a folder, whose parts hold `outputs` [rows, *shape], `ids` [rows], hashes of the image files, and `ok`
    [rows]: whether image and captions of the row could be decoded.
    """

    def __init__(self, folder: Path, index: ShardIndex, shape: Sequence[int], views: Sequence[str]) -> None:
        super().__init__(folder, index)
        self.shape, self.views = list(shape), tuple(views)

    def take(self, row: int, view: int) -> tuple[Float32[Tensor, "..."] | None, int]:
        """Return the output of a view of a row, or None if the row is bad, and the hash of the image.

        Raises:
            UserError: if a part is missing or damaged.
        """
        shard, row_in_shard = self.place(row)
        rows = int(self.first_row[shard + 1] - self.first_row[shard])

        def check(*columns: Any) -> bool:
            return [column.get_shape() for column in columns] == [[rows, *self.shape], [rows], [rows]]

        name = f"{self.views[view]}/{image_part_name(shard)}"
        outputs, ids, ok = self.columns(name, ("outputs", "ids", "ok"), check)
        here = slice(row_in_shard, row_in_shard + 1)
        return (outputs[here][0] if bool(ok[here][0]) else None), int(ids[here][0])

    def reason(self, row: int, view: int) -> str:
        """Return why a row is bad."""
        path = self.folder / self.views[view] / image_part_name(self.place(row)[0])
        return next(str(reason) for number, _, reason in read_counts(path)["bad_samples"] if number == row)
