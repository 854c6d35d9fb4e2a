"""One entry measured: every version checked, then timed, and what it reaches of the peaks."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from typing import Any

import torch

from support.gpu.check import check, wanted_of
from support.gpu.clock import Clock
from support.gpu.entry import COPY, OURS, Entry, Place, Version
from support.gpu.peaks import Peaks

Row = dict[str, Any]


class Lost(Exception):
    """The device answers nothing any more: its process has to end. ``row`` is what there is."""

    def __init__(self, row: Row) -> None:
        super().__init__("the device is lost")
        self.row = row


def versions_of(entry: Entry, place: Place, *, slow: bool, tune: bool) -> list[Version]:
    """Return what is measured: ours and the peers on a GPU, else the reference and the peers."""
    if place.device.type != "cuda":
        return [entry.plain, *(v for v in entry.peers if not v.slow)]
    if tune:
        return [entry.ours, *entry.candidates()]
    return [entry.ours, *(v for v in entry.peers if slow or not v.slow)]


def measure(
    entry: Entry, versions: Sequence[Version], place: Place, clock: Clock, peaks: Peaks, seed: int
) -> Row:
    """Return an entry's row. A version that fails says why. Raises Lost when nothing can go on."""
    floor, bound_by = peaks.floor(entry)
    row: Row = {
        "section": entry.section,
        "name": entry.name,
        "flops": entry.flops,
        "bytes": entry.nbytes,
        "floor_us": round(floor * 1e6, 3),
        "floor_is": bound_by,
        "versions": {},
    }
    wanted = wanted_of(entry, place, seed)
    for version in versions:
        try:
            figures = _version(entry, version, place, clock, peaks, seed, wanted)
        except Exception as error:
            figures = {"error": one_line(error)}
            if not alive(place.device):
                row["versions"][version.name] = figures
                raise Lost(row) from error
        row["versions"][version.name] = figures
        _tidy(place)
    row["goal"] = _goal(entry, row["versions"])
    return row


def _version(
    entry: Entry,
    version: Version,
    place: Place,
    clock: Clock,
    peaks: Peaks,
    seed: int,
    wanted: Sequence[torch.Tensor],
) -> Row:
    began = time.perf_counter()
    off = check(entry, version, place, seed, wanted)
    _wait(place.device)
    first = time.perf_counter() - began
    one = version.prepare(entry.make(place.generator(seed + 1)))
    more = range(clock.sets(one) - 1)
    sets = [one, *(version.prepare(entry.make(place.generator(seed + 2 + n))) for n in more)]
    seconds = clock.seconds(version.run, sets)
    floor, _ = peaks.floor(entry)
    figures = {
        "us": round(seconds * 1e6, 3),
        "gb_per_s": round(entry.nbytes / seconds / 1e9, 2),
        "of_copy": round(entry.nbytes / seconds / peaks.copy, 4),
        "of_floor": round(floor / seconds, 4),
        "relative_error": float(f"{off:.3g}"),
        "sets": len(sets),
        "first_seconds": round(first, 2),
    }
    if entry.flops:
        matrix = peaks.fp8 if entry.peak == "fp8" and peaks.fp8 else peaks.bf16
        figures["tflops"] = round(entry.flops / seconds / 1e12, 4)
        figures["of_matrix_peak"] = round(entry.flops / seconds / matrix, 4)
    return figures


def _goal(entry: Entry, found: Row) -> Row | None:
    """Say what was asked for and what was reached; ``None`` where that cannot be said."""
    ours = found.get(OURS, {})
    if entry.goal is None or "us" not in ours:
        return None
    against, wanted = entry.goal
    if against == COPY:
        reached = ours["of_copy"]
    elif "us" in found.get(against, {}):
        reached = round(found[against]["us"] / ours["us"], 3)
    else:
        return None
    return {"against": against, "wanted": wanted, "reached": reached, "met": reached >= wanted}


def alive(device: torch.device) -> bool:
    """Say whether a device still works: an illegal access ends all that its process can do."""
    try:
        _wait(device)
        return bool((torch.ones(1, device=device) + 1).item() == 2)
    except Exception:
        return False


def one_line(error: BaseException) -> str:
    """Return an error as a line of bounded length."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _tidy(place: Place) -> None:
    if place.device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
