"""What Linux offers for confinement and Python 3.11 does not wrap, through the C library."""

from __future__ import annotations

import ctypes
import os

NEW_NAMESPACES = {
    "mount": 0x00020000,
    "cgroup": 0x02000000,
    "uts": 0x04000000,
    "ipc": 0x08000000,
    "user": 0x10000000,
    "pid": 0x20000000,
    "net": 0x40000000,
}
# Of clone and unshare, in one mask.
ANY_NAMESPACE = sum(NEW_NAMESPACES.values())

READ_ONLY, NO_SUID, NO_DEVICES, NO_PROGRAMS = 1, 2, 4, 8
BIND, REMOUNT, RECURSIVE, PRIVATE = 4096, 32, 16384, 1 << 18
DETACH = 2

_SET_DEATH_SIGNAL, _DROP_BOUND, _SET_SECCOMP, _NO_NEW_PRIVILEGES = 1, 24, 22, 38
_FILTER = 2
_LAST_CAPABILITY = 63
_CAPABILITIES_V3 = 0x20080522
# One number on every architecture, as for all calls since Linux 5.1.
_MOUNT_SETATTR = 442
_HERE = -100
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}


class StepError(Exception):
    """A step of the confinement failed: which one, and what the system said."""


def _check(result: int, step: str) -> None:
    if result < 0:
        raise StepError(f"{step}: {os.strerror(ctypes.get_errno())}")


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _text(value: str | None) -> ctypes.c_char_p:
    return ctypes.c_char_p(None if value is None else os.fsencode(value))


def unshare(*names: str) -> None:
    """Move this process (for "pid": its children) to new namespaces."""
    flags = sum(NEW_NAMESPACES[name] for name in names)
    _check(_libc().unshare(flags), f"new namespaces ({', '.join(names)})")


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    """Mount as mount(2) does."""
    done = _libc().mount(
        _text(source), _text(target), _text(kind), ctypes.c_ulong(flags), _text(data)
    )
    _check(done, f"mount {kind or source} on {target}")


def detach(target: str) -> None:
    """Take a mount and all below it out of the view."""
    _check(_libc().umount2(_text(target), DETACH), f"unmount {target}")


def set_mounted(target: str, *, read_only: bool, devices: bool) -> None:
    """Forbid set-user-id programs, and what else is named, on a mount and all mounts below it."""
    flags = NO_SUID | (READ_ONLY if read_only else 0) | (0 if devices else NO_DEVICES)
    attributes = (ctypes.c_uint64 * 4)(flags, 0, 0, 0)
    done = _libc().syscall(
        ctypes.c_long(_MOUNT_SETATTR),
        ctypes.c_int(_HERE),
        _text(target),
        ctypes.c_uint(0x8000),  # AT_RECURSIVE
        ctypes.byref(attributes),
        ctypes.c_size_t(ctypes.sizeof(attributes)),
    )
    _check(done, f"make {target} read-only (Linux 5.12 or newer)")


def pivot_root(new: str, old: str) -> None:
    """Make ``new`` the root, and put the root of before at ``old`` below it."""
    number = ctypes.c_long(_PIVOT_ROOT[os.uname().machine])
    _check(_libc().syscall(number, _text(new), _text(old)), "change of the root")


def die_with_parent() -> None:
    """Be killed when the parent ends. A change of user or capabilities undoes it."""
    _check(_prctl(_SET_DEATH_SIGNAL, 9), "signal at the parent's end")


def keep_no_privileges() -> None:
    """Let no later program gain capabilities: the bounding set becomes empty."""
    for capability in range(_LAST_CAPABILITY + 1):
        if _prctl(_DROP_BOUND, capability) < 0 and ctypes.get_errno() == 1:
            raise StepError("drop capabilities: not permitted")


def drop_capabilities() -> None:
    """Give up all capabilities of this process, for good."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITIES_V3, 0)
    nothing = (ctypes.c_uint32 * 6)()
    _check(_libc().capset(ctypes.byref(header), ctypes.byref(nothing)), "drop capabilities")
    _check(_prctl(_NO_NEW_PRIVILEGES, 1), "no new privileges")


def install_filter(program: bytes) -> None:
    """Install a filter of system calls, instructions of 8 bytes each. It cannot be taken off."""

    class _Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))

    filtered = _Program(len(program) // 8, program)
    address = ctypes.addressof(filtered)
    _check(_prctl(_SET_SECCOMP, _FILTER, address), "filter of system calls (seccomp)")


def _prctl(option: int, first: int, second: int = 0) -> int:
    values = [ctypes.c_ulong(value) for value in (first, second, 0, 0)]
    return int(_libc().prctl(ctypes.c_int(option), *values))
