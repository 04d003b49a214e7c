"""Which evaluation set a folder holds, by its layout."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mcl_clip.errors import UserError
from mcl_clip.eval.image_folder import WORDNET_ID, class_folders, open_image_folder
from mcl_clip.eval.suite import Task
from mcl_clip.eval.tasks.classification import CLASSNAMES, ClassificationSet, ClassificationTask
from mcl_clip.eval.tasks.multilabel import MultilabelTask, open_multilabel
from mcl_clip.eval.tasks.pairs import PairSet, PairTask
from mcl_clip.eval.tasks.retrieval import RetrievalSet, RetrievalTask

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
