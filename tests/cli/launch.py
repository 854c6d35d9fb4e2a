"""The command line in processes of its own, without waiting for what it imports."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.training.processes import exit_code, start
from tests.training.support import metrics
from ziphius.cli.app import run
from ziphius.training import run as training_run

Patch = Callable[[], None]


def quick() -> None:
    """Spare a process the measurement of its machine, which takes long."""
    training_run.peak_flops = lambda device, dtype: 1e9


class Command:
    """``ziphius ARGUMENTS`` in a process of its own, its output in files.

    ``patch`` is called in the process before the command; it must be a function of a module.
    ``output`` is a descriptor that takes the place of the file of standard output. ``environment``
    is added to that of the tests.
    """

    def __init__(
        self,
        *arguments: str,
        logs: Path,
        patch: Patch | None = None,
        output: int | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        number = len(list(logs.iterdir())) // 2
        self._out, self._err = logs / f"{number}.out", logs / f"{number}.err"
        self._out.touch()
        self._err.touch()
        given = output if output is None else _Sent(output)
        self.process = start(
            _command, arguments, self._out, self._err, patch, given, environment or {}
        )

    def code(self) -> int:
        """Wait for its end; return its exit code, or minus the signal that killed it."""
        return exit_code(self.process)

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        assert self.process.exitcode is None, f"it ended by itself: {self.error()}"
        os.kill(self.process.pid, number)

    def shown(self) -> str:
        return self._out.read_text("utf-8")

    def error(self) -> str:
        return self._err.read_text("utf-8")

    def line(self, code: int) -> str:
        """Wait for its end with ``code`` and one line of error; return the line."""
        assert self.code() == code, self.error()
        lines = self.error().strip("\n").split("\n")
        assert len(lines) == 1, self.error()
        return lines[0]

    def until(self, reached: Callable[[], object]) -> None:
        """Wait until something is true of the running command."""
        deadline = time.monotonic() + 120
        while not reached():
            assert self.process.is_alive(), f"it ended by itself: {self.error()}"
            assert time.monotonic() < deadline, f"it never came: {self.shown()}"
            time.sleep(0.005)

    def until_step(self, out: Path, step: int) -> None:
        """Wait until a run has written the metrics of ``step``."""
        path = out / "metrics.jsonl"
        self.until(lambda: path.is_file() and len(metrics(out)) >= step)


class _Sent:
    """A descriptor on its way into another process."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __reduce__(self) -> Any:
        from multiprocessing.reduction import DupFd

        return _received, (DupFd(self.descriptor),)


def _received(sent: Any) -> int:
    descriptor: int = sent.detach()
    return descriptor


def _command(
    arguments: tuple[str, ...],
    out: Path,
    err: Path,
    patch: Patch | None,
    output: int | None,
    environment: dict[str, str],
) -> None:
    import torch

    os.environ.update(environment)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT) if output is None else output, 1)
    os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT), 2)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115  # buffered, whatever the environment says
    sys.argv = ["ziphius", *arguments]
    torch.set_num_threads(1)
    if patch is not None:
        patch()
    run()


def flags(values: list[str]) -> list[str]:
    """Return settings as arguments."""
    return [part for value in values for part in ("--set", value)]


def advised(line: str) -> list[str]:
    """Return the arguments of the command that a line of error ends with."""
    _, _, command = line.partition("go on with: ")
    program, *arguments = shlex.split(command)
    assert program.endswith("ziphius"), line
    return arguments
