"""Trifeature, where nothing stays hidden: captions always name the color, shape and texture half of the time.

    python data_prep/trifeature.py shards/trifeature --pairs-train 12000 --size-px 32
    mcl-clip experiment recipes/experiments/trifeature_controls.py --out runs/trifeature --seeds 1 2 3 4 5 --jobs 2

With `--correlate shape:texture=0.7` the first command makes the correlated attributes of Hermann & Lampinen (2020).
There is no oracle: the question is only what the stages add to plain training of equal compute.

Hardware: two CPU cores, 14 min for five seeds. Measured, shape and texture averaged: linear probe 43.6 % (single stage
32.9), zero-shot 26.4 % (29.0), R@1 of whole descriptions 10.0 % (21.6). docs/results.md has the table.
"""

from pathlib import Path

import mcl_clip as mcl

DATA = Path("shards/trifeature")
STAGE = mcl.StageConfig(
    train=mcl.TrainConfig(steps=200, global_batch_size=64, lr=3e-3, warmup_steps=20, weight_decay=0.05),
    cluster=mcl.ClusterConfig(num_clusters=10, num_starts=2),
    start="scratch",
)
RECIPE = mcl.RunConfig(
    run_dir=Path("runs/trifeature-once"),
    data=mcl.DataConfig(train=(str(DATA / "train"),), holdout_rows=512),
    tower=mcl.TowerConfig.small(image_size=32, context_length=16),
    stages=(STAGE, STAGE, STAGE),
    eval=mcl.EvalConfig(
        retrieval=(str(DATA / "retrieval"),),
        classification=tuple(str(DATA / "classification" / name) for name in ("colour", "shape", "texture")),
        batch_size=256,
    ),
    machine=mcl.MachineConfig(workers=0, log_steps=100),
)
EXPERIMENT = mcl.ExperimentConfig(
    figures={
        "shape and texture, linear probe": ("shape:linear_acc1", "texture:linear_acc1"),
        "linear probe at 64": ("shape:linear_acc1_width_64", "texture:linear_acc1_width_64"),
        "zero-shot": ("shape:acc1", "texture:acc1"),
        "colour, zero-shot": ("colour:acc1",),
        "descriptions, mean R@1": ("retrieval:mean_recall@1",),
    }
)

if __name__ == "__main__":
    mcl.main(RECIPE)
