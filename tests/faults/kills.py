"""Kills runs at random moments and starts them again; in the end all must have the same bits.

    python -m tests.faults.kills --kills 100

Runs of the tiny project (two stages, all phases) on one and on two processes. Some are killed more than once; of two
processes one is killed first, and the other a moment later, as a launcher does. Prints the phases in which kills fell
and, for each number of processes, how many of the killed runs ended with the weights, labels and losses of the one
that nothing disturbed. Exit code 1 unless all did.

Runs are forks of this process, which has imported everything and computes nothing, so that each costs its own time
alone.
"""

import argparse
import json
import os
import random
import runpy
import signal
import socket
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import torch._dynamo  # noqa: F401  # optimisers import it at their first step
from tqdm import tqdm

import mcl_clip.cli.recipe  # noqa: F401
from mcl_clip.core.files import DONE, STARTED
from tests.recipes.runs import write_project

SECOND_KILL = 0.3  # probability that a run is killed once more after it was started again
LAG_S = 0.3
PATIENCE_S = 300.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="kills at each number of processes together")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with TemporaryDirectory(prefix="kills-") as folder:
        found = [
            harass(Path(folder), processes, arguments.kills // len(arguments.processes), arguments.seed)
            for processes in arguments.processes
        ]
    for line in found:
        sys.stdout.write(json.dumps(line) + "\n")
    sys.exit(any(line["equal"] < line["runs"] for line in found))


def harass(folder: Path, processes: int, kills: int, seed: int) -> dict[str, object]:
    """Kill runs so often, and count those that end as the undisturbed one does."""
    draw = random.Random(seed * 10 + processes)
    recipe = folder / "project" / "recipe.py"
    if not recipe.exists():
        recipe.parent.mkdir(parents=True)
        write_project(recipe.parent)
    whole = folder / f"whole-{processes}"
    started = time.monotonic()
    codes = Job(recipe, whole, processes).wait()
    seconds = time.monotonic() - started
    assert codes == [0] * processes, f"the undisturbed run ended with {codes}; see {whole}.log"
    expected = results(whole)
    phases: Counter[str] = Counter()
    runs = equal = 0
    with tqdm(total=kills, desc=f"{processes} processes", unit="kill", disable=None) as bar:
        while sum(phases.values()) < kills:
            run = folder / f"run-{processes}-{runs}"
            before = sum(phases.values())
            while draw.random() < SECOND_KILL or sum(phases.values()) == before:
                job = Job(recipe, run, processes)
                if not job.kill_after(draw.random() * seconds, first=draw.randrange(processes)):
                    break  # it was faster
                phases[phase_of(run)] += 1
                bar.update()
            codes = Job(recipe, run, processes).wait()
            if sum(phases.values()) > before:
                runs += 1
                equal += codes == [0] * processes and results(run) == expected
    return {
        "processes": processes,
        "kills": sum(phases.values()),
        "runs": runs,
        "equal": equal,
        "phases": dict(sorted(phases.items())),
        "seconds_of_a_run": round(seconds, 1),
    }


class Job:
    """The processes of a run."""

    def __init__(self, recipe: Path, run: Path, processes: int) -> None:
        port = _free_port()
        self._pids = [_fork(recipe, run, rank, processes, port) for rank in range(processes)]

    def wait(self) -> list[int]:
        """Exit codes; what takes too long is killed."""
        deadline = time.monotonic() + PATIENCE_S
        codes: dict[int, int] = {}
        while len(codes) < len(self._pids):
            for pid in self._pids:
                if pid not in codes and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                    codes[pid] = os.waitstatus_to_exitcode(ended[1])
                    if codes[pid]:
                        deadline = min(deadline, time.monotonic() + 10)  # the others wait for it in vain
            if time.monotonic() > deadline:
                for pid in self._pids:
                    if pid not in codes:
                        os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        return [codes[pid] for pid in self._pids]

    def kill_after(self, seconds: float, *, first: int) -> bool:
        """Kill all processes, `first` before the others; false if the run has ended before."""
        time.sleep(seconds)
        order = [self._pids[first], *(pid for pid in self._pids if pid != self._pids[first])]
        for number, pid in enumerate(order):
            if number:
                time.sleep(LAG_S)
            os.kill(pid, signal.SIGKILL)  # as a zombie, too, it is still there
        return -signal.SIGKILL in self.wait()


def _fork(recipe: Path, run: Path, rank: int, processes: int, port: int) -> int:
    """Start a process of a run; its number."""
    if child := os.fork():
        return child
    code = 1
    try:
        with open(f"{run}.log", "a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        if processes > 1:
            os.environ |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1",
                "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                "GLOO_SOCKET_IFNAME": "lo",
            }  # fmt: skip
        sys.argv = [str(recipe), "--run-dir", str(run)]
        runpy.run_path(str(recipe), run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        os._exit(code)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def phase_of(run: Path) -> str:
    """The phase that was begun and not finished when the run was killed."""
    begun = [path.parent for path in run.rglob(STARTED) if not (path.parent / DONE).exists()]
    return "+".join(sorted(str(path.relative_to(run)) for path in begun)) or "between phases"


def results(run: Path) -> dict[str, object]:
    """Everything that a run computes: bytes of weights, features and labels; losses by step; metrics."""
    found: dict[str, object] = {
        str(path.relative_to(run)): path.read_bytes()
        for pattern in ("**/model/**/*.safetensors", "stage-*/embed/*.safetensors", "stage-*/labels/labels.npy")
        for path in sorted(run.glob(pattern))
    }
    for path in sorted(run.glob("stage-*/train/metrics.jsonl")):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        found[str(path.relative_to(run))] = [(record["step"], record["loss"]) for record in records]
    for path in sorted(run.rglob("results.jsonl")):
        found[str(path.relative_to(run))] = [json.loads(line)["metrics"] for line in path.read_text().splitlines()]
    return found


if __name__ == "__main__":
    main()
