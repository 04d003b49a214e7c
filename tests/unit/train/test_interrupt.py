"""What a job makes of signals: alone, in several processes, once and twice."""

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from mcl_clip.core.distributed import barrier, rank, world_size
from mcl_clip.core.errors import PlannedStop
from mcl_clip.train import interrupt as module
from mcl_clip.train.interrupt import Interrupt, wait_for_the_cause

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _signals_of_a_terminal_are_heard():
    """Also where the tests run in the background or by `nohup`, which protect from Ctrl-C and the end of a terminal."""
    heard = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in heard.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("number", "name", "code"),
    [
        (signal.SIGTERM, "SIGTERM", 85),
        (signal.SIGUSR1, "SIGUSR1", 85),
        (2, "Ctrl-C", 130),
        (signal.SIGHUP, "the end of its terminal", 129),
    ],
)
def test_a_process_on_its_own_stops_at_once(number, name, code):
    before = [signal.getsignal(known) for known in module.SIGNALS]

    def work():
        with Interrupt(85).listening() as interrupt:
            interrupt.phase = "stage-0/eval"
            send(number)
            pytest.fail("it went on")

    with pytest.raises(PlannedStop, match=f"^stopped by {name} in stage-0/eval: .*; the same command cont") as caught:
        work()
    assert caught.value.exit_code == code
    assert [signal.getsignal(known) for known in module.SIGNALS] == before


def test_a_deferred_signal_waits_until_it_is_asked_for():
    with Interrupt().listening() as interrupt:
        with interrupt.deferred():
            assert not interrupt.asked(CPU)
            assert not interrupt.noticed()
            send(signal.SIGTERM)
            send(signal.SIGTERM)  # a launcher and a scheduler
            assert interrupt.asked(CPU)
            assert interrupt.noticed()
        with pytest.raises(PlannedStop, match="SIGTERM"):
            interrupt.check()


def test_nothing_happens_without_a_signal():
    with Interrupt().listening() as interrupt:
        interrupt.check()
        assert not interrupt.asked(CPU)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])  # of `&` and of `nohup`
def test_signals_that_a_shell_keeps_away_stay_away(number):
    before = signal.signal(number, signal.SIG_IGN)
    with Interrupt().listening():
        send(number)
    signal.signal(number, before)


def test_a_held_back_signal_is_let_through():
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)  # not to another thread, which does not hold it back
    with pytest.raises(PlannedStop), Interrupt().listening():
        pytest.fail("it went on")
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()


def test_a_second_request_ends_a_process_that_handles_nothing():
    """The main thread is in a call that does not return to Python, as one that waits for a lost process."""
    program = """
import ctypes
from mcl_clip.train import interrupt
interrupt.SAME_REQUEST_S = 0.2
with interrupt.Interrupt().listening() as found, found.deferred():
    print("ready", flush=True)
    mutex, library = ctypes.create_string_buffer(64), ctypes.CDLL(None)
    for _ in range(2):
        library.pthread_mutex_lock(mutex)  # the second never returns
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.6)
        assert process.poll() is None  # the same request twice
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30) == ("", "stopped at once by SIGINT\n")
        assert process.returncode == 128 + signal.SIGINT
    finally:
        process.kill()
        process.communicate()


def stop_of_all(signalled, number):
    """The step at which each process stops when one is signalled at step 3, and what is said."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests run in the background
    with Interrupt(85).listening() as interrupt, interrupt.deferred():
        for step in range(1, 10):
            if step == 3 and rank() == signalled:
                send(number)
            if interrupt.asked(CPU):
                break
        stop = interrupt.stop("saved")
    return step, str(stop), stop.exit_code


@pytest.mark.parametrize(
    ("size", "number", "name", "code"), [(2, signal.SIGUSR1, "SIGUSR1", 85), (4, signal.SIGINT, "Ctrl-C", 130)]
)
def test_all_processes_stop_at_the_step_at_which_one_was_asked(pool, size, number, name, code):
    found = pool.run(stop_of_all, size, size - 1, number)
    assert found == [(3, f"stopped by {name}: saved; the same command continues", code)] * size


def stop_between_phases(signalled):
    """Whether each process gets past a signal to one of them, and then past a check."""
    with Interrupt().listening() as interrupt:
        interrupt.check()
        if rank() == signalled:
            send(signal.SIGTERM)
        barrier()
        with contextlib.suppress(PlannedStop):
            interrupt.check()
            return "went on"
        return "stopped"


def test_several_processes_stop_together_between_phases(pool):
    assert pool.run(stop_between_phases, 2, 1) == ["stopped", "stopped"]


def endless():
    yield 1
    while True:
        time.sleep(0.01)


def wait_in_vain():
    with Interrupt(85).listening() as interrupt, interrupt.deferred():
        interrupt.phase = "stage-0/train"
        batches = interrupt.waiting_for(endless())
        assert next(batches) == 1
        send(signal.SIGTERM)
        time.sleep(0.5)  # no wait for data
        next(batches)


def test_a_process_does_not_wait_for_data_that_does_not_come(monkeypatch):
    monkeypatch.setattr(module, "GIVE_UP_S", 0.3)
    monkeypatch.setattr(module, "TICK_S", 0.05)
    before, started = signal.getsignal(signal.SIGALRM), time.monotonic()
    with pytest.raises(PlannedStop, match="stopped by SIGTERM in stage-0/train: its data did not come") as caught:
        wait_in_vain()
    assert caught.value.exit_code == 85
    assert 0.7 < time.monotonic() - started < 10
    assert signal.getsignal(signal.SIGALRM) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_data_that_comes_late_is_waited_for_without_a_signal(monkeypatch):
    monkeypatch.setattr(module, "GIVE_UP_S", 0.05)
    monkeypatch.setattr(module, "TICK_S", 0.05)
    with Interrupt().listening() as interrupt, interrupt.deferred():
        assert list(interrupt.waiting_for(time.sleep(0.2) or number for number in range(2))) == [0, 1]


def give_up(waiting):
    """How each process ends when the data of one do not come, and the others are in a collective call."""
    module.GIVE_UP_S, module.TICK_S, module.LOST_PEER_S = 0.3, 0.05, 0.1
    try:
        with Interrupt(85).listening() as interrupt, interrupt.deferred():
            send(signal.SIGTERM)
            if rank() == waiting:
                next(interrupt.waiting_for(itertools.islice(endless(), 1, None)))
            raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:2")
    except PlannedStop as stop:
        return stop.exit_code, str(stop)


def test_all_processes_stop_as_planned_when_one_gives_up(pool):
    lost, kept = pool.run(give_up, 2, 0)
    assert lost == (
        85,
        "stopped by SIGTERM: its data did not come; what is finished is kept; the same command continues",
    )
    assert kept == (85, "stopped by SIGTERM: what is finished is kept; the same command continues")


def test_outside_the_main_thread_signals_are_left_alone():
    before, found = signal.getsignal(signal.SIGTERM), []

    def work():
        with Interrupt().listening() as interrupt:
            found.append(signal.getsignal(signal.SIGTERM))
            interrupt.check()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before]


def notice(signalled):
    with Interrupt().listening() as interrupt:
        before = interrupt.noticed()
        barrier()
        if rank() == signalled:
            send(signal.SIGTERM)
            assert interrupt.noticed()
        barrier()
        return before, interrupt.noticed()


def test_processes_notice_without_waiting_for_each_other(pool):
    assert pool.run(notice, 2, 1) == [(False, True), (False, True)]


def losing(text):
    started = time.monotonic()
    module.LOST_PEER_S = 0.5
    wait_for_the_cause(RuntimeError(text))
    return world_size() > 1 and time.monotonic() - started > 0.4


def test_only_what_another_process_caused_waits(pool):
    closed = "[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:2"
    assert pool.run(losing, 2, closed) == [True, True]
    assert pool.run(losing, 2, "the main process failed: division by zero") == [True, True]
    assert pool.run(losing, 2, "mat1 and mat2 cannot be multiplied") == [False, False]
    assert pool.run(losing, 1, closed) == [False]


class _Event:
    """A CUDA event that says when it was waited for."""

    waited = 0

    def record(self):
        pass

    def synchronize(self):
        _Event.waited += 1


def test_on_gpus_the_answer_is_that_of_the_step_before(monkeypatch):
    """The host waits for the flag of the last step, while the device works on this one."""
    empty = torch.empty

    def pageable(*size, pin_memory, **options):
        assert pin_memory  # of which there is none here
        return empty(*size, **options)

    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch, "empty", pageable)
    interrupt, flags = Interrupt(), [0, 0, 15, 15]
    answers = [interrupt._of_last_call(torch.tensor([flag], dtype=torch.int32)) for flag in flags]
    assert answers == [0, 0, 0, 15]
    assert _Event.waited == 3
