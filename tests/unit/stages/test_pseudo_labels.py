import hashlib
import tracemalloc

import numpy as np
import pytest

from mcl_clip.core.errors import UserError
from mcl_clip.stages import pseudo_labels
from mcl_clip.stages.pseudo_labels import PseudoLabels, default_min_group_size, group_labels, no_labels

RADICES = [(3,), (5, 2), (2, 7, 3), (1, 4), (4, 4, 4, 4)]


def drawn(radix: tuple[int, ...], rows: int, seed: int = 0) -> tuple[PseudoLabels, np.ndarray]:
    """Labels of skewed clusters, and the clusters themselves, [rows, stages]."""
    draw = np.random.default_rng(seed)
    digits = np.stack([np.minimum(draw.geometric(0.5, rows) - 1, clusters - 1) for clusters in radix], axis=1)
    labels = no_labels(rows)
    for stage, clusters in enumerate(radix):
        labels = labels.refine(digits[:, stage], clusters)
    return labels, digits


@pytest.mark.parametrize("radix", RADICES)
def test_a_label_is_the_tuple_of_clusters(radix):
    labels, digits = drawn(radix, 300)
    assert labels.radix == radix
    assert [labels.prefix(int(value)) for value in labels.values] == [tuple(row) for row in digits.tolist()]
    assert 0 <= labels.values.min() <= labels.values.max() < np.prod(radix)


@pytest.mark.parametrize("clusters", [1, 2, 9])
def test_refined_labels_refine(clusters):
    before, _ = drawn((2, 7, 3), 500)
    kept = before.values.copy()
    after = before.refine(np.random.default_rng(1).integers(0, clusters, 500), clusters)
    np.testing.assert_array_equal(after.values // clusters, before.values)  # rows that differed still differ
    np.testing.assert_array_equal(before.values, kept)


def test_labels_that_cannot_be_are_refused():
    labels = no_labels(4)
    with pytest.raises(UserError, match="assignments run from 0 to 3, with 3 clusters"):
        labels.refine(np.array([0, 1, 2, 3]), 3)
    with pytest.raises(UserError, match="assignments run from -1"):
        labels.refine(np.array([0, 1, 2, -1]), 3)
    for _ in range(6):
        labels = labels.refine(np.array([0, 1, 2, 999]), 1000)
    assert labels.prefix(int(labels.values[3])) == (999,) * 6
    with pytest.raises(UserError, match=r"make over 2\^63 labels; use fewer stages or clusters"):
        labels.refine(np.array([0, 1, 2, 3]), 1000)


def test_labels_fill_63_bits():
    labels = PseudoLabels(values=np.array([2**62 - 1]), radix=(2**31, 2**31))
    assert labels.refine(np.array([0]), 1).prefix(2**62 - 1) == (2**31 - 1, 2**31 - 1, 0)
    with pytest.raises(UserError, match=r"make over 2\^63 labels"):
        labels.refine(np.array([1]), 2)


def test_summary_counts():
    summary = PseudoLabels(values=np.repeat([4, 1, 9], [1, 3, 8]), radix=(10,)).summary()
    assert (summary["labels"], summary["smallest"], summary["median"], summary["largest"]) == (3, 1, 3.0, 8)
    assert summary["histogram"] == {"1-1": 1, "2-3": 1, "8-15": 1}


@pytest.mark.parametrize("minimum", [1, 5, 40, 200, 1000])
@pytest.mark.parametrize("radix", RADICES)
@pytest.mark.parametrize("seed", range(5))
def test_groups_are_large_enough_and_relax_no_more_than_needed(radix, minimum, seed):
    rows = 400
    labels, digits = drawn(radix, rows, seed)
    kept = labels.values.copy()
    found = group_labels(labels, min_group_size=minimum)
    np.testing.assert_array_equal(labels.values, kept)

    sizes = np.bincount(found.group_of, minlength=len(found.groups))
    assert sizes.tolist() == [group.size for group in found.groups]
    assert len(found.groups) == 1 or sizes.min() >= minimum
    held = [label for group in found.groups for label in group.labels]
    assert sorted(held) == np.unique(labels.values).tolist()  # each label, so each row, in one group
    for number, group in enumerate(found.groups):
        assert set(labels.values[found.group_of == number]) == set(group.labels)
        depth = len(group.prefix)
        inside = (digits[:, :depth] == group.prefix).all(1)
        assert inside[found.group_of == number].all()
        if len(group.labels) == 1:
            assert depth == len(radix)
            continue
        # Some child of the prefix has too few rows to stand alone, and is in here: one more cluster is not to be had.
        children, counts = np.unique(digits[inside, depth], return_counts=True)
        mine = set(digits[found.group_of == number, depth])
        assert mine & set(children[counts < minimum])


def test_large_labels_stay_alone():
    labels, _ = drawn((4, 4), 400)
    found = group_labels(labels, min_group_size=20)
    values, counts = np.unique(labels.values, return_counts=True)
    alone = {group.labels[0] for group in found.groups if len(group.labels) == 1}
    taken = [value for value, count in zip(values, counts, strict=True) if count >= 20 and value not in alone]
    assert len(taken) <= 2  # only the smallest sibling of a pool that was too small
    assert all(count >= 20 for value, count in zip(values, counts, strict=True) if value in alone)


def test_pools_grow_as_described():
    sizes = {(0, 0): 50, (0, 1): 12, (0, 2): 15, (0, 3): 5, (1, 0): 60, (1, 1): 40, (1, 2): 3, (2, 0): 4, (2, 1): 2}
    labels = no_labels(sum(sizes.values()))
    for stage, clusters in enumerate((3, 4)):
        digits = np.concatenate([np.full(size, prefix[stage]) for prefix, size in sizes.items()])
        labels = labels.refine(digits, clusters)
    found = group_labels(labels, min_group_size=20)
    members = {tuple(labels.prefix(label) for label in group.labels): group.size for group in found.groups}
    assert members == {
        ((0, 0),): 50,
        ((0, 1), (0, 2), (0, 3), (2, 0), (2, 1)): 38,  # (0, *) was large enough; (2, *) moved up and took the smallest
        ((1, 0),): 60,
        ((1, 1), (1, 2)): 43,  # a pool that is too small takes in its smallest big sibling
    }
    record = found.record()
    assert [entry["prefix"] for entry in record["groups"]] == [[0, 0], ["*"], [1, 0], [1, "*"]]
    assert (record["rows_relaxed"], record["num_groups"], record["smallest"]) == (81, 4, 38)


def test_a_pool_of_the_minimum_stands_alone_and_the_first_of_equal_siblings_is_taken():
    sizes = {(0, 0): 10, (0, 1): 10, (0, 2): 30, (1, 0): 20, (2, 0): 5}
    digits = np.concatenate([np.full((size, 2), prefix) for prefix, size in sizes.items()])
    labels = no_labels(len(digits)).refine(digits[:, 0], 3).refine(digits[:, 1], 3)
    found = group_labels(labels, min_group_size=20)
    members = {tuple(labels.prefix(label) for label in group.labels): group.size for group in found.groups}
    assert members == {((0, 0), (0, 1), (2, 0)): 25, ((0, 2),): 30, ((1, 0),): 20}


def test_before_stage_0_there_is_one_group():
    found = group_labels(no_labels(7), min_group_size=32)
    assert found.group_of.tolist() == [0] * 7
    assert found.record()["rows_relaxed"] == 0


@pytest.mark.parametrize("block", [1, 7, 400])
@pytest.mark.parametrize("table", [255, 256])
def test_labels_are_counted_and_grouped_in_blocks(monkeypatch, block, table):
    labels, _ = drawn((4, 4, 4, 4), 400)
    whole = group_labels(labels, min_group_size=20)
    monkeypatch.setattr(pseudo_labels, "BLOCK_ROWS", block)
    monkeypatch.setattr(pseudo_labels, "MAX_TABLE", table)
    for found, expected in zip(labels.count(), np.unique(labels.values, return_counts=True), strict=True):
        np.testing.assert_array_equal(found, expected)
    found = group_labels(labels, min_group_size=20)
    assert found.groups == whole.groups
    np.testing.assert_array_equal(found.group_of, whole.group_of)
    # as in version 0.6, which sorted all labels at once
    digest = hashlib.blake2b(found.group_of.astype("<i8").tobytes(), digest_size=8).hexdigest()
    assert digest == "168363f752abd481"


@pytest.mark.parametrize("table", [1, 100])
def test_groups_take_four_bytes_a_row_and_a_block(monkeypatch, table):
    monkeypatch.setattr(pseudo_labels, "BLOCK_ROWS", 10_000)
    monkeypatch.setattr(pseudo_labels, "MAX_TABLE", table)
    labels, _ = drawn((7, 9), 300_000)
    tracemalloc.start()
    try:
        group_of = group_labels(labels, min_group_size=20).group_of
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert group_of.dtype == np.int32
    assert peak < 4 * 300_000 + 100 * 10_000


def test_default_min_group_size():
    assert [default_min_group_size(batch) for batch in (16, 256, 4096)] == [32, 32, 512]
