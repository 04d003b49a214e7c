"""The training loop at any number of processes against a plain loop that shares no code with it."""

import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from mcl_clip.core.distributed import seed_of
from mcl_clip.core.files import read_jsonl
from mcl_clip.train.checkpoint import checkpoints
from tests.training import fit, parts, write_shards

STEPS, WARMUP, LR, DECAY, MAX_NORM, AVERAGE = 10, 3, 2e-3, 0.3, 20.0, 0.6
BETAS, EPS = (0.85, 0.95), 1e-5
CHANGES = {
    "steps": STEPS, "warmup_steps": WARMUP, "lr": LR, "weight_decay": DECAY, "max_grad_norm": MAX_NORM,
    "average_decay": AVERAGE, "betas": BETAS, "eps": EPS,
}  # fmt: skip
SCALE = 120.0  # above the limit of 100, so that the clamp matters from the first step on


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("loop") / "shards")


def make(shards):
    return parts(shards, dtype=torch.float64, model={"init_logit_scale": math.log(SCALE)})


def weights(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: p.detach().numpy().copy() for name, p in model.named_parameters()}


def loss_of(model: nn.Module, batch, preprocess_cfg: Mapping) -> tuple[Tensor, float, int]:
    """InfoNCE in both directions, row by row within its group; the mean number of negatives; rows without any."""
    mean, std = (torch.tensor(preprocess_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    rows = batch.rows[batch.rows >= 0]
    assert len(batch.images) == len(rows)
    images = normalize(model.encode_image((batch.images / 255 - mean) / std))
    logits = model.logit_scale.exp() * images @ normalize(model.encode_text(batch.tokens)).T
    losses, negatives = [], []
    for place, row in enumerate(rows.tolist()):
        among = [place, *(j for j, other in enumerate(rows.tolist()) if j != place and (row - other) % 3 == 0)]
        if len(among) > 1:
            sides = torch.stack([logits[place, among], logits[among, place]])
            losses.append(cross_entropy(sides, torch.tensor([0, 0])))
            negatives.append(len(among) - 1.0)
    return torch.stack(losses).mean(), np.mean(negatives), len(rows) - len(losses)


def plain_training(shards) -> tuple[list[dict[str, float]], dict[str, np.ndarray]]:
    """AdamW with decoupled decay, warmup and cosine, clipping by the norm of all gradients, and averaged weights."""
    make_loader, clip = make(shards)
    model, records = clip.model.train(), []
    named = dict(model.named_parameters())
    no_decay = ("bias", "positional_embedding", "logit_scale")
    decayed = {name for name, p in named.items() if not name.endswith(no_decay) and p.ndim > 1}
    assert {"visual.conv1.weight", "visual.proj", "text_projection"} < decayed
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in named.items()}
    average = {name: p.detach().clone() for name, p in named.items()}
    for step, batch in enumerate(make_loader().steps(0, STEPS)):
        loss, negatives, alone = loss_of(model, batch, clip.preprocess_cfg)
        grads = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
        norm = math.sqrt(sum(float(grad.square().sum()) for grad in grads.values()))
        lr = LR * (step + 1) / WARMUP
        if step >= WARMUP:
            lr = LR * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP))) / 2
        with torch.no_grad():
            for name, p in named.items():
                grad = grads[name] * min(1, MAX_NORM / (norm + 1e-6))
                first, second = moments[name]
                first.mul_(BETAS[0]).add_((1 - BETAS[0]) * grad)
                second.mul_(BETAS[1]).add_((1 - BETAS[1]) * grad**2)
                unbiased = [
                    moment / (1 - beta ** (step + 1)) for moment, beta in zip((first, second), BETAS, strict=True)
                ]
                p.mul_(1 - lr * DECAY * (name in decayed)).sub_(lr * unbiased[0] / (unbiased[1].sqrt() + EPS))
            model.logit_scale.fill_(min(max(float(model.logit_scale.detach()), 0), math.log(100)))
            for name, p in named.items():
                keep = min(AVERAGE, (2 + step) / (11 + step))
                average[name].mul_(keep).add_((1 - keep) * p)
        scale = math.exp(float(model.logit_scale.detach()))
        records.append(
            {
                "step": step + 1, "epoch": step // 7, "samples_seen": 8 * (step + 1), "loss": loss.item(),
                "grad_norm": norm, "lr": lr, "logit_scale": scale, "negatives_per_row": negatives,
                "rows_without_weight": alone, "evaluated": float(average["visual.proj"].sum()),
            }
        )  # fmt: skip
    return records, {name: p.numpy() for name, p in average.items()}


def evaluate(model: nn.Module) -> dict[str, float]:
    return {"evaluated": float(model.visual.proj.detach().sum())}


def trained(shards, out, chunk_rows: int) -> dict[str, np.ndarray]:
    make_loader, clip = make(shards)
    changes = {**CHANGES, "grad_cache_rows": chunk_rows, "loss_chunk_rows": chunk_rows}
    fit(clip, make_loader(), out=out, changes=changes, evaluate=evaluate, evaluate_steps=3)
    return weights(clip.model)


@pytest.fixture(scope="module")
def expected(shards):
    records, averaged = plain_training(shards)
    norms, scales = ([record[name] for record in records] for name in ("grad_norm", "logit_scale"))
    assert min(norms) < MAX_NORM < max(norms)  # some steps are clipped, and some are not
    assert scales[0] == pytest.approx(100)
    return records, averaged


@pytest.mark.parametrize(("size", "chunk_rows"), [(1, 0), (2, 3), (4, 0)])
def test_training_is_that_of_a_plain_loop(pool, shards, expected, size, chunk_rows, tmp_path):
    """Loss, clipping, learning rate, decay, the limit of the temperature, the average and what is logged of them."""
    records, averaged = expected
    for found in pool.run(trained, size, shards, tmp_path / "train", chunk_rows):
        for name, tensor in averaged.items():
            np.testing.assert_allclose(found[name], tensor, rtol=0, atol=1e-9, err_msg=name)
    logged = read_jsonl(tmp_path / "train/metrics.jsonl")
    evaluated = {record["step"]: record["evaluated"] for record in logged if "loss" not in record}
    assert evaluated == pytest.approx({step: records[step - 1]["evaluated"] for step in (3, 6, 9)})  # the average
    for found, record in zip([record for record in logged if "loss" in record], records, strict=True):
        kept = {name: value for name, value in record.items() if name != "evaluated"}
        assert {name: found[name] for name in kept} == pytest.approx(kept, rel=1e-7)
    saved = [path.name for path in checkpoints(tmp_path / "train/checkpoints")]
    assert saved[-1] == f"step-{STEPS:09d}"


def dropout_seeds(shards, out, chunk_rows: int) -> list[int]:
    """The seed of torch's generator at each forward pass of the image tower in three steps."""
    (make_loader, clip), found = parts(shards), []
    clip.model.eval().visual.register_forward_pre_hook(
        lambda tower, _: found.append(tower.training * torch.initial_seed())
    )
    fit(clip, make_loader(), out=out, changes={"grad_cache_rows": chunk_rows}, max_steps=3)
    return found


@pytest.mark.parametrize(("chunk_rows", "passes"), [(0, [0]), (2, [0, 1, 0, 1])])
def test_dropout_differs_by_step_process_and_chunk_and_is_the_same_in_both_passes(
    pool, shards, tmp_path, chunk_rows, passes
):
    for number, seeds in enumerate(pool.run(dropout_seeds, 2, shards, tmp_path / "train", chunk_rows)):
        assert seeds == [seed_of(0, 1, "dropout", step, number, chunk) for step in range(3) for chunk in passes]
