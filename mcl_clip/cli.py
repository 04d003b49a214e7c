"""The command line: `main` is the entry point of recipes, `command` is `mcl-clip`."""

import logging
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import tyro
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

from mcl_clip.artifacts import DONE, read_json, read_jsonl
from mcl_clip.config import RunConfig, StageConfig
from mcl_clip.console import run_program
from mcl_clip.data.index import ShardIndex
from mcl_clip.data.shards import expand_shards
from mcl_clip.distributed import is_main
from mcl_clip.errors import UserError
from mcl_clip.eval.suite import results_table
from mcl_clip.multistage.labels import PseudoLabels, default_min_group_size, group_labels
from mcl_clip.pipeline import run_pipeline
from mcl_clip.tools.reshard import reshard

PHASES = ("train", "embed", "cluster", "labels", "eval")
COLLECTIVE_TIMEOUT = timedelta(hours=2)


def main(recipe: RunConfig) -> None:
    """Run a recipe with the overrides of the command line; `--num-stages N` repeats or drops last stages."""
    run_program(lambda: _run(recipe))


def _run(recipe: RunConfig) -> None:
    config = parse(recipe, sys.argv[1:])
    accelerator = create_accelerator()
    level = logging.INFO if is_main() else logging.ERROR
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("mcl_clip").setLevel(level)
    try:
        run_pipeline(config, accelerator)
    except UserError as error:
        if error.everywhere and not is_main():
            sys.exit(2)  # the main process says it
        raise
    accelerator.end_training()


def parse(recipe: RunConfig, arguments: list[str]) -> RunConfig:
    """The recipe with overrides."""
    arguments = list(arguments)
    for position, argument in enumerate(arguments):
        if argument.split("=")[0] == "--num-stages":
            _, equals, value = argument.partition("=")
            value = value if equals else "".join(arguments[position + 1 : position + 2])
            del arguments[position : position + (1 if equals else 2)]
            recipe = replace(recipe, stages=_with_stages(recipe, value))
            break
    return tyro.cli(RunConfig, default=recipe, args=arguments, description=sys.modules["__main__"].__doc__)


def _with_stages(recipe: RunConfig, value: str) -> tuple[StageConfig, ...]:
    if not value.isdigit() or int(value) < 1:
        raise UserError(f"--num-stages must be a number of at least 1, not {value!r}")
    number = int(value)
    return (*recipe.stages, *[recipe.stages[-1]] * number)[:number]


def create_accelerator() -> Accelerator:
    """Accelerate on GPUs or, where there are none, on the CPU with gloo.

    Raises:
        UserError: for launch settings that cannot be honoured.
    """
    for variable, what in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        if os.environ.get(variable, "false").lower() == "true":
            raise UserError(
                f"{what} is not supported: the towers of CLIP fit one GPU, and checkpoints and gathered features are "
                f"those of plain data parallelism; launch with a config from recipes/accelerate"
            )
    on_cpu = not torch.cuda.is_available()
    return Accelerator(
        cpu=on_cpu,
        mixed_precision="no",  # precision is a setting of each stage
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=COLLECTIVE_TIMEOUT),
            # Without it, DDP changes the order of its sums after the first step, and a resumed run would differ.
            DistributedDataParallelKwargs(find_unused_parameters=on_cpu),
        ],
    )


def index(shards: tuple[str, ...], /) -> None:
    """Index shards: one pass over the tar headers, written as index.arrow beside local shards.

    Args:
        shards: paths or URLs with braces and globs, or folders.
    """
    made = ShardIndex.build(expand_shards(shards))
    made.write_beside()
    print(f"{len(made.shards)} shards, {len(made)} rows, digest {made.digest}")
    if skipped := made.skipped_by_reason():
        print("left out: " + ", ".join(f"{count} {reason}" for reason, count in skipped.items()))


def status(run: Path, /) -> None:
    """Print which phases of a run are done, and what it has measured.

    Args:
        run: the run directory.
    """
    if not (run / "config.json").exists():
        raise UserError(f"{run} is not a run directory: it has no config.json")
    config = read_json(run / "config.json")
    for stage in range(len(config["stages"])):
        folder = run / f"stage-{stage}"
        states = [f"{phase} {_state(folder / phase)}" for phase in PHASES]
        records = [record for record in read_jsonl(folder / "train" / "metrics.jsonl") if "loss" in record]
        at = f" (step {records[-1]['step']} of {config['stages'][stage]['train']['steps']})" if records else ""
        print(f"stage {stage}: {', '.join(states)}{at}")
    print(f"combined: {_state(run / 'combined')}")
    if table := results_table(run):
        print(table)


def _state(folder: Path) -> str:
    if (folder / DONE).exists():
        return "done"
    return "partial" if folder.exists() and any(folder.iterdir()) else "missing"


def reshard_run(run: Path, out: Path, /, *, stage: int, rows_per_shard: int = 10_000) -> None:
    """Copy the shards of a run in the order of a stage's groups, so that reads become sequential.

    Use the result with `--stages.K.train.resharded OUT --stages.K.train.run-rows 32`.

    Args:
        run: the run directory.
        out: an empty or new folder for the shards.
        stage: the stage whose groups decide the order; the labels of the stages before it must be done.
        rows_per_shard: samples of a shard.
    """
    labels = run / f"stage-{stage - 1}" / "labels"
    if stage < 1 or not (labels / DONE).exists():
        raise UserError(f"--stage {stage} needs the labels of stage {stage - 1}, and {labels} is not done")
    config = read_json(run / "config.json")
    settings = config["stages"][min(stage, len(config["stages"]) - 1)]["train"]
    found = group_labels(
        PseudoLabels(
            values=np.load(labels / "labels.npy", allow_pickle=False),
            radix=tuple(read_json(labels / "labels.json")["radix"]),
        ),
        min_group_size=settings["min_group_size"] or default_min_group_size(settings["global_batch_size"]),
    )
    source = ShardIndex.load(run / "index" / "index.arrow")
    made = reshard(source, found.group_of, out, rows_per_shard=rows_per_shard, seed=config["seed"])
    print(f"{len(made.shards)} shards, {len(made)} rows in {len(found.groups)} groups, in {out}")


def command() -> None:
    """The `mcl-clip` command."""
    commands: dict[str, Callable[..., None]] = {"index": index, "status": status, "reshard": reshard_run}
    run_program(lambda: tyro.extras.subcommand_cli_from_dict(commands, prog="mcl-clip", description=__doc__))
