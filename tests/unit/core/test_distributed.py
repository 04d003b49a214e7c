import multiprocessing
import os
import signal
import subprocess
import time

from mcl_clip.core.distributed import leave_signals_to_parent


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
