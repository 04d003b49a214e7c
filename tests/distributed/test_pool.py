import time

import pytest
import torch
import torch.distributed as dist

from mcl_clip.core.distributed import rank, world_size
from tests.distributed.pool import Pool


def who() -> tuple[int, int, int]:
    total = torch.ones(1)
    if world_size() > 1:
        dist.all_reduce(total)
    return rank(), world_size(), int(total)


def fail_on(bad: int) -> None:
    if rank() == bad:
        raise ValueError(f"rank {bad} is broken")
    dist.barrier()


def sleep_on(sleepy: int) -> None:
    if rank() == sleepy:
        time.sleep(100)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_job_sees_its_own_process_group(pool, size):
    assert pool.run(who, size) == [(number, size, size) for number in range(size)]


def test_tracebacks_of_all_ranks_are_joined_and_the_pool_goes_on(pool):
    with pytest.raises(RuntimeError, match=r"(?s)rank 0:.*barrier.*rank 1:.*ValueError: rank 1 is broken"):
        pool.run(fail_on, 2, 1)
    assert len(pool.run(who, 2)) == 2


def test_a_stuck_job_names_its_ranks_and_shows_where_they_are(tmp_path):
    pool = Pool(tmp_path, timeout_s=4.0)
    try:
        with pytest.raises(TimeoutError, match=r"(?s)ranks \[0\] did not finish in 4.0 s.*sleep_on"):
            pool.run(sleep_on, 1, 0)
    finally:
        pool.close()
