from pathlib import Path

import pytest

from mcl_clip.core.errors import UserError
from mcl_clip.eval.classification import ClassificationTask, MultilabelTask
from mcl_clip.eval.datasets import discover, find_sets, layout_of, open_set
from mcl_clip.eval.pairs import PairTask
from mcl_clip.eval.retrieval import RetrievalTask
from tests.unit.data.tars import picture, write_tar
from tests.unit.eval.sets import (
    name_classes,
    noise_png,
    write_classification,
    write_image_folder,
    write_multilabel,
    write_pairs,
    write_retrieval,
)


def write_bare_shards(root):
    write_tar(root / "000000.tar", [("a.jpg", picture()), ("a.txt", b"an a"), ("b.jpg", picture()), ("b.txt", b"a b")])
    return root


@pytest.fixture
def root(tmp_path):
    """One set of each kind, at one and two levels, and shards to train on."""
    write_classification(tmp_path / "sets/wds/colours", [0, 1, 2])
    write_multilabel(tmp_path / "sets/wds/voc", [[1, 0, 1], [0, 1, 0]], ("a", "b", "c"))
    write_retrieval(tmp_path / "sets/photos", 4)
    name_classes(write_image_folder(tmp_path / "sets/animals", {"owl": 2, "bee": 1}))
    write_pairs(tmp_path / "sets/two")
    write_bare_shards(tmp_path / "sets/train")
    (tmp_path / "sets/.cache/x").mkdir(parents=True)
    (tmp_path / "sets/readme.txt").write_text("x")
    return tmp_path / "sets"


KINDS = {
    "animals": ClassificationTask,
    "photos": RetrievalTask,
    "two": PairTask,
    "wds/colours": ClassificationTask,
    "wds/voc": MultilabelTask,
}


def test_all_sets_below_a_folder(root):
    tasks = discover(root)
    assert {name: type(task) for name, task in tasks.items()} == KINDS
    assert list(tasks) == list(KINDS)
    assert all(task.name == name for name, task in tasks.items())


@pytest.mark.parametrize("name", KINDS)
def test_a_folder_that_is_a_set(root, name):
    (task,) = discover(root / name).values()
    assert type(task) is KINDS[name]
    assert task.name == name.rpartition("/")[2]
    assert open_set(root / name, "other").name == "other"


def test_names_choose_and_order(root):
    assert list(discover(root, ("wds/voc", "animals", "wds/voc"))) == ["wds/voc", "animals"]


def test_sets_that_are_not_asked_for_are_not_opened(root):
    (root / "photos/test/0.tar").unlink()
    discover(root, ("animals",))
    with pytest.raises(UserError, match=r"0.tar is not in"):
        discover(root)


def test_tar_files_alone_are_a_set_where_they_are_named(root, tmp_path):
    (task,) = discover(root / "train").values()
    assert type(task) is RetrievalTask
    assert layout_of(root / "train") == ""
    assert "train" not in find_sets(root)


def test_what_lies_in_a_set_is_no_set(tmp_path):
    """The image folders of a pair set would make a set by themselves."""
    write_pairs(tmp_path / "set")
    for name in ("x", "y"):
        (tmp_path / "set/images" / name).mkdir()
        (tmp_path / "set/images" / name / "a.png").write_bytes(noise_png(1))
    assert layout_of(tmp_path / "set/images") == "image folder"
    assert list(find_sets(tmp_path)) == ["set"]


def test_layouts_with_class_names(tmp_path):
    folder = write_image_folder(tmp_path / "folder", {"owl": 1, "bee": 1})
    (folder / "classnames.txt").write_text("a bee\nan owl\n")
    assert open_set(folder).data.classnames == ("a bee", "an owl")
    bare = write_bare_shards(tmp_path / "bare")
    (bare / "classnames.txt").write_text("x\n")
    assert layout_of(bare) == "classification"


def test_image_folders_are_no_set_unless_named(tmp_path):
    folder = write_image_folder(tmp_path / "raw/photos", {"originals": 2, "annotated": 2})
    with pytest.raises(UserError, match="no evaluation set"):
        find_sets(tmp_path)
    assert find_sets(folder) == {"photos": folder}
    write_image_folder(tmp_path / "raw/imagenet", {"n01440764": 1, "n01443537": 1})
    assert list(find_sets(tmp_path)) == ["raw/imagenet"]


def test_three_levels_are_too_deep(root, tmp_path):
    assert list(find_sets(tmp_path)) == ["sets/animals", "sets/photos", "sets/two"]


def test_folders_of_splits_are_not_classes(tmp_path):
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            (tmp_path / "sorted" / split / label).mkdir(parents=True)
            (tmp_path / "sorted" / split / label / "1.png").write_bytes(noise_png(1))
        (tmp_path / "flat" / split).mkdir(parents=True)
        (tmp_path / "flat" / split / "1.png").write_bytes(noise_png(1))
    with pytest.raises(UserError, match=r"sorted holds splits \(train, val\) of images .* such as .*sorted/val"):
        discover(tmp_path / "sorted")
    assert discover(tmp_path / "sorted/val")["val"].data.classnames == ("cat", "dog")
    with pytest.raises(UserError, match=r"flat has images in train, val, which are names of splits, not of classes"):
        discover(tmp_path / "flat")


def test_mistakes(root, tmp_path):
    with pytest.raises(UserError, match=r"has no set colours, x; it has animals, photos, two, wds/colours, wds/voc"):
        discover(root, ("colours", "animals", "x"))
    for opening in (discover, open_set):
        with pytest.raises(UserError, match="there is no folder /nowhere"):
            opening(Path("/nowhere"))
    (tmp_path / "empty/a/b").mkdir(parents=True)
    with pytest.raises(
        UserError, match=r"no evaluation set in .*empty or up to 2 levels below it; looked for pairs.json"
    ):
        discover(tmp_path / "empty")
    with pytest.raises(UserError, match=r"empty is not an evaluation set: it has no pairs.json, dataset_type.txt"):
        open_set(tmp_path / "empty")
    (root / "wds/colours/classnames.txt").unlink()
    with pytest.raises(
        UserError, match=r"colours has labels \(.cls\) but no classnames.txt; write the names of the cl"
    ):
        open_set(root / "wds/colours")
    (root / "photos/dataset_type.txt").write_text("retreival\n")
    with pytest.raises(UserError, match=r"dataset_type.txt holds 'retreival'; it must be 'retrieval' or 'multilabel'"):
        discover(root)
