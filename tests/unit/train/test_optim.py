import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from mcl_clip.config import TrainConfig
from mcl_clip.core.errors import UserError
from mcl_clip.train.optim import ExponentialAverage, create_optimizer, lr_at, set_lr

CONFIG = TrainConfig(steps=1, global_batch_size=2, lr=0.1, weight_decay=0.2, betas=(0.9, 0.98), eps=1e-6)


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Sequential(nn.Conv2d(3, 4, 2), nn.LayerNorm(4))
        self.text = nn.Linear(4, 4)
        self.positions = nn.Parameter(torch.zeros(5, 4))
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self.locked = nn.Parameter(torch.zeros(3, 3), requires_grad=False)

    def no_weight_decay(self) -> set[str]:
        return {"positions"}


def options_by_name(model: nn.Module, **changed) -> dict[str, tuple[float, float]]:
    """Learning rate factor and weight decay of each parameter."""
    optimizer = create_optimizer(model, replace(CONFIG, **changed))
    of = {
        id(p): (group["lr_scale"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]
    }
    return {name: of[id(p)] for name, p in model.named_parameters() if id(p) in of}


def test_matrices_are_decayed_and_nothing_else():
    assert options_by_name(Towers()) == {
        "visual.0.weight": (1.0, 0.2),
        "text.weight": (1.0, 0.2),
        **dict.fromkeys(("visual.0.bias", "visual.1.weight", "visual.1.bias", "text.bias"), (1.0, 0.0)),
        **dict.fromkeys(("positions", "logit_scale"), (1.0, 0.0)),
    }


def test_patterns_override_and_the_last_match_counts():
    found = options_by_name(
        Towers(), lr_multipliers={"^visual": 0.5, r"visual\.1": 0.1}, weight_decays={"bias$": 0.3, "text": 0.4}
    )
    assert (found["visual.0.weight"], found["visual.1.weight"]) == ((0.5, 0.2), (0.1, 0.0))
    assert (found["visual.1.bias"], found["text.bias"], found["text.weight"]) == ((0.1, 0.3), (1.0, 0.4), (1.0, 0.4))


@pytest.mark.parametrize("option", ["lr_multipliers", "weight_decays"])
def test_patterns_that_cannot_be_meant_are_refused(option):
    name = option.replace("_", "-")
    with pytest.raises(UserError, match=f"{name} 'locked' matches none of the 8 parameters that train"):
        create_optimizer(Towers(), replace(CONFIG, **{option: {"locked": 0.1}}))
    with pytest.raises(UserError, match=f"{name} '\\(' is not a regular expression"):
        create_optimizer(Towers(), replace(CONFIG, **{option: {"(": 0.1}}))


def test_each_group_gets_its_learning_rate():
    optimizer = create_optimizer(Towers(), replace(CONFIG, lr_multipliers={"text": 0.25}))
    set_lr(optimizer, 0.08)
    assert {(group["lr_scale"], group["lr"]) for group in optimizer.param_groups} == {(1.0, 0.08), (0.25, 0.02)}


def test_the_schedule_warms_up_and_falls_to_zero():
    config = replace(CONFIG, lr=1.0, steps=100, warmup_steps=10)
    rates = [lr_at(step, config) for step in range(101)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10)
    np.testing.assert_allclose([rates[10], rates[55], rates[100]], [1, 0.5, 0], atol=1e-12)
    assert all(np.diff(rates[10:]) < 0)
    assert min(rates[:100]) > 0
    constant = replace(config, steps=9, warmup_steps=2, schedule="constant")
    assert [lr_at(step, constant) for step in (0, 1, 2, 8)] == [0.5, 1, 1, 1]
    assert lr_at(0, replace(config, steps=1, warmup_steps=0)) == 1
    assert math.isfinite(lr_at(5, replace(config, steps=5, warmup_steps=5)))
    assert [lr_at(step, replace(config, lr=0.5)) for step in range(101)] == [0.5 * rate for rate in rates]


def test_the_average_follows_the_weights():
    model, decay = nn.Linear(2, 2), 0.6
    average = ExponentialAverage(model, decay)
    expected = model.weight.detach().clone()
    for step in range(1, 30):
        with torch.no_grad():
            model.weight += step
        average.update(model, step)
        d = min(decay, (1 + step) / (10 + step))
        expected = d * expected + (1 - d) * model.weight.detach()
    torch.testing.assert_close(average.average["weight"], expected)


def test_swapping_twice_is_nothing():
    model = Towers()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    average = ExponentialAverage(model, 0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    average.swap(model)
    assert "locked" not in average.average
    assert all(torch.equal(p, (before if n == "locked" else start)[n]) for n, p in model.named_parameters())
    average.swap(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
