"""Cleaned texts on the disk, for the time between examining them and encoding those that stay.

So a source is read once, and memory holds a batch of texts at a time.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType

Span = tuple[int, int]


class Spool:
    """A file of texts, one after the other, numbered from 0. It goes with the ``with`` block."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open(path, "x+b")  # noqa: SIM115
        self._ends = array("q", [0])

    def append(self, text: str) -> None:
        """Add a text."""
        data = text.encode()
        self._file.write(data)
        self._ends.append(self._ends[-1] + len(data))

    def span(self, index: int) -> Span:
        """Return where in the file a text begins and ends."""
        return self._ends[index], self._ends[index + 1]

    def text(self, index: int) -> str:
        """Return a text."""
        return next(read_spans(self.path, [self.span(index)]))

    def flush(self) -> None:
        """Make what was added visible to who opens the file."""
        self._file.flush()

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        self.path.unlink(missing_ok=True)


def read_spans(path: Path, spans: Iterable[Span]) -> Iterator[str]:
    """Yield the texts at some places of a spool's file."""
    with open(path, "rb") as file:
        for start, stop in spans:
            file.seek(start)
            yield file.read(stop - start).decode()
