"""CIFAR-10 without captions: SimCLR in three stages, with a narrow ResNet. The settings are ours.

    python data_prep/from_images.py cifar10/train shards/cifar10
    mcl-clip experiment recipes/experiments/cifar10_simclr.py --out runs/cifar10-simclr --seeds 1 2 3 --jobs 2

`cifar10` is a folder with train/CLASS/ and test/CLASS/. The augmentations are SimCLR's for CIFAR-10.

Hardware: two CPU cores. Not yet run. For the reference setting on a GPU (ResNet-18, 200 epochs of 50,000 images),
leave out `image_args` and add `--stages.0.train.steps 19600 --stages.0.train.global-batch-size 512
--stages.0.train.lr 0.5`, and so on for the other stages.
"""

from pathlib import Path

import mcl_clip as mcl

CIFAR = mcl.AugmentConfig(scale=(0.08, 1.0), horizontal_flip=0.5, jitter=(0.4, 0.4, 0.4, 0.1), grayscale=0.2)
STAGE = mcl.StageConfig(
    train=mcl.TrainConfig(
        steps=800,
        global_batch_size=128,
        optimizer="sgd",
        lr=0.1,
        warmup_steps=40,
        weight_decay=5e-4,
        loss="simclr",
        temperature=0.5,
        augment=CIFAR,
    ),
    cluster=mcl.ClusterConfig(num_clusters=10, metric="cosine"),
)
RECIPE = mcl.RunConfig(
    run_dir=Path("runs/cifar10-simclr-once"),
    data=mcl.DataConfig(train=("shards/cifar10",)),
    tower=mcl.TowerConfig(
        image="timm:resnet18=random",
        image_args={"channels": (16, 32, 64, 128)},
        stem="cifar",
        image_size=(32,),
        dim=64,
    ),
    stages=(STAGE, STAGE, STAGE),
    eval=mcl.EvalConfig(sets=("class=cifar10/test",), batch_size=256),
    machine=mcl.MachineConfig(workers=1, log_steps=50),
)
EXPERIMENT = mcl.ExperimentConfig(
    figures={
        "linear probe": ("class:linear_acc1",),
        "linear probe at 128": ("class:linear_acc1_width_128",),
        "k-NN probe": ("class:knn_acc1",),
    }
)

if __name__ == "__main__":
    mcl.main(RECIPE)
