import gc
import weakref
from pathlib import Path

import numpy as np
import pytest

from mcl_clip.core.files import file_digest
from mcl_clip.data import index as index_module
from mcl_clip.data.index import INDEX_NAME, RULE, ShardIndex, _assemble, collect_parts
from mcl_clip.data.index_file import write_parts
from mcl_clip.data.scanning import DTYPES, Part, make_table
from mcl_clip.data.shards import Shard
from tests.unit.data.tars import pairs, write_tar


def random_part(number: int, rows: int, url: str) -> Part:
    """The rows of a shard with random columns and keys of 1 to 30 bytes."""
    draw = np.random.default_rng(number)
    keys = ["é" * draw.integers(1, 15) + str(draw.integers(10)) for _ in range(rows)]
    columns = {name: draw.integers(0, 200, rows) for name in DTYPES}
    return Shard(url, 1000, "1", 0, rows, {"missing_text": 2}), make_table([key.encode() for key in keys], columns)


@pytest.mark.parametrize("sizes", [[5], [3, 0, 40, 1], [0, 0], [], [0, 7]])
def test_the_file_of_parts_is_that_of_the_index_in_memory(tmp_path, sizes):
    parts = [random_part(number, rows, str(tmp_path / f"{number}.tar")) for number, rows in enumerate(sizes)]
    parts += [(shard, table.slice(2, shard.rows)) for shard, table in (random_part(9, 9, "/x/9.tar"),) if sizes == [5]]
    parts = [(Shard(**{**vars(shard), "rows": len(table)}), table) for shard, table in parts]
    _assemble(parts, RULE).save(tmp_path / "memory.arrow")
    write_parts(tmp_path / "parts.arrow", parts, RULE)
    expected, found = (ShardIndex.load(tmp_path / f"{name}.arrow", check=False) for name in ("memory", "parts"))
    assert found.shards == expected.shards
    assert found.digest == expected.digest
    assert (tmp_path / "parts.arrow").read_bytes() == (tmp_path / "memory.arrow").read_bytes()


def test_signed_urls_are_hidden(tmp_path):
    for url in ("https://example.org/a.tar", "https://example.org/a.tar?X-Amz-Signature=secret"):
        write_parts(tmp_path / "index.arrow", [random_part(0, 3, url)], RULE)
        mode = (tmp_path / "index.arrow").stat().st_mode
        assert (mode & 0o077 == 0) == ("secret" in url)


@pytest.fixture
def shards(tmp_path) -> list[str]:
    return [str(write_tar(tmp_path / f"shards/{n}.tar", pairs(3 + n, prefix=f"s{n}"))) for n in range(4)]


def test_rows_leave_memory_once_they_are_kept(shards, tmp_path, monkeypatch):
    scanned, scan = [], index_module.scan_shards

    def scan_shards(*arguments, **options):
        for shard, table in scan(*arguments, **options):
            scanned.append(weakref.ref(table))
            yield shard, table

    monkeypatch.setattr(index_module, "scan_shards", scan_shards)
    monkeypatch.setattr(index_module, "SAVE_S", 0.0)
    parts = collect_parts(shards, RULE, kept=tmp_path / "kept", workers=1)
    gc.collect()
    assert len(scanned) == 4
    assert not any(table() for table in scanned)
    assert list(parts) == shards
    assert _assemble(list(parts.values()), RULE).digest == ShardIndex.build(shards).digest


def test_what_is_kept_becomes_one_mapped_file(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "SAVE_S", 0.0)
    kept = tmp_path / "kept"
    collect_parts(shards[1:], RULE, kept=kept, workers=1)
    assert len(list(kept.iterdir())) == 3
    index = ShardIndex.build(shards, kept=kept, workers=1)
    assert [str(path) for path in kept.iterdir()] == [index._file[0]]
    assert index.digest == ShardIndex.build(shards).digest
    before = file_digest(Path(index._file[0]))
    again = ShardIndex.build(shards, kept=kept, workers=1)
    assert (again._file, file_digest(Path(again._file[0]))) == (index._file, before)


def test_an_index_of_the_same_shards_is_mapped_and_not_copied(shards):
    ShardIndex.build(shards).write_beside()
    folder = Path(shards[0]).parent
    assert ShardIndex.build(shards)._file[0] == str(folder / INDEX_NAME)
    for others in (shards[:-1], shards[::-1]):
        assert ShardIndex.build(others)._file is None
    write_tar(folder / "1.tar", pairs(9))
    changed = ShardIndex.build(shards)
    assert changed._file is None
    assert [shard.rows for shard in changed.shards] == [3, 9, 5, 6]
