"""The training loop of one stage."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Float16, Int, Int64
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from mcl_clip.config import MachineConfig, TrainConfig
from mcl_clip.core.distributed import barrier, check_same, gather, is_main, on_main, rank, seed_of, world_size
from mcl_clip.core.errors import PlannedStop, UserError
from mcl_clip.core.progress import Progress
from mcl_clip.data.batch_plan import BatchPlan
from mcl_clip.data.batches import PairBatch, pin
from mcl_clip.model.clip import autocast, to_floats
from mcl_clip.model.grad_cache import DECODED, Outputs, add_gradients
from mcl_clip.model.losses import (
    Negatives,
    Similarity,
    WrongCaptions,
    clip_loss,
    decoding_loss,
    distillation_loss,
    find_negatives,
    siglip_loss,
    simclr_loss,
)
from mcl_clip.train.checkpoint import TrainState, load_newest, save_checkpoint
from mcl_clip.train.interrupt import Interrupt
from mcl_clip.train.metrics import BadSamples, Meter, Spans, StepLog
from mcl_clip.train.optim import ExponentialAverage, lr_at, set_lr
from mcl_clip.train.validation import BestWeights, Validation

MAX_LOG_LOGIT_SCALE = math.log(100)
PAIR = ("image_features", "text_features")
LOSSES = ("loss", "distillation", "decoding")
COUNTS = (*LOSSES, "rows", "weight", "negatives", "duplicates", "negative_captions", "similar")


class TrainingDivergedError(UserError):
    """The loss or the gradient is not finite."""


@runtime_checkable
class BatchSource(Protocol):
    """What the loop needs of a loader: batches by step, and the plan behind them."""

    plan: BatchPlan

    def steps(self, start_step: int, stop_step: int) -> Iterator[PairBatch]:
        """Iterate over the local batches of steps `start_step` to `stop_step - 1`."""
        ...


def train_stage(  # noqa: C901  # the loop is read from top to bottom
    accelerator: Accelerator,
    model: nn.Module,
    *,
    loader: BatchSource,
    groups: Int[np.ndarray, "rows"],
    preprocess_cfg: Mapping[str, Any],
    config: TrainConfig,
    machine: MachineConfig,
    optimizer: torch.optim.Optimizer,
    out: Path,
    seed: tuple[str | int, ...],
    similar_by: Float16[np.ndarray, "rows dim"] | None = None,
    max_bad_fraction: float = 0.01,
    evaluate: Callable[[nn.Module], dict[str, float]] = lambda _: {},
    evaluate_steps: int = 0,
    best: BestWeights | None = None,
    teacher: nn.Module | None = None,
    sentences: Callable[[Tensor], Tensor] | None = None,
    track: Callable[[Mapping[str, Any], int], object] = lambda *_: None,
    interrupt: Interrupt | None = None,
    spans: Spans | None = None,
    max_steps: int | None = None,
) -> TrainState:
    """Train `model` in place, resuming from the newest checkpoint in `out` if there is one.

    With `config.average_decay` above 0 the model ends up with the moving average of its weights, and with `best` with
    the best of the weights that were evaluated, the first and the last ones included.

    Args:
        groups: the group of each row of the data, shape (rows,); -1 for held-out rows.
        preprocess_cfg: `mean` and `std` of the pixels.
        optimizer: with `lr_scale` in each parameter group.
        out: folder of metrics.jsonl, bad_samples.jsonl and checkpoints.
        seed: name of the random seed of the stage.
        similar_by: unit features of each row of the data, which `config.mask_similar` compares.
        evaluate: returns metrics of the model, logged every `evaluate_steps` steps inside the stage; 0 is never.
        best: keeps the best weights and says when to stop; by default the last weights are kept.
        teacher: a frozen model in evaluation mode whose similarities are distilled, by `config.distill`.
        sentences: maps tokens to the sentence features that the model decodes, by `config.decode`.
        track: called with each record and its step.
        spans: timer of the parts of a step; by default one that never waits for the device.
        max_steps: stop after so many steps, without a checkpoint; by default the stage is trained to its end.

    Raises:
        PlannedStop: if `interrupt` was asked to stop; the current step is saved, unless one of several processes waits
            for data in vain, when others may be in the middle of the next step.
        TrainingDivergedError: if the loss or the gradient is not finite.
        UserError: if too many samples are bad, or processes disagree on the batch plan.
    """
    device, checkpoints = accelerator.device, out / "checkpoints"
    raw, raw_optimizer = model, optimizer
    average = ExponentialAverage(model, config.average_decay) if config.average_decay else None
    state = load_newest(checkpoints, model=raw, optimizer=raw_optimizer, average=average, best=best)
    check_same(str(state.step), "the step of the newest checkpoint")
    model, optimizer = accelerator.prepare(model, optimizer)  # never the loader, never a scheduler
    log, plan = StepLog(out / "metrics.jsonl"), loader.plan
    evaluated = on_main(lambda: [record["step"] for record in log.rewind(state.step) if "loss" not in record])
    bad = BadSamples(
        out / "bad_samples.jsonl", max_fraction=max_bad_fraction, rows=plan.rows_per_epoch, step=state.step
    )
    meter = Meter(COUNTS, device, num_groups=int(groups.max(initial=0)) + 1)
    spans = spans or Spans()
    validation = Validation(
        evaluate, every_steps=evaluate_steps, best=best, average=average, log=log, logged=evaluated, spans=spans
    )
    time_all_reduce(model, spans)
    interrupt, stopping = interrupt or Interrupt(), False
    last_step = config.steps if max_steps is None else min(config.steps, state.step + max_steps)
    batches, saved_at = interrupt.waiting_for(loader.steps(state.step, config.steps)), time.monotonic()
    bar = Progress(
        total=config.steps, initial=state.step, unit="step", desc="train", show=machine.progress and is_main()
    )
    saved_step, lr, grad_norm = state.step, 0.0, torch.zeros(())

    def log_step() -> dict[str, Any]:
        with spans("log"):
            record, seconds = _record(raw, meter, spans, state, lr, grad_norm, plan)
            _stop_if_diverged(record, checkpoints)
            bad.flush(state.step, plan.rows_per_epoch * state.step // plan.batches_per_epoch)
            log.add({**record, "bad_samples": bad.count, "spans": seconds})
            track(record, state.step)
        return record

    def save() -> None:
        if is_main():
            with spans("save"):
                save_checkpoint(
                    checkpoints, model=raw, optimizer=raw_optimizer, average=average, state=state,
                    keep=machine.keep_checkpoints, best=best,
                )  # fmt: skip

    model.train()
    with bar, interrupt.deferred():  # signals wait for the end of a step
        while state.step < last_step and not stopping:
            try:
                with spans("data"):
                    batch = next(batches)
            except PlannedStop:  # as it does not come; of several processes, others may be in the next step
                if world_size() > 1 or state.step == saved_step:
                    raise
                if meter.steps:
                    log_step()
                save()
                stopping = True
                break
            if validation.says_stop(raw, state.step):
                break

            counts = forward_backward(
                model, batch, groups=groups, preprocess_cfg=preprocess_cfg, config=config, device=device,
                seed=(*seed, "dropout", state.step, rank()), backward=accelerator.backward, spans=spans,
                similar_by=similar_by, teacher=teacher, sentences=sentences,
            )  # fmt: skip
            with spans("optimizer"):
                grad_norm = accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm or math.inf)
                lr = lr_at(state.step, config)
                set_lr(raw_optimizer, lr)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                if config.loss == "clip":  # the sigmoid loss has no such limit: SigLIP's published scale is 117
                    clamp_logit_scale_(raw)
                state.step += 1
                state.samples_seen += plan.global_batch_size
                if average is not None:
                    average.update(raw, state.step)
            meter.add(counts)
            bad.add(batch.bad)
            stopping = interrupt.asked(device)

            # A step that saves, or is the last one, logs too: no count is lost between a checkpoint and a record.
            is_saving = stopping or state.step == config.steps or _is_due(state.step, machine.save_steps)
            if is_saving or validation.can_stop_at(state.step) or _is_due(state.step, machine.log_steps):
                record = log_step()
                bar.set_postfix(
                    {"loss": f"{record['loss']:.3f}", "samples/s": f"{record['samples_per_s']:.0f}"}, refresh=False
                )
                # Saves by minutes wait for a record; the clock is that of the main process.
                is_saving |= 0 < machine.save_minutes <= (time.monotonic() - saved_at) / 60
                if is_saving:
                    save()
                    saved_at, saved_step = time.monotonic(), state.step
            bar.update()

    if stopping:
        barrier()  # no process leaves before the checkpoint is complete
        raise interrupt.stop(f"step {state.step} of {config.steps} is saved in {checkpoints}")
    validation.finish(raw, state.step, is_last=state.step == config.steps)
    return state


def forward_backward(
    model: nn.Module,
    batch: PairBatch,
    *,
    groups: Int[np.ndarray, "rows"],
    preprocess_cfg: Mapping[str, Any],
    config: TrainConfig,
    device: torch.device,
    seed: tuple[str | int, ...],
    similar_by: Float16[np.ndarray, "rows dim"] | None = None,
    backward: Callable[[Tensor], object] = Tensor.backward,
    spans: Spans | None = None,
    teacher: nn.Module | None = None,
    sentences: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Run towers, loss and backward pass on a batch; gradients add up in the parameters.

    The loss is the masked contrastive loss and, with a `teacher`, its distillation by `config.distill`; with
    `sentences`, which maps tokens to sentence features, also the decoding of these by `config.decode`.

    `groups` has the group of each row of the data, shape (rows,): rows of other groups are no negatives. `seed` names
    the dropout seed of this step and process.

    Returns:
        This process's counts, named as in `COUNTS`, and values of each row for a `Meter`, of the loss within groups.
    """
    spans = spans or Spans()
    with spans("device"):
        batch_groups = pin(torch.from_numpy(groups[batch.rows.numpy()].astype(np.int64)), device)
        similarity = None
        if similar_by is not None:
            features = pin(torch.from_numpy(similar_by[batch.rows.numpy()]), device).to(device, non_blocking=True)
            similarity = Similarity(features=features, columns=gather(features), threshold=config.mask_similar)
        batch_groups, batch = batch_groups.to(device, non_blocking=True), batch.to(device)

    def encode(model: nn.Module, rows: slice) -> Outputs:
        with spans("device"):
            images = to_floats(batch.images[rows], preprocess_cfg)
            tokens = batch.tokens[rows] if batch.text_features is None and batch.tokens.shape[1] else None
            if batch.negative_tokens is not None:  # in one pass with the captions
                tokens = torch.cat([batch.tokens[rows], batch.negative_tokens[rows].flatten(0, 1)])
        with spans("forward"), autocast(config.precision, device):
            out = model(images) if tokens is None else model(images, tokens)
        return outputs_of_rows(out, batch, rows)

    def loss_of(out: Outputs) -> tuple[Tensor, dict[str, Tensor]]:
        with spans("loss"):
            loss, negatives = contrastive_loss(out, batch, batch_groups, config, similarity)
            distilled = distillation(out, taught, batch, config) if taught else torch.zeros_like(loss)
            decoded = torch.zeros_like(loss) if targets is None else decoding(out, targets, batch)
            return loss + config.distill.weight * distilled + config.decode.weight * decoded, {
                "loss": loss,
                "distillation": distilled,
                "decoding": decoded,
                "rows": (batch.rows >= 0).sum(),
                "weight": negatives.weight.sum(),
                "negatives": (negatives.num_negatives * negatives.weight).sum(),
                "duplicates": negatives.duplicates,
                "similar": negatives.similar,
                "negative_captions": loss.new_zeros(()) if batch.is_negative is None else batch.is_negative.sum(),
                "row_groups": batch_groups,
                "row_losses": negatives.losses,
                "row_weights": negatives.weight,
            }

    with spans("forward"):
        taught = {} if teacher is None else teacher_outputs(teacher, batch, preprocess_cfg, config, device)
        with torch.no_grad(), autocast(config.precision, device):
            targets = sentences(batch.tokens) if sentences else None
    with spans("backward"):  # less the spans inside it
        return add_gradients(
            model,
            encode,
            loss_of,
            rows=len(batch.images),
            # All processes must decide alike, and their numbers of decoded rows differ: hence by `batch.rows`.
            chunk_rows=config.grad_cache_rows if config.grad_cache_rows < len(batch.rows) else 0,
            seed_chunk=lambda chunk: torch.manual_seed(seed_of(*seed, chunk)),  # dropout takes no generator
            backward=backward,
        )


def outputs_of_rows(out: Mapping[str, Tensor | None], batch: PairBatch, rows: slice) -> Outputs:
    """Return what a model has computed of some rows, with stored text features, and apart for wrong captions."""
    found = {name: tensor for name, tensor in out.items() if tensor is not None}
    if batch.negative_tokens is not None:
        number = len(found["image_features"])
        texts, wrong = found["text_features"].tensor_split([number])
        found |= {"text_features": texts, "negative_features": wrong.view(number, -1, wrong.shape[1])}
        found |= {DECODED: found[DECODED][:number]} if DECODED in found else {}
    if batch.text_features is not None:
        found["text_features"] = batch.text_features[rows]
    return found


def contrastive_loss(
    out: Outputs,
    batch: PairBatch,
    groups: Int64[Tensor, "local"],
    config: TrainConfig,
    similarity: Similarity | None = None,
) -> tuple[Tensor, Negatives]:
    """Compute this process's share of the loss from the outputs of the towers; return the negatives by group as well.

    The loss is s L_groups + (1 - s) L_batch, where s is `config.own_group_share`, and the negatives of a row are the
    rows of its group, or of all others by `config.groups`, in L_groups, and all rows of the batch in L_batch. Both are
    means over the rows with enough negatives.
    """
    images, wrong = at_batch_positions(out["image_features"], batch), None
    if batch.is_negative is not None:
        wrong = WrongCaptions(
            features=at_batch_positions(out["negative_features"], batch),
            is_negative=at_batch_positions(batch.is_negative, batch),
        )

    def loss_among(groups: Tensor, *, of_other_groups: bool = False) -> tuple[Tensor, Negatives]:
        negatives = find_negatives(
            rows=batch.rows, groups=groups, text_ids=batch.text_ids, image_ids=batch.image_ids,
            min_negatives=config.min_negatives, of_other_groups=of_other_groups,
            mask_duplicates=config.mask_duplicates, similarity=similarity, chunk_rows=config.loss_chunk_rows,
        )  # fmt: skip
        scale, epsilon = out["logit_scale"], config.ifm_epsilon
        if config.loss == "simclr":
            return simclr_loss(images, scale, negatives, ifm_epsilon=epsilon), negatives
        pair = images, at_batch_positions(out["text_features"], batch)
        if config.loss == "siglip":
            return siglip_loss(*pair, scale, out["logit_bias"], negatives, ifm_epsilon=epsilon, wrong=wrong), negatives
        return clip_loss(*pair, scale, negatives, ifm_epsilon=epsilon, wrong=wrong), negatives

    loss, negatives = loss_among(groups, of_other_groups=config.groups == "others")
    if (share := config.own_group_share) < 1:
        loss = share * loss + (1 - share) * loss_among(torch.zeros_like(groups))[0]
    return loss, negatives


@torch.no_grad()
def teacher_outputs(
    teacher: nn.Module, batch: PairBatch, preprocess_cfg: Mapping[str, Any], config: TrainConfig, device: torch.device
) -> Outputs:
    """Encode the images and texts of this process by the teacher, as many rows at a time as the model does."""
    size = config.grad_cache_rows or len(batch.images)
    parts = []
    with autocast(config.precision, device):
        for start in range(0, len(batch.images), size):
            rows = slice(start, start + size)
            parts.append(teacher(to_floats(batch.images[rows], preprocess_cfg), batch.tokens[rows]))
    features = {name: torch.cat([part[name] for part in parts]) for name in PAIR}
    return {**features, "logit_scale": parts[0]["logit_scale"]}


def distillation(out: Outputs, taught: Outputs, batch: PairBatch, config: TrainConfig) -> Tensor:
    """Compute this process's share of the distillation among all rows of the batch, of whatever groups they are."""
    rows = find_negatives(
        rows=batch.rows, groups=torch.zeros_like(batch.rows), text_ids=batch.text_ids, image_ids=batch.image_ids,
        min_negatives=0, mask_duplicates=False, chunk_rows=config.loss_chunk_rows,
    )  # fmt: skip
    images, texts = (at_batch_positions(out[name], batch) for name in PAIR)
    targets = {**taught, **{name: at_batch_positions(taught[name], batch) for name in PAIR}}
    return distillation_loss(images, texts, out["logit_scale"], targets, rows, temperature=config.distill.temperature)


def decoding(out: Outputs, targets: Tensor, batch: PairBatch) -> Tensor:
    """Compute this process's share of the decoding of sentence features."""
    decoded, targets = (at_batch_positions(features, batch) for features in (out[DECODED], targets))
    return decoding_loss(decoded, targets, batch.rows >= 0)


def at_batch_positions(features: Tensor, batch: PairBatch) -> Tensor:
    """Put the features of decoded rows at their positions in the batch, with zeros for fillers."""
    if len(batch.places) == len(batch.rows):
        return features
    return features.new_zeros(len(batch.rows), *features.shape[1:]).index_put((batch.places,), features)


def clamp_logit_scale_(model: nn.Module) -> None:
    """Keep exp(logit_scale) between 1 and 100, as CLIP does, unless it is locked."""
    if model.logit_scale.requires_grad:
        with torch.no_grad():
            model.logit_scale.clamp_(0, MAX_LOG_LOGIT_SCALE)  # type: ignore[operator]


def time_all_reduce(model: nn.Module, spans: Spans) -> None:
    """When profiling several processes, charge the wait for the all-reduce of gradients to the span `exchange`."""
    if spans.device is None or not isinstance(model, DistributedDataParallel):
        return

    def hook(_, bucket):  # type: ignore[no-untyped-def]  # torch accepts its own annotations, or none
        if bucket.is_last():  # all gradients are computed: what is not exchanged yet is waited for
            spans.switch("exchange")
        return allreduce_hook(None, bucket)  # type: ignore[arg-type]  # over all processes

    model.register_comm_hook(None, hook)


def _is_due(step: int, interval: int) -> bool:
    """Return whether `step` is a multiple of `interval`; an interval of 0 is never due."""
    return interval > 0 and step > 0 and step % interval == 0


def _record(
    model: nn.Module, meter: Meter, spans: Spans, state: TrainState, lr: float, grad_norm: Tensor, plan: BatchPlan
) -> tuple[dict[str, Any], dict[str, float]]:
    """Return the metrics and the seconds by span since the last record. The only wait for the device in the loop."""
    sums, spread, steps, seconds = meter.take()
    by_span = spans.take()
    state.seconds += seconds
    record = {
        "step": state.step,
        "epoch": plan.epoch_of(state.step - 1),
        "samples_seen": state.samples_seen,
        "loss": sums["loss"] / steps / world_size(),
        "lr": lr,
        "logit_scale": float(model.logit_scale.detach().exp()),  # type: ignore[operator]
        "grad_norm": float(grad_norm),
        "negatives_per_row": sums["negatives"] / max(1.0, sums["weight"]),
        "rows_without_weight": sums["rows"] - sums["weight"],
        "duplicates": sums["duplicates"],
        **{name: sums[name] for name in ("negative_captions", "similar") if sums[name]},
        "samples_per_s": sums["rows"] / seconds,
        "data_wait_share": by_span["data"] / seconds,
        "seconds": state.seconds,
        **{name: sums[name] / steps / world_size() for name in LOSSES[1:] if sums[name]},
        **({"group_loss": spread} if spread else {}),
    }
    return record, {name: round(spent, 6) for name, spent in by_span.items()}


def _stop_if_diverged(record: Mapping[str, Any], checkpoints: Path) -> None:
    """Raise TrainingDivergedError if the loss or the gradient norm of a record is not finite."""
    if math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"]):
        return
    saved = f"the last good checkpoint is in {checkpoints}" if checkpoints.is_dir() else "no checkpoint was saved yet"
    raise TrainingDivergedError(
        f"at step {record['step']} the loss is {record['loss']} and the gradient norm {record['grad_norm']}; {saved}. "
        f"Use a lower --stages.K.train.lr, a longer warmup, or "
        f"--stages.K.train.max-grad-norm 1"
    ).on_every_process()
