import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest
import webdataset as wds
from PIL import Image

from mcl_clip.core.errors import UserError
from mcl_clip.data.index import ShardIndex
from mcl_clip.data.writing import (
    LabelledImage,
    Pair,
    clean_captions,
    clean_key,
    image_extension,
    new_folder,
    refuse_non_empty,
    write_classification_set,
    write_pairs,
    write_retrieval_set,
)

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning:webdataset.tariterators")


def picture(level: int = 0, kind: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (10, 6), (level % 256, 30, 70)).save(file, kind, **options)
    return file.getvalue()


def pairs(count: int, **changes) -> list[Pair]:
    return [
        Pair(**{"key": f"k{n:03d}", "image": picture(n), "captions": [f"caption {n}", "another"], **changes})
        for n in range(count)
    ]


def read(folder: Path) -> list[dict]:
    urls = [str(path) for path in sorted(folder.glob("*.tar"), key=lambda path: int(path.stem))]
    return list(wds.WebDataset(urls, shardshuffle=False, empty_check=False))


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".arrow"  # holds the dates of the shards
    }


def test_written_pairs_are_read_back_in_order_and_indexed(tmp_path):
    samples = pairs(7)
    index = write_pairs(iter(samples), tmp_path / "out", samples_per_shard=3)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "000000.tar",
        "000001.tar",
        "000002.tar",
        "index.arrow",
    ]
    assert [shard.rows for shard in index.shards] == [3, 3, 1]
    assert [index.key(row) for row in range(len(index))] == [sample.key for sample in samples]
    assert ShardIndex.load(tmp_path / "out" / "index.arrow").digest == index.digest
    for sample, found in zip(samples, read(tmp_path / "out"), strict=True):
        assert (found["__key__"], found["jpg"]) == (sample.key, sample.image)
        assert found["txt"].decode().splitlines() == list(sample.captions)


def test_the_index_of_the_returned_value_points_to_the_final_folder(tmp_path):
    index = write_pairs(pairs(2), tmp_path / "out")
    assert index.shards[0].url == str(tmp_path / "out" / "000000.tar")
    index.check_unchanged()


def test_shards_are_indexed_once(tmp_path, monkeypatch):
    built, build = [], ShardIndex.build
    monkeypatch.setattr(ShardIndex, "build", lambda *a, **k: built.append(build(*a, **k)) or built[-1])
    index = write_pairs(pairs(3), tmp_path / "out", samples_per_shard=2)
    assert len(built) == 1
    assert (index.digest, len(index.shards)) == (built[0].digest, 2)
    index.check_unchanged()


def test_equal_samples_give_equal_bytes(tmp_path):
    for name in ("a", "b"):
        write_pairs(pairs(5, attributes={"colour": "red"}), tmp_path / name / "pairs", samples_per_shard=2)
        write_retrieval_set(pairs(5), tmp_path / name / "retrieval")
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    with tarfile.open(tmp_path / "a" / "pairs" / "000000.tar") as tar:
        assert {(one.mtime, one.uid, one.gid, one.uname, one.gname, one.mode) for one in tar} == {
            (0, 0, 0, "", "", 0o444)
        }


@pytest.mark.parametrize(("kind", "extension"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")])
def test_image_files_are_stored_as_given(tmp_path, kind, extension):
    write_pairs(pairs(1, image=picture(5, kind)), tmp_path / "out")
    assert read(tmp_path / "out")[0][extension] == picture(5, kind)


def test_other_formats_and_broken_headers_have_no_extension():
    assert image_extension(picture(0, "GIF")) == ""
    assert image_extension(picture()[:20]) == ""
    assert image_extension(b"<svg/>") == ""


def test_attributes_become_json(tmp_path):
    index = write_pairs(pairs(1, attributes={"colour": "grün"}), tmp_path / "out")
    assert json.loads(read(tmp_path / "out")[0]["json"]) == {"colour": "grün"}
    assert len(index) == 1


@pytest.mark.parametrize(
    "separator", ["\n", "\r\n", "\r", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]
)
def test_nothing_that_splits_lines_stays_in_a_caption(separator):
    assert clean_captions([f" a{separator}b{separator}"]) == ["a b"]


def test_empty_captions_are_dropped_and_counted_and_samples_without_any_left_out(tmp_path, capsys):
    samples = pairs(3)
    samples[0] = Pair(key="x", image=picture(), captions=["", " \n ", "kept"])
    samples[1] = Pair(key="y", image=picture(), captions=[""])
    index = write_pairs(samples, tmp_path / "out")
    assert [index.key(row) for row in range(len(index))] == ["x", "k002"]
    line = "out: 2 of 3 samples written (3 empty captions dropped, 1 samples without captions left out)\n"
    assert capsys.readouterr().out == line


def test_lone_surrogates_do_not_stop_the_writer(tmp_path):
    write_pairs(pairs(1, captions=["a \ud800 b"]), tmp_path / "out")
    assert read(tmp_path / "out")[0]["txt"] == b"a ? b"


def test_too_long_texts_and_images_are_left_out_rather_than_lost_in_the_index(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("mcl_clip.data.writing.MAX_IMAGE_BYTES", 2000)
    samples = [*pairs(3), Pair(key="long", image=picture(), captions=["x" * 70_000])]
    samples.append(Pair(key="big", image=picture() + bytes(2000), captions=["x"]))
    assert len(write_pairs(samples, tmp_path / "out", max_bad_fraction=0.2)) == 3
    left_out = "1 samples with too long a text left out, 1 images over 0 MiB"
    assert capsys.readouterr().out == f"out: 3 of 5 samples written ({left_out})\n"


def test_photos_that_are_stored_turned_are_counted(tmp_path, capsys):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = picture(0, "JPEG", exif=exif)
    write_pairs([*pairs(4), Pair(key="t", image=image, captions=["x"])], tmp_path / "out")
    line = "out: 1 images are stored turned, with an EXIF orientation by which they are read upright\n"
    assert capsys.readouterr().out == line
    assert next(one for one in read(tmp_path / "out") if one["__key__"] == "t")["jpg"] == image


def test_bad_images_are_counted_up_to_the_limit(tmp_path, capsys):
    samples = [*pairs(8), Pair(key="m", image=b"", captions=["x"]), Pair(key="u", image=b"no", captions=["x"])]
    assert len(write_pairs(samples, tmp_path / "out", max_bad_fraction=0.2)) == 8
    assert capsys.readouterr().out == "out: 8 of 10 samples written (1 missing images, 1 unreadable images)\n"
    with pytest.raises(
        UserError, match=r"2 of 10 images are bad .* --max-bad-fraction 0.19 .* the first is m \(missing"
    ):
        write_pairs(samples, tmp_path / "more", max_bad_fraction=0.19)


def test_with_a_known_total_too_many_bad_images_stop_at_once(tmp_path):
    def endless():
        for number in range(10**9):
            assert number < 4, "the writer did not stop"
            yield Pair(key=f"k{number}", image=b"", captions=["x"])

    with pytest.raises(UserError, match="3 of 200 images are bad"):
        write_pairs(endless(), tmp_path / "out", total=200)


def test_the_first_frame_of_a_gif_is_stored_as_png(tmp_path, capsys):
    file = io.BytesIO()
    frames = [Image.new("P", (4, 3), color) for color in (1, 2)]
    frames[0].putpalette([0, 0, 0, 250, 20, 30, 0, 0, 255])
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    write_pairs([Pair(key="g", image=file.getvalue(), captions=["x"]), *pairs(1)], tmp_path / "out")
    with Image.open(io.BytesIO(read(tmp_path / "out")[0]["png"])) as image:
        assert image.convert("RGB").getpixel((1, 1)) == (250, 20, 30)
    assert capsys.readouterr().out == "out: 2 of 2 samples written (1 images of other formats stored as PNG)\n"


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"<!DOCTYPE html><html>", "files of format html"),
        (b"\0\0\0 ftypheic", "files of format heic"),
        (b"II*\0", "files of format tiff"),
        (b"GIF89a cut", "unreadable images"),
        (b"noise", "unreadable images"),
    ],
)
def test_what_is_in_the_place_of_an_image_is_named_with_its_path(tmp_path, data, kind):
    sample = Pair(key="a-1f", image=data, captions=["x"], source="photos/ä.jpg")
    with pytest.raises(UserError, match=rf"1 of 1 images are bad \(1 {kind}\).* the first is photos/ä.jpg \({kind}\)"):
        write_pairs([sample], tmp_path / "out")


@pytest.mark.parametrize("key", ["a.b", "a/b", "", "a b", "x" * 81, "ä"])
def test_keys_that_readers_would_cut_are_refused(tmp_path, key):
    with pytest.raises(UserError, match=r"use clean_key\(name\)"):
        write_pairs(pairs(1, key=key), tmp_path / "out")


def test_repeated_keys_are_refused(tmp_path):
    with pytest.raises(UserError, match="the key 'k' occurs twice"):
        write_pairs(pairs(2, key="k"), tmp_path / "out")


def test_cleaned_keys_fit_and_differ():
    names = ["a.b", "a/b", "a_b", "a b", "ä" * 200, "ä" * 201, "", "x" * 80, "x" * 81, "..", "\udcff"]
    keys = [clean_key(name) for name in names]
    assert len(set(keys)) == len(names)
    assert [clean_key(key) for key in keys] == keys
    assert clean_key("a_b") == "a_b"


def test_nothing_is_left_after_an_error(tmp_path):
    def failing():
        yield from pairs(5)
        raise KeyboardInterrupt

    for write in (write_pairs, write_retrieval_set):
        with pytest.raises(KeyboardInterrupt):
            write(failing(), tmp_path / "out", samples_per_shard=2)
        assert list(tmp_path.iterdir()) == []


def test_output_has_its_name_only_when_it_is_whole(tmp_path):
    def watched():
        yield from pairs(3)
        assert not (tmp_path / "out").exists()

    write_pairs(watched(), tmp_path / "out", samples_per_shard=1)
    assert (tmp_path / "out" / "index.arrow").exists()


def test_output_folders_that_hold_something_are_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is not empty; choose a new one"):
        refuse_non_empty(tmp_path)
    with pytest.raises(UserError, match="is a file"):
        refuse_non_empty(tmp_path / "file")
    with pytest.raises(UserError, match="is not empty"):
        write_pairs(pairs(1), tmp_path)
    assert (tmp_path / "file").read_text() == "x"
    refuse_non_empty(tmp_path / "new")


def test_the_current_folder_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="choose a new folder inside it"), new_folder(Path(".")):
        pass


def test_odd_folder_names_are_only_names(tmp_path):
    out = tmp_path / "100%d #1?x: y"
    assert len(write_pairs(pairs(2), out, samples_per_shard=1)) == 2
    assert (out / "000001.tar").exists()


def test_an_empty_set_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"no sample is left for .*out: 0 given, none left out"):
        write_pairs([], tmp_path / "out")
    with pytest.raises(UserError, match="--samples-per-shard is 0"):
        write_pairs(pairs(1), tmp_path / "out", samples_per_shard=0)


def test_a_retrieval_set_has_the_layout_of_clip_benchmark(tmp_path):
    samples = pairs(12, attributes={"colour": "red"})
    size = write_retrieval_set(samples, tmp_path / "out", samples_per_shard=1)
    assert size == (12, 24)
    assert (tmp_path / "out" / "dataset_type.txt").read_text() == "retrieval\n"
    assert (tmp_path / "out" / "test" / "nshards.txt").read_text() == "12\n"
    assert {path.name for path in (tmp_path / "out" / "test").glob("*.tar")} == {f"{n}.tar" for n in range(12)}
    assert (tmp_path / "out" / "keys.txt").read_text().split() == [sample.key for sample in samples]
    found = read(tmp_path / "out" / "test")
    assert [one["__key__"] for one in found] == [f"s{n:07d}" for n in range(12)]
    assert {name for name in found[0] if not name.startswith("__")} == {"jpg", "txt"}
    assert [one["txt"].decode().splitlines() for one in found] == [list(sample.captions) for sample in samples]


def test_numbers_of_a_retrieval_set_have_no_holes(tmp_path):
    samples = pairs(5)
    samples[2] = Pair(key="bad", image=b"", captions=["x"])
    write_retrieval_set(samples, tmp_path / "out", max_bad_fraction=0.5)
    assert [one["__key__"] for one in read(tmp_path / "out" / "test")] == [f"s{n:07d}" for n in range(4)]
    assert "bad" not in (tmp_path / "out" / "keys.txt").read_text()


def labelled(labels: list[int]) -> list[LabelledImage]:
    return [LabelledImage(key=str(n), image=picture(n, "PNG"), label=label) for n, label in enumerate(labels)]


def test_a_classification_set_has_the_layout_of_clip_benchmark(tmp_path):
    templates = ["a photo of a {c}", "a {c}"]
    size = write_classification_set(
        labelled([1, 0, 1]), tmp_path / "out", classnames=["cat", "ice bear"], templates=templates, samples_per_shard=2
    )
    assert size.images == 3
    assert (tmp_path / "out" / "classnames.txt").read_text() == "cat\nice bear\n"
    assert (tmp_path / "out" / "zeroshot_classification_templates.txt").read_text().splitlines() == templates
    assert (tmp_path / "out" / "test" / "nshards.txt").read_text() == "2\n"
    assert not (tmp_path / "out" / "dataset_type.txt").exists()
    found = read(tmp_path / "out" / "test")
    assert [(one["__key__"], one["cls"], one["png"]) for one in found] == [
        (f"s{n:07d}", str(label).encode(), picture(n, "PNG")) for n, label in enumerate([1, 0, 1])
    ]


@pytest.mark.parametrize(
    ("labels", "classnames", "templates", "message"),
    [
        ([2], ["a", "b"], ["{c}"], "has the label 2; there are 2 class names"),
        ([0], ["a", "b"], ["a photo"], "has no {c}"),
        ([0], ["a", "a"], ["{c}"], "class names must differ"),
        ([0], ["a\nb"], ["{c}"], "longer than a line"),
        ([0], [], ["{c}"], "at least one class name"),
    ],
)
def test_wrong_classes_are_refused(tmp_path, labels, classnames, templates, message):
    with pytest.raises(UserError, match=message):
        write_classification_set(labelled(labels), tmp_path / "out", classnames=classnames, templates=templates)
    assert list(tmp_path.iterdir()) == []
