"""Communication between the ranks of one axis: counted, with a deadline, and named when it fails.

Codes travel as bytes: gloo knows no float8, and one path for all is one to test. Sums are of what
the backend sums, in its order.
"""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ziphius.config.errors import ZiphiusError, in_one_line

# torch 2.13 has new names for them, and warns of the old ones.
ALL_GATHER = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class Lost(ZiphiusError):
    """A rank did not take part in time, or is gone."""

    lost = True


@dataclass
class Traffic:
    """What a rank has sent to others: bytes by (axis, operation). ``step`` is for messages.

    ``waited`` are the seconds that its thread stood still for communication; what another thread
    carries meanwhile is not among them, nor are a GPU's waits in streams.
    """

    sent: Counter[tuple[str, str]] = field(default_factory=Counter)
    step: int = 0
    waited: float = 0.0
    thread: int = field(default_factory=threading.get_ident)

    @contextmanager
    def standing_still(self) -> Iterator[None]:
        """Count the time inside, if it is the thread's that the rank computes in."""
        began = time.perf_counter()
        try:
            yield
        finally:
            if threading.get_ident() == self.thread:
                self.waited += time.perf_counter() - began

    def count(self, axis: str, operation: str, nbytes: int) -> None:
        """Add to what was sent."""
        self.sent[axis, operation] += nbytes


class Pending:
    """A collective that is under way, and its result."""

    def __init__(self, axis: Axis, operation: str, work: dist.Work | None, result: Tensor) -> None:
        self._axis, self._operation, self._work = axis, operation, work
        self._result = result

    def wait(self) -> Tensor:
        """Return the result. Raises Lost where it does not come."""
        with self._axis.named(self._operation):
            if self._work is not None:
                self._work.wait()
        self._work = None
        return self._result


class Ways(NamedTuple):
    """The groups that messages go over: those to later places of an axis, and to earlier ones."""

    later: dist.ProcessGroup
    earlier: dist.ProcessGroup


@dataclass(frozen=True)
class Axis:
    """A group of ranks that includes this one: ``ranks`` in order, ``place`` is this one's index.

    Of a group of one there is no ``group``, and nothing is sent. Messages go over ``ways``, where
    they have groups of their own.
    """

    name: str
    ranks: tuple[int, ...]
    place: int
    group: dist.ProcessGroup | None
    traffic: Traffic
    ways: Ways | None = None

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return len(self.ranks)

    def all_reduce(self, x: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """Reduce in place over all ranks, and return it."""
        self._count("all_reduce", 2 * x.nbytes * (self.size - 1) // self.size)
        if self.group is not None:
            with self.named("all_reduce"):
                dist.all_reduce(x, op, self.group)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """Join what all ranks have, equal shapes, along the first dimension."""
        return self.start_all_gather(x).wait()

    def start_all_gather(self, x: Tensor) -> Pending:
        """Begin to join what all ranks have."""
        x = x.contiguous()
        self._count("all_gather", x.nbytes * (self.size - 1))
        if self.group is None:
            return Pending(self, "all_gather", None, x.clone())
        out = x.new_empty(self.size * x.shape[0], *x.shape[1:])
        with self.named("all_gather"):
            work = ALL_GATHER(out, x, self.group, async_op=True)
        return Pending(self, "all_gather", work, out)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """Sum over all ranks and keep this one's equal part of the first dimension."""
        return self.start_reduce_scatter(x).wait()

    def start_reduce_scatter(self, x: Tensor) -> Pending:
        """Begin to sum over all ranks; ``x`` must stay as it is until the end."""
        x = x.contiguous()
        self._count("reduce_scatter", x.nbytes * (self.size - 1) // self.size)
        if self.group is None:
            return Pending(self, "reduce_scatter", None, x.clone())
        out = x.new_empty(x.shape[0] // self.size, *x.shape[1:])
        with self.named("reduce_scatter"):
            work = REDUCE_SCATTER(out, x, group=self.group, async_op=True)
        return Pending(self, "reduce_scatter", work, out)

    def broadcast(self, x: Tensor, source: int = 0) -> Tensor:
        """Overwrite with what the rank at place ``source`` has, and return it."""
        self._count("broadcast", x.nbytes * (self.size - 1) if self.place == source else 0)
        if self.group is not None:
            with self.named("broadcast"):
                dist.broadcast(x, self.ranks[source], self.group)
        return x

    def all_to_all(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Send ``sent[i]`` consecutive rows to the rank at place ``i``; return what they sent."""
        return self.start_all_to_all(x, sent, received).wait()

    def start_all_to_all(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Pending:
        """Begin to exchange rows; ``x`` must stay as it is until the end."""
        x = x.contiguous()
        row = x[:1].nbytes if len(x) else 0
        self._count("all_to_all", row * (sum(sent) - sent[self.place]))
        if self.group is None:
            return Pending(self, "all_to_all", None, x.clone())
        out = x.new_empty(sum(received), *x.shape[1:])
        with self.named("all_to_all"):
            work = dist.all_to_all_single(
                _wire(out), _wire(x), list(received), list(sent), self.group, async_op=True
            )
        return Pending(self, "all_to_all", work, out)

    def start_send(self, x: Tensor, place: int, *, what: str, tag: int = 0) -> Pending:
        """Begin to send to the rank at ``place``; ``x`` must stay as it is until the end.

        The other side must receive in the same order, by the same tags, into the same shape.
        ``what`` is told if it fails.
        """
        x = x.contiguous()
        self._count("send", x.nbytes)
        operation = f"sending {what} to rank {self.ranks[place]}"
        with self.named(operation):
            work = dist.isend(_wire(x), self.ranks[place], self._way(self.place, place), tag)
        return Pending(self, operation, work, x)

    def start_receive(self, out: Tensor, place: int, *, what: str, tag: int = 0) -> Pending:
        """Begin to receive into ``out`` from the rank at ``place``."""
        operation = f"receiving {what} from rank {self.ranks[place]}"
        with self.named(operation):
            work = dist.irecv(_wire(out), self.ranks[place], self._way(place, self.place), tag)
        return Pending(self, operation, work, out)

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.group is not None:
            with self.named("barrier"):
                dist.barrier(self.group)

    @contextmanager
    def named(self, operation: str) -> Iterator[None]:
        """Say who waited where, for what, if it fails. Raises Lost."""
        try:
            with self.traffic.standing_still():
                yield
        except (RuntimeError, ValueError) as error:
            raise Lost(
                f"rank {self.ranks[self.place]}: {operation} over {self.name} "
                f"(ranks {_short(self.ranks)}) failed at step {self.traffic.step}: "
                f"{_reason(error)}"
            ) from error

    def _way(self, source: int, target: int) -> dist.ProcessGroup | None:
        """Return the group that messages from one place to another go over."""
        if self.ways is None:
            return self.group
        return self.ways.later if source < target else self.ways.earlier

    def _count(self, operation: str, nbytes: int) -> None:
        self.traffic.count(self.name, operation, nbytes)


def alone(name: str = "world") -> Axis:
    """Return the axis of a process that has no others."""
    return Axis(name, (0,), 0, None, Traffic())


def _wire(x: Tensor) -> Tensor:
    """View codes as bytes."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


def _reason(error: Exception) -> str:
    """Return what a library says, without the place in its source and its advice."""
    said = re.sub(r"^(\[[^][]*\] ?)+", "", in_one_line(error))
    return said.partition(". This is typically caused by")[0] or "no reason given"


def _short(ranks: Sequence[int]) -> str:
    if len(ranks) <= 8:
        return " ".join(map(str, ranks))
    return f"{ranks[0]} {ranks[1]} ... {ranks[-1]}"
