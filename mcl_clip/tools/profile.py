"""Where a training step spends its time, and what to change about it.

Real steps of a stage run in a folder that is thrown away. A clock stands at the borders of their parts: around the
loader, the two towers, the loss, the backward pass and the optimiser. Every moment is charged to exactly one part, so
the parts add up to the step. On a GPU the host waits at each border for what it has asked the device to do.
"""

import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from mcl_clip.core.distributed import barrier, count_cores, gather_objects, is_main, on_main
from mcl_clip.core.errors import UserError
from mcl_clip.core.progress import Progress
from mcl_clip.data.loader import PairBatch, TrainingLoader
from mcl_clip.tools.doctor_machine import find_gpus, machines_for
from mcl_clip.tools.findings import as_bytes
from mcl_clip.train import loop

PARTS = {
    "data": "waiting for data",
    "device": "to the device, to floats",
    "image": "image tower, forward",
    "text": "text tower, forward",
    "loss": "loss, with gather",
    "backward": "backward",
    "exchange": "gradient all-reduce",
    "optimizer": "gradient norm, optimiser",
    "rest": "everything else",
}
ENCODERS = {"encode_image": "image", "_encode_image": "image", "encode_text": "text", "_encode_text": "text"}
LATE = 0.02  # share of its step that a batch may take to arrive
PROMPT = 0.1  # share of a step within which a batch that was ready arrives
STEPS_TO_SETTLE = 2
ENOUGH = 2.0  # times what the towers take: loaders that are late all the same lack cores
SECONDS_OF_LOADING = 3.0
MUCH = 0.1  # share of a step that is worth a hint
SOME = 0.05  # the same, where nothing need be given for it
MOST = 0.8  # share of the towers that leaves little for others
MANY_HINTS = 3
ROWS_WORTH_CHUNKS = 2048  # of one process: below it, chunks of the loss cost as much as they save
GOOD_CHUNK_ROWS = 256


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Where the counted steps of a stage spent their time, as the mean over steps and processes.

    Attributes:
        seconds: of a step, by part.
        steps: how many were counted.
        processes: that trained.
        rows: decoded rows of a step over all processes.
        late_share: share of the steps that waited for data.
        loader_rows_per_s: what one loader process reads and decodes, while nothing trains.
        peak_bytes: of the greediest process: allocated on its GPU while steps were counted, or resident so far.
    """

    seconds: dict[str, float]
    steps: int
    processes: int
    rows: float
    late_share: float
    loader_rows_per_s: float
    peak_bytes: int

    @property
    def step_s(self) -> float:
        """Seconds of a step."""
        return sum(self.seconds.values())

    def share(self, *parts: str) -> float:
        """Share of a step that parts take together."""
        return sum(self.seconds[part] for part in parts) / self.step_s

    @property
    def towers_rows_per_s(self) -> float:
        """Rows per second if data were always there."""
        return self.rows / (self.step_s - self.seconds["data"])

    def record(self) -> dict[str, Any]:
        """The figures for a JSON file."""
        return {
            **asdict(self),
            "shares": {part: self.share(part) for part in self.seconds},
            "samples_per_s": self.rows / self.step_s,
            "samples_per_s_without_waiting": self.towers_rows_per_s,
        }


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a profile depends on: the machine for one process, and settings of the stage.

    Attributes:
        device: `cpu` or `cuda`.
        cores: processor cores for a process and its loaders.
        memory: bytes of the GPU; 0 if there is none.
        has_bf16: whether there is a GPU that computes in bfloat16 itself.
    """

    stage: int
    workers: int
    jpeg: str
    global_batch_size: int
    loss_chunk_rows: int
    grad_cache_rows: int
    precision: str
    is_text_locked: bool
    cached_texts: bool
    device: str = "cpu"
    cores: int = 1
    memory: int = 0
    has_bf16: bool = False


def machine_of(accelerator: Accelerator) -> dict[str, Any]:
    """What a `Setup` says of the machine."""
    gpus = find_gpus()
    here = accelerator.num_processes // machines_for(accelerator.num_processes, gpus)
    device = accelerator.device.type
    return {
        "device": device,
        "cores": max(1, count_cores() // max(1, here)),
        "memory": min(gpu.memory for gpu in gpus) if device == "cuda" else 0,
        "has_bf16": device == "cuda" and all(gpu.has_bf16 for gpu in gpus),
    }


class Clock:
    """Charges every moment from `start` to `stop` to the innermost part that is open, else to `rest`."""

    def __init__(self, device: torch.device) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._device, self._open = device, ["rest"]
        self._since: float | None = None

    def start(self) -> None:
        """Begin to charge."""
        self._since = self.now()

    def stop(self) -> None:
        """Charge no more."""
        self._charge()
        self._since = None

    def charged(self) -> float:
        """Seconds that were charged up to now."""
        self._charge()
        return sum(self.seconds.values())

    def now(self, *, waits: bool = True) -> float:
        """Seconds; if it `waits`, once the device has done what it was asked for."""
        if waits and self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Charge what happens in the block to a part."""
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def turn_to(self, name: str, *, waits: bool = True) -> None:
        """From now on charge what is left of the innermost block to another part.

        So is what the device has to do yet, unless it `waits` for that.
        """
        self._charge(waits=waits)
        self._open[-1] = name

    def during(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, charged to a part."""

        def charged(*arguments: Any, **options: Any) -> Any:
            with self.part(name):
                return function(*arguments, **options)

        return charged

    def _charge(self, *, waits: bool = True) -> None:
        if self._since is not None:
            now = self.now(waits=waits)
            self.seconds[self._open[-1]] += now - self._since
            self._since = now


class _EnoughError(Exception):
    """All steps are counted."""


@dataclass(kw_only=True)
class _Watch:
    """The steps that are watched: some to warm up, some to settle, and those that count."""

    clock: Clock
    device: torch.device
    steps: int
    warmup_steps: int
    ready_batches: int
    bar: Progress
    rows: int = 0
    waited: list[bool] = field(default_factory=list)
    peak_bytes: int = 0
    next_step: int = 0
    makers: list[Callable[[], TrainingLoader]] = field(default_factory=list)

    def batches(self, source: Iterator[PairBatch]) -> Iterator[PairBatch]:
        """The batches of all steps; each is done when the next is asked for."""
        started = self.clock.now()
        for _ in range(self.warmup_steps):
            yield next(source)
            self.bar.update()
        self._use_up(source, (self.clock.now() - started) / max(1, self.warmup_steps))
        for _ in range(STEPS_TO_SETTLE):
            yield next(source)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.clock.start()
        for _ in range(self.steps):
            begun, waited = self.clock.charged(), self.clock.seconds["data"]
            with self.clock.part("data"):
                batch = next(source)
                self.clock.turn_to("device", waits=False)  # the copies that it has begun
            waited = self.clock.seconds["data"] - waited
            self.rows += int((batch.rows >= 0).sum())
            self.next_step = batch.step + 1
            yield batch
            self.bar.update()
            self.waited.append(waited > LATE * (self.clock.charged() - begun))
        self.clock.stop()
        self.peak_bytes = _peak_bytes(self.device)
        raise _EnoughError

    def _use_up(self, source: Iterator[PairBatch], step_s: float) -> None:
        """Take what loaders got ready in slow first steps, which would hide that they are late in all others.

        All processes take the same number.
        """
        for _ in range(self.ready_batches):
            asked = self.clock.now(waits=False)
            next(source)
            if any(gather_objects(self.clock.now(waits=False) - asked > PROMPT * step_s)):
                return


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10  # kilobytes elsewhere


def steps_of_profile(steps: int, warmup_steps: int, ready_batches: int) -> int:
    """How many steps a stage must have to be profiled; one more than are made, for the last one would be saved."""
    return warmup_steps + ready_batches + STEPS_TO_SETTLE + steps + 1


def profile_training(
    train: Callable[[], object],
    accelerator: Accelerator,
    *,
    steps: int,
    warmup_steps: int,
    ready_batches: int,
    show_progress: bool = False,
) -> Profile:
    """Where the steps of `train` spend their time. A collective call; it ends the training.

    Args:
        train: trains a stage, by `mcl_clip.train.loop.train_stage` with `accelerator`.
        accelerator: of the training.
        steps: how many to count, after some that are not.
        warmup_steps: steps for caches and tuning before.
        ready_batches: how many batches loaders keep ready.
        show_progress: show a bar on the main process.
    """
    clock = Clock(accelerator.device)
    with ExitStack() as stack:
        watch = _Watch(
            clock=clock,
            device=accelerator.device,
            steps=steps,
            warmup_steps=warmup_steps,
            ready_batches=ready_batches,
            bar=stack.enter_context(
                Progress(total=warmup_steps + steps, unit="step", desc="profile", show=show_progress and is_main())
            ),
        )
        for owner, name, change in _borders(clock, watch, accelerator):
            stack.enter_context(_changed(owner, name, change))
        _until_enough(train)
    rate = _rows_per_s(watch.makers[-1](), watch.next_step)
    mine = (clock.seconds, watch.rows, watch.waited, rate, watch.peak_bytes)
    every_seconds, rows, waited, rates, peaks = zip(*gather_objects(mine), strict=True)
    return Profile(
        seconds={part: float(np.mean([each[part] for each in every_seconds])) / steps for part in PARTS},
        steps=steps,
        processes=len(rates),
        rows=sum(rows) / steps,
        late_share=float(np.mean(np.any(waited, axis=0))),  # a step waits for the last of its processes
        loader_rows_per_s=float(np.mean(rates)),
        peak_bytes=max(peaks),
    )


def _until_enough(train: Callable[[], object]) -> None:
    try:
        train()
    except _EnoughError:
        return
    raise RuntimeError("the training ended before all steps were counted")


Change = Callable[[Any], Any]


def _borders(clock: Clock, watch: _Watch, accelerator: Accelerator) -> Iterator[tuple[Any, str, Change]]:
    """The functions at the borders of the parts of a step, and what becomes of them."""

    def noting(init: Callable[..., None]) -> Callable[..., None]:
        def noted(loader: TrainingLoader, *arguments: Any, **options: Any) -> None:
            alone = {**options, "num_workers": 0, "device": torch.device("cpu")}
            watch.makers.append(partial(TrainingLoader, *arguments, **alone))
            init(loader, *arguments, **options)

        return noted

    def watching(steps: Callable[..., Iterator[PairBatch]]) -> Callable[..., Iterator[PairBatch]]:
        def watched(*arguments: Any) -> Iterator[PairBatch]:
            source = steps(*arguments)
            try:
                yield from watch.batches(source)
            finally:
                source.close()  # type: ignore[attr-defined]  # ends its processes

        return watched

    yield TrainingLoader, "__init__", noting
    yield TrainingLoader, "steps", watching
    yield PairBatch, "to", lambda to: clock.during("device", to)
    yield loop, "add_gradients", lambda add_gradients: _with_borders(clock, add_gradients)
    yield accelerator, "prepare", lambda prepare: _preparing(clock, prepare)
    yield accelerator, "clip_grad_norm_", lambda clip: clock.during("optimizer", clip)


@contextmanager
def _changed(owner: Any, name: str, change: Change) -> Iterator[None]:
    """A function of an object, class or module is changed while the block runs."""
    original = getattr(owner, name)
    setattr(owner, name, change(original))
    try:
        yield
    finally:
        setattr(owner, name, original)


def _with_borders(clock: Clock, add_gradients: Callable[..., Any]) -> Callable[..., Any]:
    """`add_gradients`: what it does beside the towers and the loss is to go backward."""

    def changed(model: nn.Module, encode: Callable[..., Any], loss_of: Callable[..., Any], **options: Any) -> Any:
        with clock.part("backward"):
            return add_gradients(model, clock.during("device", encode), clock.during("loss", loss_of), **options)

    return changed


def _preparing(clock: Clock, prepare: Callable[..., Any]) -> Callable[..., Any]:
    """`Accelerator.prepare`, which also puts the clock around towers, optimizer and the exchange of gradients."""

    def exchange(bucket: Any) -> Any:
        if bucket.is_last():  # now all gradients are there, and what is not exchanged yet is waited for
            clock.turn_to("exchange")
        return allreduce_hook(None, bucket)  # type: ignore[arg-type]  # of all processes

    def changed(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        for name, part in ENCODERS.items():
            if hasattr(model, name):
                setattr(model, name, clock.during(part, getattr(model, name)))
        model, optimizer = prepare(model, optimizer)
        if isinstance(model, DistributedDataParallel):
            model.register_comm_hook(None, lambda _, bucket: exchange(bucket))  # annotations must be torch's, or none
        optimizer.step = clock.during("optimizer", optimizer.step)  # type: ignore[method-assign]
        return model, optimizer

    return changed


def _rows_per_s(loader: TrainingLoader, step: int) -> float:
    """Rows that a loader process reads and decodes in a second, measured in this one from a step on."""
    stop = (loader.plan.epoch_of(step) + 1) * loader.plan.batches_per_epoch  # there, processes would meet
    loader.plan.batch(step)  # the plan of an epoch comes before it
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a loader process
    try:
        rows, started = 0, time.perf_counter()
        for batch in loader.steps(step, stop):
            rows += int((batch.rows >= 0).sum())
            if time.perf_counter() - started > SECONDS_OF_LOADING:
                break
        return rows / (time.perf_counter() - started)
    finally:
        torch.set_num_threads(threads)


@contextmanager
def borrowed(run_dir: Path) -> Iterator[Path]:
    """A folder that stands for a run directory, the same on all processes of this machine.

    The index of the run can be read there, and what `lend_stages` adds; what is written goes away with the folder.
    Errors that name it name the run directory instead.
    """
    with ExitStack() as stack:

        def make() -> str:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="mcl-clip-profile-"))
            _link(Path(folder), run_dir, "index/index.arrow")
            return folder

        folder = on_main(make)
        try:
            yield Path(folder)
            barrier()  # before the main process takes it away
        except UserError as error:
            renamed = UserError(str(error).replace(folder, str(run_dir)))
            raise (renamed.on_every_process() if error.everywhere else renamed) from error


def lend_stages(folder: Path, run_dir: Path, stage: int) -> None:
    """Let a borrowed folder show the stages before `stage`, and have an empty one for its training."""

    def make() -> None:
        (folder / f"stage-{stage}" / "train").mkdir(parents=True)
        for earlier in range(stage):
            _link(folder, run_dir, f"stage-{earlier}")

    on_main(make)


def _link(folder: Path, run_dir: Path, name: str) -> None:
    if (run_dir / name).exists():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to((run_dir / name).absolute())


def hints(profile: Profile, setup: Setup) -> list[str]:
    """What to change, at most three things, the one that takes most of a step first."""
    towers = profile.share("image", "text", "backward")
    found = [
        (profile.share("data"), _data_hint(profile, setup)),
        (profile.share("loss"), _loss_hint(profile, setup)),
        (profile.share("exchange"), _exchange_hint(profile, setup)),
        (towers, _precision_hint(profile, setup)),
        (profile.share("text"), _text_hint(profile, setup)),
        (profile.share("image", "text"), _grad_cache_hint(profile, setup)),
    ]
    said = [text for _, text in sorted(found, reverse=True) if text][:MANY_HINTS]
    if max(profile.share("data"), profile.share("loss")) <= MUCH:
        said.append(_rest_hint(profile, towers))
    return said[:MANY_HINTS]


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _data_hint(profile: Profile, setup: Setup) -> str:
    share, ways = profile.share("data"), []
    if share <= MUCH:
        return ""
    if setup.jpeg == "exact":
        ways.append(f"--stages.{setup.stage}.train.augment.jpeg fast (now exact)")
    if setup.workers < setup.cores:
        wanted = int(profile.towers_rows_per_s / profile.processes / max(profile.loader_rows_per_s, 1e-9)) + 1
        workers = min(setup.cores, max(setup.workers + 1, wanted))
        has = f"this machine has {setup.cores} core{'s' * (setup.cores != 1)}"
        of_each = " for each process" if profile.processes > 1 else ""
        ways.append(f"--machine.workers {workers} (now {setup.workers}, {has}{of_each})")
    elif setup.workers * profile.loader_rows_per_s > ENOUGH * profile.towers_rows_per_s / profile.processes:
        ways.append(
            f"loaders deliver enough where nothing else runs, so they lack free cores; leave them some by "
            f"--machine.threads (--machine.workers is {setup.workers} and takes every core already)"
        )
    else:
        ways.append(
            f"shards with smaller pictures, as data_prep/from_table.py --max-side-px writes them "
            f"(--machine.workers is {setup.workers} and takes every core already)"
        )
    return f"waiting for data takes {_percent(share)} of a step: {', or '.join(ways)}"


def _loss_hint(profile: Profile, setup: Setup) -> str:
    share, rows, chunk = profile.share("loss"), setup.global_batch_size // profile.processes, setup.loss_chunk_rows
    is_slow = 0 < chunk < GOOD_CHUNK_ROWS // 2 or (chunk == 0 and setup.device == "cpu")
    if share <= MUCH or rows < ROWS_WORTH_CHUNKS or not is_slow:
        return ""
    option = f"--stages.{setup.stage}.train.loss-chunk-rows {GOOD_CHUNK_ROWS} (now {chunk})"
    return f"the loss takes {_percent(share)} of a step: {option} gives the same result"


def _exchange_hint(profile: Profile, setup: Setup) -> str:
    share, option = profile.share("exchange"), f"--stages.{setup.stage}.train.global-batch-size"
    if share <= MUCH:
        return ""
    return (
        f"waiting for the exchange of gradients takes {_percent(share)} of a step: a larger {option} (now "
        f"{setup.global_batch_size}) exchanges them less often for the same rows"
    )


def _text_hint(profile: Profile, setup: Setup) -> str:
    share, option = profile.share("text"), f"--stages.{setup.stage}.train.lock.cached-texts"
    if not setup.is_text_locked or share <= SOME:
        return ""
    if not setup.cached_texts:
        return f"the text tower is locked and takes {_percent(share)} of a step: {option} (now off) runs it once"
    return (
        f"the text tower is locked, and its {_percent(share)} of a step fall away in a run that sees each caption "
        f"twice or more, which runs it once ({option}, now on)"
    )


def _precision_hint(profile: Profile, setup: Setup) -> str:
    share = profile.share("image", "text", "backward")
    if not setup.has_bf16 or setup.precision != "fp32" or share <= MUCH:
        return ""
    option = f"--stages.{setup.stage}.train.precision bf16 (now fp32)"
    return f"the towers take {_percent(share)} of a step in float32, and this GPU computes in bfloat16: {option}"


def _grad_cache_hint(profile: Profile, setup: Setup) -> str:
    rows, chunk = setup.global_batch_size // profile.processes, setup.grad_cache_rows
    if not 0 < chunk < rows or profile.peak_bytes * rows / chunk > 0.9 * setup.memory:
        return ""
    peak, memory = as_bytes(profile.peak_bytes), as_bytes(setup.memory)
    return (
        f"the towers run forward twice, with {peak} of {memory} of GPU memory in use: the batch fits at once, "
        f"--stages.{setup.stage}.train.grad-cache-rows 0 (now {chunk})"
    )


def _rest_hint(profile: Profile, towers: float) -> str:
    if towers >= MOST:
        return f"towers take {_percent(towers)} of the step: nothing in the loader or the loss would help"
    part = max(("device", "exchange", "optimizer", "rest"), key=profile.share)
    return (
        f"towers take {_percent(towers)} of the step, and next comes {PARTS[part]} with {_percent(profile.share(part))}"
        f": nothing in the loader or the loss would help"
    )


def profile_text(profile: Profile, setup: Setup) -> str:
    """The figures as a table, with the hints below."""
    jobs = f"{profile.processes} process{'es' * (profile.processes != 1)}"
    lines = [
        f"stage {setup.stage}: {profile.steps} steps of {profile.rows:g} rows by {jobs} on {setup.device}, "
        f"{setup.workers} loader worker{'s' * (setup.workers != 1)} each",
        "",
        f"{'part of a step':<28}{'ms':>10}{'share':>10}",
    ]
    for part, seconds in profile.seconds.items():
        if part != "exchange" or profile.processes > 1:
            lines.append(f"{PARTS[part]:<28}{1000 * seconds:>10.1f}{100 * profile.share(part):>8.1f} %")
    lines.append(f"{'all':<28}{1000 * profile.step_s:>10.1f}{100:>8.1f} %")
    loaders = max(1, setup.workers) * profile.processes
    kind = "allocated on the GPU" if setup.device == "cuda" else "resident"
    lines += [
        "",
        f"samples per second: {profile.rows / profile.step_s:,.0f}; without waiting for data "
        f"{profile.towers_rows_per_s:,.0f}",
        f"a loader process delivers {profile.loader_rows_per_s:,.0f} samples/s where nothing else runs, and there are "
        f"{loaders}",
        f"batches came late in {_percent(profile.late_share)} of the steps",
        f"peak memory: {as_bytes(profile.peak_bytes)} {kind}",
        "",
        *(f"hint: {text}" for text in hints(profile, setup)),
    ]
    return "\n".join(lines)
