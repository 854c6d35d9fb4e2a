"""How fast memory can be read, which bounds how fast weights can."""

from __future__ import annotations

import time

import torch

ARRAY_BYTES = 2**29  # far beyond any cache


class Memory:
    """Sums an array with all threads of torch; memory is what it waits for."""

    def __init__(self, size: int = ARRAY_BYTES) -> None:
        self._array = torch.ones(size // 4)

    def read(self, times: int = 3) -> float:
        """Return the best of some readings, in bytes a second."""
        seconds = []
        for _ in range(times):
            began = time.perf_counter()
            self._array.sum()
            seconds.append(time.perf_counter() - began)
        return self._array.nbytes / min(seconds)
