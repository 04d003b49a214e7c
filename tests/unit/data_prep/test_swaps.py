import csv
import json

import pytest

from mcl_clip.core.errors import UserError
from mcl_clip.data.index import ShardIndex
from mcl_clip.eval.pairs import PairSet
from tests.photos import write_photos

CAPTIONS = ["a red ball", "a blue ball", "a man", "a woman", "a red ball", "a blue ball"]


@pytest.fixture(scope="module")
def swaps(load_program):
    return load_program("swaps")


@pytest.fixture
def table(tmp_path):
    names = write_photos(tmp_path / "images", range(6))
    path = tmp_path / "captions.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "split", "caption", "note"])
        for number, name in enumerate(names):
            writer.writerow([name, "train" if number < 4 else "test", CAPTIONS[number], f'"{number}", said'])
    return path


def test_pairs_of_a_split(swaps, table, tmp_path, capsys):
    root = tmp_path / "images"
    swaps.make_pairs(table, tmp_path / "set", images_root=root, split_column="split")
    assert "set: 2 swaps of 2 pictures (color 2)" in capsys.readouterr().out
    data = PairSet.open(tmp_path / "set")
    assert data.texts == ("a red ball", "a blue ball")
    assert [[data.texts[row] for row in item.texts] for item in data.items] == [
        ["a red ball", "a blue ball"], ["a blue ball", "a red ball"]
    ]  # fmt: skip
    assert [path.name for path in data.source.paths] == ["004.jpg", "005.jpg"]


def test_negatives_become_a_column_that_training_reads(swaps, load_program, table, tmp_path, capsys):
    wrong = tmp_path / "wrong.csv"
    swaps.make_negatives(table, wrong, split_column="split")
    assert "wrong.csv: 4 wrong captions for 4 pictures (color 2, person 2)" in capsys.readouterr().out
    rows = list(csv.DictReader(wrong.read_text().splitlines()))
    assert [row["negatives"] for row in rows] == [
        '["a blue ball"]', '["a red ball"]', '["a woman"]', '["a man"]', "", ""
    ]  # fmt: skip
    assert [row["note"] for row in rows] == [f'"{number}", said' for number in range(6)]
    load_program("from_table").make_from_table(
        wrong, tmp_path / "shards", images_root=tmp_path / "images", split_column="split", retrieval_splits="test",
        negatives_column="negatives",
    )  # fmt: skip
    index = ShardIndex.build([str(tmp_path / "shards/train/000000.tar")])
    with_json = [json.loads(member) for member in members(tmp_path / "shards/train/000000.tar", ".json")]
    assert len(index) == 4
    assert [sample["negatives"] for sample in with_json] == [["a blue ball"], ["a red ball"], ["a woman"], ["a man"]]


def members(path, suffix):
    import tarfile

    with tarfile.open(path) as tar:
        return [tar.extractfile(member).read() for member in tar if member.name.endswith(suffix)]


def test_words_of_the_user(swaps, table, tmp_path):
    words = tmp_path / "words.json"
    words.write_text('{"thing": [["ball", "man"]]}')
    swaps.make_negatives(table, tmp_path / "wrong.csv", words=words)
    found = [row["negatives"] for row in csv.DictReader((tmp_path / "wrong.csv").read_text().splitlines())]
    assert found == [
        '["a red man"]', '["a blue man"]', '["a ball"]', "", '["a red man"]', '["a blue man"]'
    ]  # fmt: skip


def test_what_is_wrong_is_said_before_anything_is_written(swaps, table, tmp_path):
    words = tmp_path / "words.json"
    words.write_text('{"thing": [["tree", "house"]]}')
    with pytest.raises(
        UserError, match=r"no caption of 6 pictures has a word of the kinds thing .* give --words a list"
    ):
        swaps.make_pairs(table, tmp_path / "set", images_root=tmp_path / "images", words=words)
    with pytest.raises(UserError, match="no caption of 6 pictures has a word of the kinds thing"):
        swaps.make_negatives(table, tmp_path / "wrong.csv", words=words)
    with pytest.raises(UserError, match="no split 'val' in the table; its splits are train, test"):
        swaps.make_pairs(table, tmp_path / "set", split_column="split", split="val")
    with pytest.raises(UserError, match="no row of the split 'val'"):
        swaps.make_negatives(table, tmp_path / "wrong.csv", split_column="split", split="val")
    with pytest.raises(UserError, match=r"6 of 6 images are missing"):
        swaps.make_pairs(table, tmp_path / "set", images_root=tmp_path)
    with pytest.raises(UserError, match=r"captions\.csv exists already"):
        swaps.make_negatives(table, table)
    assert not (tmp_path / "set").exists()
    assert not (tmp_path / "wrong.csv").exists()
