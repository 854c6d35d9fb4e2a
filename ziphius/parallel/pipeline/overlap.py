"""A forward and a backward together: one computes while the other's rows travel (facts 5.2).

Block ``x`` of the forward's micro-batch runs with block ``y`` of the backward's:

    compute       MLP(B)y  MLP(W)y  MLP(F)x      | ATTN(B)y       ATTN(W)y  ATTN(F)x |
    communication DISPATCH(F)x  DISPATCH(B)y     | COMBINE(F)x  PP  COMBINE(B)y      |

Communication runs on a lane: a thread that takes one work after the other. Its order is the order
in which this program begins them, which the table and the number of blocks decide. All ranks of an
expert group run the same row of the table on the same blocks, so each group meets the same
collectives in the same order on all of them; none but dispatch and combine uses these groups.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, Literal, NamedTuple, TypeVar

from torch import Tensor

from ziphius.kernels.later import PutOff
from ziphius.model.dispatch import Promise
from ziphius.parallel.collectives import Traffic
from ziphius.parallel.pipeline.staged import Staged

T = TypeVar("T")
Direction = Literal["F", "B", "W"]  # forward, backward for the input, and for the weights
Label = tuple[Direction, str, int, int, int]  # and stage, part, micro-batch and block
Moment = Literal["compute", "begin", "end", "carry"]


class Event(NamedTuple):
    """Something that was done: computed, begun, waited for, or carried over the lane.

    ``stage`` is ``attend``, ``dispatch``, ``experts`` or ``combine`` of a block, ``enter`` or
    ``leave`` of a pass, or ``message``, to another part of the pipeline: these have no block, and
    -1 for it. ``part`` is the pipeline's stage, in which ``block`` is counted. Times are seconds.
    """

    direction: Direction
    stage: str
    moment: Moment
    part: int
    micro_batch: int
    block: int
    start: float
    stop: float

    @property
    def label(self) -> Label:
        """What it is, whatever the moment."""
        return self.direction, self.stage, self.part, self.micro_batch, self.block


Trace = list[Event]


@dataclass(frozen=True)
class _Carried(Generic[T]):
    """What a lane carries, and where it is counted how long somebody waits for it."""

    future: Future[T]
    traffic: Traffic

    def result(self) -> T:
        with self.traffic.standing_still():
            return self.future.result()


class CommunicationLane:
    """A thread that carries what is submitted, in that order, one after the other.

    How long others stand still for it is counted in ``traffic``.
    """

    def __init__(self, traffic: Traffic, trace: Trace | None = None) -> None:
        self._pool = ThreadPoolExecutor(1, "communication")
        self._traffic, self._trace = traffic, trace
        self.label: Label | None = None  # of what is begun next

    def submit(self, work: Callable[[], T], /) -> Promise[T]:
        """Let a work be done when those before it have ended."""
        return _Carried(self._pool.submit(self._carry, work, self.label), self._traffic)

    def _carry(self, work: Callable[[], T], label: Label | None) -> T:
        start = time.perf_counter()
        try:
            return work()
        finally:
            if self._trace is not None and label is not None:
                stop = time.perf_counter()
                self._trace.append(Event(*label[:2], "carry", *label[2:], start, stop))

    def close(self) -> None:
        """Begin nothing more. What is under way ends by its own deadline."""
        self._pool.shutdown(wait=False, cancel_futures=True)


@dataclass
class Ahead:
    """The forward of a pair; ``leave`` ends it and sends what leaves the part.

    ``place`` is the part and the micro-batch.
    """

    staged: Staged
    place: tuple[int, int]
    leave: Callable[[], None]


@dataclass
class Behind:
    """The backward of a pair.

    ``enter`` begins it, and returns the input's gradient where there is no block. ``give`` sends
    the input's gradient; ``put_off`` computes weight gradients, or keeps them for later.
    """

    staged: Staged
    place: tuple[int, int]
    enter: Callable[[], Tensor | None]
    give: Callable[[Tensor | None], None]
    put_off: Callable[[PutOff], None]


class Weave:
    """Runs a forward and a backward together, or one of them alone."""

    def __init__(
        self, x: Ahead | None, y: Behind | None, lane: CommunicationLane, trace: Trace | None
    ) -> None:
        self.x, self.y, self.lane, self.trace = x, y, lane, trace

    def run(self) -> None:
        """Run both. Where one has more blocks, the rest runs alone."""
        ahead = self.x.staged.blocks if self.x else 0
        behind = self.y.staged.blocks if self.y else 0
        if self.y is not None:
            self._enter_back(self.y)
        if self.x is not None:
            self._do("F", "enter", "compute", -1, self.x.staged.enter)
            self._attend(self.x, 0)
        if self.y is not None and behind:
            self._back("combine", "end", behind - 1, self.y.staged.end_combine_back)
        for k in range(max(ahead, behind)):
            x = self.x if k < ahead else None
            y = self.y if k < behind else None
            self._experts(x, k, y, behind - 1 - k)
            self._attention(x, k, y, behind - 1 - k)

    def _experts(self, x: Ahead | None, k: int, y: Behind | None, j: int) -> None:
        """Run the half of a pair of blocks between whose MLPs both dispatches travel."""
        if y is not None:
            self._back("experts", "compute", j, y.staged.experts_back)
            self._back("dispatch", "begin", j, y.staged.begin_dispatch_back)
            self._weights(y, "experts", j)
        if x is not None:
            self._ahead("dispatch", "end", k, x.staged.end_dispatch)
            self._ahead("experts", "compute", k, x.staged.experts)
            self._ahead("combine", "begin", k, x.staged.begin_combine)
        if y is not None:
            self._back("dispatch", "end", j, y.staged.end_dispatch_back)

    def _attention(self, x: Ahead | None, k: int, y: Behind | None, j: int) -> None:
        """Run the half between whose attentions both combines travel."""
        if y is not None:
            self._attend_back(y, j)
            self._weights(y, "attend", j)
        if x is not None:
            self._ahead("combine", "end", k, x.staged.end_combine)
            self._attend(x, k + 1)
        if y is not None and j > 0:
            self._back("combine", "end", j - 1, y.staged.end_combine_back)

    def _attend(self, x: Ahead, k: int) -> None:
        """End the block before ``k`` and attend, or leave where there is no more."""
        staged = x.staged

        def attend() -> None:
            if k > 0:
                staged.add(k - 1)
            if k < staged.blocks:
                staged.attend(k)

        if k == staged.blocks:
            self._do("F", "leave", "compute", -1, attend)
            self._do("F", "message", "begin", -1, x.leave)
        else:
            self._do("F", "attend", "compute", k, attend)
            self._ahead("dispatch", "begin", k, staged.begin_dispatch)

    def _enter_back(self, y: Behind) -> None:
        found: list[Tensor | None] = []
        self._do("B", "enter", "compute", -1, lambda: found.append(y.enter()))
        if y.staged.blocks:
            self._back("combine", "begin", y.staged.blocks - 1, y.staged.begin_combine_back)
        else:
            self._do("B", "message", "begin", -1, lambda: y.give(found[0]))

    def _attend_back(self, y: Behind, j: int) -> None:
        staged, found = y.staged, list[Tensor | None]()

        def attend_back() -> None:
            staged.attend_back(j)
            found.append(staged.add_back(j))

        self._do("B", "attend", "compute", j, attend_back)
        if j > 0:
            self._back("combine", "begin", j - 1, staged.begin_combine_back)
        else:
            self._do("B", "message", "begin", -1, lambda: y.give(found[0]))

    def _weights(self, y: Behind, stage: str, j: int) -> None:
        self._do("W", stage, "compute", j, lambda: y.put_off(y.staged.weights(stage, j)))

    def _ahead(self, stage: str, moment: Moment, k: int, run: Callable[[int], None]) -> None:
        self._do("F", stage, moment, k, lambda: run(k))

    def _back(self, stage: str, moment: Moment, j: int, run: Callable[[int], None]) -> None:
        self._do("B", stage, moment, j, lambda: run(j))

    def _do(
        self,
        direction: Direction,
        stage: str,
        moment: Moment,
        block: int,
        run: Callable[[], None],
    ) -> None:
        """Run something, and write it down if asked to."""
        way = self.x if direction == "F" else self.y
        assert way is not None, "of a pass that there is"
        self.lane.label = (direction, stage, *way.place, block)
        start = time.perf_counter()
        run()
        if self.trace is not None:
            stop = time.perf_counter()
            self.trace.append(Event(direction, stage, moment, *way.place, block, start, stop))
