"""Engines in processes of their own, one of which computes at a time.

A process that waits for its turn is stopped: threads of OpenMP may spin for work that won't come.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LOG_LINES = 15


class EngineFailed(Exception):
    """An engine could not be loaded or could not compute something."""


class EngineEnded(EngineFailed):
    """The process of an engine is gone."""


class Worker:
    """One engine in its process; a context manager that ends it."""

    def __init__(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path
    ) -> None:
        self.name, self.log = name, log
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env={**os.environ, **environment},
                # A group of its own can be stopped whole. In the same session, so that the system
                # wakes and ends it if this process dies.
                process_group=0,
            )
        self._waiting = b""

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self._signal(signal.SIGKILL)
        self._process.wait()

    def wait_until_ready(self, seconds: float) -> None:
        """Wait until the engine is loaded, then stop it until it is asked. Raises EngineFailed."""
        self._answer(seconds)

    def ask(self, do: str, seconds: float = 900, **arguments: Any) -> Any:
        """Let the engine do something; return what it answers. Raises EngineFailed."""
        self._signal(signal.SIGCONT)
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise EngineEnded(f"{self.name} has ended:\n{self._tail()}") from None
        return self._answer(seconds)

    def _answer(self, seconds: float) -> Any:
        try:
            answer = json.loads(self._line(seconds))
        finally:
            self._signal(signal.SIGSTOP)
        if "error" in answer:
            raise EngineFailed(f"{self.name}: {answer['error']} (more in {self.log})")
        return answer["value"]

    def _line(self, seconds: float) -> bytes:
        assert self._process.stdout is not None
        handle, until = self._process.stdout.fileno(), time.monotonic() + seconds
        while b"\n" not in self._waiting:
            left = until - time.monotonic()
            if left <= 0 or not select.select([handle], [], [], left)[0]:
                raise EngineFailed(f"{self.name} has not answered for {seconds:.0f} s")
            part = os.read(handle, 65536)
            if not part:
                raise EngineEnded(f"{self.name} has ended:\n{self._tail()}")
            self._waiting += part
        line, _, self._waiting = self._waiting.partition(b"\n")
        return line

    def _signal(self, number: int) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, number)

    def _tail(self) -> str:
        lines = self.log.read_text("utf-8", errors="replace").splitlines()
        return "\n".join(lines[-LOG_LINES:])
