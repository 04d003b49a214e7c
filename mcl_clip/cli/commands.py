"""Commands of `mcl-clip`, one function each. `mcl_clip.__main__` lists them without importing this module."""

import inspect
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from mcl_clip.cli.recipe import (
    all_processes,
    create_accelerator,
    find_recipes,
    load_recipe,
    lost_lines,
    parse,
    split_arguments,
    split_options,
)
from mcl_clip.config import DataConfig, ExperimentConfig, RunConfig
from mcl_clip.core.checks import check_range
from mcl_clip.core.distributed import is_main, world_size
from mcl_clip.core.errors import UserError, run_program
from mcl_clip.core.files import DONE, append_jsonl, atomic_path, read_run_config, write_json
from mcl_clip.core.progress import be_quiet, has_colours
from mcl_clip.data.index import ShardIndex
from mcl_clip.data.shards import expand_shards, is_remote
from mcl_clip.data.writing import refuse_non_empty
from mcl_clip.eval.evaluate import evaluate
from mcl_clip.model.resolve import find_models
from mcl_clip.publish.export import EVERYTHING, Export, export_run
from mcl_clip.publish.hub import check_repo_name, check_target, find_token, upload
from mcl_clip.report.evaluation import runs_with_controls
from mcl_clip.report.page import write_report
from mcl_clip.results.audit import audit_lines
from mcl_clip.results.compare import compare_models, comparison_records, comparison_text
from mcl_clip.results.text import format_bytes, results_table
from mcl_clip.runs.context import sample_rule
from mcl_clip.runs.pipeline import check_stages, run_pipeline
from mcl_clip.stages.pseudo_labels import default_min_group_size, group_labels, read_labels
from mcl_clip.tools.audit import audit_folder, audit_model
from mcl_clip.tools.audit_data import MIN_PAIRS, AuditOptions, open_audit_data
from mcl_clip.tools.browse import serve
from mcl_clip.tools.doctor import diagnoses, examine, finding_text, status_lines
from mcl_clip.tools.experiment import plan_experiment, run_arms, table
from mcl_clip.tools.finetune import FineTuning, advice, audit_result, comparison_lines, evaluate_base, export_result
from mcl_clip.tools.finetune_data import DataOptions
from mcl_clip.tools.finetune_recipe import find_towers
from mcl_clip.tools.launch import launch, read_placement, resolve_placement
from mcl_clip.tools.profile import hints, profile_recipe, profile_text
from mcl_clip.tools.reshard import reshard
from mcl_clip.train.interrupt import Interrupt

DATA_OPTIONS = DataOptions()
AUDIT_OPTIONS = AuditOptions()


def index(
    shards: tuple[str, ...],
    /,
    *,
    caption_key: str = "",
    image_member: str = "",
    text_member: str = "",
    skip_damaged: bool = False,
) -> None:
    """Index shards in one pass over their tar headers.

    The index is written as index.arrow beside local shards, for runs with the same options. What was done is kept when
    the command is stopped, and used when it is given again.

    Args:
        shards: paths or URLs with braces and globs, or folders.
        caption_key: as --data.caption-key of the run.
        image_member: as --data.image-member of the run.
        text_member: as --data.text-member of the run.
        skip_damaged: as --data.skip-damaged of the run.
    """
    urls = expand_shards(shards)
    if all(map(is_remote, urls)):
        raise UserError("all shards are remote; a run indexes them into its own folder")
    kept = Path(next(url for url in urls if not is_remote(url))).parent / ".index-parts"
    data = DataConfig(
        caption_key=caption_key, image_member=image_member, text_member=text_member, skip_damaged=skip_damaged
    )
    built = ShardIndex.build(urls, rule=sample_rule(data, RunConfig.behavior), kept=kept)
    built.write_beside()
    count = len(built.shards)
    lines = [
        f"{count} shard{'s' * (count != 1)}, {len(built)} rows, digest {built.digest}",
        f"captions: {built.text_counts()}",
    ]
    if built.skipped_by_reason():
        lines.append(f"left out: {built.describe_skipped()}")
    del built  # it is mapped from a file in `kept`
    shutil.rmtree(kept, ignore_errors=True)
    print("\n".join(lines))


def status(run: Path, /) -> None:
    """Print the progress of a run, its losses and restarts, and its results.

    Args:
        run: the run directory.
    """
    print("\n".join([*status_lines(run, has_colours=has_colours()), *diagnoses(run), *lost_lines(run)]))
    if table := results_table(run):
        print(table)


def report(run: Path, /, *, max_mb: float = 10.0, images: bool = True, out: Path | None = None) -> None:
    """Write report.html, a page that shows what each stage learned.

    A run writes it after each stage; this command writes it again, also while the run continues.

    Args:
        run: the run directory.
        max_mb: largest size of the page, in 10^6 bytes; thumbnails are made smaller, then fewer.
        images: include images of the data; use --no-images to share the page but not the data.
        out: output file; by default report.html in the run directory.
    """
    check_range("max-mb", max_mb, 0.01)
    started = time.monotonic()
    path = write_report(run, images=images, max_mb=max_mb, out=out)
    print(f"{path}: {format_bytes(path.stat().st_size)}, in {time.monotonic() - started:.1f} s")


def browse(run: Path, /, *, port: int = 7860, gallery: str = "", open: bool = False, device: str | None = None) -> None:
    """Search the images of a run in the browser, stage by stage.

    Queries are a text, an uploaded image, or an image of the results. The page is served to this machine only
    (127.0.0.1).

    Args:
        run: the run directory; of an unfinished run, finished stages are shown.
        port: TCP port; 0 for a free one.
        gallery: evaluation set to show first, or train for the training pairs.
        open: open the page in the browser.
        device: device that encodes queries, such as cuda:1; by default a GPU if there is one.
    """
    check_range("port", port, 0, 65535)
    encoder = _device(device) if device else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    serve(run, port=port, gallery=gallery, open_browser=open, device=encoder)


def init(name: str = "", /, *, out: Path | None = None) -> None:
    """Copy a recipe to start from; without a name, list the recipes.

    Args:
        name: name of the recipe, such as photos.
        out: output file; by default NAME.py in the current folder. No file is overwritten.
    """
    recipes = find_recipes()
    if not name:
        width = max(map(len, recipes))
        for each, path in recipes.items():
            title = path.read_text(encoding="utf-8").split("\n", 1)[0].strip().strip('"')
            print(f"{each:<{width}}  {title}")
        return
    if name not in recipes:
        raise UserError(f"there is no recipe {name!r}; there are {', '.join(recipes)}")
    target = out or Path(f"{Path(name).name}.py")
    if target.exists():
        raise UserError(f"{target} exists already; give --out another name")
    with atomic_path(target) as path:
        shutil.copyfile(recipes[name], path)
    print(f"{target}: edit it, then run `mcl-clip doctor {target}` and `mcl-clip launch {target}`")


def reshard_run(run: Path, out: Path, /, *, stage: int, rows_per_shard: int = 10_000) -> None:
    """Copy the shards of a run in the order of its groups.

    Training then reads sequentially, with `--stages.K.train.resharded OUT --stages.K.train.run-rows 32`.

    Args:
        run: the run directory.
        out: an empty or new folder for the shards.
        stage: the stage whose groups decide the order; the labels of earlier stages must be done.
        rows_per_shard: samples per shard.
    """
    labels = run / f"stage-{stage - 1}" / "labels"
    if stage < 1 or not (labels / DONE).exists():
        raise UserError(f"--stage {stage} needs the labels of stage {stage - 1}, and {labels} is not done")
    config = read_run_config(run)
    settings = config["stages"][min(stage, len(config["stages"]) - 1)]["train"]
    sizes = [settings.get(name) for name in ("min_group_size", "global_batch_size")]
    if not all(type(number) is int for number in (config.get("seed"), *sizes)):
        raise UserError(f"{run / 'config.json'} has no seed or no group sizes; run the recipe again to write it")
    source = ShardIndex.load(run / "index" / "index.arrow")
    smallest = sizes[0] or default_min_group_size(sizes[1])
    grouping = group_labels(read_labels(labels, len(source)), min_group_size=smallest)
    written = reshard(source, grouping.group_of, out, rows_per_shard=rows_per_shard, seed=config["seed"])
    print(f"{len(written.shards)} shards, {len(written)} rows in {len(grouping.groups)} groups, in {out}")


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
    """Evaluate a model on evaluation sets, with confidence intervals.

    The same command resumes an interrupted evaluation. `accelerate launch -m mcl_clip eval ...` distributes the images
    over processes; the results do not change.

    Args:
        model: a run directory (its combined model), RUN/stage-K, an exported folder, ARCHITECTURE/TAG of open_clip
            such as ViT-B-32/laion2b_s34b_b79k, hf-hub:ORG/NAME or local-dir:FOLDER.
        data: an evaluation set, or a folder with sets up to two levels below. Layouts: CLIP_benchmark's (retrieval,
            classification, multilabel), a folder of images for each class, pairs.json.
        tasks: sets to use, as folders below DATA; all by default.
        out: folder for results.jsonl and outcomes-*.npz; by default evaluations/ and the name of the model.
        each: also evaluate every stage of a run.
        batch_size: images, or texts, per forward pass and process.
        workers: loader processes per process; 0 to load in the process itself.
        device: device such as cpu or cuda:1, for a single process; by default a GPU if there is one.
        precision: bf16 runs the encoders in bfloat16 autocast.
        combine: how to combine the features of the stages; by default as the model says.
    """
    check_range("batch-size", batch_size, 1)
    check_range("workers", workers, 0)
    with all_processes() as accelerator:
        folder = evaluate(
            model, data=data, tasks=tasks, out=out, each=each, batch_size=batch_size, num_workers=workers,
            device=_device(device) if device else accelerator.device, precision=precision, combine=combine,
        )  # fmt: skip
        if is_main():
            print(f"{results_table(folder)}\nin {folder}")


def audit(
    model: str,
    /,
    *,
    data: tuple[str, ...],
    out: Path | None = None,
    options: Annotated[AuditOptions, tyro.conf.OmitArgPrefixes] = AUDIT_OPTIONS,
    batch_size: int = 64,
    workers: int = 2,
    device: str | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
) -> None:
    """Find what a model is blind to, and by which shortcut it tells pairs apart.

    Nothing is trained. Swaps of words in captions show which kinds of words it sees; captions and pictures with a part
    left out show whether a part that both share, such as a code or text in the picture, suppresses the rest; then what
    its clusters follow, and a verdict. Writes OUT/audit.html, OUT/audit.json and OUT/swaps, a set of pairs.

    Args:
        model: as for eval.
        data: shards with captions (paths or URLs with braces and globs, or folders), or a retrieval set.
        out: a new or empty folder; by default RUN/audit or RUN/stage-K/audit, and audits/ and the name of other models.
        options: what is looked at.
        batch_size: images, or texts, per forward pass.
        workers: loader processes; 0 to load in the process itself.
        device: device such as cpu or cuda:1; by default a GPU if there is one.
        precision: bf16 runs the encoders in bfloat16 autocast.
    """
    check_range("pictures", options.pictures, MIN_PAIRS)
    check_range("batch-size", batch_size, 1)
    check_range("workers", workers, 0)
    if world_size() > 1:
        raise UserError("audit runs in one process; start it without a launcher")
    candidate = find_models(model)[-1]
    out = out or audit_folder(model, candidate.label)
    refuse_non_empty(out)
    with all_processes() as accelerator:
        found = open_audit_data(data, options)
        record = audit_model(
            candidate.load(), found, out, options, name=model, batch_size=batch_size, num_workers=workers,
            device=_device(device) if device else accelerator.device, precision=precision,
        )  # fmt: skip
        print("\n".join([*audit_lines(record), f"in {out}"]))


def _device(name: str) -> torch.device:
    if world_size() > 1:
        raise UserError(
            f"--device {name} cannot be shared by {world_size()} processes, each of which has its own; leave it out"
        )
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def compare(a: str, b: str, /, *, resamples: int = 10_000, out: Path | None = None) -> None:
    """Compare two models query by query: A - B with 95 % intervals.

    Uses the sets that both were evaluated on. Intervals are from a paired bootstrap over queries, or over images
    (units) with several queries each. `only A/B` counts queries that only A, or only B, answers correctly; p is from
    McNemar's exact test of these, and Holm is p adjusted for the number of tests on the set.

    Args:
        a: a run directory (its combined model), RUN/stage-K (that stage alone), a folder that `mcl-clip eval` wrote, or
            one of these with :LABEL for the model that the tables call LABEL, as in RUN:stages-0-1-concat.
        b: the other model, named likewise.
        resamples: bootstrap resamples; 10,000 take about a second per metric on 25,000 images.
        out: output file for the same numbers as JSON lines.
    """
    check_range("resamples", resamples, 100)
    comparison = compare_models(a, b, resamples=resamples)
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
    """Run a recipe and its controls over several seeds.

    Prints one table with intervals. Arms: `mcl` (the recipe), the controls of `--control`, and those of the recipe's
    EXPERIMENT. The same command resumes; if all runs are done it prints the table again.

    Args:
        recipe: a file with RECIPE and, for the columns of the table, EXPERIMENT.
        out: folder for the runs, table.md and results.jsonl.
        seeds: training seeds; the data does not change.
        arms: arms to run; all by default.
        arguments: further arguments of the recipe for every arm, in one string.
        jobs: runs at the same time, which share the processor cores.
        launcher: command that starts a run, such as "accelerate launch --config_file
            recipes/accelerate/eight_gpus.yaml".
        resamples: bootstrap resamples.
    """
    check_range("jobs", jobs, 1)
    check_range("resamples", resamples, 100)
    config, settings = load_recipe(recipe, "RECIPE", RunConfig), load_recipe(recipe, "EXPERIMENT", ExperimentConfig)
    plan = plan_experiment(recipe, config, settings, out=out, seeds=seeds, arms=arms, arguments=shlex.split(arguments))
    if not arms and "no-groups" not in plan.arms:
        print("no-groups is skipped: training stages from scratch without groups equals the ensemble")
    run_arms(plan, launcher=shlex.split(launcher), jobs=jobs)
    print(table(plan, resamples=resamples))
    for run in runs_with_controls(out):
        print(f"report: {write_report(run)}")


def launch_recipe(
    recipe: Path,
    /,
    *,
    num_processes: int | None = None,
    config_file: Path | None = None,
    num_machines: int | None = None,
    machine_rank: int | None = None,
    main_process_ip: str | None = None,
    main_process_port: int | None = None,
) -> None:
    """Run a recipe in several processes.

    `mcl-clip launch RECIPE [--num-processes N] [arguments of the recipe]`; `python RECIPE --help` lists the latter.
    The recipe and its arguments are checked before processes start. SIGTERM and SIGUSR1 stop the job with a checkpoint
    and exit code 0 (or --machine.preempt-exit-code), Ctrl-C with 130, a closed terminal with 129; a second signal stops
    it immediately. If a process fails, the job ends with its message and exit code. All processes end with the command.

    Args:
        recipe: a file with RECIPE; its own arguments follow it.
        num_processes: training processes on all machines; by default one per GPU, or one.
        config_file: configuration of Accelerate, as in recipes/accelerate; options given here override it.
        num_machines: number of machines; run the command on each.
        machine_rank: number of this machine, from 0.
        main_process_ip: address of machine 0.
        main_process_port: TCP port of machine 0; by default 29500, or a free one on a single machine.
    """
    names = ("num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port")
    values = (num_processes, num_machines, machine_rank, main_process_ip, main_process_port)
    settings = read_placement(config_file) if config_file else {}
    settings |= {name: value for name, value in zip(names, values, strict=True) if value is not None}
    placement = resolve_placement(settings, gpus=torch.cuda.device_count())
    config, arguments = _resolve(recipe)
    check_stages(config, processes=placement.num_processes)
    command = [sys.executable, str(recipe), *arguments]
    sys.exit(launch(command, placement, planned_codes={0, 129, 130, config.machine.preempt_exit_code}))


def _resolve(recipe: Path) -> tuple[RunConfig, list[str]]:
    """Return a recipe with its arguments in the command line, and these."""
    _, arguments = split(sys.argv[1:])
    return parse(load_recipe(recipe, "RECIPE", RunConfig), arguments), arguments


def doctor(recipe: Path, /, *, processes: int = 0) -> None:
    """Find what will fail, or perform badly, before a job runs.

    `mcl-clip doctor RECIPE [arguments of the recipe]`; `python RECIPE --help` lists the latter. Checks packages,
    devices, shards, a sample of the data, evaluation sets, weights, steps, groups, memory, disk space and an existing
    run directory. Writes nothing. Exit code 1 if something will fail, 0 otherwise.

    Args:
        recipe: a file with RECIPE; its own arguments follow it.
        processes: training processes; 0 for one per GPU of this machine, or one.
    """
    check_range("processes", processes, 0)
    config, _ = _resolve(recipe)
    levels = []
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    for finding in examine(config, processes=processes, make_accelerator=create_accelerator):
        print(finding_text(finding, columns=columns, has_colours=has_colours()), flush=True)
        levels.append(finding.level)
    failures, warnings = levels.count("FAIL"), levels.count("warning")
    print(f"{failures or 'nothing'} will fail, {warnings or 'no'} warning{'s' * (warnings != 1)}")
    if failures:
        sys.exit(1)


def finetune(
    model: str,
    data: str = "",
    /,
    *,
    run_dir: Path,
    image: str = "",
    text: str = "",
    seed: int = 0,
    audit: bool = True,
    options: Annotated[DataOptions, tyro.conf.OmitArgPrefixes] = DATA_OPTIONS,
) -> None:
    """Fine-tune a model on your own pictures, compare it with the base, and export it.

    `mcl-clip finetune MODEL DATA --run-dir RUN [settings of a recipe]`, such as --stages.0.train.steps 200 or
    --eval.sets SET for zero-shot sets; `python RUN/recipe.py --help` lists them. Writes shards and two retrieval sets
    to RUN/data, RUN/recipe.py with settings that fit the size of the data, the results, RUN/report.html, and the model
    to RUN/model. The same command resumes. On several GPUs: stop it once it trains, and go on with `mcl-clip launch
    RUN/recipe.py`; then the same command again.

    Args:
        model: ARCHITECTURE/TAG of open_clip such as ViT-B-32/laion2b_s34b_b79k, hf-hub:ORG/NAME, a folder of
            open_clip or with a CLIPModel, RUN/stage-K, or a pair of towers as timm:NAME=FILE+hf:FOLDER.
        data: a table (CSV, TSV, JSON, Parquet, captions of COCO or Flickr), a folder of images with .txt or .json
            beside them, a data set of `datasets` (a folder or ORG/NAME), or shards.
        run_dir: folder of all output.
        image: image tower of a pair, in place of MODEL: timm:NAME=FILE, or timm:NAME for the weights of timm.
        text: text tower of a pair, in place of MODEL: hf:FOLDER or hf:ORG/NAME.
        seed: seed of the split and of training.
        audit: audit the result on the test set at the end, as mcl-clip audit does; the last line rests on it.
        options: how the data is read and split.
    """
    check_range("validation", options.validation, 0)
    check_range("test", options.test, 0)
    check_range("max-missing", options.max_missing, 0, 1)
    if world_size() > 1:
        raise UserError(
            f"finetune prepares data in one process; start it without a launcher, and train in several processes with "
            f"`mcl-clip launch {run_dir / 'recipe.py'}`"
        )
    if bool(data) == bool(image or text) or bool(image) != bool(text):
        raise UserError(
            "finetune takes MODEL and DATA, or DATA with both --image timm:NAME=FILE and --text hf:FOLDER; name the "
            "model once, and the data"
        )
    model, data = (model, data) if data else (f"{image}+{text}", model)
    _, arguments = split(sys.argv[1:])
    job = FineTuning(
        tower=find_towers(model), data=data, run_dir=run_dir, options=options, seed=seed,
        override=lambda recipe: parse(recipe, arguments),
    )  # fmt: skip
    machine = job.check().machine
    with Interrupt(machine.preempt_exit_code).listening() as interrupt, all_processes() as accelerator:
        config, lines = job.set_up(command=["mcl-clip", *sys.argv[1:]])
        print("\n".join(lines), flush=True)
        evaluate_base(config, accelerator.device)
        run_pipeline(config, accelerator, interrupt)
        print("\n".join([*comparison_lines(run_dir), *lost_lines(run_dir)]))
        print(f"model: {_export_text(*export_result(run_dir))}")
        lines = audit_result(config, accelerator.device) if audit else []
        print("\n".join([f"report: {run_dir / 'report.html'}", *lines, advice(run_dir)]))


def profile(
    recipe: Path, /, *, stage: int | None = None, steps: int = 20, warmup: int = 5, out: Path | None = None
) -> None:
    """Measure where a training step spends its time.

    `mcl-clip profile RECIPE [--stage K] [arguments of the recipe]`; `python RECIPE --help` lists the latter. Trains a
    few steps as the recipe would, in a temporary folder (below TMPDIR), and suggests what to change. The run directory
    is only read: a later stage needs the earlier ones done there. `accelerate launch -m mcl_clip profile ...` measures
    several processes on one machine.

    Args:
        recipe: a file with RECIPE; its own arguments follow it.
        stage: number of the stage, from 0; by default the first that trains.
        steps: number of steps to measure.
        warmup: number of steps before the measured ones.
        out: file for the figures as JSON: seconds of a step by part, shares, samples per second, bytes, hints.
    """
    check_range("steps", steps, 1)
    check_range("warmup", warmup, 1)
    config, _ = _resolve(recipe)
    with all_processes() as accelerator:
        found, setup = profile_recipe(config, accelerator, stage=stage, steps=steps, warmup_steps=warmup)
        if is_main():
            print(profile_text(found, setup))
            if out:
                write_json(out, {"stage": setup.stage, **found.record(), "hints": hints(found, setup)})


def export(run: Path, folder: Path, /, *, what: Annotated[Export, tyro.conf.OmitArgPrefixes] = EVERYTHING) -> None:
    """Export a run to a folder that other libraries can load.

    The export is loaded back with each library to verify it. By default it holds all stages as one model, for
    `mcl_clip.load` and transformers (trust_remote_code); open_clip loads each of its stage_K. With --stage or --average
    it is a single model, as an open_clip folder or a CLIPModel.

    Args:
        run: the run directory.
        folder: a new or empty folder, or an earlier export, which is replaced.
        what: part and format of the run.
    """
    print(_export_text(folder, export_run(run, folder, what)))


def push(
    run: Path,
    repo: str,
    /,
    *,
    private: bool = False,
    revision: str = "main",
    create_pr: bool = False,
    dry_run: bool = False,
    what: Annotated[Export, tyro.conf.OmitArgPrefixes] = EVERYTHING,
) -> None:
    """Publish a run on the Hugging Face Hub, with a model card.

    RUN/upload is written and verified first. The same command resumes an interrupted upload, and does nothing after a
    complete one. An edited README.md on the Hub is kept once its line that allows replacing it is removed.

    Args:
        run: the run directory.
        repo: repository, as ORG/NAME; created if it does not exist.
        private: create a private repository.
        revision: branch; created if it does not exist.
        create_pr: upload the files as a pull request.
        dry_run: write, verify and list RUN/upload, and upload nothing.
        what: part and format of the run.
    """
    check_repo_name(repo)
    check_target(revision, create_pr)
    if not dry_run:
        find_token()
    folder = run / "upload"
    print(_export_text(folder, export_run(run, folder, what, repo=repo, revision=revision)))
    if dry_run:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            print(f"  {path.relative_to(folder)}  {format_bytes(path.stat().st_size)}")
        print("nothing was uploaded")
        return
    message = f"{run.resolve().name}: {what.form} model, written by mcl_clip {version('mcl_clip')}"
    published = upload(folder, repo, private=private, revision=revision, create_pr=create_pr, message=message)
    print(f"{published.url}\ncommit {published.commit}" + ("" if published.changed else ": nothing has changed"))


def _export_text(folder: Path, differences: Mapping[str, float]) -> str:
    size = format_bytes(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))
    libraries = ", ".join(f"{name} {difference:.1g}" for name, difference in differences.items())
    return f"{folder}: {size}; loaded back, with a largest difference of features of {libraries}"


COMMANDS: dict[str, Callable[..., None]] = {
    "init": init, "launch": launch_recipe, "doctor": doctor, "finetune": finetune, "profile": profile,
    "experiment": experiment, "status": status, "report": report, "browse": browse, "eval": evaluate_model,
    "audit": audit, "compare": compare, "export": export, "push": push, "index": index, "reshard": reshard_run,
}  # fmt: skip
RECIPE_COMMANDS = ("launch", "doctor", "profile", "finetune")  # they pass arguments to a recipe


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the arguments of a command of `RECIPE_COMMANDS`, and those of the recipe that may stand between them."""
    names = [*inspect.signature(COMMANDS[arguments[0]]).parameters]
    if arguments[0] == "finetune":
        names += ["no_audit", *(field.name for field in fields(DataOptions))]
        return split_options(arguments, [f"--{name.replace('_', '-')}" for name in names])
    return split_arguments(arguments, [f"--{name.replace('_', '-')}" for name in names])


def command() -> None:
    """Run the `mcl-clip` command given by `sys.argv`."""

    def run() -> None:
        if "--quiet" in sys.argv:
            be_quiet()
            sys.argv.remove("--quiet")
        arguments = sys.argv[1:]
        if arguments and arguments[0] in RECIPE_COMMANDS:
            arguments, _ = split(arguments)
        tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="mcl-clip", args=arguments)

    run_program(run)
