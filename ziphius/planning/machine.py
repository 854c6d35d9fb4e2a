"""What a machine has for a checkpoint: memory that is free, and how fast files come into it."""

from __future__ import annotations

import hashlib
import os
import resource
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

MEMORY = Path("/proc/meminfo")
GROUPS = Path("/sys/fs/cgroup")
# A sample is small enough that nobody waits for it, and in pieces all over the files, because some
# parts of them may be in the system's cache.
PIECES, PIECE_BYTES, MOST_SECONDS = 16, 2**21, 0.5


class Free(NamedTuple):
    """Bytes that this process may still take, and what limits it."""

    bytes: int
    basis: str


class Rates(NamedTuple):
    """Bytes a second: read from files, put through SHA-256, and copied into fresh memory."""

    read: float
    hashed: float
    copied: float
    sample_bytes: int


def free_memory(meminfo: Path = MEMORY, groups: Path = GROUPS) -> Free | None:
    """Return the least of what the system, its control groups and ``ulimit -v`` leave.

    None where the system does not say.
    """
    found = [*_system(meminfo), *_control_groups(groups), *_own_limit()]
    return min(found, default=None)


def measure_rates(files: Iterable[Path]) -> Rates | None:
    """Read a sample of some files and time what loading does with it; None for no bytes."""
    began = time.perf_counter()
    sample = _sample(list(files), began + MOST_SECONDS)
    read = time.perf_counter()
    size = sum(map(len, sample))
    if not size:
        return None
    for piece in sample:
        hashlib.sha256(piece)
    hashed = time.perf_counter()
    copies = [bytearray(piece) for piece in sample]
    copied = time.perf_counter()
    del copies
    times = (read - began, hashed - read, copied - hashed)
    read_rate, hash_rate, copy_rate = (size / max(seconds, 1e-9) for seconds in times)
    return Rates(read_rate, hash_rate, copy_rate, size)


def _sample(files: Sequence[Path], until: float) -> list[bytes]:
    """Read pieces at even distances over all files, the first of each whatever the time."""
    total = sum(path.stat().st_size for path in files)
    stride = max(PIECE_BYTES, total // PIECES)
    pieces: list[bytes] = []
    offset = 0
    for path in files:
        size = path.stat().st_size
        with path.open("rb", buffering=0) as file:
            while offset < size and (not pieces or time.perf_counter() < until):
                pieces.append(os.pread(file.fileno(), PIECE_BYTES, offset))
                offset += stride
        offset -= size
    return pieces


def _system(meminfo: Path) -> Iterator[Free]:
    try:
        lines = meminfo.read_text("ascii").splitlines()
        table = dict(line.split(":", 1) for line in lines)
        yield Free(int(table["MemAvailable"].split()[0]) * 1024, "free on this machine")
    except (OSError, ValueError, KeyError):
        pass  # not Linux


def _control_groups(groups: Path) -> Iterator[Free]:
    """Yield what is left in every control group (version 2) that this process is in."""
    try:
        own = Path("/proc/self/cgroup").read_text("utf-8").splitlines()
    except OSError:
        return
    inner = next((line[4:] for line in own if line.startswith("0::/")), "")
    for name in (inner, *map(str, Path(inner).parents)):
        group = groups / name
        try:
            limit = int((group / "memory.max").read_text("ascii"))
            used = int((group / "memory.current").read_text("ascii"))
            statistics = (group / "memory.stat").read_text("ascii").split()
            cached = int(statistics[statistics.index("inactive_file") + 1])
        except (OSError, ValueError):
            continue  # no limit ("max"), or not a group
        yield Free(max(0, limit - used + cached), "left in this control group")


def _own_limit() -> Iterator[Free]:
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft == resource.RLIM_INFINITY:
        return
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
    except (OSError, ValueError):
        pages = 0
    yield Free(max(0, soft - pages * resource.getpagesize()), "left by ulimit -v")
