"""What a check has found, and how it is shown."""

import textwrap
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeVar

from mcl_clip.core.errors import UserError, explain_os_error

Level = Literal["ok", "warning", "FAIL"]
T = TypeVar("T")
COLOURS = {"ok": "\033[32m", "warning": "\033[33m", "FAIL": "\033[31m"}


class Finding(NamedTuple):
    """What a check has found: `FAIL` is what will stop the job, or spoil it."""

    level: Level
    topic: str
    text: str


def finding_text(finding: Finding, *, columns: int = 0, has_colours: bool = False) -> str:
    """A finding as a line or, with a width given, as several."""
    mark = f"{finding.level:<8}"
    text = f"{finding.topic:<10} {finding.text}"
    if columns:
        text = textwrap.fill(text, max(40, columns - 8), subsequent_indent=" " * 11).replace("\n", f"\n{'':8}")
    return f"{COLOURS[finding.level]}{mark}\033[0m{text}" if has_colours else mark + text


def attempt(topic: str, action: Callable[[], T]) -> tuple[T | None, list[Finding]]:
    """The result of `action`; or none, and what it says is wrong."""
    try:
        return action(), []
    except UserError as error:
        return None, [Finding("FAIL", topic, str(error))]
    except OSError as error:
        return None, [Finding("FAIL", topic, explain_os_error(error))]


def as_bytes(number: float) -> str:
    """A number of bytes for people: `1.71 GB`, in powers of ten."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number / 1e3:.3g} kB"


def as_duration(seconds: float) -> str:
    """A time for people, in seconds, minutes or hours."""
    if seconds >= 5400:
        return f"{seconds / 3600:.3g} h"
    return f"{seconds / 60:.2g} min" if seconds >= 90 else f"{seconds:.2g} s"
