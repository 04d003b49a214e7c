"""The commands of the README and of docs on a few images, as they stand there, from a table to an export."""

import csv
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mcl_clip.model.clip import create_clip, save_clip
from tests.recipes.runs import draw, load_recipe
from tests.unit.test_documents import LEFT_OUT, ROOT, commands_in

CHAIN = {  # the start of each command, and what is added to it here
    "python data_prep/from_table.py captions.csv": "",
    "mcl-clip doctor recipes/photos.py --data.train shards/photos/train": "",
    "python recipes/photos.py --data.train shards/photos/train": (
        "--stages.0.train.steps 4 --stages.1.train.steps 4 --stages.0.train.global-batch-size 16 "
        "--stages.1.train.global-batch-size 16 --machine.workers 0 --data.holdout-rows 8"
    ),
    "mcl-clip finetune ViT-B-32/laion2b_s34b_b79k captions.csv": (
        "--split-column split --stages.0.train.steps 4 --machine.workers 0"
    ),
    "mcl-clip status runs/mine": "",
    "mcl-clip report runs/mine": "",
    "mcl-clip export runs/mine exported": "",
    "mcl-clip eval runs/mine": "",
    "mcl-clip push runs/mine": "--dry-run",
    "mcl-clip export runs/photos one": "",
    "mcl-clip push runs/photos": "--dry-run",
}


PRETRAINED = "ViT-B-32/laion2b_s34b_b79k"


@pytest.fixture
def project(tmp_path):
    """A folder as the README has it: the programs, pictures, and a table."""
    for name in ("recipes", "data_prep"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "images").mkdir()
    save_clip(create_clip(model_cfg=load_recipe(ROOT / "recipes/photos.py").tower.model), tmp_path / "base")
    with (tmp_path / "captions.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file", "caption", "split"])
        for number in range(232):
            image, caption, _ = draw(number)
            (tmp_path / "images" / f"{number}.png").write_bytes(image)
            split = "test" if number >= 216 else "val" if number >= 200 else "train"
            table.writerow([f"{number}.png", caption, split])
    return tmp_path


def run(command: str, folder: Path) -> str:
    words = shlex.split(command.replace(PRETRAINED, "base"))  # no network
    program = [sys.executable, "-m", "mcl_clip"] if words[0] == "mcl-clip" else [sys.executable]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*program, *words[1:]], cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_the_commands_of_the_readme_work_one_after_the_other(project):
    text = "\n".join((ROOT / name).read_text() for name in ("README.md", "docs/data.md", "docs/publishing.md"))
    listed = [command.removesuffix(LEFT_OUT) for command in commands_in(text)]
    (project / "sets").symlink_to(project / "shards" / "photos" / "test")
    printed = {}
    for start, more in CHAIN.items():
        command = next(command for command in listed if command.startswith(start))
        printed[start] = run(f"{command} {more}", project)
    assert (project / "runs/photos/report.html").stat().st_size > 100_000
    assert "combined: done" in printed["mcl-clip status runs/mine"]
    assert "fine-tuned" in printed["mcl-clip finetune ViT-B-32/laion2b_s34b_b79k captions.csv"]
    assert "nothing was uploaded" in printed["mcl-clip push runs/photos"]
    assert (project / "exported/README.md").is_file()
