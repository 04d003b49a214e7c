"""Memory counters of the current process, for benchmarks that run each case in a process of its own. Linux only."""

from pathlib import Path


def memory_mb(counter: str) -> float:
    """Read a memory counter of this process, such as VmHWM or VmRSS, in 10^6 bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[counter].split()[0]) * 1024 / 1e6
