"""What a person sees while something runs."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from contextlib import suppress
from types import TracebackType
from typing import IO, Any, cast

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn

# Without a terminal a line every so many seconds takes the place of the moving bar.
_PLAIN_EVERY_SECONDS = 15.0
# Time left is told from so many steps: enough to be steady, few enough to follow the machine.
_RECENT_STEPS = 20


def program() -> str:
    """Return how this command can be called again from here."""
    called = sys.argv[0]
    if shutil.which("ziphius"):
        return "ziphius"
    if not called.endswith("__main__.py"):
        return called
    return f"{python()} -m ziphius"


def python() -> str:
    """Return how this interpreter can be called again."""
    return "python" if shutil.which("python") == sys.executable else shlex.quote(sys.executable)


class Display:
    """Follows a run on the terminal: phases as lines, training as one moving line.

    Leaving its ``with`` block gives the terminal back, whatever happened inside. A run does not end
    because nobody can see it any more: a terminal or a pipe that is gone is ignored from then on.
    """

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def __init__(self, console: Console) -> None:
        console.file = cast("IO[str]", _Lasting(console.file))
        self.console = console
        self._began = time.monotonic()
        self._bar: Progress | None = None
        self._last_plain = 0.0
        self._recent: list[tuple[int, float]] = []

    def say(self, text: str) -> None:
        """Print a phase with the time since the start."""
        self._close()
        seconds = time.monotonic() - self._began
        self.console.print(
            f"[dim]{seconds:6.1f} s[/dim]  {escape(text)}", highlight=False, soft_wrap=True
        )

    def step(self, record: dict[str, Any], steps: int) -> None:
        """Show a training step: loss, bits per byte, speed, share of the peak, time left."""
        now = time.monotonic()
        self._recent = [*self._recent[-_RECENT_STEPS:], (record["step"], now)]
        shown = f"skipped: {record['skipped']}" if record["skipped"] else _figures(record)
        self._show(record["step"], steps, f"{shown}  {self._left(steps)} left", now)

    def progress(self, done: int, total: int) -> None:
        """Show how much of something is done that is no step of training."""
        now = time.monotonic()
        if done <= 1 or not self._recent or self._recent[-1][0] > done:
            self._recent = [(0, self._recent[-1][1] if self._recent else now)]
        self._recent = [*self._recent[-_RECENT_STEPS:], (done, now)]
        self._show(done, total, f"{self._left(total)} left", now)

    def _show(self, done: int, total: int, shown: str, now: float) -> None:
        if self.console.is_terminal:
            self._move(done, total, shown)
        elif self._is_due(done, total, now):
            self.console.print(
                f"          step {done}/{total}  {shown}", highlight=False, soft_wrap=True
            )

    def _left(self, steps: int) -> str:
        """Estimate the time to the last step from the latest ones, as 1:23:45 or 2:05."""
        (first, then), (last, now) = self._recent[0], self._recent[-1]
        if last <= first:
            return "?"
        seconds = round((steps - last) * (now - then) / (last - first))
        hours, minutes = divmod(seconds // 60, 60)
        return (
            f"{hours}:{minutes:02}:{seconds % 60:02}" if hours else f"{minutes}:{seconds % 60:02}"
        )

    def _move(self, step: int, steps: int, shown: str) -> None:
        if self._bar is None:
            self._bar = Progress(
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(bar_width=8),
                TextColumn("{task.description}"),
                console=self.console,
            )
            self._bar.add_task(shown, total=steps)
            self._bar.start()
        task = self._bar.tasks[0].id
        self._bar.update(task, completed=step, description=shown)
        if step == steps:
            self._close()

    def _is_due(self, step: int, steps: int, now: float) -> bool:
        due = step in (1, steps) or now - self._last_plain >= _PLAIN_EVERY_SECONDS
        if due:
            self._last_plain = now
        return due

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _figures(record: dict[str, Any]) -> str:
    """Return what a step's line tells: of rewards where there are any, of the text otherwise."""
    if "reward" in record:
        return (
            f"reward {record['reward']:.2f}  {record['accuracy']:.0%} right  "
            f"{record['length']:.0f} tokens an answer  {record['tokens_per_s']:,.0f} tokens/s"
        )
    bpb = "" if record["bpb"] is None else f"  {record['bpb']:.2f} bpb"
    return (
        f"loss {record['loss']:.3f}{bpb}  "
        f"{record['tokens_per_s']:,.0f} tokens/s  MFU {record['mfu']:.0%}"
    )


class _Lasting:
    """A text file whose failures nobody hears of."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, text: str) -> int:
        """Write, if that is possible."""
        try:
            return self._file.write(text)
        except RuntimeError:  # a signal came while the file was being written: not now
            return len(text)
        except OSError:
            return self._end(text)

    def flush(self) -> None:
        """Write what is buffered, if that is possible."""
        with suppress(RuntimeError):
            try:
                self._file.flush()
            except OSError:
                self._end()

    def _end(self, text: str = "") -> int:
        """Send the rest nowhere: what is buffered would fail again at the end of the process."""
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._file.fileno())
        return len(text)
