"""Profile a training step: where its time goes, and what to change.

Real steps of a stage run in a temporary folder, with the spans of the training loop in profiling mode: on a GPU, the
host waits at each border of a span for the work that it has launched. Spans exclude each other, so the parts add up to
the step.
"""

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from mcl_clip.config import EvalConfig, RunConfig, TrainConfig
from mcl_clip.core.distributed import barrier, count_cores, gather_objects, is_main, on_main, peak_memory
from mcl_clip.core.errors import UserError
from mcl_clip.core.files import DONE
from mcl_clip.core.progress import Progress
from mcl_clip.data.batches import PairBatch
from mcl_clip.results.text import format_bytes
from mcl_clip.runs.context import RunContext, load_index, with_behavior
from mcl_clip.runs.controls import with_control
from mcl_clip.runs.pipeline import check_stages, plan_phases
from mcl_clip.runs.train_phase import fit_stage, prepare_stage, start_clip
from mcl_clip.tools.doctor_machine import find_gpus, machines_for
from mcl_clip.train.loop import BatchSource
from mcl_clip.train.metrics import Spans

PARTS = {
    "data": "waiting for data",
    "device": "to the device, to floats",
    "image": "image tower, forward",
    "text": "text tower, forward",
    "loss": "loss, with gather",
    "backward": "backward",
    "exchange": "gradient all-reduce",
    "optimizer": "gradient norm, optimizer",
    "rest": "everything else",
}
LATE_BATCH_SHARE = 0.02  # a batch that takes more of its step to arrive is late
READY_BATCH_SHARE = 0.1  # a batch that takes less of a step to arrive was prefetched
SETTLE_STEPS = 2
MAX_ROWS_TO_CACHE_TEXTS = 50_000  # computing more text features would take longer than the profile
LOADING_SECONDS = 3.0
LOADER_HEADROOM = 2.0  # loaders that are late in spite of this factor over the towers lack cores
MIN_HINT_SHARE = 0.1
MIN_TEXT_HINT_SHARE = 0.05  # lower, because caching text features costs nothing
DOMINANT_TOWERS_SHARE = 0.8
MAX_HINTS = 3
MIN_ROWS_FOR_LOSS_CHUNKS = 2048  # of one process: below it, chunks of the loss cost as much as they save
GOOD_LOSS_CHUNK_ROWS = 256


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Time of the measured steps of a stage, as the mean over steps and processes."""

    seconds: dict[str, float]  # of a step, by part
    steps: int
    processes: int
    rows: float  # decoded, of a step over all processes
    late_share: float  # of the steps, those that waited for data
    loader_rows_per_s: float  # that one loader process reads and decodes while nothing trains
    peak_bytes: int  # largest of a process: allocated on its GPU in the measured steps, or resident so far

    @property
    def step_s(self) -> float:
        """Seconds of a step."""
        return sum(self.seconds.values())

    @property
    def towers_rows_per_s(self) -> float:
        """Rows per second without waiting for data."""
        return self.rows / (self.step_s - self.seconds["data"])

    def share(self, *parts: str) -> float:
        """Return the share of a step that some parts take together."""
        return sum(self.seconds[part] for part in parts) / self.step_s

    def record(self) -> dict[str, Any]:
        """Return the figures for a JSON file."""
        return {
            **asdict(self),
            "shares": {part: self.share(part) for part in self.seconds},
            "samples_per_s": self.rows / self.step_s,
            "samples_per_s_without_waiting": self.towers_rows_per_s,
        }


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Settings and hardware of a profile: loader `workers`, `cores` and bytes of GPU `memory` are of one process."""

    stage: int
    train: TrainConfig
    workers: int
    device: str = "cpu"
    cores: int = 1
    memory: int = 0
    has_bf16: bool = False


def profile_recipe(
    config: RunConfig, accelerator: Accelerator, *, stage: int | None, steps: int, warmup_steps: int
) -> tuple[Profile, Setup]:
    """Profile a stage of a recipe, by default the first that trains. A collective call.

    The run directory is only read: earlier stages must be done there, and all output goes to a temporary folder.

    Raises:
        UserError: if the recipe cannot run, or the stage does not train or needs one that is not done.
    """
    check_stages(config)
    if config.machine.threads:
        torch.set_num_threads(config.machine.threads)
    with temporary_run_dir(config.run_dir) as folder:
        config = with_behavior(config)
        index, sources = load_index(replace(config, run_dir=folder))
        config = with_control(config, rows=len(index))
        trained = [number for number, each in enumerate(config.stages) if each.train.steps]
        stage = trained[0] if stage is None and trained else stage
        if stage is None or stage not in trained:
            raise UserError(
                f"--stage {stage} is not a stage that trains; those of this recipe are {', '.join(map(str, trained))}"
            ).on_every_process()
        ready_batches = config.machine.workers * config.machine.prefetch_batches
        # One step more than is used: the last step of a stage is saved.
        min_steps = warmup_steps + ready_batches + SETTLE_STEPS + steps + 1
        trial = replace(_trial_config(config, stage, min_steps=min_steps, rows=len(index)), run_dir=folder)
        run = ProfileContext(
            config=trial, accelerator=accelerator, index=index, sources=sources, tasks={}, source=config.run_dir,
            stage=stage,
        )  # fmt: skip
        (phase,) = [phase for phase in plan_phases(run) if phase.name == f"stage-{stage}/train"]
        if missing := [earlier.name for earlier in phase.inputs if not (earlier.folder / DONE).exists()]:
            raise UserError(
                f"--stage {stage} trains from {', '.join(missing)}, not done in {config.run_dir}; run the recipe so "
                f"far, or give the --run-dir of a run that has it"
            ).on_every_process()
        on_main(partial(phase.folder.mkdir, parents=True))
        clip = start_clip(run, stage)
        make_loader, groups = prepare_stage(run, stage, clip)
        profile = profile_training(
            partial(fit_stage, run, stage, clip, groups=groups), make_loader, clip.model.visual,  # type: ignore[arg-type]
            accelerator.device, steps=steps, warmup_steps=warmup_steps, ready_batches=ready_batches,
            show_progress=config.machine.progress,
        )  # fmt: skip
    gpus, on_gpu = find_gpus(), accelerator.device.type == "cuda"
    processes_here = accelerator.num_processes // machines_for(accelerator.num_processes, gpus)
    return profile, Setup(
        stage=stage,
        train=config.stages[stage].train,
        workers=config.machine.workers,
        device=accelerator.device.type,
        cores=max(1, count_cores() // max(1, processes_here)),
        memory=min(gpu.memory for gpu in gpus) if on_gpu else 0,
        has_bf16=on_gpu and all(gpu.has_bf16 for gpu in gpus),
    )


@dataclass(frozen=True, kw_only=True)
class ProfileContext(RunContext):
    """A run in a temporary folder whose earlier stages are read from another run directory, `source`."""

    source: Path
    stage: int

    def folder(self, stage: int, phase: str) -> Path:
        """Return the folder of a phase."""
        root = self.source if stage < self.stage else self.config.run_dir
        return root / f"stage-{stage}" / phase


@contextmanager
def temporary_run_dir(run_dir: Path) -> Iterator[Path]:
    """Create a temporary run directory with the index of a run, shared by all processes of this machine.

    Errors that name the folder name the run directory instead.
    """
    folder = on_main(partial(tempfile.mkdtemp, prefix="mcl-clip-profile-"))
    try:
        if (run_dir / "index" / "index.arrow").exists():
            on_main(partial(shutil.copytree, run_dir / "index", Path(folder) / "index"))
        yield Path(folder)
        barrier()  # before the main process removes it
    except UserError as error:
        error.args = (str(error).replace(folder, str(run_dir)),)
        raise
    finally:
        if is_main():
            shutil.rmtree(folder, ignore_errors=True)


def _trial_config(config: RunConfig, stage: int, *, min_steps: int, rows: int) -> RunConfig:
    """Return the recipe with a stage that trains long enough and neither saves nor evaluates."""
    train = config.stages[stage].train
    if rows > MAX_ROWS_TO_CACHE_TEXTS or train.steps * train.global_batch_size < 2 * rows:
        train = replace(train, lock=replace(train.lock, cached_texts=False))
    train = replace(train, steps=max(train.steps, min_steps))
    stages = [replace(each, train=train) if number == stage else each for number, each in enumerate(config.stages)]
    machine = replace(config.machine, save_steps=0, save_minutes=0, progress=False)
    return replace(config, stages=tuple(stages), machine=machine, eval=EvalConfig())


class MeasuredLoader:
    """Feeds the training loop with warm-up steps, then with steps to measure, where the history of `spans` begins.

    Between them it drops the `ready_batches` that workers prefetched during the slow first steps (caches, autotuning,
    compilation): they would hide that the loaders are too slow for all later steps.
    """

    def __init__(
        self, loader: BatchSource, spans: Spans, bar: Progress, *, warmup_steps: int, ready_batches: int
    ) -> None:
        self.plan, self._loader, self._spans, self._bar = loader.plan, loader, spans, bar
        self._warmup_steps, self._ready_batches = warmup_steps, ready_batches
        self.rows, self.next_step, self.reads_text_features = 0, 0, False

    def steps(self, start_step: int, stop_step: int) -> Iterator[PairBatch]:
        """Iterate over the batches; the caller stops after the measured ones."""
        source, spans = self._loader.steps(start_step, stop_step), self._spans
        try:
            started = spans.now()
            for _ in range(self._warmup_steps):
                yield next(source)
                self._bar.update()
            step_s = (spans.now() - started) / max(1, self._warmup_steps)
            for _ in range(self._ready_batches):  # all processes drop the same number
                asked = spans.now(wait=False)
                next(source)
                if any(gather_objects(spans.now(wait=False) - asked > READY_BATCH_SHARE * step_s)):
                    break
            for _ in range(SETTLE_STEPS):
                yield next(source)
            if spans.device is not None and spans.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(spans.device)
            spans.take()
            spans.history.clear()
            for batch in source:
                spans.switch("device", wait=False)  # the loader has begun to copy the images to the device
                self.rows += int((batch.rows >= 0).sum())
                self.next_step, self.reads_text_features = batch.step + 1, batch.text_features is not None
                yield batch
                self._bar.update()
        finally:
            source.close()  # type: ignore[attr-defined]  # ends the worker processes


def profile_training(
    fit: Callable[..., object],
    make_loader: Callable[..., BatchSource],
    image_tower: nn.Module,
    device: torch.device,
    *,
    steps: int,
    warmup_steps: int,
    ready_batches: int,
    show_progress: bool = False,
) -> Profile:
    """Train `warmup_steps` and then `steps` to measure, and return where their time went. A collective call.

    `fit` trains a stage by `train_stage`, given `loader`, `spans` and `max_steps`. `make_loader` creates the loader of
    the stage, with options that replace its own. `ready_batches` are those that its workers keep ready.
    """
    spans, total = Spans(device), warmup_steps + steps
    outside_graphs = cast(Callable[[Callable[..., None]], Callable[..., None]], torch.compiler.disable)
    image_tower.register_forward_pre_hook(outside_graphs(lambda *_: spans.begin("image")))
    image_tower.register_forward_hook(outside_graphs(lambda *_: spans.end()))
    with Progress(total=total, unit="step", desc="profile", show=show_progress and is_main()) as bar:
        loader = MeasuredLoader(make_loader(), spans, bar, warmup_steps=warmup_steps, ready_batches=ready_batches)
        fit(loader=loader, spans=spans, max_steps=total + SETTLE_STEPS)
    measured = step_parts(spans.history, reads_text_features=loader.reads_text_features)
    if len(measured) != steps:
        raise RuntimeError(f"the training ended after {len(measured)} of {steps} measured steps")
    peak_bytes = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()
    rows_per_s = _loader_rows_per_s(make_loader(num_workers=0, device=torch.device("cpu")), loader.next_step)
    seconds = {part: sum(step[part] for step in measured) / steps for part in PARTS}
    late = [step["data"] > LATE_BATCH_SHARE * sum(step.values()) for step in measured]
    gathered = gather_objects((seconds, loader.rows, late, rows_per_s, peak_bytes))
    all_seconds, rows, all_late, rates, peaks = zip(*gathered, strict=True)
    return Profile(
        seconds={part: float(np.mean([each[part] for each in all_seconds])) for part in PARTS},
        steps=steps,
        processes=len(rates),
        rows=sum(rows) / steps,
        late_share=float(np.mean(np.any(all_late, axis=0))),  # a step waits for the last of its processes
        loader_rows_per_s=float(np.mean(rates)),
        peak_bytes=max(peaks),
    )


def step_parts(history: Sequence[tuple[str, float]], *, reads_text_features: bool) -> list[dict[str, float]]:
    """Split a history of spans into steps, each with its seconds by part; a step begins with the span `data`.

    The forward pass without the image tower is the text tower's, or almost nothing where text features are read.
    """
    forward, steps = "image" if reads_text_features else "text", list[dict[str, float]]()
    for span, seconds in history:
        if span == "data":
            steps.append(dict.fromkeys(PARTS, 0.0))
        part = forward if span == "forward" else span if span in PARTS else "rest"
        steps[-1][part] += seconds
    return steps


def _loader_rows_per_s(loader: BatchSource, step: int) -> float:
    """Measure in this process how many rows a loader process reads and decodes per second, from a step on."""
    stop = (loader.plan.epoch_of(step) + 1) * loader.plan.batches_per_epoch  # a new epoch would be a collective call
    loader.plan.batch(step)  # make the plan of the epoch before the clock starts
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a loader process
    try:
        rows, started = 0, time.perf_counter()
        for batch in loader.steps(step, stop):
            rows += int((batch.rows >= 0).sum())
            if time.perf_counter() - started > LOADING_SECONDS:
                break
        return rows / (time.perf_counter() - started)
    finally:
        torch.set_num_threads(threads)


def hints(profile: Profile, setup: Setup) -> list[str]:
    """Return at most three changes to make, for the part with the largest share of a step first."""
    train, prefix, rows = setup.train, f"--stages.{setup.stage}.train", setup.train.global_batch_size
    rows_here, loss_rows, cache_rows = rows // profile.processes, train.loss_chunk_rows, train.grad_cache_rows
    data, loss, exchange, text = (profile.share(part) for part in ("data", "loss", "exchange", "text"))
    towers, found = profile.share("image", "text", "backward"), list[tuple[float, str]]()

    if data > MIN_HINT_SHARE:
        found.append((data, _data_hint(profile, setup)))
    is_slow = 0 < loss_rows < GOOD_LOSS_CHUNK_ROWS // 2 or (loss_rows == 0 and setup.device == "cpu")
    if loss > MIN_HINT_SHARE and rows_here >= MIN_ROWS_FOR_LOSS_CHUNKS and is_slow:
        option = f"{prefix}.loss-chunk-rows {GOOD_LOSS_CHUNK_ROWS} (now {loss_rows})"
        found.append((loss, f"the loss takes {_percent(loss)} of a step: {option} gives the same result"))
    if exchange > MIN_HINT_SHARE:
        hint = f"waiting for the all-reduce of gradients takes {_percent(exchange)} of a step: a larger "
        found.append((exchange, f"{hint}{prefix}.global-batch-size (now {rows}) does it less often for the same rows"))
    if setup.has_bf16 and train.precision == "fp32" and towers > MIN_HINT_SHARE:
        hint = f"the towers take {_percent(towers)} of a step in float32, and this GPU computes in bfloat16: "
        found.append((towers, f"{hint}{prefix}.precision bf16 (now fp32)"))
    if train.lock.text and text > MIN_TEXT_HINT_SHARE:
        option, hint = f"{prefix}.lock.cached-texts", f"the text tower is locked and takes {_percent(text)} of a step"
        if train.lock.cached_texts:
            hint += f", but not in a run that sees each caption twice or more, which runs it once ({option}, now on)"
        else:
            hint += f": {option} (now off) runs it once"
        found.append((text, hint))
    if 0 < cache_rows < rows_here and profile.peak_bytes * rows_here / cache_rows <= 0.9 * setup.memory:
        hint = (
            f"the towers run forward twice, with {format_bytes(profile.peak_bytes)} of {format_bytes(setup.memory)} of "
            f"GPU memory in use: the batch fits at once, {prefix}.grad-cache-rows 0 (now {cache_rows})"
        )
        found.append((profile.share("image", "text"), hint))

    texts = [hint for _, hint in sorted(found, reverse=True)]
    if max(data, loss) <= MIN_HINT_SHARE:
        hint = f"towers take {_percent(towers)} of the step"
        if towers < DOMINANT_TOWERS_SHARE:
            part = max(("device", "exchange", "optimizer", "rest"), key=profile.share)
            hint += f", and next comes {PARTS[part]} with {_percent(profile.share(part))}"
        texts = [*texts[:MAX_HINTS], f"{hint}: nothing in the loader or the loss would help"]
    return texts[:MAX_HINTS]


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _data_hint(profile: Profile, setup: Setup) -> str:
    """Return how to load data faster."""
    options, towers_rows_per_s = [], profile.towers_rows_per_s / profile.processes
    if setup.train.augment.jpeg == "exact":
        options.append(f"--stages.{setup.stage}.train.augment.jpeg fast (now exact)")
    all_cores = f"(--machine.workers is {setup.workers} and takes every core already)"
    if setup.workers < setup.cores:
        wanted = int(towers_rows_per_s / max(profile.loader_rows_per_s, 1e-9)) + 1
        workers = min(setup.cores, max(setup.workers + 1, wanted))
        cores = f"{setup.cores} core{'s' * (setup.cores != 1)}" + " for each process" * (profile.processes > 1)
        options.append(f"--machine.workers {workers} (now {setup.workers}, this machine has {cores})")
    elif setup.workers * profile.loader_rows_per_s > LOADER_HEADROOM * towers_rows_per_s:
        text = "loaders are fast enough while nothing trains, so they lack free cores; leave them some with "
        options.append(f"{text}--machine.threads {all_cores}")
    else:
        options.append(f"shards with smaller images, as data_prep/from_table.py --max-side-px writes them {all_cores}")
    return f"waiting for data takes {_percent(profile.share('data'))} of a step: {', or '.join(options)}"


def profile_text(profile: Profile, setup: Setup) -> str:
    """Return the figures as a table, with the hints below."""
    processes = f"{profile.processes} process{'es' * (profile.processes != 1)}"
    memory = "allocated on the GPU" if setup.device == "cuda" else "resident"
    rows = [
        f"{PARTS[part]:<28}{1000 * seconds:>10.1f}{100 * profile.share(part):>8.1f} %"
        for part, seconds in profile.seconds.items()
        if part != "exchange" or profile.processes > 1
    ]
    lines = [
        f"stage {setup.stage}: {profile.steps} steps of {profile.rows:g} rows by {processes} on {setup.device}, "
        f"{setup.workers} loader worker{'s' * (setup.workers != 1)} each",
        "",
        f"{'part of a step':<28}{'ms':>10}{'share':>10}",
        *rows,
        f"{'all':<28}{1000 * profile.step_s:>10.1f}{100:>8.1f} %",
        "",
        f"samples per second: {profile.rows / profile.step_s:,.0f}; without waiting for data "
        f"{profile.towers_rows_per_s:,.0f}",
        f"a loader process delivers {profile.loader_rows_per_s:,.0f} samples/s while nothing trains, and there are "
        f"{max(1, setup.workers) * profile.processes}",
        f"batches came late in {_percent(profile.late_share)} of the steps",
        f"peak memory: {format_bytes(profile.peak_bytes)} {memory}",
        "",
        *(f"hint: {text}" for text in hints(profile, setup)),
    ]
    return "\n".join(lines)
