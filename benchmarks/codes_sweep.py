"""Find where a single stage misses hidden features, and where stages recover them: codes, batch size and clusters.

    python benchmarks/codes_sweep.py shards/sweep runs/sweep --jobs 2

Shortened runs of recipes/experiments/codes.py, one seed each: `mcl` of two stages beside `single` of equal compute, on
the same number of images for any batch size. Varies the number of codes, the batch and the number of clusters around
64, 64 and 256. Prints a JSON line per cell: shape and texture averaged, by linear probe and zero-shot; the code
zero-shot; mean R@1 of whole descriptions. Finished runs are skipped. Two CPU cores: about 25 min. docs/results.md has
the table.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from tqdm import tqdm

from mcl_clip.core.errors import run_program
from mcl_clip.results.record import COMBINED, load_results
from mcl_clip.tools.experiment import is_done

ROOT = Path(__file__).parents[1]
PAIRS = 16_384
IMAGES = (25_600, 51_200)  # that each stage trains on
HIDDEN = ("shape", "texture")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One place of the sweep."""

    codes: int = 64
    batch: int = 64
    clusters: int = 256

    def run_of(self, runs: Path, arm: str) -> Path:
        """Run directory of `mcl` or `single`; the latter has no clusters."""
        name = f"clusters-{self.clusters}" if arm == "mcl" else arm
        return runs / f"codes-{self.codes}" / f"batch-{self.batch}" / name


CELLS = (
    *(Cell(codes=codes) for codes in (16, 64, 256, 1024, 4096)),
    *(Cell(batch=batch) for batch in (32, 128)),
    *(Cell(clusters=clusters) for clusters in (16, 64, 512)),
)


def sweep(data: Path, runs: Path, /, *, seed: int = 0, jobs: int = 1) -> None:
    """Run all cells and print a JSON line for each.

    Args:
        data: folder for the pairs of each number of codes.
        runs: folder for the runs.
        seed: of the pairs and of the training.
        jobs: runs at the same time, which share the processor cores.
    """
    for codes in sorted({cell.codes for cell in CELLS}):
        if not (data / f"codes-{codes}").exists():
            _run(ROOT / "data_prep/shortcuts.py", "codes", data / f"codes-{codes}", "--codes", codes,
                 "--pairs-train", PAIRS, "--seed", seed)  # fmt: skip
    commands = {
        cell.run_of(runs, arm): _arguments(cell, arm, data, seed) for cell in CELLS for arm in ("mcl", "single")
    }
    todo = [[*arguments, "--run-dir", run] for run, arguments in commands.items() if not is_done(run)]
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with ThreadPoolExecutor(jobs) as pool:
        made = pool.map(
            lambda arguments: _run(ROOT / "recipes/experiments/codes.py", *arguments, threads=threads), todo
        )
        list(tqdm(made, total=len(todo), desc="runs", disable=None))
    for cell in CELLS:
        figures = {arm: _figures(cell.run_of(runs, arm)) for arm in ("single", "mcl")}
        place = {"codes": cell.codes, "batch": cell.batch, "clusters": cell.clusters, "rows": PAIRS, "seed": seed}
        print(json.dumps({**place, **figures}), flush=True)


def _arguments(cell: Cell, arm: str, data: Path, seed: int) -> list[object]:
    coded = data / f"codes-{cell.codes}" / "coded"
    stages = []
    for stage, images in enumerate(IMAGES):
        steps = images // cell.batch
        options = {"steps": steps, "warmup-steps": steps // 10, "global-batch-size": cell.batch}
        stages += [text for name, value in options.items() for text in (f"--stages.{stage}.train.{name}", value)]
    return [
        *("--seed", seed, "--control", "none" if arm == "mcl" else arm, *stages),
        *("--stages.0.cluster.num-clusters", cell.clusters, "--data.train", coded / "train"),
        *("--eval.retrieval", coded / "retrieval", "--eval.classification"),
        *(coded / "classification" / name for name in (*HIDDEN, "code")),
    ]


def _run(program: Path, *arguments: object, threads: int | None = None) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)} if threads else None
    done = subprocess.run(
        [sys.executable, str(program), *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        env=environment,
    )
    if done.returncode:
        raise RuntimeError(f"{program.name} {' '.join(map(str, arguments))}: {done.stderr[-2000:]}")


def _figures(run: Path) -> dict[str, float]:
    found = {result.dataset: result.record["metrics"] for result in load_results(run) if result.label == COMBINED}
    hidden = {
        name: round(100 * float(np.mean([found[task][metric] for task in HIDDEN])), 1)
        for name, metric in (("read_out", "linear_acc1"), ("zero_shot", "acc1"))
    }
    others = {"code": found["code"]["acc1"], "descriptions": found["retrieval"]["mean_recall@1"]}
    return {**hidden, **{name: round(100 * value, 1) for name, value in others.items()}}


if __name__ == "__main__":
    run_program(lambda: tyro.cli(sweep))
