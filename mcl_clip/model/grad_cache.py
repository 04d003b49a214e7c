"""Exact gradients of batches larger than memory (GradCache, Gao et al., arXiv 2101.06983).

The loss L needs the features f_i of all rows at once, but the encoders' activations of one chunk at a time suffice, as
dL/dtheta = sum_i dL/df_i df_i/dtheta:

1. Encode the rows in chunks without a graph.
2. Compute the loss and its gradients with respect to the features and the temperature.
3. Encode each chunk again, with the same dropout, and backpropagate the gradients of its features.

The gradients are those of the whole batch, at the price of a second forward pass.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

DECODED = "decoded_features"
FEATURES = ("image_features", "text_features", "negative_features", DECODED)  # by row of the batch; the last two if any
TEMPERATURES = ("logit_scale", "logit_bias")  # shared by all rows

Outputs = Mapping[str, Tensor]


def add_gradients(
    model: nn.Module,
    encode: Callable[[nn.Module, slice], Outputs],
    loss_of: Callable[[Outputs], tuple[Tensor, dict[str, Tensor]]],
    *,
    rows: int,
    chunk_rows: int = 0,
    seed_chunk: Callable[[int], object],
    backward: Callable[[Tensor], object] = Tensor.backward,
) -> dict[str, Tensor]:
    """Accumulate the gradients of a loss over all rows of this process's batch; return the counts of `loss_of`.

    Processes may have different numbers of rows and chunks, but `chunk_rows` must be given on all of them or on none.
    Under DistributedDataParallel, gradients are synchronized once, with the last chunk.

    Args:
        model: the model, wrapped in DistributedDataParallel or not; without batch norm if `chunk_rows` is given.
        encode: runs a model on a slice of rows; its outputs have the names of open_clip's models.
        loss_of: computes the loss and its counts from the outputs of all rows.
        rows: number of rows, 1 or more.
        chunk_rows: rows encoded together; 0 is all, in a single forward and backward pass.
        seed_chunk: called with the chunk number before each forward pass of the chunk, to seed dropout.
        backward: backpropagates from the loss.
    """
    if not chunk_rows:
        seed_chunk(0)
        loss, counts = loss_of(encode(model, slice(rows)))
        backward(loss)
        return counts
    parallel = model if isinstance(model, DistributedDataParallel) else None
    chunks = [slice(start, start + chunk_rows) for start in range(0, rows, chunk_rows)]
    parts = []
    with torch.no_grad():
        for number, chunk in enumerate(chunks):
            seed_chunk(number)
            parts.append(encode(parallel.module if parallel else model, chunk))  # nothing to synchronize
    outputs = {name: torch.cat([part[name] for part in parts]) for name in FEATURES if name in parts[0]}
    outputs |= {name: parts[0][name] for name in TEMPERATURES if name in parts[0]}
    outputs = {name: output.detach().requires_grad_() for name, output in outputs.items()}
    loss, counts = loss_of(outputs)
    backward(loss)
    gradients = {name: output.grad for name, output in outputs.items() if output.grad is not None}
    for number, chunk in enumerate(chunks):
        is_last = number == len(chunks) - 1
        with parallel.no_sync() if parallel and not is_last else nullcontext():
            seed_chunk(number)
            chunk_gradients = {name: gradients[name][chunk] for name in FEATURES if name in gradients}
            if is_last:
                chunk_gradients |= {name: gradients[name] for name in TEMPERATURES if name in gradients}
            chunk_outputs = encode(model, chunk)
            # The outputs of a locked tower have no graph.
            trained = [name for name in chunk_gradients if chunk_outputs[name].requires_grad]
            torch.autograd.backward(
                [chunk_outputs[name] for name in trained], [chunk_gradients[name] for name in trained]
            )
    return counts
