"""Real photos: a small model from scratch in two stages beside the controls, measured by retrieval.

    python data_prep/from_table.py captions.csv shards/photos64 --image-column file --caption-column caption \
        --split-column split --images-root images --retrieval-splits test --max-side-px 64
    mcl-clip experiment recipes/experiments/photos_controls.py --out runs/photos-experiment --seeds 1 2 3 4 5 --jobs 2

With a few thousand photos and minutes of training the only question is which arm is ahead.

Hardware: two CPU cores, 25 min for five seeds. Measured on Flickr8k: R@10 from image to text 4.9 % for two stages, 6.2
for a single stage of equal compute, 4.4 for an ensemble, 4.7 with random groups, 6.3 with IFM; docs/results.md has the
table.
"""

from pathlib import Path

import mcl_clip as mcl

DATA = Path("shards/photos64")
STAGE = mcl.StageConfig(
    train=mcl.TrainConfig(
        steps=200,
        global_batch_size=64,
        lr=2e-3,
        warmup_steps=20,
        weight_decay=0.1,
        max_grad_norm=1.0,
        augment=mcl.AugmentConfig(scale=(0.5, 1.0), horizontal_flip=0.5),
    ),
    cluster=mcl.ClusterConfig(num_clusters=4, num_starts=2),
    start="scratch",
)
RECIPE = mcl.RunConfig(
    run_dir=Path("runs/photos-once"),
    data=mcl.DataConfig(train=(str(DATA / "train"),), holdout_rows=256),
    tower=mcl.TowerConfig.small(image_size=64, context_length=32, text_width=64),
    stages=(STAGE, STAGE),
    eval=mcl.EvalConfig(retrieval=(f"photos={DATA / 'test'}",), batch_size=256),
    machine=mcl.MachineConfig(workers=0, log_steps=50),
)
EXPERIMENT = mcl.ExperimentConfig(
    figures={
        "image to text R@1": ("photos:text_retrieval_recall@1",),
        "R@10": ("photos:text_retrieval_recall@10",),
        "text to image R@1": ("photos:image_retrieval_recall@1",),
        "R@10, text to image": ("photos:image_retrieval_recall@10",),
    }
)

if __name__ == "__main__":
    mcl.main(RECIPE)
