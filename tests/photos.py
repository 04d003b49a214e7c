"""Pictures that look like photos as far as their hashes go: smooth random colors, all different."""

import io
from pathlib import Path

import numpy as np
from PIL import Image


def photo(number: int, *, quality: int = 90, size: tuple[int, int] = (48, 36), format: str = "JPEG") -> bytes:
    """Picture `number` as a file; another quality or size gives a near duplicate."""
    coarse = np.random.default_rng(number).integers(0, 256, (6, 8, 3), np.uint8)
    image = Image.fromarray(coarse).resize((48, 36), Image.Resampling.BICUBIC).resize(size, Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, format, **({"quality": quality} if format == "JPEG" else {}))
    return file.getvalue()


def write_photos(folder: Path, numbers: range) -> list[str]:
    """Write pictures to a folder; return their names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{number:03d}.jpg" for number in numbers]
    for number, name in zip(numbers, names, strict=True):
        (folder / name).write_bytes(photo(number))
    return names
