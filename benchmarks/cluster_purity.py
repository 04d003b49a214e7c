"""Purity of the groups of a stage, clustered by cosine and in the shared metric, over the number of clusters.

    python benchmarks/cluster_purity.py runs/codes/seed-1/mcl --clusters 64 128 256

For a run on pairs of data_prep/shortcuts.py, whose captions begin with their code. Purity is the probability that two
rows of a cluster have the same code; one JSON line per figure.
"""

import json
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from jaxtyping import Float16, Int64

from mcl_clip.core.errors import UserError, run_program
from mcl_clip.data.features import SIDES, EmbeddingTable
from mcl_clip.data.index import ShardIndex
from mcl_clip.data.reader import Reader
from mcl_clip.stages.kmeans import spherical_kmeans
from mcl_clip.stages.shared_metric import fit_shared_metric


def measure(
    run: Annotated[Path, tyro.conf.Positional],
    *,
    stage: int = 0,
    clusters: tuple[int, ...] = (64, 128, 256),
    num_starts: int = 2,
) -> None:
    """Print the purity of clusters of image features in both metrics.

    Args:
        run: The run directory; the stage must be embedded.
        stage: Which stage's features.
        clusters: Numbers of clusters to try.
        num_starts: k-means++ starts, of which the best goes on.
    """
    index = ShardIndex.load(run / "index" / "index.arrow")
    codes = _codes(index)
    table = EmbeddingTable(run / f"stage-{stage}" / "embed", index)
    plain = table.rows(0, len(table), "image")
    image, text = (partial(table.rows, column=side) for side in SIDES)
    shared = fit_shared_metric(image, text, len(table))[0](plain)
    for number in clusters:
        for name, features in (("cosine", plain), ("shared", shared)):
            found = spherical_kmeans(
                partial(_between, features),
                num_rows=len(features),
                num_clusters=number,
                name=("cluster purity",),
                num_starts=num_starts,
            )
            figure = {"metric": name, "clusters": number, "purity": round(_purity(found.assignments, codes), 3)}
            print(json.dumps({"run": str(run), "stage": stage, "codes": int(codes.max()) + 1, **figure}), flush=True)


def _between(features: Float16[np.ndarray, "rows dim"], start: int, stop: int) -> Float16[np.ndarray, "some dim"]:
    return features[start:stop]


def _codes(index: ShardIndex) -> Int64[np.ndarray, "rows"]:
    samples = Reader(index).read(np.arange(len(index)))
    found = [sample.text.decode().partition(",")[0] for sample in samples]
    if not all(code.startswith("code ") for code in found):
        raise UserError("the captions do not begin with a code; name a run on pairs of data_prep/shortcuts.py")
    return np.unique(found, return_inverse=True)[1].astype(np.int64)


def _purity(clusters: Int64[np.ndarray, "rows"], codes: Int64[np.ndarray, "rows"]) -> float:
    """Return the probability that two different rows of a cluster have the same code."""
    both = np.unique(np.stack([clusters, codes]), axis=1, return_counts=True)[1]
    sizes = np.bincount(clusters)
    return float((both * (both - 1)).sum() / (sizes * (sizes - 1)).sum())


if __name__ == "__main__":
    run_program(lambda: tyro.cli(measure))
