"""A process that is asked in lines of JSON: where it hangs or ends, the rest goes on."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

Line = dict[str, Any]


class Gone(Exception):
    """The process has ended or does not answer; it has been ended."""


class Process:
    """Asks another run of a script, ``script --worker JSON``, which answers a line for a line.

    Lines that are no JSON go to standard error, as all that it writes there.
    """

    def __init__(self, name: str, script: str, what: Line) -> None:
        self.name = name
        command = [sys.executable, script, "--worker", json.dumps(what)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def ask(self, request: Line, seconds: float) -> Line:
        """Send a request, and return its answer. Raises Gone."""
        self.send(request)
        return self.answer(seconds)

    def send(self, request: Line) -> None:
        """Send a request; its answer comes when it comes. Raises Gone."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except OSError:
            raise self._gone(f"has ended with {self._process.wait()}") from None

    def answer(self, seconds: float) -> Line:
        """Return the next answer. Raises Gone."""
        try:
            line = self._lines.get(timeout=max(0.0, seconds))
        except queue.Empty:
            raise self._gone(f"has not answered for {seconds:.0f} s") from None
        if not line:
            raise self._gone(f"has ended with {self._process.wait()}")
        answer: Line = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()

    def _gone(self, why: str) -> Gone:
        self.close()
        return Gone(f"{self.name} {why}")

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                self._lines.put(line)
            else:
                print(line, end="", file=sys.stderr, flush=True)
        self._lines.put("")


def serve(answer: Callable[[Line], Line]) -> None:
    """Be the process: answer the lines of standard input until it ends."""
    for line in sys.stdin:
        say(answer(json.loads(line)))


def say(line: Line) -> None:
    """Write an answer."""
    print(json.dumps(line), flush=True)
