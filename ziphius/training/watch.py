"""Whoever follows a run."""

from __future__ import annotations

from typing import Any, Protocol


class Watch(Protocol):
    """It is told, and decides nothing."""

    def say(self, text: str) -> None:
        """Tell about a phase that begins, in one line."""
        ...

    def step(self, record: dict[str, Any], steps: int) -> None:
        """Tell about a finished step, of ``steps``: its line of metrics."""
        ...


class Nobody:
    """Follows nothing: ranks beside the first tell nobody."""

    def say(self, text: str) -> None:
        """Ignore it."""

    def step(self, record: dict[str, Any], steps: int) -> None:
        """Ignore it."""
