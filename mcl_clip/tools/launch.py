"""Run a program in several processes that start, stop and fail together, and return the exit code of the cause.

The processes get the environment variables of `torchrun`, which Accelerate reads, and configuration files are those of
`accelerate launch`. Accelerate's own launcher turns every exit code into 1 and leaves processes behind on SIGTERM.
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
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from mcl_clip.core.distributed import count_cores
from mcl_clip.core.errors import UserError
from mcl_clip.train.interrupt import SAME_REQUEST_S, SIGNALS

GRACE_PERIOD_S = 5.0  # for the other processes to print their errors after one has failed
STOP_PERIOD_S = 60.0  # for the other processes to stop after one has stopped as requested
POLL_S = 0.1
DEFAULT_PORT = 29500
PR_SET_PDEATHSIG = 1  # of prctl(2)
LOOPBACK = "127.0.0.1"
DISTRIBUTED_TYPES = ("NO", "MULTI_GPU", "MULTI_CPU")

Process = subprocess.Popen[bytes]


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Number and location of the processes, and the address at which they meet; names are those of Accelerate."""

    num_processes: int = 0  # over all machines; 0 is one for each GPU, or one per machine without GPUs
    num_machines: int = 1  # with the same number of processes each
    machine_rank: int = 0
    main_process_ip: str = ""
    main_process_port: int = 0  # of machine 0; 0 is a free port on a single machine
    gpu_ids: str = "all"  # or comma-separated numbers; empty for none

    @property
    def local_processes(self) -> int:
        """Number of processes on this machine."""
        return self.num_processes // self.num_machines


def read_placement(config_file: Path) -> dict[str, Any]:
    """Read the fields of a `Placement` from an Accelerate configuration; raise UserError for what is not supported."""
    from accelerate.commands.config.config_args import load_config_from_file  # takes a second to import

    try:
        config = vars(load_config_from_file(str(config_file)))
    except Exception as error:  # YAML, JSON and Accelerate raise errors of their own
        raise UserError(
            f"{config_file} is not a configuration of Accelerate ({' '.join(str(error).split())}); take one from "
            f"recipes/accelerate, or create one with `accelerate config`"
        ) from error
    distributed_type = getattr(config["distributed_type"], "value", config["distributed_type"])
    plugins = [name for name, value in config.items() if name.endswith("_config") and value]
    if distributed_type not in DISTRIBUTED_TYPES or plugins:
        raise UserError(
            f"{config_file} asks for {plugins[0] if plugins else f'distributed_type {distributed_type}'}, but only "
            f"plain data parallelism is supported; use a configuration from recipes/accelerate"
        )
    if config["mixed_precision"] not in (None, "no"):
        raise UserError(
            f"{config_file} asks for mixed_precision {config['mixed_precision']}, but precision is a setting of each "
            f"stage; use --stages.K.train.precision"
        )
    settings = {field.name: config.get(field.name) for field in fields(Placement)}
    settings = {name: value for name, value in settings.items() if value not in (None, "")}
    return settings | {"gpu_ids": ""} if config["use_cpu"] else settings


def resolve_placement(settings: Mapping[str, Any], *, gpus: int) -> Placement:
    """Fill in the defaults of a placement on a machine with `gpus` GPUs; raise UserError if processes do not fit it."""
    placement = Placement(**settings)
    machines = placement.num_machines
    if placement.gpu_ids != "all":
        gpus = len([number for number in str(placement.gpu_ids).split(",") if number])
    processes = placement.num_processes or max(1, gpus) * machines
    if processes < 1 or machines < 1 or processes % machines:
        raise UserError(
            f"--num-processes {processes} cannot be divided among --num-machines {machines}; use a multiple of the "
            f"number of machines"
        )
    if not 0 <= placement.machine_rank < machines:
        raise UserError(f"--machine-rank {placement.machine_rank} is not from 0 to {machines - 1}")
    if machines > 1 and not placement.main_process_ip:
        raise UserError(f"{machines} machines need --main-process-ip, the address of machine 0")
    placement = replace(placement, num_processes=processes)
    if gpus and placement.local_processes > gpus:
        raise UserError(
            f"{placement.local_processes} processes on this machine need a GPU each, and it has {gpus}; use "
            f"--num-processes {gpus * machines}"
        )
    if machines > 1:
        return placement
    if not placement.main_process_port:
        with socket.socket() as probe:
            probe.bind((LOOPBACK, 0))
            placement = replace(placement, main_process_port=probe.getsockname()[1])
    return replace(placement, main_process_ip=LOOPBACK)


def launch(command: Sequence[str], placement: Placement, *, planned_codes: Collection[int] = (0,)) -> int:
    """Run a command in all processes of this machine and return the exit code of the job. For the main thread.

    The first of `SIGNALS` is forwarded; a second one kills all processes. When a process fails, the others are killed
    after a grace period. After one of the `planned_codes` they are left to finish, for a minute if a signal was
    forwarded. On Linux, the processes also die with this one, however it ends.
    """
    if not hasattr(os, "killpg"):
        raise UserError(f"mcl-clip launch needs Linux or macOS, not {sys.platform}; use accelerate launch")
    signals: list[tuple[float, int]] = []  # time and number of those that arrived
    handled = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # as set by nohup and &
    previous = {
        number: signal.signal(number, lambda number, _: signals.append((time.monotonic(), number)))
        for number in handled
    }
    processes: list[Process] = []
    try:
        processes += _start(command, placement)  # keeps those already started if a later one fails
        return _wait(processes, placement, planned_codes, signals)
    finally:
        for process in processes:
            if process.poll() is None:
                _kill(process)
                process.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _start(command: Sequence[str], placement: Placement) -> Iterator[Process]:
    """Start the processes, each in a session of its own, so that Ctrl-C in a terminal reaches only the launcher.

    Their signals are blocked at first, because a program that is still loading has nothing to save;
    `Interrupt` unblocks them.
    """
    parent = os.getpid()
    prctl = ctypes.CDLL(None, use_errno=True).prctl if sys.platform == "linux" else None

    def die_with_parent() -> None:
        if prctl is not None:
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the parent died before the call
            os._exit(1)

    previous_mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        for number in range(placement.local_processes):
            yield subprocess.Popen(
                command,
                env=_environment(placement, number),
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=die_with_parent,  # noqa: PLW1509  # two system calls
            )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous_mask)


def _environment(placement: Placement, number: int) -> dict[str, str]:
    """Return the environment variables of process `number` of this machine."""
    environment, local = dict(os.environ), placement.local_processes
    if local > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, count_cores() // local)))
    if placement.num_machines == 1 and sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the default uses the host name, which may not resolve
    if placement.gpu_ids != "all":
        environment["CUDA_VISIBLE_DEVICES"] = str(placement.gpu_ids)
    if placement.num_processes > 1:
        environment |= {
            "RANK": str(placement.machine_rank * local + number),
            "LOCAL_RANK": str(number),
            "WORLD_SIZE": str(placement.num_processes),
            "LOCAL_WORLD_SIZE": str(local),
            "MASTER_ADDR": str(placement.main_process_ip),
            "MASTER_PORT": str(placement.main_process_port or DEFAULT_PORT),
        }
    return environment


def _wait(
    processes: Sequence[Process],
    placement: Placement,
    planned_codes: Collection[int],
    signals: Sequence[tuple[float, int]],
) -> int:
    """Wait for the processes, forward the first signal, and return the exit code of the first process that failed."""
    running = dict(enumerate(processes))
    exit_code, has_failed, ends_at, is_forwarded = 0, False, math.inf, False
    while running and time.monotonic() < ends_at:
        if signals and not is_forwarded:
            is_forwarded = True
            for process in running.values():
                process.send_signal(signals[0][1])
        if signals and signals[-1][0] - signals[0][0] > SAME_REQUEST_S:
            sys.stderr.write(f"stopped at once by {signal.Signals(signals[-1][1]).name}\n")
            return 128 + signals[-1][1]
        exit_codes = {number: process.poll() for number, process in running.items()}
        for number, code in exit_codes.items():
            if code is None:
                continue
            _kill(running.pop(number))  # its children
            if code in planned_codes:
                exit_code = exit_code or code
                # One that gives up waiting for data stops alone; the others may hang in a collective operation.
                ends_at = min(ends_at, time.monotonic() + STOP_PERIOD_S) if signals else ends_at
            elif not has_failed:
                has_failed, ends_at = True, time.monotonic() + GRACE_PERIOD_S
                exit_code = code if code >= 0 else _report_death(placement, number, -code)
        time.sleep(POLL_S)
    return exit_code


def _report_death(placement: Placement, process: int, number: int) -> int:
    """Name the process that a signal ended, and return the exit code for that signal."""
    rank = placement.machine_rank * placement.local_processes + process
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    hint = " (the system does this when memory runs out)" if number == signal.SIGKILL else ""
    others = ", and the others are stopped" if placement.num_processes > 1 else ""
    sys.stderr.write(
        f"error: process {rank} of {placement.num_processes} was killed by {name}{hint}{others}; the same command "
        f"continues from the newest checkpoint\n"
    )
    return 128 + number


def _kill(process: Process) -> None:
    """Kill a process and everything that it started."""
    with suppress(ProcessLookupError, PermissionError):  # already gone; on macOS the latter, if it just ended
        os.killpg(process.pid, signal.SIGKILL)
