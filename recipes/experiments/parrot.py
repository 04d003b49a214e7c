"""Parrot captions: what do photos and captions still mean where a share of the photos has a word of its caption on it?

    python data_prep/shortcuts.py parrot captions.csv shards/parrot-30 --images-root images --share 0.3 --rows photos
    mcl-clip experiment recipes/experiments/parrot.py --out runs/parrot-30 --seeds 1 2 3 --arguments="--tower.image \
        timm:NAME=FILE --tower.text hf:FOLDER --machine.cache-dir runs/parrot-cache"

The most common shortcut of web data (arXiv 2312.14232). Evaluated without words (`clean`), with a word of the own
caption (`coded`) and of another photo (`swapped`). `oracle` is the single stage on the same photos without words. For
70 % of the pairs: `--share 0.7`, and in place of shards/parrot-30 its folder in `--arguments` (`--data.train`,
`--eval.retrieval`).

Sized for two cores as svl.py is: images of 112 px, and only the heads of the pair of towers train. Not yet run: neither
tower reads words before, and whether the heads can learn to is not measured.
"""

from pathlib import Path

import mcl_clip as mcl

DATA = Path("shards/parrot-30")
TRAIN = mcl.TrainConfig(
    steps=500,
    global_batch_size=256,
    lr=3e-3,
    warmup_steps=20,
    weight_decay=0.05,
    max_grad_norm=2.0,
    augment=mcl.AugmentConfig(views=1),
    lock=mcl.LockConfig(image_unlocked_groups=0, text_unlocked_groups=0),
)
STAGE = mcl.StageConfig(train=TRAIN, cluster=mcl.ClusterConfig(num_clusters=24), start="scratch")
RECIPE = mcl.RunConfig(
    run_dir=Path("runs/parrot-once"),
    data=mcl.DataConfig(train=(str(DATA / "coded" / "train"),), holdout_rows=256),
    tower=mcl.TowerConfig(
        image="timm:tf_efficientnet_lite0", text="hf:sentence-transformers/all-MiniLM-L6-v2", image_size=(112,)
    ),
    stages=(STAGE, STAGE, STAGE),
    eval=mcl.EvalConfig(
        retrieval=tuple(str(DATA / "retrieval" / name) for name in ("clean", "coded", "swapped")), batch_size=256
    ),
    machine=mcl.MachineConfig(workers=0, log_steps=50),
)
EXPERIMENT = mcl.ExperimentConfig(
    figures={
        "clean, image to text R@1": ("clean:text_retrieval_recall@1",),
        "clean, text to image R@1": ("clean:image_retrieval_recall@1",),
        "coded, mean R@1": ("coded:mean_recall@1",),
        "swapped, mean R@1": ("swapped:mean_recall@1",),
    },
    arms={
        "oracle": ("--control=single", f"--data.train={DATA / 'plain' / 'train'}"),
        "ltd": ("--control=single", "--stages.0.train.decode.weight=1"),
        "parallel": (
            *("--stages.1.start=base", "--stages.2.start=base"),
            *("--stages.1.cluster.features=base", "--stages.1.cluster.on=text"),
        ),
        "weighted": ("--combine=weighted",),
    },
    high="oracle",
)

if __name__ == "__main__":
    mcl.main(RECIPE)
