"""A training loop that does one step whenever it is asked. Only the standard library."""

from __future__ import annotations

import queue
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any


class Turns:
    """Runs ``train`` on a thread of its own, which calls ``finished`` after every step.

    There it waits until it is asked for the next one.
    """

    def __init__(self, train: Callable[[], object]) -> None:
        self._train = train
        self._asked: queue.Queue[None] = queue.Queue()
        self._told: queue.Queue[dict[str, Any]] = queue.Queue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._began, self._ended = 0.0, ""

    def step(self) -> dict[str, Any]:
        """Let it do a step; return what the step told, and its ``seconds``.

        Raises RuntimeError where training ends or fails instead.
        """
        if self._ended:
            raise RuntimeError(self._ended)
        if not self._thread.is_alive():
            self._thread.start()
            self._began = time.perf_counter()
        else:
            self._asked.put(None)
        told = self._told.get()
        if "ended" in told:
            self._ended = told["ended"]
            raise RuntimeError(self._ended)
        return told

    def finished(self, **told: Any) -> None:
        """Tell of a step, and wait for the next turn. Called by the loop."""
        self._told.put({"seconds": time.perf_counter() - self._began, **told})
        self._asked.get()
        self._began = time.perf_counter()

    def _run(self) -> None:
        try:
            self._train()
            self._told.put({"ended": "there are no more steps"})
        except BaseException as error:
            traceback.print_exc()
            self._told.put({"ended": f"{type(error).__name__}: {error}"})
