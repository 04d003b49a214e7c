"""Errors that a user can act on."""

import errno
import os
import re


class UserError(ValueError):
    """A mistake outside the code: shown as one sentence without a traceback, exit code 2.

    The message names the value, the limit and the way out. `everywhere` is set where all processes raise the same
    error, so that it is shown once.
    """

    everywhere = False

    def on_every_process(self) -> "UserError":
        """The same error, known to be raised by all processes."""
        self.everywhere = True
        return self


def os_error_in(error: Exception) -> OSError | None:
    """What the operating system refused, where a library says so in words alone: `... (os error 28)`, as Rust does."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(found[1]), os.strerror(int(found[1]))) if found else None


def explain_os_error(error: OSError) -> str:
    """One sentence with the file, what went wrong, and the way out."""
    where = f"{error.filename}: " if error.filename else ""
    is_short = error.errno is None and re.fullmatch(r"\d+ requested and \d+ written", str(error))  # as numpy says it
    if is_short or error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{where}no space left to write; free some space or choose a folder on another disk"
    if isinstance(error, PermissionError):
        return f"{where}permission denied; change the permissions or choose another path"
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"{where}there is no such file or folder; correct the path"
    return f"{where}{error.strerror or error or type(error).__name__}"
