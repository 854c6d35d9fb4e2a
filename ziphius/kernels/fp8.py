"""Linear layers in FP8: the three products, and what is kept between them (facts 4.1, 4.6).

Forward multiplies tiles of the input by blocks of the weight. Backward quantises the gradient of
the output once in tiles, for the gradient of the input, and once turned, for the gradient of the
weight, which also needs the kept input turned. What is kept is FP8; nothing is kept in BF16 beside
it. Weights are quantised once a version by the layer that owns them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ziphius.kernels.e5m6 import Version
from ziphius.kernels.kept import KeptOutput
from ziphius.kernels.later import Later, put_off
from ziphius.kernels.quantize import E4M3, Fp8, Quantize
from ziphius.kernels.swiglu_fp8 import SwigluFp8


class Tiled(NamedTuple):
    """An activation as FP8 products take it, and the tensor by which autograd knows it.

    ``codes`` and ``scales`` are those of ``Fp8`` in tiles, ``[..., C]`` and ``[..., C / 128]``.
    ``value`` is ``[..., C]``; where nobody reads its numbers it has none (see ``unread``).
    """

    value: Tensor
    codes: Tensor
    scales: Tensor

    @property
    def rows(self) -> Fp8:
        """The tiles as a matrix."""
        return Fp8(self.codes.flatten(0, -2), self.scales.flatten(0, -2))


Operand = Tensor | Tiled


class Arrived:
    """Where a dispatcher leaves a gradient that travelled in tiles, for the product's backward.

    Autograd hands on a tensor of the gradient's shape that nobody reads.
    """

    def __init__(self) -> None:
        self._tiles: Fp8 | None = None

    def put(self, tiles: Fp8) -> None:
        """Leave the tiles of a gradient ``[M, O]``."""
        self._tiles = tiles

    def take(self) -> Fp8 | None:
        """Return what was left, once; None where gradients come as numbers."""
        tiles, self._tiles = self._tiles, None
        return tiles


class Fp8Weight(NamedTuple):
    """A weight as products meet it: forward ``[.., O, I]``, and transposed for backward.

    A weight that only answers has no transpose.
    """

    blocks: Fp8
    transposed: Fp8 | None


@dataclass(frozen=True)
class Arithmetic:
    """The chosen versions of what FP8 layers are made of, and the kind of their scales.

    ``power_of_two`` makes every scale a power of two (UE8M0, as V3.1); without it only those are
    which the report wants so: rows that are dispatched, in both directions, and what is kept for
    the output projection. Gradients of weights may wait in ``later``.
    """

    quantize: Quantize
    gemm: Callable[[Fp8, Fp8, torch.dtype], Tensor]
    grouped: Callable[[Fp8, Fp8, Tensor, torch.dtype], Tensor]
    masked: Callable[[Fp8, Fp8, Tensor, torch.dtype], Tensor]
    along_k: Callable[[Fp8, Fp8, Tensor, torch.dtype], Tensor]
    swiglu: SwigluFp8
    e5m6: Version
    power_of_two: bool = False
    later: Later | None = None

    def operand(self, x: Operand, *, power_of_two: bool = False) -> Tiled:
        """Bring an activation to the form of products, if it is not in it."""
        if isinstance(x, Tiled):
            return x
        tiles = self.quantize.tiles(x.detach(), power_of_two=power_of_two or self.power_of_two)
        return Tiled(x, tiles.codes, tiles.scales)

    def keep_output(self, width: int) -> KeptOutput:
        """Return what takes the output of attention, whose heads have ``width`` columns."""
        return KeptOutput(width, self.e5m6)

    @torch.no_grad()
    def weight(self, weight: Tensor) -> Fp8Weight:
        """Quantise a weight ``[O, I]`` or a stack of them."""
        return Fp8Weight(*self.quantize.blocks(weight, power_of_two=self.power_of_two))

    def linear(
        self, x: Tiled, weight_OI: Tensor, form: Fp8Weight, kept: KeptOutput | None = None
    ) -> Tensor:
        """Compute ``x W^T`` in the dtype of ``x``; its weight's gradient is FP32.

        With ``kept`` backward reads that, and not the tiles of ``x``.
        """
        saved = (x.codes, x.scales) if kept is None else kept.tensors
        out: Tensor = _Linear.apply(self, x.value, x.rows, weight_OI, form, kept, saved)
        return out

    def grouped_linear(
        self, x: Tiled, weight_EOI: Tensor, form: Fp8Weight, counts_E: Tensor
    ) -> Tensor:
        """Multiply segments of rows by their experts' matrices: ``[M, O]``."""
        out: Tensor = _Grouped.apply(self, x.value, x.codes, x.scales, weight_EOI, form, counts_E)
        return out

    def gated_linear(
        self,
        gate: Tensor,
        up: Tensor | None,
        gates_M: Tensor | None,
        weight: Tensor,
        form: Fp8Weight,
        counts_E: Tensor | None = None,
        gradient: Arrived | None = None,
    ) -> Tensor:
        """Apply SwiGLU, the routing weights and the down projection; keep only FP8 inputs.

        ``gate`` and ``up`` are ``[..., F]``, or ``gate`` holds both side by side. With ``counts``
        the weight is a stack, one matrix a segment of rows, and the result's gradient may be in
        ``gradient``.
        """
        out: Tensor = _Gated.apply(self, gate, up, gates_M, weight, form, counts_E, gradient)
        return out

    def few(
        self,
        x_MD: Tiled,
        gate_up: Fp8,
        down: Fp8,
        gates_M: Tensor,
        counts_E: Tensor,
        most: int,
    ) -> Tensor:
        """Compute experts on segments of at most ``most`` rows, by masked products: ``[M, D]``.

        There is no backward. Products begin at rows that depend on no count.
        """
        E, dtype = len(counts_E), x_MD.value.dtype
        place_M = places(counts_E, len(gates_M), most)
        rows = Fp8(_placed(x_MD.codes, place_M, E * most), _placed(x_MD.scales, place_M, E * most))
        gate_up_ERG = self.masked(_by_expert(rows, E), gate_up, counts_E, dtype)
        gate_MF, up_MF = halves(gate_up_ERG, None)
        gates_R = _placed(gates_M, place_M, E * most)
        hidden, _, _ = self.swiglu.forward(gate_MF, up_MF, gates_R, power_of_two=self.power_of_two)
        out_ERD = self.masked(_by_expert(hidden, E), down, counts_E, dtype)
        return out_ERD.flatten(0, 1).index_select(0, place_M)

    def product(self, a: Fp8, b: Fp8, counts_E: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Multiply rows by one matrix, or by each segment's own."""
        return self.gemm(a, b, dtype) if counts_E is None else self.grouped(a, b, counts_E, dtype)

    def weight_gradient(
        self, dout: Fp8, x: Fp8, counts_E: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """Sum turned matrices over their rows, all or a segment at a time."""
        if counts_E is None:
            return self.gemm(dout, x, dtype)
        return self.along_k(dout, x, counts_E, dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        how: Arithmetic,
        value: Tensor,
        rows: Fp8,
        weight_OI: Tensor,
        form: Fp8Weight,
        kept: KeptOutput | None,
        saved: tuple[Tensor, ...],
    ) -> Tensor:
        ctx.how, ctx.form, ctx.kept = how, form, kept
        ctx.shape, ctx.parameter = value.shape, weight_OI
        ctx.save_for_backward(*saved)
        out = how.gemm(rows, form.blocks, value.dtype)
        return out.view(*value.shape[:-1], out.shape[-1])  # of no rows too

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        how: Arithmetic = ctx.how
        dout_NO = grads[0].flatten(0, -2)
        dout, turned = how.quantize.both(dout_NO, power_of_two=how.power_of_two)
        dx = dweight = None
        if ctx.needs_input_grad[1]:
            dx = how.gemm(dout, ctx.form.transposed, dout_NO.dtype).view(ctx.shape)
        saved, weight_OI, kept, dtype = ctx.saved_tensors, ctx.parameter, ctx.kept, dout_NO.dtype
        width = ctx.shape[-1]

        def gradient() -> Tensor:
            x = _turned_input(how, saved, kept, width, dtype)
            return how.gemm(turned, x, weight_OI.dtype)

        if ctx.needs_input_grad[3]:
            dweight = put_off(how.later, weight_OI, gradient)
        return None, dx, None, dweight, None, None, None


def _turned_input(
    how: Arithmetic,
    saved: tuple[Tensor, ...],
    output: KeptOutput | None,
    width: int,
    dtype: torch.dtype,
) -> Fp8:
    """Turn the kept input. In E5M6 its scales are powers of two, and then so are the new ones.

    BF16 holds E5M6 exactly.
    """
    if output is not None:
        rows = output.rows(saved, width, dtype)
        return how.quantize.turn(rows.flatten(0, -2), power_of_two=True)
    codes, scales = saved
    kept = Fp8(codes.flatten(0, -2), scales.flatten(0, -2))
    return how.quantize.regroup(kept, power_of_two=how.power_of_two)


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        how: Arithmetic,
        value_MI: Tensor,
        codes_MI: Tensor,
        scales_MG: Tensor,
        weight_EOI: Tensor,
        form: Fp8Weight,
        counts_E: Tensor,
    ) -> Tensor:
        ctx.how, ctx.form, ctx.parameter = how, form, weight_EOI
        ctx.save_for_backward(codes_MI, scales_MG, counts_E)
        return how.grouped(Fp8(codes_MI, scales_MG), form.blocks, counts_E, value_MI.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        how: Arithmetic = ctx.how
        codes_MI, scales_MG, counts_E = ctx.saved_tensors
        dout, turned = how.quantize.both(grads[0], counts_E, power_of_two=how.power_of_two)
        dx_MI = dweight_EOI = None
        if ctx.needs_input_grad[1]:
            dx_MI = how.grouped(dout, ctx.form.transposed, counts_E, grads[0].dtype)
        weight_EOI = ctx.parameter

        def gradient() -> Tensor:
            # The rows were dispatched: their scales are powers of two, and so are the new ones.
            x = how.quantize.regroup(Fp8(codes_MI, scales_MG), counts_E, power_of_two=True)
            return how.along_k(turned, x, counts_E, weight_EOI.dtype)

        if ctx.needs_input_grad[4]:
            dweight_EOI = put_off(how.later, weight_EOI, gradient)
        return None, dx_MI, None, None, dweight_EOI, None, None


class _Gated(torch.autograd.Function):
    """SwiGLU and the projection behind it: its output is computed again in backward (facts 5.7)."""

    @staticmethod
    def forward(
        ctx: Any,
        how: Arithmetic,
        gate: Tensor,
        up: Tensor | None,
        gates_M: Tensor | None,
        weight: Tensor,
        form: Fp8Weight,
        counts_E: Tensor | None,
        gradient: Arrived | None,
    ) -> Tensor:
        gate_MF, up_MF = halves(gate, up)
        hidden, kept_gate, kept_up = how.swiglu.forward(
            gate_MF, up_MF, gates_M, power_of_two=how.power_of_two
        )
        ctx.how, ctx.form, ctx.parameter = how, form, weight
        ctx.shape, ctx.joined, ctx.dtype = gate.shape, up is None, gate.dtype
        ctx.gradient = gradient
        kept = (kept_gate.codes, kept_gate.scales, kept_up.codes, kept_up.scales)
        ctx.save_for_backward(*kept, gates_M, counts_E)
        out = how.product(hidden, form.blocks, counts_E, gate.dtype)
        return out.view(*gate.shape[:-1], out.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        how: Arithmetic = ctx.how
        *kept, gates_M, counts_E = ctx.saved_tensors
        gate, up = Fp8(*kept[:2]), Fp8(*kept[2:])
        dout_MO = grads[0].flatten(0, -2)
        dout, turned = _both(how, dout_MO, counts_E, ctx.gradient)
        dhidden_MF = how.product(dout, ctx.form.transposed, counts_E, ctx.dtype)
        dgate = torch.empty(ctx.shape, dtype=ctx.dtype, device=dout_MO.device)
        dup = None if ctx.joined else torch.empty_like(dgate)
        dgates_M = how.swiglu.backward(gate, up, gates_M, dhidden_MF, *halves(dgate, dup))
        dweight, weight = None, ctx.parameter

        def gradient() -> Tensor:
            hidden = how.swiglu.turned(gate, up, gates_M, counts_E, power_of_two=how.power_of_two)
            return how.weight_gradient(turned, hidden, counts_E, weight.dtype)

        if ctx.needs_input_grad[4]:
            dweight = put_off(how.later, weight, gradient)
        if dgates_M is not None:
            dgates_M = dgates_M.to(gates_M.dtype)
        return None, dgate, dup, dgates_M, dweight, None, None, None


def _both(
    how: Arithmetic, dout_MO: Tensor, counts_E: Tensor | None, gradient: Arrived | None
) -> tuple[Fp8, Fp8]:
    """Return a gradient in tiles, and turned."""
    if counts_E is None:
        return how.quantize.both(dout_MO, power_of_two=how.power_of_two)
    # What comes back from combine is dispatched in FP8 by powers of two (facts 4.1): all that is
    # known of it where the experts are, which in one process is the same.
    dout = None if gradient is None else gradient.take()
    if dout is None:
        dout = how.quantize.tiles(dout_MO, power_of_two=True)
    return dout, how.quantize.regroup(dout, counts_E, power_of_two=True)


class _PermuteTiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        value_ND: Tensor,
        codes_ND: Tensor,
        scales_NG: Tensor,
        order_M: Tensor,
        inverse_M: Tensor,
        K: int,
        permute: Callable[[Fp8, Tensor, Tensor, int], Fp8],
        unpermute: Callable[..., Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(order_M, inverse_M)
        ctx.K, ctx.unpermute = K, unpermute
        moved = permute(Fp8(codes_ND, scales_NG), order_M, inverse_M, K)
        ctx.mark_non_differentiable(moved.codes, moved.scales)
        return unread(value_ND, len(order_M), value_ND.shape[1]), moved.codes, moved.scales

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        order_M, inverse_M = ctx.saved_tensors
        du_ND = ctx.unpermute(grads[0].contiguous(), order_M, inverse_M, ctx.K)
        return du_ND, *(None,) * 7


def permute_tiled(
    u_ND: Tiled,
    order_M: Tensor,
    inverse_M: Tensor,
    K: int,
    permute: Callable[[Fp8, Tensor, Tensor, int], Fp8],
    unpermute: Callable[..., Tensor],
) -> Tiled:
    """Copy every token's tiles to its ``K`` places; its backward sums gradients in BF16.

    ``permute`` and ``unpermute`` are versions of those in ``kernels/permute.py``.
    """
    where = (order_M, inverse_M, K)
    return Tiled(*_PermuteTiled.apply(*u_ND, *where, permute, unpermute))


def places(counts_E: Tensor, rows: int, most: int) -> Tensor:
    """Return where rows sorted by expert lie when each has room for ``most``: int64 ``[rows]``."""
    ends_E = counts_E.cumsum(0)
    row_M = torch.arange(rows, device=counts_E.device)
    expert_M = torch.searchsorted(ends_E, row_M, right=True)
    return expert_M * most + row_M - (ends_E - counts_E)[expert_M]


def _placed(x: Tensor, place_M: Tensor, size: int) -> Tensor:
    """Put rows where ``place`` says; what lies between them is undefined."""
    # There is no copy of FP8 by index on every machine; of bytes there is.
    wire = x.view(torch.uint8) if x.dtype == E4M3 else x
    out = wire.new_empty(size, *x.shape[1:])
    return out.index_copy_(0, place_M, wire).view(x.dtype)


def _by_expert(q: Fp8, experts: int) -> Fp8:
    return Fp8(q.codes.unflatten(0, (experts, -1)), q.scales.unflatten(0, (experts, -1)))


def halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return gate and up as matrices ``[M, F]``: views of one, where it holds both."""
    gate_MF, up_MF = gate.chunk(2, dim=-1) if up is None else (gate, up)
    return gate_MF.flatten(0, -2), up_MF.flatten(0, -2)


def unread(like: Tensor, *shape: int) -> Tensor:
    """Return a tensor for autograd that nobody reads: one NaN in memory, whatever its shape."""
    return like.new_full((1,), float("nan")).expand(*shape)
