"""How far long work is, phase by phase, and how long it will take."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

_MOVE_EVERY_SECONDS = 0.1
# Without a terminal a line every so many seconds takes the place of the moving bar.
_PLAIN_EVERY_SECONDS = 15.0


class Follower:
    """Shows how far each phase is and how long it will take."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar: Progress | None = None
        self._phase = ""
        self._began = self._shown = 0.0

    def __enter__(self) -> Follower:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def tell(self, phase: str, done: int, total: int | None) -> None:
        """Show that ``done`` of ``total`` are done."""
        now = time.monotonic()
        begins = phase != self._phase
        if begins:
            self._phase, self._began = phase, now
        every = _MOVE_EVERY_SECONDS if self.console.is_terminal else _PLAIN_EVERY_SECONDS
        if not begins and now - self._shown < every and done != total:
            return
        self._shown = now
        if self.console.is_terminal:
            self._move(begins, done, total)
        else:
            self._print(begins, done, total, now - self._began)

    def _move(self, begins: bool, done: int, total: int | None) -> None:
        if self._bar is None:
            self._bar = _new_bar(self.console)
            self._bar.start()
        if begins:
            self._bar.add_task(self._phase, total=total)
        self._bar.update(self._bar.task_ids[-1], completed=done)

    def _print(self, begins: bool, done: int, total: int | None, seconds: float) -> None:
        if begins:
            self.console.print(f"{self._phase} ...", highlight=False)
        elif total and done < total:
            left = seconds * (total - done) / max(1, done)
            self.console.print(
                f"{self._phase}: {done / total:.0%}, about {left:,.0f} s left", highlight=False
            )


def _new_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:22}"),
        BarColumn(bar_width=32),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("[dim]left[/dim]"),
        TimeRemainingColumn(),
        console=console,
    )
