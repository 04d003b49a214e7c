"""Curves of a training from its records."""

import numpy as np

from mcl_clip.report.training import MAX_POINTS, _curves, _with_shares


def test_stages_follow_each_other_on_one_axis():
    records = [[{"step": 10, "loss": 3.0}, {"step": 20, "loss": 2.0}], [{"step": 10, "loss": 1.0}]]
    first, second = _curves(records, [0, 20], "loss")
    assert first.steps.tolist() == [10, 20]
    assert first.values.tolist() == [3, 2]
    assert second.stage == 1
    assert second.steps.tolist() == [30]


def test_long_trainings_are_thinned_to_means():
    records = [[{"step": step, "loss": float(step)} for step in range(1, 100_001)]]
    (curve,) = _curves(records, [0], "loss")
    assert len(curve.steps) == MAX_POINTS
    assert np.allclose(curve.steps, curve.values)
    assert np.isclose(curve.values.mean(), 50_000.5, rtol=1e-3)


def test_what_was_not_recorded_has_no_curve():
    assert not _curves([[{"step": 1, "loss": 2.0}], []], [0, 5], "logit_scale")


def test_duplicates_are_for_each_row_since_the_last_record():
    steps = [{"step": 2, "duplicates": 8.0}, {"step": 6, "duplicates": 8.0, "group_loss": {"p50": 1.5}}, {"step": 7}]
    first, second, third = _with_shares(steps, 4)
    assert first["duplicates_share"] == 1
    assert second["duplicates_share"] == 0.5
    assert second["p50"] == 1.5
    assert "duplicates_share" not in third
