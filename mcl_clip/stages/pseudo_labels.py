"""Pseudo-labels that accumulate over stages, and the groups from which batches are sampled.

The label of a row before stage s is the tuple of its clusters in all earlier stages (Multistage Contrastive Learning;
CLIP-MoE, arXiv 2409.19291, equation 1). Labels never change; groups are derived from them for each stage, so that
none is too small for batches.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Int32, Int64

from mcl_clip.core.errors import UserError
from mcl_clip.core.files import read_json
from mcl_clip.data.storage import load_numbers

BLOCK_ROWS = 1 << 20  # rows whose labels are counted at a time
MAX_TABLE = 1 << 22  # possible labels that are counted in a table; more are sorted
Prefix = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class PseudoLabels:
    """One number per row for the clusters of all stages so far, in mixed radix, first stage most significant.

    Attributes:
        values: the label of each row.
        radix: number of clusters of each stage.
    """

    values: Int64[np.ndarray, "rows"]
    radix: tuple[int, ...]

    def refine(self, assignments: Int[np.ndarray, "rows"], num_clusters: int) -> "PseudoLabels":
        """Append the clusters of one more stage; rows with different labels keep different labels.

        Raises:
            UserError: if the labels do not fit 63 bits, or a cluster number is not below `num_clusters`.
        """
        if math.prod(self.radix) * num_clusters >= 2**63:
            raise UserError(
                f"clusters {self.radix} and {num_clusters} make over 2^63 labels; use fewer stages or clusters"
            )
        if len(assignments) and not 0 <= assignments.min() <= assignments.max() < num_clusters:
            raise UserError(
                f"assignments run from {assignments.min()} to {assignments.max()}, with {num_clusters} clusters; "
                f"cluster again"
            )
        return PseudoLabels(values=self.values * num_clusters + assignments, radix=(*self.radix, num_clusters))

    def prefix(self, label: int) -> Prefix:
        """Return the cluster of each stage that a label encodes."""
        return tuple(int(cluster) for cluster in np.unravel_index(label, self.radix))

    def count(self) -> tuple[Int64[np.ndarray, "labels"], Int64[np.ndarray, "labels"]]:
        """Return the distinct labels in rising order, and the number of rows of each."""
        blocks = (self.values[start : start + BLOCK_ROWS] for start in range(0, len(self.values), BLOCK_ROWS))
        if (possible := math.prod(self.radix)) <= MAX_TABLE:
            sizes = sum((np.bincount(block, minlength=possible) for block in blocks), np.zeros(possible, np.int64))
            return np.flatnonzero(sizes), sizes[sizes > 0]
        labels, sizes = np.empty(0, np.int64), np.empty(0, np.int64)
        for block in blocks:
            found, counts = np.unique(block, return_counts=True)
            labels, position = np.unique(np.concatenate([labels, found]), return_inverse=True)
            sizes = np.bincount(position, np.concatenate([sizes, counts])).astype(np.int64)  # exact below 2^53
        return labels, sizes

    def summary(self) -> dict[str, Any]:
        """Summarize the number and the sizes of the labels, for `labels.json`."""
        _, sizes = self.count()
        powers, counts = np.unique(np.floor(np.log2(sizes)).astype(int), return_counts=True)
        return {
            "radix": list(self.radix),
            "labels": len(sizes),
            "smallest": int(sizes.min()),
            "median": float(np.median(sizes)),
            "largest": int(sizes.max()),
            "histogram": {f"{2**p}-{2 ** (p + 1) - 1}": int(count) for p, count in zip(powers, counts, strict=True)},
        }


def no_labels(num_rows: int) -> PseudoLabels:
    """Return the labels before stage 0, equal for all rows."""
    return PseudoLabels(values=np.broadcast_to(np.int64(0), num_rows), radix=())


def read_labels(folder: Path, num_rows: int) -> PseudoLabels:
    """Read `labels.npy` and `labels.json` of a folder.

    Raises:
        UserError: if the files are damaged, do not fit together, or hold another number of rows.
    """
    values = load_numbers(folder / "labels.npy", num_rows)
    summary = read_json(folder / "labels.json")
    radix = summary.get("radix") if isinstance(summary, dict) else None
    if not isinstance(radix, list) or not all(type(clusters) is int and clusters > 0 for clusters in radix):
        raise UserError(f"{folder / 'labels.json'} has no list of clusters ('radix'); delete {folder} and run again")
    if len(values) and not 0 <= values.min() <= values.max() < math.prod(radix) < 2**63:
        raise UserError(
            f"{folder / 'labels.npy'} holds labels from {values.min()} to {values.max()}, with {radix} clusters; "
            f"delete {folder} and run the recipe again"
        )
    return PseudoLabels(values=values.astype(np.int64, copy=False), radix=tuple(radix))


@dataclass(frozen=True, kw_only=True)
class Group:
    """Rows that are negatives of each other: those with a label in `labels`, all of which share `prefix`."""

    prefix: Prefix
    labels: tuple[int, ...]
    size: int


@dataclass(frozen=True, kw_only=True)
class Groups:
    """The groups of a stage and the group of every row."""

    groups: tuple[Group, ...]
    group_of: Int32[np.ndarray, "rows"]

    def record(self) -> dict[str, Any]:
        """Return the content of `groups.json`."""
        sizes = [group.size for group in self.groups]
        return {
            "num_groups": len(sizes),
            "smallest": min(sizes),
            "median": float(np.median(sizes)),
            "largest": max(sizes),
            "rows_relaxed": sum(group.size for group in self.groups if len(group.labels) > 1),
            "groups": [
                {
                    "group": number,
                    "prefix": [*group.prefix] if len(group.labels) == 1 else [*group.prefix, "*"],
                    "labels": len(group.labels),
                    "size": group.size,
                }
                for number, group in enumerate(self.groups)
            ],
        }


def default_min_group_size(global_batch_size: int) -> int:
    """Return the default minimum group size: an eighth of a batch, at least 32 rows."""
    return max(32, global_batch_size // 8)


def group_labels(labels: PseudoLabels, *, min_group_size: int) -> Groups:
    """Form groups of at least `min_group_size` rows, provided that there are that many rows.

    Among the children of one prefix, those with fewer rows are pooled. A pool that is still too small is merged with
    its smallest large sibling, or moves up to the next shorter prefix if it has none. Groups are numbered by their
    first label.
    """
    values, sizes = labels.count()
    units = [
        Group(prefix=labels.prefix(value), labels=(value,), size=size)
        for value, size in zip(values.tolist(), sizes.tolist(), strict=True)
    ]
    done: list[Group] = []
    for depth in reversed(range(len(labels.radix))):
        pools: dict[Prefix, list[Group]] = {}
        siblings: dict[Prefix, list[Group]] = {}
        for unit in units:
            if unit.size < min_group_size:
                pools.setdefault(unit.prefix[:depth], []).append(unit)
            else:
                done.append(unit)
        for group in done:
            siblings.setdefault(group.prefix[:depth], []).append(group)
        units, taken = [], set()
        for prefix, members in pools.items():
            if sum(unit.size for unit in members) < min_group_size and prefix in siblings:
                smallest = min(siblings[prefix], key=lambda group: (group.size, group.labels))
                taken.add(smallest.labels)
                members.append(smallest)
            held = tuple(sorted(label for unit in members for label in unit.labels))
            units.append(Group(prefix=prefix, labels=held, size=sum(unit.size for unit in members)))
        done = [group for group in done if group.labels not in taken]
    groups = sorted(done + units, key=lambda group: group.labels)
    is_table = math.prod(labels.radix) <= MAX_TABLE  # a look-up is much faster than a search

    def entry(of: Int64[np.ndarray, "some"]) -> Int64[np.ndarray, "some"]:
        return of if is_table else np.searchsorted(values, of)

    number_of = np.zeros(math.prod(labels.radix) if is_table else len(values), np.int32)
    for number, group in enumerate(groups):
        number_of[entry(np.array(group.labels))] = number
    group_of = np.empty(len(labels.values), np.int32)
    for start in range(0, len(group_of), BLOCK_ROWS):
        group_of[start : start + BLOCK_ROWS] = number_of[entry(labels.values[start : start + BLOCK_ROWS])]
    return Groups(groups=tuple(groups), group_of=group_of)
