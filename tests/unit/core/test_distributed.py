import numpy as np
import pytest

from mcl_clip.core import distributed
from mcl_clip.core.distributed import permutation, sample_of_permutation


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
