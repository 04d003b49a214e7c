"""The training of one stage, top to bottom."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Int
from torch import Tensor, nn

from mcl_clip.core.distributed import barrier, check_same, is_main, rank, seed_of, world_size
from mcl_clip.core.errors import UserError
from mcl_clip.core.progress import Progress
from mcl_clip.data.loader import PairBatch, TrainingLoader
from mcl_clip.model.clip import autocast, to_floats
from mcl_clip.model.grad_cache import Outputs, add_gradients
from mcl_clip.model.losses import clip_loss, find_negatives, siglip_loss
from mcl_clip.train.checkpoint import TrainState, load_newest, save_checkpoint
from mcl_clip.train.interrupt import Interrupt
from mcl_clip.train.metrics import BadSamples, Meter, StepLog
from mcl_clip.train.optim import ExponentialAverage, lr_at, set_lr

logger = logging.getLogger(__name__)

MAX_LOG_LOGIT_SCALE = math.log(100)
COUNTS = ("loss", "rows", "weight", "negatives", "duplicates")
ROWS = ("row_groups", "row_losses", "row_weights")


class TrainingDivergedError(UserError):
    """The loss or the gradient is not finite."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a step minimises: the masked contrastive loss of a batch.

    Attributes:
        groups: group of every row of the index.
        preprocess_cfg: mean and std of the pixels.
        loss: `clip` or `siglip`.
        ifm_epsilon: of implicit feature modification; 0 is none.
        precision: `fp32`, or `bf16` autocast for the towers.
        min_negatives: rows with fewer negatives get weight 0.
        mask_duplicates: leave other rows with an equal caption or image out of the negatives.
        grad_cache_rows: rows of this process that go through the towers at a time; 0 is all.
        loss_chunk_rows: rows of this process that go through the loss at a time; 0 is all.
    """

    groups: Int[np.ndarray, "rows"]
    preprocess_cfg: dict[str, object]
    loss: str = "clip"
    ifm_epsilon: float = 0.0
    precision: str = "fp32"
    min_negatives: int = 1
    mask_duplicates: bool = True
    grad_cache_rows: int = 0
    loss_chunk_rows: int = 0

    def add_gradients(
        self,
        model: nn.Module,
        batch: PairBatch,
        device: torch.device,
        *,
        seed: tuple[str | int, ...],
        backward: Callable[[Tensor], object] = Tensor.backward,
    ) -> dict[str, Tensor]:
        """Add the gradients of a batch; this process's share of the loss, and its counts, as `COUNTS` and `ROWS` name.

        `seed` names the draws of dropout in this step and process.
        """
        groups = torch.from_numpy(self.groups[batch.rows.numpy()].astype(np.int64)).to(device)
        batch = batch.to(device)

        def encode(model: nn.Module, rows: slice) -> Outputs:
            texts = batch.tokens[rows] if batch.text_features is None else None
            with autocast(self.precision, device):
                out = model(to_floats(batch.images[rows], self.preprocess_cfg), texts)
            if batch.text_features is not None:
                out = {**out, "text_features": batch.text_features[rows]}
            return {name: tensor for name, tensor in out.items() if tensor is not None}

        return add_gradients(
            model,
            encode,
            partial(self._loss, batch, groups),
            rows=len(batch.images),
            # Decided by what is the same on all processes: their numbers of decoded rows are not.
            chunk_rows=self.grad_cache_rows if self.grad_cache_rows < len(batch.rows) else 0,
            seed_chunk=lambda chunk: torch.manual_seed(seed_of(*seed, chunk)),  # dropout has no generator of its own
            backward=backward,
        )

    def _loss(self, batch: PairBatch, groups: Tensor, out: Outputs) -> tuple[Tensor, dict[str, Tensor]]:
        """This process's share of the loss, and its counts, from the features of the decoded rows."""
        negatives = find_negatives(
            rows=batch.rows,
            groups=groups,
            text_ids=batch.text_ids,
            image_ids=batch.image_ids,
            min_negatives=self.min_negatives,
            mask_duplicates=self.mask_duplicates,
            chunk_rows=self.loss_chunk_rows,
        )
        images = _in_place(out["image_features"], batch)
        texts = _in_place(out["text_features"], batch)
        if self.loss == "siglip":
            loss = siglip_loss(
                images, texts, out["logit_scale"], out["logit_bias"], negatives, ifm_epsilon=self.ifm_epsilon
            )
        else:
            loss = clip_loss(images, texts, out["logit_scale"], negatives, ifm_epsilon=self.ifm_epsilon)
        counts = {
            "loss": loss,
            "rows": (batch.rows >= 0).sum(),
            "weight": negatives.weight.sum(),
            "negatives": (negatives.num_negatives * negatives.weight).sum(),
            "duplicates": negatives.duplicates,
        }
        rows = {"row_groups": groups, "row_losses": negatives.losses, "row_weights": negatives.weight}
        return loss, counts | rows


@dataclass(frozen=True, kw_only=True)
class Intervals:
    """When to log, save and evaluate; 0 is never. Nothing here changes a weight.

    A step that saves logs too, so that no count is lost between a checkpoint and a record; saves by minutes wait for
    the next record.
    """

    log_steps: int = 10
    save_steps: int = 1000
    save_minutes: float = 30.0
    evaluate_steps: int = 0
    keep_checkpoints: int = 2


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast."""

    total_steps: int
    lr: float
    warmup_steps: int = 0
    shape: str = "cosine"
    max_grad_norm: float = math.inf


def train_stage(
    accelerator: Accelerator,
    model: nn.Module,
    *,
    loader: TrainingLoader,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    intervals: Intervals,
    out: Path,
    seed: tuple[str | int, ...],
    average_decay: float = 0.0,
    max_bad_fraction: float = 0.01,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    show_progress: bool = True,
    track: Callable[[Mapping[str, Any], int], object] = lambda *_: None,
    interrupt: Interrupt | None = None,
) -> TrainState:
    """Train `model` in place, from the newest checkpoint in `out` if there is one.

    With `average_decay` above 0 the model ends up with the running average of its weights.

    Raises:
        PlannedStop: when `interrupt` was asked to stop; the step that was in work is saved.
        TrainingDivergedError: if the loss or the gradient is not finite.
        UserError: if too many samples are bad, or processes disagree on the plan.
    """
    device = accelerator.device
    raw, raw_optimizer = model, optimizer
    average = ExponentialAverage(model, average_decay) if average_decay else None
    state = load_newest(out / "checkpoints", model=raw, optimizer=raw_optimizer, average=average)
    check_same(str(state.step), "the step of the newest checkpoint")
    model, optimizer = accelerator.prepare(model, optimizer)  # never the loader, never a scheduler
    log = StepLog(out / "metrics.jsonl")
    evaluated = [record["step"] for record in log.rewind(state.step) if "loss" not in record]
    bad = BadSamples(
        out / "bad_samples.jsonl", max_fraction=max_bad_fraction, rows=loader.plan.rows_per_epoch, step=state.step
    )
    meter = Meter(COUNTS, device, num_groups=int(objective.groups.max(initial=0)) + 1)
    due = _Due(intervals, schedule.total_steps)
    interrupt, stopping = interrupt or Interrupt(), False
    model.train()

    batches = partial(loader.steps, state.step, schedule.total_steps)
    for batch in _progress(batches, state, schedule.total_steps, meter, show_progress, interrupt):
        if evaluate is not None and due.evaluate(state.step) and state.step not in evaluated:
            log.add({"step": state.step, **_evaluate(raw, average, evaluate)})
        lr = schedule.lr * lr_at(
            state.step,
            total_steps=schedule.total_steps,
            warmup_steps=schedule.warmup_steps,
            schedule=schedule.shape,
        )
        set_lr(raw_optimizer, lr)

        drawn = (*seed, "dropout", state.step, rank())
        counts = objective.add_gradients(model, batch, device, seed=drawn, backward=accelerator.backward)
        grad_norm = accelerator.clip_grad_norm_(model.parameters(), schedule.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clamp_logit_scale_(raw)
        state.step += 1
        state.samples_seen += loader.plan.global_batch_size
        if average is not None:
            average.update(raw, state.step)
        meter.add(counts)
        meter.add_rows(*(counts[name] for name in ROWS))
        bad.add(batch.bad)
        stopping = interrupt.asked(device)

        if due.log(state.step) or stopping:
            record = _record(raw, meter, state, lr, grad_norm, loader)  # the only wait for the device
            _stop_if_diverged(record, out)
            bad.flush(state.step, loader.plan.rows_per_epoch * state.step // loader.plan.batches_per_epoch)
            log.add({**record, "bad_samples": bad.count})
            track(record, state.step)
        if (due.save(state.step) or stopping) and is_main() and math.isfinite(float(grad_norm)):
            save_checkpoint(
                out / "checkpoints",
                model=raw,
                optimizer=raw_optimizer,
                average=average,
                state=state,
                keep=intervals.keep_checkpoints,
            )
            due.saved()
        if stopping:
            break

    if stopping:
        barrier()  # no process leaves before the checkpoint is whole
        raise interrupt.stop(f"step {state.step} of {schedule.total_steps} is saved in {out / 'checkpoints'}")
    if average is not None:
        average.swap(raw)
    return state


def clamp_logit_scale_(model: nn.Module) -> None:
    """Keep exp(logit_scale) between 1 and 100, as CLIP does."""
    with torch.no_grad():
        model.logit_scale.clamp_(0, MAX_LOG_LOGIT_SCALE)  # type: ignore[operator]


def _in_place(features: Tensor, batch: PairBatch) -> Tensor:
    """Features of the decoded rows at their places in the batch; zeros where there is a filler."""
    if len(batch.places) == len(batch.rows):
        return features
    empty = features.new_zeros(len(batch.rows), features.shape[1])
    return empty.index_put((batch.places,), features)


class _Due:
    def __init__(self, intervals: Intervals, total_steps: int) -> None:
        self._at, self._total = intervals, total_steps
        self.saved()

    def saved(self) -> None:
        self._last_save = time.monotonic()

    def log(self, step: int) -> bool:
        is_multiple = any(self._is_multiple(step, interval) for interval in (self._at.log_steps, self._at.save_steps))
        return is_multiple or step == self._total

    def evaluate(self, step: int) -> bool:
        """When the step is done, saved if it was due, and another follows."""
        return self._is_multiple(step, self._at.evaluate_steps) and 0 < step < self._total

    def save(self, step: int) -> bool:
        """By steps, by minutes of this process's clock, and at the end."""
        minutes = (time.monotonic() - self._last_save) / 60
        is_late = 0 < self._at.save_minutes <= minutes
        return self._is_multiple(step, self._at.save_steps) or (is_late and self.log(step)) or step == self._total

    @staticmethod
    def _is_multiple(step: int, interval: int) -> bool:
        return interval > 0 and step % interval == 0


def _progress(
    make_batches: Callable[[], Iterator[PairBatch]],
    state: TrainState,
    total_steps: int,
    meter: Meter,
    show: bool,
    interrupt: Interrupt,
) -> Iterator[PairBatch]:
    """The batches, with a bar on the main process and the time that was spent waiting for them.

    Signals wait for the end of a step meanwhile.
    """
    bar = Progress(total=total_steps, initial=state.step, unit="step", desc="train", show=show and is_main())
    with interrupt.deferred(), bar:
        batches = make_batches()
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            meter.data_wait_s += time.perf_counter() - asked
            if batch is None:
                return
            yield batch
            bar.update()
            if meter.last:
                bar.set_postfix(meter.last, refresh=False)


def _record(
    model: nn.Module, meter: Meter, state: TrainState, lr: float, grad_norm: Tensor, loader: TrainingLoader
) -> dict[str, Any]:
    wait = meter.data_wait_s
    spread = meter.take_spread()
    sums, steps, seconds = meter.take()
    state.seconds += seconds
    record = {
        "step": state.step,
        "epoch": loader.plan.epoch_of(state.step - 1),
        "samples_seen": state.samples_seen,
        "loss": sums["loss"] / steps / world_size(),
        "lr": lr,
        "logit_scale": float(model.logit_scale.detach().exp()),  # type: ignore[operator]
        "grad_norm": float(grad_norm),
        "negatives_per_row": sums["negatives"] / max(1.0, sums["weight"]),
        "rows_without_weight": sums["rows"] - sums["weight"],
        "duplicates": sums["duplicates"],
        "samples_per_s": sums["rows"] / seconds,
        "data_wait_share": wait / seconds,
        "seconds": state.seconds,
        **({"group_loss": spread} if spread else {}),
    }
    meter.last = {"loss": f"{record['loss']:.3f}", "samples/s": f"{record['samples_per_s']:.0f}"}
    return record


def _stop_if_diverged(record: Mapping[str, Any], out: Path) -> None:
    if math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"]):
        return
    raise TrainingDivergedError(
        f"at step {record['step']} the loss is {record['loss']} and the norm of the gradient {record['grad_norm']}; "
        f"the last good checkpoint is in {out / 'checkpoints'}. Use a lower --stages.K.train.lr, a longer warm-up, or "
        f"--stages.K.train.max-grad-norm 1"
    ).on_every_process()


def _evaluate(
    model: nn.Module, average: ExponentialAverage | None, evaluate: Callable[[nn.Module], dict[str, float]]
) -> dict[str, float]:
    if average is not None:
        average.swap(model)
    results = evaluate(model)
    if average is not None:
        average.swap(model)
    model.train()
    return results
