"""Small images within a budget of bytes."""

import base64
import io

import numpy as np
from PIL import Image

from mcl_clip.core.distributed import random_words
from mcl_clip.report.thumbnails import SIDES_PX, TRAINING, Thumbnails

NOISE_PX = 200


def noise(number: int) -> Image.Image:
    words = random_words(NOISE_PX * NOISE_PX * 3, "noise", number)
    return Image.fromarray(words.astype(np.uint8).reshape(NOISE_PX, NOISE_PX, 3))


def encoded(count: int, max_bytes: int) -> tuple[Thumbnails, list[str]]:
    loaded = []

    def load(numbers):
        loaded.extend(numbers)
        yield from (None if number == 1 else noise(number) for number in numbers)

    thumbnails = Thumbnails({TRAINING: load})
    requests = [thumbnails.request(TRAINING, number, f"number {number}") for number in (*range(count), 0)]
    thumbnails.encode(max_bytes)
    assert sorted(loaded) == list(range(count))  # each is loaded once
    return thumbnails, [thumbnails.uri(request) for request in requests]


def size_of(uri: str) -> int:
    head, data = uri.split(",")
    assert head == "data:image/webp;base64"
    return max(Image.open(io.BytesIO(base64.b64decode(data))).size)


def test_images_are_as_large_as_fits():
    _, uris = encoded(6, 10**9)
    assert {size_of(uri) for uri in uris if uri} == {SIDES_PX[0]}
    whole = sum(map(len, uris[:-1]))
    thumbnails, smaller = encoded(6, whole // 2)
    assert {size_of(uri) for uri in smaller if uri} < set(SIDES_PX[1:])
    assert not thumbnails.left_out
    assert sum(map(len, smaller[:-1])) <= whole // 2


def test_the_last_images_are_left_out_where_nothing_else_fits():
    thumbnails, uris = encoded(6, 12_000)
    assert 0 < thumbnails.left_out < 5
    assert 0 < sum(map(len, set(uris))) <= 12_000
    assert uris[0]
    assert uris[0] == uris[-1]
    assert not uris[5]


def test_an_image_that_cannot_be_decoded_has_no_thumbnail():
    thumbnails, uris = encoded(3, 10**9)
    assert [bool(uri) for uri in uris] == [True, False, True, True]
    assert not thumbnails.left_out


def test_without_loaders_nothing_is_loaded():
    thumbnails = Thumbnails({})
    thumbnail = thumbnails.request("somewhere", 3, "words")
    thumbnails.encode(10**9)
    assert thumbnails.uri(thumbnail) == ""
    assert thumbnail.alt == "words"
