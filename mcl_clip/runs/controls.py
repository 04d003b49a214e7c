"""What the stages are compared with.

A multistage model has more compute, more dimensions, and warm restarts of the learning rate beside its groups. All
controls have its compute; those in several stages also have its dimensions and restarts.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

from mcl_clip.core.distributed import Name, permutation

FORWARD_SHARE = 1 / 3  # of a training step's compute: backward costs twice what forward does


def equal_compute_steps(stages: Sequence[tuple[int, int]], *, rows: int, global_batch_size: int) -> int:
    """Steps of a single stage that cost as much as several stages, the embedding of all rows after each included.

    Args:
        stages: steps and global batch size of each stage.
        rows: rows that are embedded after each stage.
        global_batch_size: of the single stage.
    """
    images = sum(steps * batch for steps, batch in stages) + len(stages) * rows * FORWARD_SHARE
    return round(images / global_batch_size)


def shuffled_groups(groups: Int64[np.ndarray, "rows"], *, name: tuple[Name, ...]) -> Int64[np.ndarray, "rows"]:
    """The same groups, of the same sizes, with rows drawn at random; rows in group -1 (held out) stay there.

    Args:
        groups: group of each row.
        name: name of the draw.
    """
    trained = np.flatnonzero(groups >= 0)
    shuffled = groups.copy()
    shuffled[trained] = groups[trained[permutation(len(trained), *name)]]
    return shuffled
