"""A forward pass in pieces, each with a graph of its own, so that each has a backward of its own.

Autograd runs a graph's backward as a whole. Where the stages of two micro-batches interleave,
graphs are cut between the stages: a piece's results enter others as their inputs, and the gradients
that these leave there are what its own backward begins with. The sums have autograd's order, if
pieces run backward in the reverse order, and so its bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ziphius.model.dispatch import Sent

T = TypeVar("T")


class Port:
    """A tensor at which graphs are cut: where its gradient goes, and what has come of it."""

    __slots__ = ("edge", "gradient")

    def __init__(self, edge: GradientEdge) -> None:
        self.edge = edge
        self.gradient: Tensor | None = None

    def add(self, gradient: Tensor) -> None:
        """Add what one of its users has found."""
        self.gradient = gradient if self.gradient is None else self.gradient + gradient


class Piece(Generic[T]):
    """What a piece of a forward pass has made: tensors, in tuples or ``Sent``, and anything else.

    The tensors themselves are free after ``let_go``: what backward needs of them, its graph has.
    """

    def __init__(self, value: T) -> None:
        self._value: T | None = value
        self.ports: list[Port] = []
        _each(value, self._cut)

    def _cut(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            self.ports.append(Port(get_gradient_edge(x)))
        return x

    @property
    def value(self) -> T:
        """What has been made, with its graph."""
        assert self._value is not None, "let go"
        return self._value

    def enter(self) -> T:
        """Return it as the input of another piece."""
        ports = iter(self.ports)

        def enter(x: Tensor) -> Tensor:
            if not x.requires_grad:
                return x
            begin = torch.empty(0, requires_grad=True)
            return cast("Tensor", _Enter.apply(next(ports), begin, x.detach()))

        return cast("T", _each(self.value, enter))

    def let_go(self) -> T:
        """Forget what no other piece will enter; return it for the last time."""
        value, self._value = self.value, None
        return value

    def back(self) -> None:
        """Run backward from the gradients that others have left here; done once."""
        ports, self.ports = [p for p in self.ports if p.gradient is not None], []
        if ports:
            gradients = [cast("Tensor", p.gradient) for p in ports]
            torch.autograd.backward([p.edge for p in ports], gradients)


class _Enter(torch.autograd.Function):
    """The other side of a cut. Nothing but its users holds the tensor."""

    @staticmethod
    def forward(ctx: Any, port: Port, begin: Tensor, x: Tensor) -> Tensor:
        ctx.port = port
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        ctx.port.add(grads[0])
        return None, None, None


def _each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Rebuild a structure from its changed tensors."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Sent):
        rows_MD, gates_M = (_each(x, change) for x in (value.rows_MD, value.gates_M))
        return replace(value, rows_MD=rows_MD, gates_M=gates_M)
    if isinstance(value, tuple):
        items = [_each(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value
