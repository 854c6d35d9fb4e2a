"""The steps of one rank in the making, which number the micro-batches by themselves."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from ziphius.parallel.pipeline.actions import Action, Pair, Step


class Stage:
    """A stage on its rank: its micro-batches go forward in one order, and back in the same."""

    def __init__(self, stage: int, micro_batches: Iterable[int]) -> None:
        order = tuple(micro_batches)
        self.stage = stage
        self._forward, self._backward = iter(order), iter(order)

    def forward(self) -> Action:
        """Return F of the next micro-batch."""
        return Action("F", self.stage, next(self._forward))

    def backward(self, kind: str = "B") -> Action:
        """Return the backward of the next micro-batch: B, or I alone."""
        return Action("I" if kind == "I" else "B", self.stage, next(self._backward))


class Row:
    """The steps of one rank; weight gradients that were put off wait in a queue, oldest first."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._queue: deque[Action] = deque()

    @property
    def waiting(self) -> int:
        """How many weight gradients wait."""
        return len(self._queue)

    def f(self, stage: Stage) -> None:
        """Forward."""
        self.steps.append(stage.forward())

    def b(self, stage: Stage) -> None:
        """Full backward."""
        self.steps.append(stage.backward())

    def i(self, stage: Stage) -> None:
        """Backward for the input; the gradient of the weights waits."""
        action = stage.backward("I")
        self.steps.append(action)
        self._queue.append(action._replace(kind="W"))

    def w(self) -> None:
        """The weight gradient that has waited longest."""
        self.steps.append(self._queue.popleft())

    def fb(self, forward: Stage, backward: Stage) -> None:
        """A forward of one stage and a full backward of another, overlapped."""
        self.steps.append(Pair(forward.forward(), backward.backward()))
