"""The quantisers of ``kernels/quantize.py`` on a GPU: every number is read once, the bits equal.

A program takes some groups of 128, or a square of rows and channels whose columns it may write as
rows: in whole units (``squares.py``) wherever BF16 or codes have whole squares of them. Where
segments lie is found out by every program itself, from counts that stay on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from ziphius.kernels.quantize import TILE, Fp8, tile_count
from ziphius.kernels.triton.bits import (
    interpreted,
    quotients,
    scale_of_magnitude,
    to_e4m3,
    wide,
    word_of,
)
from ziphius.kernels.triton.groups import (
    block_of_experts,
    codes_of,
    cut_back,
    empty_fp8,
    empty_tiles,
    empty_turned,
    larger,
    largest,
    load_quarter,
    load_scales,
    locate,
    padded,
    rows_of,
    store_groups,
    store_turned,
    words_of,
)
from ziphius.kernels.triton.squares import BOTH, TURN, both_units, regroup_units, turn_units


@dataclass(frozen=True)
class Launch:
    """How much a program of ``tiles`` takes, ``groups`` of 128 numbers, and of ``blocks``.

    Those take a square of 128, whose rows a thread loads ``vector`` numbers at once.
    """

    groups: int = 32
    warps: int = 4
    vector: int = 8
    block_warps: int = 16


CANDIDATES = (
    Launch(),
    Launch(groups=16, vector=4),
    Launch(groups=64, warps=8, block_warps=8),
    Launch(groups=16, vector=16, block_warps=8),
    Launch(groups=64, vector=4, warps=8),
)
CHANNELS = 64  # of 128 rows, that a program turns where squares do not fit


class TritonQuantize:
    """What ``TorchQuantize`` does. Rows of an input may lie apart; its last dimension may not."""

    def __init__(self, launch: Launch | None = None) -> None:
        self.launch = launch or Launch()

    def tiles(self, x: Tensor, *, power_of_two: bool = False) -> Fp8:
        """Do what ``quantize_tiles`` does."""
        x_MC, size = padded(rows_of(x)), self.launch
        out = empty_tiles(x_MC.shape, x_MC.device)
        groups = out.scales.numel()
        if groups:
            _tiles_kernel[(triton.cdiv(groups, size.groups),)](
                x_MC,
                codes_of(out),
                out.scales,
                x_MC.stride(0),
                x_MC.shape[1],
                groups,
                GROUPS=size.groups,
                POWER_OF_TWO=power_of_two,
                INTERPRETED=interpreted(),
                num_warps=size.warps,
            )
        return cut_back(out, x.shape)

    def turn(
        self, x_MC: Tensor, counts_E: Tensor | None = None, *, power_of_two: bool = False
    ) -> Fp8:
        """Do what the function ``turn`` does, without a look at the counts by the host."""
        x_MC = rows_of(x_MC)
        if x_MC.dtype != torch.bfloat16 or not TURN.fits(x_MC):
            return self._turn(x_MC, None, counts_E, power_of_two)
        rows, columns = x_MC.shape
        out = empty_turned(rows, columns, counts_E, x_MC.device)
        if out.scales.numel():
            turn_units(x_MC, out, counts_E, power_of_two=power_of_two)
        return out

    def regroup(self, q: Fp8, counts_E: Tensor | None = None, *, power_of_two: bool = False) -> Fp8:
        """Do what the function ``regroup`` does, without the matrix between."""
        if not TURN.fits(q.codes):
            return self._turn(q.codes, q.scales, counts_E, power_of_two)
        rows, columns = q.codes.shape
        out = empty_turned(rows, columns, counts_E, q.codes.device)
        if out.scales.numel():
            regroup_units(q, out, counts_E, power_of_two=power_of_two)
        return out

    def _turn(
        self, x_MC: Tensor, scales: Tensor | None, counts_E: Tensor | None, power_of_two: bool
    ) -> Fp8:
        rows, columns = x_MC.shape
        out = empty_turned(rows, columns, counts_E, x_MC.device)
        if out.scales.numel():
            _turn_kernel[(triton.cdiv(columns, CHANNELS), out.scales.shape[1])](
                x_MC,
                scales,
                counts_E,
                words_of(out),
                out.scales,
                x_MC.stride(0),
                rows,
                columns,
                out.codes.shape[1],
                0 if counts_E is None else len(counts_E),
                CHANNELS=CHANNELS,
                EXPERTS=block_of_experts(counts_E),
                POWER_OF_TWO=power_of_two,
                INTERPRETED=interpreted(),
            )
        return out

    def both(
        self, x_MC: Tensor, counts_E: Tensor | None = None, *, power_of_two: bool = False
    ) -> tuple[Fp8, Fp8]:
        """Return ``x`` in tiles, and turned; of one reading where squares of 128 fit."""
        x_MC = rows_of(x_MC)
        if x_MC.dtype != torch.bfloat16 or not BOTH.fits(x_MC):
            tiles = self.tiles(x_MC, power_of_two=power_of_two)
            return tiles, self.turn(x_MC, counts_E, power_of_two=power_of_two)
        rows, columns = x_MC.shape
        tiles = empty_tiles(x_MC.shape, x_MC.device)
        turned = empty_turned(rows, columns, counts_E, x_MC.device)
        if turned.scales.numel():
            both_units(x_MC, tiles, turned, counts_E, power_of_two=power_of_two)
        return tiles, turned

    def blocks(self, weight: Tensor, *, power_of_two: bool = False) -> tuple[Fp8, Fp8]:
        """Return a weight, or a stack of them, in blocks, and its transpose, of one reading."""
        O, I = weight.shape[-2:]  # noqa: E741
        weight = padded(weight.contiguous(), 2)
        *stack, rows, columns = weight.shape
        grid = tile_count(columns), tile_count(rows), prod(stack)
        q = empty_fp8((*stack, rows, columns), (*stack, grid[1], grid[0]), TILE, weight.device)
        t = empty_fp8((*stack, columns, rows), (*stack, grid[0], grid[1]), TILE, weight.device)
        if weight.numel():
            _blocks_kernel[grid](
                weight,
                codes_of(q),
                q.scales,
                words_of(t),
                t.scales,
                rows,
                columns,
                VECTOR=self.launch.vector,
                POWER_OF_TWO=power_of_two,
                INTERPRETED=interpreted(),
                num_warps=self.launch.block_warps,
            )
        return (
            Fp8(q.codes[..., :O, :I].contiguous(), q.scales, TILE),
            Fp8(t.codes[..., :I, :O].contiguous(), t.scales, TILE),
        )


@triton.jit
def _tiles_kernel(
    x: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    stride: tl.tensor,
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
    at = x + (row * stride)[:, None] + column
    number = tl.load(at, mask=valid[:, None] & (column < columns), other=0.0)
    number = wide(number, INTERPRETED)
    store_groups(number, codes, scales, row, tile, columns, valid, POWER_OF_TWO, INTERPRETED)


@triton.jit(do_not_specialize=["rows"])
def _turn_kernel(
    x: tl.tensor,
    x_scales: tl.tensor,
    counts: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    stride: tl.tensor,
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
    a = wide(load_quarter(x, 0, first, filled, stride, channel, columns), INTERPRETED)
    b = wide(load_quarter(x, 1, first, filled, stride, channel, columns), INTERPRETED)
    c = wide(load_quarter(x, 2, first, filled, stride, channel, columns), INTERPRETED)
    d = wide(load_quarter(x, 3, first, filled, stride, channel, columns), INTERPRETED)
    if x_scales is not None:
        tiles, own = tl.cdiv(columns, 128), tl.program_id(0) * CHANNELS // 128
        a *= load_scales(x_scales, 0, first, filled, tiles, own)
        b *= load_scales(x_scales, 1, first, filled, tiles, own)
        c *= load_scales(x_scales, 2, first, filled, tiles, own)
        d *= load_scales(x_scales, 3, first, filled, tiles, own)
    store_turned(
        a, b, c, d, codes, scales, channel, tile, columns, width, POWER_OF_TWO, INTERPRETED
    )


@triton.jit(do_not_specialize=["rows"])
def _blocks_kernel(
    weight: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    turned_codes: tl.tensor,
    turned_scales: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    VECTOR: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    across, down, matrix = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    begin = matrix * rows * columns
    weight, codes = weight + begin, codes + begin
    first, filled = down * 128, rows - down * 128
    channel = tl.max_contiguous(across * 128 + tl.arange(0, 128), VECTOR)
    a = wide(load_quarter(weight, 0, first, filled, columns, channel, columns), INTERPRETED)
    b = wide(load_quarter(weight, 1, first, filled, columns, channel, columns), INTERPRETED)
    c = wide(load_quarter(weight, 2, first, filled, columns, channel, columns), INTERPRETED)
    d = wide(load_quarter(weight, 3, first, filled, columns, channel, columns), INTERPRETED)
    top = larger(larger(tl.abs(a), tl.abs(b)), larger(tl.abs(c), tl.abs(d)))
    top = tl.max(largest(top, 1, INTERPRETED), 0)
    scale = scale_of_magnitude(top, POWER_OF_TWO, INTERPRETED)
    a = quotients(a, scale, POWER_OF_TWO, INTERPRETED)
    b = quotients(b, scale, POWER_OF_TWO, INTERPRETED)
    c = quotients(c, scale, POWER_OF_TWO, INTERPRETED)
    d = quotients(d, scale, POWER_OF_TWO, INTERPRETED)
    quarters = a, b, c, d
    for quarter in tl.static_range(4):
        line = tl.arange(0, 32) * 4 + quarter
        mask = (line < filled)[:, None] & (channel < columns)[None, :]
        at = codes + first.to(tl.int64) * columns + ((line * columns)[:, None] + channel[None, :])
        tl.store(at, to_e4m3(quarters[quarter], INTERPRETED), mask=mask)
    word = down * 32 + tl.arange(0, 32)[None, :]
    row = channel[:, None].to(tl.int64)
    at = turned_codes + (begin + row * rows) // 4 + word
    words = tl.trans(word_of(a, b, c, d, INTERPRETED))
    tl.store(at, words, mask=(word * 4 < rows) & (row < columns))
    high, broad = tl.cdiv(rows, 128), tl.cdiv(columns, 128)
    blocks = matrix * high * broad
    tl.store(scales + blocks + down * broad + across, scale)
    tl.store(turned_scales + blocks + across * high + down, scale)
