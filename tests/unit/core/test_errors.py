import errno
import io
import os
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
from safetensors import SafetensorError

from mcl_clip.core.errors import (
    MAX_MESSAGE,
    PlannedStop,
    UserError,
    explain_os_error,
    explain_uncaught_errors,
    run_program,
    shorten,
    shorten_list,
)


class FullFile(io.BytesIO):
    """What numpy writes to when it does not write to a real file; a full disk takes a part."""

    def write(self, _):
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a.tar"), "a.tar: no space left to write; free some space"),
        (OSError("2000000 requested and 393200 written"), "no space left to write; free some space"),  # np.save
        (PermissionError(errno.EACCES, "Permission denied", "runs"), "runs: permission denied; change the permissions"),
        (FileNotFoundError(errno.ENOENT, "No such file", "x"), "x: there is no such file or folder; correct the path"),
        (OSError(errno.EIO, "Input/output error", "x"), "x: Input/output error"),
    ],
)
def test_what_the_system_refuses_is_a_sentence(error, sentence):
    assert explain_os_error(error).startswith(sentence)


def test_libraries_that_say_it_in_words_are_understood(capsys):
    """safetensors writes in Rust and raises an error of its own."""
    error = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    def save():
        raise error

    with pytest.raises(SystemExit) as caught:
        run_program(save)
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: no space left to write; free some space")


def test_faults_of_the_code_pass():
    def fault():
        raise KeyError("x")

    with pytest.raises(KeyError):
        run_program(fault)


def test_numpy_passes_on_what_a_file_refuses():
    with pytest.raises(OSError, match="No space left") as caught:
        np.save(FullFile(), np.zeros(10))
    assert caught.value.errno == errno.ENOSPC


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
    with pytest.raises(ValueError, match="a fault 28"):
        run_program(failing(ValueError("a fault 28")))


def test_a_program_that_ends_well_returns(capsys):
    run_program(lambda: sys.stdout.write("done\n"))
    assert capsys.readouterr() == ("done\n", "")


def test_a_reader_that_goes_away_is_no_error():
    code = "from mcl_clip.core.errors import run_program; run_program(lambda: print('x' * 10))"
    read_end, write_end = os.pipe()
    os.close(read_end)
    ended = subprocess.run([sys.executable, "-c", code], stdout=write_end, stderr=subprocess.PIPE, check=False)
    os.close(write_end)
    assert (ended.returncode, ended.stderr) == (141, b"")


def test_a_message_keeps_its_beginning_and_its_end():
    error = UserError(f"row 3 has {b'x' * 50_000!r}; give the path of an image")
    message = str(error)
    assert len(message) <= MAX_MESSAGE
    assert message.startswith("row 3 has b'xxx")
    assert message.endswith("xx'; give the path of an image")
    assert re.search(r"\[\.\.\. 48,\d{3} characters left out \.\.\.\]", message)
    assert str(pickle.loads(pickle.dumps(error))) == message
    assert str(UserError("row 3 has no caption")) == "row 3 has no caption"


def test_values_are_shown_on_one_short_line():
    assert shorten("two\n words") == "two words"
    assert shorten("a" * 500) == "a" * 120 + " ... (500 characters)"
    assert shorten("\x1b[31mred") == "\\x1b[31mred"
    assert shorten_list(["a", "b"]) == "a, b"
    assert shorten_list([]) == "none"
    assert shorten_list(map(str, range(1000)), most=3) == "0, 1, 2, and 997 more"


@pytest.mark.parametrize(
    ("line", "code", "printed"),
    [
        (
            "TrainConfig(steps=-1, global_batch_size=2, lr=1)",
            2,
            "error: {path}, line 4: --stages.K.train.steps must be ",
        ),
        ("{}['x']", 1, "Traceback"),
    ],
)
def test_a_wrong_value_in_a_recipe_is_named_with_its_line(tmp_path, line, code, printed):
    path = tmp_path / "recipe.py"
    path.write_text(f"from mcl_clip import TrainConfig\n\n\n{line}\n")
    ended = subprocess.run([sys.executable, path], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (code, "")
    assert ended.stderr.startswith(printed.format(path=path))
    assert (ended.stderr.count("\n") == 1) == (code == 2)


def test_the_interactive_interpreter_keeps_its_tracebacks(monkeypatch):
    shown = []
    monkeypatch.setattr(sys, "excepthook", lambda *error: shown.append(error))
    explain_uncaught_errors()
    error = UserError("--x is 3")
    with pytest.raises(SystemExit):
        sys.excepthook(UserError, error, None)
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    sys.excepthook(UserError, error, None)
    assert shown == [(UserError, error, None)]
