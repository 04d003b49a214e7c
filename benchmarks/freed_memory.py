"""Measure what it costs on the CPU to return freed memory to the system: towers with and without `keep_freed_memory`.

    python benchmarks/freed_memory.py

Each round starts one process per side for each tower, alternating. Prints a JSON line for each tower and pass, with CPU
seconds per image, which other programs on the same cores disturb least, their ratio, and the peak memory of either
side in GB. Needs glibc. Measured on two cores: a forward pass of EfficientNet-Lite0 2.8 times as fast, with 1.59 GB in
place of 1.45.
"""

import json
import resource
import subprocess
import sys
from typing import Literal

import timm
import torch
import tyro
from watch import machine, medians, ratios

from mcl_clip.core.errors import run_program
from mcl_clip.core.memory import keep_freed_memory

TOWERS = ("tf_efficientnet_lite0", "resnet50", "vit_base_patch32_clip_224")  # of timm


def freed_memory(
    *, towers: tuple[str, ...] = TOWERS, batch: int = 32, passes: int = 3, rounds: int = 3, threads: int = 1
) -> None:
    """Measure all towers of timm that are named.

    Args:
        towers: architectures of timm, with random weights.
        batch: pictures of a pass.
        passes: measured passes of a process, after one to warm up.
        rounds: processes of each side.
        threads: of each process.
    """
    for tower in towers:
        for kind in ("forward", "step"):
            found: dict[str, list[dict[str, float]]] = {"kept": [], "returned": []}
            for _ in range(rounds):
                for side, results in found.items():
                    arguments = [tower, kind, side, str(batch), str(passes), str(threads)]
                    command = [sys.executable, __file__, "--one", *arguments]
                    results.append(json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout))
            cpu_s = {side: [result["cpu_s"] for result in results] for side, results in found.items()}
            record = {
                "tower": tower,
                "pass": kind,
                "batch": batch,
                "cpu_s_per_image": medians(cpu_s, 4),
                "cpu_ratio": ratios(cpu_s["returned"], cpu_s["kept"]),
                "peak_gb": medians({side: [result["peak_gb"] for result in found[side]] for side in found}, 2),
                **machine(),
            }
            print(json.dumps(record), flush=True)


def measure(
    tower: str, kind: Literal["forward", "step"], side: Literal["kept", "returned"], batch: int, passes: int
) -> dict[str, float]:
    """Return the CPU seconds per image, and the peak memory, of forward passes or steps of a tower."""
    if side == "kept":
        keep_freed_memory()
    model = timm.create_model(tower, num_classes=0).train(kind == "step")
    images = torch.randn(batch, 3, 224, 224)
    before = 0.0
    for number in range(passes + 1):
        if number == 1:
            before = cpu_seconds()
        with torch.set_grad_enabled(kind == "step"):
            features = model(images)
        if kind == "step":
            features.square().mean().backward()
            model.zero_grad()
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {"cpu_s": (cpu_seconds() - before) / passes / batch, "peak_gb": peak_gb}


def cpu_seconds() -> float:
    """Return the CPU time of this process, that of the system included."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def one(arguments: list[str]) -> None:
    """Measure one side of one tower in this process, and print it."""
    tower, kind, side, batch, passes, threads = arguments
    torch.set_num_threads(int(threads))
    print(json.dumps(measure(tower, kind, side, int(batch), int(passes))))  # type: ignore[arg-type]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one(sys.argv[2:])
    else:
        run_program(lambda: tyro.cli(freed_memory))
