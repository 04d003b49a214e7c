import csv
import shutil
from collections import Counter

import numpy as np
import pytest

from mcl_clip.core.errors import UserError
from mcl_clip.core.files import DONE, read_json
from mcl_clip.data.index import ShardIndex
from mcl_clip.eval.datasets import open_set
from mcl_clip.tools import finetune_data
from mcl_clip.tools.finetune_data import DataOptions, assign_splits, prepare_data
from tests.photos import photo, write_photos

COUNT = 80


@pytest.fixture
def table(tmp_path):
    """A table of 80 pictures with two captions each."""
    names = write_photos(tmp_path / "images", range(COUNT))
    return write_table(tmp_path / "images" / "captions.csv", [(name, f"{name} {n}") for name in names for n in "ab"])


def write_table(path, rows, header=("file", "caption")):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def keys_of(folder):
    """The names of pictures by split."""
    index = ShardIndex.load(folder / "train" / "index.arrow")
    keys = {name: (folder / name / "keys.txt").read_text().split() for name in ("validation", "test")}
    return {"train": [index.key(row) for row in range(len(index))], **keys}


def test_every_picture_is_on_one_side_and_sets_can_be_evaluated(tmp_path, table):
    data = prepare_data(str(table), tmp_path / "data", DataOptions(), seed=0)
    assert data.pictures == {"train": 64, "validation": 8, "test": 8}
    assert data.captions == {"train": 128, "validation": 16, "test": 16}
    keys = [key for part in keys_of(tmp_path / "data").values() for key in part]
    assert sorted(keys) == [f"{number:03d}" for number in range(COUNT)]
    task = open_set(tmp_path / "data" / "validation")
    assert task.describe()["n_images"] == 8
    assert task.describe()["n_texts"] == 16
    assert not (tmp_path / "data" / "looks").exists()


def test_the_split_depends_on_the_seed_alone(tmp_path, table):
    found = []
    for number, seed in enumerate((0, 0, 1)):
        prepare_data(str(table), tmp_path / f"data-{number}", DataOptions(validation=10, test=5), seed=seed)
        found.append(keys_of(tmp_path / f"data-{number}"))
    assert found[0] == found[1] != found[2]
    assert [len(part) for part in found[0].values()] == [65, 10, 5]


def test_near_duplicates_are_on_one_side_and_equal_files_become_one(tmp_path, table):
    for number in range(40):
        (table.parent / f"near-{number}.jpg").write_bytes(photo(number, size=(96, 72)))
        shutil.copy(table.parent / f"{number + 40:03d}.jpg", table.parent / f"copy-{number}.jpg")
    rows = [line.split(",", 1) for line in table.read_text().splitlines()[1:]]
    rows += [(f"{kind}-{number}.jpg", kind) for kind in ("near", "copy") for number in range(40)]
    data = prepare_data(str(write_table(table, rows)), tmp_path / "data", DataOptions(), seed=0)
    assert sum(data.pictures.values()) == 120
    assert sum(data.captions.values()) == 240
    assert "80 pictures are nearly identical to another and were kept on one side" in data.notes
    assert "40 files that occur again gave their captions to the first" in data.notes
    keys = keys_of(tmp_path / "data")
    side = {key.removeprefix("near-").zfill(3): name for name, part in keys.items() for key in part if "near" in key}
    assert len(side) == 40
    assert all(key in keys[name] for key, name in side.items())
    assert len(set(side.values())) > 1


def test_stated_splits_are_kept_except_for_what_training_should_not_see(tmp_path, table):
    parts = ["test"] * 10 + ["val"] * 10 + ["train"] * 60
    rows = [(f"{number:03d}.jpg", "a", part) for number, part in enumerate(parts)]
    (table.parent / "near.jpg").write_bytes(photo(0, size=(96, 72)))
    rows.append(("near.jpg", "a", "train"))
    path = write_table(table, rows, ("file", "caption", "part"))
    data = prepare_data(str(path), tmp_path / "data", DataOptions(split_column="part"), seed=0)
    keys = keys_of(tmp_path / "data")
    assert keys["test"] == [f"{number:03d}" for number in range(10)]
    assert keys["validation"] == [f"{number:03d}" for number in range(10, 20)]
    assert keys["train"] == [f"{number:03d}" for number in range(20, 80)]
    assert "1 pictures were left out of training as they look like one that is not in it" in data.notes


def test_a_split_that_is_not_stated_is_taken_from_training(tmp_path, table):
    rows = [(f"{number:03d}.jpg", "a", "test" if number < 10 else "train") for number in range(COUNT)]
    path = write_table(table, rows, ("file", "caption", "part"))
    data = prepare_data(str(path), tmp_path / "data", DataOptions(split_column="part"), seed=0)
    assert data.pictures == {"train": 62, "validation": 8, "test": 10}
    assert "the data states no validation split: 8 pictures of training were taken for it" in data.notes


def test_finished_data_are_used_again_and_never_those_of_something_else(tmp_path, table, monkeypatch):
    folder = tmp_path / "data"
    before = prepare_data(str(table), folder, DataOptions(), seed=0)
    with monkeypatch.context() as patched:
        patched.setattr(finetune_data, "open_pictures", lambda *_: pytest.fail("the data was read again"))
        assert prepare_data(str(table), folder, DataOptions(), seed=0) == before
        with pytest.raises(UserError, match=r"prepared from something else: --validation was 0 and is now 9"):
            prepare_data(str(table), folder, DataOptions(validation=9), seed=0)
        with pytest.raises(UserError, match=r"content of DATA was .* another --run-dir"):
            prepare_data(str(write_table(table, [("000.jpg", "a")])), folder, DataOptions(), seed=0)


def test_an_interrupted_preparation_continues(tmp_path, table, monkeypatch):
    """Killed between two splits: finished splits and looks are kept, and the result is the same."""
    monkeypatch.setattr(finetune_data, "BLOCK", 16)
    folder, whole = tmp_path / "data", tmp_path / "whole"
    prepare_data(str(table), whole, DataOptions(), seed=0)
    real = finetune_data.write_pairs

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune_data, "write_pairs", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare_data(str(table), folder, DataOptions(), seed=0)
    assert sorted(path.name for path in folder.iterdir()) == ["STARTED.json", "looks", "test", "validation"]
    monkeypatch.setattr(finetune_data, "write_pairs", real)
    monkeypatch.setattr(finetune_data, "look_of", lambda _: pytest.fail("a picture was decoded again"))
    stamp = (folder / "test" / "keys.txt").stat().st_mtime_ns
    prepare_data(str(table), folder, DataOptions(), seed=0)
    assert (folder / "test" / "keys.txt").stat().st_mtime_ns == stamp
    assert keys_of(folder) == keys_of(whole)
    assert (folder / "train/000000.tar").read_bytes() == (whole / "train/000000.tar").read_bytes()


def test_what_was_begun_with_other_options_is_made_anew(tmp_path, table, monkeypatch):
    folder = tmp_path / "data"
    with monkeypatch.context() as patched:
        patched.setattr(finetune_data, "write_pairs", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare_data(str(table), folder, DataOptions(), seed=0)
    assert prepare_data(str(table), folder, DataOptions(), seed=5).pictures["validation"] == 8
    prepare_data(str(table), tmp_path / "other", DataOptions(), seed=5)
    assert keys_of(folder) == keys_of(tmp_path / "other")


def test_missing_and_damaged_pictures_are_counted_and_left_out_if_allowed(tmp_path, table):
    (table.parent / "003.jpg").unlink()
    (table.parent / "005.jpg").write_bytes(photo(5)[:300])
    folder = tmp_path / "data"
    with pytest.raises(UserError, match=r"1 of 80 pictures cannot be used \(1 missing\).*--max-missing 0 allows.*003"):
        prepare_data(str(table), folder, DataOptions(max_missing=0), seed=0)
    assert not folder.exists()
    with pytest.raises(UserError, match=r"2 of 80 .*1 missing, 1 broken_image.*first are 003.jpg \(missing\), 005.jpg"):
        prepare_data(str(table), folder, DataOptions(max_missing=0.02), seed=0)
    assert not (folder / DONE).exists()
    data = prepare_data(str(table), folder, DataOptions(max_missing=0.03), seed=0)
    assert sum(data.pictures.values()) == 78
    assert "2 pictures that are missing or damaged were left out" in data.notes
    assert read_json(folder / DONE)["pictures"] == data.pictures


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation": 50}, "80 pictures give 22 for training, 50 for validation and 8 for the test; 40 are needed"),
        ({"split_column": "caption"}, "is not the name of a split; the splits of the data may be called train"),
    ],
)
def test_splits_that_cannot_be_are_refused(tmp_path, table, options, message):
    with pytest.raises(UserError, match=message):
        prepare_data(str(table), tmp_path / "data", DataOptions(**options), seed=0)


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path, table, monkeypatch):
    monkeypatch.setattr(finetune_data.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(UserError, match=r"the pictures need .* kB in .*, and 10 bytes are free there"):
        prepare_data(str(table), tmp_path / "data", DataOptions(), seed=0)
    assert not (tmp_path / "data" / "train").exists()


def test_groups_are_never_cut_and_sizes_are_met():
    generator = np.random.default_rng(0)
    alike = np.sort(generator.integers(0, 300, 1000))
    stated, kept = [""] * 1000, np.ones(1000, bool)
    split_of, _ = assign_splits(stated, alike, kept, validation=100, test=50, seed=3)
    assert Counter(split_of.tolist()) == {0: 850, 1: 100, 2: 50}
    assert all(len(set(split_of[alike == group])) == 1 for group in set(alike.tolist()))
