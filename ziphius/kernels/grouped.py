"""Grouped products: each segment of rows meets the weight matrix of its own expert."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def grouped_linear_reference(x_MI: Tensor, weight_EOI: Tensor, counts: Sequence[int]) -> Tensor:
    """Multiply ``counts[e]`` consecutive rows by ``weight[e]``, for every expert in turn.

    ``x`` is ``[M, I]`` sorted by expert, ``weight`` ``[E, O, I]``, ``sum(counts) == M``; the
    result is ``[M, O]``, in the dtype of ``x``, to which weights are rounded. Differentiable in
    both.
    """
    segments, weight_EOI = x_MI.split(list(counts)), weight_EOI.to(x_MI.dtype)
    pairs = zip(segments, weight_EOI.unbind(0), strict=True)
    return torch.cat([segment @ weight_OI.T for segment, weight_OI in pairs])


class _GroupedLinear(torch.autograd.Function):
    """The same with outputs written in place.

    Autograd through ``split`` and ``unbind`` would build one full-size gradient a segment and add
    them up; here each product lands where it belongs. A weight may have a wider dtype than the
    rows: it is rounded to theirs, one expert after the other.
    """

    @staticmethod
    def forward(ctx: Any, x_MI: Tensor, weight_EOI: Tensor, counts: Sequence[int]) -> Tensor:
        ctx.save_for_backward(x_MI, weight_EOI)
        ctx.counts = counts
        out_MO = x_MI.new_empty(x_MI.shape[0], weight_EOI.shape[1])
        for expert, rows in _segments(counts):
            torch.mm(x_MI[rows], weight_EOI[expert].to(x_MI.dtype).T, out=out_MO[rows])
        return out_MO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_MI, weight_EOI = ctx.saved_tensors
        dout_MO = grads[0].contiguous()
        dx_MI = torch.empty_like(x_MI) if ctx.needs_input_grad[0] else None
        dweight_EOI = torch.empty_like(weight_EOI) if ctx.needs_input_grad[1] else None
        for expert, rows in _segments(ctx.counts):
            if dx_MI is not None:
                torch.mm(dout_MO[rows], weight_EOI[expert].to(x_MI.dtype), out=dx_MI[rows])
            if dweight_EOI is not None:
                _product(dout_MO[rows].T, x_MI[rows], dweight_EOI[expert])
        if dweight_EOI is not None:
            for expert, count in enumerate(ctx.counts):
                if not count:
                    dweight_EOI[expert].zero_()
        return dx_MI, dweight_EOI, None


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)


def grouped_linear_loop(x_MI: Tensor, weight_EOI: Tensor, counts: Sequence[int]) -> Tensor:
    """Do the same, one product a non-empty segment. Shapes as in the reference."""
    return _GroupedLinear.apply(x_MI, weight_EOI, counts)


def _segments(counts: Sequence[int]) -> list[tuple[int, slice]]:
    """List (expert, its rows) for every expert that has rows."""
    segments, start = [], 0
    for expert, count in enumerate(counts):
        if count:
            segments.append((expert, slice(start, start + count)))
        start += count
    return segments


VERSIONS: dict[str, Callable[[Tensor, Tensor, Sequence[int]], Tensor]] = {
    "reference": grouped_linear_reference,
    "loop": grouped_linear_loop,
}
