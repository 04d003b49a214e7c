"""Planned stops: after a signal, the job ends at the next safe point and the same command resumes it.

Schedulers send SIGTERM or SIGUSR1 before they reclaim a machine; Ctrl-C is SIGINT, a terminal that is closed SIGHUP.
"""

import os
import re
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Int32
from torch import Tensor

from mcl_clip.core.distributed import gather_objects, is_main, world_size
from mcl_clip.core.errors import PlannedStop

NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
SIGNALS = tuple(signal.Signals[name] for name in NAMES if name in signal.Signals.__members__)
OF_A_TERMINAL = {"SIGINT": "Ctrl-C", "SIGHUP": "the end of its terminal"}  # their exit codes are those of a shell
GIVE_UP_S = 10.0  # schedulers leave half a minute or more between SIGTERM and SIGKILL
TICK_S = 1.0
SAME_REQUEST_S = 2.0  # a launcher and a scheduler may both forward one request
LOST_PEER_S = 15.0
STORE_KEY = "mcl_clip/stop"
T = TypeVar("T")


class Interrupt:
    """Stop requests that reached this job as signals.

    A single process stops immediately, which is safe because it can be killed anywhere; inside `deferred` it stops at
    the next `asked` or `noticed`, which saves the work since the last checkpoint. Several processes stop together at
    the next `asked` or `check`, whichever of them received the signal. What does not come to such a point, because it
    has been waiting for data for 10 s, stops on its own. A second request ends a process immediately.

    Attributes:
        exit_code: of the job after SIGTERM or SIGUSR1; after Ctrl-C it is 130, after SIGHUP 129.
        phase: name of the running phase, for the message.
    """

    def __init__(self, exit_code: int = 0) -> None:
        self.exit_code = exit_code
        self.phase = ""
        self._signal = 0
        self._is_deferred = False
        self._waiting_since: float | None = None
        self._owner = os.getpid()
        self._arriving: tuple[Tensor, torch.cuda.Event] | None = None

    @contextmanager
    def listening(self) -> Iterator["Interrupt"]:
        """Handle the signals while the block runs; in a thread other than the main one, which receives them, do not."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        thread = threading.Thread(target=self._watch, args=(read_end,), daemon=True)
        thread.start()
        wakeup = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        handled = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # `nohup` and `&`
        before = {number: signal.signal(number, self._note) for number in handled}
        before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._tick)
        try:
            if hasattr(signal, "pthread_sigmask"):  # `mcl-clip launch` starts processes with the signals blocked
                signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            yield self
        except RuntimeError as error:
            if self._signal and world_size() > 1 and _is_of_a_peer(error):  # which has given up waiting for data
                raise self.stop("what is finished is kept") from error
            raise
        finally:
            alarm = before.pop(signal.SIGALRM)
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.setitimer(signal.ITIMER_REAL, 0)  # once no handler is left that starts it
            signal.signal(signal.SIGALRM, alarm)
            signal.set_wakeup_fd(wakeup)
            os.write(write_end, b"\0")
            thread.join()
            os.close(write_end)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Defer signals until the block calls `asked` or `noticed`."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False

    def waiting_for(self, items: Iterable[T]) -> Iterator[T]:
        """Iterate over `items`; after a request to stop, give up on one that has not come for 10 s.

        Raises:
            PlannedStop: on this process alone; nobody can save what the others are in the middle of.
        """
        iterator = iter(items)
        while True:
            self._waiting_since = time.monotonic()
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                self._waiting_since = None
            yield item

    def asked(self, device: torch.device) -> bool:
        """Return whether any process was asked to stop, the same on all processes. A collective call.

        On GPUs it is the result of the previous call, so that the host waits for the last step and not for this one.
        """
        if world_size() == 1:
            return self._signal > 0
        flag = torch.full((1,), self._signal, dtype=torch.int32, device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        agreed = int(flag) if device.type == "cpu" else self._of_last_call(flag)
        self._signal = max(self._signal, agreed)
        return agreed > 0

    def _of_last_call(self, flag: Int32[Tensor, "1"]) -> int:
        before = self._arriving
        host = torch.empty(1, dtype=flag.dtype, pin_memory=True).copy_(flag, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._arriving = (host, event)
        if before is None:
            return 0
        before[1].synchronize()
        return int(before[0])

    def noticed(self) -> bool:
        """Return whether this process knows of a request. Not collective: processes may learn of it one by one."""
        if world_size() > 1:
            store = dist.distributed_c10d._get_default_store()
            if self._signal:
                store.set(STORE_KEY, str(self._signal))
            elif store.check([STORE_KEY]):
                self._signal = int(store.get(STORE_KEY))
        return self._signal > 0

    def check(self) -> None:
        """Raise PlannedStop on all processes if any was asked to stop. A collective call."""
        self._signal = max(gather_objects(self._signal))
        if self._signal:
            raise self.stop("what is finished is kept")

    def stop(self, kept: str) -> PlannedStop:
        """Create the exception that ends the job; `kept` says what is saved."""
        name = signal.Signals(self._signal).name
        code, name = (128 + self._signal if name in OF_A_TERMINAL else self.exit_code), OF_A_TERMINAL.get(name, name)
        where = f" in {self.phase}" if self.phase else ""
        return PlannedStop(f"stopped by {name}{where}: {kept}; the same command continues", code)

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if os.getpid() != self._owner or self._signal:  # a fork inherits the handler
            return
        self._signal = number
        is_alone = world_size() == int(os.environ.get("WORLD_SIZE", "1")) == 1  # the process group may not exist yet
        if is_alone and not self._is_deferred:
            raise self.stop("what is finished is kept")
        signal.setitimer(signal.ITIMER_REAL, TICK_S, TICK_S)

    def _tick(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Look, each second after a request, whether this process waits for data that does not come."""
        if self._waiting_since is not None and time.monotonic() - self._waiting_since > GIVE_UP_S:
            self._waiting_since = None
            raise self.stop("its data did not come; what is finished is kept")

    def _watch(self, read_end: int) -> None:
        """End the process on a second request, even if the main thread is blocked in a collective."""
        first: float | None = None
        while number := os.read(read_end, 1)[0]:
            if number not in SIGNALS:
                continue
            now = time.monotonic()
            first = now if first is None else first
            if now - first > SAME_REQUEST_S:
                os.write(2, f"stopped at once by {signal.Signals(number).name}\n".encode() if is_main() else b"")
                os._exit(128 + number)
        os.close(read_end)


def wait_for_the_cause(error: Exception) -> None:
    """Delay an error caused by a lost peer, so that the process that failed first reports and ends the others."""
    if world_size() > 1 and isinstance(error, RuntimeError) and _is_of_a_peer(error):
        time.sleep(LOST_PEER_S)


def _is_of_a_peer(error: RuntimeError) -> bool:
    words = r"gloo|nccl|connection (closed|reset)|broken pipe|socket|the main process failed"
    return re.search(words, str(error), re.IGNORECASE) is not None
