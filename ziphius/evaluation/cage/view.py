"""The files a confined program sees: the interpreter, its libraries, one folder to write in."""

from __future__ import annotations

import os
import sys

from ziphius.evaluation.cage import calls

WORK = "/work"
# Where the new root is put together; what is there is hidden in this view alone.
_PLACE = "/tmp"
_OLD = "/old"
_SYSTEM_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache")
_DEVICES = ("null", "random", "urandom")
_LINKS = {
    "/tmp": WORK,
    "/dev/shm": WORK,
    "/dev/fd": "/proc/self/fd",
    "/dev/stdin": "/proc/self/fd/0",
    "/dev/stdout": "/proc/self/fd/1",
    "/dev/stderr": "/proc/self/fd/2",
}


def enter_view(user: int, group: int, size: int, files: int) -> None:
    """Change this mount namespace's root to a new one, read-only but for the folder ``WORK``.

    ``WORK`` is memory of ``size`` bytes and ``files`` files at most, and belongs to ``user``. The
    process must be the first of its process namespace, whose /proc is mounted. Processes of other
    users are not shown there, nor anything about the machine.
    """
    bound = {path: os.path.realpath(path) for path in _interpreter() if os.path.exists(path)}
    devices = {f"/dev/{name}": f"/dev/{name}" for name in _DEVICES}
    calls.mount("none", "/", None, calls.RECURSIVE | calls.PRIVATE)
    calls.mount("tmpfs", _PLACE, "tmpfs", calls.NO_SUID | calls.NO_DEVICES, "size=1m,mode=755")
    os.mkdir(_PLACE + _OLD)
    calls.pivot_root(_PLACE, _PLACE + _OLD)
    os.chdir("/")
    for path, real in bound.items():
        _bind(real, path, devices=False)
    for path, real in devices.items():
        _bind(real, path, devices=True)
    os.mkdir("/proc")
    calls.mount(
        "proc", "/proc", "proc",
        calls.NO_SUID | calls.NO_DEVICES | calls.NO_PROGRAMS, "hidepid=invisible,subset=pid",
    )  # fmt: skip
    os.mkdir(WORK)
    owned = f"size={size},nr_inodes={files},mode=700,uid={user},gid={group}"
    calls.mount("tmpfs", WORK, "tmpfs", calls.NO_SUID | calls.NO_DEVICES, owned)
    for path, target in _LINKS.items():
        os.symlink(target, path)
    calls.detach(_OLD)
    os.rmdir(_OLD)
    calls.mount(
        "none", "/", None,
        calls.REMOUNT | calls.BIND | calls.READ_ONLY | calls.NO_SUID | calls.NO_DEVICES,
    )  # fmt: skip


def _interpreter() -> list[str]:
    """Return what the interpreter needs, shortest first, without what lies in another of them."""
    needed = {*_SYSTEM_LIBRARIES, sys.executable, os.path.dirname(os.__file__)}
    needed.add(os.path.join(sys.base_prefix, "lib"))
    kept: list[str] = []
    for path in sorted(needed, key=len):
        if not any(path.startswith(above + "/") for above in kept):
            kept.append(path)
    return kept


def _bind(real: str, path: str, *, devices: bool) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if os.path.isdir(_OLD + real):
        os.mkdir(path)
    else:
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
    calls.mount(_OLD + real, path, None, calls.BIND | calls.RECURSIVE)
    # A device can be written to where its mount is read-only, but not where it forbids devices.
    calls.set_mounted(path, read_only=True, devices=devices)
