"""Batches made in loader processes; what ends or blocks one of these ends the wait for it."""

import itertools
import math
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from mcl_clip.core.errors import FEWER_WORKERS, UserError, explain_os_error

POLL_S = 5.0  # between looks at the processes while waiting for a batch
SHARED_MEMORY = Path("/dev/shm")
MAX_TEMPORARY_CHARS = 70  # multiprocessing adds 32 characters, and the path of a socket has at most 103


class _NotShared(NamedTuple):
    """A batch that does not fit the memory that processes share: its bytes, and the reason."""

    nbytes: int
    reason: str


@dataclass(frozen=True)
class _Batches(Dataset[Any]):
    """The batch of each request, made in a loader process."""

    make: Callable[[Any], Any]

    def __getitem__(self, request: Any) -> Any:
        """Make a batch, or return a UserError, which a DataLoader would bury in a traceback if it were raised."""
        try:
            batch = self.make(request)
        except UserError as error:
            return error
        except OSError as error:
            return UserError(f"{explain_os_error(error)}; run the same command again once the storage responds")
        try:
            # The queue of a loader process does this too, but in a thread whose errors nobody sees.
            return batch if get_worker_info() is None else batch.share_memory_()
        except RuntimeError as error:
            if "shared memory" not in str(error):
                raise
            return _NotShared(batch.nbytes, str(error))


def load_batches(
    make: Callable[[Any], Any],
    requests: Iterable[Any],
    *,
    num_workers: int,
    prefetch_batches: int,
    pin_memory: bool,
    timeout_s: float,
    describe: Callable[[Any], str] = str,
) -> Iterator[Any]:
    """Yield `make(request)` of each request in order: tensors, or objects that have `share_memory_`, `nbytes` as well.

    Each of `num_workers` processes keeps `prefetch_batches` ready; 0 makes them in this process. `describe` names what
    a request reads.

    Raises:
        UserError: that `make` raised, for batches that do not fit the shared memory, and `timeout_s` after the last
            batch.
    """
    # A DataLoader draws a seed, which no worker uses, from a generator of its own, to leave the global one alone.
    options: dict[str, Any] = {"num_workers": num_workers, "generator": torch.Generator()}
    if num_workers:
        options |= {"prefetch_factor": prefetch_batches, "worker_init_fn": _start_worker, "timeout": POLL_S}
    sent, requests = itertools.tee(requests)
    batches = iter(DataLoader(_Batches(make), batch_size=None, sampler=sent, pin_memory=pin_memory, **options))
    for number, request in enumerate(requests):
        deadline = time.monotonic() + timeout_s
        while (batch := _poll(batches)) is None:
            if time.monotonic() > deadline:
                raise UserError(
                    f"loader process {number % num_workers} has not delivered a batch for {timeout_s:g} s; it reads "
                    f"{describe(request)}: see whether this storage responds, or raise --machine.loader-timeout-s"
                )
        if isinstance(batch, _NotShared):
            raise UserError(_explain_shared_memory(batch, num_workers, prefetch_batches))
        if isinstance(batch, UserError):
            raise batch
        yield batch


def _poll(batches: Any) -> Any:
    """Return the next batch, or None if there is none within `POLL_S`."""
    try:
        return next(batches)
    except RuntimeError as error:
        if "timed out" not in str(error):
            raise
    pinning = getattr(batches, "_pin_memory_thread", None)
    if pinning is not None and not pinning.is_alive():
        raise UserError("the thread that copies batches to page-locked memory has ended; run the same command again")
    return None


def shared_memory() -> tuple[float, float]:
    """Return the bytes of the memory that processes share, and how many are free; infinite where nothing limits it."""
    usage = shutil.disk_usage(SHARED_MEMORY) if SHARED_MEMORY.is_dir() else None
    return (usage.total, usage.free) if usage else (math.inf, math.inf)


def _explain_shared_memory(batch: _NotShared, num_workers: int, prefetch_batches: int) -> str:
    if "No space left" not in batch.reason:
        return f"a loader process cannot share a batch ({batch.reason}); raise the limit of open files (ulimit -n)"
    total, free = shared_memory()
    needed = num_workers * prefetch_batches * batch.nbytes
    return (
        f"the batches of the loader processes do not fit {SHARED_MEMORY}, which has {total / 1e6:.0f} MB "
        f"({free / 1e6:.0f} MB free): {num_workers} workers keep {prefetch_batches} batches of "
        f"{batch.nbytes / 1e6:.0f} MB each, {needed / 1e6:.0f} MB; enlarge it (docker run --shm-size "
        f"{-(-needed * 2 // 10**9)}g, or --ipc host), or {FEWER_WORKERS}, or in a recipe fewer "
        f"--machine.prefetch-batches"
    )


def _start_worker(worker: int) -> None:  # noqa: ARG001
    torch.set_num_threads(1)
    leave_signals_to_parent()
    with suppress(ImportError):  # Pillow before 11.3
        from PIL import AvifImagePlugin

        AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # by default one for each core, in every loader process
    if len(os.fsencode(tempfile.gettempdir())) > MAX_TEMPORARY_CHARS:  # as that of a job on a cluster
        tempfile.tempdir = "/tmp"  # of this process alone: for the socket through which it hands over its batches
    # A queue drops what it cannot send; the process that trains would wait for it until its time limit.
    Queue._on_queue_feeder_error = staticmethod(_end_worker)  # type: ignore[attr-defined]


def _end_worker(error: Exception, batch: object) -> None:  # noqa: ARG001
    sys.stderr.write(f"a loader process cannot send its batch: {error}\n")
    os._exit(1)


def leave_signals_to_parent() -> None:
    """Ignore, in a child process, the signals that a terminal or a scheduler sends to every process of a job.

    The parent handles them. SIGTERM ends the child only if the parent sent it.
    """

    def end_with_parent() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    for name in ("SIGINT", "SIGUSR1", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # a signal handler does not know the sender
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=end_with_parent, daemon=True).start()
