"""Find pictures that are nearly identical, so that a split can keep them on one side.

A picture is described by a difference hash (dHash: 64 bits, whether each pixel of a 9 x 8 grey thumbnail is brighter
than the one to its left) and a color thumbnail. Two pictures are nearly identical if their hashes differ in at most
`MAX_BITS` bits and their thumbnails by at most `MAX_LEVELS` on average; the hash finds candidates fast, the thumbnail
tells apart flat pictures, whose hashes say little.
"""

import warnings
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, UInt8, UInt64
from PIL import Image

from mcl_clip.data.decode import BadSampleError, open_image
from mcl_clip.model.image_transform import to_rgb

MAX_BITS = 5  # of 64
MAX_LEVELS = 6.0  # of 255, mean absolute difference of thumbnails
THUMBNAIL = 8  # pixels on a side
BANDS = ((0, 11), (11, 11), (22, 11), (33, 11), (44, 10), (54, 10))  # first bit and bits: five changes leave one equal
MAX_NEIGHBORS = 64  # candidates of equal band compared with each picture, in the order of their brightness
DRAFT = (128, 128)  # a JPEG is decoded at the smallest scale that is not below this size


class Look(NamedTuple):
    """What a picture looks like: its difference hash, and its thumbnail [8, 8, 3]."""

    hash: int
    thumbnail: UInt8[np.ndarray, "8 8 3"]


def look_of(data: bytes) -> Look:
    """Describe an image file by its pixels; raise BadSampleError if it cannot be decoded."""
    with warnings.catch_warnings(action="ignore"):  # of Pillow, about files that it decodes all the same
        image = open_image(data)
        try:
            image.draft("RGB", DRAFT)
            image.load()
            image = to_rgb(image)
        except MemoryError:
            raise
        except Exception as error:  # the plugins raise a dozen types on damaged pixels
            raise BadSampleError("broken_image", f"{type(error).__name__}: {error}") from error
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), np.int16)
    bits = np.packbits(grey[:, 1:] > grey[:, :-1])
    thumbnail = np.asarray(image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX))
    return Look(int.from_bytes(bits.tobytes(), "big"), thumbnail)


def group_alike(
    hashes: UInt64[np.ndarray, "pictures"], thumbnails: UInt8[np.ndarray, "pictures 8 8 3"]
) -> Int64[np.ndarray, "pictures"]:
    """Return for each picture the number of the first one that it is connected with by nearly identical pairs."""
    pairs = []
    flat = thumbnails.reshape(len(hashes), -1).astype(np.int16)
    brightness = flat.sum(1)
    for start, bits in BANDS:
        shared = (hashes >> np.uint64(start)) & np.uint64(2**bits - 1)
        order = np.lexsort((brightness, shared))
        for step in range(1, min(MAX_NEIGHBORS, len(order) - 1) + 1):
            first, second = order[:-step], order[step:]
            is_near = shared[first] == shared[second]
            if not is_near.any():
                break
            first, second = first[is_near], second[is_near]
            is_near = _count_bits(hashes[first] ^ hashes[second]) <= MAX_BITS
            first, second = first[is_near], second[is_near]
            is_near = np.abs(flat[first] - flat[second]).mean(1) <= MAX_LEVELS if len(first) else is_near[:0]
            pairs.append(np.stack([first[is_near], second[is_near]]))
    return connect(len(hashes), np.concatenate(pairs, 1) if pairs else np.empty((2, 0), np.int64))


def connect(count: int, pairs: Int64[np.ndarray, "2 pairs"]) -> Int64[np.ndarray, "count"]:
    """Return for each of `count` items the smallest one that it is connected with by pairs."""
    smallest = np.arange(count)
    while len(pairs[0]):
        before = smallest.copy()
        low = np.minimum(smallest[pairs[0]], smallest[pairs[1]])
        for side in pairs:
            np.minimum.at(smallest, side, low)
            np.minimum.at(smallest, before[side], low)  # and the item that it was connected with so far
        smallest = smallest[smallest]
        if np.array_equal(smallest, before):
            break
    return smallest


def _count_bits(values: UInt64[np.ndarray, "values"]) -> Int64[np.ndarray, "values"]:
    bits = np.unpackbits(np.ascontiguousarray(values).view(np.uint8).reshape(-1, 8), axis=1)
    return np.asarray(bits.sum(1, dtype=np.int64))
