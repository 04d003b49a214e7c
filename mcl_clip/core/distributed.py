"""Processes, collectives and named seeds.

Every function works without a process group, as a world of one process.
"""

import hashlib
import os
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor

from mcl_clip.core.errors import UserError

Name = str | int
T = TypeVar("T")


def is_initialized() -> bool:
    """Whether there is a process group; without one all helpers act for one process."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Number of this process, 0 on the main process."""
    return dist.get_rank() if is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if is_initialized() else 1


def is_main() -> bool:
    """Whether this is process 0, the one that writes files and prints."""
    return rank() == 0


def count_cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def barrier() -> None:
    """Wait for all processes."""
    if is_initialized():
        dist.barrier()


def seed_of(*name: Name) -> int:
    """A 63-bit seed for the draw called `name`, equal on every machine and in every version."""
    digest = hashlib.blake2b(repr(name).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def random_words(size: int, *name: Name) -> np.ndarray:
    """`size` raw 64-bit Philox words for the draw called `name`, shape [size], uint64.

    Raw words are the algorithm itself; unlike numpy's distributions they cannot change with an upgrade.
    """
    words: np.ndarray = np.random.Philox(key=seed_of(*name)).random_raw(size)
    return words


def random_words_between(start: int, stop: int, *name: Name) -> np.ndarray:
    """`random_words(stop, *name)[start:]`, without drawing those before."""
    bits = np.random.Philox(key=seed_of(*name))
    bits.advance(start // 4)  # it counts fours
    words: np.ndarray = bits.random_raw(stop - start + start % 4)[start % 4 :]
    return words


def permutation(size: int, *name: Name) -> np.ndarray:
    """A permutation of 0..size-1 for the draw called `name`, shape [size], int64."""
    return np.argsort(random_words(size, *name), kind="stable")


def torch_generator(*name: Name) -> torch.Generator:
    """A CPU generator for the draw called `name`."""
    return torch.Generator().manual_seed(seed_of(*name))


class _GatherWithGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        ctx.rows = local.shape[0]
        return gather(local)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].clone(memory_format=torch.contiguous_format)  # autograd may still use the one it gave
        if dist.get_backend() == "nccl":
            mine = torch.empty_like(grad[: ctx.rows])
            dist.reduce_scatter_tensor(mine, grad)
            return mine
        dist.all_reduce(grad)
        return grad[rank() * ctx.rows : (rank() + 1) * ctx.rows]


def gather_with_grad(local: Float[Tensor, "local *dim"]) -> Float[Tensor, "total *dim"]:
    """Rows of all processes in rank order; the gradient of each row returns to the process that owns it.

    The gradient is the sum over processes. Every process must hold the same number of rows.
    """
    if world_size() == 1:
        return local
    gathered: Tensor = _GatherWithGrad.apply(local)
    return gathered


def gather(local: Shaped[Tensor, "local *dim"]) -> Shaped[Tensor, "total *dim"]:
    """Rows of all processes in rank order, without gradient. Equal numbers of rows on each process."""
    if world_size() == 1:
        return local
    local = local.contiguous()
    parts = [torch.empty_like(local) for _ in range(world_size())]
    dist.all_gather(parts, local)
    return torch.cat(parts)


def all_reduce_sum(value: Shaped[Tensor, "*dim"]) -> Shaped[Tensor, "*dim"]:
    """The sum over processes, without gradient, in place."""
    if world_size() > 1:
        dist.all_reduce(value)
    return value


def gather_objects(value: T) -> list[T]:
    """The values of all processes in rank order, on every process. Small things only: they are pickled."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def on_main(make: Callable[[], T]) -> T:
    """The result of `make()` run on the main process, on every process.

    Raises:
        UserError: on every process, if `make` raised one.
        RuntimeError: on the other processes, if `make` failed in another way.
    """
    if world_size() == 1:
        return make()
    outcome: list[Any] = [None, None]
    failure: Exception | None = None
    if is_main():
        try:
            outcome[0] = make()
        except Exception as error:
            failure = error.on_every_process() if isinstance(error, UserError) else error
            outcome[1] = (isinstance(error, UserError), f"{error}")
    dist.broadcast_object_list(outcome)
    if failure is not None:
        raise failure
    if outcome[1] is not None:
        is_user_error, message = outcome[1]
        if is_user_error:
            raise UserError(message).on_every_process()
        raise RuntimeError(f"the main process failed: {message}")
    return outcome[0]  # type: ignore[no-any-return]


def check_same(value: str, what: str) -> None:
    """Stop when a value that must be equal everywhere is not.

    Raises:
        UserError: naming `what` and the processes that differ from the main process.
    """
    values = gather_objects(value)
    different = [number for number, other in enumerate(values) if other != values[0]]
    if different:
        raise UserError(
            f"{what} differs between process 0 ({values[0]}) and processes {different}; all processes must see "
            f"the same shards, recipe and package versions"
        ).on_every_process()
