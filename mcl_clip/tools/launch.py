"""Start a program in several processes that live and die together, and end with the exit code that tells why.

The processes get the variables of `torchrun`, as Accelerate reads them, and configuration files are those of
`accelerate launch`. Its own launcher turns every exit code into 1 and, on SIGTERM, leaves processes behind.
"""

import ctypes
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mcl_clip.core.distributed import count_cores
from mcl_clip.core.errors import UserError
from mcl_clip.train.interrupt import SAME_REQUEST_S, SIGNALS

LAST_WORDS_S = 5.0  # of the other processes, once one has failed
POLL_S = 0.1
DEFAULT_PORT = 29500
PR_SET_PDEATHSIG = 1
LOOPBACK = "127.0.0.1"
KINDS = ("NO", "MULTI_GPU", "MULTI_CPU")

Process = subprocess.Popen[bytes]


@dataclass(frozen=True, kw_only=True)
class Placement:
    """How many processes there are, on which machines, and where they meet.

    Attributes:
        num_processes: over all machines; 0 is one for each GPU of this machine, or one.
        num_machines: machines, with equally many processes each.
        machine_rank: number of this machine.
        main_process_ip: address of machine 0.
        main_process_port: a port there; 0 is a free one, where there is one machine.
        gpu_ids: numbers of the GPUs to use, with commas; `all` or none.
    """

    num_processes: int = 0
    num_machines: int = 1
    machine_rank: int = 0
    main_process_ip: str = ""
    main_process_port: int = 0
    gpu_ids: str = "all"

    @property
    def here(self) -> int:
        """Processes of this machine."""
        return self.num_processes // self.num_machines


def read_placement(config_file: Path) -> dict[str, Any]:
    """The fields of a `Placement` that a configuration of Accelerate sets.

    Raises:
        UserError: if it is not one, or asks for what this launcher does not do.
    """
    from accelerate.commands.config.config_args import load_config_from_file  # takes a second

    try:
        config = vars(load_config_from_file(str(config_file)))
    except Exception as error:  # YAML, JSON and Accelerate have errors of their own
        raise UserError(
            f"{config_file} is not a configuration of Accelerate ({' '.join(str(error).split())}); take one from "
            f"recipes/accelerate, or make one with `accelerate config`"
        ) from error
    kind = getattr(config["distributed_type"], "value", config["distributed_type"])
    extras = [name for name, value in config.items() if name.endswith("_config") and value]
    if kind not in KINDS or extras:
        raise UserError(
            f"{config_file} asks for {extras[0] if extras else f'distributed_type {kind}'}, and processes are started "
            f"for plain data parallelism only; use a configuration from recipes/accelerate"
        )
    if config["mixed_precision"] not in (None, "no"):
        raise UserError(
            f"{config_file} asks for mixed_precision {config['mixed_precision']}; precision is a setting of each "
            f"stage, --stages.K.train.precision"
        )
    names = ("num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port", "gpu_ids")
    found = {name: config[name] for name in names if config.get(name) not in (None, "")}
    if config["use_cpu"]:
        found["gpu_ids"] = ""
    return found


def place(settings: Mapping[str, Any], *, gpus: int) -> Placement:
    """Where the processes go, on a machine with so many GPUs.

    Raises:
        UserError: if they do not fit.
    """
    asked = Placement(**settings)
    chosen = [number for number in str(asked.gpu_ids).split(",") if number]
    gpus = gpus if asked.gpu_ids == "all" else len(chosen)
    processes = asked.num_processes or max(1, gpus) * asked.num_machines
    placement = Placement(**{**settings, "num_processes": processes})
    _check_machines(placement)
    if gpus and placement.here > gpus:
        raise UserError(
            f"{placement.here} processes on this machine need a GPU each, and it has {gpus}; use --num-processes "
            f"{gpus * placement.num_machines}"
        )
    if placement.num_machines > 1:
        return placement
    changes = {"main_process_ip": LOOPBACK, "main_process_port": placement.main_process_port or _free_port()}
    return Placement(**{**settings, "num_processes": processes, **changes})


def _check_machines(placement: Placement) -> None:
    machines = placement.num_machines
    if placement.num_processes < 1 or machines < 1 or placement.num_processes % machines:
        raise UserError(
            f"--num-processes {placement.num_processes} on --num-machines {machines} cannot be; use a multiple of the "
            f"number of machines, each of which has equally many"
        )
    if not 0 <= placement.machine_rank < machines:
        raise UserError(f"--machine-rank {placement.machine_rank} is not from 0 to {machines - 1}")
    if machines > 1 and not placement.main_process_ip:
        raise UserError(f"{machines} machines need --main-process-ip, the address of machine 0")


def _free_port() -> int:
    with socket.socket() as found:
        found.bind((LOOPBACK, 0))
        port: int = found.getsockname()[1]
        return port


def launch(command: Sequence[str], placement: Placement, *, planned_codes: Collection[int] = (0,)) -> int:
    """Run a command in all processes of this machine to their end; the exit code of the job. For the main thread.

    SIGTERM, SIGUSR1 and Ctrl-C are handed on once; a second one kills all. A process that fails takes the others with
    it. On Linux they also end with this process, whatever ends it.

    Args:
        command: the program and its arguments.
        placement: how many processes, and where.
        planned_codes: exit codes after which the others are left to end by themselves.
    """
    if not hasattr(os, "killpg"):
        raise UserError(f"mcl-clip launch needs Linux or macOS, not {sys.platform}; use accelerate launch")
    with _noted_signals() as requests:
        processes: list[Process] = []
        try:
            processes += _start(command, placement)
            return _Job(processes, placement, planned_codes).wait(requests)
        finally:
            for process in processes:
                if process.poll() is None:
                    _kill(process)
                    process.wait()


@contextmanager
def _noted_signals() -> Iterator[list[tuple[float, int]]]:
    """The signals that arrive in the block, with their times."""
    requests: list[tuple[float, int]] = []
    heeded = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # as nohup and & ask
    before = {
        number: signal.signal(number, lambda number, _: requests.append((time.monotonic(), number)))
        for number in heeded
    }
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _start(command: Sequence[str], placement: Placement) -> Iterator[Process]:
    """The processes, each in a group of its own, so that Ctrl-C at a terminal reaches this one alone.

    They start with the signals held back, for a program that is still loading has nothing to save; `Interrupt` lets
    them through.
    """
    end_with_parent = None
    if sys.platform == "linux":
        end_with_parent = partial(_end_with_parent, ctypes.CDLL(None, use_errno=True).prctl, os.getpid())
    held_back = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        for number in range(placement.here):
            yield subprocess.Popen(
                command,
                env=_environment(placement, number),
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=end_with_parent,  # noqa: PLW1509  # a single system call
            )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held_back)


def _end_with_parent(prctl: Any, parent: int) -> None:
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended in between
        os._exit(1)


def _environment(placement: Placement, number: int) -> dict[str, str]:
    """The variables of process `number` of this machine."""
    added: dict[str, object] = {}
    if placement.here > 1:
        added["OMP_NUM_THREADS"] = max(1, count_cores() // placement.here)
    if placement.num_machines == 1 and sys.platform == "linux":
        added["GLOO_SOCKET_IFNAME"] = "lo"  # else found by the name of the host, which need not resolve
    environment = {**{name: str(value) for name, value in added.items()}, **os.environ}
    if placement.gpu_ids != "all":
        environment["CUDA_VISIBLE_DEVICES"] = str(placement.gpu_ids)
    if placement.num_processes == 1:
        return environment
    fixed = {
        "RANK": placement.machine_rank * placement.here + number,
        "LOCAL_RANK": number,
        "WORLD_SIZE": placement.num_processes,
        "LOCAL_WORLD_SIZE": placement.here,
        "MASTER_ADDR": placement.main_process_ip,
        "MASTER_PORT": placement.main_process_port or DEFAULT_PORT,
    }
    return {**environment, **{name: str(value) for name, value in fixed.items()}}


class _Job:
    """The processes of this machine until the last one has ended."""

    def __init__(self, processes: Sequence[Process], placement: Placement, planned_codes: Collection[int]) -> None:
        self._running = dict(enumerate(processes))
        self._placement, self._planned_codes = placement, planned_codes
        self._code, self._failed_at = 0, math.inf

    def wait(self, requests: Sequence[tuple[float, int]]) -> int:
        """The exit code, of the first process that failed; hands on the first of the requests meanwhile."""
        is_handed_on = False
        while self._running:
            if requests and not is_handed_on:
                is_handed_on = True
                for process in self._running.values():
                    process.send_signal(requests[0][1])
            if requests and requests[-1][0] - requests[0][0] > SAME_REQUEST_S:
                _say(f"stopped at once by {signal.Signals(requests[-1][1]).name}")
                self._code = 128 + requests[-1][1]
                break
            self._collect()
            if time.monotonic() > self._failed_at + LAST_WORDS_S:
                break
            time.sleep(POLL_S)
        return self._code

    def _collect(self) -> None:
        ended = {number: code for number, process in self._running.items() if (code := process.poll()) is not None}
        for number, code in ended.items():
            _kill(self._running.pop(number))  # what it has started
            if code in self._planned_codes:
                self._code = self._code or code
            elif self._failed_at == math.inf:
                self._failed_at = time.monotonic()
                self._code = 128 - code if code < 0 else code
                if code < 0:
                    _say(_death(self._placement, number, -code))


def _death(placement: Placement, process: int, number: int) -> str:
    rank = placement.machine_rank * placement.here + process
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    why = " (as the system does when memory runs out)" if number == signal.SIGKILL else ""
    others = ", and takes the others with it" if placement.num_processes > 1 else ""
    return (
        f"error: process {rank} of {placement.num_processes} was ended by {name}{why}{others}; the same command "
        f"continues from the newest checkpoint"
    )


def _kill(process: Process) -> None:
    """End a process and all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # gone; macOS says the latter of a process that has just ended
        return


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
