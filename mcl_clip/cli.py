"""The command line: `main` is the entry point of recipes, `command` is `mcl-clip`."""

import logging
import os
import runpy
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

from mcl_clip.artifacts import DONE, append_jsonl, atomic_path, read_json, read_jsonl
from mcl_clip.config import ExperimentConfig, RunConfig, StageConfig, check_range
from mcl_clip.console import run_program
from mcl_clip.data.index import ShardIndex
from mcl_clip.data.shards import expand_shards
from mcl_clip.distributed import is_main, world_size
from mcl_clip.errors import UserError
from mcl_clip.eval.suite import results_table
from mcl_clip.multistage.labels import PseudoLabels, default_min_group_size, group_labels
from mcl_clip.pipeline import run_pipeline, with_control
from mcl_clip.tools.compare import compare_models, comparison_records, comparison_text, find_results
from mcl_clip.tools.evaluate import evaluate
from mcl_clip.tools.experiment import Plan, control_arms, run_arms, table
from mcl_clip.tools.reshard import reshard

PHASES = ("train", "embed", "cluster", "labels", "eval")
COLLECTIVE_TIMEOUT = timedelta(hours=2)


def main(recipe: RunConfig) -> None:
    """Run a recipe with the overrides of the command line; `--num-stages N` repeats or drops last stages."""
    run_program(lambda: _run(recipe))


def _run(recipe: RunConfig) -> None:
    config = parse(recipe, sys.argv[1:])
    accelerator = create_accelerator()
    with _speaking_once():
        run_pipeline(config, accelerator)
    accelerator.end_training()


@contextmanager
def _speaking_once() -> Iterator[None]:
    """What all processes have to say is said by the main one."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("mcl_clip").setLevel(logging.INFO if is_main() else logging.ERROR)
    try:
        yield
    except UserError as error:
        if error.everywhere and not is_main():
            sys.exit(2)
        raise


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


def evaluate_model(
    model: str,
    /,
    *,
    data: Path,
    tasks: tuple[str, ...] = (),
    out: Path | None = None,
    each: bool = False,
    batch_size: int = 64,
    workers: int = 2,
    device: str | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
    combine: Literal["concat", "mean_cosine"] | None = None,
) -> None:
    """Measure a model on evaluation sets, with intervals; the same command again continues where it stopped.

    `accelerate launch -m mcl_clip eval ...` shares the images among processes; the figures stay the same.

    Args:
        model: a run directory (its combined model), RUN/stage-K, an exported folder, ARCHITECTURE/TAG of open_clip
            such as ViT-B-32/laion2b_s34b_b79k, hf-hub:ORG/NAME or local-dir:FOLDER.
        data: a set, or a folder with sets up to two levels below it. Layouts: CLIP_benchmark's (retrieval,
            classification, multilabel), a folder of images for each class, pairs.json.
        tasks: names of the sets to use, as folders below DATA; all by default.
        out: folder for results.jsonl and outcomes-*.npz; by default evaluations/ and the name of the model.
        each: also measure every stage of a run.
        batch_size: images, and texts, of a forward pass of one process.
        workers: loader processes of each process; 0 for none.
        device: such as cpu or cuda:1; by default a GPU where there is one. Only for a single process.
        precision: bf16 runs the towers in bfloat16 autocast.
        combine: how the stages of a multistage model are combined, in place of its own way.
    """
    check_range("batch-size", batch_size, 1)
    check_range("workers", workers, 0)
    accelerator = create_accelerator()
    with _speaking_once():
        found = evaluate(
            model,
            data=data,
            tasks=tasks,
            out=out,
            each=each,
            device=_device(device) if device else accelerator.device,
            batch_size=batch_size,
            num_workers=workers,
            precision=precision,
            combine=combine,
        )
        if is_main():
            print(f"{results_table(found)}\nin {found}")
    accelerator.end_training()


def _device(name: str) -> torch.device:
    if world_size() > 1:
        raise UserError(
            f"--device {name} cannot be shared by {world_size()} processes, which have one each; leave it out"
        )
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def compare(a: str, b: str, /, *, resamples: int = 10_000, out: Path | None = None) -> None:
    """Compare two models query by query, on the sets that both were evaluated on: A - B with 95 % intervals.

    Intervals are from a paired bootstrap over queries, or over images (units) where several queries belong to one.
    `only A/B` counts the queries that only A, or only B, gets right; p is McNemar's exact test of these, and Holm the
    same, adjusted for the number of tests of the set.

    Args:
        a: a run directory (its combined model), RUN/stage-K (that stage alone), a folder that `mcl-clip eval` wrote, or
            one of these with :LABEL for the model that the tables call LABEL, as in RUN:stages-0-1-concat.
        b: the other model, named likewise.
        resamples: bootstrap draws; 10,000 take about a second per metric of 25,000 images.
        out: file for the same figures as JSON lines.
    """
    check_range("resamples", resamples, 100)
    comparison = compare_models(find_results(a), find_results(b), resamples=resamples)
    print(comparison_text(comparison))
    if out:
        with atomic_path(out) as path:
            for record in comparison_records(comparison):
                append_jsonl(path, record)


def experiment(
    recipe: Path,
    /,
    *,
    out: Path,
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5),
    arms: tuple[str, ...] = (),
    arguments: str = "",
    jobs: int = 1,
    launcher: str = sys.executable,
    resamples: int = 2000,
) -> None:
    """Run a recipe beside its controls over several seeds, and print one table with intervals.

    Arms: `mcl` (the recipe), the controls of `--control`, and those that the recipe's EXPERIMENT adds. The same command
    continues; with everything done it prints the table again.

    Args:
        recipe: a file with RECIPE and, for the columns of the table, EXPERIMENT.
        out: folder for the runs, table.md and results.jsonl.
        seeds: training seeds; the data stays the same.
        arms: which arms to run; all by default.
        arguments: further arguments of the recipe for every arm, in one string.
        jobs: runs at the same time, which share the processor cores.
        launcher: what starts a run, such as "accelerate launch --config_file recipes/accelerate/eight_gpus.yaml".
        resamples: bootstrap draws.
    """
    check_range("jobs", jobs, 1)
    check_range("resamples", resamples, 100)
    if len(set(seeds)) < len(seeds) or not seeds:
        raise UserError(f"--seeds {seeds} must be one or more different numbers")
    config, settings = _experiment_of(recipe)
    shared = shlex.split(arguments)
    chosen = control_arms(arms, settings.arms)
    twins = [with_control(replace(config, control=name), rows=0).stages for name in ("ensemble", "no-groups")]
    if not arms and twins[0] == twins[1]:
        print("no-groups is left out: stages from scratch without groups are the ensemble")
        del chosen["no-groups"]
    plan = Plan(
        recipe=recipe,
        out=out,
        seeds=seeds,
        arms={name: (*shared, *own) for name, own in chosen.items()},  # what makes an arm comes last and holds
        figures=settings.figures,
        high=settings.high if settings.high in chosen and "single" in chosen else None,
    )
    run_arms(plan, launcher=shlex.split(launcher), jobs=jobs)
    print(table(plan, resamples=resamples))


def _experiment_of(recipe: Path) -> tuple[RunConfig, ExperimentConfig]:
    if not recipe.is_file():
        raise UserError(f"there is no recipe {recipe}; give the path of a Python file with RECIPE and EXPERIMENT")
    names: dict[str, Any] = runpy.run_path(str(recipe))
    config, settings = names.get("RECIPE"), names.get("EXPERIMENT")
    if not isinstance(config, RunConfig) or not isinstance(settings, ExperimentConfig):
        raise UserError(
            f"{recipe} has no RECIPE = RunConfig(...) with EXPERIMENT = ExperimentConfig(...), which says what the "
            f"table shows"
        )
    return config, settings


def command() -> None:
    """The `mcl-clip` command."""
    commands: dict[str, Callable[..., None]] = {
        "index": index,
        "status": status,
        "eval": evaluate_model,
        "compare": compare,
        "experiment": experiment,
        "reshard": reshard_run,
    }
    run_program(lambda: tyro.extras.subcommand_cli_from_dict(commands, prog="mcl-clip", description=__doc__))
