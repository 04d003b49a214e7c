"""Entry point of recipes: parse overrides, set up Accelerate and run the pipeline; also find and load recipes."""

import logging
import os
import runpy
import sys
import sysconfig
import traceback
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Literal, TypeVar

import torch
import tyro
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

from mcl_clip.config import RunConfig
from mcl_clip.core.distributed import is_main, world_size
from mcl_clip.core.errors import PlannedStop, UserError, run_program, shorten
from mcl_clip.core.memory import keep_freed_memory
from mcl_clip.core.progress import be_quiet, is_quiet
from mcl_clip.results.record import data_losses
from mcl_clip.runs.context import RESULTS
from mcl_clip.runs.pipeline import run_pipeline
from mcl_clip.train.interrupt import Interrupt, wait_for_the_cause

PROCESS_COUNTS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")  # read by Accelerate
PROCESS_RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK")
SLURM_TASKS = "SLURM_STEP_NUM_TASKS"  # of srun; in a batch script without it there is one process
COLLECTIVE_TIMEOUT = timedelta(hours=2)
T = TypeVar("T")


def main(recipe: RunConfig) -> None:
    """Run a recipe with the overrides of the command line.

    `--num-stages N` repeats or drops last stages; `--quiet` prints only warnings and results.
    """

    def run() -> None:
        config = parse(recipe, sys.argv[1:])
        with Interrupt(config.machine.preempt_exit_code).listening() as interrupt, all_processes() as accelerator:
            run_pipeline(config, accelerator, interrupt)
            if is_main():
                print("\n".join(lost_lines(config.run_dir)))

    run_program(run)


@contextmanager
def all_processes() -> Iterator[Accelerator]:
    """Create an Accelerator and end it; log, and report errors that all processes share, on the main process only."""
    accelerator = create_accelerator()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    level = logging.WARNING if is_quiet() else logging.INFO
    logging.getLogger("mcl_clip").setLevel(level if is_main() else logging.ERROR)
    logging.getLogger(RESULTS).setLevel(logging.INFO if is_main() else logging.ERROR)
    try:
        yield accelerator
        accelerator.end_training()
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
    """Apply command-line overrides to a recipe.

    `--quiet` silences this process and those that it starts.

    Raises:
        UserError: if `--num-stages` is not an integer of at least 1.
    """
    if "--quiet" in arguments:
        be_quiet()
    arguments = [argument for argument in arguments if argument != "--quiet"]
    for position, argument in enumerate(arguments):
        if argument.split("=")[0] == "--num-stages":
            _, equals, value = argument.partition("=")
            value = value if equals else "".join(arguments[position + 1 : position + 2])
            if not value.isdigit() or int(value) < 1:
                raise UserError(f"--num-stages must be an integer of at least 1, not {value!r}")
            del arguments[position : position + (1 if equals else 2)]
            number = int(value)
            recipe = replace(recipe, stages=(*recipe.stages, *[recipe.stages[-1]] * number)[:number])
            break
    return tyro.cli(RunConfig, default=recipe, args=arguments, description=sys.modules["__main__"].__doc__)


def create_accelerator() -> Accelerator:
    """Create an Accelerator on GPUs or, without any, on the CPU with gloo.

    Raises:
        UserError: for FSDP or DeepSpeed, which are not supported, and in processes that do not know each other.
    """
    if world_size() == 1:  # else there is a process group already
        check_launcher(os.environ)
    for variable, what in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        if os.environ.get(variable, "false").lower() == "true":
            raise UserError(
                f"{what} is not supported: CLIP encoders fit on one GPU, and checkpoints and gathered features assume "
                f"data parallelism (DDP); launch with a config from recipes/accelerate"
            )
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        keep_freed_memory()
    return Accelerator(
        cpu=on_cpu,
        mixed_precision="no",  # precision is a setting of each stage
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=COLLECTIVE_TIMEOUT),
            # Without it, DDP changes the order of its sums after the first step, and a resumed run would differ.
            DistributedDataParallelKwargs(find_unused_parameters=on_cpu),
        ],
    )


def check_launcher(environment: Mapping[str, str]) -> None:
    """Raise UserError if variables of a launcher announce several processes that could not meet."""
    announced = [name for name in (*PROCESS_COUNTS, SLURM_TASKS) if environment.get(name, "1") != "1"]
    missing = [] if environment.get("MASTER_ADDR") else ["MASTER_ADDR"]
    missing += [] if any(environment.get(name) for name in PROCESS_RANKS) else ["RANK"]
    missing += ["WORLD_SIZE"] if announced == [SLURM_TASKS] else []
    if announced and missing:
        raise UserError(
            f"the environment announces several processes ({', '.join(f'{n}={environment[n]}' for n in announced)}) "
            f"without {' and '.join(missing)}, by which they meet; start them with `mcl-clip launch RECIPE` (one task "
            f"of srun or mpirun per node), or unset {' '.join(announced)} for a single process"
        )


def lost_lines(run: Path) -> list[str]:
    """List data losses and restarts of a run under a title."""
    return ["losses and restarts:", *(f"  {line}" for line in data_losses(run))]


def find_recipes() -> dict[str, Path]:
    """Return the recipes of the repository, or those that were installed with the package, by name.

    Raises:
        UserError: if there are neither.
    """
    folders = (
        Path(__file__).parents[2] / "recipes",
        Path(sysconfig.get_path("data")) / "share" / "mcl_clip" / "recipes",
    )
    folder = next((folder for folder in folders if (folder / "photos.py").is_file()), None)
    if folder is None:
        raise UserError(f"the recipes are in none of {', '.join(map(str, folders))}; install mcl_clip again")
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.py"))}


def load_recipe(path: Path, name: Literal["RECIPE", "EXPERIMENT"], kind: type[T]) -> T:
    """Return the `kind` called `name` of a recipe file.

    Raises:
        UserError: if there is no such file, or nothing of this name in it.
    """
    if not path.is_file():
        raise UserError(f"there is no recipe {path}; give the path of a Python file with RECIPE")
    try:
        config = runpy.run_path(str(path)).get(name)
    except (UserError, OSError):
        raise
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = error.lineno if isinstance(error, SyntaxError) else (lines or [None])[-1]
        reason = shorten(error.msg if isinstance(error, SyntaxError) else error, 300)
        raise UserError(f"{path} cannot be run, line {line}: {type(error).__name__}: {reason}") from error
    if not isinstance(config, kind):
        raise UserError(f"{path} has no {name} = {kind.__name__}(...)")
    return config


def split_arguments(arguments: Sequence[str], options: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """Return the arguments of a command, up to the recipe (the first Python file), and those of the recipe.

    `options` are those of the command that may also follow the recipe.
    """
    end = next((i for i, argument in enumerate(arguments, 1) if argument.endswith(".py")), len(arguments))
    own, following = list(arguments[:end]), list(arguments[end:])
    of_recipe = []
    while following:
        argument = following.pop(0)
        name, equals, _ = argument.partition("=")
        if name.replace("_", "-") in options:
            own += [argument] if equals else [argument, *following[:1]]
            following = following if equals else following[1:]
        else:
            of_recipe.append(argument)
    return own, of_recipe


def split_options(arguments: Sequence[str], options: Collection[str]) -> tuple[list[str], list[str]]:
    """Return the arguments of a command that has `options`, and those with other options, which are of a recipe.

    Arguments before the first option, and after one of `options`, are of the command.
    """
    own, of_recipe = list[str](), list[str]()
    current = own
    for argument in arguments:
        if argument.startswith("--") or argument == "-h":
            name = argument.partition("=")[0].replace("_", "-")
            current = own if name in options or name in ("-h", "--help") else of_recipe
        current.append(argument)
    return own, of_recipe
