"""Text fit for Markdown: what comes from a recipe passes through `safe`, what may be a path through `public_name`."""

import re
from collections.abc import Iterable, Sequence

NOT_MEASURED = "not measured"
NOT_STATED = "not stated"
NAMES_SHOWN = 6
_PLAIN = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SPECIAL = re.compile(r"[&<>|`*\[\]\\~$]|(?<!\w)_|_(?!\w)")


def safe(text: object) -> str:
    """One line that Markdown and HTML show as it is, in a table too."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return _SPECIAL.sub(lambda match: f"&#{ord(match[0])};", line)


def public_name(text: object) -> str:
    """A name such as ORG/NAME, or the last part of a path; fit for a table."""
    name = str(text)
    return safe(name if _PLAIN.fullmatch(name) else name.rstrip("/").rsplit("/", 1)[-1])


def table(rows: Sequence[Sequence[str]], *, words: int = 1) -> str:
    """A table with its title row first; all but the first `words` columns are numbers, to the right."""
    marks = ["---" if column < words else "--:" for column in range(len(rows[0]))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (rows[0], marks, *rows[1:]))


def listed(names: Iterable[str], none: str = "none") -> str:
    """Names in a sentence; how many, where they are too many."""
    names = list(names)
    if len(names) > NAMES_SHOWN:
        return f"{len(names)} sets"
    return ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else (names or [none])[0]


def amount(number: float) -> str:
    """Parameters."""
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " K")):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:g}"


def size(number: int) -> str:
    """Bytes."""
    for unit, letter in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= unit:
            return f"{number / unit:.1f} {letter}"
    return f"{number} bytes"


def duration(seconds: float) -> str:
    """Hours and minutes, or minutes and seconds."""
    minutes = round(seconds / 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{round(seconds) // 60} min {round(seconds) % 60} s" if seconds >= 60 else f"{seconds:.0f} s"
