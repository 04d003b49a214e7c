"""Progress of long loops: a bar on a terminal, at most one line a minute elsewhere, nothing when quiet."""

import io
import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from tqdm import tqdm

QUIET = "MCL_CLIP_QUIET"  # an environment variable, so that child processes are quiet too
SECONDS_BETWEEN_LINES = 60.0
LINE_FORMAT = "{desc}: {percentage:.0f} %, {n_fmt} of {total_fmt}, {rate_fmt}, {remaining} left{postfix}"


class Progress(tqdm):  # type: ignore[misc]
    """tqdm that prints whole lines, at most one a minute, if stderr is not a terminal.

    What cannot be written, as to a log on a full disk, is left out: the loop goes on.
    """

    def __init__(self, iterable: Iterable[Any] | None = None, *, show: bool = True, **options: Any) -> None:
        """Follow a loop, or calls of `update`; `show` is False on all processes but one, `options` are tqdm's."""
        self._in_lines = not sys.stderr.isatty()
        if self._in_lines:
            options |= {"mininterval": SECONDS_BETWEEN_LINES, "miniters": 1, "bar_format": LINE_FORMAT}
        super().__init__(iterable, disable=not show or is_quiet(), leave=False, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Draw the bar, or print a line once the first interval has passed."""
        with suppress(OSError):
            if not self._in_lines:
                shown: bool = super().display(msg, pos)
                return shown
            if self.n > self.initial and self._time() - self.start_t >= self.mininterval and msg is None:
                self.fp.write(f"{self}\n")
        return True

    def close(self) -> None:
        """Remove the bar; printed lines stay."""
        if self._in_lines and not self.disable:
            self.fp = io.StringIO()  # tqdm would overwrite the last line with spaces
        with suppress(OSError):
            super().close()


def be_quiet() -> None:
    """Show no progress from now on, in this process and its children."""
    os.environ[QUIET] = "1"


def is_quiet() -> bool:
    """Return whether `be_quiet` was called, here or in a parent process."""
    return bool(os.environ.get(QUIET))


def has_colours() -> bool:
    """Return whether stdout is a terminal whose user wants colors (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")
