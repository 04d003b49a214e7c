"""Count what the loader delivers in an epoch: every row exactly once, whatever the number of groups and workers.

    python benchmarks/coverage.py shards/photos/train

Labels are random; images are read, decoded and transformed as in training. Prints a JSON line for each
number of groups, with digests over all batches for each number of loader workers.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import torch
import tyro

from mcl_clip.core.distributed import random_words
from mcl_clip.core.errors import run_program
from mcl_clip.data.batch_plan import BatchPlan
from mcl_clip.data.decode import TrainTransform
from mcl_clip.data.index import ShardIndex
from mcl_clip.data.loader import TrainingLoader
from mcl_clip.data.reader import Reader
from mcl_clip.data.shards import expand_shards
from mcl_clip.model.open_clip_io import make_tokenizer


def coverage(
    shards: str,
    /,
    *,
    groups: Sequence[int] = (1, 10, 100, 1000),
    workers: Sequence[int] = (0, 1, 3),
    global_batch_size: int = 128,
    size_px: int = 32,
) -> None:
    """Read an epoch for each number of groups and of loader workers.

    Args:
        shards: training shards.
        groups: numbers of groups.
        workers: numbers of loader processes.
        global_batch_size: rows of a batch.
        size_px: side of the pictures.
    """
    index = ShardIndex.build(expand_shards(shards))
    for number in groups:
        labels = (random_words(len(index), "labels", number) % np.uint64(number)).astype(np.int64)
        plan = BatchPlan(
            shard_of=index.shard_of, groups=labels, global_batch_size=global_batch_size, seed=0, stage=number
        )
        found = {count: read_epoch(plan, Reader(index), len(index), count, size_px) for count in workers}
        counts, digest = found[workers[0]]
        record = {
            "groups": number,
            "rows": len(index),
            "rows_seen_once": int((counts == 1).sum()),
            "rows_missed": int((counts == 0).sum()),
            "rows_repeated": int((counts > 1).sum()),
            **asdict(plan.statistics()),
            "plan_digest": plan.digest(0),
            "bits_equal_for_workers": {str(count): other == digest for count, (_, other) in found.items()},
        }
        print(json.dumps(record), flush=True)


def read_epoch(plan: BatchPlan, reader: Reader, rows: int, workers: int, size_px: int) -> tuple[np.ndarray, str]:
    """How often each row was delivered, and a digest of all pixels and tokens."""
    loader = TrainingLoader(
        plan,
        reader,
        transform=TrainTransform(size_px=(size_px, size_px), scale=(0.5, 1.0), horizontal_flip=0.5),
        tokenizer=make_tokenizer({"text_cfg": {"context_length": 32}}),
        num_workers=workers,
    )
    counts, digest = np.zeros(rows, np.int64), hashlib.blake2b(digest_size=16)
    for batch in loader.steps(0, plan.batches_per_epoch):
        np.add.at(counts, batch.rows[batch.rows >= 0].numpy(), 1)
        for tensor in (batch.rows, batch.images, batch.tokens, batch.text_ids, batch.image_ids):
            digest.update(tensor.numpy().tobytes())
    return counts, digest.hexdigest()


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_program(lambda: tyro.cli(coverage, description=__doc__))
