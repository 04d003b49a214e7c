"""What a program does with the errors of its user, and with signals that ask it to stop."""

import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

from mcl_clip.core.errors import UserError, explain_os_error, os_error_in


class PlannedStop(BaseException):  # like KeyboardInterrupt, not an error that code may want to handle
    """The job ends here on request; the same command continues it. The message says what is kept."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def run_program(main: Callable[[], object]) -> None:
    """Run `main`; a mistake that the user can mend ends the program with one sentence on stderr and no traceback.

    Exit codes: 2 for a `UserError` and for what the operating system refuses (no permission, no space, no such file),
    130 for Ctrl-C, 141 when the reader of the output has gone away, its own for a `PlannedStop`. Other exceptions are
    faults of the code and pass.
    """
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        _stop(f"error: {error}", 2)
    except PlannedStop as stop:
        _stop(str(stop), stop.exit_code)
    except KeyboardInterrupt:
        _stop("interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the flush at exit fails once more
        sys.exit(141)
    except OSError as error:
        _stop(f"error: {explain_os_error(error)}", 2)
    except Exception as error:
        if (refused := os_error_in(error)) is None:
            raise
        _stop(f"error: {explain_os_error(refused)}", 2)


def has_colours() -> bool:
    """Whether the output is a terminal whose user wants colours (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def leave_signals_to_parent() -> None:
    """In a child process: ignore Ctrl-C and what a scheduler sends to every process of a job, for the parent answers.

    SIGTERM of the parent itself still ends the process.
    """
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # a handler would not know who sent the signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def _stop(message: str, code: int) -> NoReturn:
    sys.stderr.write(" ".join(message.splitlines()) + "\n")
    sys.exit(code)
