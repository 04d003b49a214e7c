"""Which evaluation set a folder holds, by its layout."""

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import open_clip

from mcl_clip.core.errors import UserError
from mcl_clip.data.tar import IMAGE_FORMATS
from mcl_clip.eval.classification import (
    CLASSNAMES,
    TEMPLATES,
    ClassificationSet,
    ClassificationTask,
    MultilabelTask,
    open_multilabel,
    read_lines,
    read_templates,
)
from mcl_clip.eval.embed import FileImages
from mcl_clip.eval.pairs import PairSet, PairTask
from mcl_clip.eval.retrieval import RetrievalSet, RetrievalTask
from mcl_clip.eval.task import Task

LEVELS_BELOW = 2
OPENERS: dict[str, Callable[[str, Path], Task]] = {
    "pairs": lambda name, root: PairTask(name, PairSet.open(root)),
    "retrieval": lambda name, root: RetrievalTask(name, RetrievalSet.open(root)),
    "multilabel": lambda name, root: MultilabelTask(name, open_multilabel(root)),
    "classification": lambda name, root: ClassificationTask(name, ClassificationSet.open(root)),
    "image folder": lambda name, root: ClassificationTask(name, open_image_folder(root)),
}
LOOKED_FOR = (
    "pairs.json, dataset_type.txt, classnames.txt, test/nshards.txt, tar files with captions, or a folder of images "
    "for each class"
)
UNREADABLE = ("bmp", "gif", "pgm", "ppm", "tif", "tiff")
WORDNET_ID = re.compile(r"n\d{8}")
IMAGENET_ENDS = ("n01440764", "n15075141")  # the first and the last of its 1,000 classes


def open_set(root: Path, name: str = "") -> Task:
    """The evaluation set in `root`, called `name` or like its folder.

    Raises:
        UserError: if there is none, or it is not whole.
    """
    if not root.is_dir():
        raise UserError(f"there is no folder {root}; name the folder of an evaluation set")
    layout = layout_of(root) or _layout_of_shards(root)
    if not layout:
        raise UserError(f"{root} is not an evaluation set: it has no {LOOKED_FOR}")
    return OPENERS[layout](name or root.resolve().name, root)


def layout_of(root: Path) -> str:
    """A key of `OPENERS`, by the files in `root`; empty if they are not those of a set.

    Raises:
        UserError: for a dataset_type.txt that holds another word.
    """
    if (root / "pairs.json").is_file():
        return "pairs"
    if (root / "dataset_type.txt").is_file():
        word = (root / "dataset_type.txt").read_text(encoding="utf-8").strip()
        if word not in ("retrieval", "multilabel"):
            raise UserError(f"{root / 'dataset_type.txt'} holds {word!r}; it must be 'retrieval' or 'multilabel'")
        return word
    has_shards = (root / "test" / "nshards.txt").is_file() or bool(_layout_of_shards(root))
    if not has_shards and len(class_folders(root)) > 1:
        return "image folder"
    if (root / CLASSNAMES).is_file():
        return "classification"
    return "retrieval" if (root / "test" / "nshards.txt").is_file() else ""


def _layout_of_shards(root: Path) -> str:
    return "retrieval" if next(root.glob("*.tar"), None) else ""


def find_sets(root: Path) -> dict[str, Path]:
    """Folders of sets by name: `root` itself, or every set up to two levels below it, named relative to `root`.

    Below `root`, tar files alone do not make a set, for they may be anything, shards to train on too; nor do folders of
    pictures, unless classnames.txt or WordNet ids name the classes.

    Raises:
        UserError: if there is no folder `root`, or no set.
    """
    if not root.is_dir():
        raise UserError(f"there is no folder {root}; name the folder of one evaluation set, or of several")
    if layout_of(root):
        return {root.resolve().name: root}
    if found := {path.relative_to(root).as_posix(): path for path in _sets_below(root, LEVELS_BELOW)}:
        return found
    if _layout_of_shards(root):
        return {root.resolve().name: root}
    raise UserError(
        f"there is no evaluation set in {root} or up to {LEVELS_BELOW} levels below it; looked for {LOOKED_FOR}"
    )


def _names_its_classes(root: Path) -> bool:
    return (root / CLASSNAMES).is_file() or all(WORDNET_ID.fullmatch(folder.name) for folder in class_folders(root))


def _sets_below(root: Path, levels: int) -> Iterator[Path]:
    if not levels:
        return
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")):
        layout = layout_of(folder)
        if layout == "image folder" and not _names_its_classes(folder):
            layout = ""  # folders of pictures may be anything; as ROOT itself they are taken at their word
        if layout:
            yield folder
        else:
            yield from _sets_below(folder, levels - 1)


def discover(root: Path, names: Sequence[str] = ()) -> dict[str, Task]:
    """The sets that `find_sets` finds, opened, or those of them with the given names.

    Raises:
        UserError: if there is none, one of the names is not there, or a set is not whole.
    """
    found = find_sets(root)
    if unknown := [name for name in names if name not in found]:
        raise UserError(f"{root} has no set {', '.join(unknown)}; it has {', '.join(found)}")
    return {name: open_set(found[name], name) for name in dict.fromkeys(names or found)}


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
