"""Which system calls a confined program cannot make: a seccomp filter.

The namespaces already hide what these calls would reach. The filter closes what no namespace
covers (keys, AF_VSOCK, memory that no mapping shows) and the parts of the kernel that programs
under test never need and that faults were often found in.
"""

from __future__ import annotations

import errno
import struct

from ziphius.evaluation.cage.calls import ANY_NAMESPACE

# Numbers of Linux's tables for x86_64 and aarch64.
_REFUSED = {
    # Other processes, and namespaces.
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "kcmp": (312, 272), "unshare": (272, 97), "setns": (308, 268), "personality": (135, 92),
    # The view of files.
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262), "quotactl": (179, 60),
    # Memory that no limit counts, or that outlives the mapping: shared, of System V, of messages.
    "memfd_create": (319, 279), "shmget": (29, 194), "shmat": (30, 196), "msgget": (68, 186),
    "semget": (64, 190), "mq_open": (240, 180),
    # Keys belong to users, not to namespaces.
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    # The machine.
    "init_module": (175, 105), "delete_module": (176, 106), "finit_module": (313, 273),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "reboot": (169, 142),
    "swapon": (167, 224), "swapoff": (168, 225), "syslog": (103, 116), "acct": (163, 89),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "clock_adjtime": (305, 266),
    "adjtimex": (159, 171), "sethostname": (170, 161), "setdomainname": (171, 162),
    "vhangup": (153, 58),
    # Parts of the kernel that reach far.
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
}  # fmt: skip
# From here on the architectures count alike: io_uring, the mount calls, pidfd_getfd,
# process_madvise, mount_setattr, memfd_secret, open_tree_attr.
_REFUSED_ANYWHERE = (425, 426, 427, 428, 429, 430, 431, 432, 433, 438, 440, 442, 447, 467)
_CLONE3 = 435

_CLONE, _SOCKET, _SOCKETPAIR, _MMAP = (56, 220), (41, 198), (53, 199), (9, 222)
_AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_AF_UNIX = 1
# MAP_SHARED with MAP_ANONYMOUS: what it held stays in memory until its last page is unmapped.
_SHARED_ANONYMOUS = 0x21

_LOAD, _AND, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
_X32 = 0x40000000


def known(machine: str) -> bool:
    """Whether the numbers of an architecture's system calls are known here."""
    return machine in _AUDIT


def program(machine: str) -> bytes:
    """Return the filter's code for an architecture that is ``known``."""
    column = list(_AUDIT).index(machine)
    code = [
        _step(_LOAD, _ARCHITECTURE),
        _step(_EQUAL, _AUDIT[machine], skip_if=1),
        _step(_RETURN, _KILL),
        _step(_LOAD, _NUMBER),
    ]
    if machine == "x86_64":
        code += [_step(_AT_LEAST, _X32, skip_else=1), _step(_RETURN, _KILL)]
    for number in (*(numbers[column] for numbers in _REFUSED.values()), *_REFUSED_ANYWHERE):
        code += _when(number, [_refuse(errno.EPERM)])
    # The C library then uses clone, whose flags a filter can read.
    code += _when(_CLONE3, [_refuse(errno.ENOSYS)])
    namespaces = [
        _step(_LOAD, _ARGUMENTS),
        _step(_AND, ANY_NAMESPACE),
        _step(_EQUAL, 0, skip_if=1),
        _refuse(errno.EPERM),
        _step(_RETURN, _ALLOW),
    ]
    code += _when(_CLONE[column], namespaces)
    local = [
        _step(_LOAD, _ARGUMENTS),
        _step(_EQUAL, _AF_UNIX, skip_if=1),
        _refuse(errno.EACCES),
        _step(_RETURN, _ALLOW),
    ]
    code += _when(_SOCKET[column], local) + _when(_SOCKETPAIR[column], local)
    shared = [
        _step(_LOAD, _ARGUMENTS + 3 * 8),
        _step(_AND, _SHARED_ANONYMOUS),
        _step(_EQUAL, _SHARED_ANONYMOUS, skip_else=1),
        _refuse(errno.EPERM),
        _step(_RETURN, _ALLOW),
    ]
    code += _when(_MMAP[column], shared)
    return b"".join([*code, _step(_RETURN, _ALLOW)])


def _step(operation: int, value: int, skip_if: int = 0, skip_else: int = 0) -> bytes:
    return struct.pack("HBBI", operation, skip_if, skip_else, value)


def _refuse(error: int) -> bytes:
    return _step(_RETURN, _ERROR | error)


def _when(number: int, steps: list[bytes]) -> list[bytes]:
    """Return steps for one system call; the others go past them with the number still loaded."""
    return [_step(_EQUAL, number, skip_else=len(steps)), *steps]
