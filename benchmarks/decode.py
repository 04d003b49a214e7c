"""Measure decoding from JPEG to training pixels on one core: images per second beside open_clip's transform on Pillow.

    python benchmarks/decode.py
    python benchmarks/decode.py --data photos --model runs/photos

Random JPEGs of quality 87 (blurred noise with grain) of 256 x 256, 512 x 384 and 1024 x 768 pixels, to random crops of
224 x 224 of at least 0.9 of the area. open_clip makes normalised floats; here the pixels stay bytes until they are on
the device, so `with_floats` adds the same two steps. All variants alternate; prints a JSON line per size with the
median of the ratios of CPU time. With a folder of JPEGs and a model it also prints how far fast pixels move the
features of the same crops from those of exact ones, beside how far another crop moves them.
"""

import io
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import PIL
import simplejpeg
import torch
import tyro
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mcl_clip.core.distributed import random_words
from mcl_clip.core.errors import run_program
from mcl_clip.data.decode import TrainTransform
from mcl_clip.model.clip import to_floats
from mcl_clip.model.multistage import MultistageCLIP
from mcl_clip.model.resolve import find_models

SIZES = ((256, 256), (512, 384), (1024, 768))
SIZE_PX, SCALE = 224, (0.9, 1.0)
CFG = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}


def decode(*, pictures: int = 24, rounds: int = 7, data: Path | None = None, model: str = "") -> None:
    """Measure all sizes.

    Args:
        pictures: of each size.
        rounds: times that all ways run in turn.
        data: a folder of JPEGs, to compare features.
        model: the model for that, see `mcl-clip eval`.
    """
    torch.set_num_threads(1)
    peer = open_clip.image_transform(SIZE_PX, is_train=True, aug_cfg={"scale": SCALE})
    fast, exact = (TrainTransform(size_px=(SIZE_PX, SIZE_PX), scale=SCALE, jpeg=how) for how in ("fast", "exact"))
    ways: dict[str, Callable[[bytes, int], object]] = {
        "open_clip": lambda file, _: peer(Image.open(io.BytesIO(file))),
        "fast": fast.decode,
        "fast_with_floats": lambda file, number: to_floats(fast.decode(file, number)[None], CFG),
        "exact": exact.decode,
    }
    for width, height in SIZES:
        files = [drawn_jpeg(width, height, number) for number in range(pictures)]
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, way in ways.items():
                started = time.process_time()
                for number, file in enumerate(files):
                    way(file, number)
                seconds[name].append(time.process_time() - started)
        record = {
            "size": f"{width} x {height}",
            "bytes": len(files[0]),
            "pictures_per_s": {name: round(pictures / statistics.median(times)) for name, times in seconds.items()},
            "ratio_to_open_clip": {
                name: round(statistics.median(a / b for a, b in zip(seconds["open_clip"], times, strict=True)), 2)
                for name, times in seconds.items()
            },
            "versions": {"Pillow": PIL.__version__, "simplejpeg": simplejpeg.__version__, "torch": torch.__version__},
        }
        print(json.dumps(record), flush=True)
    if data and model:
        print(json.dumps(moved_features(sorted(data.glob("*.jp*g"))[:200], model)))


def drawn_jpeg(width: int, height: int, number: int) -> bytes:
    """Blurred noise with grain, which takes as many bytes as a photo does."""
    words = random_words(width * height // 64 * 3, "drawn JPEG", number)
    coarse = Image.fromarray((words % 256).astype(np.uint8).reshape(height // 8, width // 8, 3))
    grain = (random_words(width * height, "grain", number) % 13).astype(np.int16).reshape(height, width, 1) - 6
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16) + grain
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=87)
    return buffer.getvalue()


@torch.inference_mode()
def moved_features(paths: list[Path], name: str) -> dict[str, object]:
    """Cosines of the features of fast pixels, and of another crop, with those of exact pixels."""
    loaded = find_models(name)[0].load()
    model: Any = loaded if isinstance(loaded, MultistageCLIP) else loaded.model.eval()
    size = loaded.preprocess_cfg["size"]
    size_px = (size, size) if isinstance(size, int) else tuple(size)
    files = [path.read_bytes() for path in paths]

    def features(how: str, draw: int) -> Tensor:
        transform = TrainTransform(size_px=size_px, scale=SCALE, jpeg=how)
        pixels = [transform.decode(file, number, draw) for number, file in enumerate(files)]
        return F.normalize(model.encode_image(to_floats(torch.stack(pixels), loaded.preprocess_cfg)))

    exact = features("exact", 0)
    cosines = {"fast": (features("fast", 0) * exact).sum(1), "another_crop": (features("exact", 1) * exact).sum(1)}
    return {
        "model": Path(name).name,
        "pictures": len(files),
        **{f"cosine_{how}": {"mean": float(c.mean()), "least": float(c.min())} for how, c in cosines.items()},
    }


if __name__ == "__main__":
    run_program(lambda: tyro.cli(decode))
