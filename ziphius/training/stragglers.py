"""Whether one rank keeps the others waiting, step after step."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from typing import Any

from ziphius.training.watch import Watch

# A rank is slow when it is the slowest in most of so many steps, and the others wait for it for so
# much of their time. It is told again after so many steps, or when it is another one.
_STEPS, _MOST, _SHARE, _AGAIN = 20, 0.75, 0.2, 500


class Stragglers:
    """Follows who waits for whom, and tells when a rank is slow and stays so."""

    def __init__(self, ranks: int, watch: Watch) -> None:
        self.ranks, self.watch = ranks, watch
        # The slowest rank, how long the others waited for it, how long the step took.
        self._steps: deque[tuple[int, float, float]] = deque(maxlen=_STEPS)
        self._told: tuple[int, int] | None = None

    def step(self, record: Mapping[str, Any], took: float) -> None:
        """Add a step of ``took`` seconds: its line of metrics."""
        if self.ranks == 1:
            return
        waited, least = record["waited"], record["waited_least"]
        others = (waited * self.ranks - least) / (self.ranks - 1)
        self._steps.append((record["slowest_rank"], others - least, took))
        if len(self._steps) < _STEPS:
            return
        [(rank, times)] = Counter(slowest for slowest, *_ in self._steps).most_common(1)
        share = sum(wait for slowest, wait, _ in self._steps if slowest == rank)
        share /= sum(seconds for *_, seconds in self._steps)
        if times < _MOST * _STEPS or share < _SHARE:
            return
        told, step = self._told, record["step"]
        if told is None or told[0] != rank or step >= told[1] + _AGAIN:
            self._told = rank, step
            self.watch.say(
                f"rank {rank} is slow: in the last {_STEPS} steps the others waited {share:.0%} of "
                "the time for it"
            )
