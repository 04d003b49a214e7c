"""Text features of all captions on disk, for stages whose text tower is locked: one file a shard, and their reader."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int64
from safetensors import safe_open
from torch import Tensor

from mcl_clip.data.index import ShardIndex
from mcl_clip.errors import UserError


class TextFeatures:
    """The captions of an index: a unit feature in float32 and a hash of the tokens for each.

    Parts hold `features` [captions, dim], `ids` [captions] and `first` [rows + 1], the number of the first caption of
    each row of the shard. A row that is bad has no caption. Files are mapped in the process that reads: it may be
    pickled and may cross a fork.
    """

    def __init__(self, folder: Path, index: ShardIndex, dim: int) -> None:
        self.folder, self.dim = folder, dim
        self.first_row = np.array([shard.first_row for shard in index.shards] + [len(index)])
        self._open: dict[int, tuple[Any, np.ndarray, np.ndarray]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def take(
        self, rows: Sequence[int], captions: Sequence[int]
    ) -> tuple[Float32[Tensor, "texts dim"], Int64[Tensor, "texts"]]:
        """Feature and id of one caption of each row, by its number among the captions of the row.

        Raises:
            UserError: if a part is missing or damaged, or a row has no such caption.
        """
        features, ids = [torch.zeros(0, self.dim)], []
        for row, caption in zip(rows, captions, strict=True):
            shard = int(np.searchsorted(self.first_row, row, side="right")) - 1
            part, first, part_ids = self._part(shard)
            place = int(row - self.first_row[shard])
            number = int(first[place]) + caption
            if number >= first[place + 1]:
                raise self._damaged(shard, f"row {row} has no caption {caption}")
            features.append(part[number : number + 1])
            ids.append(int(part_ids[number]))
        return torch.cat(features), torch.tensor(ids, dtype=torch.int64)

    def _part(self, shard: int) -> tuple[Any, np.ndarray, np.ndarray]:
        if shard not in self._open:
            path = self.folder / part_name(shard)
            try:
                with safe_open(path, framework="numpy") as part:
                    first, ids = part.get_tensor("first"), part.get_tensor("ids")
                features = safe_open(path, framework="pt").get_slice("features")  # type: ignore[no-untyped-call]
                rows = int(self.first_row[shard + 1] - self.first_row[shard])
                if len(first) != rows + 1 or features.get_shape() != [len(ids), self.dim] or first[-1] != len(ids):
                    raise ValueError(f"{len(first) - 1} rows and {features.get_shape()} features, for {rows} rows")
            except Exception as error:  # damaged files raise errors of several kinds
                raise self._damaged(shard, str(error)) from error
            self._open[shard] = features, first, ids
        return self._open[shard]

    def _damaged(self, shard: int, why: str) -> UserError:
        return UserError(
            f"{self.folder / part_name(shard)} does not hold the text features of its shard ({why}); delete it and run "
            f"the recipe again"
        )


def part_name(shard: int) -> str:
    """File name of the text features of a shard."""
    return f"texts-{shard:06d}.safetensors"
