"""Within a step, the process that trains never waits for the device, which is `meta` here: it has no values."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mcl_clip.config import TrainConfig
from mcl_clip.data import batches
from mcl_clip.model import clip
from mcl_clip.model.clip import create_clip
from mcl_clip.train import loop
from mcl_clip.train.metrics import Meter
from mcl_clip.train.optim import ExponentialAverage
from tests.training import BATCH, MODEL, ROWS, parts, write_shards

META = torch.device("meta")


class Waits(TorchDispatchMode):
    """Records what a GPU would be waited for: copies from memory that is not page-locked, copies back, and sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.found, self.pinned = [], []

    def pin(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        self.pinned.append(tensor)
        return tensor

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options = options or {}
        tensors = [value for value in arguments if isinstance(value, torch.Tensor)]
        name = function.overloadpacket.__name__
        if name == "_to_copy" and options.get("device") == META and tensors[0].device != META:
            is_pinned = any(tensor is tensors[0] for tensor in self.pinned)
            if not (is_pinned and options.get("non_blocking")):
                self.found.append(f"copy of {tuple(tensors[0].shape)}")
        if name in ("_local_scalar_dense", "nonzero", "_unique2", "masked_select") and tensors[0].device == META:
            self.found.append(name)
        return function(*arguments, **options)


@pytest.fixture
def waits(monkeypatch):
    """Counts waits; a tensor made from a list on the device is one as well."""
    mode, tensor = Waits(), torch.tensor

    def from_list(data, *arguments, device=None, **options):
        if device == META:
            mode.found.append(f"tensor of {data}")
        return tensor(data, *arguments, device=device, **options)

    monkeypatch.setattr(torch, "tensor", from_list)
    monkeypatch.setattr(batches, "pin", mode.pin)
    monkeypatch.setattr(loop, "pin", mode.pin)
    return mode


@pytest.mark.parametrize("changes", [{}, {"grad_cache_rows": 3, "mask_duplicates": False}, {"loss_chunk_rows": 2}])
def test_a_step_does_not_wait_for_the_device(waits, tmp_path, changes: Mapping):
    make_loader, bundle = parts(write_shards(tmp_path / "shards"))
    model: nn.Module = create_clip(model_cfg=MODEL, seed=1).model.to(META)
    config = replace(TrainConfig(steps=2, global_batch_size=BATCH, lr=1e-3), **changes)
    meter = Meter(loop.COUNTS, META, num_groups=3)
    average = ExponentialAverage(model, 0.9)
    groups = torch.arange(ROWS).numpy() % 3
    clip._per_channel.cache_clear()
    for step, batch in enumerate(make_loader().steps(0, 2)):
        waits.pinned += [
            value for value in vars(batch).values() if isinstance(value, torch.Tensor)
        ]  # by the DataLoader
        with waits:
            joined = batches.join_parts((batch, batch), META)
            counts = loop.forward_backward(
                model,
                joined,
                groups=groups,
                preprocess_cfg=bundle.preprocess_cfg,
                config=config,
                device=META,
                seed=("a", step),
            )
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            loop.clamp_logit_scale_(model)
            average.update(model, step + 1)
            meter.add(counts)
        if step == 0:  # mean and standard deviation come to the device once
            assert len(waits.found) == 2
            waits.found.clear()
    assert waits.found == []


def test_each_way_to_wait_is_found(waits):
    with waits:
        torch.zeros(2).to(META)
        waits.pin(kept := torch.zeros(3), META).to(META)
        kept.to(META, non_blocking=True)
        torch.tensor([1.0], device=META)
    assert waits.found == ["copy of (2,)", "copy of (3,)", "tensor of [1.0]"]
