"""Samples per second of a training step beside open_clip_train, on the same shards.

    python benchmarks/training_step.py shards/photos/train --open-clip-python PEER/bin/python

PEER is an environment with `open_clip_torch[training]`. Two cases of a tower with random weights: everything trains,
and the text tower and half of the image tower are locked (which parameters train is compared by name). Ours is
`recipes/cc12m_vit_b32.py` with other settings, theirs `python -m open_clip_train.main`: the same batch, workers,
batches ready ahead, crops, AdamW, schedule and threads. Each round starts one process for either side, in turn, and
ends it after the last step. A figure is from the end of the first `warm_up_steps` to the end of the last step, by the
clock of this program; `first_step_s` is from the start of the process to the end of the first step, with all that is
done before (in the locked case ours embeds the captions once). Ours is what a user gets: it also looks for duplicates
among the negatives and logs the norm of the gradient. `cpu_ratio` compares processor seconds a sample, which other
programs on the same cores disturb less. Prints a JSON line a case, in about 6 minutes on two cores. `--device cuda`
compares bf16 with `--precision amp_bf16`; that has not been run.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from watch import (
    STEPS_WITHOUT_END,
    Mark,
    Program,
    between,
    count_lines,
    cut_shards,
    machine,
    medians,
    metrics_of,
    peer_steps,
    ratios,
    threads_and_device,
    waited_share_of_ours,
    waited_share_of_peer,
    watch,
)

from mcl_clip.core.errors import UserError, run_program
from mcl_clip.model.clip import create_clip
from mcl_clip.model.prepare import lock

RECIPE = Path(__file__).parents[1] / "recipes" / "cc12m_vit_b32.py"
LR, WARM_UP_OF_LR, WEIGHT_DECAY, BETAS, EPS = "1e-4", "100", "0.2", ("0.9", "0.98"), "1e-6"
HELD_OUT_ROWS = 2  # the least that a run takes
SCALE = ("0.9", "1.0")
BATCHES_AHEAD = "2"  # torch's default, which is open_clip_train's
PEER_PARAMETERS = """
import json, sys, open_clip
model = open_clip.create_model(sys.argv[1])
if groups := int(sys.argv[2]):
    model.lock_image_tower(unlocked_groups=groups)
    model.lock_text_tower()
print(json.dumps({name: p.numel() for name, p in model.named_parameters() if p.requires_grad}))
"""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What both sides are given."""

    shards: str
    rows: int
    model: str
    batch: int
    workers: int
    unlocked_groups: int
    device: str
    environment: dict[str, str]


def training_step(
    shards: Path,
    /,
    *,
    open_clip_python: Path,
    cases: tuple[Literal["whole", "locked"], ...] = ("whole", "locked"),
    model: str = "ViT-B-32",
    unlocked_groups: int = 7,
    batch: int = 32,
    workers: int = 2,
    warm_up_steps: int = 1,
    steps: int = 3,
    rounds: int = 3,
    batches: int = 12,
    threads: int = os.cpu_count() or 1,
    device: Literal["cpu", "cuda"] = "cpu",
) -> None:
    """Measure all cases.

    Args:
        shards: a folder of shards with one JPEG and a .txt a sample.
        open_clip_python: interpreter of the environment with open_clip_train.
        cases: which.
        model: name of the architecture.
        unlocked_groups: of the image tower that train in the locked case: blocks from the last, and the projection.
        batch: pairs of a batch.
        workers: loader processes, each with a shard.
        warm_up_steps: steps that do not count.
        steps: steps that count.
        rounds: times that both sides run, in turn.
        batches: of an epoch; so many samples are used, from the start of the shards.
        threads: of either side's main process.
        device: cpu or cuda.
    """
    rows = batches * batch + HELD_OUT_ROWS  # no batch with empty places
    with tempfile.TemporaryDirectory(prefix="training_step_") as folder:
        pattern = cut_shards(shards, Path(folder, "shards"), rows=rows, number=max(1, workers))
        for case in cases:
            setting = Setting(
                shards=pattern,
                rows=rows,
                model=model,
                batch=batch,
                workers=workers,
                unlocked_groups=unlocked_groups if case == "locked" else 0,
                device=device,
                environment=threads_and_device(threads, device),
            )
            trained = trained_parameters(setting, open_clip_python)
            record = measure(setting, open_clip_python, Path(folder, case), warm_up_steps, steps, rounds)
            labels = {"case": case, "model": model, "device": device, "batch": batch, "rows": rows, "rounds": rounds}
            print(json.dumps({**labels, "trained_parameters": trained, **record, **machine()}), flush=True)


def trained_parameters(setting: Setting, open_clip_python: Path) -> int:
    """How many parameters train on both sides.

    Raises:
        UserError: if they are not the same by name and size.
    """
    model = create_clip(architecture=setting.model).model
    if setting.unlocked_groups:
        lock(model, text=True, image_unlocked_groups=setting.unlocked_groups)
    ours = {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.requires_grad}
    command = [str(open_clip_python), "-c", PEER_PARAMETERS, setting.model, str(setting.unlocked_groups)]
    theirs = json.loads(subprocess.run(command, check=True, capture_output=True).stdout.splitlines()[-1])
    if ours != theirs:
        differing = sorted(ours.items() ^ theirs.items())
        raise UserError(f"{len(differing)} parameters do not train on both sides, such as {differing[0][0]}")
    return sum(ours.values())


def measure(
    setting: Setting, open_clip_python: Path, folder: Path, warm_up_steps: int, steps: int, rounds: int
) -> dict[str, object]:
    """Both sides in turn; the figures of a record."""
    last = warm_up_steps + steps - 1
    first = warm_up_steps - 1
    sides: dict[str, Callable[[Path], tuple[Program, Callable[[Path], float]]]] = {
        "ours": lambda out: (
            ours(setting, out),
            lambda _: waited_share_of_ours(metrics_of(out), first + 1, last, setting.batch),
        ),
        "open_clip": lambda out: (
            peer(setting, open_clip_python, out),
            lambda log: waited_share_of_peer(log, first + 1, last),
        ),
    }
    spent: dict[str, list[Mark]] = {side: [] for side in sides}
    first_steps: dict[str, list[float]] = {side: [] for side in sides}
    waited: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(rounds):
        for side, program_of in sides.items():
            out = folder / f"{side}-{number}"
            log = folder / f"{side}-{number}.log"
            program, waited_share = program_of(out)
            marks = watch(program, last + 1, log)
            spent[side].append(between(marks, first, last))
            first_steps[side].append(marks[0].seconds)
            waited[side].append(waited_share(log))
    samples = setting.batch * steps
    per_s = {side: [samples / mark.seconds for mark in marks] for side, marks in spent.items()}
    cpu_s = {side: [mark.cpu_seconds / samples for mark in marks] for side, marks in spent.items()}
    return {
        "samples_per_s": medians(per_s),
        "ratio": ratios(per_s["ours"], per_s["open_clip"]),
        "cpu_s_per_sample": medians(cpu_s, 4),
        "cpu_ratio": ratios(cpu_s["open_clip"], cpu_s["ours"]),
        "data_wait_share": medians(waited, 4),
        "first_step_s": medians(first_steps, 1),
    }


def ours(setting: Setting, out: Path) -> Program:
    """Our side: the recipe."""
    train = {
        "steps": STEPS_WITHOUT_END,
        "global-batch-size": setting.batch,
        "lr": LR,
        "warmup-steps": WARM_UP_OF_LR,
        "weight-decay": WEIGHT_DECAY,
        "eps": EPS,
        "max-grad-norm": "None",
        "precision": "bf16" if setting.device == "cuda" else "fp32",
    }
    command = [
        *(sys.executable, str(RECIPE), "--run-dir", str(out), "--num-stages", "1"),
        *("--data.train", setting.shards, "--data.holdout-rows", str(HELD_OUT_ROWS)),
        *("--tower.architecture", setting.model),
        *(word for name, value in train.items() for word in (f"--stages.0.train.{name}", str(value))),
        *("--stages.0.train.betas", *BETAS, "--stages.0.train.augment.scale", *SCALE),
        *("--machine.workers", str(setting.workers), "--machine.prefetch-batches", BATCHES_AHEAD),
        *("--machine.log-steps", "1", "--machine.save-steps", "0", "--machine.save-minutes", "0"),
    ]
    if setting.unlocked_groups:
        lock = "--stages.0.train.lock"
        command += [f"{lock}.text", f"{lock}.image-unlocked-groups", str(setting.unlocked_groups)]
    return Program(command=command, marks=lambda _: count_lines(metrics_of(out)), environment=setting.environment)


def peer(setting: Setting, python: Path, out: Path) -> Program:
    """open_clip_train, by its own entry point."""
    command = [
        *(str(python), "-m", "open_clip_train.main", "--dataset-type", "webdataset", "--model", setting.model),
        *("--train-data", setting.shards, "--train-num-samples", str(STEPS_WITHOUT_END * setting.batch)),
        *("--batch-size", str(setting.batch), "--epochs", "1", "--workers", str(setting.workers)),
        *("--lr", LR, "--warmup", WARM_UP_OF_LR, "--wd", WEIGHT_DECAY, "--eps", EPS),
        *("--beta1", BETAS[0], "--beta2", BETAS[1], "--aug-cfg", f"scale=({', '.join(SCALE)})"),
        *("--precision", "amp_bf16" if setting.device == "cuda" else "fp32", "--device", setting.device),
        *("--logs", str(out), "--name", "run", "--log-every-n-steps", "1"),
    ]
    if setting.unlocked_groups:
        command += ["--lock-image", "--lock-image-unlocked-groups", str(setting.unlocked_groups)]
        command += ["--lock-text", "--lock-text-freeze-layer-norm"]  # the second is required, and changes nothing
    return Program(command=command, marks=peer_steps, environment=setting.environment)


if __name__ == "__main__":
    run_program(lambda: tyro.cli(training_step))
