import os
import time
from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from mcl_clip.core.distributed import (
    barrier,
    check_same,
    claim,
    gather,
    gather_objects,
    gather_with_grad,
    is_main,
    on_main,
    place_on_node,
    rank,
    world_size,
)
from mcl_clip.core.errors import UserError
from mcl_clip.runs.phase import StaleArtifactError


def gathered_gradients(backend: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each process weighs all rows in its own way; the same gathered tensor's gradient is used twice."""
    local = torch.arange(6.0).view(3, 2).T.clone().mul(rank() + 1).requires_grad_()
    other = torch.ones(2, 3, requires_grad=True)
    transposed = local.T.contiguous().T  # not contiguous
    weights = torch.arange(6.0 * world_size()).view(-1, 3) * (rank() + 1)
    with ExitStack() as patches:
        # gloo has the collectives of nccl, too, which takes contiguous tensors alone
        patches.enter_context(patch("torch.distributed.get_backend", return_value=backend))
        for name in ("all_gather", "all_reduce", "reduce_scatter_tensor"):
            patches.enter_context(patch.object(dist, name, partial(collect, getattr(dist, name))))
        ((gather_with_grad(transposed) + gather_with_grad(other)).T * weights.T).sum().backward()
        return gather(local.detach()), local.grad, other.grad


def collect(collective, *arguments) -> None:
    tensors = [each for argument in arguments for each in (argument if isinstance(argument, list) else [argument])]
    assert all(tensor.is_contiguous() for tensor in tensors)
    collective(*arguments)


@pytest.mark.parametrize(("size", "backend"), [(1, "gloo"), (2, "gloo"), (4, "gloo"), (2, "nccl"), (4, "nccl")])
def test_the_gradient_of_a_gathered_row_is_the_sum_over_processes(pool, size, backend):
    once = torch.arange(6.0).view(3, 2).T
    total = sum(range(1, size + 1)) * torch.arange(6.0 * size).view(size, 2, 3)
    for number, (rows, first, second) in enumerate(pool.run(gathered_gradients, size, backend)):
        assert torch.equal(rows, torch.cat([once * (n + 1) for n in range(size)]))
        assert torch.equal(first, total[number])
        assert torch.equal(second, total[number])


def outcome(kind: str) -> tuple[str, str, bool]:
    def make() -> str:
        if kind == "user":
            raise StaleArtifactError("the seed was 1 and is now 2")
        if kind == "other":
            raise KeyError("lost")
        return f"made by {rank()}"

    try:
        return "", on_main(make), False
    except Exception as error:
        return type(error).__name__, str(error), getattr(error, "everywhere", False)


def test_what_the_main_process_makes_or_fails_at_reaches_all(pool):
    assert pool.run(outcome, 2, "fine") == [("", "made by 0", False)] * 2
    message = "the seed was 1 and is now 2"
    assert pool.run(outcome, 2, "user") == [("StaleArtifactError", message, True)] * 2
    first, second = pool.run(outcome, 2, "other")
    assert first == ("KeyError", "'lost'", False)
    assert second == ("RuntimeError", "the main process failed: 'lost'", False)
    assert pool.run(outcome, 1, "user") == [("StaleArtifactError", message, False)]


def agree(values: list[str]) -> str:
    try:
        check_same(values[rank()], "the plan of epoch 3")
    except UserError as error:
        return str(error) if error.everywhere else "on this process alone"
    return ""


def test_a_value_that_differs_stops_all_processes(pool):
    assert pool.run(agree, 4, ["a"] * 4) == [""] * 4
    for message in pool.run(agree, 4, ["a", "a", "b", "a"]):
        assert message.startswith("the plan of epoch 3 differs between process 0 (a) and processes [2]")


def objects() -> tuple[list[int], bool]:
    return gather_objects(rank() * 10), is_main()


def test_objects_come_in_rank_order(pool):
    assert pool.run(objects, 4) == [([0, 10, 20, 30], number == 0) for number in range(4)]


def place(processes_of_node: int) -> tuple[int, bool]:
    with patch.dict(os.environ, LOCAL_RANK=str(rank() % processes_of_node)):
        return place_on_node()


def test_the_first_process_of_a_node_gives_the_node_its_number(pool):
    assert pool.run(place, 4, 2) == [(0, True), (0, False), (2, True), (2, False)]
    assert pool.run(place, 1, 1) == [(0, True)]
    with patch.dict(os.environ, LOCAL_RANK="1"):  # left by a launcher, though no process group was made
        assert place_on_node() == (0, True)


def wait_longer_than_a_collective_may(store: str) -> str:
    number, size = rank(), world_size()
    dist.destroy_process_group()
    limit = timedelta(seconds=1)
    dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=number, world_size=size, timeout=limit)
    made = on_main(lambda: time.sleep(2) or "made")
    if number == 1:
        time.sleep(2)
    barrier()
    return made


def test_waiting_for_one_process_has_no_time_limit(pool, tmp_path):
    assert pool.run(wait_longer_than_a_collective_may, 3, str(tmp_path / "store")) == ["made"] * 3


def order_of_a_barrier() -> list[tuple[float, float]]:
    times = []
    for late in (0, 1):
        time.sleep(0.3 * (rank() == late))
        before = time.time()
        barrier()
        times.append((before, time.time()))
    return times


def test_nobody_passes_a_barrier_before_the_last_one_arrives(pool):
    for calls in zip(*pool.run(order_of_a_barrier, 3), strict=True):
        assert min(after for _, after in calls) >= max(before for before, _ in calls)


def claimed(sizes: list[int], slow: int) -> tuple[int, list[int]]:
    """The first item of this process, and all others; the slow one is not done with its first before all are."""
    items = claim(range(len(sizes)), sizes)
    first = next(items)
    barrier()  # everybody has one
    others = [] if rank() == slow else list(items)
    barrier()
    return first, others


@pytest.mark.parametrize("slow", [0, 2])
def test_items_of_a_slow_process_are_taken_by_the_others(pool, slow):
    shares = pool.run(claimed, 4, [1] * 20, slow)
    assert [first for first, _ in shares] == [0, 5, 10, 15]
    assert sorted(item for first, others in shares for item in (first, *others)) == list(range(20))
    assert shares[slow][1] == []


def test_first_shares_are_neighbors_of_equal_size(pool):
    assert [first for first, _ in pool.run(claimed, 3, [1, 1, 1, 1, 4, 4], 0)] == [0, 4, 5]
    assert pool.run(claimed, 1, [3, 0, 1], 1) == [(0, [1, 2])]
