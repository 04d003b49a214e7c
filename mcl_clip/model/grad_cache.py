"""Batches larger than memory, with exact gradients (GradCache, Gao et al., arXiv 2101.06983).

The loss needs the features of all rows at once, but not what the towers keep for backward of all rows at once:

1. The towers encode the rows in chunks and keep nothing.
2. The loss gives its gradient by the features, and by the temperature.
3. Each chunk is encoded again, with the same dropout, and goes backward from the gradient of its features.

The gradients are those of the whole batch. The price is a second forward pass.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

FEATURES = ("image_features", "text_features")  # a row for each row of the batch
TEMPERATURES = ("logit_scale", "logit_bias")  # once for all rows

Outputs = Mapping[str, Tensor]
Encode = Callable[[nn.Module, slice], Outputs]
LossOf = Callable[[Outputs], tuple[Tensor, dict[str, Tensor]]]


def add_gradients(
    model: nn.Module,
    encode: Encode,
    loss_of: LossOf,
    *,
    rows: int,
    chunk_rows: int = 0,
    seed_chunk: Callable[[int], object],
    backward: Callable[[Tensor], object] = Tensor.backward,
) -> dict[str, Tensor]:
    """Add the gradients of a loss of all rows of this process's batch; what `loss_of` counted.

    Processes may have different numbers of rows and chunks, but all or none of them must have `chunk_rows`. Under
    DistributedDataParallel gradients are synchronised once, with the last chunk.

    Args:
        model: the towers, in DistributedDataParallel or not; without batch statistics if `chunk_rows` is given.
        encode: what a model makes of some rows, named as in the output of open_clip's models.
        loss_of: the loss of the features of all rows, and its counts.
        rows: how many rows there are, 1 or more.
        chunk_rows: rows that go through the towers together; 0 is all, in a single forward and backward pass.
        seed_chunk: called with the number of a chunk before each of its forward passes, to seed dropout.
        backward: how to go backward from the loss.
    """
    if not chunk_rows:
        seed_chunk(0)
        loss, counts = loss_of(encode(model, slice(rows)))
        backward(loss)
        return counts
    chunks = [slice(start, start + chunk_rows) for start in range(0, rows, chunk_rows)]
    outputs = _without_graph(model, encode, chunks, seed_chunk)
    loss, counts = loss_of(outputs)
    backward(loss)
    gradients = {name: output.grad for name, output in outputs.items() if output.grad is not None}
    for number, chunk in enumerate(chunks):
        is_last = number == len(chunks) - 1
        with nullcontext() if is_last else _no_sync(model):
            seed_chunk(number)
            of_chunk = {name: gradients[name][chunk] for name in FEATURES}
            if is_last:
                of_chunk |= {name: gradients[name] for name in TEMPERATURES if name in gradients}
            _go_backward(encode(model, chunk), of_chunk)
    return counts


def _without_graph(
    model: nn.Module, encode: Encode, chunks: list[slice], seed_chunk: Callable[[int], object]
) -> dict[str, Tensor]:
    """The outputs for all rows, as leaves that take a gradient."""
    raw = model.module if isinstance(model, DistributedDataParallel) else model  # nothing to synchronise
    parts = []
    with torch.no_grad():
        for number, chunk in enumerate(chunks):
            seed_chunk(number)
            parts.append(encode(raw, chunk))
    outputs = {name: torch.cat([part[name] for part in parts]) for name in FEATURES}
    outputs |= {name: parts[0][name] for name in TEMPERATURES if name in parts[0]}
    return {name: output.detach().requires_grad_() for name, output in outputs.items()}


def _go_backward(outputs: Outputs, gradients: Mapping[str, Tensor]) -> None:
    """From those outputs that depend on what trains: a locked tower's do not."""
    trained = [name for name in gradients if outputs[name].requires_grad]
    torch.autograd.backward([outputs[name] for name in trained], [gradients[name] for name in trained])


def _no_sync(model: nn.Module) -> AbstractContextManager[None]:
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()
