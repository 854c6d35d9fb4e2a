"""Grouped products: each segment of rows meets the weight matrix of its own expert."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ziphius.kernels.cpu.library import TYPES, Library
from ziphius.kernels.later import Later, put_off


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
    def forward(
        ctx: Any, x_MI: Tensor, weight_EOI: Tensor, counts: Sequence[int], later: Later | None
    ) -> Tensor:
        ctx.save_for_backward(x_MI, weight_EOI)
        ctx.counts, ctx.parameter, ctx.later = counts, weight_EOI, later
        out_MO = x_MI.new_empty(x_MI.shape[0], weight_EOI.shape[1])
        for x_mI, weight_OI, out_mO in _segments(counts, x_MI, weight_EOI, out_MO):
            torch.mm(x_mI, weight_OI.to(x_MI.dtype).T, out=out_mO)
        return out_MO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x_MI, weight_EOI = ctx.saved_tensors
        counts, dout_MO = ctx.counts, grads[0].contiguous()
        dx_MI = dweight_EOI = None
        if ctx.needs_input_grad[0]:
            dx_MI = torch.empty_like(x_MI)
            for dout_mO, weight_OI, dx_mI in _segments(counts, dout_MO, weight_EOI, dx_MI):
                torch.mm(dout_mO, weight_OI.to(x_MI.dtype), out=dx_mI)

        def gradient() -> Tensor:
            made_EOI = torch.zeros_like(weight_EOI)
            for dout_mO, made_OI, x_mI in _segments(counts, dout_MO, made_EOI, x_MI):
                _product(dout_mO.T, x_mI, made_OI)
            return made_EOI

        if ctx.needs_input_grad[1]:
            dweight_EOI = put_off(ctx.later, ctx.parameter, gradient)
        return dx_MI, dweight_EOI, None, None


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)


def grouped_linear_loop(
    x_MI: Tensor, weight_EOI: Tensor, counts: Sequence[int], later: Later | None = None
) -> Tensor:
    """Do the same, one product a non-empty segment. Shapes as in the reference.

    With ``later`` the weight's gradient may be put off.
    """
    return _GroupedLinear.apply(x_MI, weight_EOI, counts, later)


def _segments(
    counts: Sequence[int], rows: Tensor, experts: Tensor, others: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield (rows, matrix, other rows) of every expert that has rows."""
    sizes = list(counts)
    segments = zip(rows.split(sizes), experts.unbind(0), others.split(sizes), strict=True)
    return (segment for segment in segments if len(segment[0]))


class _Compiled(torch.autograd.Function):
    """Weights are rounded to the dtype of the rows as they are packed; their gradient is not."""

    @staticmethod
    def forward(
        ctx: Any,
        library: Library,
        x_MI: Tensor,
        weight_EOI: Tensor,
        counts: Sequence[int],
        later: Later | None,
    ) -> Tensor:
        ctx.parameter, ctx.later = weight_EOI, later
        x_MI, weight_EOI = x_MI.contiguous(), weight_EOI.contiguous()
        counts_E = torch.tensor(counts, dtype=torch.int64)
        ctx.save_for_backward(x_MI, weight_EOI, counts_E)
        ctx.library = library
        experts, outer, inner = weight_EOI.shape
        out_MO = x_MI.new_empty(len(x_MI), outer)
        sizes = (experts, inner, outer)
        _rows_times(library, x_MI, weight_EOI, counts_E, out_MO, sizes, turned=True)
        return out_MO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_MI, weight_EOI, counts_E = ctx.saved_tensors
        dout_MO = grads[0].contiguous()
        library, sizes = ctx.library, weight_EOI.shape
        dx_MI = dweight_EOI = None
        if ctx.needs_input_grad[1]:
            dx_MI = torch.empty_like(x_MI)
            _rows_times(library, dout_MO, weight_EOI, counts_E, dx_MI, sizes, turned=False)

        def gradient() -> Tensor:
            made_EOI = gradient_memory(weight_EOI)
            tensors = (dout_MO, x_MI, counts_E, made_EOI)
            types = (x_MI.dtype, TYPES[weight_EOI.dtype])
            library.call("grouped_weight_gradient", *types, *tensors, *sizes)
            return made_EOI

        if ctx.needs_input_grad[2]:
            dweight_EOI = put_off(ctx.later, ctx.parameter, gradient)
        return None, dx_MI, dweight_EOI, None, None


def _rows_times(
    library: Library,
    x: Tensor,
    weight: Tensor,
    counts_E: Tensor,
    out: Tensor,
    sizes: Sequence[int],
    *,
    turned: bool,
) -> None:
    types = (x.dtype, TYPES[weight.dtype])
    library.call("grouped_rows", *types, x, weight, counts_E, out, *sizes, int(turned))


def keep_gradient(parameter: Tensor) -> None:
    """Drop a parameter's gradient, and on a processor keep its memory for the next one.

    Memory that is given back there is taken anew page by page in every step, which costs more than
    what is written. torch itself keeps a GPU's.
    """
    if parameter.device.type == "cpu":
        parameter.spare_gradient = parameter.grad  # type: ignore[attr-defined]
    parameter.grad = None


def gradient_memory(parameter: Tensor) -> Tensor:
    """Return memory for a gradient, undefined: what ``keep_gradient`` kept, or new."""
    spare = getattr(parameter, "spare_gradient", None)
    if spare is None:
        return torch.empty_like(parameter)
    parameter.spare_gradient = None  # type: ignore[attr-defined]
    kept: Tensor = spare
    return kept


def grouped_linear_compiled(
    library: Library,
    x_MI: Tensor,
    weight_EOI: Tensor,
    counts: Sequence[int],
    later: Later | None = None,
) -> Tensor:
    """Do the same, all segments in one call. Shapes as in the reference.

    torch makes a new kernel for every size of a segment that it has not met, and sizes change from
    step to step; here they cost nothing. Threads share the work by blocks of rows. Weights have the
    dtype of the rows, or one is FP32 and the other BF16.
    """
    if torch.float64 in (x_MI.dtype, weight_EOI.dtype):
        weight_EOI = weight_EOI.to(x_MI.dtype)
    return _Compiled.apply(library, x_MI, weight_EOI, counts, later)


class _Mm(torch.autograd.Function):
    """torch's own backward refuses gradients that are expanded or turned."""

    @staticmethod
    def forward(
        ctx: Any, x_MI: Tensor, weight_EOI: Tensor, ends_E: Tensor, later: Later | None
    ) -> Tensor:
        ctx.save_for_backward(x_MI, weight_EOI, ends_E)
        ctx.parameter, ctx.later = weight_EOI, later
        return F.grouped_mm(x_MI, weight_EOI.to(x_MI.dtype).mT, offs=ends_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x_MI, weight_EOI, ends_E = ctx.saved_tensors
        dout_MO = grads[0].contiguous()
        dx_MI = dweight_EOI = None
        if ctx.needs_input_grad[0]:
            dx_MI = F.grouped_mm(dout_MO, weight_EOI.to(x_MI.dtype), offs=ends_E)
        if ctx.needs_input_grad[1]:
            dweight_EOI = put_off(
                ctx.later,
                ctx.parameter,
                lambda: F.grouped_mm(dout_MO.T, x_MI, offs=ends_E).to(weight_EOI.dtype),
            )
        return dx_MI, dweight_EOI, None, None


def grouped_linear_mm(
    x_MI: Tensor, weight_EOI: Tensor, counts_E: Tensor, later: Later | None = None
) -> Tensor:
    """Do the same by torch's grouped product, all segments in one call, for GPUs.

    ``counts`` stay on the device, so nothing waits for it. What that product refuses, float64, no
    rows, and rows whose bytes are no multiple of 16, goes the way of the loop, which waits.
    """
    ragged = any(width * x_MI.element_size() % _ALIGNED for width in weight_EOI.shape[1:])
    if ragged or x_MI.dtype == torch.float64 or not len(x_MI):
        return grouped_linear_loop(x_MI, weight_EOI, counts_E.tolist(), later)
    ends_E = counts_E.cumsum(0).to(torch.int32)
    if later is None:  # rounded once; what waits has to know the parameter, and rounds it again
        weight_EOI = weight_EOI.to(x_MI.dtype)
    return _Mm.apply(x_MI.contiguous(), weight_EOI, ends_E, later)


_ALIGNED = 16
VERSIONS: dict[str, Callable[..., Tensor]] = {
    "reference": grouped_linear_reference,
    "loop": grouped_linear_loop,
    "grouped_mm": grouped_linear_mm,
}
# They take counts as a tensor on the device of the rows; the others a list, which waits for a GPU.
COUNT_ON_DEVICE = frozenset({"grouped_mm", "triton"})
COMPILED = grouped_linear_compiled
