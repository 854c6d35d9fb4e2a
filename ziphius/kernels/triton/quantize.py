"""The quantisers of ``kernels/quantize.py`` on a GPU: every number is read once, the bits equal.

A program takes some groups of 128, or a square of rows and channels whose columns it may write as
rows. Where segments lie is found out by every program itself, from counts that stay on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from ziphius.kernels.quantize import E4M3, TILE, Fp8, tile_count, turned_width
from ziphius.kernels.triton.bits import encode, interpreted, magnitude, scale_of_magnitude


@dataclass(frozen=True)
class Launch:
    """How much a program takes: groups of 128 numbers, or channels of a turned square."""

    groups: int = 32
    channels: int = 64
    warps: int = 4


CANDIDATES = (Launch(), Launch(groups=16), Launch(64, 128, 8), Launch(64, 64, 8), Launch(16, 32, 4))


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
                codes_of(out),
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
        rows, columns = x_MC.shape
        tiles = empty_tiles(x_MC.shape, x_MC.device)
        turned = empty_turned(rows, columns, counts_E, x_MC.device)
        if turned.scales.numel():
            _both_kernel[(tile_count(columns), turned.scales.shape[1])](
                x_MC,
                counts_E,
                codes_of(tiles),
                tiles.scales,
                codes_of(turned),
                turned.scales,
                x_MC.stride(0),
                rows,
                columns,
                turned.codes.shape[1],
                0 if counts_E is None else len(counts_E),
                EXPERTS=block_of_experts(counts_E),
                POWER_OF_TWO=power_of_two,
                INTERPRETED=interpreted(),
                num_warps=8,
            )
        return tiles, turned

    def blocks(self, weight: Tensor, *, power_of_two: bool = False) -> tuple[Fp8, Fp8]:
        """Return a weight, or a stack of them, in blocks, and its transpose, of one reading."""
        weight = weight.contiguous()
        *stack, rows, columns = weight.shape
        grid = tile_count(columns), tile_count(rows), prod(stack)
        q = _empty((*stack, rows, columns), (*stack, grid[1], grid[0]), TILE, weight.device)
        t = _empty((*stack, columns, rows), (*stack, grid[0], grid[1]), TILE, weight.device)
        if weight.numel():
            _blocks_kernel[grid](
                weight,
                codes_of(q),
                q.scales,
                codes_of(t),
                t.scales,
                rows,
                columns,
                POWER_OF_TWO=power_of_two,
                INTERPRETED=interpreted(),
                num_warps=8,
            )
        return q, t


def rows_of(x: Tensor) -> Tensor:
    """View ``[..., C]`` as ``[M, C]`` with the numbers of a row side by side, or copy it."""
    x_MC = x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.reshape(0, 0)
    return x_MC if x_MC.stride(-1) == 1 or x_MC.shape[-1] == 1 else x_MC.contiguous()


def codes_of(q: Fp8) -> Tensor:
    """View codes as the bytes that a kernel stores."""
    return q.codes.view(torch.uint8)


def empty_tiles(shape: torch.Size, device: torch.device) -> Fp8:
    """Make room for a matrix in tiles."""
    return _empty(shape, (*shape[:-1], tile_count(shape[-1])), 1, device)


def empty_turned(rows: int, columns: int, counts_E: Tensor | None, device: torch.device) -> Fp8:
    """Make room for a turned matrix of ``rows`` rows."""
    width = turned_width(rows, 1 if counts_E is None else len(counts_E))
    return _empty((columns, width), (columns, width // TILE), 1, device)


def _empty(shape: tuple[int, ...], scales: tuple[int, ...], rows: int, device: torch.device) -> Fp8:
    codes = torch.empty(shape, dtype=E4M3, device=device)
    return Fp8(codes, torch.empty(scales, dtype=torch.float32, device=device), rows)


def block_of_experts(counts_E: Tensor | None) -> int:
    """Return the power of two of counts that ``locate`` reads, 0 without segments."""
    return 0 if counts_E is None else triton.next_power_of_2(len(counts_E))


@triton.jit
def locate(
    counts: tl.tensor, tile: tl.tensor, rows: tl.tensor, experts: tl.tensor, EXPERTS: tl.constexpr
) -> tl.tensor:
    """Return the first row of 128 columns of a turned matrix, and how many rows are theirs.

    The second may be more than 128, or less than one where no row fills the columns.
    """
    if EXPERTS == 0:
        first = tile * 128
        filled = rows - first
    else:
        expert = tl.arange(0, EXPERTS)
        count = tl.load(counts + expert, mask=expert < experts, other=0).to(tl.int32)
        tiles = (count + 127) // 128
        past = tl.cumsum(tiles, 0) <= tile
        within = (tile - tl.sum(tl.where(past, tiles, 0), 0)) * 128
        first = tl.sum(tl.where(past, count, 0), 0) + within
        own = expert == tl.sum(past.to(tl.int32), 0)
        filled = tl.sum(tl.where(own, count, 0), 0) - within
    return first, filled


@triton.jit
def largest(x: tl.tensor, AXIS: tl.constexpr) -> tl.tensor:
    """Return the largest ``magnitude`` along an axis, which stays as one."""
    return tl.max(magnitude(x), AXIS, keep_dims=True)


@triton.jit
def store_groups(
    x: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    row: tl.tensor,
    tile: tl.tensor,
    columns: tl.tensor,
    valid: tl.tensor,
    POWER_OF_TWO: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    """Quantise groups, ``[G, 128]``, and store them at their rows and tiles, each [G, 1]."""
    scale = scale_of_magnitude(largest(x, 1), POWER_OF_TWO)
    column = tile * 128 + tl.arange(0, 128)[None, :]
    mask = valid & (column < columns)
    code = encode(x, scale, POWER_OF_TWO, INTERPRETED)
    tl.store(codes + row * columns + column, code, mask=mask)
    tl.store(scales + row * tl.cdiv(columns, 128) + tile, scale, mask=valid)


@triton.jit
def store_turned(
    x: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    channel: tl.tensor,
    tile: tl.tensor,
    columns: tl.tensor,
    width: tl.tensor,
    POWER_OF_TWO: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    """Quantise the columns of ``[128, channels]`` and store them as rows; ``channel`` is [1, C]."""
    scale = scale_of_magnitude(largest(x, 0), POWER_OF_TWO)
    code = tl.trans(encode(x, scale, POWER_OF_TWO, INTERPRETED))
    at = tl.trans(channel).to(tl.int64)
    place = tile.to(tl.int64) * 128 + tl.arange(0, 128)[None, :]
    tl.store(codes + at * width + place, code, mask=at < columns)
    tl.store(scales + channel.to(tl.int64) * (width // 128) + tile, scale, mask=channel < columns)


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
    group = (tl.program_id(0) * GROUPS + tl.arange(0, GROUPS))[:, None]
    tiles = tl.cdiv(columns, 128)
    row, tile = (group // tiles).to(tl.int64), group % tiles
    column = tile * 128 + tl.arange(0, 128)[None, :]
    mask = (group < groups) & (column < columns)
    number = tl.load(x + row * stride + column, mask=mask, other=0.0).to(tl.float32)
    valid = group < groups
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
    line = tl.arange(0, 128)[:, None]
    row = (first + line).to(tl.int64)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    mask = (line < filled) & (channel < columns)
    number = tl.load(x + row * stride + channel, mask=mask, other=0.0).to(tl.float32)
    if x_scales is not None:
        own = row * tl.cdiv(columns, 128) + tl.program_id(0) * CHANNELS // 128
        number *= tl.load(x_scales + own, mask=line < filled, other=0.0)
    store_turned(number, codes, scales, channel, tile, columns, width, POWER_OF_TWO, INTERPRETED)


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
    EXPERTS: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    tile = tl.program_id(1)
    first, filled = locate(counts, tile, rows, experts, EXPERTS)
    line = tl.arange(0, 128)[:, None]
    row = (first + line).to(tl.int64)
    group = tl.program_id(0)
    channel = group * 128 + tl.arange(0, 128)[None, :]
    mask = (line < filled) & (channel < columns)
    number = tl.load(x + row * stride + channel, mask=mask, other=0.0).to(tl.float32)
    store_groups(
        number, codes, scales, row, group, columns, line < filled, POWER_OF_TWO, INTERPRETED
    )
    store_turned(
        number,
        turned_codes,
        turned_scales,
        channel,
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
    at_turned = begin + tl.trans(column).to(tl.int64) * rows + tl.trans(row)
    tl.store(turned_codes + at_turned, tl.trans(code), mask=tl.trans(mask))
    high, wide = tl.cdiv(rows, 128), tl.cdiv(columns, 128)
    blocks = matrix * high * wide
    tl.store(scales + blocks + down * wide + across, scale)
    tl.store(turned_scales + blocks + across * high + down, scale)
