"""Whether equal prompts had equal answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from ziphius.serving.bench.outcome import Outcome
from ziphius.serving.bench.prompts import Prompt

_AROUND = 24  # characters shown on either side of where two texts part


class Texts:
    """Collects the answers of greedy requests, and counts those that differ.

    The answer that a prompt had most often is its own; the first of equals.
    """

    def __init__(self) -> None:
        self._seen: dict[int, Counter[str]] = {}
        self._shown: dict[int, str] = {}

    def add(self, outcomes: Sequence[Outcome], prompts: Sequence[Prompt]) -> None:
        """Take in a level's answers; requests without one say nothing."""
        for outcome in outcomes:
            if outcome.answered:
                self._seen.setdefault(outcome.prompt, Counter())[outcome.text] += 1
                self._shown[outcome.prompt] = prompts[outcome.prompt].shown

    @property
    def compared(self) -> int:
        """How many answers there are to prompts that were answered more than once."""
        return sum(seen.total() for seen in self._seen.values() if seen.total() > 1)

    @property
    def differing(self) -> int:
        """How many answers are not their prompt's own."""
        return sum(seen.total() - max(seen.values()) for seen in self._seen.values())

    def first_difference(self) -> dict[str, Any] | None:
        """Return the first prompt whose answers differ, and how two of them do."""
        for number in sorted(self._seen):
            seen = self._seen[number]
            if len(seen) > 1:
                (own, often), (other, rarely) = seen.most_common(2)
                return {
                    "prompt": number,
                    "text": self._shown[number],
                    "texts": len(seen),
                    "answers": {"own": often, "other": rarely},
                    **_parting(own, other),
                }
        return None

    def report(self) -> dict[str, Any]:
        """Return all of this for a result file."""
        share = self.differing / self.compared if self.compared else 0.0
        return {
            "compared": self.compared,
            "differing": self.differing,
            "share": share,
            "first_difference": self.first_difference(),
        }


def _parting(own: str, other: str) -> dict[str, Any]:
    """Return where two texts part, and both around there."""
    same = (a == b for a, b in zip(own, other, strict=False))
    at = next((place for place, equal in enumerate(same) if not equal), min(len(own), len(other)))
    around = slice(max(0, at - _AROUND), at + _AROUND)
    return {"at": at, "own": own[around], "other": other[around]}
