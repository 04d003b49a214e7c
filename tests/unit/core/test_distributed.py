import multiprocessing
import os
import signal
import subprocess
import time

import numpy as np
import pytest

from mcl_clip.core import distributed
from mcl_clip.core.distributed import leave_signals_to_parent, permutation, sample_of_permutation


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
@pytest.mark.parametrize(("size", "count"), [(0, 3), (5, 0), (5, 9), (300, 1), (300, 40), (301, 300)])
def test_a_sample_is_the_start_of_a_permutation(monkeypatch, block, size, count):
    monkeypatch.setattr(distributed, "SAMPLE_BLOCK", block)
    expected = np.sort(permutation(size, "rows", 3)[:count])
    np.testing.assert_array_equal(sample_of_permutation(size, count, "rows", 3), expected)


def test_a_sample_keeps_the_first_of_equal_words(monkeypatch):
    monkeypatch.setattr(distributed, "SAMPLE_BLOCK", 4)
    words = np.random.default_rng(0).integers(0, 5, 60).astype(np.uint64)
    monkeypatch.setattr(distributed, "random_words_between", lambda start, stop, *name: words[start:stop])
    for count in (1, 9, 30):
        assert sample_of_permutation(60, count, "rows").tolist() == sorted(permutation(60, "rows")[:count].tolist())


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
