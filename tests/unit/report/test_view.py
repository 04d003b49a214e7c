"""Which training pairs stand for all."""

import numpy as np
import pytest

from mcl_clip.report.view import SAMPLE_BLOCKS, sample_rows


def test_small_data_is_looked_at_whole():
    assert sample_rows([3, 0, 4], 20).tolist() == list(range(7))


@pytest.mark.parametrize("shards", [[1_000_000], [10_000] * 100, [1] * 30_000])
def test_of_large_data_blocks_are_taken_evenly(shards):
    total = sum(shards)
    rows = sample_rows(shards, 20_000)
    assert len(rows) == 20_000
    assert rows[0] == 0
    assert rows[-1] == total - 1
    assert (np.diff(rows) > 0).all()
    assert np.count_nonzero(np.diff(rows) > 1) < SAMPLE_BLOCKS
    tenths = np.bincount(rows * 10 // total, minlength=10)
    assert tenths.min() > 0.8 * 2000


def test_a_sample_may_be_smaller_than_the_number_of_blocks():
    assert len(sample_rows([100], 10)) == 10
