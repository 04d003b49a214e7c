"""Figures that must not change from version to version, and the only command that writes them anew.

    python -m tests.golden

If a plan or a label changes, runs cannot be continued and published numbers not be made again; if a loss does, what is
trained is something else. Look at what differs before you write.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from mcl_clip.core.distributed import random_words
from mcl_clip.data.batch_plan import BatchPlan
from mcl_clip.data.row_order import Source
from mcl_clip.stages.kmeans import spherical_kmeans
from mcl_clip.stages.pseudo_labels import no_labels
from mcl_clip.stages.shared_metric import fit_shared_metric
from tests.training import train, write_shards

FILE = Path(__file__).with_name("golden.json")
ROWS, DIM, CLUSTERS = 400, 12, (5, 4)


def plans() -> list[str]:
    """Digests of the plan of an epoch: groups of several sizes; a weighted mixture in windows and runs."""
    options = {
        "shard_of": np.arange(1000) // 50, "groups": np.arange(1000) ** 2 % 37 % 11, "global_batch_size": 32
    }  # fmt: skip
    mixed = [Source(rows=400, weight=0.5), Source(rows=600, weight=2)]
    whole = BatchPlan(**options, seed=0, stage=1)
    mixture = BatchPlan(**options, seed=7, stage=2, sources=mixed, window_shards=4, run_rows=3)
    return [whole.digest(0), mixture.digest(3)]


def losses() -> list[float]:
    """The first 20 losses of a small ViT in float64."""
    with TemporaryDirectory() as folder:
        shards, out = write_shards(Path(folder) / "shards"), Path(folder) / "train"
        train(shards, out, most_steps=20, crop=1.0, dtype=torch.float64)
        return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def labels() -> list[int]:
    """Labels of two stages from given features, in the metric of both sides and by plain cosine."""
    sides = [_features(side) for side in ("image", "text")]
    image, text = (lambda start, stop, side=side: side[start:stop] for side in sides)
    projected = fit_shared_metric(image, text, ROWS)[0](sides[0])
    found = no_labels(ROWS)
    for stage, (features, clusters) in enumerate(zip((projected, sides[1]), CLUSTERS, strict=True)):
        rows = lambda start, stop, features=features: features[start:stop]  # noqa: E731
        fit = spherical_kmeans(rows, num_rows=ROWS, num_clusters=clusters, name=("golden", stage), num_starts=3)
        found = found.refine(fit.assignments, clusters)
    return found.values.tolist()


def _features(side: str) -> np.ndarray:
    """Unit features around a few directions that both sides share."""
    places = random_words(ROWS, "golden", "place") % 6
    centres, noise = (
        random_words(rows * DIM, "golden", name, side).reshape(rows, DIM) / 2.0**63 - 1
        for rows, name in ((6, "centre"), (ROWS, "noise"))
    )
    features = centres[places] + 1.2 * noise
    return (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float16)


if __name__ == "__main__":
    torch.set_num_threads(1)
    FILE.write_text(json.dumps({"plans": plans(), "losses": losses(), "labels": labels()}) + "\n")
