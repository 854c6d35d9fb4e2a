"""Runs Python programs that nobody has read, confined: what models write is judged by running it.

A helper (``cage/``) builds the cage and starts the program in it, so that threads may run many at
once. Linux's namespaces give the program a process table, a network and a file system of its own:
the interpreter and its libraries, read-only, and one folder in memory. Its rights are dropped, a
filter refuses system calls that reach past that, and the first process of the cage watches what
all of them use together and ends them with itself. Nothing runs where any of it cannot be had.
"""

from __future__ import annotations

import contextlib
import marshal
import os
import selectors
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal

from ziphius.config.errors import BadInput, ZiphiusError
from ziphius.evaluation.cage import filter
from ziphius.evaluation.cage.main import STARTED

Status = Literal["ok", "failed", "timeout", "memory", "output", "killed"]

# The package stands empty here: its own first lines import what costs more than all of the cage.
_START = (
    "import sys; package = type(sys)('ziphius'); package.__path__ = [{root!r}]; "
    "sys.modules['ziphius'] = package; from ziphius.evaluation.cage.main import main; main({end})"
)
# What a cage may take to be built, and to be gone, on a machine that is very busy.
_BUILD_SECONDS = 30.0
_GONE_SECONDS = 5.0
_CHUNK = 1 << 16
# Mounts made read-only with all below them; processes counted by user namespace.
_KERNEL = (5, 14)
_ADVICE = (
    "run programs on Linux 5.14 or newer as root, or where users may make namespaces (sysctl "
    "user.max_user_namespaces above 0, kernel.apparmor_restrict_unprivileged_userns=0; a "
    "container needs --privileged, or --security-opt seccomp=unconfined and an unmasked /proc)"
)


@dataclass(frozen=True)
class Limits:
    """What one program may use, all of its processes together unless it says otherwise.

    ``seconds`` of the clock, ``cpu_seconds`` of processors, ``memory`` bytes resident with what
    its folder holds, ``disk`` bytes and ``files`` in the folder, ``open_files`` of one process,
    ``processes`` (threads count), ``output`` bytes kept of each of its two streams: one that
    writes more is ended.
    """

    seconds: float = 5.0
    cpu_seconds: float = 5.0
    memory: int = 256 << 20
    disk: int = 16 << 20
    files: int = 256
    open_files: int = 64
    processes: int = 16
    output: int = 64 << 10

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not 0 < value < float("inf"):
                raise BadInput(f"sandbox limit {name} = {value}: give a number above 0")


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    ``status`` is "ok" (exit status 0), "failed" (another, or a signal of its own making),
    "timeout" (clock or processor), "memory", "output" (it wrote too much) or "killed" (by SIGKILL,
    as a machine without memory does). ``code`` is the exit status, or minus the signal.
    ``stdout`` and ``stderr`` are what came until then, cut at the limit. ``seconds`` are the
    program's own, without the building of its cage.
    """

    status: Status
    code: int
    stdout: str
    stderr: str
    seconds: float


@dataclass(frozen=True)
class Confinement:
    """Whether programs can be confined here; ``missing`` says what is not there and what to do."""

    possible: bool
    missing: str = ""


def confinement() -> Confinement:
    """Find out, by running an empty program, whether this machine confines programs."""
    try:
        outcome = run_program("", limits=Limits(seconds=_BUILD_SECONDS))
    except ZiphiusError as error:
        return Confinement(False, str(error))
    if outcome.status != "ok":
        return Confinement(False, f"an empty program ended as {outcome.status}: {outcome.stderr}")
    return Confinement(True)


def run_program(program: str, *, stdin: str = "", limits: Limits | None = None) -> Outcome:
    """Run a Python program in a cage of its own, and wait until all of it is gone.

    It sees the standard library alone, starts in an empty folder that goes with it, and has no
    network. Any thread may call this, many at a time. Raises ZiphiusError, before anything runs,
    where the machine cannot confine it.
    """
    limits = limits or Limits()
    _require_linux()
    order = marshal.dumps(
        {
            "program": program.encode("utf-8", "replace"),
            "stdin": stdin.encode("utf-8", "replace"),
            "limits": asdict(limits),
        }
    )
    report, report_end = os.pipe()
    start = _START.format(root=str(Path(__file__).resolve().parents[1]), end=report_end)
    try:
        helper = subprocess.Popen(
            [os.path.realpath(sys.executable), "-I", "-S", "-c", start],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            pass_fds=(report_end,), start_new_session=True, env={}, cwd="/", bufsize=0,
        )  # fmt: skip
    except OSError as error:
        os.close(report)
        raise ZiphiusError(f"the sandbox's helper did not start: {error}") from None
    finally:
        os.close(report_end)
    with os.fdopen(report, "rb", buffering=0) as told, helper:
        talk = _Talk(helper, told, len(order).to_bytes(8, "big") + order, limits)
        try:
            talk.hold()
        finally:
            talk.end()
    return talk.outcome()


def _require_linux() -> None:
    machine = os.uname().machine if hasattr(os, "uname") else sys.platform
    problem = ""
    if sys.platform != "linux":
        problem = f"{sys.platform} is not Linux"
    elif not filter.known(machine):
        problem = f"no filter of system calls for {machine} (there are x86_64 and aarch64)"
    elif tuple(map(int, os.uname().release.split(".")[:2])) < _KERNEL:
        problem = f"Linux {os.uname().release} is too old"
    if problem:
        raise ZiphiusError(f"programs cannot be confined here: {problem}: {_ADVICE}")


class _Talk:
    """The pipes to one helper: the order goes out, two streams and the report come in."""

    def __init__(
        self, helper: subprocess.Popen[bytes], told: IO[bytes], order: bytes, limits: Limits
    ) -> None:
        self._helper, self._told, self._order, self._limits = helper, told, order, limits
        assert helper.stdin is not None
        assert helper.stdout is not None
        assert helper.stderr is not None
        self._lifeline = helper.stdin
        self._found: dict[IO[bytes], bytearray] = {
            stream: bytearray() for stream in (helper.stdout, helper.stderr, told)
        }
        self._flooded = False
        self._ended_by_us = False
        self._began = time.monotonic()

    def hold(self) -> None:
        """Send the order and collect what comes, until all is closed or too much came."""
        deadline = self._began + _BUILD_SECONDS + self._limits.seconds
        with selectors.DefaultSelector() as selector:
            for stream in self._found:
                selector.register(stream, selectors.EVENT_READ)
            os.set_blocking(self._lifeline.fileno(), False)
            selector.register(self._lifeline, selectors.EVENT_WRITE)
            while any(key.fileobj in self._found for key in selector.get_map().values()):
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    if self._ended_by_us:
                        return
                    deadline = self._cut(selector)
                for key, _ in selector.select(max(0.0, remaining)):
                    if key.fileobj is self._lifeline:
                        self._send(selector)
                    elif self._receive(key.fileobj, selector):  # type: ignore[arg-type]
                        deadline = self._cut(selector)

    def _send(self, selector: selectors.BaseSelector) -> None:
        try:
            sent = os.write(self._lifeline.fileno(), self._order[:_CHUNK])
            self._order = self._order[sent:]
        except BlockingIOError:
            return
        except OSError:  # the helper is gone, its report says why
            self._order = b""
        if not self._order:
            # It stays open: its closing ends the cage, also when this process is killed.
            selector.unregister(self._lifeline)

    def _receive(self, stream: IO[bytes], selector: selectors.BaseSelector) -> bool:
        """Read once; return whether this was the byte too many."""
        data = os.read(stream.fileno(), _CHUNK)
        if not data:
            selector.unregister(stream)
            return False
        kept = self._found[stream]
        kept += data
        if stream is self._told or len(kept) <= self._limits.output:
            return False
        del kept[self._limits.output :]
        first, self._flooded = not self._flooded, True
        return first

    def _cut(self, selector: selectors.BaseSelector) -> float:
        """Tell the cage to end; return by when it must have."""
        if self._order:
            selector.unregister(self._lifeline)
            self._order = b""
        self._lifeline.close()
        self._ended_by_us = True
        return time.monotonic() + _GONE_SECONDS

    def end(self) -> None:
        """Leave nothing behind: the helper ends only after every process of the cage."""
        with contextlib.suppress(OSError):
            self._lifeline.close()
        try:
            self._helper.wait(_GONE_SECONDS)
        except subprocess.TimeoutExpired:
            # The first process of the cage dies with its parent, and all others with it.
            self._helper.kill()
            self._helper.wait()

    def outcome(self) -> Outcome:
        """Say how it ended. Raises ZiphiusError where the program was never started."""
        stdout, stderr, told = (bytes(found) for found in self._found.values())
        report: dict[str, Any] = {}
        with contextlib.suppress(ValueError, EOFError, TypeError):
            report = marshal.loads(told.removeprefix(STARTED))
        words = stderr.decode("utf-8", "replace")
        if not told.startswith(STARTED) and not self._ended_by_us:
            said = report.get("error") or (words.strip().splitlines() or ["its helper died"])[-1]
            raise ZiphiusError(f"programs cannot be confined here: {said}: {_ADVICE}")
        code = int(report.get("code", -signal.SIGKILL))
        return Outcome(
            self._status(str(report.get("ended", "killed")), code, words),
            code,
            stdout.decode("utf-8", "replace"),
            words,
            float(report.get("seconds", time.monotonic() - self._began)),
        )

    def _status(self, ended: str, code: int, stderr: str) -> Status:
        if self._flooded:
            return "output"
        if ended in ("timeout", "memory"):
            return "timeout" if ended == "timeout" else "memory"
        if ended != "exit" or code == -signal.SIGKILL:
            return "killed"
        if code == -signal.SIGXCPU:
            return "timeout"
        if code == 0:
            return "ok"
        # An allocation that alone is over the limit fails at once, and Python says so last.
        last = (stderr.strip().splitlines() or [""])[-1]
        return "memory" if last.startswith("MemoryError") else "failed"
