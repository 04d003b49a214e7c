import csv
import io
import json
import os
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mcl_clip.core.errors import UserError
from mcl_clip.data.decode import decode_image
from mcl_clip.data.index import ShardIndex

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning:webdataset.tariterators")


@pytest.fixture(scope="module")
def table(load_program):
    return load_program("from_table")


ROWS = [
    ("b.jpg", "train", "first of b"),
    ("a/x.png", "train", "x, with a comma"),
    ("b.jpg", "train", "second of b"),
    ("t.webp", "test", 'a "quoted" one'),
    ("a/x.png", "train", "again x"),
    ("t.webp", "test", "another t"),
]


@pytest.fixture
def images(tmp_path, picture):
    root = tmp_path / "images"
    (root / "a").mkdir(parents=True)
    for name, kind in (("b.jpg", "JPEG"), ("a/x.png", "PNG"), ("t.webp", "WEBP")):
        (root / name).write_bytes(picture(len(name), kind=kind))
    return root


def write_table(path, rows=ROWS):
    header = ("file", "split", "caption")
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            options = {} if path.suffix == ".csv" else {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "quotechar": None}
            csv.writer(file, **options).writerows([header, *rows])
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(dict(zip(header, row, strict=True))) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist([dict(zip(header, row, strict=True)) for row in rows]), path)
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_every_kind_of_table_gives_the_same_sets(table, tmp_path, images, picture, read_tars, kind):
    path = write_table(tmp_path / f"table.{kind}")
    options = {"image_column": "file", "caption_column": "caption", "split_column": "split", "images_root": images}
    table.make_from_table(path, tmp_path / "out", **options, retrieval_splits="test")
    train, test = read_tars(tmp_path / "out" / "train"), read_tars(tmp_path / "out" / "test" / "test")
    assert [one["txt"].decode().splitlines() for one in train] == [
        ["first of b", "second of b"],
        ["x, with a comma", "again x"],
    ]
    assert train[0]["__key__"] == "b"
    assert train[0]["jpg"] == picture(5)
    assert train[1]["png"] == picture(7, kind="PNG")
    assert [one["txt"].decode().splitlines() for one in test] == [['a "quoted" one', "another t"]]
    assert len(ShardIndex.load(tmp_path / "out" / "train" / "index.arrow")) == 2
    assert (tmp_path / "out" / "test" / "dataset_type.txt").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems take only names in UTF-8")
def test_a_folder_whose_name_is_not_utf_8(table, tmp_path, images, read_tars):
    path = write_table(images / "table.parquet")
    path = images.rename(tmp_path / os.fsdecode(b"Z\xfcrich")) / path.name
    table.make_from_table(path, tmp_path / "out", image_column="file", caption_column="caption")
    assert len(read_tars(tmp_path / "out" / "train")) == 3


def test_without_a_split_column_everything_is_for_training(table, tmp_path, images, read_tars):
    path = write_table(images / "table.csv")
    table.make_from_table(path, tmp_path / "out", image_column="file", caption_column="caption")
    assert len(read_tars(tmp_path / "out" / "train")) == 3


@pytest.mark.parametrize(
    ("separator", "encoding", "options"),
    [
        ("\t", "utf-8", {}),
        (";", "utf-8-sig", {}),
        ("|", "utf-8", {}),
        ("\t", "utf-16", {}),  # with a byte order mark, as spreadsheets write "Unicode text"
        (";", "cp1252", {"encoding": "cp1252"}),
        ("^", "utf-8", {"separator": "^"}),
        ("\t", "utf-8", {"separator": "tab"}),
    ],
)
def test_separator_and_encoding_are_recognized_or_given(
    table, tmp_path, images, read_tars, separator, encoding, options
):
    rows = [["title", "file"], ["first; Zürich, in rain", "b.jpg"], ["second | x", "a/x.png"]]
    file = io.StringIO(newline="")
    csv.writer(file, delimiter=separator).writerows(rows)
    (tmp_path / "t.csv").write_bytes(file.getvalue().encode(encoding))
    columns = {"image_column": "file", "caption_column": "title", "images_root": images}
    table.make_from_table(tmp_path / "t.csv", tmp_path / "out", **columns, **options)
    found = [one["txt"].decode() for one in read_tars(tmp_path / "out" / "train")]
    assert found == ["first; Zürich, in rain", "second | x"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"separator": "::"}, "--separator '::' is not a single character"),
        ({"encoding": "utf8-or-so"}, "--encoding utf8-or-so is not known"),
        ({"encoding": "ascii"}, r"is not text in ASCII \(ordinal not in range"),
    ],
)
def test_wrong_separators_and_encodings_are_named(table, tmp_path, options, message):
    (tmp_path / "t.csv").write_bytes("image,caption\na.jpg,Zürich\n".encode())
    with pytest.raises(UserError, match=message):
        table.make_from_table(tmp_path / "t.csv", tmp_path / "out", **options)


def test_blanks_around_names_and_values_are_no_part_of_them(table, tmp_path, images, read_tars):
    (tmp_path / "t.csv").write_text('image, caption\nb.jpg, "one, two"\na/x.png, three\n')
    table.make_from_table(tmp_path / "t.csv", tmp_path / "out", images_root=images)
    assert [one["txt"] for one in read_tars(tmp_path / "out" / "train")] == [b"one, two", b"three"]


def test_paths_of_windows_lead_to_the_same_images(table, tmp_path, images, read_tars):
    (tmp_path / "t.csv").write_text("image,caption\na\\x.png,one\na/x.png,two\n")
    table.make_from_table(tmp_path / "t.csv", tmp_path / "out", images_root=images)
    (found,) = read_tars(tmp_path / "out" / "train")
    assert (found["__key__"][:3], found["txt"]) == ("a_x", b"one\ntwo")


@pytest.mark.parametrize("cell", ['["one, of two", "two"]', "['one, of two', \"two\"]"])
def test_a_list_in_a_cell_is_several_captions_and_said_so(table, tmp_path, images, read_tars, capsys, cell):
    with (tmp_path / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), ("b.jpg", cell), ("a/x.png", "[sic] one")])
    table.make_from_table(tmp_path / "t.csv", tmp_path / "out", images_root=images)
    assert [one["txt"] for one in read_tars(tmp_path / "out" / "train")] == [b"one, of two\ntwo", b"[sic] one"]
    assert "1 cells of column 'caption' are lists of captions; each text in them" in capsys.readouterr().out


COCO = {
    "images": [{"id": 7, "file_name": "b.jpg"}, {"id": 9, "file_name": "a/x.png"}],
    "annotations": [
        {"image_id": 9, "caption": "one"}, {"image_id": 7, "caption": "two"}, {"image_id": 9, "caption": "three"}
    ],
}  # fmt: skip
KARPATHY = {
    "images": [
        {"filepath": "a", "filename": "x.png", "split": "train", "sentences": [{"raw": "one"}, {"raw": "three"}]},
        {"filename": "b.jpg", "split": "train", "sentences": [{"raw": "two", "tokens": ["two"]}]},
    ]
}
LISTS = [{"image": "a/x.png", "caption": ["one", "three"]}, {"image": "b.jpg", "caption": "two"}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("captions_val.json", json.dumps(COCO)),
        ("dataset_coco.json", json.dumps(KARPATHY)),
        ("list.json", json.dumps(LISTS)),
        ("lines.json", "\n".join(map(json.dumps, LISTS))),
        ("Flickr8k.token.txt", "a/x.png#0\tone\nb.jpg#0\ttwo\na/x.png#1\tthree\n"),
        ("results_20130124.token", "a/x.png#0\tone\nb.jpg#0\ttwo\na/x.png#1\tthree\n"),
        ("results.csv", "image_name| comment_number| comment\na/x.png| 0| one\nb.jpg| 0| two\na/x.png| 4   three\n"),
    ],
)
def test_known_data_sets_are_tables(table, tmp_path, images, read_tars, name, content):
    (tmp_path / name).write_text(content)
    table.make_from_table(tmp_path / name, tmp_path / "out", images_root=images)
    found = {one["__key__"][:3]: one["txt"].decode().splitlines() for one in read_tars(tmp_path / "out" / "train")}
    assert found == {"a_x": ["one", "three"], "b": ["two"]}


def test_a_folder_of_images_with_texts_beside_them(table, tmp_path, picture, read_tars, capsys):
    folder = tmp_path / "files/00000"
    folder.mkdir(parents=True)
    for number in range(4):
        (folder / f"{number}.jpg").write_bytes(picture(number))
    (folder / "0.txt").write_text("two\nlines")
    (folder / "0.json").write_text('{"caption": "not this one"}')
    (folder / "1.json").write_text('{"caption": ["one", "two"]}')
    (folder / "2.json").write_text('{"caption": null}')
    (folder / "._0.jpg").write_bytes(b"of macOS")
    table.make_from_table(tmp_path / "files", tmp_path / "out")
    found = {one["__key__"][:7]: one["txt"] for one in read_tars(tmp_path / "out" / "train")}
    assert found == {"00000_0": b"two lines", "00000_1": b"one\ntwo"}
    assert "train: 2 of 4 samples written (2 empty captions dropped, 2 samples without" in capsys.readouterr().out


def test_blanks_around_a_path_are_no_part_of_it(table, tmp_path, images, read_tars):
    (tmp_path / "t.csv").write_text("image,caption\n b.jpg ,one\n")
    table.make_from_table(tmp_path / "t.csv", tmp_path / "out", images_root=images)
    assert read_tars(tmp_path / "out" / "train")[0]["__key__"] == "b"


def test_captions_with_commas_outside_quotes(table, tmp_path, images, read_tars):
    (tmp_path / "flickr30k_test_karpathy.txt").write_text("image,caption\nb.jpg,one, or two\nb.jpg,three\n")
    table.make_from_table(tmp_path / "flickr30k_test_karpathy.txt", tmp_path / "out", images_root=images)
    assert read_tars(tmp_path / "out" / "train")[0]["txt"] == b"one, or two\nthree"


def test_a_line_that_is_unlike_the_others_is_named(table, tmp_path):
    (tmp_path / "t.txt").write_text("a.jpg#0\tone\nwhat is this\n")
    with pytest.raises(UserError, match=r"t.txt, line 2 is not of the form of the others: what is this"):
        table.make_from_table(tmp_path / "t.txt", tmp_path / "out")


def test_wrong_captions_of_a_column_go_to_the_json(table, tmp_path, images, read_tars):
    path, out = tmp_path / "table.csv", tmp_path / "out"
    rows = [("b.jpg", "one", '["no b", "not b"]'), ("a/x.png", "x", ""), ("b.jpg", "two", "never b")]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("image", "caption", "wrong"), *rows])
    table.make_from_table(path, out, images_root=images, negatives_column="wrong")
    first, second = read_tars(out / "train")
    assert json.loads(first["json"]) == {"caption": ["one", "two"], "negatives": ["no b", "not b", "never b"]}
    assert first["txt"] == b"one\ntwo"
    assert "json" not in second
    with pytest.raises(UserError, match="has no column 'worng'; its columns are image, caption, wrong"):
        table.make_from_table(path, tmp_path / "other", images_root=images, negatives_column="worng")


def test_captions_may_be_lists(table, tmp_path, images, read_tars):
    path = tmp_path / "table.jsonl"
    path.write_text(json.dumps({"image": "b.jpg", "texts": ["one", "", None, "two"]}) + "\n\n")
    table.make_from_table(path, tmp_path / "out", image_column="image", caption_column="texts", images_root=images)
    assert read_tars(tmp_path / "out" / "train")[0]["txt"] == b"one\ntwo"


def test_names_that_differ_in_ending_or_folder_get_keys_of_their_own(table, tmp_path):
    names = ("a/x.jpg", "a_x.jpg", "a_x.png", "x.jpg", "x.png", "x.jpeg", "../x.jpg", "ä.jpg")
    keys = [pair.key for pair in table._read_pairs({name: [""] for name in names}, {}, tmp_path, None, 1)]
    assert len(set(keys)) == len(keys)
    assert (keys[1], keys[3]) == ("a_x", "x")


def test_missing_and_unreadable_images_are_counted_against_the_limit(table, tmp_path, images, read_tars, capsys):
    (images / "broken.jpg").write_bytes(b"no picture")
    rows = [*ROWS, ("gone.jpg", "train", "x"), ("broken.jpg", "train", "y")]
    path = write_table(tmp_path / "table.csv", rows)
    options = {"image_column": "file", "caption_column": "caption", "images_root": images}
    with pytest.raises(UserError, match=r"1 of 5 images are bad .*--max-bad-fraction 0.01 .* the first is gone.jpg \("):
        table.make_from_table(path, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    table.make_from_table(path, tmp_path / "out", **options, max_bad_fraction=0.4)
    assert len(read_tars(tmp_path / "out" / "train")) == 3
    assert "3 of 5 samples written (1 missing images, 1 unreadable images)" in capsys.readouterr().out


def test_large_images_shrink_and_others_keep_their_bytes(table, picture):
    small, large = picture(size=(40, 20)), picture(size=(400, 100), kind="PNG")
    assert table.shrink(small, 40) == small
    with Image.open(io.BytesIO(table.shrink(large, 40))) as image:
        assert (image.size, image.format) == ((40, 10), "JPEG")
    assert table.shrink(b"no picture", 40) == b"no picture"


def test_shrunk_images_stand_upright(table, picture):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    with Image.open(io.BytesIO(table.shrink(picture(size=(400, 100), exif=exif), 40))) as image:
        assert image.size == (10, 40)
        assert image.getexif().get(0x0112, 1) == 1
    for side in (400, 40):  # shrunk, and stored as it is
        shown = decode_image(table.shrink(picture(size=(side, side // 4), exif=exif), 100))
        assert shown.width * 4 == shown.height


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_column": "picture"}, "has no column 'picture'; its columns are file, split, caption"),
        ({"split": "training"}, "there is no split 'training' in the table; its splits are train, test"),
        ({"retrieval_splits": "val"}, "there is no split 'val'"),
        ({"retrieval_splits": "train"}, "is both --split and in --retrieval-splits"),
        ({"split": ""}, "name at least one split"),
        ({"split_column": None, "retrieval_splits": "test"}, "needs --split-column"),
        ({"max_side_px": 0}, "--max-side-px is 0"),
    ],
)
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_mistakes_are_named_and_nothing_is_written(table, tmp_path, images, kind, changes, message):
    path = write_table(tmp_path / f"table.{kind}")
    options = {"image_column": "file", "caption_column": "caption", "split_column": "split", "images_root": images}
    with pytest.raises(UserError, match=message):
        table.make_from_table(path, tmp_path / "out", **options | changes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"file,caption\na.jpg,one, two\n", "line 2: 3 fields, the header has 2"),
        ("t.csv", b'file,caption\na.jpg,"open\n', "line 2: unexpected end of data; close quotation marks"),
        (
            "t.csv",
            "file,caption\na.jpg,caf\xe9 au lait\n".encode("cp1252"),
            "it may be cp1252, .* 'le,caption a.jpg,café",
        ),
        ("t.csv", "file,caption\na.jpg,x\n".encode("utf-16-be"), "it may be utf-16-be, .* 'file,caption a.jpg,x'"),
        ("t.csv", b"", "has no column 'file'"),
        (
            "t.csv",
            b"file;caption\n",
            "t.csv, separated by semicolons, has no column 'picture'; its columns are file, cap",
        ),
        ("t.txt", b"https://a.b/c.jpg?x=1,2\n", "line 1, has the URL https://a.b/c.jpg.* with img2dataset"),
        ("t.csv", b"file,caption,file\n", "has 2 columns 'file'"),
        ("t.csv", b"file,caption\n,x\n", r"1 of 1 images are bad .* the first is row 1, which has no path \(missing"),
        (
            "t.csv",
            b"file,caption\nhttps://a.b/c.jpg,x\n",
            "row 1, column 'file', has the URL https://a.b/c.jpg; .* img2dataset",
        ),
        (
            "t.csv",
            b"file,caption\na.jpg,['a' 'b']\n",
            r"row 1, column 'caption', has \['a' 'b'\], which is not a list in JSON",
        ),
        ("t.csv", b"file,caption\n", "there is no split 'train' in the table; its splits are none"),
        ("t.jsonl", b"{]\n", "line 1 is not JSON"),
        ("t.jsonl", b"[1]\n", "line 1 is not a JSON object"),
        ("t.jsonl", b'{"file": "a", "caption": "x"}\n{"file": "a"}\n', "line 2, has no column 'caption'"),
        ("t.jsonl", b'{"file": "a", "caption": 3}\n', "row 1, column 'caption', has 3; a caption must be text"),
        ("t.jsonl", b'{"file": "a", "caption": {"en": "x"}}\n', "has a struct of en; a caption must be text"),
        ("t.jsonl", b'{"file": {"bytes": "x"}, "caption": "x"}\n', "must be the path of an image .*--builder parquet"),
        ("t.json", b"[1]", "entry 1 is not a JSON object"),
        ("t.json", b"[", "t.json is not JSON"),
        ("t.json", b"{}", "is neither a list of objects nor the captions of COCO"),
        ("t.json", b'{"images": [], "annotations": [{"bbox": []}]}', "annotations without captions; take .* captions_"),
        ("t.json", b'{"images": [], "annotations": [{"image_id": 1, "caption": ""}]}', "is not the captions of COCO"),
        ("t.parquet", b"PAR1", "is not a whole Parquet file"),
        ("t.xlsx", b"", "does not end in one of .csv, .tsv, .txt, .token, .jsonl"),
    ],
)
def test_damaged_tables_are_named_by_line(table, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    image_column = "picture" if "'picture'" in message else "file"
    with pytest.raises(UserError, match=message):
        table.make_from_table(tmp_path / name, tmp_path / "out", image_column=image_column)


def test_images_in_two_splits_are_pointed_out(table, tmp_path, images, capsys):
    path = write_table(tmp_path / "table.csv", [*ROWS, ("b.jpg", "test", "leaked")])
    options = {"image_column": "file", "caption_column": "caption", "split_column": "split", "images_root": images}
    table.make_from_table(path, tmp_path / "out", **options, retrieval_splits="test")
    assert "warning: 1 images are in more than one of the splits train, test, e.g. b.jpg" in capsys.readouterr().out


def test_order_and_bytes_do_not_depend_on_threads(table, tmp_path, picture):
    rows = [(f"{number:03d}.jpg", "train", f"caption {number}") for number in range(150)]
    for number, (name, _, _) in enumerate(rows):
        (tmp_path / name).write_bytes(picture(number))
    path = write_table(tmp_path / "table.csv", rows)
    for threads in (1, 5):
        out = tmp_path / f"out{threads}"
        table.make_from_table(path, out, image_column="file", caption_column="caption", threads=threads)
    assert (tmp_path / "out1/train/000000.tar").read_bytes() == (tmp_path / "out5/train/000000.tar").read_bytes()
