"""The quantisers of ``kernels/quantize.py`` on a GPU: every number is read once, the bits equal.

A program takes some groups of 128, or a square of rows and channels whose columns it may write as
rows. Where segments lie is found out by every program itself, from counts that stay on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import triton
import triton.language as tl
from torch import Tensor

from ziphius.kernels.quantize import TILE, Fp8, tile_count
from ziphius.kernels.triton.bits import encode, interpreted, magnitude, scale_of_magnitude
from ziphius.kernels.triton.groups import (
    block_of_experts,
    codes_of,
    empty_fp8,
    empty_tiles,
    empty_turned,
    load_square,
    locate,
    rows_of,
    store_groups,
    store_turned,
    words,
    words_of,
)


@dataclass(frozen=True)
class Launch:
    """How much a program takes, of which operation.

    ``groups`` of 128 numbers of tiles; 128 rows of ``channels`` of a turned matrix; for both at
    once a square of 128, ``lines`` rows and then ``channels`` at a time.
    """

    groups: int = 32
    channels: int = 64
    lines: int = 64
    warps: int = 4
    square_warps: int = 8
    block_warps: int = 16


CANDIDATES = (
    Launch(),
    Launch(groups=16, channels=32, lines=32),
    Launch(groups=64, channels=128, lines=128, warps=8),
    Launch(groups=64, channels=64, lines=128, warps=8, square_warps=16, block_warps=8),
)


class TritonQuantize:
    """What ``TorchQuantize`` does. Rows of an input may lie apart; its last dimension may not."""

    def __init__(self, launch: Launch | None = None) -> None:
        self.launch = launch or Launch()

    def tiles(self, x: Tensor, *, power_of_two: bool = False) -> Fp8:
        """Do what ``quantize_tiles`` does."""
        x_MC = rows_of(x)
        out = empty_tiles(x.shape, x.device)
        groups = out.scales.numel()
        if groups and x.numel():
            size = self.launch
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
        return out

    def turn(
        self, x_MC: Tensor, counts_E: Tensor | None = None, *, power_of_two: bool = False
    ) -> Fp8:
        """Do what the function ``turn`` does, without a look at the counts by the host."""
        return self._turn(rows_of(x_MC), None, counts_E, power_of_two)

    def regroup(self, q: Fp8, counts_E: Tensor | None = None, *, power_of_two: bool = False) -> Fp8:
        """Do what the function ``regroup`` does, without the matrix between."""
        return self._turn(q.codes, q.scales, counts_E, power_of_two)

    def _turn(
        self, x_MC: Tensor, scales: Tensor | None, counts_E: Tensor | None, power_of_two: bool
    ) -> Fp8:
        (rows, columns), size = x_MC.shape, self.launch
        out = empty_turned(rows, columns, counts_E, x_MC.device)
        if out.scales.numel():
            _turn_kernel[(triton.cdiv(columns, size.channels), out.scales.shape[1])](
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
                CHANNELS=size.channels,
                EXPERTS=block_of_experts(counts_E),
                POWER_OF_TWO=power_of_two,
                INTERPRETED=interpreted(),
                num_warps=size.warps,
            )
        return out

    def both(
        self, x_MC: Tensor, counts_E: Tensor | None = None, *, power_of_two: bool = False
    ) -> tuple[Fp8, Fp8]:
        """Return ``x`` in tiles, and turned, of one reading."""
        x_MC = rows_of(x_MC)
        (rows, columns), size = x_MC.shape, self.launch
        tiles = empty_tiles(x_MC.shape, x_MC.device)
        turned = empty_turned(rows, columns, counts_E, x_MC.device)
        if turned.scales.numel():
            _both_kernel[(tile_count(columns), turned.scales.shape[1])](
                x_MC,
                counts_E,
                codes_of(tiles),
                tiles.scales,
                words_of(turned),
                turned.scales,
                x_MC.stride(0),
                rows,
                columns,
                turned.codes.shape[1],
                0 if counts_E is None else len(counts_E),
                LINES=size.lines,
                CHANNELS=size.channels,
                EXPERTS=block_of_experts(counts_E),
                POWER_OF_TWO=power_of_two,
                INTERPRETED=interpreted(),
                num_warps=size.square_warps,
            )
        return tiles, turned

    def blocks(self, weight: Tensor, *, power_of_two: bool = False) -> tuple[Fp8, Fp8]:
        """Return a weight, or a stack of them, in blocks, and its transpose, of one reading."""
        weight = weight.contiguous()
        *stack, rows, columns = weight.shape
        grid = tile_count(columns), tile_count(rows), prod(stack)
        q = empty_fp8((*stack, rows, columns), (*stack, grid[1], grid[0]), TILE, weight.device)
        t = empty_fp8((*stack, columns, rows), (*stack, grid[0], grid[1]), TILE, weight.device)
        whole = rows % 4 == 0
        if weight.numel():
            _blocks_kernel[grid](
                weight,
                codes_of(q),
                q.scales,
                words_of(t) if whole else None,
                t.scales,
                rows,
                columns,
                POWER_OF_TWO=power_of_two,
                INTERPRETED=interpreted(),
                num_warps=self.launch.block_warps,
            )
        if not whole:  # no weight of the published models
            codes_of(t).copy_(codes_of(q).mT)
        return q, t


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
    number = tl.load(at, mask=valid[:, None] & (column < columns), other=0.0).to(tl.float32)
    store_groups(number, codes, scales, row, tile, columns, valid, POWER_OF_TWO, INTERPRETED)


@triton.jit
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
    line = tl.arange(0, 128)
    row, valid = (first + line).to(tl.int64), line < filled
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    number = load_square(x, row, valid, stride, channel, columns)
    if x_scales is not None:
        own = row * tl.cdiv(columns, 128) + tl.program_id(0) * CHANNELS // 128
        number *= tl.load(x_scales + own, mask=valid, other=0.0)[:, None]
    place = channel.to(tl.int64)
    store_turned(number, codes, scales, place, tile, columns, width, POWER_OF_TWO, INTERPRETED)


@triton.jit
def _both_kernel(
    x: tl.tensor,
    counts: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    turned_codes: tl.tensor,
    turned_scales: tl.tensor,
    stride: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    width: tl.tensor,
    experts: tl.tensor,
    LINES: tl.constexpr,
    CHANNELS: tl.constexpr,
    EXPERTS: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    tile, group = tl.program_id(1), tl.program_id(0)
    first, filled = locate(counts, tile, rows, experts, EXPERTS)
    for part in tl.static_range(128 // LINES):
        line = part * LINES + tl.arange(0, LINES)
        row, valid = (first + line).to(tl.int64), line < filled
        own = group + tl.zeros_like(line)
        channel = group * 128 + tl.arange(0, 128)
        number = load_square(x, row, valid, stride, channel, columns)
        store_groups(number, codes, scales, row, own, columns, valid, POWER_OF_TWO, INTERPRETED)
    # Read again, from a cache: registers that held the square all along would be too many.
    for part in tl.static_range(128 // CHANNELS):
        line = tl.arange(0, 128)
        channel = group * 128 + part * CHANNELS + tl.arange(0, CHANNELS)
        row = (first + line).to(tl.int64)
        number = load_square(x, row, line < filled, stride, channel, columns)
        store_turned(
            number,
            turned_codes,
            turned_scales,
            channel.to(tl.int64),
            tile,
            columns,
            width,
            POWER_OF_TWO,
            INTERPRETED,
        )


@triton.jit
def _blocks_kernel(
    weight: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    turned_codes: tl.tensor,
    turned_scales: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    POWER_OF_TWO: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    across, down, matrix = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = (down * 128 + tl.arange(0, 128)[:, None]).to(tl.int64)
    column = across * 128 + tl.arange(0, 128)[None, :]
    begin = matrix * rows * columns
    mask = (row < rows) & (column < columns)
    at = weight + begin + row * columns + column
    number = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    scale = scale_of_magnitude(tl.max(tl.max(magnitude(number), 1), 0), POWER_OF_TWO)
    code = encode(number, scale, POWER_OF_TWO, INTERPRETED)
    tl.store(codes + begin + row * columns + column, code, mask=mask)
    if turned_codes is not None:  # in words of four: see store_turned
        word = down * 32 + tl.arange(0, 32)[None, :]
        channel = (across * 128 + tl.arange(0, 128)[:, None]).to(tl.int64)
        at_turned = turned_codes + (begin + channel * rows) // 4 + word
        inside = (word * 4 < rows) & (channel < columns)
        tl.store(at_turned, tl.trans(words(code)), mask=inside)
    high, wide = tl.cdiv(rows, 128), tl.cdiv(columns, 128)
    blocks = matrix * high * wide
    tl.store(scales + blocks + down * wide + across, scale)
    tl.store(turned_scales + blocks + across * high + down, scale)
