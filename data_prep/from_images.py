"""Write shards of images alone, without captions, from a folder of image files.

    python data_prep/from_images.py photos shards/photos

writes OUT/000000.tar and so on with an index. A run without a text tower (`--tower.image timm:NAME`, no `--tower.text`)
learns from them. Folders of images for each class are a set for its probes as they are: --eval.sets FOLDER.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Annotated

import tyro
from from_table import READ_AHEAD, shrink

from mcl_clip.core.errors import UserError, run_program
from mcl_clip.data.tables import IMAGES
from mcl_clip.data.writing import LoneImage, clean_key, refuse_non_empty, write_images


def make_from_images(
    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")],
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    *,
    max_side_px: int | None = None,
    max_bad_fraction: float = 0.01,
    samples_per_shard: int = 1000,
    threads: int = 8,
) -> None:
    """Write shards of images alone from the image files in a folder, at any depth, in the order of their paths.

    Args:
        folder: Folder of image files; hidden ones are left out.
        out: Folder to make; must be empty or not exist.
        max_side_px: Shrink larger images until their longer side has this many pixels (bicubic, upright, JPEG quality
            95); otherwise image files are stored byte for byte.
        max_bad_fraction: Part of the images, from 0 to 1, that may be unreadable.
        samples_per_shard: Number of samples in a tar file.
        threads: Files read at the same time.

    Raises:
        UserError: if there is no such folder, or no image in it.
    """
    refuse_non_empty(out)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; name a folder of image files")
    paths = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in IMAGES and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not paths:
        raise UserError(f"{folder} has no image files; it must hold some of {', '.join(IMAGES)}, at any depth")

    def read(path: Path) -> LoneImage:
        name, data = path.relative_to(folder).as_posix(), path.read_bytes()
        return LoneImage(
            key=clean_key(name), image=data if max_side_px is None else shrink(data, max_side_px), source=name
        )

    def samples() -> Iterator[LoneImage]:
        with ThreadPoolExecutor(max(1, threads)) as pool:
            numbered = iter(paths)
            while part := list(islice(numbered, READ_AHEAD)):
                yield from pool.map(read, part)

    write_images(
        samples(), out, samples_per_shard=samples_per_shard, total=len(paths), max_bad_fraction=max_bad_fraction
    )


if __name__ == "__main__":
    run_program(lambda: tyro.cli(make_from_images))
