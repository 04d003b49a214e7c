"""Measure training batches per second of the loader beside open_clip_train's WebDataset loader, on the same shards.

    python benchmarks/loader.py shards/photos/train --open-clip-python PEER/bin/python

PEER is an environment with `open_clip_torch[training]`, whose webdataset is an old one. Each round starts one process
per side, alternating: two workers, random crops of 224 x 224 of at least 0.9 of the area, tokens of 77. The time
runs from the first batch, when the workers are up, to the last of the epoch. open_clip's batches are normalised floats,
ours bytes that become floats on the device; that step is in our time too. Prints a JSON line.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import open_clip
import torch
import tyro

from mcl_clip.core.errors import run_program
from mcl_clip.data.batch_plan import BatchPlan
from mcl_clip.data.decode import TrainTransform
from mcl_clip.data.index import ShardIndex
from mcl_clip.data.loader import TrainingLoader
from mcl_clip.data.reader import Reader
from mcl_clip.data.shards import expand_shards
from mcl_clip.model.clip import to_floats

SIZE_PX, SCALE = 224, (0.9, 1.0)
ONE_SIDE = "MCL_CLIP_BENCHMARK_SIDE"  # in the environment of a process that measures
PEER = """
import json, sys, time, types
import open_clip
from open_clip_train.data import get_wds_dataset
shards, rows, batch, workers = sys.argv[1], *map(int, sys.argv[2:])
arguments = types.SimpleNamespace(
    train_data=shards, train_num_samples=rows, train_data_upsampling_factors=None, dataset_resampled=False, seed=0,
    batch_size=batch, workers=workers, world_size=1,
)
transform = open_clip.image_transform(224, is_train=True, aug_cfg={"scale": (0.9, 1.0)})
data = get_wds_dataset(arguments, transform, True, tokenizer=open_clip.get_tokenizer("ViT-B-32"))
count, started = 0, None
for images, texts in data.dataloader:
    if started is None:
        started = time.perf_counter()
    else:
        count += len(images)
print(json.dumps({"images_per_s": count / (time.perf_counter() - started), "shape": list(images.shape)}))
"""


def loader(
    shards: Path, /, *, open_clip_python: Path, batch: int = 64, workers: int = 2, rounds: int = 3, jpeg: str = "fast"
) -> None:
    """Measure both loaders.

    Args:
        shards: a folder of shards with one JPEG and a .txt a sample.
        open_clip_python: interpreter of the environment with open_clip_train.
        batch: pairs of a batch.
        workers: loader processes.
        rounds: epochs of each side, in turn.
        jpeg: fast or exact.
    """
    paths = expand_shards(shards)
    rows = len(ShardIndex.build(paths))
    sizes = [str(number) for number in (rows, batch, workers)]
    pattern = f"{shards}/{{{Path(paths[0]).stem}..{Path(paths[-1]).stem}}}.tar"
    environment = {**os.environ, ONE_SIDE: jpeg}
    sides = {
        "ours": [sys.executable, __file__, str(shards), *sizes],
        "open_clip": [str(open_clip_python), "-c", PEER, pattern, *sizes],
    }
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, command in sides.items():
            run = subprocess.run(
                command, env=environment, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            found[name].append(json.loads(run.stdout.splitlines()[-1])["images_per_s"])
    record = {
        "rows": rows,
        "batch": batch,
        "workers": workers,
        "jpeg": jpeg,
        "images_per_s": {name: round(statistics.median(speeds)) for name, speeds in found.items()},
        "ratio": round(statistics.median(a / b for a, b in zip(found["ours"], found["open_clip"], strict=True)), 2),
        "cores": os.cpu_count(),
        "versions": {"torch": torch.__version__, "open_clip": open_clip.__version__},
    }
    print(json.dumps(record))


def measure(shards: str, rows: int, batch: int, workers: int, *, jpeg: str) -> None:
    """Our side, in this process; one thread converts, the other cores are the workers'."""
    torch.set_num_threads(1)
    index = ShardIndex.build(expand_shards(shards))
    plan = BatchPlan(shard_of=index.shard_of, groups=np.zeros(rows, np.int64), global_batch_size=batch, seed=0, stage=0)
    made = TrainingLoader(
        plan,
        Reader(index),
        transform=TrainTransform(size_px=(SIZE_PX, SIZE_PX), scale=SCALE, jpeg=jpeg),
        tokenizer=open_clip.get_tokenizer("ViT-B-32"),
        num_workers=workers,
    )
    cfg = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    count, started = 0, 0.0
    for found in made.steps(0, -(-rows // batch)):
        images = to_floats(found.images, cfg)
        if started:
            count += len(images)
        else:
            started = time.perf_counter()
    print(json.dumps({"images_per_s": count / (time.perf_counter() - started), "shape": list(images.shape)}))


if __name__ == "__main__":
    if jpeg := os.environ.get(ONE_SIDE):
        numbers = [int(text) for text in sys.argv[2:5]]
        measure(sys.argv[1], *numbers, jpeg=jpeg)
    else:
        run_program(lambda: tyro.cli(loader))
