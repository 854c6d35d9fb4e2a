"""SwiGLU's product, once more and turned, in whole squares (``squares.py``)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ziphius.kernels.quantize import Fp8
from ziphius.kernels.triton.bits import approximate
from ziphius.kernels.triton.groups import load_scales, words_of
from ziphius.kernels.triton.squares import TURN, grid, options, place_of, units_of
from ziphius.kernels.triton.units import SMALLER, load_units, store_columns, tops_of, with_products

LARGEST = tl.constexpr(3.4028234663852886e38)  # of FP32


def again_units(
    gate: Fp8,
    up: Fp8,
    gates_M: Tensor | None,
    out: Fp8,
    counts_E: Tensor | None,
    *,
    power_of_two: bool,
) -> None:
    """Fill ``out`` with the product of inputs that ``TURN`` fits, turned."""
    again_units_kernel[grid(TURN, out)](
        units_of(gate.codes),
        gate.scales,
        units_of(up.codes),
        up.scales,
        gates_M,
        counts_E,
        words_of(out),
        out.scales,
        len(gate.codes),
        out.codes.shape[1],
        0 if counts_E is None else len(counts_E),
        STRIDE=gate.codes.stride(0) // 4,
        TILES=gate.scales.shape[1],
        **options(TURN, counts_E, power_of_two),
    )


@triton.jit(do_not_specialize=["rows"])
def again_units_kernel(
    gate: tl.tensor,
    gate_scales: tl.tensor,
    up: tl.tensor,
    up_scales: tl.tensor,
    gates: tl.tensor,
    counts: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    experts: tl.tensor,
    STRIDE: tl.constexpr,
    TILES: tl.constexpr,
    CHANNELS: tl.constexpr,
    EXPERTS: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    """Compute the product from what is kept, and turn it."""
    tile, channel, place = place_of(counts, rows, experts, CHANNELS, EXPERTS)
    inputs = gate, gate_scales, up, up_scales, gates
    a = _products(inputs, 0, place, STRIDE, TILES, INTERPRETED)
    b = _products(inputs, 1, place, STRIDE, TILES, INTERPRETED)
    c = _products(inputs, 2, place, STRIDE, TILES, INTERPRETED)
    d = _products(inputs, 3, place, STRIDE, TILES, INTERPRETED)
    store_columns(
        a,
        b,
        c,
        d,
        tops_of(a, b, c, d, INTERPRETED),
        codes,
        scales,
        channel,
        tile,
        width,
        CHANNELS,
        POWER_OF_TWO,
        INTERPRETED,
        EXACT=False,
        TIMES=SMALLER,
    )


@triton.jit
def _products(
    inputs,
    quarter: tl.constexpr,
    place,
    STRIDE: tl.constexpr,
    TILES: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> tl.tensor:
    """Compute a quarter of a square of the product, a tensor for each channel of a unit.

    The numbers come times ``SMALLER``, so that what all codes of a row have in common may be larger
    than FP32 holds, as a product with it need not be.
    """
    gate, gate_scales, up, up_scales, gates = inputs
    first, filled, unit, group = place
    g = load_units(gate, quarter, first, filled, STRIDE, unit)
    u = load_units(up, quarter, first, filled, STRIDE, unit)
    scale = load_scales(gate_scales, quarter, first, filled, TILES, group)
    row, other = (
        scale * (4.0 * SMALLER),
        load_scales(up_scales, quarter, first, filled, TILES, group),
    )
    finite = (scale < float("inf")) & (other < float("inf"))
    if gates is not None:
        weight = load_scales(gates, quarter, first, filled, 1, 0)
        finite &= tl.abs(weight) < float("inf")
        row *= weight
    row *= other
    # Beyond 2^160 every product but zero is infinite: a zero has to stay one.
    row = tl.where(finite, tl.minimum(tl.maximum(row, LARGEST * -1.0), LARGEST), row)
    power = scale * -1.4426950408889634  # 2^(code times that) is e^-x
    a, b, c, d, e, f, m, n = with_products(g, u, INTERPRETED)
    return (
        _times_sigmoid(e, a * power, INTERPRETED) * row,
        _times_sigmoid(f, b * power, INTERPRETED) * row,
        _times_sigmoid(m, c * power, INTERPRETED) * row,
        _times_sigmoid(n, d * power, INTERPRETED) * row,
    )


@triton.jit
def _times_sigmoid(x: tl.tensor, power: tl.tensor, INTERPRETED: tl.constexpr) -> tl.tensor:
    """Compute ``x / (1 + 2^power)`` to about 2^-21: what is rounded to E4M3 needs no more."""
    if INTERPRETED:
        result = x / (1.0 + tl.exp2(power))
    else:
        exponential = approximate("ex2.approx.ftz.f32 $0, $1;", power)
        result = x * approximate("rcp.approx.ftz.f32 $0, $1;", 1.0 + exponential)
    return result
