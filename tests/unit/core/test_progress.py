"""Bars, lines, and silence."""

import io

import pytest

from mcl_clip.core import progress
from mcl_clip.core.progress import Progress


class Stream(io.StringIO):
    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self.is_terminal = is_terminal
        self.is_full = False

    def isatty(self) -> bool:
        return self.is_terminal

    def write(self, text: str) -> int:
        if self.is_full:
            raise OSError(28, "No space left on device")
        return super().write(text)


@pytest.fixture
def stream_of(monkeypatch):
    def make(is_terminal: bool) -> Stream:
        stream = Stream(is_terminal)
        monkeypatch.setattr("sys.stderr", stream)
        monkeypatch.setattr("tqdm.std.sys.stderr", stream)
        return stream

    return make


def run_through(stream: Stream, **options) -> str:
    with Progress(total=3, desc="loop", unit="step", file=stream, **options) as bar:
        for _ in range(3):
            bar.update()
    return stream.getvalue()


def test_a_terminal_has_a_bar_that_goes_away(stream_of):
    text = run_through(stream_of(True), mininterval=0)
    assert "loop:  67%" in text
    assert text.endswith("\r")


def test_elsewhere_lines_come_now_and_then(stream_of, monkeypatch):
    assert run_through(stream_of(False)) == ""  # it was over before a line was due
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    lines = run_through(stream_of(False)).splitlines()
    assert [line.split(",")[:2] for line in lines] == [
        ["loop: 33 %", " 1 of 3"],
        ["loop: 67 %", " 2 of 3"],
        ["loop: 100 %", " 3 of 3"],
    ]
    assert all("\r" not in line and "left" in line for line in lines)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_nothing_is_shown_where_nobody_looks_or_quiet_was_asked_for(stream_of, monkeypatch, is_terminal):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    assert run_through(stream_of(is_terminal), show=False) == ""
    monkeypatch.setenv(progress.QUIET, "1")
    assert run_through(stream_of(is_terminal)) == ""


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_loop_goes_on_when_the_disk_of_its_log_is_full(stream_of, monkeypatch, is_terminal):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    stream, done = stream_of(is_terminal), []
    with Progress(total=3, desc="loop", unit="step", file=stream, mininterval=0) as bar:
        stream.is_full = True
        for number in range(3):
            bar.update()
            done.append(number)
    assert done == [0, 1, 2]


def test_it_goes_through_what_it_is_given(stream_of):
    stream_of(False)
    assert list(Progress([1, 2, 3], desc="loop", unit="step")) == [1, 2, 3]
