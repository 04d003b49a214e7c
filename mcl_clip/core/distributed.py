"""Process group, collectives and named random streams.

Every function works without a process group, as a world of one process.
"""

import hashlib
import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor

from mcl_clip.core.errors import UserError

Name = str | int
LONGEST_PAUSE_S = 0.5  # between two looks at what another process has done
SAMPLE_BLOCK = 1 << 17  # random words that are drawn at a time
T = TypeVar("T")


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the rank of this process, 0 on the main process."""
    return dist.get_rank() if world_size() > 1 else 0


def is_main() -> bool:
    """Return whether this is process 0, the one that writes files and prints."""
    return rank() == 0


def place_on_node() -> tuple[int, bool]:
    """Return the number of this node, which is the rank of its first process, and whether this process is that one."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0")) if world_size() > 1 else 0
    return rank() - local_rank, local_rank == 0


def count_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_memory() -> int:
    """Return the largest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10  # kilobytes elsewhere


def barrier() -> None:
    """Wait for all processes, however long they take."""
    if world_size() > 1:
        store = dist.distributed_c10d._get_default_store()
        name = _next_name(store, "barrier")
        if store.add(f"{name}/arrived", 1) == world_size():
            store.set(f"{name}/done", "")
        _wait_for(store, f"{name}/done")


def _next_name(store: Any, what: str) -> str:
    """Return a name that is equal on all processes for the n-th call of each, and new for every call."""
    return f"mcl_clip/{what}/{store.add(f'mcl_clip/{what}-of-{rank()}', 1)}"


def _wait_for(store: Any, key: str) -> None:
    """Wait until a process sets `key`.

    A collective would end the job after its time limit, and on GPUs keep them busy; the store has no limit, and fails
    at once if the process that holds it is gone.
    """
    pause_s = 0.001
    while not store.check([key]):
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def shared_counter(what: str) -> Callable[[Name, int], int]:
    """Return `add(key, amount)`, which adds to a number that all processes share and returns the sum.

    Numbers start at 0 in each call, which is collective but waits for nobody; `add` is not collective.
    """
    if world_size() == 1:
        sums = Counter[Name]()

        def add(key: Name, amount: int) -> int:
            sums[key] += amount
            return sums[key]

        return add
    store = dist.distributed_c10d._get_default_store()
    name = _next_name(store, what)
    return lambda key, amount: int(store.add(f"{name}/{key}", amount))


def claim(items: Sequence[T], sizes: Sequence[int]) -> Iterator[T]:
    """Yield the items that this process is to work on; every item is claimed by one process, when it is next.

    A process starts with neighboring items, an equal share of the sum of `sizes`, and then takes what slower processes
    have not claimed yet from theirs. A collective call, with equal arguments, that waits for nobody.
    """
    claimed = shared_counter("claim")
    middles = np.cumsum(sizes) - np.array(sizes) / 2  # an item is in the share that its middle falls into
    borders = np.searchsorted(middles * world_size(), np.arange(1, world_size()) * sum(sizes))
    ends = [0, *borders.tolist(), len(items)]

    def unclaimed() -> Iterator[T]:
        for owner in (*range(rank(), world_size()), *range(rank())):
            start, stop = ends[owner : owner + 2]
            while (number := start + claimed(owner, 1) - 1) < stop:
                yield items[number]

    return unclaimed()


def seed_of(*name: Name) -> int:
    """Return the 63-bit seed of the random stream `name`, equal on every machine and in every version."""
    digest = hashlib.blake2b(repr(name).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def random_words(size: int, *name: Name) -> np.ndarray:
    """Return the first `size` raw 64-bit Philox words of the random stream `name`, shape [size], uint64.

    Raw words are fixed by the algorithm; numpy's distributions may change with an upgrade.
    """
    return random_words_between(0, size, *name)


def random_words_between(start: int, stop: int, *name: Name) -> np.ndarray:
    """Return `random_words(stop, *name)[start:]` without generating the words before `start`."""
    bits = np.random.Philox(key=seed_of(*name))
    bits.advance(start // 4)  # in blocks of four words
    words: np.ndarray = bits.random_raw(stop - start + start % 4)[start % 4 :]
    return words


def permutation(size: int, *name: Name) -> np.ndarray:
    """Return a permutation of 0..size-1 from the random stream `name`, shape [size], int64."""
    return np.argsort(random_words(size, *name), kind="stable")


def sample_of_permutation(size: int, count: int, *name: Name) -> np.ndarray:
    """Return `np.sort(permutation(size, *name)[:count])`, in memory that depends on `count` alone."""
    words, rows, step = np.empty(0, np.uint64), np.empty(0, np.int64), max(count, SAMPLE_BLOCK)
    for start in range(0, size if count else 0, step):
        drawn = random_words_between(start, min(start + step, size), *name)
        is_full = len(words) == count  # then `words` ascend, and of equal words the first row is kept
        near = np.flatnonzero(drawn < words[-1]) if is_full else np.arange(len(drawn))
        words, rows = np.concatenate([words, drawn[near]]), np.concatenate([rows, start + near])
        lowest = np.argsort(words, kind="stable")[:count]
        words, rows = words[lowest], rows[lowest]
    rows.sort()
    return rows


def torch_generator(*name: Name) -> torch.Generator:
    """Return a CPU generator seeded by `name`."""
    return torch.Generator().manual_seed(seed_of(*name))


class _GatherWithGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        ctx.rows = local.shape[0]
        return gather(local)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].clone(memory_format=torch.contiguous_format)  # autograd may still use the original
        if dist.get_backend() == "nccl":
            mine = torch.empty_like(grad[: ctx.rows])
            dist.reduce_scatter_tensor(mine, grad)
            return mine
        dist.all_reduce(grad)
        return grad[rank() * ctx.rows : (rank() + 1) * ctx.rows]


def gather_with_grad(local: Float[Tensor, "local *dim"]) -> Float[Tensor, "total *dim"]:
    """Concatenate the rows of all processes in rank order, with gradient.

    The gradient of a row is summed over processes and returned to the process that owns the row. All processes must
    have the same number of rows.
    """
    if world_size() == 1:
        return local
    gathered: Tensor = _GatherWithGrad.apply(local)
    return gathered


def gather(local: Shaped[Tensor, "local *dim"]) -> Shaped[Tensor, "total *dim"]:
    """Concatenate the rows of all processes in rank order, without gradient; the same number of rows on each."""
    if world_size() == 1:
        return local
    local = local.contiguous()
    parts = [torch.empty_like(local) for _ in range(world_size())]
    dist.all_gather(parts, local)
    return torch.cat(parts)


def all_reduce_sum(value: Shaped[Tensor, "*dim"]) -> Shaped[Tensor, "*dim"]:
    """Sum over processes, in place and without gradient."""
    if world_size() > 1:
        dist.all_reduce(value)
    return value


def gather_objects(value: T) -> list[T]:
    """Return the values of all processes in rank order, on every process. Values are pickled, so keep them small."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def on_main(make: Callable[[], T]) -> T:
    """Run `make()` on the main process, however long it takes, and return its result on every process.

    Raises:
        UserError: on every process, if `make` raised one.
        RuntimeError: on the other processes, if `make` raised another error.
    """
    if world_size() == 1:
        return make()
    outcome: list[Any] = [None, None]  # the result, and the failure
    own: Exception | None = None
    store = dist.distributed_c10d._get_default_store()
    key = _next_name(store, "on-main")
    if is_main():
        try:
            outcome[0] = make()
        except UserError as error:
            own = outcome[1] = error.on_every_process()
        except Exception as error:
            own, outcome[1] = error, RuntimeError(f"the main process failed: {error}")
        store.set(key, "")
    _wait_for(store, key)
    dist.broadcast_object_list(outcome)
    if own is not None or outcome[1] is not None:
        raise own or outcome[1]
    return outcome[0]  # type: ignore[no-any-return]


def check_same(value: str, what: str) -> None:
    """Raise UserError on all processes if a value is not equal on them; name `what`, and the processes that differ."""
    values = gather_objects(value)
    different = [number for number, other in enumerate(values) if other != values[0]]
    if different:
        raise UserError(
            f"{what} differs between process 0 ({values[0]}) and processes {different}; all processes must see "
            f"the same shards, recipe and package versions"
        ).on_every_process()
