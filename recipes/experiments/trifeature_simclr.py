"""Trifeature without captions: SimCLR in three stages on shapes with textures and colors. The settings are ours.

    python data_prep/trifeature.py shards/trifeature --pairs-train 12000 --size-px 32
    mcl-clip experiment recipes/experiments/trifeature_simclr.py --out runs/trifeature-simclr --seeds 1 2 3 --jobs 2

The captions of the shards are not read. Views are crops and flips only, as jitter and gray views would take the colors
away; with `--correlate shape:texture=0.7` the first command makes the correlated attributes of Hermann & Lampinen
(2020). Hardware: two CPU cores. Not yet run.
"""

from pathlib import Path

import mcl_clip as mcl

DATA = Path("shards/trifeature")
STAGE = mcl.StageConfig(
    train=mcl.TrainConfig(
        steps=600,
        global_batch_size=128,
        optimizer="sgd",
        lr=0.1,
        warmup_steps=30,
        weight_decay=5e-4,
        loss="simclr",
        temperature=0.2,
        augment=mcl.AugmentConfig(scale=(0.3, 1.0), horizontal_flip=0.5),
    ),
    cluster=mcl.ClusterConfig(num_clusters=10, metric="cosine"),
)
RECIPE = mcl.RunConfig(
    run_dir=Path("runs/trifeature-simclr-once"),
    data=mcl.DataConfig(train=(str(DATA / "train"),)),
    tower=mcl.TowerConfig(
        image="timm:resnet18=random",
        image_args={"channels": (16, 32, 64, 128)},
        stem="cifar",
        image_size=(32,),
        dim=64,
    ),
    stages=(STAGE, STAGE, STAGE),
    eval=mcl.EvalConfig(
        classification=tuple(str(DATA / "classification" / name) for name in ("colour", "shape", "texture")),
        batch_size=256,
    ),
    machine=mcl.MachineConfig(workers=1, log_steps=50),
)
EXPERIMENT = mcl.ExperimentConfig(
    figures={
        **{f"{name}, linear probe": (f"{name}:linear_acc1",) for name in ("colour", "shape", "texture")},
        "shape and texture at 128": ("shape:linear_acc1_width_128", "texture:linear_acc1_width_128"),
    }
)

if __name__ == "__main__":
    mcl.main(RECIPE)
