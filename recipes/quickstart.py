"""Three stages on rendered Trifeature pictures, from nothing to a multistage model on a CPU.

    python data_prep/trifeature.py shards/trifeature --pairs-train 12000 --size-px 32
    python recipes/quickstart.py

`make quickstart` does both, installation included. The pictures show one of 10 shapes in one of 10 colours and
textures; the captions always name the colour, shape and texture half of the time each. Colour is the easy feature:
stage 0 finds it first, and its clusters become the groups within which the next stages must look at something else.

Hardware: two CPU cores, 3 min 41 s. Measured with seed 0: a linear read-out of the texture gets 33.6 % right after
stage 0 and 58.6 % from all stages, of the shape 45.8 and 55.5 %. A single stage of equal compute (`--control single`)
gets 74.1 and 67.3 %: this set is a tour of the parts, not a case for the method. The README has the whole table, and
`recipes/experiments/codes.py` a case.
"""

from pathlib import Path

from mcl_clip import (
    ClusterConfig,
    DataConfig,
    EvalConfig,
    MachineConfig,
    RunConfig,
    StageConfig,
    TowerConfig,
    TrainConfig,
    main,
)

DATA = Path("shards/trifeature")

TOWER = TowerConfig(
    model={
        "embed_dim": 64,
        "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "head_width": 32},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
    }
)
STAGE = StageConfig(
    train=TrainConfig(steps=300, global_batch_size=128, lr=2e-3, warmup_steps=30, weight_decay=0.1),
    cluster=ClusterConfig(num_clusters=10),
)
RECIPE = RunConfig(
    run_dir=Path("runs/quickstart"),
    data=DataConfig(train=(str(DATA / "train"),), holdout_rows=512),
    tower=TOWER,
    stages=(STAGE, STAGE, STAGE),
    eval=EvalConfig(
        retrieval=(str(DATA / "retrieval"),),
        classification=tuple(str(DATA / "classification" / name) for name in ("colour", "shape", "texture")),
        batch_size=256,
    ),
    machine=MachineConfig(workers=2, log_steps=20),
)

if __name__ == "__main__":
    main(RECIPE)
