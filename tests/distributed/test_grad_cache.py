"""GradCache under DistributedDataParallel: exact gradients, and one synchronisation a step."""

import copy
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from mcl_clip.core.distributed import gather, rank, seed_of, world_size
from mcl_clip.data.batch_plan import FILLER
from tests.distributed.test_losses import BATCH, Data, Towers, add_gradients

STEPS = 8
FEATURES = ("image_features", "text_features")


class Dropping(Towers):
    """The towers with dropout, a buffer that DistributedDataParallel sends around, and a parameter nobody uses."""

    def __init__(self, loss):
        super().__init__(loss)
        self.register_buffer("mask", torch.ones(()))
        self.unused = nn.Parameter(torch.ones(3))
        self.double()

    def forward(self, images, tokens):
        out = super().forward(nn.functional.dropout(self.mask * images, 0.3, self.training), tokens)
        bias = out["logit_bias"]
        return {**out, "logit_bias": None if bias is None else 1 * bias}  # a bare parameter is unused to DDP


class InChunks(nn.Module):
    """The same model, called for a few rows at a time, with the dropout of GradCache's chunks."""

    def __init__(self, model, chunk_rows):
        super().__init__()
        self.model, self.chunk_rows, self.seed = model, chunk_rows, ()

    def forward(self, images, tokens):
        outputs = []
        for number, part in enumerate(zip(images.split(self.chunk_rows), tokens.split(self.chunk_rows), strict=True)):
            torch.manual_seed(seed_of(*self.seed, number))
            outputs.append(self.model(*part))
        return outputs[0] | {name: torch.cat([output[name] for output in outputs]) for name in FEATURES}


def gradients(loss, chunk_rows, find_unused):
    """Gradients of some steps by GradCache and by one graph over all chunks; synchronisations; chunks of each step."""
    raw = Dropping(loss)
    raw.unused.requires_grad_(find_unused)
    graph = InChunks(copy.deepcopy(raw), chunk_rows)
    prepared = [raw, graph]
    synchronised, chunks, found = [], [], []
    if world_size() > 1:
        prepared = [DistributedDataParallel(model, find_unused_parameters=find_unused) for model in (raw, graph)]
        prepared[0].register_comm_hook(None, lambda state, bucket: _counted(synchronised, state, bucket))
    data = Data()
    for step in range(STEPS):
        seed = (step, rank())
        graph.seed = seed
        counted = [
            add_gradients(model, data, step, seed, loss=loss, loss_chunk_rows=2, grad_cache_rows=rows)
            for model, rows in zip(prepared, (chunk_rows, 0), strict=True)
        ]
        for name in counted[0]:
            assert torch.allclose(counted[0][name].double(), counted[1][name].double(), atol=1e-12), name
        chunks.append([-(-int(rows) // chunk_rows) for rows in gather(torch.tensor([len(data.batch(step).images)]))])
        found.append(
            [
                {name: None if p.grad is None else p.grad.clone().numpy() for name, p in model.named_parameters()}
                for model in (raw, graph.model)
            ]
        )
        for model in prepared:
            model.zero_grad(set_to_none=True)
    return found, len(synchronised), chunks


def _counted(synchronised, state, bucket):
    if bucket.index() == 0:
        synchronised.append(1)
    return allreduce_hook(state, bucket)


@pytest.mark.parametrize("find_unused", [True, False], ids=["as on the CPU", "as on GPUs"])
@pytest.mark.parametrize("loss", ["clip", "siglip"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_gradients_with_dropout_are_exact_and_synchronised_once(pool, size, loss, find_unused):
    for found, synchronised, chunks in pool.run(gradients, size, loss, 1 if size == 4 else 2, find_unused):
        assert synchronised == (STEPS if size > 1 else 0)
        assert len({len(of_step) for of_step in chunks}) == 1
        assert size == 1 or any(len(set(of_step)) > 1 for of_step in chunks)  # processes differ in their chunks
        for mine, expected in found:
            assert mine.keys() == expected.keys()
            for name, gradient in expected.items():
                if gradient is None:
                    assert mine[name] is None
                else:
                    assert abs(mine[name] - gradient).max() < 1e-9, name
            assert abs(mine["logit_scale"]) > 0


def passes(rows):
    """Forward passes of the towers in a step whose batch has fillers only on the last process."""
    data, calls = Data(), []
    data.rows[0, -(BATCH // world_size()) :] = FILLER
    model = DistributedDataParallel(Towers("clip").double())
    forward = Towers.forward

    def counted(self, images, tokens):
        calls.append(len(images))
        return forward(self, images, tokens)

    with patch.object(Towers, "forward", counted):
        add_gradients(model, data, 0, grad_cache_rows=rows)
    return calls, all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_process_with_fillers_alone_takes_part(pool):
    for number, (calls, has_gradients) in enumerate(pool.run(passes, 4, 1)):
        assert calls == ([1, 1] if number == 3 else [1, 1, 1, 1])
        assert has_gradients


def test_a_chunk_that_holds_the_batch_costs_no_second_pass_on_any_process(pool):
    for number, (calls, _) in enumerate(pool.run(passes, 4, 2)):
        assert calls == ([1] if number == 3 else [2])
