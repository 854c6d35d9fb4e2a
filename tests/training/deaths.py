"""A process dies before each change that it makes to a disk, one process for each death."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ziphius.checkpoint import files

# The functions of C below which a disk is changed, whoever calls them; some only read.
_CHANGES = frozenset(
    {
        *("open", "write", "writelines", "flush", "close", "truncate", "ftruncate", "fsync"),
        *("rename", "replace", "link", "symlink", "unlink", "remove", "mkdir", "rmdir", "chmod"),
        *("sendfile", "copy_file_range", "utime", "serialize_file"),
    }
)
_TAG = re.compile(r"-\d+-[0-9a-f]{8}-[0-9a-f]{8}")


def every_death(action: Callable[[], object], place: Path, left: Path) -> None:
    """Run ``action`` on the folder ``place`` again and again, each time dying at another change.

    Every state in which a death can leave ``place`` is moved to ``left/N``, and what is there when
    nothing dies too; changes after which no name and no byte differs leave one state. ``action``
    runs in forks of this process and must write in ``place`` only.
    """
    before = place.with_name(f"{place.name}.before")
    place.rename(before)
    left.mkdir()
    shutil.copytree(before, place, symlinks=True)
    seen = left / "seen"
    deaths = [0, *(int(line) for line in _listed(action, place, seen))]
    for death in deaths:
        shutil.rmtree(place)
        shutil.copytree(before, place, symlinks=True)
        code = _exit_code(action, partial(_die, death))
        assert code == (-signal.SIGKILL if death else 0), f"death {death}: exit code {code}"
        shutil.copytree(place, left / str(death), symlinks=True)
    seen.unlink()


def _listed(action: Callable[[], object], place: Path, seen: Path) -> list[str]:
    """Return the numbers of the changes before which the disk is as it was before no other."""
    states = set[str]()

    def note(change: int) -> None:
        state = _state(place)
        if state not in states:
            states.add(state)
            with seen.open("a") as file:
                file.write(f"{change}\n")

    assert _exit_code(action, note) == 0
    return seen.read_text().split()


def _exit_code(action: Callable[[], object], at_change: Callable[[int], None]) -> int:
    """Run ``action`` in a fork, with ``at_change(1, 2, ...)`` before each change."""
    process = os.fork()
    if not process:
        try:
            _follow(at_change)
            action()
            sys.setprofile(None)
        except BaseException:
            sys.setprofile(None)
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status)


def _die(death: int, change: int) -> None:
    if change == death:
        os.kill(os.getpid(), signal.SIGKILL)


def _follow(at_change: Callable[[int], None]) -> None:
    count, turn = 0, threading.Lock()

    def watch(frame: Any, event: str, called: Any) -> None:
        nonlocal count
        if (event == "c_call" and called.__name__ in _CHANGES) or (
            # Made by ctypes, which is not seen.
            event == "call" and frame.f_code is files._exchange.__code__
        ):
            sys.setprofile(None)
            with turn:  # another thread's changes wait for it
                count += 1
                at_change(count)
            sys.setprofile(watch)

    threading.setprofile(watch)  # of threads that begin from now on
    sys.setprofile(watch)


def _state(place: Path) -> str:
    """Return a digest of all names and bytes, whoever made the hidden ones."""
    paths = sorted(path.relative_to(place).as_posix() for path in place.rglob("*"))
    digest = hashlib.sha256()
    for name in paths:
        path = place / name
        data = path.read_bytes() if path.is_file() else b""
        digest.update(f"{_TAG.sub('', name)}:{len(data)}:".encode() + data)
    return digest.hexdigest()
