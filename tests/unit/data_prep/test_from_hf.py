import io
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mcl_clip.core.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning:webdataset.tariterators")


@pytest.fixture(scope="module")
def hf(load_program):
    return load_program("from_hf")


@pytest.fixture(autouse=True)
def no_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def saved(tmp_path, picture):
    def rows(first: int, count: int) -> datasets.Dataset:
        images = [{"bytes": picture(n, kind="PNG"), "path": None} for n in range(first, first + count)]
        texts = [[f"text {n}", "another"] for n in range(first, first + count)]
        dataset = datasets.Dataset.from_dict({"image": images, "texts": texts})
        return dataset.cast_column("image", datasets.Image())

    folder = tmp_path / "saved"
    datasets.DatasetDict({"train": rows(0, 5), "test": rows(5, 3)}).save_to_disk(str(folder))
    return folder


def test_saved_data_sets_keep_their_bytes_and_list_captions(hf, saved, tmp_path, picture, read_tars):
    hf.make_from_hf(str(saved), tmp_path / "out", caption_column="texts", retrieval_splits="test", samples_per_shard=2)
    train, test = read_tars(tmp_path / "out" / "train"), read_tars(tmp_path / "out" / "test" / "test")
    assert [one["png"] for one in train] == [picture(n, kind="PNG") for n in range(5)]
    assert [one["txt"] for one in train] == [f"text {n}\nanother".encode() for n in range(5)]
    assert [one["png"] for one in test] == [picture(n, kind="PNG") for n in range(5, 8)]
    assert len(list((tmp_path / "out" / "train").glob("*.tar"))) == 3


def test_parquet_files_are_streamed(hf, saved, tmp_path, picture, read_tars):
    folder = tmp_path / "parquet"
    folder.mkdir()
    datasets.load_from_disk(str(saved))["train"].to_parquet(str(folder / "train.parquet"))
    for builder in ("parquet", "auto"):
        out = tmp_path / f"out-{builder}"
        hf.make_from_hf(str(folder), out, caption_column="texts", builder=builder, max_samples=4)
        assert [one["png"] for one in read_tars(out / "train")] == [picture(n, kind="PNG") for n in range(4)]


def test_image_folders_keep_jpeg_bytes(hf, tmp_path, picture, read_tars):
    folder = tmp_path / "folder"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.jpg").write_bytes(picture(number))
    lines = [json.dumps({"file_name": f"{number}.jpg", "text": f"caption {number}"}) for number in range(3)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    hf.make_from_hf(str(folder), tmp_path / "out", builder="imagefolder")
    found = read_tars(tmp_path / "out" / "train")
    assert [(one["jpg"], one["txt"].decode()) for one in found] == [(picture(n), f"caption {n}") for n in range(3)]


@pytest.mark.parametrize("builder", ["auto", "imagefolder"])
def test_a_folder_whose_name_is_a_pattern_is_refused(hf, tmp_path, picture, builder):
    for name in ("[a]*", "ab"):  # the library would read the second in place of the first
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.jpg").write_bytes(picture())
        (tmp_path / name / "metadata.jsonl").write_text(json.dumps({"file_name": "0.jpg", "text": name}) + "\n")
    with pytest.raises(UserError, match=r"has one of the characters \* \? \[, and .*; rename the folder"):
        hf.make_from_hf(str(tmp_path / "[a]*"), tmp_path / "out", caption_column="text", builder=builder)
    assert not (tmp_path / "out").exists()


def test_json_with_paths_relative_to_its_folder(hf, tmp_path, picture, read_tars):
    folder = tmp_path / "json"
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "a.jpg").write_bytes(picture(9))
    (folder / "train.jsonl").write_text(json.dumps({"image": "images/a.jpg", "text": "one"}) + "\n")
    hf.make_from_hf(str(folder), tmp_path / "out", builder="json")
    assert read_tars(tmp_path / "out" / "train")[0]["jpg"] == picture(9)


def test_rows_without_an_image_count_as_bad(hf, tmp_path):
    folder = tmp_path / "json"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"image": "gone.jpg", "text": "x"}\n')
    with pytest.raises(
        UserError, match=r"1 of 1 images are bad \(1 missing.* first is row 0 of split train, gone.jpg \("
    ):
        hf.make_from_hf(str(folder), tmp_path / "out", builder="json")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"caption_column": "caption"}, "has no column 'caption'; its columns are image, texts"),
        ({"image_column": "picture", "caption_column": "texts"}, "has no column 'picture'"),
        ({"split": "validation"}, "has no split 'validation'; its splits are train, test; name one .*--split-column"),
        (
            {"split": "val", "split_column": "texts"},
            r"no row has 'val' in column 'texts'; it has \['text 0', 'another'\]",
        ),
        ({"split": ""}, "name at least one split"),
        ({"max_samples": 0}, "--max-samples is 0"),
        ({"builder": "parquet", "source": "nowhere"}, "--builder parquet needs a local folder"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(hf, saved, tmp_path, changes, message):
    options = {"source": str(saved), "caption_column": "texts"} | changes
    with pytest.raises(UserError, match=message):
        hf.make_from_hf(out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_data_sets_that_cannot_be_reached_are_a_users_error(hf, tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError, match="someone/something cannot be opened: ConnectionError: no network"):
        hf.make_from_hf("someone/something", tmp_path / "out")


def write_parquet(folder, columns, name="train.parquet"):
    folder.mkdir()
    pq.write_table(pa.table(columns), folder / name, row_group_size=2)
    return folder


def structs(picture, kind="PNG"):
    return [{"bytes": picture(n, kind=kind), "path": None} for n in range(4)]


@pytest.mark.parametrize(
    ("captions", "expected"),
    [
        ([{"raw": f"t{n}", "tokens": ["t"]} for n in range(4)], "t0"),
        ([[{"raw": f"t{n}", "tokens": ["t"]}, {"raw": "b", "tokens": ["b"]}] for n in range(4)], "t0\nb"),
        ([[[f"t{n}"], ["b", "c"]] for n in range(4)], "t0\nb\nc"),
        ([json.dumps([f"t{n}", "b"]) for n in range(4)], "t0\nb"),
    ],
    ids=["struct", "list of structs", "nested lists", "JSON"],
)
def test_captions_in_other_forms(hf, tmp_path, picture, read_tars, captions, expected):
    folder = write_parquet(tmp_path / "set", {"image": structs(picture), "text": captions})
    hf.make_from_hf(str(folder), tmp_path / "out")
    assert read_tars(tmp_path / "out" / "train")[0]["txt"].decode() == expected


@pytest.mark.parametrize("form", ["bytes", "list of one", "gif"])
def test_images_in_other_forms(hf, tmp_path, picture, read_tars, form):
    images = structs(picture, "GIF" if form == "gif" else "PNG")
    images = [one["bytes"] if form == "bytes" else [one] if form == "list of one" else one for one in images]
    folder = write_parquet(tmp_path / "set", {"image": images, "text": list("abcd")})
    hf.make_from_hf(str(folder), tmp_path / "out")
    with Image.open(io.BytesIO(read_tars(tmp_path / "out" / "train")[2]["png"])) as image:
        assert image.convert("RGB").getpixel((0, 0)) == pytest.approx((2, 40, 90), abs=4)


def test_rows_are_sorted_by_a_column_of_splits(hf, tmp_path, picture, read_tars):
    columns = {"image": structs(picture), "text": list("abcd"), "split": ["train", "val", "train", "test"]}
    folder = write_parquet(tmp_path / "set", columns, "test.parquet")
    options = {"split_column": "split", "retrieval_splits": "val", "max_samples": 2}
    hf.make_from_hf(str(folder), tmp_path / "out", **options)
    assert [(one["__key__"], one["txt"]) for one in read_tars(tmp_path / "out" / "train")] == [
        ("00000000", b"a"),
        ("00000002", b"c"),
    ]
    assert [one["txt"] for one in read_tars(tmp_path / "out" / "val" / "test")] == [b"b"]


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        (
            "image",
            [[b"x", b"y"]] * 4,
            "row 0 of split train, column 'image', has a list of 2 values; it must be an image",
        ),
        ("image", [1, 2, 3, 4], "column 'image', has 1; it must be an image"),
        ("image", ["https://a.b/c.jpg"] * 4, "has the URL https://a.b/c.jpg; download the images with img2dataset"),
        ("text", [1, 2, 3, 4], "column 'text', has 1; a caption must be text"),
        ("text", [{"en": "x", "de": "y"}] * 4, "column 'text', has a struct of en, de; a caption must be text"),
        ("text", [b"x" * 50_000] * 4, r"has b'x{10,60} \.\.\. \(50,003 characters\); a caption must be text"),
    ],
)
def test_columns_of_something_else_are_named_by_row(hf, tmp_path, picture, column, values, message):
    folder = write_parquet(tmp_path / "set", {"image": structs(picture), "text": list("abcd"), column: values})
    with pytest.raises(UserError, match=message):
        hf.make_from_hf(str(folder), tmp_path / "out")


@pytest.mark.filterwarnings("ignore")
def test_damaged_files_and_programs_are_a_users_error(hf, tmp_path, picture):
    folder = write_parquet(tmp_path / "set", {"image": structs(picture), "text": list("abcd")})
    whole = (folder / "train.parquet").read_bytes()
    (folder / "train.parquet").write_bytes(whole[:4] + b"\xff" * 20 + whole[24:])
    with pytest.raises(UserError, match=r"split train cannot be read beyond row 0: .*; download the data set again"):
        hf.make_from_hf(str(folder), tmp_path / "out")
    (folder / "train.parquet").write_bytes(whole[:-30])
    with pytest.raises(UserError, match=r"set cannot be opened: ArrowInvalid: Parquet magic bytes not found"):
        hf.make_from_hf(str(folder), tmp_path / "out")
    program = tmp_path / "program"
    program.mkdir()
    (program / "program.py").write_text("import datasets")
    with pytest.raises(UserError, match=r"program is read by a program of its own, .* --revision refs/convert/parquet"):
        hf.make_from_hf(str(program), tmp_path / "out")


def test_images_are_never_decoded(hf, tmp_path, read_tars):
    """A picture cut off behind its header passes: its bytes are kept, and training counts it."""
    file = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(file, "PNG")
    rows = {"image": [{"bytes": file.getvalue()[:200], "path": None}], "text": ["x"]}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).save_to_disk(str(tmp_path / "saved"))
    hf.make_from_hf(str(tmp_path / "saved"), tmp_path / "out")
    assert read_tars(tmp_path / "out" / "train")[0]["png"] == file.getvalue()[:200]
