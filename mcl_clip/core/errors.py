"""Errors that a user can act on, and the exit codes they end a program with. Only the standard library."""

import difflib
import errno
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from types import TracebackType

MAX_MESSAGE = 1200  # characters; a longer sentence has the content of a file in it
FEWER_WORKERS = "use fewer workers (--machine.workers of a recipe, --workers of mcl-clip eval)"
LOST_WORKER = (
    f"a loader process ended unexpectedly; if it printed no error above, memory has run out: {FEWER_WORKERS}, or "
    f"smaller batches"
)


class UserError(ValueError):
    """A mistake in the input or the environment: printed as one sentence without a traceback, exit code 2.

    The message names the value, the limit and the fix. `everywhere` is True where all processes raise the same error,
    so that only the main process prints it.
    """

    everywhere = False

    def __init__(self, message: object = "") -> None:
        """Keep the beginning, which names the value, and the end, which has the fix, of a message that is too long."""
        text = str(message)
        if len(text) > MAX_MESSAGE:
            kept = MAX_MESSAGE // 2 - 25  # room for the note, so that a copy is not cut again
            text = f"{text[:kept]} [... {len(text) - 2 * kept:,} characters left out ...] {text[-kept:]}"
        super().__init__(text)

    def on_every_process(self) -> "UserError":
        """Mark the error as raised by all processes and return it."""
        self.everywhere = True
        return self


class PlannedStop(BaseException):  # like KeyboardInterrupt: `except Exception` must not catch it
    """The job was asked to stop and the same command resumes it. The message says what is saved."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def shorten(value: object, most: int = 120) -> str:
    """Return `value` on one line, for a message: of more than `most` characters the beginning, and how many there are.

    Characters that would act on a terminal are escaped.
    """
    text = " ".join(str(value).split())
    shown = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text[:most]
    )
    return shown if len(text) <= most else f"{shown} ... ({len(text):,} characters)"


def shorten_list(names: Iterable[object], most: int = 10) -> str:
    """Join the first `most` names by commas, and count the others; `none` for an empty list."""
    every = list(names)
    more = [f"and {len(every) - most:,} more"] if len(every) > most else []
    return ", ".join([*(shorten(name, 60) for name in every[:most]), *more]) or "none"


def suggest(name: str, known: Iterable[str]) -> str:
    """Return up to three close names in parentheses, whatever their case; empty if there are none."""
    by_lower = {word.lower(): word for word in known}
    close = [by_lower[word] for word in difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.5)]
    return f" (close: {', '.join(close)})" if close else ""


def explain_os_error(error: OSError) -> str:
    """Describe an operating system error in one sentence: the file, the cause and the fix."""
    where = f"{error.filename}: " if error.filename else ""
    is_short_write = error.errno is None and re.fullmatch(r"\d+ requested and \d+ written", str(error))  # numpy's words
    if is_short_write or error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{where}no space left to write; free some space or choose a folder on another disk"
    if isinstance(error, PermissionError):
        return f"{where}permission denied; change the permissions or choose another path"
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"{where}there is no such file or folder; correct the path"
    return f"{where}{error.strerror or error or type(error).__name__}"


def run_program(main: Callable[[], object]) -> None:
    """Run `main` and turn errors that the user can fix into one sentence on stderr and an exit code.

    Exit codes: 2 for a `UserError` or an operating system error (no permission, no space, no such file), 130 for
    Ctrl-C, 141 if the reader of stdout has closed the pipe, and its own for a `PlannedStop`. Other exceptions are bugs
    and propagate with their traceback.
    """
    try:
        main()
        sys.stdout.flush()
        return
    except UserError as error:
        message, code = f"error: {error}", 2
    except PlannedStop as stop:
        message, code = str(stop), stop.exit_code
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit raises it again
        sys.exit(141)
    except OSError as error:
        message, code = f"error: {explain_os_error(error)}", 2
    except Exception as error:
        # Libraries written in Rust raise errors of their own class and give the system's code only in the text.
        match = re.search(r"\(os error (\d+)\)", str(error))
        if match is not None:
            number = int(match[1])
            message, code = f"error: {explain_os_error(OSError(number, os.strerror(number)))}", 2
        elif str(error).startswith("DataLoader worker (pid"):  # raised wherever the program is when a worker dies
            message, code = f"error: {LOST_WORKER}", 2
        else:
            raise
    with suppress(OSError):  # the terminal may have been closed
        sys.stderr.write(" ".join(message.splitlines()) + "\n")
    sys.exit(code)


def explain_uncaught_errors() -> None:
    """Print a `UserError` that a script does not catch as one sentence with its line of the script; exit code 2.

    So does a recipe with a wrong value in its file, whose error comes before `main` runs. Other exceptions, and the
    interactive interpreter, are as before.
    """
    before = sys.excepthook

    def explain(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not isinstance(error, UserError) or hasattr(sys, "ps1") or sys.flags.interactive:
            before(kind, error, trace)
            return
        script = getattr(sys.modules["__main__"], "__file__", None)
        lines = [frame.lineno for frame in traceback.extract_tb(trace) if frame.filename == script]
        where = f"{script}, line {lines[-1]}: " if lines else ""
        sys.stderr.write(" ".join(f"error: {where}{error}".splitlines()) + "\n")
        sys.exit(2)  # from a hook, this sets the exit code of the interpreter

    sys.excepthook = explain
