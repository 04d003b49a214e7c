"""Classification sets as folders of image files, one folder a class (torchvision's ImageFolder)."""

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import open_clip

from mcl_clip.data.samples import IMAGE_FORMATS
from mcl_clip.errors import UserError
from mcl_clip.eval.embed import FileImages
from mcl_clip.eval.tasks.classification import CLASSNAMES, TEMPLATES, ClassificationSet, read_lines, read_templates

UNREADABLE = ("bmp", "gif", "pgm", "ppm", "tif", "tiff")
WORDNET_ID = re.compile(r"n\d{8}")
IMAGENET_ENDS = ("n01440764", "n15075141")  # the first and the last of its 1,000 classes


def class_folders(root: Path) -> list[Path]:
    """The folders in `root` that hold image files, in the order of their names, which is that of the labels."""
    folders = (path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    return sorted(folder for folder in folders if any(_images(folder)))


def open_image_folder(root: Path) -> ClassificationSet:
    """The set in `root`/CLASS/*.jpg (also .jpeg, .png and .webp).

    The names of the classes are in classnames.txt, one a line in the sorted order of the folders; without it they are
    the names of the folders, or ImageNet's where those are its 1,000 WordNet ids. Templates are in
    zeroshot_classification_templates.txt; without it they are open_clip's 80 for ImageNet, and its 7 simple ones else.

    Raises:
        UserError: if there are fewer than two classes, names and folders do not fit together, or an image is of another
            format.
    """
    folders = class_folders(root)
    if len(folders) < 2:
        raise UserError(f"{root} holds {len(folders)} folders with images; a classification set has one for each class")
    files = [sorted(_images(folder)) for folder in folders]
    paths = [path for paths in files for path in paths]
    if wrong := [path for path in paths if _suffix(path.name) in UNREADABLE]:  # the rest would not be comparable
        raise UserError(f"{wrong[0]} is not one of {', '.join(IMAGE_FORMATS)}; convert it, or take it away")
    labels = np.repeat(np.arange(len(folders)), [len(paths) for paths in files])
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.parent.name}/{path.name}\0{path.stat().st_size}\n".encode(errors="surrogateescape"))
    is_imagenet = not (root / CLASSNAMES).is_file() and _is_imagenet(root, [folder.name for folder in folders])
    return ClassificationSet(
        FileImages(tuple(paths)),
        labels,
        tuple(open_clip.IMAGENET_CLASSNAMES) if is_imagenet else _classnames(root, folders),
        _templates(root, is_imagenet),
        digest.hexdigest(),
    )


def _images(folder: Path) -> Iterator[Path]:
    """The image files in a folder, in no order, also those that cannot be read here."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if _suffix(entry.name) in (*IMAGE_FORMATS, *UNREADABLE) and entry.name[0] != "." and entry.is_file():
                yield Path(entry)


def _suffix(name: str) -> str:
    return name.rpartition(".")[2].lower()


def _classnames(root: Path, folders: list[Path]) -> tuple[str, ...]:
    if not (root / CLASSNAMES).is_file():
        return tuple(folder.name.replace("_", " ") for folder in folders)
    names = read_lines(root / CLASSNAMES)
    if len(names) != len(folders):
        raise UserError(
            f"{root / CLASSNAMES} has {len(names)} names for {len(folders)} folders with images; write one name a "
            f"line in the sorted order of the folders"
        )
    return names


def _is_imagenet(root: Path, names: list[str]) -> bool:
    """Whether folders are the 1,000 classes of ImageNet, whose sorted ids are the order of its names.

    Raises:
        UserError: if they are other WordNet ids.
    """
    if not all(WORDNET_ID.fullmatch(name) for name in names):
        return False
    if len(names) != len(open_clip.IMAGENET_CLASSNAMES) or (names[0], names[-1]) != IMAGENET_ENDS:
        raise UserError(
            f"the {len(names)} folders in {root} are WordNet ids, but not the 1,000 of ImageNet; write their names, "
            f"one a line in the sorted order of the ids, into {root / CLASSNAMES}"
        )
    return True


def _templates(root: Path, is_imagenet: bool) -> tuple[str, ...]:
    if (root / TEMPLATES).is_file():
        return read_templates(root)
    templates = open_clip.OPENAI_IMAGENET_TEMPLATES if is_imagenet else open_clip.SIMPLE_IMAGENET_TEMPLATES
    return tuple(template("{c}") for template in templates)
