"""A tiny recipe on drawn shapes, ways to run it, and what a run directory holds."""

import importlib.util
import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import webdataset as wds
from PIL import Image, ImageDraw

from mcl_clip.cli.recipe import create_accelerator, parse
from mcl_clip.config import RunConfig, StageConfig
from mcl_clip.data.writing import LabelledImage, Pair, write_classification_set, write_retrieval_set
from mcl_clip.runs.pipeline import run_pipeline

REPOSITORY = Path(__file__).parents[2]
COLOURS = {"red": (220, 30, 30), "green": (20, 160, 60), "blue": (40, 60, 220), "yellow": (230, 210, 30)}
SHAPES = ("square", "circle")
PLACES = ("left", "right", "top", "bottom")
SIZE_PX = 32
RECIPE = '''"""Two stages of a tiny ViT on drawn shapes.

    python recipe.py
"""

from pathlib import Path

from mcl_clip import (
    ClusterConfig,
    DataConfig,
    EvalConfig,
    MachineConfig,
    RunConfig,
    StageConfig,
    TowerConfig,
    TrainConfig,
    main,
)

HERE = Path(__file__).parent
MODEL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "layers": 2, "width": 32, "head_width": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
TRAIN = TrainConfig(steps=8, global_batch_size=16, lr=1e-3, warmup_steps=2, min_group_size=16)
STAGE = StageConfig(train=TRAIN, cluster=ClusterConfig(num_clusters=3, num_starts=2))
RECIPE = RunConfig(
    run_dir=HERE / "run",
    data=DataConfig(train=(str(HERE / "shards"),), holdout_rows=8),
    tower=TowerConfig(model=MODEL),
    stages=(STAGE, STAGE),
    eval=EvalConfig(retrieval=(str(HERE / "retrieval"),), classification=(str(HERE / "colours"),)),
    combine="concat",
    machine=MachineConfig(workers=0, threads=1, log_steps=1, save_steps=3, progress=False, report=False),
)

if __name__ == "__main__":
    main(RECIPE)
'''


def draw(number: int) -> tuple[bytes, str, int]:
    """Picture number `number` as PNG, its caption, and the number of its colour; no two pictures are equal."""
    colour = list(COLOURS)[number % 4]
    shape, place = SHAPES[number // 4 % 2], PLACES[number // 8 % 4]
    x, y = {"left": (2, 9), "right": (16, 9), "top": (9, 2), "bottom": (9, 16)}[place]
    image = Image.new("RGB", (SIZE_PX, SIZE_PX), (number % 97, 90, 100))
    pen = ImageDraw.Draw(image)
    {"square": pen.rectangle, "circle": pen.ellipse}[shape]((x, y, x + 12, y + 12), fill=COLOURS[colour])
    image.putpixel((0, 0), (number % 256, number // 256, 0))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue(), f"a {colour} {shape} on the {place}", number % 4


def write_shards(
    folder: Path, *, rows: int = 200, per_shard: int = 50, corrupt: Sequence[int] = (), captions: bool = True
) -> Path:
    """Shards as any user of webdataset writes them; `corrupt` samples hold half a picture."""
    folder.mkdir(parents=True)
    with wds.ShardWriter(str(folder / "%04d.tar"), maxcount=per_shard, verbose=0) as writer:
        for number in range(rows):
            image, caption, _ = draw(number)
            image = image[: len(image) // 2] if number in corrupt else image
            writer.write({"__key__": f"s{number:05d}", "png": image, **({"txt": caption} if captions else {})})
    return folder


def write_project(folder: Path) -> Path:
    """Shards, a retrieval and a classification set, and the recipe that uses them; the path of the recipe."""
    write_shards(folder / "shards")
    drawn = [(f"e{number}", *draw(number)) for number in range(1000, 1032)]
    write_retrieval_set(
        (Pair(key=key, image=image, captions=[caption, f"this is {caption}"]) for key, image, caption, _ in drawn),
        folder / "retrieval",
    )
    write_classification_set(
        (LabelledImage(key=key, image=image, label=label) for key, image, _, label in drawn),
        folder / "colours",
        classnames=list(COLOURS),
        templates=["a {c} shape", "a picture of something {c}"],
    )
    (folder / "recipe.py").write_text(RECIPE)
    return folder / "recipe.py"


def load_recipe(path: Path, name: str = "RECIPE") -> Any:
    """`RECIPE`, or `EXPERIMENT`, of a recipe file."""
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def execute(recipe: RunConfig, *arguments: str) -> Path:
    """Run a recipe with overrides in this process; its run directory."""
    config = parse(recipe, list(arguments))
    run_pipeline(config, create_accelerator())
    return config.run_dir


def with_stages(recipe: RunConfig, *changes: dict[str, Any]) -> RunConfig:
    """The recipe with one stage for each of the changes, of `StageConfig` or, by other names, of `TrainConfig`."""
    return replace(recipe, stages=tuple(_changed(recipe.stages[0], change) for change in changes))


def _changed(stage: StageConfig, change: dict[str, Any]) -> StageConfig:
    own = {name: value for name, value in change.items() if name in ("start", "cluster")}
    train = {name: value for name, value in change.items() if name not in own}
    return replace(stage, train=replace(stage.train, **train), **own)


class Killer:
    """A process that runs recipes in forks of itself and kills them; see `killer.py`."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("killer.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},  # recipes may import from the tests
        )

    def run(self, recipe: Path, target: str, call: int, *arguments: str, after: bool = False) -> int:
        """The exit code of a recipe that was killed at the n-th call of a function, minus the number of the signal.

        Args:
            recipe: path of the recipe.
            target: the function, as `module:name`.
            call: which call, from 1.
            arguments: overrides of the recipe.
            after: kill when the call returns, not when it begins.
        """
        job = {"recipe": str(recipe), "target": target, "call": call, "arguments": arguments, "after": after}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        self._process.communicate(timeout=30)


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and modification time of every file, but for the ones that say how often a run was started."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("launches.jsonl", "config.json")
    }


def records(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps(run: Path, stage: int) -> list[int]:
    """The steps with a loss in a stage's metrics."""
    return [record["step"] for record in records(run / f"stage-{stage}/train/metrics.jsonl") if "loss" in record]
