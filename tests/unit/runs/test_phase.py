"""Fingerprints and states of phases, and the lock of a run directory."""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mcl_clip.core.errors import UserError
from mcl_clip.core.files import DONE, fingerprint, read_json
from mcl_clip.runs import phase as module
from mcl_clip.runs.phase import Phase, StaleArtifactError, lock


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def make(folder: Path, settings, *inputs: Phase, grows: bool = False, name: str = "") -> Phase:
    def run() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "out.txt").write_text("result")

    return Phase(name=name or folder.name, folder=folder, settings=settings, run=run, inputs=inputs, grows=grows)


def do(*phases: Phase) -> None:
    for phase in phases:
        phase.run()
        phase.mark_done()


def test_fingerprints_are_of_content_alone(tmp_path):
    assert fingerprint({"b": (1, 2), "a": 0.5}) == fingerprint({"a": 0.5, "b": [1, 2]})
    one, moved = make(tmp_path / "x" / "train", {"lr": 1}), make(tmp_path / "y" / "train", {"lr": 1})
    assert one.fingerprint == moved.fingerprint != make(tmp_path / "x" / "train", {"lr": 2}).fingerprint
    later = [make(tmp_path / "embed", {}, before).fingerprint for before in (one, moved, make(tmp_path / "train", {}))]
    assert later[0] == later[1] != later[2]


def test_the_states_of_a_phase(tmp_path):
    phase = make(tmp_path / "train", {"lr": 1})
    assert (phase.state(), phase.check()) == ("missing", False)
    phase.run()
    assert (phase.state(), phase.check()) == ("partial", False)
    phase.mark_done()
    assert (phase.state(), phase.check(), phase.difference()) == ("done", True, "")
    again = make(tmp_path / "train", {"lr": 1})
    assert again.check()
    (tmp_path / "train" / "out.txt").write_text("another length")
    assert again.state() == "stale"
    with pytest.raises(StaleArtifactError, match=r"its output out\.txt is missing or has another size"):
        again.check()


def test_a_stale_phase_names_the_field_and_both_values(tmp_path):
    do(make(tmp_path / "train", {"train": {"lr": 0.1, "betas": (0.9, 0.98)}, "seed": 1}))
    changed = make(tmp_path / "train", {"train": {"lr": 0.2, "betas": (0.9, 0.98)}, "seed": 1, "new": "x"})
    assert changed.state() == "stale"
    with pytest.raises(StaleArtifactError) as caught:
        changed.check()
    assert str(caught.value) == (
        f"{tmp_path / 'train'} is finished but does not match this recipe: new was None and is now 'x'; "
        f"train.lr was 0.1 and is now 0.2. Use the earlier setting, another --run-dir, or delete {tmp_path / 'train'} "
        f"to run it again"
    )


def test_a_phase_goes_stale_with_its_inputs(tmp_path):
    train = make(tmp_path / "train", {"lr": 1})
    do(train, make(tmp_path / "embed", {}, train))
    with pytest.raises(StaleArtifactError, match="its input train has changed"):
        make(tmp_path / "embed", {}, make(tmp_path / "train", {"lr": 2})).check()


def test_checkpoints_and_leftovers_are_no_outputs(tmp_path):
    phase = make(tmp_path / "train", {})
    phase.run()
    (tmp_path / "train" / "checkpoints").mkdir()
    (tmp_path / "train" / "checkpoints" / "step-1").write_text("x")
    (tmp_path / "train" / ".part.safetensors.tmp-12345").write_text("half")  # of a process that was killed
    phase.mark_done()
    assert list(read_json(tmp_path / "train" / DONE)["outputs"]) == ["out.txt"]
    assert names(tmp_path / "train") == [DONE, "checkpoints", "out.txt"]


def run_of(folder: Path, stages: int, sets: dict[str, str], lr: int = 1) -> list[Phase]:
    """Phases as in a run: each evaluation reads the earlier ones, and the combination reads all."""
    trained, evaluated = [], []
    for s in range(stages):
        trained.append(make(folder / f"train-{s}", {"lr": lr}, *trained[-1:]))
        evaluated.append(make(folder / f"eval-{s}", {"sets": sets}, *trained, *evaluated, grows=True))
    return [*trained, *evaluated, make(folder / "combined", {"how": "concat"}, *trained, *evaluated, grows=True)]


def states(phases: list[Phase]) -> dict[str, str]:
    return {phase.name: phase.state() for phase in phases}


def test_a_run_grows_by_stages_and_evaluation_sets(tmp_path):
    do(*run_of(tmp_path, 2, {"photos": "1a"}))
    assert set(states(run_of(tmp_path, 2, {"photos": "1a"})).values()) == {"done"}

    more_sets = run_of(tmp_path, 2, {"photos": "1a", "art": "2b"})
    assert states(more_sets) == {
        "train-0": "done", "train-1": "done", "eval-0": "partial", "eval-1": "partial", "combined": "partial",
    }  # fmt: skip
    assert [phase.check() for phase in more_sets] == [True, True, False, False, False]
    do(*more_sets[2:])
    assert all(phase.check() for phase in run_of(tmp_path, 2, {"photos": "1a", "art": "2b"}))

    more_stages = run_of(tmp_path, 3, {"photos": "1a", "art": "2b"})
    assert [phase.name for phase in more_stages if not phase.check()] == ["train-2", "eval-2", "combined"]


@pytest.mark.parametrize("changed", [{"sets": {"photos": "9z", "art": "2b"}}, {"sets": {"art": "2b"}}, {"lr": 2}])
def test_what_grows_is_stale_when_something_else_changed(tmp_path, changed):
    do(*run_of(tmp_path, 2, {"photos": "1a"}))
    for phase in run_of(tmp_path, 2, **{"sets": {"photos": "1a"}, **changed})[2:]:
        assert phase.state() == "stale"
        with pytest.raises(StaleArtifactError):
            phase.check()


def test_many_growing_stages_stay_small(tmp_path):
    phases = run_of(tmp_path, 30, {"photos": "1a"})
    do(phases[-1])
    assert (tmp_path / "combined" / DONE).stat().st_size < 20_000


def hold(folder: Path, seconds: float) -> subprocess.Popen:
    """Another process that holds a run directory."""
    program = (
        "import pathlib, sys, time; from mcl_clip.runs.phase import lock\n"
        "with lock(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(float(sys.argv[2]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(folder), str(seconds)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_a_living_owner_is_respected_and_a_dead_one_is_not(tmp_path):
    owner = hold(tmp_path, 100)
    try:
        with (
            pytest.raises(UserError, match=f"is in use by process {owner.pid} on {socket.gethostname()}"),
            lock(tmp_path),
        ):
            pass
        owner.kill()
        while Path(f"/proc/{owner.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z":
            time.sleep(0.01)
        with lock(tmp_path):  # nobody has asked yet how the dead process went
            assert read_json(tmp_path / "lock")["pid"] == os.getpid()
    finally:
        owner.kill()
        owner.communicate()
    assert names(tmp_path) == []
    with lock(tmp_path):
        pass


@pytest.mark.parametrize("pid", [2**22 + 5, os.getpid()], ids=["gone", "this"])
def test_the_lock_of_an_earlier_process_is_taken_over(tmp_path, pid):
    record = {"host": socket.gethostname(), "pid": pid, "process": "12"}  # a number may have been given again
    (tmp_path / "lock").write_text(json.dumps(record))
    with lock(tmp_path):
        assert read_json(tmp_path / "lock")["process"] != "12"


def test_another_host_is_asked_about(tmp_path):
    (tmp_path / "lock").write_text(json.dumps({"host": "elsewhere", "pid": 1, "process": "1"}))
    with pytest.raises(UserError, match=r"in use by process 1 on elsewhere; .* delete .*lock\)"), lock(tmp_path):
        pass
    assert names(tmp_path) == ["lock"]


def test_a_silent_job_on_another_host_loses_the_lock(tmp_path, caplog):
    path = tmp_path / "lock"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 7, "process": "1"}))
    os.utime(path, (0, time.time() - module.SILENT_S + 60))
    with pytest.raises(UserError, match="in use by process 7 on elsewhere"), lock(tmp_path):
        pass
    assert caplog.text == ""
    os.utime(path, (0, time.time() - module.SILENT_S - 60))
    with lock(tmp_path):
        assert read_json(path)["pid"] == os.getpid()
    assert "taking over from process 7 on elsewhere, which has not updated its lock for 11 minutes" in caplog.text


def other_container(folder: Path) -> Path:
    """The lock of a job in another container that has the name of this host, and where this PID is another process."""
    path = folder / "lock"
    record = {"host": socket.gethostname(), "namespace": "pid:[5]", "pid": os.getpid(), "process": "1"}
    path.write_text(json.dumps(record))
    return path


def test_a_living_job_in_another_container_of_the_same_name_keeps_its_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SILENT_HERE_S", 5.0)
    path = other_container(tmp_path)
    heartbeat = threading.Timer(0.5, lambda: os.utime(path))
    heartbeat.start()
    with pytest.raises(UserError, match=f"in use by process {os.getpid()} on {socket.gethostname()}"), lock(tmp_path):
        pass
    heartbeat.join()
    assert names(tmp_path) == ["lock"]


def test_a_silent_job_in_another_container_loses_its_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SILENT_HERE_S", 0.5)
    path = other_container(tmp_path)
    started = time.monotonic()
    with lock(tmp_path):
        assert read_json(path)["process"] != "1"
    assert time.monotonic() - started > 0.4


def test_the_age_of_a_lock_is_that_by_the_clock_of_its_file_system(tmp_path, monkeypatch):
    path = tmp_path / "lock"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 7, "process": "1"}))
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3600)  # this host is an hour ahead
    with pytest.raises(UserError, match="in use by process 7 on elsewhere"), lock(tmp_path):
        pass
    assert names(tmp_path) == ["lock"]


def test_a_living_job_touches_its_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "HEARTBEAT_S", 0.02)
    path = tmp_path / "lock"

    def is_touched():
        os.utime(path, (0, 0))
        time.sleep(0.5)
        return path.stat().st_mtime > 0

    with lock(tmp_path):
        mine = path.read_text()
        assert is_touched()
        path.write_text(json.dumps({"host": "elsewhere", "pid": 7, "process": "1"}))  # taken over meanwhile
        assert not is_touched()
    assert path.exists()  # so it is not ours to free
    path.write_text(mine)
    assert not is_touched()


def test_a_lock_that_is_being_written_is_respected(tmp_path):
    (tmp_path / "lock").touch()
    with pytest.raises(UserError, match="another job is just starting in"), lock(tmp_path):
        pass
    os.utime(tmp_path / "lock", (0, 0))  # its owner died in between
    with lock(tmp_path):
        pass


def test_an_error_frees_the_lock(tmp_path):
    with pytest.raises(ZeroDivisionError), lock(tmp_path):
        raise ZeroDivisionError
    assert names(tmp_path) == []


def take(folder: Path, wins, done) -> None:
    try:
        with lock(folder):
            wins.put(os.getpid())
            done.wait(60)
    except UserError:
        wins.put(0)


def test_one_of_many_gets_the_lock(tmp_path):
    context = multiprocessing.get_context("fork")
    wins, done = context.SimpleQueue(), context.Event()
    processes = [context.Process(target=take, args=(tmp_path, wins, done)) for _ in range(6)]
    for process in processes:
        process.start()
    found = [wins.get() for _ in processes]  # the owner holds it until all have tried
    done.set()
    for process in processes:
        process.join()
    assert sorted(found)[:5] == [0] * 5
    assert max(found) in [process.pid for process in processes]
