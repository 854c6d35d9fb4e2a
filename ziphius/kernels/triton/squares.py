"""Squares of whole units: four channels of a row, which one thread loads at once as one integer.

What ``turn``, ``both`` and ``regroup`` of ``quantize.py`` and the product turned again of
``swiglu_fp8.py`` do, where every row is whole: the width a multiple of the square's, addresses of
16 bytes. Against the kernels for any width they leave out: masks of channels and the arithmetic of
addresses (the stride is a constant), half of the search for the largest BF16 (two to an
instruction), one of three multiplications of a quotient, and the pieces of reductions that threads
do together.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ziphius.kernels.quantize import Fp8
from ziphius.kernels.triton.bits import interpreted
from ziphius.kernels.triton.groups import (
    aligned,
    block_of_experts,
    larger,
    load_scales,
    locate,
    words_of,
)
from ziphius.kernels.triton.units import (
    SMALLER,
    decoded,
    largest_along,
    largest_four,
    largest_of,
    largest_pair,
    largest_two,
    load_units,
    lower,
    numbers_of,
    quantised,
    store_columns,
    tops_of,
    upper,
)


class Cut(NamedTuple):
    """What a program takes, 128 rows of ``channels``, its warps, and a bound on registers.

    These are the fastest of those that were tried on an H200, at 4096 and 8192 rows.
    """

    channels: int
    warps: int
    registers: int | None = None

    def fits(self, x_MC: Tensor) -> bool:
        """Say whether every unit, and every load, of a matrix is whole."""
        return (
            x_MC.dtype in (torch.bfloat16, torch.float8_e4m3fn)
            and x_MC.shape[1] % self.channels == 0
            and aligned(x_MC)
        )


TURN = Cut(channels=64, warps=4)
BOTH = Cut(channels=128, warps=8, registers=96)
# Units that a thread loads of a row: 16 bytes of BF16, eight of codes.
UNITS = tl.constexpr(2)


def units_of(x_MC: Tensor) -> Tensor:
    """View BF16 or codes as units: int64 or int32 ``[M, C / 4]``."""
    return x_MC.view(torch.int64 if x_MC.dtype == torch.bfloat16 else torch.int32)


def turn_units(x_MC: Tensor, out: Fp8, counts_E: Tensor | None, *, power_of_two: bool) -> None:
    """Fill ``out`` with a matrix in BF16 that ``TURN`` fits, turned."""
    turn_units_kernel[grid(TURN, out)](
        units_of(x_MC),
        counts_E,
        words_of(out),
        out.scales,
        len(x_MC),
        out.codes.shape[1],
        0 if counts_E is None else len(counts_E),
        STRIDE=x_MC.stride(0) // 4,
        **options(TURN, counts_E, power_of_two),
    )


def regroup_units(q: Fp8, out: Fp8, counts_E: Tensor | None, *, power_of_two: bool) -> None:
    """Fill ``out`` with what is in tiles, and which ``TURN`` fits, turned.

    The bits are the reference's wherever it dequantises to finite numbers. Where ``code * scale``
    is beyond FP32 (a power of two as the scale of numbers from 2^128 - 2^123 on) the group has an
    infinite scale as there, but codes of zero, not NaN, in those places.
    """
    regroup_units_kernel[grid(TURN, out)](
        units_of(q.codes),
        q.scales,
        counts_E,
        words_of(out),
        out.scales,
        len(q.codes),
        out.codes.shape[1],
        0 if counts_E is None else len(counts_E),
        STRIDE=q.codes.stride(0) // 4,
        TILES=q.scales.shape[1],
        **options(TURN, counts_E, power_of_two),
    )


def both_units(
    x_MC: Tensor, tiles: Fp8, turned: Fp8, counts_E: Tensor | None, *, power_of_two: bool
) -> None:
    """Fill ``tiles`` and ``turned`` with a matrix in BF16 that ``BOTH`` fits."""
    both_units_kernel[grid(BOTH, turned)](
        units_of(x_MC),
        counts_E,
        words_of(tiles),
        tiles.scales,
        words_of(turned),
        turned.scales,
        len(x_MC),
        turned.codes.shape[1],
        0 if counts_E is None else len(counts_E),
        STRIDE=x_MC.stride(0) // 4,
        TILES=tiles.scales.shape[1],
        **options(BOTH, counts_E, power_of_two),
    )


def grid(cut: Cut, turned: Fp8) -> tuple[int, int]:
    """Return the programs of a launch.

    Those that run side by side take rows below each other: they write next to each other.
    """
    channels, tiles = turned.scales.shape
    return tiles, channels // cut.channels


def options(cut: Cut, counts_E: Tensor | None, power_of_two: bool) -> dict[str, Any]:
    """Return what every kernel of squares is launched with."""
    return {
        "CHANNELS": cut.channels,
        "EXPERTS": block_of_experts(counts_E),
        "POWER_OF_TWO": power_of_two,
        "INTERPRETED": interpreted(),
        "num_warps": cut.warps,
        "maxnreg": cut.registers,
    }


@triton.jit
def place_of(counts, rows, experts, CHANNELS: tl.constexpr, EXPERTS: tl.constexpr):
    """Return a program's column of 128 rows, its first channel, and place: rows, units, group."""
    tile, channel = tl.program_id(0), tl.program_id(1) * CHANNELS
    first, filled = locate(counts, tile, rows, experts, EXPERTS)
    unit = tl.max_contiguous(channel // 4 + tl.arange(0, CHANNELS // 4), UNITS)
    return tile, channel, (first, filled, unit, channel // 128)


@triton.jit(do_not_specialize=["rows"])
def turn_units_kernel(
    x: tl.tensor,
    counts: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    experts: tl.tensor,
    STRIDE: tl.constexpr,
    CHANNELS: tl.constexpr,
    EXPERTS: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    """Turn BF16."""
    tile, channel, place = place_of(counts, rows, experts, CHANNELS, EXPERTS)
    words = _square(x, place, STRIDE)
    tops = _tops_of_columns(words, INTERPRETED)
    a, b, c, d = _numbers_of(words)  # only now: words take half the registers
    store_columns(
        a,
        b,
        c,
        d,
        tops,
        codes,
        scales,
        channel,
        tile,
        width,
        CHANNELS,
        POWER_OF_TWO,
        INTERPRETED,
    )


@triton.jit(do_not_specialize=["rows"])
def regroup_units_kernel(
    x: tl.tensor,
    x_scales: tl.tensor,
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
    """Turn what is in tiles."""
    tile, channel, place = place_of(counts, rows, experts, CHANNELS, EXPERTS)
    a = _dequantised(x, x_scales, 0, place, STRIDE, TILES, INTERPRETED)
    b = _dequantised(x, x_scales, 1, place, STRIDE, TILES, INTERPRETED)
    c = _dequantised(x, x_scales, 2, place, STRIDE, TILES, INTERPRETED)
    d = _dequantised(x, x_scales, 3, place, STRIDE, TILES, INTERPRETED)
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
        TIMES=SMALLER,
    )


@triton.jit(do_not_specialize=["rows"])
def both_units_kernel(
    x: tl.tensor,
    counts: tl.tensor,
    tile_codes: tl.tensor,
    tile_scales: tl.tensor,
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
    """Quantise BF16 in tiles, and turned."""
    tile, channel, place = place_of(counts, rows, experts, CHANNELS, EXPERTS)
    words = _square(x, place, STRIDE)
    across, tops = _tops_of_rows(words, INTERPRETED), _tops_of_columns(words, INTERPRETED)
    a, b, c, d = _numbers_of(words)
    quarters = a, b, c, d
    for quarter in tl.static_range(4):
        word, scale = quantised(quarters[quarter], across[quarter], 1, POWER_OF_TWO, INTERPRETED)
        _store_rows(word, scale, tile_codes, tile_scales, quarter, place, TILES)
    store_columns(
        a,
        b,
        c,
        d,
        tops,
        codes,
        scales,
        channel,
        tile,
        width,
        CHANNELS,
        POWER_OF_TWO,
        INTERPRETED,
    )


@triton.jit
def _square(x, place, STRIDE: tl.constexpr):
    """Read four quarters of BF16: their units as two words each."""
    a, b = _words(x, 0, place, STRIDE), _words(x, 1, place, STRIDE)
    return a, b, _words(x, 2, place, STRIDE), _words(x, 3, place, STRIDE)


@triton.jit
def _numbers_of(words):
    """Return four quarters' channels in FP32."""
    a, b, c, d = words
    return numbers_of(a), numbers_of(b), numbers_of(c), numbers_of(d)


@triton.jit
def _words(x, quarter: tl.constexpr, place, STRIDE: tl.constexpr):
    units = load_units(x, quarter, place[0], place[1], STRIDE, place[2])
    return units.to(tl.int32), (units >> 32).to(tl.int32)


@triton.jit
def _dequantised(
    x,
    x_scales,
    quarter: tl.constexpr,
    place,
    STRIDE: tl.constexpr,
    TILES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Return a quarter's numbers times ``SMALLER``."""
    first, filled, unit, group = place
    a, b, c, d = decoded(load_units(x, quarter, first, filled, STRIDE, unit), INTERPRETED)
    scale = load_scales(x_scales, quarter, first, filled, TILES, group) * SMALLER
    return a * scale, b * scale, c * scale, d * scale


@triton.jit
def _tops_of_columns(words, INTERPRETED: tl.constexpr):
    """Return the largest magnitudes of columns of BF16, as ``tops_of`` does."""
    a, b, c, d = words
    if INTERPRETED:
        tops = tops_of(numbers_of(a), numbers_of(b), numbers_of(c), numbers_of(d), True)
    else:
        low = largest_pair(largest_pair(a[0], b[0]), largest_pair(c[0], d[0]))
        high = largest_pair(largest_pair(a[1], b[1]), largest_pair(c[1], d[1]))
        tops = numbers_of(tl.reduce((low, high), 0, largest_two))
    return tops


@triton.jit
def _tops_of_rows(words, INTERPRETED: tl.constexpr):
    """Return the largest magnitudes of every quarter's rows."""
    a, b, c, d = words
    if INTERPRETED:
        tops = _top_of_rows(a), _top_of_rows(b), _top_of_rows(c), _top_of_rows(d)
    else:
        pairs = (
            largest_pair(a[0], a[1]),
            largest_pair(b[0], b[1]),
            largest_pair(c[0], c[1]),
            largest_pair(d[0], d[1]),
        )
        a, b, c, d = tl.reduce(pairs, 1, largest_four)
        tops = _either(a), _either(b), _either(c), _either(d)
    return tops


@triton.jit
def _top_of_rows(words):
    return largest_along(largest_of(numbers_of(words)), 1)


@triton.jit
def _either(pair):
    return larger(tl.abs(lower(pair)), tl.abs(upper(pair)))


@triton.jit
def _store_rows(word, scale, codes, scales, quarter: tl.constexpr, place, TILES: tl.constexpr):
    """Store a quarter's rows where they were."""
    first, filled, unit, group = place
    line, begin = tl.arange(0, 32) * 4 + quarter, first.to(tl.int64)
    at = codes + begin * (TILES * 32) + (line * (TILES * 32))[:, None] + unit[None, :]
    tl.store(at, word, mask=(line < filled)[:, None])
    tl.store(scales + begin * TILES + (line * TILES + group), scale, mask=line < filled)
