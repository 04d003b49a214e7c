"""Methods other than stages with groups, and controls: what the stages are compared with, at equal compute.

Besides its groups, a multistage model has more compute, more dimensions and several warm restarts of the learning rate.
Every control has the same compute; the controls with several stages also have the same dimensions and restarts.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from jaxtyping import Int

from mcl_clip.config import RunConfig
from mcl_clip.core.distributed import Name, permutation

FORWARD_SHARE = 1 / 3  # of the compute of a training step: the backward pass costs twice the forward pass
DEFAULT_IFM_EPSILON = 0.1
CONTROL_OF_METHOD = {  # which stages a method trains
    "single": "single",
    "plain-stages": "no-groups",
    **dict.fromkeys(("ensemble", "soup", "greedy-soup"), "ensemble"),
}


def with_control(config: RunConfig, *, rows: int) -> RunConfig:
    """Return the recipe of the method or control that `config` asks for: stages of equal compute on `rows` rows."""
    stages, control = config.stages, CONTROL_OF_METHOD.get(config.method, config.control)
    trained = [stage.train for stage in stages if stage.train.steps]
    if control == "none" or not trained:
        return config
    if control in ("single", "ifm"):
        train = trained[0]
        steps = equal_compute_steps(
            [(stage.train.steps, stage.train.global_batch_size) for stage in stages],
            rows=rows,
            global_batch_size=train.global_batch_size,
        )
        epsilon = (train.ifm_epsilon or DEFAULT_IFM_EPSILON) if control == "ifm" else train.ifm_epsilon
        warmup_steps = round(train.warmup_steps * steps / train.steps)
        train = replace(train, steps=steps, warmup_steps=warmup_steps, ifm_epsilon=epsilon)
        return replace(config, stages=(replace(stages[0], train=train),))
    groups: Literal["none", "random"] = "random" if control == "random-groups" else "none"
    later = [  # neighbors in resharded shards share a group, so a control reads the original shards
        replace(stage, train=replace(stage.train, groups=groups, resharded="", run_rows=1)) for stage in stages[1:]
    ]
    if control == "ensemble":
        start: Literal["base", "scratch"] = "base" if config.tower.is_pretrained else "scratch"
        later = [replace(stage, start=start) for stage in later]
    return replace(config, stages=(stages[0], *later))


def equal_compute_steps(stages: Sequence[tuple[int, int]], *, rows: int, global_batch_size: int) -> int:
    """Return the steps of a single stage that cost as much as several stages, each of which embeds all rows at its end.

    `stages` has the steps and the global batch size of each of them.
    """
    images = sum(steps * batch for steps, batch in stages) + len(stages) * rows * FORWARD_SHARE
    return round(images / global_batch_size)


def shuffled_groups(groups: Int[np.ndarray, "rows"], *, name: tuple[Name, ...]) -> Int[np.ndarray, "rows"]:
    """Return groups of the same sizes with rows assigned by the random permutation `name`; group -1 stays held out."""
    trained = np.flatnonzero(groups >= 0)
    shuffled = groups.copy()
    shuffled[trained] = groups[trained[permutation(len(trained), *name)]]
    return shuffled
