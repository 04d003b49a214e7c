"""How far a long loop is: a bar on a terminal, a line now and then elsewhere, nothing where quiet was asked for."""

import io
import os
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

QUIET = "MCL_CLIP_QUIET"  # in the environment, so that child processes are quiet too
SECONDS_BETWEEN_LINES = 60.0
_LINE = "{desc}: {percentage:.0f} %, {n_fmt} of {total_fmt}, {rate_fmt}, {remaining} left{postfix}"


class Progress(tqdm):  # type: ignore[misc]
    """tqdm whose output in a file or a log has whole lines, at most one a minute."""

    def __init__(self, iterable: Iterable[Any] | None = None, *, show: bool = True, **options: Any) -> None:
        """A bar, or lines.

        Args:
            iterable: what to go through; without it, call `update`.
            show: False on all processes but one, or where nobody looks.
            options: of tqdm: `total`, `desc`, `unit`, `initial`, `unit_scale`.
        """
        self._in_lines = not sys.stderr.isatty()
        if self._in_lines:
            options |= {"mininterval": SECONDS_BETWEEN_LINES, "miniters": 1, "bar_format": _LINE}
        super().__init__(iterable, disable=not show or is_quiet(), leave=False, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Show how far it is; in lines only after some time."""
        if not self._in_lines:
            shown: bool = super().display(msg, pos)
            return shown
        if self.n > self.initial and self._time() - self.start_t >= self.mininterval and msg is None:
            self.fp.write(f"{self}\n")
        return True

    def close(self) -> None:
        """Take the bar away; lines stay."""
        if self._in_lines and not self.disable:
            self.fp = io.StringIO()
        super().close()


def be_quiet() -> None:
    """No progress from now on, in this process and those that it starts."""
    os.environ[QUIET] = "1"


def is_quiet() -> bool:
    """Whether `be_quiet` was called, here or in the process that started this one."""
    return bool(os.environ.get(QUIET))
