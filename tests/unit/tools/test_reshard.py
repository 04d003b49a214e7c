import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds

from mcl_clip.core.errors import UserError
from mcl_clip.data.index import ShardIndex
from mcl_clip.data.reader import Reader
from mcl_clip.tools.reshard import reshard
from tests.unit.data.http_ranges import serve
from tests.unit.data.tars import FORMATS, noise, pairs, read_tar, write_tar


@pytest.fixture
def index(tmp_path: Path) -> ShardIndex:
    paths = []
    for number, kind in enumerate(FORMATS):
        members = []
        for name, data in pairs(10, prefix=f"d/s{number}_"):
            members.append((name, data))
            if name.endswith("txt"):
                members.append((name.replace(".txt", ".npy"), noise(name, 1200)))
        members += [
            (f"broken{number}.jpg", b"no text"),
            (f"{'long' * 30}{number}.jpg", b"i"),
            (f"{'long' * 30}{number}.txt", b"t"),
        ]
        if kind == "ustar":
            members = members[:-2]
        paths.append(str(write_tar(tmp_path / "old" / f"{number}.tar", members, kind=kind)))
    return ShardIndex.build(paths)


def groups_of(index: ShardIndex) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 4, len(index))


def members_by_key(path: Path) -> dict[str, dict[str, bytes]]:
    found: dict[str, dict[str, bytes]] = {}
    for name, data in read_tar(path).items():
        key, _, end = name.partition(".")
        found.setdefault(key, {})[end] = data
    return found


def test_samples_move_whole_and_in_group_order(index, tmp_path):
    groups = groups_of(index)
    new = reshard(index, groups, tmp_path / "new", rows_per_shard=7, seed=0)
    row_map = np.load(tmp_path / "new" / "row_map.npy", allow_pickle=False)
    np.testing.assert_array_equal(np.sort(row_map), np.arange(len(index)))
    assert (np.diff(groups[row_map]) >= 0).all()
    assert [shard.rows for shard in new.shards] == [7, 7, 7, 7, 4]
    assert [new.key(row) for row in range(len(new))] == [index.key(row) for row in row_map]
    old_reader, new_reader = Reader(index), Reader(new)
    assert new_reader.read_whole(np.arange(len(new))) == old_reader.read_whole(row_map)
    for one, two in zip(new_reader.read(np.arange(len(new))), old_reader.read(row_map), strict=True):
        assert (one.image, one.text, one.text_format) == (two.image, two.text, two.text_format)


def test_the_index_is_the_one_that_a_scan_gives(index, tmp_path):
    new = reshard(index, groups_of(index), tmp_path / "new", rows_per_shard=7, seed=0)
    scanned = ShardIndex.build([shard.url for shard in new.shards], reuse=False)
    assert scanned.shards == new.shards
    assert scanned.digest == new.digest
    for name in (
        "shard_of",
        "image_offset",
        "text_offset",
        "sample_offset",
        "sample_size",
        "image_format",
        "text_format",
    ):
        np.testing.assert_array_equal(getattr(scanned, name), getattr(new, name))
    new.check_unchanged()
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        *(f"{number:06d}.tar" for number in range(5)),
        "index.arrow",
        "row_map.npy",
    ]


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset's
def test_webdataset_and_tarfile_read_the_result(index, tmp_path):
    old = {}
    for shard in index.shards:
        old |= members_by_key(Path(shard.url))
    new = reshard(index, groups_of(index), tmp_path / "new", rows_per_shard=7, seed=0)
    urls = [shard.url for shard in new.shards]
    streamed = {}
    for sample in wds.WebDataset(urls, shardshuffle=False):
        streamed[sample["__key__"]] = {name: data for name, data in sample.items() if not name.startswith("__")}
    by_tarfile = {}
    for url in urls:
        by_tarfile |= members_by_key(Path(url))
        assert Path(url).stat().st_size % tarfile.RECORDSIZE == 0
    assert streamed == by_tarfile == {key: value for key, value in old.items() if not key.startswith("broken")}
    assert list(streamed) == [new.key(row) for row in range(len(new))]


def test_the_shuffle_has_a_name(index, tmp_path):
    groups = np.zeros(len(index), np.int32)
    maps = []
    for number, seed in enumerate((0, 0, 1)):
        reshard(index, groups, tmp_path / str(number), rows_per_shard=100, seed=seed)
        maps.append(np.load(tmp_path / str(number) / "row_map.npy"))
    np.testing.assert_array_equal(maps[0], maps[1])
    assert (maps[0] != maps[2]).any()
    assert (maps[0] != np.arange(len(index))).any()


def test_keys_that_repeat_never_meet_in_a_shard(tmp_path):
    paths = [str(write_tar(tmp_path / f"{number}.tar", pairs(12, image_bytes=10 + number))) for number in range(5)]
    index = ShardIndex.build(paths)
    for groups, fewest in ((np.zeros(60, np.int64), 5), (np.random.default_rng(1).integers(0, 2, 60), 12)):
        new = reshard(index, groups, tmp_path / str(fewest), rows_per_shard=12, seed=0)
        assert len(new) == 60
        assert ShardIndex.build([shard.url for shard in new.shards], reuse=False).digest == new.digest
        row_map = np.load(tmp_path / str(fewest) / "row_map.npy")
        np.testing.assert_array_equal(np.sort(row_map), np.arange(60))
        assert (np.diff(groups[row_map]) >= 0).all()
        assert len(new.shards) <= fewest


def test_remote_shards(index, tmp_path):
    groups = groups_of(index)
    local = reshard(index, groups, tmp_path / "local", rows_per_shard=9, seed=2)
    with serve(tmp_path / "old") as server:
        remote = ShardIndex.build([f"{server.url}/{Path(shard.url).name}" for shard in index.shards])
        copied = reshard(remote, groups, tmp_path / "copied", rows_per_shard=9, seed=2, reader=Reader(remote))
    assert copied.digest == local.digest
    for one, two in zip(copied.shards, local.shards, strict=True):
        assert Path(one.url).read_bytes() == Path(two.url).read_bytes()


def test_mistakes(index, tmp_path, monkeypatch):
    groups, new = groups_of(index), tmp_path / "new"
    with pytest.raises(UserError, match=r"shape \(3,\) for 32 rows"):
        reshard(index, groups[:3], new, rows_per_shard=7, seed=0)
    with pytest.raises(UserError, match="--rows-per-shard must be at least 1, not 0"):
        reshard(index, groups, new, rows_per_shard=0, seed=0)
    with pytest.raises(UserError, match="is not empty; name a new folder"):
        reshard(index, groups, tmp_path / "old", rows_per_shard=7, seed=0)
    with pytest.raises(UserError, match="reads another index"):
        reshard(index, groups, new, rows_per_shard=7, seed=0, reader=Reader(ShardIndex(index.shards, index._table)))
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(UserError, match="its disk has 1e-08 GB free"):
        reshard(index, groups, new, rows_per_shard=7, seed=0)
    assert not new.exists()


def test_a_shard_that_changed_leaves_nothing_behind(index, tmp_path):
    write_tar(Path(index.shards[1].url), pairs(3))
    with pytest.raises(UserError, match=r"1\.tar changed since it was indexed"):
        reshard(index, groups_of(index), tmp_path / "new", rows_per_shard=7, seed=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old"]
