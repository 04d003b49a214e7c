"""Measure the memory of a large batch in the loss and the encoders, and whether saving it changes the gradients.

    python benchmarks/loss_memory.py

Runs each case in a process of its own and prints a JSON line for it: the most bytes that are kept for the backward
pass at a time (saved tensors, each storage once, without the inputs and the 32 bytes a row of identifiers), growth of
the resident memory at its peak, and CPU seconds of both passes. The losses take random features of 4096 pairs in
float32, with all other pairs as negatives: open_clip's, and the one from here, whole and in chunks; in chunks of
16384 pairs too. Two small towers before it go through whole and in chunks (GradCache). Then the largest difference of
a gradient to the plain loss's, in float64. Linux only.
"""

import json
import os
import subprocess
import sys
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import open_clip
import torch
import tyro
from torch import Tensor, nn

from mcl_clip.core.distributed import torch_generator
from mcl_clip.core.errors import run_program
from mcl_clip.model.grad_cache import Outputs, add_gradients
from mcl_clip.model.losses import clip_loss, find_negatives

CASES = ("open_clip", "plain", "chunked", "towers", "towers_grad_cached")
CASE_PROGRAM = "case"
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "1000000"}  # freed memory leaves the process, so that its peak is what it used
LOG_LOGIT_SCALE = 2.6592  # of 1 / 0.07


def memory(*, batch: int = 4096, large_batch: int = 16384, dim: int = 512, chunk_rows: int = 128) -> None:
    """Measure all cases.

    Args:
        batch: pairs.
        large_batch: pairs of one more case, of the loss in chunks.
        dim: width of the features.
        chunk_rows: rows of a chunk.
    """
    kept = {}
    runs: list[tuple[str, int]] = [*((case, batch) for case in CASES), ("chunked", large_batch)]
    for case, pairs in runs:
        sizes = ["--batch", str(pairs), "--dim", str(dim), "--chunk-rows", str(chunk_rows)]
        command = [sys.executable, __file__, CASE_PROGRAM, case, *sizes]
        run = subprocess.run(command, check=True, stdout=subprocess.PIPE, env={**os.environ, **GIVE_BACK})
        record = json.loads(run.stdout)
        kept[case, pairs] = record["kept_mb"]
        print(json.dumps(record), flush=True)
    print(json.dumps({"kept_by_chunked_of_plain": kept["chunked", batch] / kept["plain", batch]}), flush=True)
    for case, reference in [("open_clip", "plain"), ("chunked", "plain"), ("towers_grad_cached", "towers")]:
        mine, theirs = (gradients(name, batch, dim, chunk_rows) for name in (case, reference))
        difference = max(float((a - b).abs().max()) for a, b in zip(mine, theirs, strict=True))
        largest = max(float(gradient.abs().max()) for gradient in theirs)
        print(json.dumps({"case": case, "gradient_difference_float64": difference, "largest_gradient": largest}))


def measure(case: str, /, *, batch: int, dim: int, chunk_rows: int) -> None:
    """Measure one case in this process."""
    step(case, 2 * chunk_rows, dim, chunk_rows, torch.float32)()  # loads what loads late
    run = step(case, batch, dim, chunk_rows, torch.float32)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before, started = memory_mb("VmRSS"), time.process_time()
    run()
    seconds, growth = time.process_time() - started, memory_mb("VmHWM") - before
    inputs: Sequence[Tensor] = run.args[0]
    with kept_for_backward(inputs) as kept_bytes:
        run()
    record = {
        "case": case,
        "batch": batch,
        "dim": dim,
        "chunk_rows": chunk_rows if case in ("chunked", "towers_grad_cached") else 0,
        "kept_mb": max(kept_bytes) / 1e6,
        "peak_growth_mb": growth,
        "cpu_seconds": seconds,
    }
    print(json.dumps(record))


def gradients(case: str, batch: int, dim: int, chunk_rows: int) -> list[Tensor]:
    """Compute the gradients of a case in float64."""
    run = step(case, batch, dim, chunk_rows, torch.float64)
    run()
    return [tensor.grad for tensor in run.args[0] if tensor.grad is not None]


def step(case: str, batch: int, dim: int, chunk_rows: int, dtype: torch.dtype) -> partial[None]:
    """Run forward and backward of a case, whose first argument is the list of its inputs and parameters."""
    images, texts = (
        torch.randn(batch, dim, generator=torch_generator("loss memory", side), dtype=dtype) for side in ("i", "t")
    )
    texts = images + 3 * texts  # pairs are alike, as far as a model is half trained
    chunks = chunk_rows if case in ("chunked", "towers_grad_cached") else 0
    if case.startswith("towers"):
        model = Towers(dim).to(dtype)
        return partial(_go_through_towers, [images, texts, *model.parameters()], model, chunks)
    inputs = [nn.functional.normalize(side).requires_grad_() for side in (images, texts)]
    scale = torch.tensor(LOG_LOGIT_SCALE, dtype=dtype).exp().requires_grad_()
    loss = open_clip.ClipLoss() if case == "open_clip" else partial(_loss, chunks)
    return partial(_go_through_loss, [*inputs, scale], loss)


class Towers(nn.Module):
    """A small tower for either side."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.image, self.text = (
                nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)) for _ in range(2)
            )
        self.logit_scale = nn.Parameter(torch.tensor(LOG_LOGIT_SCALE))

    def forward(self, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
        """Features of both sides."""
        return {
            "image_features": nn.functional.normalize(images + self.image(images)),
            "text_features": nn.functional.normalize(texts + self.text(texts)),
            "logit_scale": self.logit_scale.exp(),
        }


def _loss(chunk_rows: int, images: Tensor, texts: Tensor, logit_scale: Tensor) -> Tensor:
    rows = torch.arange(len(images))
    negatives = find_negatives(
        rows=rows, groups=torch.zeros_like(rows), text_ids=rows, image_ids=rows, chunk_rows=chunk_rows
    )
    return clip_loss(images, texts, logit_scale, negatives)


def _go_through_loss(inputs: Sequence[Tensor], loss: Callable[..., Tensor]) -> None:
    torch.autograd.backward(loss(*inputs))


def _go_through_towers(inputs: Sequence[Tensor], model: nn.Module, chunk_rows: int) -> None:
    images, texts = inputs[:2]

    def encode(model: nn.Module, rows: slice) -> Outputs:
        outputs: Outputs = model(images[rows], texts[rows])
        return outputs

    def loss_of(out: Outputs) -> tuple[Tensor, dict[str, Tensor]]:
        return _loss(chunk_rows, out["image_features"], out["text_features"], out["logit_scale"]), {}

    add_gradients(model, encode, loss_of, rows=len(images), chunk_rows=chunk_rows, seed_chunk=lambda _: None)


@contextmanager
def kept_for_backward(inputs: Sequence[Tensor]) -> Iterator[list[int]]:
    """Record the bytes that autograd keeps besides `inputs`, whenever they grow."""
    holders: Counter[int] = Counter()
    sizes = {tensor.untyped_storage().data_ptr(): 0 for tensor in inputs}
    totals = [0]
    live = 0

    def release(pointer: int) -> None:
        nonlocal live
        holders[pointer] -= 1
        live -= 0 if holders[pointer] else sizes[pointer]

    def pack(tensor: Tensor) -> Tensor:
        nonlocal live
        storage = tensor.untyped_storage()
        pointer = storage.data_ptr()
        if sizes.get(pointer) != 0:  # not an input
            sizes[pointer] = storage.nbytes()
        if not holders[pointer]:
            live += sizes[pointer]
            totals.append(live)
        holders[pointer] += 1
        kept = tensor.detach()
        weakref.finalize(kept, release, pointer)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
        yield totals


def memory_mb(counter: str) -> float:
    """Read a memory counter of this process, such as VmHWM, in 10^6 bytes; here, because a test imports this file."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[counter].split()[0]) * 1024 / 1e6


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:2] == [CASE_PROGRAM]:
        del sys.argv[1]
        run_program(lambda: tyro.cli(measure))
    else:
        run_program(lambda: tyro.cli(memory, description=__doc__))
