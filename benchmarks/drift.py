"""Measure how far a float32 run with two processes drifts from the same run with one.

    python benchmarks/drift.py shards/photos/train --out runs/drift

The batches are the same; sums are rounded in another order. Trains a tiny ViT twice from scratch through `accelerate
launch` and prints a JSON line for chosen steps: the losses and their difference. Equality is only promised for the
first 20 steps.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

import mcl_clip as mcl
from mcl_clip.core.errors import run_program
from mcl_clip.core.files import read_jsonl

RECIPE = mcl.RunConfig(
    run_dir=Path("runs/drift"),
    tower=mcl.TowerConfig(
        model={
            "embed_dim": 64,
            "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32},
            "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
        }
    ),
    stages=(
        mcl.StageConfig(
            train=mcl.TrainConfig(steps=600, global_batch_size=128, lr=1e-3, warmup_steps=60),
            cluster=mcl.ClusterConfig(num_clusters=10),
        ),
    ),
    machine=mcl.MachineConfig(workers=1, threads=1, log_steps=1),
)


def drift(shards: str, /, *, out: Path, steps: int = 600, report: Sequence[int] = (1, 10, 20, 100, 300, 600)) -> None:
    """Train at one and at two processes and compare.

    Args:
        shards: training shards.
        out: folder of the two runs.
        steps: length of the runs.
        report: steps to print.
    """
    for processes in (1, 2):
        kind = ["--multi_gpu"] if processes > 1 else []
        command = [sys.executable, "-m", "accelerate.commands.launch", *kind, "--num_processes", str(processes)]
        own = [__file__, "run", "--data.train", shards, "--run-dir", str(out / f"processes-{processes}")]
        subprocess.run([*command, *own, "--stages.0.train.steps", str(steps)], check=True, stdout=sys.stderr)
    runs = [read_jsonl(out / f"processes-{processes}" / "stage-0/train/metrics.jsonl") for processes in (1, 2)]
    losses = [{record["step"]: record["loss"] for record in run if "loss" in record} for run in runs]
    differences = {step: abs(losses[0][step] - losses[1][step]) for step in losses[0]}
    first = max(differences[step] for step in range(1, min(21, steps + 1)))
    print(json.dumps({"largest_difference_of_first_20": first}))
    for step in (step for step in report if step in differences):
        print(json.dumps({"step": step, "loss": [run[step] for run in losses], "difference": differences[step]}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["run"]:
        del sys.argv[1]
        mcl.main(RECIPE)
    else:
        run_program(lambda: tyro.cli(drift, description=__doc__))
