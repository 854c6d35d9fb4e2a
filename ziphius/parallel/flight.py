"""Communication in two halves that autograd knows: begun, and waited for.

Between the halves a rank may compute. In backward they change places: the second one's begins to
send the gradients of what had come, and the first one's waits for those of what had been sent.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ziphius.model.dispatch import Lane, Promise

Tensors = tuple[Tensor | None, ...]


@dataclass
class Flight(ABC):
    """Something that travels over a lane, forward and backward. What it is given must stay."""

    lane: Lane
    going: Promise[Tensors] | None = field(default=None, init=False)

    @abstractmethod
    def out(self, *given: Tensor | None) -> Tensors:
        """Send what the beginning was given; return what the end has."""

    @abstractmethod
    def back(self, *grads: Tensor) -> Tensors:
        """Send the gradients of what the end has; return those of what the beginning was given."""

    def start(self, way: Callable[..., Tensors], given: Sequence[Tensor | None]) -> None:
        """Let one of the two run on the lane."""

        def work() -> Tensors:
            with torch.no_grad():  # a lane may be a thread, whose results autograd would watch
                return way(*given)

        self.going = self.lane.submit(work)

    def arrive(self) -> Tensors:
        """Wait for it; the result is not kept."""
        assert self.going is not None, "begun before it is waited for"
        going, self.going = self.going, None
        return going.result()


class Begun(NamedTuple):
    """What is under way, and the empty tensor by which autograd knows it."""

    handle: Tensor
    flight: Flight


def begin(flight: Flight, *given: Tensor | None) -> Begun:
    """Begin to send; the first of what is given has the gradients' dtype."""
    return Begun(_Begin.apply(flight, *given), flight)


def end(begun: object) -> tuple[Flight, Sequence[Any]]:
    """Return the flight and what it has brought."""
    assert isinstance(begun, Begun), "made by begin"
    return begun.flight, _End.apply(begun.flight, begun.handle)


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flight: Flight, *given: Tensor | None) -> Tensor:
        ctx.flight = flight
        flight.start(flight.out, given)
        return cast("Tensor", given[0]).new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensors:
        return None, *ctx.flight.arrive()


class _End(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flight: Flight, handle: Tensor) -> Tensors:
        ctx.flight, ctx.handle = flight, handle.detach()
        arrived = flight.arrive()
        # Of what is dispatched, tiles are for products only: their value has the gradient.
        ctx.mark_non_differentiable(*(x for x in arrived[1:3] if x is not None))
        return arrived

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensors:
        ctx.flight.start(ctx.flight.back, grads)
        return None, ctx.handle
