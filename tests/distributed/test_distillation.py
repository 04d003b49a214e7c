"""Distillation of a teacher's similarities at any number of processes against a full-batch reference."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from mcl_clip.config import DistillConfig, TrainConfig
from mcl_clip.core.distributed import all_reduce_sum, world_size
from mcl_clip.train.loop import forward_backward
from tests.distributed.test_losses import BATCH, CFG, CPU, Case, Data, Towers, gradients, make, reference_loss

STEPS, WEIGHT = 8, 1.7  # an epoch of packed and whole batches, fillers, and rows without negatives


def teacher(dtype: torch.dtype) -> Towers:
    model = Towers("clip").to(dtype)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.add_(0.3 * noise)
    return model.eval().requires_grad_(False)


def train(
    loss: str, temperature: float, dtype: torch.dtype, chunks: tuple[int, int]
) -> list[tuple[float, float, dict]]:
    """The loss, the distillation and the gradients of each step."""
    data, (raw, optimizer) = Data(), make(loss, dtype)
    model = DistributedDataParallel(raw) if world_size() > 1 else raw
    config = TrainConfig(
        steps=STEPS, global_batch_size=BATCH, lr=0.01, loss=loss, grad_cache_rows=chunks[0],
        loss_chunk_rows=chunks[1], distill=DistillConfig(weight=WEIGHT, temperature=temperature),
    )  # fmt: skip
    found = []
    for step in range(STEPS):
        counts = forward_backward(
            model, data.batch(step), groups=data.groups, preprocess_cfg=CFG, config=config, device=CPU, seed=(),
            teacher=teacher(dtype),
        )  # fmt: skip
        values = [
            float(all_reduce_sum(counts[name].detach().clone())) / world_size() for name in ("loss", "distillation")
        ]
        found.append((*values, gradients(raw)))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return found


def reference_distillation(model: Towers, data: Data, rows: list[int], temperature: float) -> Tensor:
    mean, std = (torch.tensor(CFG[name]).view(3, 1, 1) for name in ("mean", "std"))
    inputs = (data.images[rows].float() / 255 - mean) / std, data.tokens[rows]
    ours, theirs = model(*inputs), teacher(torch.float64)(*inputs)
    total = torch.zeros((), dtype=torch.float64)
    for axis in (0, 1):
        q, p = (
            (out["logit_scale"] * out["image_features"] @ out["text_features"].T / temperature).log_softmax(axis)
            for out in (ours, theirs)
        )
        total = total + (p.exp() * (p - q)).sum(axis).mean() / 2
    return temperature**2 * total


def reference(loss: str, temperature: float) -> list[tuple[float, float, dict]]:
    data, (model, optimizer) = Data(), make(loss, torch.float64)
    found = []
    for step in range(STEPS):
        rows = [row for row in data.rows[step].tolist() if row >= 0]
        contrastive = reference_loss(model, data, rows, Case(loss))
        distilled = reference_distillation(model, data, rows, temperature)
        (contrastive + WEIGHT * distilled).backward()
        found.append((float(contrastive.detach()), float(distilled.detach()), gradients(model)))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize(
    ("loss", "temperature", "chunks"), [("clip", 1.0, (0, 0)), ("siglip", 4.0, (0, 3)), ("clip", 2.0, (2, 1))]
)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_it_equals_the_reference(pool, size, loss, temperature, chunks):
    expected = reference(loss, temperature)
    assert min(distilled for _, distilled, _ in expected) > 0.01
    for found in pool.run(train, size, loss, temperature, torch.float64, chunks):
        for mine, theirs in zip(found, expected, strict=True):
            assert mine[:2] == pytest.approx(theirs[:2], abs=1e-9)
            for name, gradient in theirs[2].items():
                np.testing.assert_allclose(mine[2][name], gradient, rtol=1e-9, atol=1e-9, err_msg=name)


def test_in_float32_it_equals_the_reference(pool):
    for found in pool.run(train, 2, "clip", 1.0, torch.float32, (0, 0)):
        for mine, theirs in zip(found, reference("clip", 1.0), strict=True):
            assert mine[:2] == pytest.approx(theirs[:2], abs=1e-5)


def test_a_model_learns_nothing_from_its_own_similarities():
    data, (model, _) = Data(), make("clip", torch.float64)
    own = make("clip", torch.float64)[0].eval().requires_grad_(False)
    for step, weight in ((0, 5.0), (7, 5.0)):
        grads = []
        for distill in (DistillConfig(weight=weight), DistillConfig()):
            config = TrainConfig(steps=1, global_batch_size=BATCH, lr=0.01, distill=distill)
            counts = forward_backward(
                model, data.batch(step), groups=data.groups, preprocess_cfg=CFG, config=config, device=CPU, seed=(),
                teacher=own if distill.weight else None,
            )  # fmt: skip
            assert float(counts["distillation"].detach()) == pytest.approx(0, abs=1e-12)
            grads.append(gradients(model))
            model.zero_grad(set_to_none=True)
        for name, gradient in grads[1].items():
            np.testing.assert_allclose(grads[0][name], gradient, rtol=0, atol=1e-12)
