"""Standing worker processes that run functions as ranks of a gloo process group."""

import faulthandler
import importlib
import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

PRELOAD = "tests.distributed.preload"
STARTUP_S = 120.0


class Pool:
    """Processes with one thread each; a job runs on the first `world_size` of them.

    They are forked when first needed, from a server that has imported `PRELOAD` and nothing of this process. Each job
    has a process group of its own, which meets in a file: no ports, and the traffic stays on the loopback.
    """

    def __init__(self, folder: Path, *, timeout_s: float = 60.0) -> None:
        self._folder, self._timeout_s, self._jobs = folder, timeout_s, 0
        self._workers: list[tuple[Any, Connection]] = []

    def run(self, function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
        """The results of `function(*args)` by rank. The function is imported by its name in the workers.

        Raises:
            RuntimeError: with the tracebacks of all ranks that failed.
            TimeoutError: with the stacks of the ranks that are stuck.
        """
        self._start(world_size)
        self._jobs += 1
        store = str(self._folder / f"store-{self._jobs}")
        connections = [connection for _, connection in self._workers[:world_size]]
        for rank, connection in enumerate(connections):
            connection.send_bytes(pickle.dumps((function, args, rank, world_size, store)))
        answers = self._answers(connections)
        if failures := [f"rank {rank}:\n{text}" for rank, (is_ok, text) in enumerate(answers) if not is_ok]:
            raise RuntimeError(f"{function.__name__} failed at world size {world_size}\n" + "\n".join(failures))
        return [value for _, value in answers]

    def _answers(self, connections: list[Connection]) -> list[tuple[bool, Any]]:
        deadline = time.monotonic() + self._timeout_s
        answers: dict[int, tuple[bool, Any]] = {}
        while len(answers) < len(connections):
            open_ranks = [rank for rank in range(len(connections)) if rank not in answers]
            ready = wait([connections[rank] for rank in open_ranks], max(0.0, deadline - time.monotonic()))
            if not ready:
                stacks = "\n".join(f"rank {rank}:\n{self._stack(rank).read_text()}" for rank in open_ranks)
                finished = "\n".join(f"rank {rank}: {value}" for rank, (is_ok, value) in answers.items() if not is_ok)
                self.close()
                raise TimeoutError(f"ranks {open_ranks} did not finish in {self._timeout_s} s\n{stacks}\n{finished}")
            for connection in ready:
                rank = connections.index(connection)
                try:
                    answers[rank] = pickle.loads(connection.recv_bytes())
                except EOFError:
                    answers[rank] = (False, f"the process ended, exit code {self._workers[rank][0].exitcode}")
        if any(process.exitcode is not None for process, _ in self._workers):
            self.close()
        return [answers[rank] for rank in range(len(connections))]

    def _start(self, workers: int) -> None:
        """Start what is missing of so many workers; their imports are not in the time of a job."""
        context, running = multiprocessing.get_context("forkserver"), len(self._workers)
        context.set_forkserver_preload([PRELOAD])
        for number in range(running, workers):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, str(self._stack(number)), self._timeout_s), daemon=True
            )
            process.start()
            theirs.close()
            self._workers.append((process, ours))
        for process, connection in self._workers[running:]:
            if not connection.poll(STARTUP_S):
                self.close()
                raise TimeoutError(f"worker {process.name} did not start in {STARTUP_S} s")
            connection.recv_bytes()

    def _stack(self, number: int) -> Path:
        return self._folder / f"stack-{number}"

    def close(self) -> None:
        """End the workers; the next job starts new ones."""
        for process, connection in self._workers:
            connection.close()
            process.kill()
            process.join()
        self._workers = []


def _serve(jobs: Connection, stack_file: str, timeout_s: float) -> None:
    """Work off jobs until the other end closes."""
    importlib.import_module(PRELOAD)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    jobs.send_bytes(b"ready")
    with open(stack_file, "w") as stack:
        while True:
            try:
                job = jobs.recv_bytes()
            except EOFError:
                return
            faulthandler.dump_traceback_later(0.8 * timeout_s, file=stack)
            jobs.send_bytes(pickle.dumps(_outcome(job)))
            faulthandler.cancel_dump_traceback_later()


def _outcome(job: bytes) -> tuple[bool, Any]:
    import torch.distributed as dist

    try:
        function, args, rank, world_size, store = pickle.loads(job)
        if world_size > 1:
            dist.init_process_group(
                "gloo",
                store=dist.FileStore(store, world_size),
                rank=rank,
                world_size=world_size,
                timeout=timedelta(minutes=2),  # the pool looks after stuck jobs
            )
        result = function(*args)
        pickle.dumps(result)
        return True, result
    except BaseException:
        return False, traceback.format_exc()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()  # the others' collectives fail, if this rank has
