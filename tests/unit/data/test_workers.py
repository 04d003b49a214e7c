"""Loader processes that die, block, or cannot deliver: the wait for them ends with a sentence."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

import pytest
import torch

from mcl_clip.core.errors import UserError, run_program
from mcl_clip.data import workers
from mcl_clip.data.workers import leave_signals_to_parent, load_batches


def _child(ready):
    leave_signals_to_parent()
    ready.set()
    time.sleep(60)


def test_a_child_process_heeds_no_signal_but_its_parents_sigterm():
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    child = context.Process(target=_child, args=(ready,), daemon=True)
    child.start()
    assert ready.wait(30)
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        os.kill(child.pid, number)
    subprocess.run(["kill", "-TERM", str(child.pid)], check=True)  # of another process
    child.join(0.5)
    assert child.is_alive()
    child.terminate()
    child.join(30)
    assert child.exitcode == 0


def load(make, *, workers=2, timeout_s=60.0, requests=6, **options):
    return load_batches(
        make, range(requests), num_workers=workers, prefetch_batches=2, pin_memory=False, timeout_s=timeout_s, **options
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_the_order_of_their_requests(workers):
    def make(number):
        time.sleep(0.05 * (number % 2 == 0))
        return torch.tensor([number])

    assert [int(batch) for batch in load(make, workers=workers)] == list(range(6))


def test_batches_come_where_the_path_of_temporary_files_is_too_long_for_a_socket(tmp_path, monkeypatch):
    folder = tmp_path / ("job" * 40)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    assert [int(batch) for batch in load(lambda number: torch.tensor([number]))] == list(range(6))


def test_a_loader_process_decodes_avif_in_one_thread():
    plugin = pytest.importorskip("PIL.AvifImagePlugin")
    (threads,) = load(lambda _: torch.tensor(plugin._get_default_max_threads()), requests=1)
    assert int(threads) == 1


def test_a_batch_that_does_not_fit_the_shared_memory_ends_the_wait(monkeypatch):
    def full(tensor):
        raise RuntimeError(
            "unable to allocate shared memory(shm) for file </torch_7_1_9>: No space left on device (28)"
        )

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(64_000_000, 60_000_000, 4_000_000))
    with pytest.raises(UserError) as caught:
        next(load(lambda number: torch.zeros(500_000)))
    assert str(caught.value) == (
        "the batches of the loader processes do not fit /dev/shm, which has 64 MB (4 MB free): 2 workers keep 2 "
        "batches of 2 MB each, 8 MB; enlarge it (docker run --shm-size 1g, or --ipc host), or use fewer workers "
        "(--machine.workers of a recipe, --workers of mcl-clip eval), or in a recipe fewer --machine.prefetch-batches"
    )
    assert load(lambda number: torch.zeros(1), workers=0)  # which shares nothing
    monkeypatch.setattr(
        torch.Tensor,
        "share_memory_",
        lambda _: (_ for _ in ()).throw(RuntimeError("shared memory: Too many open files")),
    )
    with pytest.raises(UserError, match=r"Too many open files\); raise the limit of open files \(ulimit -n\)"):
        next(load(lambda number: torch.zeros(1)))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("unshare") is None or os.geteuid() != 0, reason="only root mounts a file system")
def test_in_a_container_of_64_megabytes():
    program = f"""
import sys
sys.path[:0] = {sys.path!r}
import torch
from mcl_clip.core.errors import run_program
from mcl_clip.data.workers import load_batches
run_program(lambda: list(load_batches(lambda number: torch.zeros(5_000_000), range(20), num_workers=2,
    prefetch_batches=4, pin_memory=False, timeout_s=60)))
"""
    mount = 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$0" -c "$1"'
    command = ["unshare", "-m", "sh", "-c", mount, sys.executable, program]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if "unshare" in result.stderr or "mount" in result.stderr:
        pytest.skip(result.stderr)
    assert result.returncode == 2
    assert result.stderr.startswith("error: the batches of the loader processes do not fit /dev/shm, which has 67 MB")
    assert result.stderr.count("\n") == 1


def ended(make, capfd) -> str:
    """Return the sentence for a loader process that ends while it makes a batch."""
    started = time.monotonic()
    with pytest.raises(SystemExit) as caught:
        run_program(lambda: list(load(make)))
    assert caught.value.code == 2
    assert time.monotonic() - started < 30
    return capfd.readouterr().err


def test_a_loader_process_that_is_killed_ends_the_program(capfd):
    text = ended(lambda number: os.kill(os.getpid(), signal.SIGKILL), capfd)
    assert text == (
        "error: a loader process ended unexpectedly; if it printed no error above, memory has run out: use fewer "
        "workers (--machine.workers of a recipe, --workers of mcl-clip eval), or smaller batches\n"
    )


class Unsendable:
    """A batch that fails where a queue sends it, in a thread of its own."""

    def share_memory_(self):
        return self

    def __reduce__(self):
        raise OSError(24, "Too many open files")


def test_a_batch_that_cannot_be_sent_ends_the_program(capfd):
    first, *_, last = ended(lambda number: Unsendable(), capfd).splitlines()
    assert first == "a loader process cannot send its batch: [Errno 24] Too many open files"
    assert last.startswith("error: a loader process ended unexpectedly")


def test_a_loader_process_that_blocks_is_named(monkeypatch):
    monkeypatch.setattr(workers, "POLL_S", 0.1)
    batches = load(
        lambda number: time.sleep(60 * (number == 3)) or torch.tensor(number),
        timeout_s=0.5,
        describe="request {}".format,
    )
    assert [int(next(batches)) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(
        UserError,
        match=r"^loader process 1 has not delivered a batch for 0\.5 s; it reads request 3: see whether this storage "
        r"responds, or raise --machine\.loader-timeout-s$",
    ):
        next(batches)


def test_a_thread_that_pins_and_has_ended_is_noticed():
    class Batches:
        _pin_memory_thread = threading.Thread(target=int)

        def __next__(self):
            raise RuntimeError("DataLoader timed out after 5.0 seconds")

    with pytest.raises(UserError, match="page-locked memory has ended"):
        workers._poll(Batches())
