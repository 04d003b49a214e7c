import csv
import json

import datasets
import pytest

from mcl_clip.core.errors import UserError
from mcl_clip.data.pictures import Columns, open_pictures
from tests.photos import photo, write_photos
from tests.unit.data.tars import pairs, write_tar


@pytest.fixture(autouse=True)
def no_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def write_csv(path, rows, header=("file", "caption")):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return str(path)


def read_all(pictures):
    return [pictures.read(number) for number in range(len(pictures.pictures))]


def test_a_table_gives_pictures_in_order_with_their_captions(tmp_path):
    write_photos(tmp_path / "images", range(3))
    rows = [("001.jpg", "b"), ("000.jpg", "a"), ("001.jpg", "b again"), ("002.jpg", " ")]
    opened = open_pictures(write_csv(tmp_path / "t.csv", rows), Columns(images_root=tmp_path / "images"))
    assert [tuple(picture) for picture in opened.pictures] == [
        ("001.jpg", ("b", "b again"), ""),
        ("000.jpg", ("a",), ""),
    ]
    assert read_all(opened) == [photo(1), photo(0)]
    assert opened.without_caption == 1
    assert not opened.missing


def test_usual_columns_are_found_and_others_are_asked_for(tmp_path):
    write_photos(tmp_path, range(1))
    path = write_csv(tmp_path / "t.csv", [("x", "000.jpg", "a title")], ("id", "Filename", "title"))
    assert open_pictures(path, Columns()).pictures[0].captions == ("a title",)
    path = write_csv(tmp_path / "u.csv", [("000.jpg", "text")], ("where", "what"))
    with pytest.raises(UserError, match="name the one with --image-column: its columns are where, what"):
        open_pictures(path, Columns())
    with pytest.raises(UserError, match="no column 'words'; its columns are where, what"):
        open_pictures(path, Columns(image_column="where", caption_column="words"))
    assert len(open_pictures(path, Columns(image_column="where", caption_column="what")).pictures) == 1


def test_missing_pictures_are_known_before_any_is_read(tmp_path):
    write_photos(tmp_path, range(1))
    opened = open_pictures(write_csv(tmp_path / "t.csv", [("000.jpg", "a"), ("009.jpg", "b")]), Columns())
    assert list(opened.missing) == [1]
    assert read_all(opened) == [photo(0), b""]


def test_a_folder_of_pictures_with_captions_beside_them(tmp_path):
    names = write_photos(tmp_path / "set" / "inner", range(3))
    (tmp_path / "set/inner/000.txt").write_text("first")
    (tmp_path / "set/inner/001.json").write_text(json.dumps({"caption": ["one", "two"]}))
    opened = open_pictures(str(tmp_path / "set"), Columns())
    assert [tuple(picture) for picture in opened.pictures] == [
        (f"inner/{names[0]}", ("first",), ""),
        (f"inner/{names[1]}", ("one", "two"), ""),
    ]
    assert opened.without_caption == 1
    assert read_all(opened) == [photo(0), photo(1)]


def test_captions_in_another_encoding_are_not_guessed(tmp_path):
    write_photos(tmp_path / "set", range(1))
    (tmp_path / "set/000.txt").write_bytes("Zürich".encode("cp1252"))
    with pytest.raises(UserError, match=r"000.txt is not text in UTF-8-SIG .* there is 'Zürich'.* --encoding cp1252"):
        open_pictures(str(tmp_path / "set"), Columns())
    assert open_pictures(str(tmp_path / "set"), Columns(encoding="cp1252")).pictures[0].captions == ("Zürich",)


@pytest.mark.parametrize("has_splits", [False, True])
def test_a_data_set_of_the_library(tmp_path, has_splits):
    names = [str(tmp_path / "images" / name) for name in write_photos(tmp_path / "images", range(4))]
    columns = {"picture": names, "text": ["a", "", "c", "d"], "part": ["train", "train", "val", "test"]}
    whole = datasets.Dataset.from_dict(columns).cast_column("picture", datasets.Image())
    if has_splits:
        parts = {"train": whole.select([0, 1]), "test": whole.select([2, 3])}
        datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    else:
        whole.save_to_disk(tmp_path / "saved")
    opened = open_pictures(str(tmp_path / "saved"), Columns())
    assert [picture.captions for picture in opened.pictures] == [("a",), ("c",), ("d",)]
    assert [picture.split for picture in opened.pictures] == (["train", "test", "test"] if has_splits else [""] * 3)
    assert read_all(opened) == [photo(0), photo(2), photo(3)]
    by_column = open_pictures(str(tmp_path / "saved"), Columns(split_column="part"))
    assert [picture.split for picture in by_column.pictures] == ["train", "val", "test"]


def test_shards(tmp_path):
    write_tar(tmp_path / "shards" / "0.tar", pairs(5))
    opened = open_pictures(str(tmp_path / "shards"), Columns())
    assert len(opened.pictures) == 5
    assert all(read_all(opened))
    assert opened.pictures[2].name.startswith("row 2, ")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("nothing-there", "there is no nothing-there; give a table of images and captions"),
        ("empty", "cannot be opened"),
        ("t.csv", "has no rows"),
        ("blank.csv", "has no picture with a caption"),
    ],
)
def test_what_is_no_data_is_refused(tmp_path, monkeypatch, data, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "t.csv").write_text("file,caption\n")
    (tmp_path / "blank.csv").write_text("file,caption\na.jpg,\n")
    with pytest.raises(UserError, match=message):
        open_pictures(data, Columns())
