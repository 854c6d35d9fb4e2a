"""What a run writes down while it runs: lines of JSON, and TensorBoard events on request."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from ziphius.config.errors import BadInput


class Log(Protocol):
    """Lines that are added one after the other."""

    path: Path

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one line."""
        ...

    def size(self) -> int:
        """Return how many bytes there are."""
        ...

    def last(self) -> dict[str, Any]:
        """Return the last line's record, empty when there is none."""
        ...

    def cut(self, size: int) -> bool:
        """Drop everything after ``size`` bytes; return whether so much was there."""
        ...


class NoLines:
    """Takes the place of a file that another rank writes."""

    path = Path(os.devnull)

    def append(self, record: Mapping[str, Any]) -> None:
        """Add nothing."""

    def size(self) -> int:
        """Return that nothing is there."""
        return 0

    def last(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def cut(self, size: int) -> bool:
        """Drop nothing."""
        return True


class Lines:
    """A file of JSON lines that is only appended to, each line in one write."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one line. Raises OSError for a full disk."""
        line = (json.dumps(record) + "\n").encode()
        with self.path.open("ab", buffering=0) as file:
            while line:  # a disk that fills up takes a part, and refuses the rest
                line = line[file.write(line) :]

    def size(self) -> int:
        """Return the file's size after it has reached the disk."""
        with self.path.open("ab") as file:
            os.fsync(file.fileno())
            return file.tell()

    def last(self) -> dict[str, Any]:
        """Return the last line's record, empty when there is none."""
        lines = self.path.read_bytes().splitlines()
        record: dict[str, Any] = json.loads(lines[-1]) if lines else {}
        return record

    def cut(self, size: int) -> bool:
        """Drop everything after ``size`` bytes, and a line that was not written to its end.

        Returns whether so much was there.
        """
        self.path.touch()
        with self.path.open("r+b") as file:
            kept = file.read(size)
            file.truncate(kept.rfind(b"\n") + 1)
        return len(kept) == size


class Events:
    """TensorBoard scalars of every step, in ``folder``."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """Begin at ``first_step``: what an earlier attempt wrote from there on is not shown.

        Raises BadInput when TensorBoard is not installed.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise BadInput(
                "run.tensorboard: TensorBoard is not installed: "
                'pip install "ziphius[tensorboard]", or set run.tensorboard=false'
            ) from None
        self._writer = SummaryWriter(str(folder), purge_step=first_step)

    def write(self, record: Mapping[str, Any]) -> None:
        """Write every number of a line of metrics."""
        for name, value in record.items():
            if isinstance(value, int | float) and name not in ("step", "seconds"):
                self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Write out what is buffered."""
        self._writer.close()
