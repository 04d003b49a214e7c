"""What a program does with the errors of its user."""

import os
import sys
from collections.abc import Callable
from typing import NoReturn

from mcl_clip.errors import UserError, explain_os_error


def run_program(main: Callable[[], object]) -> None:
    """Run `main`; a mistake that the user can mend ends the program with one sentence on stderr and no traceback.

    Exit codes: 2 for a `UserError` and for what the operating system refuses (no permission, no space, no such file),
    130 for Ctrl-C, 141 when the reader of the output has gone away. Other exceptions are faults of the code and pass.
    """
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        _stop(f"error: {error}", 2)
    except KeyboardInterrupt:
        _stop("interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the flush at exit fails once more
        sys.exit(141)
    except OSError as error:
        _stop(f"error: {explain_os_error(error)}", 2)


def _stop(message: str, code: int) -> NoReturn:
    sys.stderr.write(" ".join(message.splitlines()) + "\n")
    sys.exit(code)
