"""What kernels that quantise share: room for codes, where segments lie, how groups are stored."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ziphius.kernels.quantize import E4M3, TILE, Fp8, tile_count, turned_width
from ziphius.kernels.triton.bits import encode, magnitude, scale_of_magnitude


def rows_of(x: Tensor) -> Tensor:
    """View ``[..., C]`` as ``[M, C]`` with the numbers of a row side by side, or copy it."""
    x_MC = x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.reshape(0, 0)
    return x_MC if x_MC.stride(-1) == 1 or x_MC.shape[-1] == 1 else x_MC.contiguous()


def codes_of(q: Fp8) -> Tensor:
    """View codes as the bytes that a kernel stores."""
    return q.codes.view(torch.uint8)


def words_of(q: Fp8) -> Tensor:
    """View codes as words of four: rows of a multiple of four of them."""
    return q.codes.view(torch.int32)


def empty_tiles(shape: torch.Size, device: torch.device) -> Fp8:
    """Make room for a matrix in tiles."""
    return empty_fp8(shape, (*shape[:-1], tile_count(shape[-1])), 1, device)


def empty_turned(rows: int, columns: int, counts_E: Tensor | None, device: torch.device) -> Fp8:
    """Make room for a turned matrix of ``rows`` rows."""
    width = turned_width(rows, 1 if counts_E is None else len(counts_E))
    return empty_fp8((columns, width), (columns, width // TILE), 1, device)


def empty_fp8(
    shape: tuple[int, ...], scales: tuple[int, ...], rows: int, device: torch.device
) -> Fp8:
    """Make room for codes of ``shape`` and for scales, ``rows`` rows of codes a scale."""
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
    """Return the largest ``magnitude`` along an axis."""
    return tl.max(magnitude(x), AXIS)


@triton.jit
def load_square(
    x: tl.tensor,
    row: tl.tensor,
    valid: tl.tensor,
    stride: tl.tensor,
    channel: tl.tensor,
    columns: tl.tensor,
) -> tl.tensor:
    """Read rows, int64 ``[R]``, of columns ``[C]`` in FP32; zeros where there are none."""
    mask = valid[:, None] & (channel < columns)[None, :]
    at = x + (row * stride)[:, None] + channel[None, :]
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


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
    """Quantise groups, ``[G, 128]``, and store them at their rows and tiles, each ``[G]``."""
    scale = scale_of_magnitude(largest(x, 1), POWER_OF_TWO)
    column = (tile * 128)[:, None] + tl.arange(0, 128)[None, :]
    code = encode(x, scale[:, None], POWER_OF_TWO, INTERPRETED)
    at = codes + (row * columns)[:, None] + column
    tl.store(at, code, mask=valid[:, None] & (column < columns))
    tl.store(scales + row * tl.cdiv(columns, 128) + tile, scale, mask=valid)


@triton.jit
def words(code: tl.tensor) -> tl.tensor:
    """Pack codes of four neighbouring rows, ``[4 R, C]``, the first in the lowest byte: int32."""
    R: tl.constexpr = code.shape[0] // 4
    C: tl.constexpr = code.shape[1]
    byte = tl.arange(0, 4) * 8
    return tl.sum(code.to(tl.int32).reshape(R, 4, C) << byte[None, :, None], axis=1)


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
    """Quantise the columns of ``[128, C]`` and store them as rows ``channel``, int64 ``[C]``.

    ``codes`` are words of four. Threads exchange nothing smaller: Triton 3.6 mixes bytes up when
    it has to rearrange them (seen on a GPU, with the rows and columns of some shapes).
    """
    scale = scale_of_magnitude(largest(x, 0), POWER_OF_TWO)
    code = encode(x, scale[None, :], POWER_OF_TWO, INTERPRETED)
    place = tile.to(tl.int64) * 32 + tl.arange(0, 32)
    at = codes + (channel * (width // 4))[:, None] + place[None, :]
    tl.store(at, tl.trans(words(code)), mask=(channel < columns)[:, None])
    tl.store(scales + channel * (width // 128) + tile, scale, mask=channel < columns)
