"""Small pictures within a number of bytes."""

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


def album_of(wanted: int, max_bytes: int) -> tuple[Thumbnails, list[str]]:
    read = []

    def pictures(numbers):
        read.extend(numbers)
        yield from (None if number == 1 else noise(number) for number in numbers)

    album = Thumbnails({TRAINING: pictures})
    places = [album.want(TRAINING, number, f"number {number}") for number in (*range(wanted), 0)]
    album.develop(max_bytes)
    assert sorted(read) == list(range(wanted))  # each is read once
    return album, [album.uri(place) for place in places]


def size_of(uri: str) -> int:
    head, data = uri.split(",")
    assert head == "data:image/webp;base64"
    return max(Image.open(io.BytesIO(base64.b64decode(data))).size)


def test_pictures_are_as_large_as_they_fit():
    _, uris = album_of(6, 10**9)
    assert {size_of(uri) for uri in uris if uri} == {SIDES_PX[0]}
    whole = sum(map(len, uris[:-1]))
    album, smaller = album_of(6, whole // 2)
    assert {size_of(uri) for uri in smaller if uri} < set(SIDES_PX[1:])
    assert not album.left_out
    assert sum(map(len, smaller[:-1])) <= whole // 2


def test_the_last_ones_are_left_out_where_nothing_else_helps():
    album, uris = album_of(6, 12_000)
    assert 0 < album.left_out < 5
    assert 0 < sum(map(len, set(uris))) <= 12_000
    assert uris[0]
    assert uris[0] == uris[-1]
    assert not uris[5]


def test_a_picture_that_cannot_be_decoded_has_no_copy():
    album, uris = album_of(3, 10**9)
    assert [bool(uri) for uri in uris] == [True, False, True, True]
    assert not album.left_out


def test_without_sources_nothing_is_read():
    album = Thumbnails({})
    place = album.want("somewhere", 3, "words")
    album.develop(10**9)
    assert album.uri(place) == ""
    assert place.alt == "words"
