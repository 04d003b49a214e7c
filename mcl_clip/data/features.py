"""Text features of all captions on disk, for stages whose text tower is locked: one file a shard, and their reader."""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Int64
from safetensors import safe_open
from torch import Tensor

from mcl_clip.core.errors import UserError
from mcl_clip.data.index import ShardIndex

MOST_MAPPED = 256  # parts, in a process


class _Part(NamedTuple):
    """Slices of a mapped file."""

    features: Any
    ids: Any
    first: Any


class TextFeatures:
    """The captions of an index: a unit feature in float32 and a hash of the tokens for each.

    Parts hold `features` [captions, dim], `ids` [captions] and `first` [rows + 1], the number of the first caption of
    each row of the shard. A row that is bad has no caption. Files are mapped in the process that reads: it may be
    pickled and may cross a fork.
    """

    def __init__(self, folder: Path, index: ShardIndex, dim: int) -> None:
        self.folder, self.dim = folder, dim
        self.first_row = np.array([shard.first_row for shard in index.shards] + [len(index)])
        self._mapped: OrderedDict[int, _Part] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": OrderedDict()}

    def take(
        self, rows: Sequence[int], captions: Sequence[int]
    ) -> tuple[Float32[Tensor, "texts dim"], Int64[Tensor, "texts"]]:
        """Feature and id of one caption of each row, by its number among the captions of the row.

        Raises:
            UserError: if a part is missing or damaged, or a row has no such caption.
        """
        features, ids = [torch.zeros(0, self.dim)], [torch.zeros(0, dtype=torch.int64)]
        for row, caption in zip(rows, captions, strict=True):
            shard = int(np.searchsorted(self.first_row, row, side="right")) - 1
            part = self._part(shard)
            place = int(row - self.first_row[shard])
            first, end = part.first[place : place + 2].tolist()
            number = first + caption
            if number >= end:
                raise self._damaged(shard, f"row {row} has no caption {caption}")
            features.append(part.features[number : number + 1])
            ids.append(part.ids[number : number + 1])
        return torch.cat(features), torch.cat(ids)

    def _part(self, shard: int) -> _Part:
        """A part, mapped; those looked at last stay so."""
        if shard in self._mapped:
            self._mapped.move_to_end(shard)
            return self._mapped[shard]
        path, rows = self.folder / text_part_name(shard), int(self.first_row[shard + 1] - self.first_row[shard])
        try:
            file: Any = safe_open(path, framework="pt")
            part = _Part(*(file.get_slice(name) for name in _Part._fields))
            captions = part.ids.get_shape()[0]
            shapes = [slice_.get_shape() for slice_ in part]
            if shapes != [[captions, self.dim], [captions], [rows + 1]] or int(part.first[rows:][0]) != captions:
                raise ValueError(f"its columns have the shapes {shapes}, for {rows} rows")
        except Exception as error:  # damaged files raise errors of several kinds
            raise self._damaged(shard, str(error)) from error
        self._mapped[shard] = part
        if len(self._mapped) > MOST_MAPPED:
            self._mapped.popitem(last=False)
        return part

    def _damaged(self, shard: int, why: str) -> UserError:
        return UserError(
            f"{self.folder / text_part_name(shard)} does not hold the text features of its shard ({why}); delete it "
            f"and run the recipe again"
        )


def text_part_name(shard: int) -> str:
    """File name of the text features of a shard."""
    return f"texts-{shard:06d}.safetensors"
