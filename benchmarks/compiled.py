"""Measure when `--stages.K.train.compiled` pays: step time with and without `torch.compile`, and steps to break even.

    python benchmarks/compiled.py --model ViT-B-32 --batch 16

Runs forward and backward on random images and `--tokens` tokens, alternating both variants in this process; prints a
JSON line with CPU seconds (on a GPU, seconds). The first compiled step includes the compilation. torch caches
compilations on disk, so this program uses an empty cache folder.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial

import open_clip
import torch
import tyro
from torch import Tensor, nn

from mcl_clip.core.distributed import torch_generator
from mcl_clip.core.errors import run_program
from mcl_clip.model.clip import autocast, create_clip
from mcl_clip.model.prepare import prepare_training


def compiled(
    *,
    model: str = "ViT-B-32",
    batch: int = 16,
    tokens: int = 24,
    rounds: int = 5,
    device: str = "cpu",
    precision: str = "fp32",
) -> None:
    """Measure both ways.

    Args:
        model: name of the architecture.
        batch: pairs of a step.
        tokens: of each text.
        rounds: steps of either way, in turn.
        device: cpu or cuda.
        precision: fp32 or bf16.
    """
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled_")
    where = torch.device(device)
    draw = torch_generator("compiled benchmark")
    images = torch.randn(batch, 3, 224, 224, generator=draw).to(where)
    texts = torch.randint(1, 49_000, (batch, tokens), generator=draw).to(where)
    ways: dict[str, Callable[[], None]] = {}
    for way in ("plain", "compiled"):
        tower = create_clip(architecture=model)
        tower.model.to(where).train()
        prepare_training(tower.model, compiled=way == "compiled", patch_dropout=0, grad_checkpointing=False)

        ways[way] = partial(step, tower.model, images, texts, precision)
    first = {way: seconds_of(run, where) for way, run in ways.items()}
    later: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, run in ways.items():
            later[way].append(seconds_of(run, where))
    a_step = {way: statistics.median(times) for way, times in later.items()}
    gained = statistics.median(a - b for a, b in zip(later["plain"], later["compiled"], strict=True))
    record = {
        "model": model,
        "batch": batch,
        "device": device if device == "cpu" else torch.cuda.get_device_name(where),
        "precision": precision,
        "seconds_a_step": {way: round(seconds, 3) for way, seconds in a_step.items()},
        "ratio": round(statistics.median(a / b for a, b in zip(later["plain"], later["compiled"], strict=True)), 3),
        "seconds_to_compile": round(first["compiled"] - a_step["compiled"], 1),
        "steps_until_gained": round((first["compiled"] - a_step["compiled"]) / gained) if gained > 0 else None,
        "cores": os.cpu_count(),
        "versions": {"torch": torch.__version__, "open_clip": open_clip.__version__},
    }
    print(json.dumps(record))


def step(towers: nn.Module, images: Tensor, texts: Tensor, precision: str) -> None:
    """Forward and backward."""
    with autocast(precision, images.device):
        out = towers(images, texts)
    (out["image_features"] @ out["text_features"].T).diagonal().float().sum().backward()
    towers.zero_grad(set_to_none=True)


def seconds_of(run: Callable[[], None], device: torch.device) -> float:
    """Of the processor, or until a GPU is done."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    started = clock()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - started


if __name__ == "__main__":
    run_program(lambda: tyro.cli(compiled))
