"""Two simulated nodes that share a folder of stored plans, killed at random moments, over many epochs.

    python -m tests.faults.nodes --epochs 100 --kills 10

Each node has two processes; as on a cluster, both nodes have a process with `LOCAL_RANK` 0. All processes of a killed
job start again at the epoch that each of them had finished. Prints one line, and exits with 1 if an epoch differs from
the plan in memory, a process fails or waits for 60 s, or files are left behind.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch.distributed as dist

from mcl_clip.core.distributed import rank, seed_of
from mcl_clip.data.batch_plan import BatchPlan

ROWS, NODES, PROCESSES_OF_NODE, PATIENCE_S = 800, 2, 2, 60.0


def make_plan(**options) -> BatchPlan:
    groups = np.arange(ROWS) % 7
    return BatchPlan(shard_of=np.arange(ROWS) // 100, groups=groups, global_batch_size=16, seed=0, stage=1, **options)


def read_epochs(folder: Path, start: int, stop: int, done: Path | None = None) -> list[str]:
    """The digest of each epoch of a plan that the nodes store in the folder, read at a random pace."""
    plan, pace, digests = make_plan(cache_dir=folder, rows_in_memory=10), random.Random(rank()), []
    for epoch in range(start, stop):
        time.sleep(0.01 * max(0.0, pace.random() - 0.7))
        with patch.dict(os.environ, LOCAL_RANK=str(rank() % PROCESSES_OF_NODE)):
            assert isinstance(plan.epoch_rows(epoch), np.memmap)
        time.sleep(0.01 * max(0.0, pace.random() - 0.7))
        digests.append(plan.digest(epoch))
        if done is not None:
            done.write_text(f"{epoch + 1}")
    return digests


def failed(job: list[subprocess.Popen]) -> list[int]:
    """The processes that ended on their own, and not well."""
    return [number for number, process in enumerate(job) if process.returncode not in (None, 0, -signal.SIGKILL)]


def run_with_kills(epochs: int, kills: int, folder: Path) -> str:
    """Read all epochs; return what went wrong, or nothing."""
    processes, pace, start = NODES * PROCESSES_OF_NODE, random.Random(seed_of("nodes")), 0
    expected = [make_plan().digest(epoch) for epoch in range(epochs)]
    while start < epochs:
        store = folder / f"store-{kills}-{start}"
        command = [sys.executable, "-m", "tests.faults.nodes", "--worker", str(folder), str(store), str(epochs)]
        job = [
            subprocess.Popen([*command, str(number), str(start), *expected], stderr=subprocess.PIPE, text=True)
            for number in range(processes)
        ]
        wait_s = 8 + 4 * pace.random() if kills else PATIENCE_S + epochs
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline and {process.poll() for process in job} >= {None} and not failed(job):
            time.sleep(0.05)
        for process in job:
            process.kill()
        errors = [process.communicate()[1] for process in job]
        if number := failed(job):
            return errors[number[0]]
        if not kills and any(process.returncode for process in job):
            return f"still waiting after {wait_s:.0f} s"
        kills = max(0, kills - 1)
        finished = [folder / f"done-{number}" for number in range(processes)]
        start = min(int(path.read_text() or 0) if path.exists() else 0 for path in finished)
    left = [path.name for path in (folder / "plans").iterdir()]
    return "" if len(left) <= NODES else f"left behind: {left}"


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        folder, store, epochs, number, start, *expected = sys.argv[2:]
        processes = NODES * PROCESSES_OF_NODE
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=int(number), world_size=processes, timeout=timedelta(seconds=60)
        )
        done = Path(folder) / f"done-{number}"
        digests = read_epochs(Path(folder) / "plans", int(start), int(epochs), done)
        sys.exit(0 if digests == expected[int(start) :] else "an epoch differs from the plan in memory")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--kills", type=int, default=10)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        problem = run_with_kills(options.epochs, options.kills, folder)
    finally:
        shutil.rmtree(folder)
    sys.stdout.write(f"{options.epochs} epochs on {NODES} nodes, {options.kills} kills: {problem or 'as planned'}\n")
    sys.exit(1 if problem else 0)


if __name__ == "__main__":
    main()
