"""How much of a weight may be in work at a time, by the memory that a process may hold."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Mapping
from pathlib import Path

from ziphius.config.errors import BadInput
from ziphius.kernels.quantize import TILE

# Larger pieces are not faster.
PIECE_BYTES = 192 * 2**20
# What comparisons and checksums hold, whatever a weight's size.
LEAST_BYTES = 64 * 2**20
# Of a number in work: as stored, in FP32, as written, and what rounding holds in between.
NUMBER_BYTES = 24
# FP8 blocks are made from a row of them at a time, of which the kernels hold more.
BLOCK_NUMBER_BYTES = 24
_MIB = 2**20


def numbers_at_a_time(shapes: Mapping[str, tuple[int, ...]], memory: int | None) -> int:
    """Return how many numbers of a weight may be in work if this process may hold ``memory`` bytes.

    ``shapes`` are those of all weights. Without ``memory`` what is held already does not count.
    Raises BadInput, naming the widest weight, when 128 of its rows would be too many.
    """
    widths = {name: shape[1] for name, shape in shapes.items() if len(shape) > 1}
    widest = max(widths, key=widths.__getitem__)
    row = widths[widest] * TILE
    least = max(LEAST_BYTES, row * (NUMBER_BYTES + BLOCK_NUMBER_BYTES))
    room = PIECE_BYTES
    if memory is not None:
        held = resident_bytes()
        if held + least > memory:
            raise BadInput(
                f"--memory: {memory // _MIB:,} MiB are too little: the program itself holds "
                f"{held // _MIB:,} MiB, and {TILE} rows of {widest} take {least // _MIB:,} MiB: "
                f"give it {-(-(held + least) // _MIB) + 16}MiB or more"
            )
        room = min(room, memory - held)
    return max(row, (room - row * BLOCK_NUMBER_BYTES) // NUMBER_BYTES)


def resident_bytes() -> int:
    """Return the bytes of memory that this process holds now, or at most where nobody says now."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
