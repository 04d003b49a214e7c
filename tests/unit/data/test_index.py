import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import shutil
import struct
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import webdataset as wds

from mcl_clip.core.errors import UserError
from mcl_clip.data import index as index_module
from mcl_clip.data import samples as samples_module
from mcl_clip.data import scanning as scanning_module
from mcl_clip.data import tar as tar_module
from mcl_clip.data.index import RULE, ShardIndex, _assemble
from mcl_clip.data.samples import SampleRule
from mcl_clip.data.scanning import make_table
from mcl_clip.data.shards import Shard
from mcl_clip.data.storage import RetryPolicy
from tests.unit.data.http_ranges import serve
from tests.unit.data.tars import FORMATS, noise, pairs, read_tar, write_tar

COLUMNS = ("shard_of", "image_offset", "image_size", "image_format", "text_offset", "text_size", "text_format")
QUICK = RetryPolicy(retries=2, backoff_s=0.0, timeout_s=5.0)
JSON_FIRST = SampleRule(texts=("json", "txt"), needs_caption=False)


def build(*paths: Path, **options) -> ShardIndex:
    return ShardIndex.build([str(path) for path in paths], **options)


def payloads(index: ShardIndex, row: int) -> tuple[bytes, bytes]:
    data = Path(index.shards[index.shard_of[row]].url).read_bytes()
    image, text = int(index.image_offset[row]), int(index.text_offset[row])
    return data[image : image + index.image_size[row]], data[text : text + index.text_size[row]]


def contents(index: ShardIndex) -> dict[str, tuple[bytes, bytes]]:
    return {index.key(row): payloads(index, row) for row in range(len(index))}


def assert_equal(one: ShardIndex, other: ShardIndex) -> None:
    assert one.shards == other.shards
    assert one.digest == other.digest
    for name in (*COLUMNS, "sample_offset", "sample_size"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        assert getattr(one, name).dtype == getattr(other, name).dtype


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset's
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("stem", ["k", "d/k", "deep/" * 25 + "k", "x" * 120, "ключ-é", "./k"])
def test_rows_are_what_tarfile_and_webdataset_read(tmp_path, kind, stem):
    if kind == "ustar" and stem == "x" * 120:
        pytest.skip("does not fit a USTAR header")
    path = write_tar(tmp_path / "a.tar", pairs(3, prefix=stem), kind=kind)
    members = read_tar(path)
    index = build(path)
    expected = {
        name[:-4]: (data, members[f"{name[:-4]}.txt"]) for name, data in members.items() if name.endswith("jpg")
    }
    assert contents(index) == expected
    streamed = {s["__key__"]: (s["jpg"], s["txt"]) for s in wds.WebDataset([str(path)], shardshuffle=False)}
    assert contents(index) == streamed


def test_webdatasets_own_writer(tmp_path):
    with wds.ShardWriter(str(tmp_path / "%03d.tar"), maxcount=4, verbose=0) as writer:
        for number in range(10):
            name = f"s{number}"
            writer.write({"__key__": name, "jpg": noise(name, 99), "txt": name, "json": {"n": number}})
    index = build(*sorted(tmp_path.glob("*.tar")))
    assert [shard.rows for shard in index.shards] == [4, 4, 2]
    assert [shard.first_row for shard in index.shards] == [0, 4, 8]
    assert index.shard_of.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert contents(index) == {f"s{n}": (noise(f"s{n}", 99), f"s{n}".encode()) for n in range(10)}


def test_sample_extents_tile_the_shard(tmp_path):
    members = [("readme.md", b"hello"), *pairs(4), ("k9999.jpg", b"alone")]
    index = build(write_tar(tmp_path / "a.tar", members, kind="pax"))
    ends = index.sample_offset + index.sample_size
    np.testing.assert_array_equal(ends[:-1], index.sample_offset[1:])
    assert (index.sample_offset < index.image_offset).all()
    assert (ends >= index.text_offset + index.text_size).all()


def test_text_preference(tmp_path):
    path = write_tar(
        tmp_path / "a.tar",
        [
            ("a.jpg", b"1"),
            ("a.json", b"{}"),
            ("a.txt", b"t"),
            ("b.JPEG", b"2"),
            ("b.json", b"[]"),
            ("c.webp", b"3"),
            ("c.TXT", b"u"),
        ],
    )
    index = build(path, rule=SampleRule(needs_caption=False))
    assert contents(index) == {"a": (b"1", b"t"), "b": (b"2", b"[]"), "c": (b"3", b"u")}
    assert index.text_format.tolist() == [0, 1, 0]
    assert index.image_format.tolist() == [0, 1, 3]
    assert build(path, rule=JSON_FIRST).text_format.tolist() == [1, 1, 0]


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("b.jpg", b"1")], "missing_text"),
        ([("b.txt", b"1")], "missing_image"),
        ([("b.heic", b"1"), ("b.txt", b"1")], "format_heic"),
        ([("b.TIFF", b"1"), ("b.json", b"1")], "format_tiff"),
        ([("b.mp4", b"1"), ("b.txt", b"1")], "missing_image"),
        ([("b.jpg", b""), ("b.txt", b"1")], "empty_member"),
        ([("b.jpg", b"1"), ("b.txt", b"x" * (tar_module.MAX_TXT_BYTES + 1))], "oversize_member"),
        ([("b.jpg", b"1"), ("b.json", b"x" * (tar_module.MAX_JSON_BYTES + 1))], "oversize_member"),
        ([("b.jpg", bytes(tar_module.MAX_IMAGE_BYTES + 1)), ("b.txt", b"1")], "oversize_member"),
        ([("../b.jpg", b"1"), ("../b.txt", b"1")], "unsafe_name"),
        ([("/b.jpg", b"1"), ("/b.txt", b"1")], "unsafe_name"),
        ([("d/../b.jpg", b"1"), ("d/../b.txt", b"1")], "unsafe_name"),
        ([(".b.jpg", b"1"), (".b.txt", b"1")], "hidden_name"),
        ([("b", b"1")], "no_extension"),
        ([("b\x1b.jpg", b"1")], "missing_text"),
        ([("b.v1.jpg", b"1"), ("b.v1.txt", b"1")], "dotted_name"),
        ([("k0000.jpg", b"1"), ("k0000.txt", b"1")], "duplicate_key"),
        ([("k0001.jpg", b"1"), ("k0001.txt", b"1")], "duplicate_key"),  # right behind its namesake
        ([("b.jpg", b"1"), ("b.txt", b"1"), *((f"b.x{n}", b"") for n in range(15))], "too_many_members"),
    ],
)
def test_what_is_skipped_is_counted_once_by_reason(tmp_path, members, reason):
    path = write_tar(tmp_path / "a.tar", [*pairs(2), *members, ("z.jpg", b"1"), ("z.txt", b"2")])
    index = build(path)
    assert [index.key(row) for row in range(len(index))] == ["k0000", "k0001", "z"]
    assert index.shards[0].skipped == {reason: 1}
    assert index.skipped_by_reason() == {reason: 1}
    for number in range(2):
        name = f"k{number:04d}"
        assert contents(index)[name] == (noise(f"{name}.jpg", 700 + number), f"caption of {name}".encode())


def test_harmless_companions_are_ignored(tmp_path):
    extra = [
        ("k0003.npy", b"5" * 2000),
        ("k0003.left.jpg", b"1"),
        ("k0003.json", b"x" * (tar_module.MAX_JSON_BYTES + 1)),
    ]
    path = write_tar(tmp_path / "a.tar", [*pairs(4), *extra, ("._k.jpg", b"1")])
    index = build(path)
    assert len(index) == 4
    assert index.skipped_by_reason() == {}


def test_links_and_folders_are_no_rows(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w:", format=tarfile.GNU_FORMAT) as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE):
            for end in ("jpg", "txt"):
                info = tarfile.TarInfo(f"link{kind.decode()}.{end}")
                info.type, info.linkname = kind, "/etc/passwd"
                info.size = 5000 if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else 0  # says so, but has none
                tar.addfile(info)
        for name, data in pairs(1):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    index = build(path)
    assert [index.key(row) for row in range(len(index))] == ["k0000"]
    assert index.skipped_by_reason() == {"not_a_file": 4}


def test_a_huge_extended_header_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_module, "MAX_EXTENDED_HEADER_BYTES", 100)
    long = "y" * 120
    path = write_tar(tmp_path / "a.tar", [*pairs(1), *pairs(1, prefix=long)], kind="pax")
    index = build(path)
    assert [index.key(row) for row in range(len(index))] == ["k0000"]
    assert index.skipped_by_reason() == {"oversize_header": 1}


def test_odd_headers(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w:", format=tarfile.PAX_FORMAT, pax_headers={"comment": "for all members"}) as tar:
        for name, records in (
            ("a", {"comment": "é" * 300}),
            ("b", {"GNU.sparse.major": "1"}),
            ("c", {"size": "2"}),
            ("d", {"path": "moved.jpg"}),
        ):
            for end in ("jpg", "txt"):
                info = tarfile.TarInfo(f"{name}.{end}")
                info.size, info.pax_headers = 3, {k: v.replace("jpg", end) for k, v in records.items()}
                tar.addfile(info, io.BytesIO(f"{name}{end}".encode()))
    index = build(path)
    assert contents(index) == {"a": (b"ajp", b"atx"), "moved": (b"djp", b"dtx")}
    assert index.skipped_by_reason() == {"sparse_member": 1, "header_size": 1}
    assert index.sample_offset[0] >= 1024  # the header that holds for all belongs to no sample


def rewrite_header(path: Path, start: int, **fields: tuple[int, bytes]) -> None:
    data = bytearray(path.read_bytes())
    for place, value in fields.values():
        data[start + place : start + place + len(value)] = value
    data[start + 148 : start + 156] = b" " * 8
    data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
    path.write_bytes(data)


def test_sizes_in_base_256_and_sparse_members(tmp_path):
    path = write_tar(tmp_path / "a.tar", pairs(2))
    expected = build(path).digest
    rewrite_header(path, 0, size=(124, b"\x80" + (700).to_bytes(11, "big")))
    assert read_tar(path)["k0000.jpg"] == noise("k0000.jpg", 700)
    assert build(path).digest == expected
    rewrite_header(path, 0, size=(124, b"\x80" + (1 << 60).to_bytes(11, "big")))
    with pytest.raises(
        UserError, match=r"a\.tar is damaged at byte 512 of \d+: a payload of \d+ bytes does not fit into the file"
    ):
        build(path)
    rewrite_header(path, 0, size=(124, b"00000001274\0"), kind=(156, b"S"))
    with pytest.raises(UserError, match="sparse members are not supported"):
        build(path)


def test_no_row_is_lost_when_the_window_is_tiny_or_huge(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "a.tar", pairs(20, image_bytes=3000), kind="pax")
    expected = build(path)
    for window in (1, 513, 1 << 20):
        monkeypatch.setattr(samples_module, "_LOCAL_WINDOW", window)
        assert_equal(build(path), expected)


def test_without_captions_the_user_is_told(tmp_path):
    one = write_tar(tmp_path / "a.tar", [("a.jpg", b"1"), ("b.jpg", b"2")])
    with pytest.raises(UserError, match="has no captions: 2 samples have an image but no txt or json member"):
        build(one)
    apart = write_tar(tmp_path / "b.tar", [("a.jpg", b"1"), ("b.jpg", b"2"), ("a.txt", b"1"), ("b.txt", b"2")])
    with pytest.raises(UserError, match="must be adjacent in the tar"):
        build(apart)
    with pytest.raises(UserError, match="no sample with an image and a text"):
        build(write_tar(tmp_path / "c.tar", []))
    assert len(build(one, write_tar(tmp_path / "d.tar", pairs(1)))) == 1


@pytest.mark.parametrize("kind", FORMATS)
def test_a_tar_cut_anywhere_is_an_error_that_names_shard_and_byte(tmp_path, kind):
    whole = write_tar(tmp_path / "whole.tar", pairs(3), kind=kind).read_bytes()
    end = len(whole.rstrip(b"\0"))
    end += -end % 512 + 1024  # where the archive may end at the earliest
    cut = tmp_path / "cut.tar"
    for size in sorted({*range(0, len(whole), 512), *range(1, len(whole), 709), end - 1, end}):
        cut.write_bytes(whole[:size])
        if size >= end:
            assert len(build(cut)) == 3
            continue
        with pytest.raises(
            UserError, match=rf"cut\.tar is damaged at byte \d+ of {size}: .*; download or write it again"
        ):
            build(cut)


def test_a_flipped_header_byte_never_changes_a_row_silently(tmp_path):
    path = write_tar(tmp_path / "a.tar", pairs(2))
    expected, whole = build(path), path.read_bytes()
    headers = [
        start for offset in (*expected.image_offset, *expected.text_offset) for start in range(offset - 512, offset, 19)
    ]
    noticed = 0
    for place in headers:
        for bit in (0, 6):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            try:
                assert build(path).digest == expected.digest
            except UserError:
                noticed += 1
    assert noticed > 0.95 * 2 * len(headers)  # the rest lies in the padding of the checksum itself


def extended(kind: bytes, records: bytes) -> bytes:
    """An extended header for the next member."""
    info = tarfile.TarInfo("extended")
    info.type, info.size = kind, len(records)
    return info.tobuf(tarfile.USTAR_FORMAT) + records.ljust(512, b"\0")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (gzip.compress, "compressed"),
        (
            lambda data: data[:1024] + b"x" * 512 + data[1024:],
            "damaged at byte 1024 of 10752: a number in a header is malformed",
        ),
        (lambda data: data + data, "data follow the end-of-archive marker"),
        (lambda data: b"<body>" + data, "checksum"),
        (lambda data: b"\n<html>" + data, "checksum"),
        (lambda data: b"<!DOCTYPE html>" + data, "a.tar is an HTML page, as servers send for errors"),
        (lambda data: data[:1024] + bytes(512) + data[1536:], "single block of zeros"),
        (lambda data: bytes(512) + data, "single block of zeros"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS, not the file itself"),
        (lambda data: b"", "without an end-of-archive marker"),
        (lambda data: data + bytes(100_000) + b"x", "data follow the end-of-archive marker"),
        (lambda data: data + bytes(2 << 20), r"\d+ bytes follow the end-of-archive marker \(incomplete download\?\)"),
        (lambda data: extended(b"x", b"9 a=bcde\n") * 9 + data, "more than 8 extended headers follow each other"),
        (lambda data: extended(b"x", b"7 a=bcde\n") + data, "a PAX header is malformed"),
        (lambda data: extended(b"g", b"no records") + data, "a PAX header is malformed"),
        (lambda data: extended(b"K", b"far away\0") + data, "a long link name is followed by no link"),
        (bz2.compress, r"is compressed \(bzip2\); decompress it to a plain \.tar file"),
        (lzma.compress, r"is compressed \(xz\)"),
    ],
)
def test_other_damage(tmp_path, change, match):
    path = write_tar(tmp_path / "a.tar", pairs(1, image_bytes=10))
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=match):
        build(path)


def test_missing_and_refused_shards(tmp_path):
    with pytest.raises(UserError, match=r"gone\.tar does not exist"):
        build(tmp_path / "gone.tar")
    with pytest.raises(UserError, match="is not a supported protocol"):
        ShardIndex.build(["pipe:true"])


def test_save_and_load(tmp_path):
    index = build(
        write_tar(tmp_path / "a.tar", pairs(5)), write_tar(tmp_path / "b.tar", [*pairs(2, prefix="é"), ("q.jpg", b"1")])
    )
    index.save(tmp_path / "deep" / "i.arrow")
    loaded = ShardIndex.load(tmp_path / "deep" / "i.arrow")
    assert_equal(loaded, index)
    assert [loaded.key(row) for row in range(len(loaded))] == [index.key(row) for row in range(len(index))]
    assert loaded.skipped_by_reason() == {"missing_text": 1}
    assert not loaded.image_offset.flags.writeable
    with pytest.raises(IndexError, match="row 7"):
        loaded.key(7)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems take only names in UTF-8")
def test_names_that_are_not_utf_8(tmp_path):
    folder = tmp_path / os.fsdecode(b"Z\xfcrich")
    folder.mkdir()
    index = build(write_tar(folder / os.fsdecode(b"\xe4.tar"), pairs(3)))
    index.save(folder / "index.arrow")
    assert_equal(ShardIndex.load(folder / "index.arrow"), index)
    assert_equal(build(folder / os.fsdecode(b"\xe4.tar")), index)  # by way of the file beside the shard


def test_an_index_moves_with_its_shards(tmp_path):
    write_tar(tmp_path / "one" / "a.tar", pairs(2))
    build(tmp_path / "one" / "a.tar").save(tmp_path / "one" / "index.arrow")
    shutil.move(tmp_path / "one", tmp_path / "two")
    loaded = ShardIndex.load(tmp_path / "two" / "index.arrow")
    assert loaded.shards[0].url == str(tmp_path / "two" / "a.tar")
    loaded.check_unchanged()


def test_pickles(tmp_path):
    index = build(write_tar(tmp_path / "a.tar", pairs(200)))
    assert_equal(pickle.loads(pickle.dumps(index)), index)
    index.save(tmp_path / "i.arrow")
    loaded = ShardIndex.load(tmp_path / "i.arrow")
    text = pickle.dumps(loaded)
    assert len(text) < 500
    assert_equal(pickle.loads(text), index)
    index.save(tmp_path / "i.arrow")
    with pytest.raises(UserError, match="was overwritten while it was in use"):
        pickle.loads(text)


def test_damaged_index_files(tmp_path):
    with pytest.raises(UserError, match=r"the index .*none\.arrow does not exist"):
        ShardIndex.load(tmp_path / "none.arrow")
    path = tmp_path / "i.arrow"
    build(write_tar(tmp_path / "a.tar", pairs(50))).save(path)
    whole = path.read_bytes()
    for data in (b"", b"hello", whole[:-1], whole[: len(whole) // 2], whole[:-400]):
        path.write_bytes(data)
        with pytest.raises(UserError, match="not a complete index file"):
            ShardIndex.load(path)
    path.write_bytes(whole.replace(b'{"version": 1', b'{"version": 9'))
    with pytest.raises(UserError, match="version 9, expected 1"):
        ShardIndex.load(path)
    path.write_bytes(whole.replace(b'"rows": 50', b'"rows": 49'))
    with pytest.raises(UserError, match="its shards and rows do not match"):
        ShardIndex.load(path)


def rewrite_index(path: Path, *, metadata=None, **columns) -> None:
    """Another description of the shards, or other values in row 0."""
    table = pa.ipc.open_file(pa.BufferReader(path.read_bytes())).read_all()
    stored = json.loads(table.schema.metadata[b"mcl_clip"])
    for name, value in columns.items():
        values = table.column(name).to_pylist()
        field = table.schema.field(name)
        table = table.set_column(table.schema.get_field_index(name), field, pa.array([*values[:-1], value], field.type))
    stored = json.dumps(metadata(stored) if metadata else stored)
    table = table.replace_schema_metadata({b"mcl_clip": stored})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


@pytest.mark.parametrize(
    ("columns", "what"),
    [
        ({"image_offset": 0}, "member offsets"),
        ({"image_offset": 2**62}, "member offsets"),
        ({"text_size": -1}, "member offsets"),
        ({"sample_size": 2**62}, "member offsets"),
        ({"sample_offset": -512}, "member offsets"),
        ({"image_format": len(tar_module.IMAGE_FORMATS)}, "formats"),
        ({"text_format": 200}, "formats"),
        ({"shard": 1}, "shard numbers"),
        ({"key": ""}, "keys"),
    ],
)
def test_rows_of_a_hostile_index_lie_in_their_shards(tmp_path, monkeypatch, columns, what):
    monkeypatch.setattr(index_module, "_CHUNK_ROWS", 2)
    path = tmp_path / "i.arrow"
    build(write_tar(tmp_path / "a.tar", pairs(3))).save(path)
    rewrite_index(path)
    assert len(ShardIndex.load(path)) == 3
    rewrite_index(path, **columns)
    with pytest.raises(UserError, match=rf"the index .*i\.arrow is damaged \({what}\); delete it and build it again"):
        ShardIndex.load(path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"url": "pipe:touch x"}, "starts with 'pipe:', which is not a supported protocol"),
        ({"url": "zip://a.tar::http://h/x.zip"}, "chained URL"),
        ({"url": 5}, "a shard without a name"),
        ({"size": -1}, "a shard without a size"),
        ({"skipped": {"x": "y"}}, "a shard without a size"),
        ({"more": 1}, "not a complete index file"),
        ({"rows": 3.0}, "a shard without a size"),
    ],
)
def test_shards_of_a_hostile_index_are_not_opened(tmp_path, change, match):
    path = tmp_path / "i.arrow"
    build(write_tar(tmp_path / "a.tar", pairs(3))).save(path)
    rewrite_index(path, metadata=lambda stored: {**stored, "shards": [{**stored["shards"][0], **change}]})
    with pytest.raises(UserError, match=match):
        ShardIndex.load(path)


@pytest.mark.parametrize("count", [1, -1, -(2**63)])
def test_nulls_are_refused_whatever_their_count_says(tmp_path, count):
    shard, path = write_tar(tmp_path / "a.tar", pairs(3)), tmp_path / "index.arrow"
    build(shard).save(path)
    rewrite_index(path, sample_size=None)
    whole = path.read_bytes()
    assert whole.count(struct.pack("<qq", 3, 1)) == 1  # rows and nulls of the column
    path.write_bytes(whole.replace(struct.pack("<qq", 3, 1), struct.pack("<qq", 3, count)))
    for use in (ShardIndex.load, lambda _: build(shard)):
        with pytest.raises(UserError, match="not a complete index file"):
            use(path)


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_what_is_no_file_is_not_opened(tmp_path, kind):
    path = tmp_path / "a.tar"
    os.mkfifo(path) if kind == "pipe" else path.mkdir()
    with pytest.raises(UserError, match=r"a\.tar is not a regular file; give a tar file, or a folder that holds"):
        build(path)


@pytest.mark.parametrize("name", ["pyd", "pkl", "pth", "pt", "meta.pyd", "pyd.gz", "npy"])
def test_pickles_beside_a_sample_are_never_opened(tmp_path, name):
    canary = tmp_path / "executed"
    payload = pickle.dumps(Touch(str(canary)))
    path = write_tar(tmp_path / "a.tar", [("k0000.jpg", b"1"), (f"k0000.{name}", payload), ("k0000.txt", b"2")])
    index = build(path)
    assert contents(index) == {"k0000": (b"1", b"2")}
    assert not canary.exists()
    pickle.loads(payload).close()
    assert canary.exists()  # the payload is a real one


class Touch:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_the_digest_is_of_the_samples_not_of_places(tmp_path):
    one = build(write_tar(tmp_path / "a.tar", pairs(6)))
    two = build(
        write_tar(tmp_path / "x" / "b.tar", pairs(6)[:4], kind="pax"), write_tar(tmp_path / "x" / "c.tar", pairs(6)[4:])
    )
    assert one.digest == two.digest
    for other in (
        pairs(5),
        pairs(6, image_bytes=701),
        pairs(6, prefix="m"),
        [*pairs(6)[2:], *pairs(6)[:2]],
        [(name.replace("txt", "json"), data) for name, data in pairs(6)],
    ):
        assert build(write_tar(tmp_path / "o.tar", other)).digest != one.digest
    assert one.digest == "da87b5b2183fd3fb32127cfc30327cbd"


def test_the_digest_does_not_depend_on_its_chunks(tmp_path, monkeypatch):
    big = synthetic(1000)
    assert big.digest == synthetic(1000).digest
    parts = [synthetic(1000, slice(start, start + 100), name=str(start))._part(0) for start in range(0, 1000, 100)]
    assert _assemble(parts, RULE).digest == big.digest


def test_an_index_beside_the_shards_is_reused_for_unchanged_ones(tmp_path, monkeypatch):
    paths = [write_tar(tmp_path / f"{name}.tar", pairs(3, prefix=name)) for name in "abc"]
    index = build(*paths)
    index.write_beside()
    scanned = []
    scan = scanning_module.scan_shard
    monkeypatch.setattr(scanning_module, "scan_shard", lambda url, *a, **k: scanned.append(url) or scan(url, *a, **k))
    assert_equal(build(*paths), index)
    assert_equal(build(*paths[1:]), build(*paths[1:], reuse=False))
    assert_equal(build(paths[2], paths[0]), build(paths[2], paths[0], reuse=False))
    scanned.clear()
    build(*paths)
    assert scanned == []
    write_tar(paths[1], pairs(3, prefix="w"))
    os.utime(paths[1], (1, 1))
    changed = build(*paths)
    assert scanned == [str(paths[1])]
    assert changed.key(3) == "w0000"
    scanned.clear()
    build(*paths, rule=JSON_FIRST)
    assert len(scanned) == 3


def test_write_beside_needs_local_shards():
    remote = ShardIndex([Shard("https://h/x.tar", 1, "", 0, 0, {})], synthetic(0)._table)
    with pytest.raises(UserError, match="all shards of the index are remote"):
        remote.write_beside()


def test_check_unchanged(tmp_path):
    paths = [write_tar(tmp_path / f"{name}.tar", pairs(2)) for name in "ab"]
    index = build(*paths)
    index.check_unchanged()
    os.utime(paths[1], (5, 5))
    with pytest.raises(UserError, match=r"b\.tar changed since it was indexed"):
        index.check_unchanged()
    paths[0].unlink()
    with pytest.raises(UserError, match=r"a\.tar does not exist"):
        index.check_unchanged()


def test_a_shard_that_grows_while_it_is_read(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "a.tar", pairs(2))
    scan = scanning_module.scan_shard

    def touching(*arguments, **options):
        os.utime(path, (7, 7))
        return scan(*arguments, **options)

    monkeypatch.setattr(scanning_module, "scan_shard", touching)
    with pytest.raises(UserError, match="changed while it was read"):
        build(path)


def synthetic(count: int, part: slice = slice(None), name: str = "s") -> ShardIndex:
    rows = np.arange(count)[part]
    starts = rows * 4096
    columns = {"sample_offset": starts, "image_offset": starts + 512, "text_offset": starts + 2560}
    columns |= {"sample_size": np.full(len(rows), 4096), "image_size": 1 + rows % 1001, "text_size": 1 + rows % 97}
    columns |= {"image_format": rows % 4, "text_format": rows % 2, "shard": np.zeros(len(rows))}
    table = make_table([b"key%d" % row for row in rows], columns)
    return ShardIndex([Shard(f"/{name}.tar", 4096 * count, "", 0, len(rows), {})], table)


def test_a_million_rows_load_at_once(tmp_path):
    synthetic(1_000_000).save(tmp_path / "i.arrow")
    start = time.process_time()
    index = ShardIndex.load(tmp_path / "i.arrow")
    assert time.process_time() - start < 0.3
    assert len(index) == 1_000_000
    assert index.key(999_999) == "key999999"
    assert index.text_size[999_999] == 1 + 999_999 % 97
    start = time.perf_counter()
    assert index.digest
    assert time.perf_counter() - start < 2
    base = index.image_offset
    while isinstance(base, np.ndarray):
        base = base.base
    assert base is not None  # a view of the file


def test_remote_shards_give_the_same_rows(tmp_path, monkeypatch):
    paths = [write_tar(tmp_path / f"{name}.tar", pairs(8, prefix=name, image_bytes=5000), kind="pax") for name in "ab"]
    local = build(*paths)
    for window in (2000, 4 << 20):
        monkeypatch.setattr(samples_module, "_REMOTE_WINDOW", window)
        with serve(tmp_path) as server:
            remote = ShardIndex.build([f"{server.url}/{path.name}?secret=x" for path in paths], retry=QUICK)
            assert remote.digest == local.digest
            np.testing.assert_array_equal(remote.image_offset, local.image_offset)
            assert all(shard.stamp.startswith("ETag") for shard in remote.shards)
            remote.check_unchanged(retry=QUICK)
            remote.save(tmp_path / "i.arrow")
            assert (tmp_path / "i.arrow").stat().st_mode & 0o077 == 0
            if window > 10000:
                assert len(server.ranges()) == 2
            os.utime(paths[1], (window, window))
            with pytest.raises(UserError, match=r"/b\.tar changed") as caught:
                remote.check_unchanged(retry=QUICK)
            assert "secret" not in str(caught.value)


@pytest.mark.parametrize("trouble", [{"failures": 2}, {"cut_bodies": 2}, {"failures": 1, "failure_status": 429}])
def test_passing_troubles_of_the_server_are_waited_out(tmp_path, trouble):
    local = build(write_tar(tmp_path / "a.tar", pairs(4)))
    with serve(tmp_path) as server:
        for name, value in trouble.items():
            setattr(server, name, value)
        assert ShardIndex.build([f"{server.url}/a.tar"], retry=QUICK).digest == local.digest


def test_lasting_troubles_of_the_server(tmp_path, monkeypatch):
    monkeypatch.setattr(samples_module, "_REMOTE_WINDOW", 2048)
    write_tar(tmp_path / "a.tar", pairs(4))
    with serve(tmp_path) as server:
        url = f"{server.url}/a.tar?token=SECRET"
        with pytest.raises(UserError, match=r"/gone\.tar does not exist"):
            ShardIndex.build([f"{server.url}/gone.tar"], retry=QUICK)
        before = len(server.requests)
        assert before <= 2  # a missing file is not asked for again
        for status, error, match in (
            (403, UserError, "access to .* is denied"),
            (410, UserError, "does not exist"),
            (418, UserError, "HTTP status 418"),
            (503, OSError, "failed 3 times"),
        ):
            server.failures, server.failure_status = 100, status
            with pytest.raises(error, match=match) as caught:
                ShardIndex.build([url], retry=QUICK)
            assert "SECRET" not in "".join(map(str, (caught.value, caught.value.__cause__)))
            assert caught.value.__suppress_context__
        server.failures, server.ignores_ranges = 0, True
        with pytest.raises(UserError, match="ignores range requests and sends whole files"):
            ShardIndex.build([url], retry=QUICK)


def test_a_server_that_refuses_head_requests(tmp_path):
    local = build(write_tar(tmp_path / "a.tar", pairs(4)))
    with serve(tmp_path) as server:
        server.refuses_head = True
        assert ShardIndex.build([f"{server.url}/a.tar"], retry=QUICK).digest == local.digest


def test_impossible_retries():
    with pytest.raises(UserError, match="retries and backoff_s"):
        RetryPolicy(retries=-1)
