import os

import numpy as np
import pytest
import torch

from mcl_clip.core import distributed
from mcl_clip.core.distributed import (
    count_cores,
    peak_memory,
    permutation,
    sample_of_permutation,
    seed_of,
    torch_generator,
)


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
@pytest.mark.parametrize(("size", "count"), [(0, 3), (5, 0), (5, 9), (300, 1), (300, 40), (301, 300)])
def test_a_sample_is_the_start_of_a_permutation(monkeypatch, block, size, count):
    monkeypatch.setattr(distributed, "SAMPLE_BLOCK", block)
    expected = np.sort(permutation(size, "rows", 3)[:count])
    np.testing.assert_array_equal(sample_of_permutation(size, count, "rows", 3), expected)


def test_a_sample_keeps_the_first_of_equal_words(monkeypatch):
    monkeypatch.setattr(distributed, "SAMPLE_BLOCK", 4)
    words = np.random.default_rng(0).integers(0, 5, 60).astype(np.uint64)
    monkeypatch.setattr(distributed, "random_words_between", lambda start, stop, *name: words[start:stop])
    for count in (1, 9, 30):
        assert sample_of_permutation(60, count, "rows").tolist() == sorted(permutation(60, "rows")[:count].tolist())


def test_a_generator_is_seeded_by_its_whole_name():
    assert torch_generator("start", 3).initial_seed() == seed_of("start", 3)
    one, same, other = (torch.randn(3, generator=torch_generator("start", number)) for number in (3, 3, 4))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_only_the_cores_that_this_process_may_use_are_counted(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5, 7}, raising=False)
    assert count_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    assert count_cores() == 64


def test_the_peak_of_memory_is_that_of_this_process_in_bytes():
    held = np.ones(25_000_000)
    assert held.nbytes < peak_memory() < 2**40
