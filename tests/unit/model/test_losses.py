"""Losses in chunks of rows: the same numbers in a fraction of the memory."""

from functools import partial

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from benchmarks.loss_memory import kept_for_backward
from mcl_clip.core.distributed import random_words
from mcl_clip.model.losses import Similarity, clip_loss, find_negatives, siglip_loss

ROWS, DIM = 23, 6
LOSSES = {"clip": clip_loss, "siglip": siglip_loss}


def random_integers(*name, size=ROWS, most=2**16):
    return torch.from_numpy((random_words(size, "losses", *name) % np.uint64(most)).astype(np.int64))


def random_negatives(rows=ROWS, **options):
    """Three groups with equal captions and images, a row that occurs twice, and padding rows."""
    numbers = torch.arange(rows)
    numbers[5], numbers[[2, 11, rows - 1]] = numbers[9], -1
    ids = {
        name: random_integers(name, size=rows, most=most)
        for name, most in [("groups", 3), ("text_ids", 9), ("image_ids", 9)]
    }
    # The second copy of a row can be told by its number alone.
    for name, values in ids.items():
        values[5] = values[9] if name == "groups" else (values[9] + 1) % 9
    return find_negatives(rows=numbers, **ids, **options)


def similarity(rows=ROWS, dim=5, threshold=0.3):
    """Features of which the last two rows are the same, and the first ones at the threshold."""
    features = normalize(random_integers("similar", size=rows * dim).reshape(rows, dim).double() - 2**15).half()
    return Similarity(features=features, columns=features, threshold=threshold)


def inputs(rows=ROWS, dim=DIM, dtype=torch.float64):
    """Features of both sides, the scale and the bias."""
    sides = [random_integers(side, size=rows * dim).reshape(rows, dim).to(dtype) - 2**15 for side in ("image", "text")]
    return [normalize(side).requires_grad_() for side in sides] + [
        torch.tensor(value, dtype=dtype, requires_grad=True) for value in (14.0, -5.0)
    ]


def loss_of(name, given, negatives, **options):
    return LOSSES[name](*(given if name == "siglip" else given[:3]), negatives, **options)


def loss_and_gradients(name, chunk_rows, epsilon, **options):
    given = inputs()
    loss = loss_of(name, given, random_negatives(chunk_rows=chunk_rows, **options), ifm_epsilon=epsilon)
    loss.backward()
    return [loss.detach()] + [tensor.grad for tensor in given if tensor.grad is not None]


@pytest.mark.parametrize("chunk_rows", [1, 5, 22, 23, 100])
@pytest.mark.parametrize("options", [{}, {"mask_duplicates": False}, {"min_negatives": 4}], ids=str)
@pytest.mark.parametrize("epsilon", [0.0, 0.1])
@pytest.mark.parametrize("name", LOSSES)
def test_in_chunks_loss_and_gradients_are_the_same(name, epsilon, options, chunk_rows):
    whole = loss_and_gradients(name, 0, epsilon, **options)
    chunked = loss_and_gradients(name, chunk_rows, epsilon, **options)
    assert len(whole) == (5 if name == "siglip" else 4)
    for found, expected in zip(chunked, whole, strict=True):
        assert torch.allclose(found, expected, rtol=0, atol=1e-12)


def test_the_settings_matter_in_these_data():
    """What the comparison above is worth."""
    for name in LOSSES:
        values = [
            float(loss_and_gradients(name, 5, epsilon, **options)[0])
            for epsilon, options in [(0, {}), (0.1, {}), (0, {"mask_duplicates": False}), (0, {"min_negatives": 4})]
        ]
        assert len(set(values)) == 4


@pytest.mark.parametrize("mask_duplicates", [True, False])
@pytest.mark.parametrize("chunk_rows", [0, 1, 5, 100])
def test_negatives_and_counts_are_those_of_every_pair_looked_at(chunk_rows, mask_duplicates):
    found = random_negatives(chunk_rows=chunk_rows, mask_duplicates=mask_duplicates, min_negatives=4)
    ids, keep, duplicates = found.ids.tolist(), torch.eye(ROWS, dtype=torch.bool), 0
    for i, (row, group, text, image) in enumerate(ids):
        for j, (other, its_group, its_text, its_image) in enumerate(ids):
            if i == j or row < 0 or other < 0 or group != its_group:
                continue
            is_same, is_duplicate = row == other, row == other or text == its_text or image == its_image
            duplicates += is_duplicate
            keep[i, j] = not (is_duplicate if mask_duplicates else is_same)
    assert torch.equal(found.keep(slice(None)), keep)
    assert torch.equal(found.keep(slice(3, 8)), keep[3:8])
    assert torch.equal(found.num_negatives, keep.sum(1) - 1)
    assert int(found.duplicates) == duplicates > 4
    has_weight = [row >= 0 and int(kept) - 1 >= 4 for (row, *_), kept in zip(ids, keep.sum(1), strict=True)]
    assert found.weight.tolist() == has_weight
    assert 0 < float(found.total_weight) == sum(has_weight) < ROWS - 3


def test_padding_has_no_weight_where_rows_need_no_negatives():
    weight = random_negatives(min_negatives=0).weight
    assert weight.tolist() == [float(row not in (2, 11, ROWS - 1)) for row in range(ROWS)]


@pytest.mark.parametrize("chunk_rows", [0, 5])
def test_similar_rows_are_no_negatives_and_are_counted_beside_duplicates(chunk_rows):
    close = similarity()
    found, plain = (random_negatives(chunk_rows=chunk_rows, similarity=given) for given in (close, None))
    similar = close.features.double() @ close.features.double().T > 0.3
    masked = plain.keep(slice(None)) & similar & ~torch.eye(ROWS, dtype=torch.bool)
    assert torch.equal(found.keep(slice(None)), plain.keep(slice(None)) & ~masked)
    assert torch.equal(found.keep(slice(3, 8)), found.keep(slice(None))[3:8])
    assert int(found.similar) == int(masked.sum()) > 10 > int(plain.similar) == 0
    assert torch.equal(plain.num_negatives - found.num_negatives, masked.sum(1))
    assert torch.equal(found.duplicates, plain.duplicates)
    kept = random_negatives(chunk_rows=chunk_rows, similarity=close, mask_duplicates=False)
    assert int(kept.similar) == int(found.similar)  # without duplicates, which are counted on their own


def test_the_mask_of_similar_rows_depends_on_no_order_of_summation():
    features = normalize(random_integers("exact", size=64 * 700).reshape(64, 700).double() - 2**15).half()
    exact = features.double() @ features.double().T
    for order in (torch.arange(700), random_integers("order", size=700).argsort()):
        of_order = features[:, order].double()
        assert torch.equal(of_order @ of_order.T, exact)
        assert torch.equal(torch.stack([(of_order * row).sum(1) for row in of_order]), exact)
        assert torch.equal(torch.cat([of_order[:7] @ of_order.T, of_order[7:] @ of_order.T]), exact)


@pytest.mark.parametrize("name", LOSSES)
def test_in_chunks_what_is_kept_for_backward_grows_with_the_batch_and_not_with_its_square(name):
    def kept_bytes(rows, chunk_rows):
        given, negatives = inputs(rows), random_negatives(rows, chunk_rows=chunk_rows)
        with kept_for_backward(given) as kept:
            loss_of(name, given, negatives, ifm_epsilon=0.1).backward()
        return max(kept)

    whole, chunked = (partial(kept_bytes, chunk_rows=rows) for rows in (0, 8))
    assert whole(512) > 3.9 * whole(256) > 8 * 256 * 256
    assert chunked(512) < 2.1 * chunked(256) < whole(256) / 10


@pytest.mark.parametrize("chunk_rows", [0, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_of_low_precision_features_is_computed_in_float32(name, dtype, chunk_rows):
    low, negatives = inputs(dtype=dtype), random_negatives(chunk_rows=chunk_rows)
    scalars = [tensor.float() for tensor in low[2:]]  # autocast keeps them in float32
    found = loss_of(name, [*low[:2], *scalars], negatives)
    expected = loss_of(name, [tensor.detach().float() for tensor in low], random_negatives())
    assert found.dtype == torch.float32
    assert float(found.detach()) == pytest.approx(float(expected), rel=1e-6)
