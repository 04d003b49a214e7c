"""A model that fulfils the contract trains on several processes without a search for unused parameters."""

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from mcl_clip.model.clip import create_clip
from mcl_clip.model.prepare import check_contract, lock, reference_features
from tests.unit.model.test_prepare import CLIP, COCA


def train(cfg, patterns) -> dict[str, list[float]]:
    """Train some steps as on GPUs, and return the temperature and whether any locked weight moved."""
    clip = create_clip(model_cfg=cfg)
    lock(clip.model, patterns=patterns)
    check_contract(clip, reference_features(clip), name="tower", stage=0)
    model = DistributedDataParallel(clip.model)
    optimizer = torch.optim.SGD([p for p in clip.model.parameters() if p.requires_grad], lr=0.1)
    # Compared as bits: open_clip leaves the projection of CoCa's decoder uninitialized, so that it may hold NaN.
    before = {name: p.detach().view(torch.int32).clone() for name, p in clip.model.named_parameters()}
    for _ in range(3):
        out = model(torch.randn(2, 3, 32, 32), clip.tokenizer(["a", "two dogs"]))
        (out["image_features"] @ out["text_features"].T * out["logit_scale"]).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    after = ((name, p.detach().view(torch.int32)) for name, p in clip.model.named_parameters())
    return {name: not torch.equal(bits, before[name]) for name, bits in after}


@pytest.mark.parametrize(("cfg", "patterns"), [(CLIP, ()), (COCA, ("^text_decoder",))], ids=["clip", "coca"])
def test_all_that_trains_moves_on_two_processes(pool, cfg, patterns):
    first, second = pool.run(train, 2, cfg, patterns)
    assert first == second
    assert all(moved != name.startswith("text_decoder") for name, moved in first.items())
