"""One model from the weights of several: the mean over stages, or a way between a stage and what it started from."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mcl_clip.core.errors import UserError
from mcl_clip.model.clip import ClipBundle


def mix_weights(towers: Sequence[ClipBundle], shares: Sequence[float]) -> ClipBundle:
    """The model whose weights are the weighted mean of those of `towers`; it takes the first one over.

    Equal shares give a uniform soup (Wortsman et al., arXiv 2203.05482), two towers WiSE-FT (arXiv 2109.01903). This
    makes sense for towers that were fine-tuned from the same weights only. The mean is taken in float64; what is not a
    number with decimals, such as a counter, is that of the last tower.

    Args:
        towers: of equal settings.
        shares: one for each, with the sum 1.

    Raises:
        UserError: if the towers have other settings or weights of other shapes.
    """
    if len(towers) != len(shares) or not math.isclose(sum(shares), 1):
        raise ValueError(f"shares {list(shares)} are not one for each of {len(towers)} towers with the sum 1")
    first, states = towers[0], [tower.model.state_dict() for tower in towers]
    for tower, state in zip(towers[1:], states[1:], strict=True):
        shapes = [{name: value.shape for name, value in each.items()} for each in (states[0], state)]
        if tower.model_cfg != first.model_cfg or shapes[0] != shapes[1]:
            raise UserError("weights of models with different settings cannot be averaged; use stages of one run")
    mixed = {name: _mean([state[name] for state in states], shares) for name in states[0]}
    first.model.load_state_dict(mixed)
    return replace(first)


def _mean(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    if not tensors[0].is_floating_point():
        return tensors[-1]
    if all(torch.equal(tensor, tensors[0]) for tensor in tensors[1:]):
        return tensors[0]  # locked weights stay what they are, to the bit
    total = torch.stack([share * tensor.double() for tensor, share in zip(tensors, shares, strict=True)]).sum(0)
    return total.to(tensors[0].dtype)
