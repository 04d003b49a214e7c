"""Seconds from the start of a training to the end of its first step beside open_clip_train, on the same shards.

    python benchmarks/start.py shards/codes/coded/train --open-clip-python PEER/bin/python

PEER is an environment with `open_clip_torch[training]`. Ours is `recipes/experiments/codes.py`, with the index of the
shards beside them and without; theirs `open_clip_train.main` with a model config of the same tower. The small tower's
step takes no time to speak of: what is compared is imports, indexing, making the model and starting the workers. Each
round starts one process for either, in turn, and ends it after the first step, by the clock of this program. `cpu_s`
are processor seconds till then. Prints a JSON line.
"""

import json
import os
import runpy
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import tyro
from watch import (
    STEPS_WITHOUT_END,
    Mark,
    Program,
    count_lines,
    machine,
    medians,
    metrics_of,
    peer_steps,
    ratios,
    shard_pattern,
    threads_and_device,
    watch,
)

from mcl_clip.core.errors import run_program
from mcl_clip.data.index import ShardIndex
from mcl_clip.data.shards import expand_shards

RECIPE = Path(__file__).parents[1] / "recipes" / "experiments" / "codes.py"
MODEL = "small-tower"
PEER = """
import sys, open_clip
open_clip.add_model_config(sys.argv[1])
from open_clip_train.main import main
main(sys.argv[2:])
"""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What both sides are given."""

    shards: str
    batch: int
    workers: int
    models: Path
    environment: dict[str, str]


def start(
    shards: Path,
    /,
    *,
    open_clip_python: Path,
    batch: int = 64,
    workers: int = 2,
    rounds: int = 5,
    threads: int = os.cpu_count() or 1,
) -> None:
    """Measure all ways.

    Args:
        shards: a folder of local shards with one picture and a .txt a sample.
        open_clip_python: interpreter of the environment with open_clip_train.
        batch: pairs of a batch.
        workers: loader processes.
        rounds: times that all run, in turn.
        threads: of either side's main process.
    """
    with tempfile.TemporaryDirectory(prefix="start_") as name:
        folder = Path(name)
        patterns = {kind: linked(shards, folder / kind) for kind in ("indexed", "bare")}
        index = ShardIndex.build(expand_shards(patterns["indexed"]))
        index.write_beside()
        (folder / "models").mkdir()
        config = runpy.run_path(str(RECIPE))["RECIPE"].tower.model
        (folder / "models" / f"{MODEL}.json").write_text(json.dumps(config))
        setting = Setting(
            shards=patterns["bare"],
            batch=batch,
            workers=workers,
            models=folder / "models",
            environment=threads_and_device(threads, "cpu"),
        )
        sides: dict[str, Callable[[Path], Program]] = {
            "ours_indexed": lambda out: ours(replace(setting, shards=patterns["indexed"]), out),
            "ours_not_indexed": lambda out: ours(setting, out),
            "open_clip": lambda out: peer(setting, open_clip_python, out),
        }
        first: dict[str, list[Mark]] = {side: [] for side in sides}
        for number in range(rounds):
            for side, program_of in sides.items():
                out = folder / f"{side}-{number}"
                first[side] += watch(program_of(out), 1, Path(f"{out}.log"))
    seconds = {side: [mark.seconds for mark in marks] for side, marks in first.items()}
    cpu_s = {side: [mark.cpu_seconds for mark in marks] for side, marks in first.items()}
    record = {
        "rows": len(index),
        "batch": batch,
        "workers": workers,
        "rounds": rounds,
        "first_step_s": medians(seconds),
        "cpu_s": medians(cpu_s),
        **{
            f"{what}_ratio": {side: ratios(of[side], of["open_clip"]) for side in sides if side != "open_clip"}
            for what, of in (("first_step_s", seconds), ("cpu_s", cpu_s))
        },
        **machine(),
    }
    print(json.dumps(record))


def ours(setting: Setting, out: Path) -> Program:
    """Our side: the recipe."""
    command = [
        *(sys.executable, str(RECIPE), "--run-dir", str(out), "--data.train", setting.shards),
        *("--num-stages", "1", "--stages.0.train.global-batch-size", str(setting.batch)),
        *("--eval.retrieval", "--eval.classification", "--machine.log-steps", "1"),
        *("--machine.workers", str(setting.workers), "--machine.save-steps", "0"),
    ]
    return Program(command=command, marks=lambda _: count_lines(metrics_of(out)), environment=setting.environment)


def peer(setting: Setting, python: Path, out: Path) -> Program:
    """open_clip_train, with a model of our size."""
    command = [
        *(str(python), "-c", PEER, str(setting.models), "--model", MODEL, "--dataset-type", "webdataset"),
        *("--train-data", setting.shards, "--train-num-samples", str(STEPS_WITHOUT_END * setting.batch)),
        *("--batch-size", str(setting.batch), "--epochs", "1", "--workers", str(setting.workers)),
        *("--precision", "fp32", "--device", "cpu", "--lr", "3e-3"),
        *("--logs", str(out), "--name", "run", "--log-every-n-steps", "1"),
    ]
    return Program(command=command, marks=peer_steps, environment=setting.environment)


def linked(shards: Path, folder: Path) -> str:
    """Link the shards into a folder without their index, and return its pattern."""
    folder.mkdir()
    links = []
    for url in expand_shards(shards):
        link = folder / Path(url).name
        link.symlink_to(url)
        links.append(link)
    return shard_pattern(links)


if __name__ == "__main__":
    run_program(lambda: tyro.cli(start))
