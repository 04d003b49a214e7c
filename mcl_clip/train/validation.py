"""Evaluations inside a stage: when they are due, the best weights by one of their metrics, and when to stop early."""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mcl_clip.core.errors import UserError
from mcl_clip.train.metrics import Spans, StepLog
from mcl_clip.train.optim import ExponentialAverage


class BestWeights:
    """The weights with the best value of a metric so far, in the memory of the host, and how long ago they were found.

    Each checkpoint holds them, so a resumed stage keeps and stops as an uninterrupted one does.

    Args:
        metric: a key of the results of an evaluation, `SET/METRIC`. Higher is better, except for ranks.
        patience: evaluations without improvement after which the stage stops; 0 is never.
    """

    def __init__(self, metric: str, *, patience: int = 0) -> None:
        self.metric, self.patience = metric, patience
        self.step, self.value, self.stale = -1, math.nan, 0
        self.weights: dict[str, Tensor] = {}

    @property
    def is_exhausted(self) -> bool:
        """Whether `patience` evaluations in a row have not improved on the best."""
        return 0 < self.patience <= self.stale

    def see(self, model: nn.Module, step: int, results: Mapping[str, float]) -> None:
        """Take the weights after `step` steps if their results are better than the best so far.

        Raises:
            UserError: if the evaluation has no such metric.
        """
        if self.metric not in results:
            name = self.metric.partition("/")[0]
            has = ", ".join(key.removeprefix(f"{name}/") for key in results if key.startswith(f"{name}/"))
            raise UserError(
                f"--stages.K.train.keep-best {self.metric.replace('/', ':', 1)} is not measured; the metrics of {name} "
                f"are {has}"
            ).on_every_process()
        value, sign = results[self.metric], -1 if is_rank(self.metric) else 1
        if self.step >= 0 and not sign * value > sign * self.value:
            self.stale += 1
            return
        self.step, self.value, self.stale = step, value, 0
        locked = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        self.weights = {
            name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items() if name not in locked
        }

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        """Put the best weights into the model."""
        state = model.state_dict()
        for name, tensor in self.weights.items():
            state[name].copy_(tensor)

    def record(self) -> dict[str, Any]:
        """Return metric, step and value of the best weights, and the number of evaluations since, for JSON."""
        return {"metric": self.metric, "step": self.step, "value": self.value, "stale": self.stale}

    def load(self, record: Mapping[str, Any], weights: dict[str, Tensor]) -> None:
        """Go on from the `record` and the weights in a checkpoint."""
        self.step, self.value, self.stale = int(record["step"]), float(record["value"]), int(record["stale"])
        self.weights = weights


class Validation:
    """Evaluations of a model, or of the moving average of its weights, every `every_steps` steps; 0 is never.

    Args:
        evaluate: returns metrics of the model.
        best: keeps the best weights; then the first and the last weights are evaluated, too.
        log: gets a record of each evaluation.
        logged: steps of evaluations that are in the log already.
    """

    def __init__(
        self,
        evaluate: Callable[[nn.Module], dict[str, float]],
        *,
        every_steps: int,
        best: BestWeights | None,
        average: ExponentialAverage | None,
        log: StepLog,
        logged: Collection[int],
        spans: Spans,
    ) -> None:
        self._evaluate, self._every_steps = evaluate, every_steps
        self._best, self._average = best, average
        self._log, self._logged, self._spans = log, logged, spans

    def says_stop(self, model: nn.Module, step: int) -> bool:
        """Evaluate the model if that is due after `step` steps; return whether the stage should stop."""
        # A checkpoint is older than the evaluation of its step, which a resumed stage repeats for `best`.
        if self.can_stop_at(step) or (0 < self._every_steps <= step and self._is_new(step)):
            self._run(model, step)
        return self._best is not None and self._best.is_exhausted

    def can_stop_at(self, step: int) -> bool:
        """Return whether the stage may stop early after `step` steps."""
        return self._best is not None and step % self._every_steps == 0

    def finish(self, model: nn.Module, step: int, *, is_last: bool) -> None:
        """Leave the model with the best weights or with their average, where there is one."""
        if self._best is not None:
            if is_last and not self._best.is_exhausted:
                self._run(model, step)
            self._best.restore(model)
        elif self._average is not None:
            self._average.swap(model)

    def _is_new(self, step: int) -> bool:
        return step % self._every_steps == 0 and step not in self._logged

    def _run(self, model: nn.Module, step: int) -> None:
        with self._spans("evaluate"):
            if self._average is not None:
                self._average.swap(model)
            results = self._evaluate(model)
            if self._best is not None:
                self._best.see(model, step, results)
            if self._average is not None:
                self._average.swap(model)
            model.train()
            if step not in self._logged:
                self._log.add({"step": step, **results})


def is_rank(metric: str) -> bool:
    """Return whether lower values of a metric are better."""
    return metric.endswith("rank")
