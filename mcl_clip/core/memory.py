"""Memory of the process. Only the standard library."""

import ctypes
import os
import sys

# Parameters of mallopt(3), from glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next request, where it would return large blocks to the system.

    On the CPU, a tower frees its activations and requests them again for every batch. If they go back to the system in
    between, it has to clear and map each page anew, which can take longer than the layers of a small convolutional
    tower (benchmarks/freed_memory.py). The process then stays as large as its largest batch. Does nothing without
    glibc, or where the environment has settings of `malloc` already.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # musl has none
        libc.mallopt(M_MMAP_MAX, 0)  # large blocks come from the heap, of which nothing is returned
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
