"""SwiGLU with its quantisers on a GPU: each number is read once and written once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ziphius.kernels.quantize import Fp8
from ziphius.kernels.triton.bits import approximate, interpreted, wide
from ziphius.kernels.triton.groups import (
    block_of_experts,
    codes_of,
    cut_back,
    empty_tiles,
    empty_turned,
    load_quarter,
    load_scales,
    locate,
    padded,
    store_groups,
    store_turned,
    words_of,
)
from ziphius.kernels.triton.squares import TURN
from ziphius.kernels.triton.swiglu_units import again_units


@dataclass(frozen=True)
class Launch:
    """How much a program takes: ``groups`` of 128 forward, and ``back`` of a row at a time back."""

    groups: int = 16
    back: int = 16
    warps: int = 4


CANDIDATES = (Launch(), Launch(8, 8), Launch(32, 32, warps=8), Launch(32, 8))
CHANNELS = 64  # of 128 rows, that a program turns where squares do not fit


class TritonSwigluFp8:
    """What ``TorchSwigluFp8`` does. A product may differ from torch's in its last bits."""

    def __init__(self, launch: Launch | None = None) -> None:
        self.launch = launch or Launch()

    def forward(
        self,
        gate_MF: Tensor,
        up_MF: Tensor,
        gates_M: Tensor | None,
        *,
        power_of_two: bool = False,
    ) -> tuple[Fp8, Fp8, Fp8]:
        """Return the product and both inputs in tiles."""
        shape, size = gate_MF.shape, self.launch
        gate_MF, up_MF = padded(gate_MF), padded(up_MF)
        outputs = tuple(empty_tiles(gate_MF.shape, gate_MF.device) for _ in range(3))
        groups = outputs[0].scales.numel()
        if groups:
            _swiglu_kernel[(triton.cdiv(groups, size.groups),)](
                gate_MF,
                up_MF,
                gates_M,
                *(part for q in outputs for part in (codes_of(q), q.scales)),
                gate_MF.stride(0),
                up_MF.stride(0),
                gate_MF.shape[1],
                groups,
                GROUPS=size.groups,
                POWER_OF_TWO=power_of_two,
                INTERPRETED=interpreted(),
                num_warps=size.warps,
            )
        hidden, gate, up = (cut_back(q, shape) for q in outputs)
        return hidden, gate, up

    def turned(
        self,
        gate: Fp8,
        up: Fp8,
        gates_M: Tensor | None,
        counts_E: Tensor | None = None,
        *,
        power_of_two: bool = False,
    ) -> Fp8:
        """Compute the product again from the kept inputs, and turn it."""
        rows, columns = gate.codes.shape
        out = empty_turned(rows, columns, counts_E, gate.codes.device)
        if not out.scales.numel():
            return out
        if TURN.fits(gate.codes) and TURN.fits(up.codes):
            again_units(gate, up, gates_M, out, counts_E, power_of_two=power_of_two)
        else:
            _swiglu_turned_kernel[(triton.cdiv(columns, CHANNELS), out.scales.shape[1])](
                gate.codes,
                gate.scales,
                up.codes,
                up.scales,
                gates_M,
                counts_E,
                words_of(out),
                out.scales,
                rows,
                columns,
                out.codes.shape[1],
                0 if counts_E is None else len(counts_E),
                CHANNELS=CHANNELS,
                EXPERTS=block_of_experts(counts_E),
                POWER_OF_TWO=power_of_two,
                INTERPRETED=interpreted(),
                num_warps=8,
            )
        return out

    def backward(
        self,
        gate: Fp8,
        up: Fp8,
        gates_M: Tensor | None,
        dhidden_MF: Tensor,
        dgate_MF: Tensor,
        dup_MF: Tensor,
    ) -> Tensor | None:
        """Write the inputs' gradients; return the routing weights'."""
        (rows, columns), size = gate.codes.shape, self.launch
        dgates_M = None if gates_M is None else torch.empty_like(gates_M, dtype=torch.float32)
        if gate.codes.numel():
            groups = min(size.back, triton.next_power_of_2(gate.scales.shape[1]))
            _swiglu_backward_kernel[(rows,)](
                gate.codes,
                gate.scales,
                up.codes,
                up.scales,
                gates_M,
                dhidden_MF,
                dgate_MF,
                dup_MF,
                dgates_M,
                dhidden_MF.stride(0),
                dgate_MF.stride(0),
                dup_MF.stride(0),
                columns,
                GROUPS=groups,
                INTERPRETED=interpreted(),
                num_warps=size.warps,
            )
        return dgates_M


@triton.jit
def _sigmoid(x: tl.tensor, INTERPRETED: tl.constexpr) -> tl.tensor:
    """Compute ``1 / (1 + e^-x)`` to about 2^-21: what is rounded to E4M3 or BF16 needs no more.

    On a GPU by four instructions; Triton's own exponential and quotient take three times as many,
    for results below the normal numbers, which are zero here.
    """
    if INTERPRETED:
        result = 1.0 / (1.0 + tl.exp(-x))
    else:
        power = approximate("ex2.approx.ftz.f32 $0, $1;", x * -1.4426950408889634)
        result = approximate("rcp.approx.ftz.f32 $0, $1;", 1.0 + power)
    return result


@triton.jit
def _swiglu_kernel(
    gate: tl.tensor,
    up: tl.tensor,
    gates: tl.tensor,
    hidden_codes: tl.tensor,
    hidden_scales: tl.tensor,
    gate_codes: tl.tensor,
    gate_scales: tl.tensor,
    up_codes: tl.tensor,
    up_scales: tl.tensor,
    gate_stride: tl.tensor,
    up_stride: tl.tensor,
    columns: tl.tensor,
    groups: tl.tensor,
    GROUPS: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    tiles = tl.cdiv(columns, 128)
    row, tile = (group // tiles).to(tl.int64), group % tiles
    valid = group < groups
    column = (tile * 128)[:, None] + tl.arange(0, 128)[None, :]
    mask = valid[:, None] & (column < columns)
    at = gate + (row * gate_stride)[:, None] + column
    g = wide(tl.load(at, mask=mask, other=0.0), INTERPRETED)
    at = up + (row * up_stride)[:, None] + column
    u = wide(tl.load(at, mask=mask, other=0.0), INTERPRETED)
    store_groups(g, gate_codes, gate_scales, row, tile, columns, valid, False, INTERPRETED)
    store_groups(u, up_codes, up_scales, row, tile, columns, valid, False, INTERPRETED)
    hidden = g * _sigmoid(g, INTERPRETED) * u
    if gates is not None:
        hidden *= tl.load(gates + row, mask=valid, other=0.0)[:, None]
    store_groups(
        hidden,
        hidden_codes,
        hidden_scales,
        row,
        tile,
        columns,
        valid,
        POWER_OF_TWO,
        INTERPRETED,
        EXACT=False,
    )


@triton.jit(do_not_specialize=["rows"])
def _swiglu_turned_kernel(
    gate_codes: tl.tensor,
    gate_scales: tl.tensor,
    up_codes: tl.tensor,
    up_scales: tl.tensor,
    gates: tl.tensor,
    counts: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    width: tl.tensor,
    experts: tl.tensor,
    CHANNELS: tl.constexpr,
    EXPERTS: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    tile = tl.program_id(1)
    first, filled = locate(counts, tile, rows, experts, EXPERTS)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inputs = gate_codes, gate_scales, up_codes, up_scales, gates
    place = tl.program_id(0) * CHANNELS // 128, first, filled, channel, columns
    a = _hidden(inputs, 0, place, INTERPRETED)
    b = _hidden(inputs, 1, place, INTERPRETED)
    c = _hidden(inputs, 2, place, INTERPRETED)
    d = _hidden(inputs, 3, place, INTERPRETED)
    store_turned(
        a,
        b,
        c,
        d,
        codes,
        scales,
        channel,
        tile,
        columns,
        width,
        POWER_OF_TWO,
        INTERPRETED,
        EXACT=False,
    )


@triton.jit
def _hidden(inputs, QUARTER: tl.constexpr, place, INTERPRETED: tl.constexpr) -> tl.tensor:
    """Compute a quarter of a square of the product from what is kept."""
    gate_codes, gate_scales, up_codes, up_scales, gates = inputs
    tile, first, filled, channel, columns = place
    tiles = tl.cdiv(columns, 128)
    g = wide(
        load_quarter(gate_codes, QUARTER, first, filled, columns, channel, columns), INTERPRETED
    )
    g *= load_scales(gate_scales, QUARTER, first, filled, tiles, tile)
    u = wide(load_quarter(up_codes, QUARTER, first, filled, columns, channel, columns), INTERPRETED)
    u *= load_scales(up_scales, QUARTER, first, filled, tiles, tile)
    hidden = g * _sigmoid(g, INTERPRETED) * u
    if gates is not None:
        hidden *= load_scales(gates, QUARTER, first, filled, 1, 0)
    return hidden


@triton.jit
def _swiglu_backward_kernel(
    gate_codes: tl.tensor,
    gate_scales: tl.tensor,
    up_codes: tl.tensor,
    up_scales: tl.tensor,
    gates: tl.tensor,
    dhidden: tl.tensor,
    dgate: tl.tensor,
    dup: tl.tensor,
    dgates: tl.tensor,
    dhidden_stride: tl.tensor,
    dgate_stride: tl.tensor,
    dup_stride: tl.tensor,
    columns: tl.tensor,
    GROUPS: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    """Take a row, some groups at a time: only a whole row gives its routing weight's gradient."""
    row = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(columns, 128)
    weight = 1.0
    if gates is not None:
        weight = tl.load(gates + row)
    total = tl.zeros((GROUPS, 128), tl.float32)
    for first in range(0, tiles, GROUPS):
        tile = first + tl.arange(0, GROUPS)
        column = (tile * 128)[:, None] + tl.arange(0, 128)[None, :]
        mask = column < columns
        own, there = row * tiles + tile, tile < tiles
        g = tl.load(gate_codes + row * columns + column, mask=mask, other=0.0).to(tl.float32)
        g *= tl.load(gate_scales + own, mask=there, other=0.0)[:, None]
        u = tl.load(up_codes + row * columns + column, mask=mask, other=0.0).to(tl.float32)
        u *= tl.load(up_scales + own, mask=there, other=0.0)[:, None]
        dh = tl.load(dhidden + row * dhidden_stride + column, mask=mask, other=0.0).to(tl.float32)
        sigmoid = _sigmoid(g, INTERPRETED)
        silu = g * sigmoid
        if gates is not None:
            total += dh * silu * u
            dh *= weight
        dg = dh * u * (sigmoid + silu * (1.0 - sigmoid))
        at = dgate + row * dgate_stride + column
        tl.store(at, dg.to(dgate.dtype.element_ty), mask=mask)
        at = dup + row * dup_stride + column
        tl.store(at, (dh * silu).to(dup.dtype.element_ty), mask=mask)
    if gates is not None:
        tl.store(dgates + row, tl.sum(tl.sum(total, 1), 0))
