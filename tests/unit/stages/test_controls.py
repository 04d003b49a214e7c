import numpy as np
import pytest

from mcl_clip.runs.controls import equal_compute_steps, shuffled_groups


def test_equal_compute_counts_training_images_and_a_third_for_each_embedded_row():
    # 3 x 300 steps of 128, and 3 x 12,000 rows forward only: 900 + 12,000 / 128 steps
    assert equal_compute_steps([(300, 128)] * 3, rows=12_000, global_batch_size=128) == 994
    assert equal_compute_steps([(300, 128)] * 3, rows=0, global_batch_size=128) == 900
    assert equal_compute_steps([(100, 64), (100, 128)], rows=0, global_batch_size=32) == 600
    assert equal_compute_steps([(0, 128), (10, 128)], rows=0, global_batch_size=128) == 10


@pytest.mark.parametrize("stage", [1, 2])
def test_random_groups_keep_all_sizes_and_hold_out_the_same_rows(stage):
    groups = np.repeat([0, 1, 2, -1], [500, 300, 40, 60])[np.random.default_rng(0).permutation(900)]
    shuffled = shuffled_groups(groups, name=(0, stage, "random groups"))
    assert np.array_equal(shuffled == -1, groups == -1)
    assert np.array_equal(np.bincount(shuffled + 1), np.bincount(groups + 1))
    same = (shuffled == groups)[groups >= 0].mean()
    assert same == pytest.approx((500**2 + 300**2 + 40**2) / 840**2, abs=0.06)  # as for independent labels
    assert np.array_equal(shuffled, shuffled_groups(groups, name=(0, stage, "random groups")))
    assert not np.array_equal(shuffled, shuffled_groups(groups, name=(1, stage, "random groups")))
