"""The first process of a cage: it watches what all the others use together, and ends them."""

from __future__ import annotations

import os
import resource
import select
import time

from ziphius.evaluation.cage.view import WORK

# How often use is measured, in seconds: at first often, because programs are short.
_INTERVALS = (0.005, 0.02)
_PAGE = resource.getpagesize()
_TICK = os.sysconf("SC_CLK_TCK")


def watch(pid: int, limits: dict[str, float], lifeline: int) -> dict[str, object]:
    """Wait for process ``pid``, or for a limit; return how it ended.

    ``ended`` is "exit", "timeout", "memory" or "killed" (the lifeline closed: nobody waits any
    more), ``code`` the exit status or minus the signal. Others are left to the namespace's end.
    """
    started = time.monotonic()
    waiting = select.poll()
    waiting.register(os.pidfd_open(pid), select.POLLIN)
    waiting.register(lifeline, select.POLLIN)
    ended, code = "", -9
    while not ended:
        past = time.monotonic() - started
        pause = _INTERVALS[past > 0.2]
        events = waiting.poll(max(0.0, min(pause, limits["seconds"] - past)) * 1000)
        if any(number == lifeline for number, _ in events):
            ended = "killed"
        status = _reap(pid)
        if status is not None:
            ended, code = "exit", status
        elif not ended:
            ended = _over(limits, time.monotonic() - started)
    return {"ended": ended, "code": code, "seconds": time.monotonic() - started}


def _reap(pid: int) -> int | None:
    """Collect the processes that ended; return how ``pid`` did, if it is among them."""
    found = None
    while True:
        try:
            child, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if child == 0:
            return found
        if child == pid:
            found = os.waitstatus_to_exitcode(status)


def _over(limits: dict[str, float], past: float) -> str:
    if past >= limits["seconds"]:
        return "timeout"
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = children.ru_utime + children.ru_stime
    space = os.statvfs(WORK)
    held = (space.f_blocks - space.f_bfree) * space.f_frsize
    resident, inside = 0, [name for name in os.listdir("/proc") if name.isdigit() and name != "1"]
    for name in inside:
        used, pages = _usage(name)
        seconds, resident = seconds + used, resident + pages * _PAGE
    # Pages that processes share count once in the second figure, which takes longer to read.
    memory = limits["memory"]
    if held + resident > memory and held + sum(map(_share, inside)) > memory:
        return "memory"
    return "timeout" if seconds > limits["cpu_seconds"] else ""


def _usage(name: str) -> tuple[float, int]:
    """Return the seconds of a process and of its children that ended, and its resident pages."""
    try:
        with open(f"/proc/{name}/stat", "rb") as file:
            # A name may hold blanks and brackets.
            fields = file.read().rpartition(b")")[2].split()
    except OSError:  # it has ended
        return 0.0, 0
    return sum(map(int, fields[11:15])) / _TICK, int(fields[21])


def _share(name: str) -> int:
    """Return the bytes of a process, each shared page by its part; all of them where hidden."""
    try:
        with open(f"/proc/{name}/smaps_rollup", "rb") as file:
            for line in file:
                if line.startswith(b"Pss:"):
                    return int(line.split()[1]) << 10
    except ProcessLookupError:  # it has ended, its memory is gone
        return 0
    except OSError:
        pass
    return _usage(name)[1] * _PAGE
