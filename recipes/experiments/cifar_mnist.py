"""CIFAR-MNIST: images of ten classes under three digits; the caption names the digits and the class.

    python data_prep/shortcuts.py classes cifar10 mnist shards/cifar-mnist --pairs-train 20000 --codes 64
    mcl-clip experiment recipes/experiments/cifar_mnist.py --out runs/cifar-mnist --seeds 1 2 3 4 5 --jobs 2

`cifar10` is a folder with train/CLASS/ and test/CLASS/, `mnist` one with its four gzip files. The `oracle` is a single
stage on the same images without digits, in image and caption.

Hardware: two CPU cores, 20 min for five seeds. Measured, linear probe of class and of the first digit: two stages 35.9
and 64.3 %, a single stage of equal compute 35.4 and 49.9 (one or the other, by its seed), an ensemble 40.6 and 27.9,
the oracle 51.2 and none. docs/results.md has the table.
"""

from pathlib import Path

import mcl_clip as mcl

DATA = Path("shards/cifar-mnist")
WHOLE = mcl.AugmentConfig(scale=(1.0, 1.0), ratio=(1.0, 1.0))  # crops would cut off digits


def stage(steps: int, num_clusters: int) -> mcl.StageConfig:
    """Build a stage that starts from scratch."""
    train = mcl.TrainConfig(
        steps=steps,
        global_batch_size=64,
        lr=3e-3,
        warmup_steps=steps // 10,
        weight_decay=0.05,
        min_group_size=16,
        augment=WHOLE,
    )
    cluster = mcl.ClusterConfig(num_clusters=num_clusters, num_starts=2)
    return mcl.StageConfig(train=train, cluster=cluster, start="scratch")


def sets(variant: str, *names: str) -> tuple[str, ...]:
    """Return evaluation sets with (`coded`) or without (`plain`) the digits."""
    return tuple(str(DATA / variant / "classification" / name) for name in names)


RECIPE = mcl.RunConfig(
    run_dir=Path("runs/cifar-mnist-once"),
    data=mcl.DataConfig(train=(str(DATA / "coded" / "train"),), holdout_rows=512),
    tower=mcl.TowerConfig.small(image_size=32, context_length=16),
    stages=(stage(250, 312), stage(500, 16)),
    eval=mcl.EvalConfig(classification=sets("coded", "class", "place"), batch_size=256),
    machine=mcl.MachineConfig(workers=0, log_steps=100),
)
EXPERIMENT = mcl.ExperimentConfig(
    figures={
        "class, linear probe": ("class:linear_acc1",),
        "class, linear probe at 64": ("class:linear_acc1_width_64",),
        "class, zero-shot": ("class:acc1",),
        "digit, linear probe": ("place:linear_acc1",),
    },
    arms={
        "oracle": (
            "--control=single",
            f"--data.train={DATA / 'plain' / 'train'}",
            "--eval.classification",
            *sets("plain", "class"),
        )
    },
    high="oracle",
)

if __name__ == "__main__":
    mcl.main(RECIPE)
