"""What this process may use of the machine, what it has used, and how fast it could be."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path

import torch

from ziphius.planning.machine import free_memory

_QUOTA = Path("/sys/fs/cgroup/cpu.max")

# Long enough for the clock, short enough that nobody notices.
_PEAK_SIZE, _PEAK_SIZE_ON_GPU, _PEAK_SECONDS = 1536, 8192, 0.3


def usable_threads() -> int:
    """Return how many threads fit this process: affinity, OMP_NUM_THREADS and a container's quota.

    torch knows the first two. A quota of less than a core still gives one thread.
    """
    threads = torch.get_num_threads()
    try:
        quota, period = _QUOTA.read_text("ascii").split()
        threads = min(threads, int(quota) // int(period))
    except (OSError, ValueError):
        pass  # no cgroup, or no quota ("max")
    return max(1, threads)


def peak_memory_gib() -> float:
    """Return the most memory this process has held at once, in GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def free_bytes(device: str) -> int | None:
    """Return the memory that tensors may still take there; None where the system does not say."""
    if device.startswith("cuda"):
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return int(torch.cuda.mem_get_info()[0] + unused)
    free = free_memory()
    return None if free is None else free.bytes


def peak_flops(device: str, dtype: torch.dtype) -> float:
    """Measure the most operations a second that a large matrix product reaches here.

    The best of the products that fit in a fraction of a second, in ``dtype``: what MFU divides by.
    """
    size = _PEAK_SIZE_ON_GPU if device.startswith("cuda") else _PEAK_SIZE
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best, ends = float("inf"), time.perf_counter() + _PEAK_SECONDS
    while True:
        began = time.perf_counter()
        torch.mm(left, right)
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        now = time.perf_counter()
        best = min(best, now - began)
        if now >= ends:
            return 2 * size**3 / best
