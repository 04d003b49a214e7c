import io

import numpy as np
import pytest
from PIL import Image

from mcl_clip.data.decode import BadSampleError
from mcl_clip.data.near_duplicates import connect, group_alike, look_of
from tests.photos import photo


def groups(files):
    looks = [look_of(data) for data in files]
    return group_alike(np.array([look.hash for look in looks], np.uint64), np.stack([look.thumbnail for look in looks]))


def flat(level: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 20), (level, level, level)).save(file, "PNG")
    return file.getvalue()


def test_copies_of_another_size_format_and_quality_are_found_and_nothing_else():
    files = [photo(number) for number in range(200)]
    files += [photo(3, size=(96, 72)), photo(5, format="PNG"), photo(3, quality=40), photo(7, format="WEBP")]
    found = groups(files)
    np.testing.assert_array_equal(found[:200], np.arange(200))
    assert found[200:].tolist() == [3, 5, 3, 7]


def test_flat_pictures_are_told_apart_by_their_color():
    """All of them have the hash 0."""
    files = [flat(level) for level in (0, 100, 200, 3)]
    assert {look_of(data).hash for data in files} == {0}
    assert groups(files).tolist() == [0, 1, 2, 0]


def test_every_pair_within_the_distance_is_found():
    generator = np.random.default_rng(0)
    hashes = generator.integers(0, 2**63, 300, np.uint64)
    for number in range(100):  # 200..299 differ from 0..99 in up to five bits
        bits = generator.choice(64, 5, replace=False).astype(np.uint64)
        hashes[200 + number] = hashes[number] ^ np.bitwise_or.reduce(np.uint64(1) << bits)
    found = group_alike(hashes, np.zeros((300, 8, 8, 3), np.uint8))
    np.testing.assert_array_equal(found, [*range(200), *range(100)])


@pytest.mark.parametrize("seed", range(5))
def test_connected_items_get_the_smallest_of_them(seed):
    generator = np.random.default_rng(seed)
    pairs = generator.integers(0, 60, (2, 40))
    expected = list(range(60))
    for _ in range(60):  # one pass for each step of the longest way
        for one, two in pairs.T.tolist():
            expected[one] = expected[two] = min(expected[one], expected[two])
    assert connect(60, pairs).tolist() == expected


def test_damaged_pictures_are_named():
    data = photo(0)
    with pytest.raises(BadSampleError, match="broken_image"):
        look_of(data[: len(data) // 2])
    with pytest.raises(BadSampleError, match="not_an_image"):
        look_of(b"no picture")
