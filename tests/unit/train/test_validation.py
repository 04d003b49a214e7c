"""The best weights of a stage: which are kept, when it stops, and that a stopped stage goes on to the same ones."""

import math

import pytest
import torch

from mcl_clip.core.errors import UserError
from mcl_clip.core.files import read_jsonl
from mcl_clip.train.checkpoint import checkpoints
from mcl_clip.train.validation import BestWeights
from tests import training

VALUES = {0: 0.1, 4: 0.5, 8: 0.3, 12: 0.7, 16: 0.6, 20: 0.2, 24: 0.9, 28: 0.1, 30: 0.4}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return training.write_shards(tmp_path_factory.mktemp("best") / "shards")


def fit(shards, out, *, patience=0, values=VALUES, metric="val/acc1", most_steps=math.inf):
    """Train with made-up values by step; the weights by step at each evaluation, those at the end, and what is kept."""
    make_loader, clip = training.parts(shards)
    seen, best = {}, BestWeights(metric, patience=patience)
    loader = make_loader(most_steps=most_steps)
    first = max((int(path.name.removeprefix("step-")) for path in checkpoints(out / "checkpoints")), default=0)
    steps = iter(step for step in sorted(values) if step >= first)  # a resumed stage evaluates its checkpoint, too

    def evaluate(model):
        step = next(steps)
        seen[step] = {name: p.detach().clone() for name, p in model.named_parameters()}
        return {metric: values[step], "val/other": 0.0}

    try:
        training.fit(clip, loader, out=out, evaluate=evaluate, evaluate_steps=4, best=best)
    except training.StoppedError:
        return seen, None, best
    return seen, dict(clip.model.named_parameters()), best


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_stage_ends_with_the_weights_of_its_best_evaluation(shards, tmp_path):
    seen, kept, best = fit(shards, tmp_path / "out")
    assert list(seen) == list(VALUES)  # before the first and after the last step, too
    assert (best.step, best.value) == (24, 0.9)
    assert_equal(kept, seen[24])  # the moving average, which is what is evaluated
    logged = [r["step"] for r in read_jsonl(tmp_path / "out/metrics.jsonl") if "loss" not in r]
    assert logged == list(VALUES)


@pytest.mark.parametrize(("values", "step"), [({**VALUES, 0: 2.0}, 0), ({**VALUES, 30: 2.0}, 30)])
def test_the_first_and_the_last_weights_can_be_the_best(shards, tmp_path, values, step):
    seen, kept, best = fit(shards, tmp_path / "out", values=values)
    assert best.step == step
    assert_equal(kept, seen[step])


def test_a_stage_stops_when_its_patience_is_over(shards, tmp_path):
    seen, kept, best = fit(shards, tmp_path / "out", patience=2)
    assert list(seen) == [0, 4, 8, 12, 16, 20]
    assert (best.step, best.is_exhausted) == (12, True)
    assert_equal(kept, seen[12])
    steps = [r["step"] for r in read_jsonl(tmp_path / "out/metrics.jsonl") if "loss" in r]
    assert steps == list(range(1, 21))


@pytest.mark.parametrize(("patience", "stops"), [(0, (6, 13, 4)), (2, (5, 9)), (2, (14,))])
def test_a_stopped_stage_goes_on_to_the_same_weights(shards, tmp_path, patience, stops):
    _, whole, best = fit(shards, tmp_path / "whole", patience=patience)
    for most_steps in stops:
        assert fit(shards, tmp_path / "parts", patience=patience, most_steps=most_steps)[1] is None
    _, kept, resumed = fit(shards, tmp_path / "parts", patience=patience)
    assert (resumed.step, resumed.value, resumed.stale) == (best.step, best.value, best.stale)
    assert_equal(kept, whole)
    one, other = (read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts"))
    assert [r["step"] for r in one if "loss" not in r] == [r["step"] for r in other if "loss" not in r]


def test_a_lower_rank_is_better(shards, tmp_path):
    best = fit(shards, tmp_path / "out", metric="val/image_retrieval_median_rank")[2]
    assert (best.step, best.value) == (0, 0.1)


def test_locked_weights_are_not_copied():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    model[0].requires_grad_(False)
    best = BestWeights("val/acc1")
    best.see(model, 3, {"val/acc1": 0.5})
    assert {"1.weight", "1.bias", "1.running_mean"} <= best.weights.keys()
    assert not any(name.startswith("0.") for name in best.weights)


def test_a_value_that_is_not_a_number_is_never_better():
    model, best = torch.nn.Linear(1, 1), BestWeights("val/acc1", patience=1)
    best.see(model, 0, {"val/acc1": 0.2})
    best.see(model, 1, {"val/acc1": math.nan})
    assert (best.step, best.is_exhausted) == (0, True)


def test_an_unknown_metric_is_refused_with_those_there_are():
    with pytest.raises(UserError, match=r"keep-best val:acc is not measured; the metrics of val are acc1, acc5$"):
        BestWeights("val/acc").see(torch.nn.Linear(1, 1), 0, {"val/acc1": 0.5, "val/acc5": 1.0, "other/x": 0.0})
