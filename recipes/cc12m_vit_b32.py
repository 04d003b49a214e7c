"""CC12M pretraining of ViT-B-32 in three stages.

    accelerate launch --config_file recipes/accelerate/eight_gpus.yaml recipes/cc12m_vit_b32.py \
        --data.train 'shards/cc12m/{00000..01242}.tar' --eval.retrieval shards/flickr30k_test --run-dir runs/cc12m

Shards as img2dataset writes them; `python data_prep/from_img2dataset.py shards/cc12m` indexes them first. Hardware:
eight GPUs of 80 GB. Not yet run: time and results are not measured. Stage 0 sees 8 epochs of 11M pairs, the later
stages 4 each.
"""

from pathlib import Path

import mcl_clip as mcl


def stage(steps: int, lr: float) -> mcl.StageConfig:
    """Build a stage of `steps` steps that is clustered into ten."""
    train = mcl.TrainConfig(
        steps=steps,
        global_batch_size=8192,
        lr=lr,
        warmup_steps=1000,
        weight_decay=0.2,
        max_grad_norm=1.0,
        precision="bf16",
        window_shards=0,
    )
    return mcl.StageConfig(train=train, cluster=mcl.ClusterConfig(num_clusters=10))


RECIPE = mcl.RunConfig(
    run_dir=Path("runs/cc12m_vit_b32"),
    data=mcl.DataConfig(holdout_rows=8192),
    tower=mcl.TowerConfig(architecture="ViT-B-32"),
    stages=(stage(10_700, 1e-3), stage(5_350, 5e-4), stage(5_350, 5e-4)),
    eval=mcl.EvalConfig(every_steps=2_000, batch_size=512),
    machine=mcl.MachineConfig(workers=8, log_steps=50, save_steps=1_000),
)

if __name__ == "__main__":
    mcl.main(RECIPE)
