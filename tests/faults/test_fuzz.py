"""A short form of the fuzzer, and that it notices what it is for."""

import pickle
import time
from dataclasses import replace

import pytest

from mcl_clip.data import samples, scanning
from tests.faults import fuzz

CASES = {"shards": 120, "images": 70, "captions": 40, "index": 30, "labels": 25, "run": 25, "model": 6}
FEW = range(1, 5)


@pytest.fixture
def restored():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("area", fuzz.AREAS)
def test_nothing_crashes_hangs_runs_or_gets_lost(area, tmp_path):
    report = fuzz.fuzz_area(area, range(CASES[area]), seed=0, keep=tmp_path)
    assert [(finding.kind, finding.number, finding.detail) for finding in report.findings] == []
    assert sum(report.counts.values()) == CASES[area]
    assert report.counts["accepted"] > 0
    assert report.counts["bad"] + report.counts["refused"] > 0


def kinds(area: str, tmp_path, *, numbers=FEW) -> set[str]:
    return {finding.kind for finding in fuzz.fuzz_area(area, numbers, seed=0, keep=tmp_path).findings}


def test_a_crash_is_found_and_kept(tmp_path, restored):
    def crash(*arguments, **options):
        raise KeyError("broken")

    restored.setattr(fuzz, "decode_image", crash)
    assert kinds("images", tmp_path) == {"crash"}
    kept = tmp_path / "images-3"
    assert (kept / "files/image").exists()
    assert "--seed 0 --only images:3" in (kept / "finding.txt").read_text()
    assert "KeyError: 'broken'" in (kept / "finding.txt").read_text()


@pytest.mark.parametrize("is_busy", [False, True])
def test_a_process_that_dies_or_hangs_is_found_and_the_rest_goes_on(tmp_path, restored, is_busy):
    decode = fuzz.decode_image
    calls = []

    def stop(*arguments, **options):
        calls.append(1)
        while len(calls) == 2:  # the second case of each process
            time.sleep(0 if is_busy else 60)
        return decode(*arguments, **options)

    restored.setattr(fuzz, "decode_image", stop)
    report = fuzz.fuzz_area("images", range(3), seed=0, keep=tmp_path, hang_s=1.0)
    assert [(finding.kind, finding.number) for finding in report.findings] == [("hang", 1)]
    assert sum(report.counts.values()) == 2
    restored.setattr(fuzz, "decode_image", lambda *arguments, **options: bytearray(1 << 40))
    assert kinds("images", tmp_path) == {"crash"}  # no memory
    restored.setattr(fuzz, "decode_image", lambda *arguments, **options: fuzz.os._exit(3))
    assert kinds("images", tmp_path) == {"crash"}


def test_a_payload_that_runs_is_found(tmp_path, restored):
    def trusting(data: bytes, **options):
        try:
            pickle.loads(data)
        except Exception as error:
            raise fuzz.BadSampleError("not_an_image") from error

    restored.setattr(fuzz, "decode_image", trusting)
    assert "executed" in kinds("images", tmp_path, numbers=range(1, 80))


def test_a_sample_that_gets_lost_is_found(tmp_path, restored):
    group = samples.group_samples

    def forgetful(*arguments):
        found = group(*arguments)
        return replace(found, keys=found.keys[1:], rows=found.rows[1:])

    restored.setattr(samples, "group_samples", forgetful)
    assert "lost" in kinds("shards", tmp_path, numbers=range(20))


def test_a_sound_file_that_is_refused_is_found(tmp_path, restored):
    def refuse(url, *arguments, **options):
        raise fuzz.UserError(f"{url} is refused")

    restored.setattr(scanning, "scan_shard", refuse)
    assert kinds("shards", tmp_path, numbers=[0, 25]) == {"unsound"}


def test_a_case_depends_on_its_seed_and_number_alone(tmp_path):
    parts = range(20), range(10), range(10, 20)
    one, two, three = (fuzz.fuzz_area("labels", part, seed=3, keep=tmp_path).counts for part in parts)
    assert one == two + three
    assert len(one) > 1
    assert fuzz.shares(10_000, list(fuzz.AREAS))["shards"] == 3500
    assert sum(fuzz.shares(777, list(fuzz.AREAS)).values()) == 777
