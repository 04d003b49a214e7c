import errno
import io

import numpy as np
import pytest
from safetensors import SafetensorError

from mcl_clip.core.console import run_program
from mcl_clip.core.errors import explain_os_error, os_error_in


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
    assert os_error_in(error).errno == errno.ENOSPC
    assert os_error_in(ValueError("28")) is None

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
