"""Formats of durations, shares, sizes and names."""

import pytest

from mcl_clip.results.text import format_bytes, format_duration, format_parameters, format_percent, listed


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.25, "0.2 s"),
        (59.4, "59.4 s"),
        (59.7, "1 min 0 s"),
        (70, "1 min 10 s"),
        (3599.8, "1 h 0 min"),
        (7370, "2 h 3 min"),
    ],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text


def test_shares_have_their_interval_and_sign():
    assert format_percent(0.625, (0.601, 0.648)) == "62.5 [60.1, 64.8]"
    assert format_percent(0.025, (-0.01, 0.06), signed=True) == "+2.5 [-1.0, +6.0]"
    assert format_percent(0.5) == "50.0"
    assert format_percent(None) == format_percent(float("nan")) == "-"


def test_sizes_have_a_unit():
    assert [format_bytes(number) for number in (12, 163_840, 2_500_000_000)] == ["12 bytes", "163.8 kB", "2.5 GB"]
    assert [format_parameters(number) for number in (500, 2_000, 151_300_000)] == ["500", "2.0 K", "151.3 M"]


def test_many_names_are_counted():
    assert listed(["a", "b", "c"]) == "a, b and c"
    assert listed([]) == "none"
    assert listed("abcdefgh") == "8 sets"
