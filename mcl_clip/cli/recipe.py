"""The command line of recipes: `main` is their entry point, and `parse` applies overrides."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import tyro
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

from mcl_clip.config import RunConfig, StageConfig
from mcl_clip.core.console import PlannedStop, run_program
from mcl_clip.core.distributed import is_main
from mcl_clip.core.errors import UserError
from mcl_clip.core.progress import be_quiet, is_quiet
from mcl_clip.results.record import data_losses
from mcl_clip.runs.context import RESULTS
from mcl_clip.runs.pipeline import run_pipeline
from mcl_clip.train.interrupt import Interrupt, wait_for_the_cause

COLLECTIVE_TIMEOUT = timedelta(hours=2)


def main(recipe: RunConfig) -> None:
    """Run a recipe with the overrides of the command line.

    `--num-stages N` repeats or drops last stages; `--quiet` prints warnings and results alone.
    """
    run_program(lambda: _run(recipe))


def _run(recipe: RunConfig) -> None:
    config = parse(recipe, sys.argv[1:])
    with Interrupt(config.machine.preempt_exit_code).listening() as interrupt:
        accelerator = create_accelerator()
        with speaking_once():
            run_pipeline(config, accelerator, interrupt)
            if is_main():
                print("\n".join(lost_lines(config.run_dir)))
        accelerator.end_training()


@contextmanager
def speaking_once() -> Iterator[None]:
    """What all processes have to say is said by the main one."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    said = logging.WARNING if is_quiet() else logging.INFO
    logging.getLogger("mcl_clip").setLevel(said if is_main() else logging.ERROR)
    logging.getLogger(RESULTS).setLevel(logging.INFO if is_main() else logging.ERROR)
    try:
        yield
    except UserError as error:
        if error.everywhere and not is_main():
            sys.exit(2)
        raise
    except PlannedStop as stop:
        if not is_main():
            sys.exit(stop.exit_code)
        raise
    except Exception as error:
        wait_for_the_cause(error)
        raise


def parse(recipe: RunConfig, arguments: list[str]) -> RunConfig:
    """The recipe with overrides. `--quiet` is for all loops of this process and those that it starts."""
    if "--quiet" in arguments:
        be_quiet()
    arguments = [argument for argument in arguments if argument != "--quiet"]
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


def lost_lines(run: Path) -> list[str]:
    """What a run lost on its way, with a title."""
    return ["lost on the way:", *(f"  {line}" for line in data_losses(run))]
