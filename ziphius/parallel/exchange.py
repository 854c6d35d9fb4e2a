"""Rows that ranks bring together and give back: two moves, each the other's backward pass."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ziphius.kernels.fp8 import Operand, Tiled, unread
from ziphius.kernels.quantize import E4M3
from ziphius.parallel.collectives import Axis


class Plan(NamedTuple):
    """How rows meet over some axes: one after the other, so that the later one's ranks come first.

    Every rank has ``own`` rows and sends ``room`` of them; what is together is ``places`` of all
    that arrived, or all of it.
    """

    axes: tuple[Axis, ...]
    own: int
    room: int
    places: Tensor | None

    @property
    def together(self) -> int:
        """How many rows there are together."""
        arrived = self.room
        for axis in self.axes:
            arrived *= axis.size
        return arrived if self.places is None else len(self.places)


def join(x_BtW: Operand, plan: Plan) -> Operand:
    """Bring together the rows of all ranks, ``[B, T, W]``; of tiles only codes and scales.

    Backward sums what all ranks give of a row, and brings it to its rank.
    """
    if not plan.axes:
        return x_BtW
    if isinstance(x_BtW, Tensor):
        x_BTW: Tensor = _Join.apply(x_BtW, plan)
        return x_BTW
    codes = _together(x_BtW.codes.view(torch.uint8), plan).view(E4M3)
    return Tiled(_JoinUnread.apply(x_BtW.value, plan), codes, _together(x_BtW.scales, plan))


def part(x_BTW: Tensor, plan: Plan) -> Tensor:
    """Sum what all ranks have of all rows, and keep this one's, ``[B, t, W]``."""
    if not plan.axes:
        return x_BTW
    x_BtW: Tensor = _Part.apply(x_BTW, plan)
    return x_BtW


def _together(x_BtW: Tensor, plan: Plan) -> Tensor:
    x_tBW = x_BtW.transpose(0, 1)
    if plan.own < plan.room:
        x_tBW = F.pad(x_tBW, (0, 0, 0, 0, 0, plan.room - plan.own))
    for axis in plan.axes:
        x_tBW = axis.all_gather(x_tBW)
    if plan.places is not None:
        x_tBW = x_tBW.index_select(0, plan.places)
    return x_tBW.transpose(0, 1).contiguous()


def _apart(x_BTW: Tensor, plan: Plan) -> Tensor:
    x_TBW = x_BTW.transpose(0, 1)
    if plan.places is not None:
        arrived = plan._replace(places=None).together
        given_TBW = x_TBW
        x_TBW = given_TBW.new_zeros(arrived, *given_TBW.shape[1:])
        x_TBW.index_copy_(0, plan.places, given_TBW)
    for axis in reversed(plan.axes):
        x_TBW = axis.reduce_scatter(x_TBW)
    return x_TBW[: plan.own].transpose(0, 1).contiguous()


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BtW: Tensor, plan: Plan) -> Tensor:
        ctx.plan = plan
        return _together(x_BtW, plan)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _apart(grads[0], ctx.plan), None


class _JoinUnread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BtW: Tensor, plan: Plan) -> Tensor:
        ctx.plan = plan
        return unread(x_BtW, len(x_BtW), plan.together, x_BtW.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _apart(grads[0], ctx.plan), None


class _Part(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTW: Tensor, plan: Plan) -> Tensor:
        ctx.plan = plan
        return _apart(x_BTW, plan)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _together(grads[0], ctx.plan), None
