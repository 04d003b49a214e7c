import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from mcl_clip.core.console import PlannedStop, leave_signals_to_parent, run_program
from mcl_clip.core.errors import UserError


def failing(error: BaseException):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (UserError("--size-px is 3; it must be\nat least 32"), 2, "error: --size-px is 3; it must be at least 32\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (PlannedStop("stopped by SIGTERM: all is kept", 85), 85, "stopped by SIGTERM: all is kept\n"),
        (PermissionError(errno.EACCES, "Permission denied", "/x/y"), 2, "error: /x/y: permission denied; change"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "error: no space left to write; free some space"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/x"), 2, "error: /x: there is no such file or folder"),
        (OSError(errno.EIO, "Input/output error", "/x"), 2, "error: /x: Input/output error\n"),
        (ConnectionError("the host does not answer"), 2, "error: the host does not answer\n"),
    ],
)
def test_a_users_error_is_one_sentence_and_an_exit_code(capsys, error, code, sentence):
    with pytest.raises(SystemExit) as caught:
        run_program(failing(error))
    assert caught.value.code == code
    printed = capsys.readouterr().err
    assert printed.startswith(sentence)
    assert printed.count("\n") == 1


def test_faults_of_the_code_keep_their_traceback():
    with pytest.raises(ValueError, match="a fault"):
        run_program(failing(ValueError("a fault")))


def test_a_program_that_ends_well_returns(capsys):
    run_program(lambda: sys.stdout.write("done\n"))
    assert capsys.readouterr() == ("done\n", "")


def test_a_reader_that_goes_away_is_no_error():
    code = "from mcl_clip.core.console import run_program; run_program(lambda: print('x' * 10))"
    read_end, write_end = os.pipe()
    os.close(read_end)
    ended = subprocess.run([sys.executable, "-c", code], stdout=write_end, stderr=subprocess.PIPE, check=False)
    os.close(write_end)
    assert (ended.returncode, ended.stderr) == (141, b"")


def _child(ready):
    leave_signals_to_parent()
    ready.set()
    time.sleep(60)


def test_a_child_process_heeds_no_signal_but_its_parents_sigterm():
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    child = context.Process(target=_child, args=(ready,), daemon=True)
    child.start()
    assert ready.wait(30)
    for number in (signal.SIGINT, signal.SIGUSR1):
        os.kill(child.pid, number)
    subprocess.run(["kill", "-TERM", str(child.pid)], check=True)  # of another process
    child.join(0.5)
    assert child.is_alive()
    child.terminate()
    child.join(30)
    assert child.exitcode == 0
