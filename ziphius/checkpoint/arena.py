"""One piece of memory for all weights of a model, in huge pages where the system has them.

An answer reads all of its weights once a token. In pages of 4 kB each of them costs a walk through
the page table, 87,000 for 340 MB.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable

import torch
from torch import Tensor

ALIGNED = 64
BLOCK = 8 << 20  # bytes taken at a time


class Arena:
    """Gives tensors a place, one behind the other. Nothing is given back before all are gone."""

    def __init__(self, block: int = BLOCK) -> None:
        self._block, self._memory, self._used = block, torch.empty(0, dtype=torch.uint8), 0
        self.bytes = 0  # of all blocks

    def place(self, x: Tensor) -> Tensor:
        """Return a copy of ``x`` in the arena, contiguous."""
        if not x.numel():
            return x
        start = -(-self._used // ALIGNED) * ALIGNED
        if start + x.nbytes > len(self._memory):
            self._memory, start = _huge(max(self._block, x.nbytes)), 0
            self.bytes += len(self._memory)
        self._used = start + x.nbytes
        placed = self._memory[start : self._used].view(x.dtype).view(x.shape)
        return placed.copy_(x)


def block_bytes(sizes: Iterable[int], block: int = BLOCK) -> int:
    """Return the bytes of all blocks in an arena that is given tensors of these sizes, in order."""
    total = end = used = 0
    for size in filter(None, sizes):
        start = -(-used // ALIGNED) * ALIGNED
        if start + size > end:
            end, start = max(block, size), 0
            total += end
        used = start + size
    return total


def _huge(size: int) -> Tensor:
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        block.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(block, dtype=torch.uint8)
