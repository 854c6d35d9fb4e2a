"""How the C library deals with memory that torch has freed."""

from __future__ import annotations

import ctypes
import sys

# Parameters of glibc's mallopt.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_LARGE = 2**31 - 1


def keep_freed_memory() -> bool:
    """Have this process keep freed memory for its next use; say whether that could be arranged.

    By default glibc returns every large tensor's pages to the system, and the next tensor of that
    size is given new ones, zeroed, a page at a time. A training step frees and takes the same sizes
    again and again. The process then stays as large as it once was.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    settings = ((_MMAP_THRESHOLD, _LARGE), (_TRIM_THRESHOLD, _LARGE), (_TOP_PAD, 2**26))
    taken = [mallopt(name, value) == 1 for name, value in settings]
    return all(taken)
