"""Compare the pixels that a model is trained on with those of every way to use it, by format and mode of the files.

    python benchmarks/image_modes.py photos/ --count 100

Saves the photos of a folder in each format and mode, and reads every file as training does (`decode_image`), and with
the transform of `mcl_clip.load`, the processor of exported models, plain open_clip, and transformers' CLIPProcessor.
Prints a JSON line for each: the mean cosine between the normalized pixels of training and of use, and the share of
photos whose nearest photo of training is their own.
"""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import open_clip
import torch
import tyro
from PIL import Image, features
from torch import Tensor
from transformers import CLIPImageProcessor

from mcl_clip.core.errors import UserError, run_program
from mcl_clip.data.decode import evaluation_transform
from mcl_clip.model.clip import to_floats
from mcl_clip.model.image_transform import ORIENTATION, make_image_transform
from mcl_clip.model.processing_multistage_clip import MultistageCLIPImageProcessor

SIZE_PX = 96  # smaller than photos, so that each way has to resize them
CFG = {"size": SIZE_PX, "mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}


def compare_ways(folder: Annotated[Path, tyro.conf.Positional], *, count: int = 50) -> None:
    """Print the agreement of training and use for `count` photos of a folder.

    Args:
        folder: Folder with .jpg files.
        count: Number of photos.
    """
    paths = sorted(folder.glob("*.jpg"))[:count]
    if len(paths) < 2:
        raise UserError(f"{folder} has {len(paths)} .jpg files; name a folder with at least two")
    photos = [Image.open(path).convert("RGB") for path in paths]
    for name, save in savers().items():
        files = [save(photo) for photo in photos]
        trained = torch.stack([to_floats(evaluation_transform(CFG).decode(data)[None], CFG)[0] for data in files])
        for way, transform in ways().items():
            used = torch.stack([transform(Image.open(io.BytesIO(data))) for data in files])
            cosines = _unit(used) @ _unit(trained).T
            nearest = (cosines.argmax(1) == torch.arange(len(files))).float().mean()
            figures = {"cosine": round(float(cosines.diag().mean()), 4), "own_is_nearest": round(float(nearest), 2)}
            print(json.dumps({"file": name, "way": way, "photos": len(files), **figures}))


def ways() -> dict[str, Callable[[Image.Image], Tensor]]:
    """Return the ways to use a model, by name: each maps a PIL image to normalized pixels."""
    size = {"height": SIZE_PX, "width": SIZE_PX}
    processors: dict[str, Any] = {
        "exported processor": MultistageCLIPImageProcessor(size, image_mean=CFG["mean"], image_std=CFG["std"]),
        "transformers CLIPProcessor": CLIPImageProcessor(size={"shortest_edge": SIZE_PX}, crop_size=size),
    }
    return {
        "mcl_clip.load": make_image_transform(CFG),
        "plain open_clip": open_clip.image_transform(SIZE_PX, is_train=False, mean=CFG["mean"], std=CFG["std"]),
        **{
            name: lambda image, processor=processor: processor(image, return_tensors="pt")["pixel_values"][0]
            for name, processor in processors.items()
        },
    }


def savers() -> dict[str, Callable[[Image.Image], bytes]]:
    """Return functions that save a photo in a format and mode, by name."""

    def turned(photo: Image.Image) -> bytes:
        exif = Image.Exif()
        exif[ORIENTATION] = 6  # the stored pixels have to be turned clockwise
        return _encoded(photo.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif)

    def translucent(photo: Image.Image) -> Image.Image:
        alpha = np.linspace(0, 255, photo.width).astype(np.uint8)
        photo.putalpha(Image.fromarray(np.tile(alpha, (photo.height, 1))))
        return photo

    def sixteen_bits(photo: Image.Image) -> Image.Image:
        return Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257)

    found: dict[str, Callable[[Image.Image], bytes]] = {
        "JPEG RGB": lambda photo: _encoded(photo, "JPEG"),
        "JPEG RGB, EXIF orientation": turned,
        "JPEG L": lambda photo: _encoded(photo.convert("L"), "JPEG"),
        "JPEG CMYK": lambda photo: _encoded(photo.convert("CMYK"), "JPEG"),
        "PNG RGB": lambda photo: _encoded(photo, "PNG"),
        "PNG RGBA, translucent": lambda photo: _encoded(translucent(photo.copy()), "PNG"),
        "PNG LA, translucent": lambda photo: _encoded(translucent(photo.convert("L")), "PNG"),
        "PNG P": lambda photo: _encoded(photo.convert("P", palette=Image.Palette.ADAPTIVE), "PNG"),
        "PNG 1": lambda photo: _encoded(photo.convert("1"), "PNG"),
        "PNG I;16": lambda photo: _encoded(sixteen_bits(photo), "PNG"),
        "WEBP RGBA, translucent": lambda photo: _encoded(translucent(photo.copy()), "WEBP"),
        "GIF P": lambda photo: _encoded(photo, "GIF"),
        "BMP RGB": lambda photo: _encoded(photo, "BMP"),
    }
    if "avif" in features.get_supported():
        found["AVIF RGB"] = lambda photo: _encoded(photo, "AVIF")
    return found


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _unit(pixels: Tensor) -> Tensor:
    return torch.nn.functional.normalize(pixels.flatten(1), dim=1)


if __name__ == "__main__":
    run_program(lambda: tyro.cli(compare_ways))
