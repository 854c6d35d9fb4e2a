"""Ctrl-C and SIGTERM while a run trains: finish the step, save, stop."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from rich.console import Console


@contextmanager
def saving_on_signals(console: Console) -> Iterator[Callable[[], int]]:
    """Give a function that returns the signal which asked the run to stop, or 0.

    A second signal stops at once. The handlers that were there before come back at the end.
    """
    asked = 0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = number
        console.print("\nfinishing this step and saving; once more stops at once", style="dim")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
