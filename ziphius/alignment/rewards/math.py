"""Answers of mathematics, equal by what they mean: 1/2 is 0.5 is \\frac{1}{2}."""

from __future__ import annotations

import contextlib
import json
import queue
import selectors
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType

from ziphius.alignment.rewards.answer import Extract
from ziphius.alignment.rewards.math_worker import READY
from ziphius.alignment.rewards.reward import Response
from ziphius.config.errors import BadInput, ZiphiusError

_START = (
    "import sys; sys.path.insert(0, {root!r}); "
    "from ziphius.alignment.rewards.math_worker import main; main()"
)
_START_SECONDS = 60.0
# No answer of a known set is longer, and reading takes more than linear time.
_LONGEST = 1000


class MathAnswers:
    """The reward 1 for a final answer that equals the problem's, by ``math-verify``, else 0.

    Any thread may ask. Comparisons run in processes of their own, because they can hang: one that
    takes longer than ``seconds`` counts 0 (``timeouts`` counts them) and its process is replaced.
    """

    def __init__(self, extract: Extract, *, workers: int = 1, seconds: float = 5.0) -> None:
        """Make ready for ``workers`` comparisons at a time; processes start when needed.

        Raises BadInput where math-verify is not installed.
        """
        if find_spec("math_verify") is None:
            raise BadInput(
                "answers of mathematics are judged by math-verify, which is not installed: "
                "pip install 'ziphius[rl]'"
            )
        if workers < 1 or not seconds > 0:
            raise BadInput(f"{workers} workers of {seconds} s for mathematics: use more than 0")
        self.timeouts = 0
        self._extract, self._seconds = extract, seconds
        self._free: queue.LifoQueue[_Worker] = queue.LifoQueue()
        self._workers = [_Worker() for _ in range(workers)]
        self._counting = threading.Lock()
        for worker in self._workers:
            self._free.put(worker)

    def __call__(self, response: Response) -> float:
        """Judge a response; an unfinished one is wrong."""
        answer = self._extract(response.summary) if response.finished else None
        return float(self.equal(response.problem.answer, answer or ""))

    def equal(self, gold: str, answer: str) -> bool:
        """Say whether an answer means what ``gold`` does; false where it takes too long."""
        if not answer.strip() or len(answer) > _LONGEST:
            return False
        worker = self._free.get()
        try:
            found = worker.ask(gold, answer, self._seconds)
        finally:
            self._free.put(worker)
        if found is None:
            with self._counting:
                self.timeouts += 1
        return bool(found)

    def close(self) -> None:
        """End the processes. Another question starts them again."""
        for worker in self._workers:
            worker.end()

    def __enter__(self) -> MathAnswers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class _Worker:
    """One process, started when asked; one thread at a time has it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, gold: str, answer: str, seconds: float) -> bool | None:
        """Return the verdict, or None where none came in time or the process died over it."""
        if self._process is None or self._process.poll() is not None:
            self._start()
        assert self._process is not None
        assert self._process.stdin is not None
        order = json.dumps([gold, answer]).encode() + b"\n"
        with contextlib.suppress(OSError):
            self._process.stdin.write(order)
            self._process.stdin.flush()
            line = self._line(seconds)
            if line is not None:
                return bool(json.loads(line))
        self.end()
        return None

    def _start(self) -> None:
        self.end()
        root = str(Path(__file__).resolve().parents[3])
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START.format(root=root)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        if self._line(_START_SECONDS) != READY:
            self.end()
            raise ZiphiusError(
                "the process that judges mathematics did not start: see what "
                "`python -c 'import math_verify'` says"
            )

    def _line(self, seconds: float) -> str | None:
        """Return the next line it writes, or None at its end or when the time is up."""
        assert self._process is not None
        assert self._process.stdout is not None
        deadline, found = time.monotonic() + seconds, b""
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while not found.endswith(b"\n"):
                remaining = deadline - time.monotonic()
                if remaining <= 0 or not selector.select(remaining):
                    return None
                piece = self._process.stdout.read1(1 << 16)  # type: ignore[attr-defined]
                if not piece:
                    return None
                found += piece
        return found.decode().strip()

    def end(self) -> None:
        """Kill the process, if there is one."""
        if self._process is None:
            return
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]
        self._process.wait()
        self._process = None
