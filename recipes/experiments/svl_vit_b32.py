"""The SVL benchmark in its published setting: OpenAI's ViT-B-32 fine-tuned on Flickr30k under six digits.

    python data_prep/shortcuts.py svl dataset_flickr30k.json mnist shards/svl-flickr30k --images-root flickr30k-images
    mcl-clip experiment recipes/experiments/svl_vit_b32.py --out runs/svl-vit-b32 --seeds 1 2 3

After Bleeker et al. (arXiv 2402.17510) and their code: batch 256, 5 epochs of 145,000 pairs, AdamW with a rate of 2e-5
without decay, 100 steps of warm-up, cosine, gradients clipped to 2, temperature fixed. Published R@1 without the
shortcut, image to text and text to image, with a code for each photo (QUEST, NeurIPS 2024): InfoNCE 57.2 and 44.9, LTD
64.0 and 50.7, IFM 73.8 and 58.9, QUEST 84.2 and 67.6, InfoNCE trained without shortcut 86.9 and 72.4.

Ours, and different: codes and digits are drawn once, not anew in each epoch; photos are resized and their center is
cropped, where the published training crops at random; LTD decodes captions with the digits. The stages of MCL start
from the base, with 128 clusters of text features. Controls have equal compute, so that `single` and `oracle` are three
times as long as published; `published` and `ltd` have the published length.

Hardware: one GPU. Not yet run: time and results are not measured.
"""

from pathlib import Path

import mcl_clip as mcl

DATA = Path("shards/svl-flickr30k")
TRAIN = mcl.TrainConfig(
    steps=2832,
    global_batch_size=256,
    lr=2e-5,
    warmup_steps=100,
    weight_decay=0.0,
    betas=(0.9, 0.999),
    eps=1e-8,
    max_grad_norm=2.0,
    augment=mcl.AugmentConfig(scale=(1.0, 1.0), ratio=(1.0, 1.0)),  # crops would cut off digits
    lock=mcl.LockConfig(patterns=("^logit_scale$",)),
)
STAGE = mcl.StageConfig(train=TRAIN, cluster=mcl.ClusterConfig(num_clusters=128, on="text"), start="base")
RECIPE = mcl.RunConfig(
    run_dir=Path("runs/svl-vit-b32-once"),
    data=mcl.DataConfig(train=(str(DATA / "coded" / "train"),)),
    tower=mcl.TowerConfig(architecture="ViT-B-32", pretrained="openai"),
    stages=(STAGE, STAGE, STAGE),
    eval=mcl.EvalConfig(
        retrieval=tuple(str(DATA / "retrieval" / name) for name in ("clean", "coded", "swapped")), batch_size=256
    ),
    machine=mcl.MachineConfig(workers=8, log_steps=50),
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
        "published": ("--num-stages=1",),
        "ltd": ("--num-stages=1", "--stages.0.train.decode.weight=1"),
        "parallel": ("--stages.1.cluster.features=base", "--stages.1.cluster.on=image"),
        "others": ("--stages.1.train.groups=others", "--stages.2.train.groups=others"),
        "weighted": ("--combine=weighted",),
    },
    high="oracle",
)

if __name__ == "__main__":
    mcl.main(RECIPE)
