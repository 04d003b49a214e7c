import itertools
import multiprocessing
import os
import pickle
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader, Dataset

from mcl_clip.core.errors import UserError
from mcl_clip.data import reader as reader_module
from mcl_clip.data.index import RULE, ShardIndex, _assemble
from mcl_clip.data.reader import RawSample, Reader
from mcl_clip.data.storage import RetryPolicy
from tests.unit.data.http_ranges import serve
from tests.unit.data.tars import FORMATS, noise, pairs, write_tar

QUICK = RetryPolicy(retries=2, backoff_s=0.0, timeout_s=5.0)
ROWS_PER_SHARD, SHARDS = 7, 3
COUNT = ROWS_PER_SHARD * SHARDS


def write_shards(folder: Path, *, image_bytes: int = 700) -> list[Path]:
    kinds = list(FORMATS)
    return [
        write_tar(
            folder / f"{number}.tar",
            pairs(ROWS_PER_SHARD, prefix=f"s{number}_", image_bytes=image_bytes),
            kind=kinds[number % len(kinds)],
        )
        for number in range(SHARDS)
    ]


def expected(row: int, image_bytes: int = 700) -> RawSample:
    shard, number = divmod(row, ROWS_PER_SHARD)
    name = f"s{shard}_{number:04d}"
    return RawSample(row, noise(f"{name}.jpg", image_bytes + number), f"caption of {name}".encode(), "txt")


def build(paths: list[Path]) -> ShardIndex:
    return ShardIndex.build([str(path) for path in paths])


def remote_index(url: str, local: ShardIndex) -> ShardIndex:
    names = [f"{url}/{Path(shard.url).name}" for shard in local.shards]
    return ShardIndex.build(names, retry=QUICK)


def check(reader: Reader, rows: list[int]) -> None:
    assert reader.read(np.array(rows, np.int64)) == [expected(row) for row in rows]


ORDERS = [list(range(COUNT)), list(range(COUNT))[::-1], [5, 5, 20, 0, 5], [3], [], [13, 2, 19, 7, 6]]


@pytest.mark.parametrize("rows", ORDERS, ids=str)
def test_rows_come_in_the_order_asked_for(tmp_path, rows):
    reader = Reader(build(write_shards(tmp_path)))
    check(reader, rows)
    check(reader, rows)


def test_whole_samples_are_bytes_of_the_shard(tmp_path):
    paths = write_shards(tmp_path)
    index = build(paths)
    rows = np.array([20, 3, 3, 8])
    for row, whole in zip(rows, Reader(index).read_whole(rows), strict=True):
        start, size = int(index.sample_offset[row]), int(index.sample_size[row])
        assert whole == paths[index.shard_of[row]].read_bytes()[start : start + size]


def test_row_numbers_are_checked(tmp_path):
    reader = Reader(build(write_shards(tmp_path)))
    for wrong in (-1, COUNT):
        with pytest.raises(IndexError, match=f"index with {COUNT} rows"):
            reader.read(np.array([0, wrong]))


def test_few_files_stay_open(tmp_path, monkeypatch):
    index = build(write_shards(tmp_path))
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr("mcl_clip.data.reader._MAX_OPEN_FILES", 2)
    reader = Reader(index)
    for row in np.random.default_rng(0).permutation(COUNT):
        check(reader, [int(row)])
        assert len(os.listdir("/proc/self/fd")) <= before + 2
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before
    check(reader, [0])
    del reader
    assert len(os.listdir("/proc/self/fd")) == before


def test_any_header_that_differs_is_noticed(tmp_path):
    paths = write_shards(tmp_path)
    index = build(paths)
    whole, status = paths[0].read_bytes(), paths[0].stat()

    def write(data: bytes) -> None:
        paths[0].write_bytes(data)
        os.utime(paths[0], ns=(status.st_atime_ns, status.st_mtime_ns))  # as a careless copy would

    for header in (index.image_offset[2] - 512, index.text_offset[2] - 512):
        for place in (0, 3, 124, 134, 156, 150, 300):
            damaged = bytearray(whole)
            damaged[header + place] ^= 1
            write(damaged)
            with pytest.raises(UserError, match=r"0\.tar changed since it was indexed: row 2 \(key 's0_0002'\)"):
                Reader(index).read(np.array([1, 2]))
            with pytest.raises(UserError, match="row 2"):
                Reader(index).read_whole(np.array([2]))
    write(whole)
    check(Reader(index), [1, 2])


def test_a_payload_that_changes_under_an_open_reader_is_noticed(tmp_path):
    paths = write_shards(tmp_path)
    index = build(paths)
    reader = Reader(index)
    check(reader, [1, 2])
    with paths[0].open("r+b") as file:  # same size, all headers as before
        file.seek(int(index.image_offset[5]))
        file.write(b"other")
    os.utime(paths[0], ns=(1, 1))
    with pytest.raises(UserError, match=r"0\.tar changed since it was indexed: it had \d+ bytes \(mtime:\d+\), now"):
        reader.read(np.array([2]))
    check(reader, [ROWS_PER_SHARD])  # another shard


@pytest.mark.parametrize(
    "members",
    [pairs(ROWS_PER_SHARD, prefix="t0_"), pairs(ROWS_PER_SHARD, prefix="s0_", image_bytes=701), pairs(1), []],
    ids=["keys", "sizes", "shorter", "empty"],
)
def test_a_shard_that_was_written_anew_is_noticed(tmp_path, members):
    paths = write_shards(tmp_path)
    index = build(paths)
    write_tar(paths[0], members)
    with pytest.raises(UserError, match=r"0\.tar changed since it was indexed"):
        Reader(index).read(np.arange(COUNT))


def test_a_shard_that_vanished(tmp_path):
    paths = write_shards(tmp_path)
    reader = Reader(build(paths), retry=RetryPolicy(backoff_s=100.0))  # not waited for
    paths[1].unlink()
    with pytest.raises(UserError, match=r"1\.tar does not exist; check the path or URL"):
        reader.read(np.arange(COUNT))
    check(reader, [0, 20])


def test_local_errors_that_pass_are_waited_out(tmp_path, monkeypatch):
    reader = Reader(build(write_shards(tmp_path)), retry=QUICK)
    check(reader, [0])
    pread, failures = os.pread, [2]

    def failing(*arguments):
        if failures[0]:
            failures[0] -= 1
            raise OSError(5, "Input/output error")
        return pread(*arguments)[:1000]  # short reads are continued

    monkeypatch.setattr(reader_module.os, "pread", failing)
    before = len(os.listdir("/proc/self/fd"))
    check(reader, [0, 1])
    assert len(os.listdir("/proc/self/fd")) == before
    failures[0] = 100
    with pytest.raises(OSError, match=r"0\.tar failed 3 times; the last error was OSError"):
        reader.read(np.array([0]))


def test_neighbours_are_read_at_once():
    def merge(ranges, gap):
        return reader_module._merge_ranges([reader_module._Range(*values) for values in ranges], lambda shard: gap)

    assert merge([(0, 10, 20), (0, 20, 30), (0, 35, 40), (1, 40, 50)], 5) == ([(0, 10, 40), (1, 40, 50)], [0, 0, 0, 1])
    assert merge([(0, 35, 40), (0, 10, 20), (0, 20, 30)], 4) == ([(0, 10, 30), (0, 35, 40)], [1, 0, 0])
    assert merge([(0, 10, 50), (0, 20, 30), (0, 52, 60)], 4) == ([(0, 10, 60)], [0, 0, 0])
    huge = reader_module._MAX_SPAN
    assert merge([(0, 0, huge), (0, huge, huge + 1)], 5)[1] == [0, 1]
    rng = np.random.default_rng(0)
    for _ in range(50):
        starts = rng.integers(0, 1000, 20)
        ranges = [
            reader_module._Range(int(s), int(a), int(a + n))
            for s, a, n in zip(rng.integers(0, 3, 20), starts, rng.integers(1, 90, 20), strict=True)
        ]
        spans, places = reader_module._merge_ranges(ranges, lambda shard: 7)
        for wanted, place in zip(ranges, places, strict=True):
            span = spans[place]
            assert span.shard == wanted.shard
            assert span.start <= wanted.start <= wanted.end <= span.end
        for one, two in itertools.pairwise(spans):
            assert one.shard < two.shard or one.end + 7 < two.start


@pytest.mark.parametrize("rows", ORDERS, ids=str)
@pytest.mark.parametrize("remote", ["range", "stage"])
def test_remote_rows(tmp_path, rows, remote):
    local = build(write_shards(tmp_path / "shards"))
    with serve(tmp_path / "shards") as server:
        index = remote_index(server.url, local)
        reader = Reader(index, remote=remote, cache_dir=tmp_path / "cache", retry=QUICK)
        check(reader, rows)
        check(reader, rows)
        both = _assemble([each._part(number) for each in (index, local) for number in range(len(each.shards))], RULE)
        rows_of_both = np.array([row + COUNT * (place % 2) for place, row in enumerate(rows)], np.int64)
        mixed = Reader(both, remote=remote, cache_dir=tmp_path / "cache", retry=QUICK).read(rows_of_both)
        assert [(s.image, s.text) for s in mixed] == [(expected(r).image, expected(r).text) for r in rows]


def test_ranges_of_neighbours_are_one_request(tmp_path):
    local = build(write_shards(tmp_path))
    with serve(tmp_path) as server:
        index = remote_index(server.url, local)
        server.requests.clear()
        check(Reader(index, retry=QUICK), list(range(COUNT)))
        assert sorted(path for method, path, _ in server.requests if method == "GET") == ["/0.tar", "/1.tar", "/2.tar"]
        assert all(asked for _, _, asked in server.requests)


@pytest.mark.parametrize("remote", ["range", "stage"])
@pytest.mark.parametrize("trouble", [{"failures": 2}, {"cut_bodies": 2}, {"short_bodies": 2}])
def test_passing_troubles_of_the_server(tmp_path, remote, trouble):
    local = build(write_shards(tmp_path / "shards"))
    with serve(tmp_path / "shards") as server:
        reader = Reader(remote_index(server.url, local), remote=remote, cache_dir=tmp_path / "cache", retry=QUICK)
        for name, value in trouble.items():
            setattr(server, name, value)
        check(reader, [0, 1, 2])


@pytest.mark.parametrize("remote", ["range", "stage"])
def test_lasting_troubles_of_the_server(tmp_path, remote):
    paths = write_shards(tmp_path / "shards")
    local = build(paths)
    with serve(tmp_path / "shards") as server:
        names = [f"{server.url}/{path.name}?token=SECRET" for path in paths]
        index = ShardIndex.build(names, retry=QUICK)
        assert index.digest == local.digest
        reader = Reader(index, remote=remote, cache_dir=tmp_path / "cache", retry=QUICK)
        server.failures = 1000
        with pytest.raises(OSError, match=r"/0\.tar failed 3 times") as caught:
            reader.read(np.array([0]))
        assert "SECRET" not in str(caught.value)
        server.failures = 0
        paths[1].unlink()
        server.requests.clear()
        with pytest.raises(UserError, match=r"/1\.tar does not exist") as caught:
            reader.read(np.array([7]))
        assert "SECRET" not in str(caught.value)
        assert len(server.requests) <= 2
        write_tar(paths[0], pairs(ROWS_PER_SHARD, prefix="new", image_bytes=1500))
        with pytest.raises(UserError, match=r"/0\.tar changed since it was indexed") as caught:
            reader.read(np.array([6]))
        assert "SECRET" not in str(caught.value)


def test_staging_needs_no_ranges(tmp_path):
    local = build(write_shards(tmp_path / "shards", image_bytes=30_000))
    with serve(tmp_path / "shards") as server:
        index = remote_index(server.url, local)
        server.ignores_ranges = True
        rows = np.array([20, 1])
        with pytest.raises(UserError, match="sends whole files"):
            Reader(index, retry=QUICK).read(rows)
        staged = Reader(index, remote="stage", cache_dir=tmp_path / "cache", retry=QUICK)
        assert staged.read(rows) == [expected(int(row), 30_000) for row in rows]


def cached(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.shard"))


def test_a_shard_is_fetched_once_and_kept_whole(tmp_path):
    paths = write_shards(tmp_path / "shards")
    with serve(tmp_path / "shards") as server:
        index = remote_index(server.url, build(paths))
        server.requests.clear()
        for _ in range(2):  # another reader finds what the first one fetched
            reader = Reader(index, remote="stage", cache_dir=tmp_path / "cache", retry=QUICK)
            check(reader, [0, 8])
            check(reader, [6, 7])
        assert len([1 for method, _, _ in server.requests if method == "GET"]) == 2
        assert {path.read_bytes() for path in cached(tmp_path / "cache")} == {path.read_bytes() for path in paths[:2]}
        assert not list((tmp_path / "cache").glob("*.fetching"))
        damaged = cached(tmp_path / "cache")[0]
        damaged.write_bytes(damaged.read_bytes()[:-1])  # another size: fetched again
        check(reader, [0, 8])


def test_equal_base_names_and_new_versions_do_not_mix(tmp_path):
    one = write_tar(tmp_path / "shards" / "one" / "x.tar", [("a.jpg", b"one"), ("a.txt", b"1")])
    two = write_tar(tmp_path / "shards" / "two" / "x.tar", [("a.jpg", b"two"), ("a.txt", b"2")])
    with serve(tmp_path / "shards") as server:

        def read() -> list[bytes]:
            index = ShardIndex.build([f"{server.url}/one/x.tar", f"{server.url}/two/x.tar"])
            reader = Reader(index, remote="stage", cache_dir=tmp_path / "cache", retry=QUICK)
            return [sample.image for sample in reader.read(np.array([0, 1]))]

        assert read() == [b"one", b"two"]
        write_tar(one, [("a.jpg", b"six"), ("a.txt", b"1")])
        assert one.stat().st_size == two.stat().st_size
        assert read() == [b"six", b"two"]


def test_the_cache_keeps_its_limit_and_drops_the_least_recently_used(tmp_path):
    paths = write_shards(tmp_path / "shards", image_bytes=9000)
    size = max(path.stat().st_size for path in paths)
    limit = 2 * size + 100
    foreign = write_tar(tmp_path / "cache" / "mine.tar", pairs(1))
    abandoned = tmp_path / "cache" / f"{'0' * 32}.fetching"
    abandoned.write_bytes(bytes(size))
    for old in (foreign, abandoned):
        os.utime(old, (1, 1))
    with serve(tmp_path / "shards") as server:
        index = remote_index(server.url, build(paths))
        reader = Reader(index, remote="stage", cache_dir=tmp_path / "cache", cache_gb=limit / 1e9, retry=QUICK)

        def fetched(rows: list[int]) -> list[str]:
            server.requests.clear()
            assert [s.image for s in reader.read(np.array(rows))] == [expected(row, 9000).image for row in rows]
            assert sum(path.stat().st_size for path in cached(tmp_path / "cache")) <= limit
            return sorted({path for _, path, _ in server.requests})

        assert fetched([0]) == ["/0.tar"]
        assert fetched([7]) == ["/1.tar"]
        assert fetched([1]) == []
        assert fetched([14]) == ["/2.tar"]  # drops 1, not 0
        assert fetched([2]) == []
        assert fetched([8]) == ["/1.tar"]
        assert len(fetched(list(range(COUNT)))) >= 1  # more shards than room in a single read
        tiny = Reader(index, remote="stage", cache_dir=tmp_path / "cache", cache_gb=1000 / 1e9, retry=QUICK)
        with pytest.raises(UserError, match=r"above the cache limit of 1e-06 GB; raise --machine.cache-gb"):
            tiny.read(np.array([0]))
        assert foreign.exists()
        assert not abandoned.exists()


def _read_all(reader: Reader, seed: int) -> bool:
    rows = np.random.default_rng(seed).permutation(COUNT)
    return all(
        reader.read(part) == [expected(int(row), 9000) for row in part] for _ in range(2) for part in np.split(rows, 3)
    )


@pytest.mark.parametrize("room", [1.2, 2.4, 10.0])
def test_processes_share_a_cache(tmp_path, room):
    paths = write_shards(tmp_path / "shards", image_bytes=9000)
    size = max(path.stat().st_size for path in paths)
    with serve(tmp_path / "shards") as server:
        index = remote_index(server.url, build(paths))
        reader = Reader(
            index,
            remote="stage",
            cache_dir=tmp_path / "cache",
            cache_gb=room * size / 1e9,
            retry=RetryPolicy(retries=2, backoff_s=0.01),
        )
        server.requests.clear()
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(3, mp_context=context) as processes:
            assert all(processes.map(_read_all, [reader] * 3, range(3)))
        if room >= SHARDS:
            assert len([1 for method, _, _ in server.requests if method == "GET"]) == SHARDS
        assert sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) <= room * size


class Rows(Dataset):
    def __init__(self, reader: Reader):
        self.reader = reader

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, row: int) -> RawSample:
        return self.reader.read(np.array([row]))[0]


@pytest.mark.parametrize("remote", [False, True])
def test_workers_that_are_forked_after_a_read(tmp_path, remote):
    local = build(write_shards(tmp_path))
    with serve(tmp_path) as server:
        reader = Reader(remote_index(server.url, local) if remote else local, retry=QUICK)
        check(reader, [0, 9])  # threads, connections and files exist before the fork
        loader = DataLoader(Rows(reader), batch_size=None, num_workers=2, multiprocessing_context="fork")
        assert list(loader) == [expected(row) for row in range(COUNT)]
        check(reader, [0, 9])


def test_a_reader_pickles_small_and_without_its_files(tmp_path):
    index = build(write_shards(tmp_path))
    index.save(tmp_path / "i.arrow")
    reader = Reader(ShardIndex.load(tmp_path / "i.arrow"))
    check(reader, [0, 9])
    text = pickle.dumps(reader)
    assert len(text) < 1000
    reader.close()
    with open(tmp_path / "i.arrow"), open(tmp_path / "0.tar"):  # they have the numbers that the files had
        check(pickle.loads(text), [20, 1])
    check(reader, [1, 10])


@pytest.mark.slow
def test_spawned_workers(tmp_path):
    index = build(write_shards(tmp_path))
    index.save(tmp_path / "i.arrow")
    for each in (index, ShardIndex.load(tmp_path / "i.arrow")):
        loader = DataLoader(Rows(Reader(each)), batch_size=None, num_workers=1, multiprocessing_context="spawn")
        assert list(loader) == [expected(row) for row in range(COUNT)]


def test_settings_that_cannot_work(tmp_path):
    index = build(write_shards(tmp_path))
    with pytest.raises(UserError, match=r"name a folder as --machine.cache-dir"):
        Reader(index, remote="stage")


def test_a_missing_package_is_named(monkeypatch):
    def missing(*arguments, **options):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.filesystem", missing)
    with pytest.raises(UserError, match="pip install s3fs"):
        ShardIndex.build(["s3://bucket-for-tests/x.tar"])
