"""Processes that start, stop and fail together. They are small programs; recipes are in tests/recipes."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mcl_clip.cli import commands
from mcl_clip.core.errors import UserError
from mcl_clip.tools import launch as module
from mcl_clip.tools.launch import Placement, launch, read_placement, resolve_placement

REPOSITORY = Path(__file__).parents[3]
TWO = resolve_placement({"num_processes": 2}, gpus=0)
HEADER = """
import os, signal, sys, time
from pathlib import Path
rank, folder = int(os.environ.get("RANK", 0)), Path(sys.argv[1])
"""
# As a recipe does: the signals are let through, and answered.
LISTENING = """
def note(number, frame):
    with (folder / f"signals-{rank}").open("a") as file:
        file.write(f"{number} ")
    sys.exit(EXIT)
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, note)
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
(folder / f"pid-{rank}").write_text(str(os.getpid()))
"""
WAITING = "time.sleep(60)\n"


@pytest.fixture(autouse=True)
def _ctrl_c_is_heard():
    """Also where the tests run in the background, which shells protect from Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def command(folder, body, **names):
    for name, value in names.items():
        body = body.replace(name, str(value))
    (folder / "program.py").write_text(HEADER + body)
    return [sys.executable, "-S", str(folder / "program.py"), str(folder)]


def wait_for(condition, timeout_s=30.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def pids(folder):
    wait_for(lambda: all((folder / f"pid-{rank}").exists() and (folder / f"pid-{rank}").read_text() for rank in (0, 1)))
    return [int((folder / f"pid-{rank}").read_text()) for rank in (0, 1)]


def while_it_runs(folder, action):
    """Do something from another thread once both processes listen."""
    threading.Thread(target=lambda: action(pids(folder)), daemon=True).start()


def test_processes_know_their_places(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    names = [
        *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
        *("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "GLOO_SOCKET_IFNAME"),
    ]
    body = f"(folder / f'env-{{rank}}').write_text(' '.join(os.environ.get(name, '-') for name in {names}))"
    cores = len(os.sched_getaffinity(0))
    assert launch(command(tmp_path, body), TWO) == 0
    for rank in (0, 1):
        found = (tmp_path / f"env-{rank}").read_text()
        threads, port = max(1, cores // 2), TWO.main_process_port
        assert found == f"{rank} {rank} 2 2 127.0.0.1 {port} {threads} - lo"
    second = resolve_placement(
        {"num_processes": 4, "num_machines": 2, "machine_rank": 1, "main_process_ip": "10.0.0.7", "gpu_ids": "2,3"},
        gpus=4,
    )
    assert launch(command(tmp_path, body), second) == 0
    assert (tmp_path / "env-3").read_text() == f"3 1 4 2 10.0.0.7 29500 {max(1, cores // 2)} 2,3 -"
    (tmp_path / "env-0").unlink()
    assert launch(command(tmp_path, body), resolve_placement({}, gpus=0)) == 0
    assert (tmp_path / "env-0").read_text() == "- - - - - - - - lo"  # as without a launcher


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_handed_on_once_and_the_code_is_that_of_the_processes(tmp_path, number):
    while_it_runs(tmp_path, lambda _: [os.kill(os.getpid(), number) for _ in range(2)])
    body = LISTENING.replace("sys.exit(EXIT)", "pass")  # as one that still has to save
    body += "while not (folder / f'signals-{rank}').exists(): time.sleep(0.01)\ntime.sleep(1)\nsys.exit(85)\n"
    assert launch(command(tmp_path, body), TWO, planned_codes={0, 85}) == 85
    assert [(tmp_path / f"signals-{rank}").read_text() for rank in (0, 1)] == [f"{int(number)} "] * 2
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()


def test_a_process_that_ends_as_planned_leaves_the_others_their_time(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "GRACE_PERIOD_S", 0.1)
    body = LISTENING.replace("sys.exit", "time.sleep(1.5 * (1 - rank)); (folder / f'saved-{rank}').touch(); sys.exit")
    while_it_runs(tmp_path, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    assert launch(command(tmp_path, body + WAITING, EXIT=0), TWO) == 0
    assert (tmp_path / "saved-0").exists()


def test_after_a_signal_nobody_waits_for_a_process_that_hangs(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "STOP_PERIOD_S", 0.5)
    body = LISTENING.replace("sys.exit(EXIT)", "rank or sys.exit(EXIT)") + "while True: time.sleep(1)\n"
    while_it_runs(tmp_path, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    assert launch(command(tmp_path, body, EXIT=85), TWO, planned_codes={0, 85}) == 85
    assert not any(is_alive(pid) for pid in pids(tmp_path))


def test_signals_wait_until_a_program_listens(tmp_path):
    body = "(folder / f'loading-{rank}').touch(); time.sleep(1)\n" + LISTENING + WAITING
    threading.Thread(
        target=lambda: (wait_for((tmp_path / "loading-1").exists), os.kill(os.getpid(), signal.SIGTERM)), daemon=True
    ).start()
    assert launch(command(tmp_path, body, EXIT=0), TWO) == 0


def test_a_second_signal_kills_all(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(module, "SAME_REQUEST_S", 0.2)
    body = LISTENING.replace("sys.exit(EXIT)", "pass") + "while True: time.sleep(1)\n"

    def twice(_):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)

    while_it_runs(tmp_path, twice)
    assert launch(command(tmp_path, body), TWO) == 128 + signal.SIGINT
    assert capfd.readouterr().err == "stopped at once by SIGINT\n"
    assert not any(is_alive(pid) for pid in pids(tmp_path))


def test_the_first_failure_ends_the_job_with_its_code(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(module, "GRACE_PERIOD_S", 0.3)
    body = LISTENING + "if rank: sys.exit('error: the disk is full')\ntime.sleep(60)\n"
    started = time.monotonic()
    assert launch(command(tmp_path, body), TWO) == 1
    assert time.monotonic() - started < 30
    assert capfd.readouterr().err == "error: the disk is full\n"
    assert not any(is_alive(pid) for pid in pids(tmp_path))


def test_the_first_of_several_failures_counts(tmp_path):
    assert launch(command(tmp_path, "time.sleep(1 - rank); sys.exit(2 if rank else 3)"), TWO) == 2


def test_a_killed_process_is_named(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(module, "GRACE_PERIOD_S", 0.3)
    while_it_runs(tmp_path, lambda pids: os.kill(pids[1], signal.SIGKILL))
    assert launch(command(tmp_path, LISTENING + WAITING), TWO) == 128 + signal.SIGKILL
    assert capfd.readouterr().err == (
        "error: process 1 of 2 was killed by SIGKILL (the system does this when memory runs out), and the others "
        "are stopped; the same command continues from the newest checkpoint\n"
    )
    assert not any(is_alive(pid) for pid in pids(tmp_path))


def test_what_a_process_has_started_ends_with_it(tmp_path):
    body = "import subprocess\n(folder / 'child').write_text(str(subprocess.Popen(['sleep', '60']).pid))\nsys.exit(2)\n"
    assert launch(command(tmp_path, body), resolve_placement({}, gpus=0)) == 2
    wait_for(lambda: not is_alive(int((tmp_path / "child").read_text())))


def test_no_process_outlives_a_killed_launcher(tmp_path):
    launcher = multiprocessing.get_context("fork").Process(
        target=launch, args=(command(tmp_path, LISTENING + WAITING), TWO)
    )
    launcher.start()
    started = pids(tmp_path)
    assert all(is_alive(pid) for pid in started)
    launcher.kill()
    launcher.join()
    wait_for(lambda: not any(is_alive(pid) for pid in started))


def test_a_configuration_of_accelerate(tmp_path):
    folder = REPOSITORY / "recipes/accelerate"
    assert resolve_placement(read_placement(folder / "two_cpu_processes.yaml"), gpus=0).num_processes == 2
    nodes = {**read_placement(folder / "two_nodes.yaml"), "machine_rank": 1, "main_process_ip": "node0"}
    assert resolve_placement(nodes, gpus=8) == Placement(
        num_processes=16, num_machines=2, machine_rank=1, main_process_ip="node0", main_process_port=0
    )
    (tmp_path / "cpu.yaml").write_text("distributed_type: 'NO'\nuse_cpu: true\nnum_processes: 1\n")
    assert resolve_placement(read_placement(tmp_path / "cpu.yaml"), gpus=4).gpu_ids == ""


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("distributed_type: FSDP\n", "asks for distributed_type FSDP, but only plain data parallelism is supported"),
        ("distributed_type: MULTI_GPU\nfsdp_config: {fsdp_version: 2}\n", "asks for fsdp_config"),
        ("distributed_type: MULTI_GPU\nmixed_precision: bf16\n", "precision is a setting of each stage"),
        ("distributed_type: MULTI_GPU\nnum_gpus: 2\n", "is not a configuration of Accelerate"),
        ("a: [\n", "is not a configuration of Accelerate"),
    ],
)  # fmt: skip
def test_other_configurations_are_refused(tmp_path, text, sentence):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=sentence):
        read_placement(tmp_path / "config.yaml")


@pytest.mark.parametrize(
    ("settings", "gpus", "sentence"),
    [
        ({"num_processes": 8}, 4, r"8 processes on this machine need a GPU each, and it has 4; use --num-processes 4"),
        ({"num_processes": 3, "gpu_ids": "0,2"}, 4, "and it has 2; use --num-processes 2"),
        ({"num_processes": -1}, 0, "--num-processes -1 cannot be divided among --num-machines 1"),
        ({"num_processes": 3, "num_machines": 2}, 0, "use a multiple of the number of machines"),
        ({"num_processes": 4, "num_machines": 2}, 2, "2 machines need --main-process-ip"),
        ({"machine_rank": 1}, 0, "--machine-rank 1 is not from 0 to 0"),
    ],
)  # fmt: skip
def test_processes_that_do_not_fit_are_refused(settings, gpus, sentence):
    with pytest.raises(UserError, match=sentence):
        resolve_placement(settings, gpus=gpus)


@pytest.mark.parametrize(("gpus", "processes"), [(0, 1), (1, 1), (4, 4)])
def test_by_default_each_gpu_has_a_process(gpus, processes):
    assert resolve_placement({}, gpus=gpus).num_processes == processes


def test_a_port_is_free(tmp_path):
    ports = {resolve_placement({}, gpus=0).main_process_port for _ in range(3)}
    assert all(port > 1023 for port in ports)
    assert resolve_placement({"main_process_port": 29501}, gpus=0).main_process_port == 29501


def run_command(monkeypatch, *arguments):
    """What `mcl-clip launch` starts: the command, the placement, and its exit code."""
    started = []

    def note(command, placement, planned_codes):
        started.append((command[1:], placement.num_processes, planned_codes))
        return 7

    monkeypatch.setattr(commands, "launch", note)
    monkeypatch.setattr(sys, "argv", ["mcl-clip", "launch", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        commands.command()
    return started, caught.value.code


def test_the_command_starts_the_recipe_with_its_arguments(monkeypatch):
    recipe, own = str(REPOSITORY / "recipes/photos.py"), ("--num_processes=2", "--main-process-port", "29501")
    others = ("--machine.preempt-exit-code", "85", "--seed", "3")
    expected = [([recipe, *others], 2, {0, 129, 130, 85})]
    assert run_command(monkeypatch, *own, recipe, *others) == (expected, 7)
    assert run_command(monkeypatch, recipe, *own, *others) == (expected, 7)
    file = REPOSITORY / "recipes/accelerate/two_cpu_processes.yaml"
    assert run_command(monkeypatch, recipe, others[0], others[1], "--config-file", file, *others[2:]) == (expected, 7)
    assert run_command(monkeypatch, recipe, "--config-file", file, "--num-processes", "4")[0][0][1] == 4


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("nowhere.py",), "there is no recipe nowhere.py"),
        (("recipes/photos.py", "--seed", "many"), "many"),
        (("recipes/photos.py", "--num-processes", "7"), "does not divide by 7 processes; use a multiple of 7"),
        (("recipes/photos.py", "--config-file", "nowhere.yaml"), "nowhere.yaml"),
        (("recipes/photos.py", "--machine-rank", "2"), "--machine-rank 2 is not from 0 to 0"),
    ],
)  # fmt: skip
def test_mistakes_are_found_before_anything_starts(monkeypatch, capsys, arguments, sentence):
    monkeypatch.chdir(REPOSITORY)
    assert run_command(monkeypatch, *arguments) == ([], 2)
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "state", "requeued"), [(85, "RUNNING", True), (85, "COMPLETING", False), (2, "RUNNING", False)]
)
def test_the_slurm_script_queues_a_stopped_job_again(tmp_path, monkeypatch, code, state, requeued):
    programs = {
        "srun": f'shift; "$@"; exit {code}',
        "mcl-clip": f'echo "$@" > {tmp_path}/launched',
        "squeue": f"echo {state}",
        "scontrol": f'[ "$1" = show ] && echo node7 || echo "$@" > {tmp_path}/requeued',
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name, value in {"SLURM_JOB_ID": "42", "SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "node[7-8]"}.items():
        monkeypatch.setenv(name, value)
    recipe = [str(REPOSITORY / "recipes/photos.py"), "--seed", "3"]
    ended = subprocess.run(["bash", REPOSITORY / "recipes/accelerate/slurm.sh", *recipe], check=False)
    assert ended.returncode == (0 if requeued else code)
    assert (tmp_path / "requeued").exists() == requeued
    if requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 42\n"
    monkeypatch.chdir(REPOSITORY)
    started, _ = run_command(monkeypatch, *(tmp_path / "launched").read_text().split()[1:])
    assert started == [([*recipe, "--machine.preempt-exit-code", "85"], 16, {0, 129, 130, 85})]
