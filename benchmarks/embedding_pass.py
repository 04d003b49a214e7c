"""Measure the embedding pass in images per second beside a loop over open_clip, on the same shards with the same model.

    python benchmarks/embedding_pass.py shards/photos/train --open-clip-python PEER/bin/python

PEER is an environment with `open_clip_torch[training]`. Ours is the phase `embed` of `recipes/cc12m_vit_b32.py` with a
stage of no steps; theirs is the loop that one would write with open_clip: its WebDataset loader without shuffling, its
evaluation transform, `encode_image` and `encode_text` in inference mode, and one file at the end. Both read a tower
with random weights from the same folder, in float32, and embed each image with its first caption. Each round starts
one process per side, alternating. The time is that of the whole phase, with loading the tower and starting the
workers, by the clock of this program; `cpu_ratio` compares CPU seconds, which other programs on the same cores disturb
less. Prints the difference of the mean unit features of the two sides: ours are stored in float16. Prints a JSON line,
in about 8 minutes on two cores. With `--device cuda` it has not been run.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from safetensors.numpy import load_file
from watch import (
    Mark,
    Program,
    between,
    cut_shards,
    machine,
    medians,
    ratios,
    threads_and_device,
    watch,
)

from mcl_clip.core.errors import UserError, run_program
from mcl_clip.model.clip import create_clip, save_clip

RECIPE = Path(__file__).parents[1] / "recipes" / "cc12m_vit_b32.py"
BEGUN, DONE = "STARTED.json", "DONE.json"  # of a phase
PEER_BEGUN, PEER_DONE = "the pass begins", "the pass is done"
FEATURES = "features.npz"
PEER = f"""
import sys, types
import numpy as np
import open_clip, torch
from open_clip_train.data import get_wds_dataset
folder, shards, out, device = sys.argv[1:5]
rows, batch, workers = map(int, sys.argv[5:])
print({PEER_BEGUN!r}, flush=True)
model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{{folder}}", device=device)
model.eval()
arguments = types.SimpleNamespace(val_data=shards, val_num_samples=rows, batch_size=batch, workers=workers)
arguments.train_data_upsampling_factors = None
data = get_wds_dataset(arguments, transform, False, tokenizer=open_clip.get_tokenizer(f"local-dir:{{folder}}"))
found = []
with torch.inference_mode():
    for images, texts in data.dataloader:
        sides = model.encode_image(images.to(device)), model.encode_text(texts.to(device))
        found.append([features.cpu().numpy() for features in sides])
np.savez(out, **{{side: np.concatenate(parts) for side, parts in zip(("image", "text"), zip(*found))}})
print({PEER_DONE!r}, flush=True)
"""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What both sides are given."""

    folder: Path
    shards: str
    rows: int
    batch: int
    workers: int
    device: str
    environment: dict[str, str]


def embedding_pass(
    shards: Path,
    /,
    *,
    open_clip_python: Path,
    model: str = "ViT-B-32",
    batch: int = 64,
    workers: int = 2,
    rows: int = 640,
    rounds: int = 3,
    threads: int = os.cpu_count() or 1,
    device: Literal["cpu", "cuda"] = "cpu",
) -> None:
    """Measure both sides.

    Args:
        shards: a folder of shards with one JPEG and a .txt a sample.
        open_clip_python: interpreter of the environment with open_clip_train.
        model: name of the architecture.
        batch: pictures of a forward pass.
        workers: loader processes, each with a shard.
        rows: samples that are embedded, from the start of the shards; at least 40.
        rounds: times that both sides run, in turn.
        threads: of either side's main process.
        device: cpu or cuda.
    """
    with tempfile.TemporaryDirectory(prefix="embedding_pass_") as name:
        folder = Path(name)
        pattern = cut_shards(shards, folder / "shards", rows=rows, number=max(1, workers))
        save_clip(create_clip(architecture=model), folder / "tower")
        setting = Setting(
            folder=folder,
            shards=pattern,
            rows=rows,
            batch=batch,
            workers=workers,
            device=device,
            environment=threads_and_device(threads, device),
        )
        sides: dict[str, Callable[[Path], Program]] = {
            "ours": lambda out: ours(setting, out),
            "open_clip": lambda out: peer(setting, open_clip_python, out),
        }
        spent: dict[str, list[Mark]] = {side: [] for side in sides}
        for number in range(rounds):
            for side, program_of in sides.items():
                marks = watch(program_of(folder / f"{side}-{number}"), 2, folder / f"{side}-{number}.log")
                spent[side].append(between(marks, 0, 1))
        difference = mean_difference(folder / "ours-0" / "stage-0" / "embed", folder / "open_clip-0", rows)
    per_s = {side: [rows / mark.seconds for mark in marks] for side, marks in spent.items()}
    cpu_s = {side: [mark.cpu_seconds / rows for mark in marks] for side, marks in spent.items()}
    record = {
        "model": model,
        "device": device,
        "batch": batch,
        "rows": rows,
        "rounds": rounds,
        "images_per_s": medians(per_s),
        "ratio": ratios(per_s["ours"], per_s["open_clip"]),
        "cpu_s_per_image": medians(cpu_s, 4),
        "cpu_ratio": ratios(cpu_s["open_clip"], cpu_s["ours"]),
        "mean_feature_difference": difference,
        **machine(),
    }
    print(json.dumps(record))


def ours(setting: Setting, out: Path) -> Program:
    """Our side: the recipe, to the end of its phase `embed`."""
    phase = out / "stage-0" / "embed"
    command = [
        *(sys.executable, str(RECIPE), "--run-dir", str(out), "--data.train", setting.shards),
        *("--tower.architecture", f"local-dir:{setting.folder / 'tower'}", "--num-stages", "1"),
        *("--stages.0.train.steps", "0", "--stages.0.train.precision", "fp32"),
        *("--eval.batch-size", str(setting.batch), "--machine.workers", str(setting.workers)),
    ]
    return Program(
        command=command,
        marks=lambda _: sum((phase / marker).exists() for marker in (BEGUN, DONE)),
        environment=setting.environment,
    )


def peer(setting: Setting, python: Path, out: Path) -> Program:
    """Run the embedding loop of open_clip."""
    out.mkdir()
    places = [str(setting.folder / "tower"), setting.shards, str(out / FEATURES), setting.device]
    sizes = [str(size) for size in (setting.rows, setting.batch, setting.workers)]
    return Program(
        command=[str(python), "-c", PEER, *places, *sizes],
        marks=lambda said: sum(mark in said for mark in (PEER_BEGUN, PEER_DONE)),
        environment=setting.environment,
    )


def mean_difference(ours: Path, theirs: Path, rows: int) -> dict[str, float]:
    """Return the largest difference, over dimensions, between the mean unit features of the two sides.

    Raises:
        UserError: if a side has embedded another number of rows.
    """
    parts = [load_file(path) for path in sorted(ours.glob("part-*.safetensors"))]
    found = {}
    with np.load(theirs / FEATURES) as peer:
        for side in ("image", "text"):
            mine = np.concatenate([part[side] for part in parts]).astype(np.float64)
            other = peer[side] / np.linalg.norm(peer[side], axis=1, keepdims=True)
            if len(mine) != rows or len(other) != rows:
                raise UserError(
                    f"of {rows} rows {len(mine)} and {len(other)} are embedded; use shards without bad rows"
                )
            found[side] = float(np.abs(mine.mean(0) - other.mean(0)).max())
    return found


if __name__ == "__main__":
    run_program(lambda: tyro.cli(embedding_pass))
