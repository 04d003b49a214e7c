"""Average the weights of models: uniform soups, and interpolation with the initial weights (WiSE-FT)."""

import math
from collections.abc import Sequence

import torch

from mcl_clip.core.errors import UserError
from mcl_clip.model.clip import ClipBundle


def mix_weights(clips: Sequence[ClipBundle], shares: Sequence[float]) -> ClipBundle:
    """Average the weights of models into the first one, and return it.

    Equal shares give a uniform soup (Wortsman et al., arXiv 2203.05482), two models WiSE-FT (arXiv 2109.01903). Only
    models that were fine-tuned from the same weights can be averaged meaningfully. The mean is computed in float64;
    integers, such as counters of batch norm, are those of the last model. The shares sum to 1.

    Raises:
        UserError: if the models have different settings or shapes of weights.
    """
    if len(clips) != len(shares) or not math.isclose(sum(shares), 1):
        raise ValueError(f"shares {list(shares)} must be one for each of {len(clips)} models, with the sum 1")
    first, states = clips[0], [clip.model.state_dict() for clip in clips]
    shapes = [{name: value.shape for name, value in state.items()} for state in states]
    if any(clip.model_cfg != first.model_cfg for clip in clips) or any(other != shapes[0] for other in shapes):
        raise UserError("weights of models with different settings cannot be averaged; use stages of one run")
    mixed = {}
    for name, tensor in states[0].items():
        tensors = [state[name] for state in states]
        if not tensor.is_floating_point():
            mixed[name] = tensors[-1]
        elif all(torch.equal(other, tensor) for other in tensors[1:]):
            mixed[name] = tensor  # locked weights stay bit-identical
        else:
            terms = [share * value.double() for value, share in zip(tensors, shares, strict=True)]
            mixed[name] = torch.stack(terms).sum(0).to(tensor.dtype)
    first.model.load_state_dict(mixed)
    return first
