"""Find evaluation sets in folders, recognize their layouts, and open them; image folders are read here."""

import hashlib
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path

import numpy as np
import open_clip

from mcl_clip.core.errors import UserError, shorten, shorten_list
from mcl_clip.data.tar import IMAGE_FORMATS, OTHER_IMAGE_FORMATS
from mcl_clip.eval.classification import (
    CLASSNAMES,
    TEMPLATES,
    ClassificationSet,
    ClassificationTask,
    MultilabelTask,
    read_lines,
    read_templates,
)
from mcl_clip.eval.embed import FileImages, find_shards
from mcl_clip.eval.pairs import PairSet, PairTask
from mcl_clip.eval.retrieval import RetrievalSet, RetrievalTask
from mcl_clip.eval.task import Task

MAX_DEPTH = 2
OPENERS: dict[str, Callable[[str, Path], Task]] = {
    "pairs": lambda name, root: PairTask(name, PairSet.open(root)),
    "retrieval": lambda name, root: RetrievalTask(name, _open_retrieval(root)),
    "multilabel": lambda name, root: MultilabelTask(name, ClassificationSet.open(root, is_multilabel=True)),
    "classification": lambda name, root: ClassificationTask(name, ClassificationSet.open(root)),
    "image folder": lambda name, root: ClassificationTask(name, open_image_folder(root)),
}
KNOWN_LAYOUTS = (
    "pairs.json, dataset_type.txt, classnames.txt, test/nshards.txt, tar files with captions, or a folder of images "
    "for each class"
)
SPLITS = {"train", "training", "val", "valid", "validation", "test"}
WORDNET_ID = re.compile(r"n\d{8}")
IMAGENET_ENDS = ("n01440764", "n15075141")  # the first and the last of its 1,000 classes


def open_set(root: Path, name: str = "") -> Task:
    """Open the evaluation set in `root`, named `name` or like its folder.

    Raises:
        UserError: if there is none, or it is incomplete.
    """
    if not root.is_dir():
        raise UserError(f"there is no folder {root}; name the folder of an evaluation set")
    layout = layout_of(root) or ("retrieval" if _has_tar_files(root) else "")
    if not layout:
        raise UserError(f"{root} is not an evaluation set: it has no {KNOWN_LAYOUTS}")
    return OPENERS[layout](name or root.resolve().name, root)


def discover(root: Path, names: Sequence[str] = ()) -> dict[str, Task]:
    """Open the sets that `find_sets` finds, or those of them in `names`.

    Raises:
        UserError: if there is none, one of the names is missing, or a set is incomplete.
    """
    folders = find_sets(root)
    if unknown := [name for name in names if name not in folders]:
        raise UserError(f"{root} has no set {shorten_list(unknown)}; it has {shorten_list(folders)}")
    return {name: open_set(folders[name], name) for name in dict.fromkeys(names or folders)}


def find_sets(root: Path) -> dict[str, Path]:
    """Find the folders of sets by name: `root` itself, or every set up to two levels below it, by its relative path.

    Below `root`, tar files alone do not make a set, because they may be training shards; nor do folders of images,
    unless classnames.txt or WordNet ids name the classes.

    Raises:
        UserError: if there is no folder `root`, or no set.
    """
    if not root.is_dir():
        raise UserError(f"there is no folder {root}; name the folder of one evaluation set, or of several")
    if layout_of(root):
        return {root.resolve().name: root}
    if below := {path.relative_to(root).as_posix(): path for path in _sets_below(root, MAX_DEPTH)}:
        return below
    if _has_tar_files(root):
        return {root.resolve().name: root}
    splits = [folder for folder in _visible_folders(root) if folder.name in SPLITS]
    if splits := [folder for folder in splits if len(_class_folders(folder)) > 1]:
        raise UserError(
            f"{root} holds splits ({shorten_list(folder.name for folder in splits)}) of images in folders of classes; "
            f"name the one to evaluate on, such as {splits[-1]}"
        )
    raise UserError(
        f"there is no evaluation set in {root} or up to {MAX_DEPTH} levels below it; looked for {KNOWN_LAYOUTS}"
    )


def layout_of(root: Path) -> str:
    """Return the key in `OPENERS` of the layout in `root`, or "" for none; tar files alone are none.

    Raises:
        UserError: for a dataset_type.txt with an unknown type.
    """
    if (root / "pairs.json").is_file():
        return "pairs"
    if (root / "dataset_type.txt").is_file():
        dataset_type = (root / "dataset_type.txt").read_text(encoding="utf-8").strip()
        if dataset_type not in ("retrieval", "multilabel"):
            raise UserError(
                f"{root / 'dataset_type.txt'} holds {shorten(repr(dataset_type))}; it must be 'retrieval' "
                f"or 'multilabel'"
            )
        return dataset_type
    has_test_shards = (root / "test" / "nshards.txt").is_file()
    if not has_test_shards and not _has_tar_files(root) and len(_class_folders(root)) > 1:
        return "image folder"
    if (root / CLASSNAMES).is_file():
        return "classification"
    return "retrieval" if has_test_shards else ""


def _has_tar_files(root: Path) -> bool:
    return any(root.glob("*.tar"))


def _sets_below(root: Path, levels: int) -> Iterator[Path]:
    if not levels:
        return
    for folder in _visible_folders(root):
        layout = layout_of(folder)
        if layout == "image folder" and not (folder / CLASSNAMES).is_file():
            # Folders of images may be anything, unless they are named by WordNet ids.
            named = all(WORDNET_ID.fullmatch(path.name) for path in _class_folders(folder))
            layout = layout if named else ""
        if layout:
            yield folder
        else:
            yield from _sets_below(folder, levels - 1)


def _visible_folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _open_retrieval(root: Path) -> RetrievalSet:
    """Open a retrieval set; raise UserError for one of labels, which is no classification set without class names."""
    try:
        with tarfile.open(find_shards(root)[0]) as tar:
            labelled = any(member.name.endswith(".cls") for member in islice(tar, 10))
    except tarfile.TarError:
        labelled = False  # what is wrong is said when the shards are indexed
    if labelled:
        raise UserError(
            f"{root} has labels (.cls) but no {CLASSNAMES}; write the names of the classes into it, one per line in "
            f"the order of the labels"
        )
    return RetrievalSet.open(root)


def open_image_folder(root: Path) -> ClassificationSet:
    """Open a set of images in `root`/CLASS/*.jpg (or another of `IMAGE_FORMATS`).

    Class names are the lines of classnames.txt, in the sorted order of the folders; without that file they are the
    folder names, or ImageNet's for its 1,000 WordNet ids. Templates are in zeroshot_classification_templates.txt;
    without it they are open_clip's 80 for ImageNet, and its 7 simple ones otherwise.

    Raises:
        UserError: if there are fewer than two classes, class names do not match the folders, or an image has an
            unsupported format.
    """
    folders = _class_folders(root)
    if len(folders) < 2:
        raise UserError(f"{root} holds {len(folders)} folders with images; a classification set has one for each class")
    if {folder.name for folder in folders} <= SPLITS:
        raise UserError(
            f"{root} has images in {shorten_list(folder.name for folder in folders)}, which are names of splits, not "
            f"of classes; sort the images of one split into a folder for each class"
        )
    paths_of_class = [sorted(_image_files(folder)) for folder in folders]
    paths = list(chain(*paths_of_class))
    # Left out, such images would make scores incomparable.
    if wrong := [path for path in paths if path.name.rpartition(".")[2].lower() in OTHER_IMAGE_FORMATS]:
        raise UserError(f"{wrong[0]} is not one of {', '.join(IMAGE_FORMATS)}; convert it, or remove it")
    labels = np.repeat(np.arange(len(folders)), list(map(len, paths_of_class)))
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.parent.name}/{path.name}\0{path.stat().st_size}\n".encode(errors="surrogateescape"))
    classnames, default_templates = _classnames_and_templates(root, [folder.name for folder in folders])
    templates = (
        read_templates(root) if (root / TEMPLATES).is_file() else tuple(make("{c}") for make in default_templates)
    )
    return ClassificationSet(FileImages(tuple(paths)), labels, classnames, templates, digest.hexdigest())


def _class_folders(root: Path) -> list[Path]:
    """List the folders in `root` that hold image files, in the sorted order that class indices follow."""
    return [folder for folder in _visible_folders(root) if any(_image_files(folder))]


def _image_files(folder: Path) -> Iterator[Path]:
    """Yield the image files in a folder, unsorted, including those of unsupported formats."""
    formats = (*IMAGE_FORMATS, *OTHER_IMAGE_FORMATS)
    with os.scandir(folder) as entries:
        for entry in entries:
            suffix = entry.name.rpartition(".")[2].lower()
            if suffix in formats and entry.name[0] != "." and entry.is_file():
                yield Path(entry)


def _classnames_and_templates(
    root: Path, folder_names: list[str]
) -> tuple[tuple[str, ...], Sequence[Callable[[str], str]]]:
    """Return the class names of an image folder, and the templates to use if it has none of its own."""
    simple: Sequence[Callable[[str], str]] = open_clip.SIMPLE_IMAGENET_TEMPLATES
    if (root / CLASSNAMES).is_file():
        classnames = read_lines(root / CLASSNAMES)
        if len(classnames) != len(folder_names):
            raise UserError(
                f"{root / CLASSNAMES} has {len(classnames)} names for {len(folder_names)} folders with images; write "
                f"one name per line in the sorted order of the folders"
            )
        return classnames, simple
    if not all(WORDNET_ID.fullmatch(name) for name in folder_names):
        return tuple(name.replace("_", " ") for name in folder_names), simple
    # ImageNet's class names are in the sorted order of its ids.
    imagenet = tuple(open_clip.IMAGENET_CLASSNAMES)
    if len(folder_names) != len(imagenet) or (folder_names[0], folder_names[-1]) != IMAGENET_ENDS:
        raise UserError(
            f"the {len(folder_names)} folders in {root} are WordNet ids, but not the 1,000 of ImageNet; write their "
            f"names, one per line in the sorted order of the ids, into {root / CLASSNAMES}"
        )
    return imagenet, open_clip.OPENAI_IMAGENET_TEMPLATES
