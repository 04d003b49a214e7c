"""Programs in processes of their own, watched from outside: when each of their marks was reached.

Our side and its peer are read alike: a step is done when its record can be read, by the clock of the program that
watches. Linux only, for processor time is read from /proc.
"""

import io
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import IO

import open_clip
import torch

from mcl_clip.core.errors import UserError
from mcl_clip.data.shards import expand_shards

POLL_S = 0.02
PEER_STEP = re.compile(r"Data \(t\): ([\d.]+) Batch \(t\): ([\d.]+),")
STEPS_WITHOUT_END = 10_000  # both are ended from outside, so that their loaders run as in the midst of a training
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Mark:
    """When a program got somewhere: seconds since it was started, and its processor seconds till then."""

    seconds: float
    cpu_seconds: float


@dataclass(frozen=True, kw_only=True)
class Program:
    """A command, and how many marks it has reached; `marks` gets what the program has said so far."""

    command: Sequence[str]
    marks: Callable[[str], int]
    environment: Mapping[str, str] = field(default_factory=dict)


def watch(program: Program, number: int, log: Path) -> list[Mark]:
    """Run a program until it has reached so many marks, then end it and its workers.

    It says what it says into `log`; what it leaves in temporary files is beside that.

    Raises:
        UserError: if it ends before; with the last lines that it said.
    """
    reached: list[Mark] = []
    temporary = log.parent / "t"  # names of sockets in it may not be long
    temporary.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with log.open("w") as said:
        process = subprocess.Popen(
            program.command,
            env={**os.environ, **program.environment, "TMPDIR": str(temporary)},
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        while len(reached) < number:
            ended = process.poll() is not None
            new = program.marks(log.read_text(errors="replace")) - len(reached)
            if new > 0:
                reached += [Mark(time.perf_counter() - started, session_cpu_seconds(process.pid))] * new
            elif ended:
                last = " | ".join(log.read_text(errors="replace").splitlines()[-15:])
                raise UserError(f"{program.command[0]} ended at mark {len(reached)} of {number}: {last}")
            else:
                time.sleep(POLL_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return reached[:number]


def session_cpu_seconds(session: int) -> float:
    """Processor seconds of all processes of a session, and of their children that have ended."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        if int(fields[3]) == session:
            ticks += sum(map(int, fields[11:15]))
    return ticks / TICKS_PER_S


def cut_shards(source: Path, out: Path, *, rows: int, number: int) -> str:
    """Write new shards of the first samples of a folder, each with its first caption only, and return their pattern.

    We take a caption a line from a .txt file, and open_clip the file as one.

    Raises:
        UserError: if the folder has fewer samples.
    """
    out.mkdir(parents=True)
    paths = [out / f"{shard:06d}.tar" for shard in range(number)]
    seen: set[str] = set()
    with ExitStack() as stack:
        writers = [stack.enter_context(tarfile.open(path, "w")) for path in paths]
        for name, member, content in _members(source):
            seen.add(name)
            if len(seen) > rows:
                break
            writers[(len(seen) - 1) % number].addfile(member, content)
    if len(seen) < rows:
        raise UserError(f"{source} has {len(seen)} samples, and --rows is {rows}; use fewer rows, or more shards")
    return shard_pattern(paths)


def _members(source: Path) -> Iterator[tuple[str, tarfile.TarInfo, IO[bytes]]]:
    """Yield the files of all shards, each with the key of its sample; files of one sample are neighbors."""
    for url in expand_shards(source):
        with tarfile.open(url) as shard:
            for member in shard:
                content = shard.extractfile(member)
                if content is None:  # no file
                    continue
                if member.name.endswith(".txt"):
                    caption = content.read().split(b"\n")[0]
                    member.size, content = len(caption), io.BytesIO(caption)
                yield f"{url}/{member.name.partition('.')[0]}", member, content


def shard_pattern(paths: Sequence[Path]) -> str:
    """Braces that both sides read; the shards are of one folder."""
    names = ",".join(path.name for path in paths)
    return str(paths[0].parent / (f"{{{names}}}" if len(paths) > 1 else names))


def threads_and_device(threads: int, device: str) -> dict[str, str]:
    """Return the environment of either side: the number of threads, and no GPU when the CPU is measured."""
    return {"OMP_NUM_THREADS": str(threads), **({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})}


def peer_steps(said: str) -> int:
    """Count the steps that open_clip_train has logged."""
    return len(PEER_STEP.findall(said))


def count_lines(path: Path) -> int:
    """Whole lines of a file that may not be there yet."""
    return path.read_text().count("\n") if path.exists() else 0


def metrics_of(run_dir: Path) -> Path:
    """Where our first stage writes its records."""
    return run_dir / "stage-0" / "train" / "metrics.jsonl"


def waited_share_of_ours(metrics: Path, first: int, last: int, batch: int) -> float:
    """Share of the time of steps `first` to `last` (from 0, above 0) that went by in waiting for data; ours.

    Raises:
        UserError: if one of the steps had another number of rows than `batch`.
    """
    records = [json.loads(line) for line in metrics.read_text().splitlines()[first - 1 : last + 1]]
    for before, record in pairwise(records):
        rows = round(record["samples_per_s"] * (record["seconds"] - before["seconds"]))
        if rows != batch:
            raise UserError(f"step {record['step']} had {rows} rows and not {batch}; use shards without bad samples")
    return statistics.mean(float(record["data_wait_share"]) for record in records[1:])


def waited_share_of_peer(log: Path, first: int, last: int) -> float:
    """Measure the same for open_clip_train, from its log of each step."""
    found = [(float(data), float(batch)) for data, batch in PEER_STEP.findall(log.read_text())][first : last + 1]
    return sum(data for data, _ in found) / sum(batch for _, batch in found)


def ratios(over: Sequence[float], under: Sequence[float]) -> dict[str, float]:
    """One figure by another: the median over the rounds, the least and the most."""
    found = [a / b for a, b in zip(over, under, strict=True)]
    return {"median": round(statistics.median(found), 3), "least": round(min(found), 3), "most": round(max(found), 3)}


def medians(figures: Mapping[str, Sequence[float]], digits: int = 2) -> dict[str, float]:
    """Return the median of each side."""
    return {side: round(statistics.median(values), digits) for side, values in figures.items()}


def between(marks: Sequence[Mark], first: int, last: int) -> Mark:
    """Return the difference between two marks."""
    return Mark(
        marks[last].seconds - marks[first].seconds,
        marks[last].cpu_seconds - marks[first].cpu_seconds,
    )


def machine() -> dict[str, object]:
    """Cores, processor and versions, for a record."""
    models = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    versions = {"python": platform.python_version(), "torch": torch.__version__, "open_clip": open_clip.__version__}
    return {"cores": os.cpu_count(), "processor": models[0] if models else platform.machine(), "versions": versions}
