"""What dispatch and combine need of a network: rows are written, read, multicast and reduced.

A small protocol, so that another library may stand below expert parallelism. All ranks of a group
call the same operations in the same order; each begins at once and is waited for at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ziphius.parallel.collectives import Axis


class Coming(Protocol):
    """A result that is under way."""

    def wait(self) -> Tensor:
        """Return it. Raises Lost where it does not come."""
        ...


@dataclass(frozen=True)
class Spread:
    """Which rows go to which places: the layout of a multicast, and of the reduce that reverses it.

    Of a matrix of ``height`` rows, those numbered ``rows`` are sent: ``sent[i]`` of them to place
    ``i``, one place after the other, none twice to one place. ``received[i]`` rows come from it.
    """

    rows: Tensor  # int64 [sum(sent)]
    sent: list[int]
    received: list[int]
    height: int


class Transport(Protocol):
    """Moves rows ``[rows, ...]`` of any dtype but FP8, whose codes are sent as bytes."""

    @property
    def size(self) -> int:
        """How many places there are."""
        ...

    @property
    def place(self) -> int:
        """Which of them this rank is."""
        ...

    def write(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Coming:
        """Give ``sent[i]`` consecutive rows to place ``i``; there come ``received[i]`` from it.

        What comes is in the order of the places. ``x`` must stay as it is until the end.
        """
        ...

    def read(self, x: Tensor, wanted: Sequence[Tensor]) -> Coming:
        """Take the rows numbered ``wanted[i]``, int64, of what place ``i`` gives as ``x``.

        They come in the order of the places, and of the numbers. Rows are of equal shapes.
        """
        ...

    def multicast(self, x: Tensor, spread: Spread) -> Coming:
        """Send each row to all its places, once to each: ``[sum(received), ...]``."""
        ...

    def reduce(self, x: Tensor, spread: Spread) -> Coming:
        """Reverse a multicast: sum for every row what its places give: ``[height, ...]``.

        ``x`` lies as the multicast's result. Sums are taken in at least FP32, in the order of the
        places, and rounded once; a row that went nowhere gets zeros.
        """
        ...


@dataclass
class Then:
    """A result that is under way, and what is done with it at the end."""

    coming: Coming
    finish: Callable[[Tensor], Tensor]

    def wait(self) -> Tensor:
        """Return the finished result."""
        return self.finish(self.coming.wait())


@dataclass(frozen=True)
class AxisTransport:
    """The protocol over collectives of one axis."""

    axis: Axis

    @property
    def size(self) -> int:
        """How many places there are."""
        return self.axis.size

    @property
    def place(self) -> int:
        """Which of them this rank is."""
        return self.axis.place

    def write(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Coming:
        """Give rows to every place."""
        return self.axis.start_all_to_all(x, sent, received)

    def read(self, x: Tensor, wanted: Sequence[Tensor]) -> Coming:
        """Take rows of every place: it is told how many and which, and then writes them."""
        asked, ones = [len(numbers) for numbers in wanted], [1] * self.size
        counts = torch.tensor(asked, device=x.device)
        owed = self.write(counts, ones, ones).wait().tolist()
        numbers = self.write(torch.cat(list(wanted)), asked, owed).wait()
        return self.write(x.index_select(0, numbers), owed, asked)

    def multicast(self, x: Tensor, spread: Spread) -> Coming:
        """Send each row to all its places."""
        return self.write(x.index_select(0, spread.rows), spread.sent, spread.received)

    def reduce(self, x: Tensor, spread: Spread) -> Coming:
        """Sum what the places of every row give."""
        back = self.write(x, spread.received, spread.sent)
        return Then(back, lambda rows: _sum(rows, spread))


def _sum(x: Tensor, spread: Spread) -> Tensor:
    high = torch.promote_types(x.dtype, torch.float32)
    total = x.new_zeros(spread.height, *x.shape[1:], dtype=high)
    # A place gives a row once, so that no addition waits for chance.
    for numbers, part in zip(spread.rows.split(spread.sent), x.split(spread.sent), strict=True):
        total.index_add_(0, numbers, part.to(high))
    return total.to(x.dtype)
