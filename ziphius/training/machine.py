"""What this process may use of the machine, and what it has used."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

_QUOTA = Path("/sys/fs/cgroup/cpu.max")


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
