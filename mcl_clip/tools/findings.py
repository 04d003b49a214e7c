"""Results of the doctor's checks, and their formatting."""

import textwrap
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeVar

from mcl_clip.core.errors import UserError, explain_os_error

Level = Literal["ok", "warning", "FAIL"]
T = TypeVar("T")
COLOURS = {"ok": "\033[32m", "warning": "\033[33m", "FAIL": "\033[31m"}


class Finding(NamedTuple):
    """Result of one check; `FAIL` means that the job will stop or produce unusable results."""

    level: Level
    topic: str
    text: str


def finding_text(finding: Finding, *, columns: int = 0, has_colours: bool = False) -> str:
    """Format a finding as one line, or wrapped to `columns` characters if given."""
    level = f"{finding.level:<8}"
    text = f"{finding.topic:<10} {finding.text}"
    if columns:
        text = textwrap.fill(text, max(40, columns - 8), subsequent_indent=" " * 11).replace("\n", f"\n{'':8}")
    return f"{COLOURS[finding.level]}{level}\033[0m{text}" if has_colours else level + text


def attempt(topic: str, action: Callable[[], T]) -> tuple[T | None, list[Finding]]:
    """Return the result of `action`, or None and a `FAIL` finding for a UserError or an OSError."""
    try:
        return action(), []
    except UserError as error:
        return None, [Finding("FAIL", topic, str(error))]
    except OSError as error:
        return None, [Finding("FAIL", topic, explain_os_error(error))]


def as_bytes(number: float) -> str:
    """Format a number of bytes with a decimal prefix, as in `1.71 GB`."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number / 1e3:.3g} kB"


def as_duration(seconds: float) -> str:
    """Format a duration in seconds, minutes or hours."""
    if seconds >= 5400:
        return f"{seconds / 3600:.3g} h"
    return f"{seconds / 60:.2g} min" if seconds >= 90 else f"{seconds:.2g} s"
