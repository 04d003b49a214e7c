"""Shards are indexed in processes; what is done is kept when they are stopped or killed."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from mcl_clip.core.errors import UserError
from mcl_clip.data import index as index_module
from mcl_clip.data import scanning
from mcl_clip.data.index import RULE, ShardIndex, collect_parts
from tests.unit.data.tars import pairs, write_tar


@pytest.fixture
def shards(tmp_path):
    """Six shards of other sizes, the last with a sample that is left out."""
    for number in range(6):
        extra = [("x.jpg", b"1")] if number == 5 else []
        write_tar(tmp_path / f"shards/{number}.tar", [*pairs(2 + number, prefix=f"s{number}_"), *extra])
    return sorted(map(str, (tmp_path / "shards").glob("*.tar")))


@pytest.fixture
def scanned(monkeypatch):
    """The shards that this process has scanned; no shard is too small for a process."""
    seen, scan = [], scanning.scan_shard
    monkeypatch.setattr(scanning, "scan_shard", lambda url, *a, **k: seen.append(Path(url).name) or scan(url, *a, **k))
    monkeypatch.setattr(scanning, "_MIN_BYTES", 0)
    return seen


@pytest.mark.parametrize("workers", [2, 3])
def test_the_index_does_not_depend_on_the_number_of_processes(shards, scanned, tmp_path, workers):
    alone = ShardIndex.build(shards, workers=1)
    assert sorted(scanned) == [f"{number}.tar" for number in range(6)]
    scanned.clear()
    together = ShardIndex.build(shards, workers=workers)
    assert scanned == []  # in other processes
    assert together.shards == alone.shards
    assert together.digest == alone.digest
    assert together.skipped_by_reason() == {"missing_text": 1}
    for name, index in (("a", alone), ("b", together)):
        index.save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_errors_of_a_process_are_those_of_the_shard(shards, scanned):
    Path(shards[3]).write_bytes(b"no tar" * 100)
    with pytest.raises(UserError, match=r"3\.tar is damaged at byte 0 of 600"):
        ShardIndex.build(shards, workers=2)


def test_a_process_that_is_killed_ends_it_with_a_sentence(shards, monkeypatch, scanned):
    monkeypatch.setattr(scanning, "scan_shard", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(UserError, match=r"a process that indexes shards was killed .* perhaps for want of memory"):
        ShardIndex.build(shards, workers=2)


def test_a_stop_keeps_what_was_scanned(shards, scanned, tmp_path):
    kept, asked = tmp_path / "kept", iter([False, False, True])
    parts = collect_parts(shards, RULE, kept=kept, workers=1, is_stopping=lambda: next(asked))
    assert list(parts) == shards[:3]
    scanned.clear()
    index = ShardIndex.build(shards, kept=kept, workers=1)
    assert sorted(scanned) == ["3.tar", "4.tar", "5.tar"]
    assert index.digest == ShardIndex.build(shards).digest


def test_an_error_keeps_what_was_scanned_before(shards, scanned, tmp_path):
    whole = Path(shards[4]).read_bytes()
    Path(shards[4]).write_bytes(b"no tar" * 100)
    with pytest.raises(UserError, match="damaged"):
        ShardIndex.build(shards, kept=tmp_path / "kept", workers=1)
    Path(shards[4]).write_bytes(whole)
    scanned.clear()
    assert len(ShardIndex.build(shards, kept=tmp_path / "kept", workers=1)) == 27
    assert sorted(scanned) == ["4.tar", "5.tar"]


def _index_slowly(shards, kept):
    scan = scanning.scan_shard

    def slow(*arguments, **options):
        time.sleep(0.2)
        return scan(*arguments, **options)

    scanning.scan_shard, scanning.THREADS, index_module.SAVE_S = slow, 1, 0.0
    ShardIndex.build(shards, kept=kept, workers=1)


def test_a_kill_keeps_what_was_saved(shards, scanned, tmp_path):
    kept = tmp_path / "kept"
    child = multiprocessing.get_context("fork").Process(target=_index_slowly, args=(shards, kept))
    child.start()
    while len(list(kept.glob("*.arrow"))) < 2:
        assert child.is_alive()
        time.sleep(0.01)
    child.kill()
    child.join()
    saved = len(list(kept.glob("*.arrow")))
    (kept / "cut.arrow").write_bytes(next(kept.glob("*.arrow")).read_bytes()[:700])
    index = ShardIndex.build(shards, kept=kept, workers=1)
    assert sorted(scanned) == [f"{number}.tar" for number in range(saved, 6)]
    assert index.digest == ShardIndex.build(shards).digest


def test_a_shard_that_changed_since_is_scanned_again(shards, scanned, tmp_path):
    ShardIndex.build(shards, kept=tmp_path / "kept", workers=1)
    os.utime(shards[2], (1, 1))
    scanned.clear()
    ShardIndex.build(shards, kept=tmp_path / "kept", workers=1)
    assert scanned == ["2.tar"]
