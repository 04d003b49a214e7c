"""Time of four stages of a ViT whose upper blocks alone differ, over their shared trunk and apart.

    python benchmarks/shared_trunk.py

The stages are copies of one ViT-B/32 with random weights; in all but the first the last quarter of blocks is changed,
as after fine-tuning with the lower blocks locked. `apart` runs `encode_image` of each; `trunk` is MultistageCLIP's own
way; both are run in turn, and the median of the ratios counts. Prints a JSON line: seconds per image, the ratio, what
the number of blocks lets expect, and the largest difference of features.
"""

import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import open_clip
import torch
import tyro

from mcl_clip.core.distributed import torch_generator
from mcl_clip.core.errors import run_program
from mcl_clip.model.clip import create_clip
from mcl_clip.model.multistage import MultistageCLIP


def compare(
    *, architecture: str = "ViT-B-32", stages: int = 4, share: float = 0.25, batch: int = 8, rounds: int = 7
) -> None:
    """Measure both ways.

    Args:
        architecture: an open_clip name with a ViT of open_clip's own.
        stages: encoders.
        share: of the blocks that differ.
        batch: images of a forward pass.
        rounds: repetitions of both ways in turn.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    towers = [create_clip(architecture=architecture, seed=0) for _ in range(stages)]
    encoders: list[Any] = [tower.model for tower in towers]
    blocks = len(encoders[0].visual.transformer.resblocks)
    changed = round(share * blocks)
    for number, encoder in enumerate(encoders[1:], 1):
        generator = torch_generator("benchmark", number)
        with torch.no_grad():
            for block in list(encoder.visual.transformer.resblocks)[blocks - changed :]:
                for parameter in block.parameters():
                    parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.01)
    model = MultistageCLIP(
        encoders,
        logit_scale=1.0,
        preprocess_cfg=towers[0].preprocess_cfg,
        model_cfgs=[tower.model_cfg for tower in towers],
    )
    model.to(device).eval()
    size = towers[0].preprocess_cfg["size"]
    images = torch.randn(batch, 3, size, size, generator=torch_generator("benchmark", "images")).to(device)

    def apart() -> list[torch.Tensor]:
        return [stage.encode_image(images) for stage in encoders]

    def over_trunk() -> list[torch.Tensor]:
        return model.encode_image_stages(images)

    with torch.inference_mode():
        pairs = zip(apart(), over_trunk(), strict=True)
        difference = max(float((one - other).abs().max()) for one, other in pairs)
        times = [(_seconds(apart, device), _seconds(over_trunk, device)) for _ in range(rounds)]
    record = {
        "architecture": architecture,
        "stages": stages,
        "blocks": blocks,
        "changed_blocks": changed,
        "shared_blocks": model.shared_blocks,
        "batch": batch,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "apart_s_per_image": statistics.median(one for one, _ in times) / batch,
        "trunk_s_per_image": statistics.median(other for _, other in times) / batch,
        "ratio": statistics.median(other / one for one, other in times),
        "ratio_of_blocks": (blocks + (stages - 1) * changed) / (stages * blocks),
        "largest_difference": difference,
        "versions": {"torch": torch.__version__, "open_clip": open_clip.__version__},
    }
    print(json.dumps(record))


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    run_program(lambda: tyro.cli(compare))
