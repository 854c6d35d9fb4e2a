"""Transports that take longer than they must, without using the processor."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ziphius.parallel.transport import Coming, Spread, Transport

Seconds = Callable[[Tensor, Sequence[int]], float]


@dataclass
class _Late:
    """What comes not before it is due."""

    coming: Coming
    due: float

    def wait(self) -> Tensor:
        x = self.coming.wait()
        time.sleep(max(0.0, self.due - time.perf_counter()))
        return x


@dataclass
class Slow:
    """A transport behind one link: ``seconds(rows, counts)`` says how long it is taken by each.

    ``rows`` are what this rank gives, and ``counts`` how many of them go to each place. What is
    given while the link is taken waits.
    """

    inner: Transport
    seconds: Seconds
    free: float = field(default=0.0)

    @property
    def size(self) -> int:
        return self.inner.size

    @property
    def place(self) -> int:
        return self.inner.place

    def write(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Coming:
        return self._late(self.inner.write(x, sent, received), x, sent)

    def read(self, x: Tensor, wanted: Sequence[Tensor]) -> Coming:
        return self._late(self.inner.read(x, wanted), x, [len(numbers) for numbers in wanted])

    def multicast(self, x: Tensor, spread: Spread) -> Coming:
        return self._late(self.inner.multicast(x, spread), x, spread.sent)

    def reduce(self, x: Tensor, spread: Spread) -> Coming:
        return self._late(self.inner.reduce(x, spread), x, spread.received)

    def _late(self, coming: Coming, x: Tensor, counts: Sequence[int]) -> Coming:
        self.free = max(self.free, time.perf_counter()) + self.seconds(x, counts)
        return _Late(coming, self.free)
