"""Shut this process in, run a program in the cage, and report how it ended."""

from __future__ import annotations

import marshal
import os
import resource
import signal
import sys

from ziphius.evaluation.cage import calls, filter
from ziphius.evaluation.cage.calls import StepError
from ziphius.evaluation.cage.view import WORK, enter_view
from ziphius.evaluation.cage.watch import watch

STARTED = b"+"
PROGRAM = "main.py"
_LIFELINE = 0
# The user and group that run programs where we are root: each cage its own, in a range that no
# user, container or service manager gives out, so that its processes are counted by themselves.
_FIRST_USER = 0x70000000
# Python's start without the search for installed packages; ``exit`` is one of its names.
_RUN = (
    "import builtins, sys\n"
    "builtins.exit = builtins.quit = sys.exit\n"
    f"sys.argv = [{PROGRAM!r}]\n"
    "del builtins, sys\n"
    f"exec(compile(open({PROGRAM!r}, 'rb').read(), {PROGRAM!r}, 'exec', dont_inherit=True))\n"
)
_ENVIRONMENT = {
    "HOME": WORK, "TMPDIR": WORK, "LANG": "C.UTF-8", "PATH": "/usr/bin",
    # The order of sets is the same at every run.
    "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUTF8": "1",
}  # fmt: skip
# Above the watched memory, so that a hog is seen as one: room for the reserve of threads.
_ADDRESS_RESERVE = 256 << 20


def main(report: int) -> None:
    """Run what the lifeline asks for, and write to descriptor ``report`` how it ended.

    The lifeline is standard input: 8 bytes of length, then a dict in ``marshal``'s form with
    ``program``, ``stdin`` (bytes) and ``limits``. When it closes, all is killed.
    The report is ``STARTED`` and then a dict; or, where the cage could not be built, a dict with
    ``error`` alone.
    """
    # The first process of a namespace is deaf to signals from inside only without a handler.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # Closed when the program is executed, as all that Python opens.
    os.set_inheritable(report, False)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        order = marshal.loads(_read_exactly(int.from_bytes(_read_exactly(8), "big")))
        user, group = _leave_namespaces()
        keeper = os.fork()
        if keeper == 0:
            _keep(order, user, group, report)
        os.close(report)
        os.waitpid(keeper, 0)
    except (StepError, OSError) as error:
        os.write(report, marshal.dumps({"error": str(error)}))


def _read_exactly(count: int) -> bytes:
    found = b""
    while len(found) < count:
        piece = os.read(_LIFELINE, count - len(found))
        if not piece:
            sys.exit(1)
        found += piece
    return found


def _leave_namespaces() -> tuple[int, int]:
    """Enter new namespaces, by a user namespace of our own where we are not the machine's root.

    Returns the user and group that programs run as.
    """
    user, group = os.geteuid(), os.getegid()
    with open("/proc/self/uid_map", "rb") as file:
        first, outside, count = map(int, file.readline().split())
    if user == 0 and (first, outside, count) == (0, 0, 2**32 - 1):
        calls.unshare("mount", "pid", "net", "ipc", "uts", "cgroup")
        return _FIRST_USER + os.getpid(), _FIRST_USER + os.getpid()
    calls.unshare("user", "mount", "pid", "net", "ipc", "uts", "cgroup")
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{user} {user} 1"),
        ("gid_map", f"{group} {group} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    return user, group


def _keep(order: dict[str, object], user: int, group: int, report: int) -> None:
    """Be the first process of the cage: build it, start the program, watch, report. Ends it."""
    try:
        calls.die_with_parent()
        limits: dict[str, float] = order["limits"]  # type: ignore[assignment]
        program: bytes = order["program"]  # type: ignore[assignment]
        stdin: bytes = order["stdin"]  # type: ignore[assignment]
        # What is put there, each in whole pages, is not the program's own.
        ours = len(program) + len(stdin) + 4 * resource.getpagesize()
        enter_view(user, group, int(limits["disk"]) + ours, int(limits["files"]) + 3)
        _put(f"{WORK}/{PROGRAM}", program)
        _put(f"{WORK}/.stdin", stdin)
        given = os.open(f"{WORK}/.stdin", os.O_RDONLY)
        os.unlink(f"{WORK}/.stdin")
        os.chdir(WORK)
        ready, done = os.pipe()
        child = os.fork()
        if child == 0:
            _become_program(limits, user, group, given, done)
        os.close(done)
        # The pipe closes when the program is started; before, it carries the error.
        refused = os.read(ready, 1000)
        if refused:
            raise StepError(refused.decode())
        for number in (1, 2, given, ready):
            os.close(number)
        os.write(report, STARTED)
        os.write(report, marshal.dumps(watch(child, limits, _LIFELINE)))
    except (StepError, OSError) as error:
        os.write(report, marshal.dumps({"error": str(error)}))
    finally:
        os._exit(0)


def _put(path: str, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
    os.chmod(path, 0o444)


def _become_program(limits: dict[str, float], user: int, group: int, given: int, done: int) -> None:
    """Take the limits, give up all rights, and become the program."""
    try:
        os.setsid()
        os.dup2(given, 0)
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
        _limit(limits)
        calls.keep_no_privileges()
        if user != os.geteuid():
            os.setgroups([])
            os.setresgid(group, group, group)
            os.setresuid(user, user, user)
        calls.drop_capabilities()
        calls.install_filter(filter.program(os.uname().machine))
        os.execve(sys.executable, [sys.executable, "-s", "-S", "-c", _RUN], _ENVIRONMENT)
    except BaseException as error:
        os.write(done, (str(error) or repr(error)).encode())
    finally:
        os._exit(1)


def _limit(limits: dict[str, float]) -> None:
    seconds = int(limits["cpu_seconds"]) + 1
    for name, (soft, hard) in {
        "CORE": (0, 0),
        "MSGQUEUE": (0, 0),
        "MEMLOCK": (0, 0),
        "CPU": (seconds, seconds + 1),
        "NOFILE": (int(limits["open_files"]),) * 2,
        "FSIZE": (int(limits["disk"]),) * 2,
        "AS": (int(limits["memory"]) + _ADDRESS_RESERVE,) * 2,
        "STACK": (8 << 20, 8 << 20),
        # Two of ours belong to the same user where that is not the machine's root.
        "NPROC": (int(limits["processes"]) + 2,) * 2,
    }.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (soft, hard))
