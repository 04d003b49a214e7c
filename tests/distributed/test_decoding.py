"""Latent target decoding at any number of processes against a full-batch reference."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mcl_clip.config import DecodeConfig, TrainConfig
from mcl_clip.core.distributed import all_reduce_sum, world_size
from mcl_clip.train.loop import forward_backward
from tests.distributed.test_losses import BATCH, CFG, CPU, Case, Data, Towers, gradients, reference_loss

STEPS, WEIGHT = 8, 1.7  # an epoch of packed and whole batches, fillers, and rows without negatives


class Decoding(Towers):
    """Towers whose outputs have features decoded from those of the texts."""

    def __init__(self) -> None:
        super().__init__("clip")
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.head = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))

    def forward(self, images: Tensor, tokens: Tensor) -> dict[str, Tensor | None]:
        out = super().forward(images, tokens)
        return {**out, "decoded_features": self.head(out["text_features"])}


def sentences(tokens: Tensor) -> Tensor:
    return torch.stack([tokens.double().std(1), tokens.double().mean(1), tokens.double()[:, 0]], dim=1)


def make(dtype: torch.dtype) -> tuple[Decoding, torch.optim.Optimizer]:
    model = Decoding().to(dtype)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-3)


def train(dtype: torch.dtype, chunk_rows: int, negative_captions: int) -> list[tuple[float, float, dict]]:
    """The loss, the decoding loss and the gradients of each step."""
    data, (raw, optimizer) = Data(negative_captions), make(dtype)
    model = DistributedDataParallel(raw) if world_size() > 1 else raw
    config = TrainConfig(
        steps=STEPS, global_batch_size=BATCH, lr=0.01, grad_cache_rows=chunk_rows, negative_captions=negative_captions,
        decode=DecodeConfig(weight=WEIGHT),
    )  # fmt: skip
    found = []
    for step in range(STEPS):
        counts = forward_backward(
            model, data.batch(step), groups=data.groups, preprocess_cfg=CFG, config=config, device=CPU, seed=(),
            sentences=sentences,
        )  # fmt: skip
        values = [float(all_reduce_sum(counts[name].detach().clone())) / world_size() for name in ("loss", "decoding")]
        found.append((*values, gradients(raw)))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return found


def reference(negative_captions: int) -> list[tuple[float, float, dict]]:
    data, (model, optimizer) = Data(negative_captions), make(torch.float64)
    found = []
    for step in range(STEPS):
        rows = [row for row in data.rows[step].tolist() if row >= 0]
        contrastive = reference_loss(model, data, rows, Case(negative_captions=negative_captions))
        targets = sentences(data.tokens[rows])
        decoded = model(data.images[rows].double(), data.tokens[rows])["decoded_features"]
        cosines = (decoded * targets).sum(1) / (decoded.norm(dim=1) * targets.norm(dim=1))
        decoding = (1 - cosines).mean()
        (contrastive + WEIGHT * decoding).backward()
        found.append((float(contrastive.detach()), float(decoding.detach()), gradients(model)))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize(("size", "chunk_rows", "negative_captions"), [(1, 0, 0), (2, 2, 0), (4, 0, 0), (4, 1, 2)])
def test_it_equals_the_reference(pool, size, chunk_rows, negative_captions):
    expected = reference(negative_captions)
    assert min(decoding for _, decoding, _ in expected) > 0.01
    for found in pool.run(train, size, torch.float64, chunk_rows, negative_captions):
        for mine, theirs in zip(found, expected, strict=True):
            assert mine[:2] == pytest.approx(theirs[:2], abs=1e-9)
            for name, gradient in theirs[2].items():
                np.testing.assert_allclose(mine[2][name], gradient, rtol=1e-9, atol=1e-9, err_msg=name)


def test_in_float32_it_equals_the_reference(pool):
    for found in pool.run(train, 2, torch.float32, 0, 0):
        for mine, theirs in zip(found, reference(0), strict=True):
            assert mine[:2] == pytest.approx(theirs[:2], abs=1e-5)
