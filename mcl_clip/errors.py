"""Errors that a user can act on."""

import errno


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


def explain_os_error(error: OSError) -> str:
    """One sentence with the file, what went wrong, and the way out."""
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{where}no space left to write; free some space or choose a folder on another disk"
    if isinstance(error, PermissionError):
        return f"{where}permission denied; change the permissions or choose another path"
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"{where}there is no such file or folder; correct the path"
    return f"{where}{error.strerror or error or type(error).__name__}"
