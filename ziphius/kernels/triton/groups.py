"""What kernels that quantise share: room for codes, where segments lie, how groups are stored."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ziphius.kernels.quantize import E4M3, TILE, Fp8, tile_count, turned_width
from ziphius.kernels.triton.bits import (
    encode,
    magnitude,
    quotients,
    scale_of_magnitude,
    word_of,
)


def rows_of(x: Tensor) -> Tensor:
    """View ``[..., C]`` as ``[M, C]`` with the numbers of a row side by side, or copy it."""
    x_MC = x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.reshape(0, 0)
    return x_MC if x_MC.stride(-1) == 1 or x_MC.shape[-1] == 1 else x_MC.contiguous()


def aligned(x_MC: Tensor) -> bool:
    """Say whether rows are whole 16 bytes, at addresses that are multiples of 16."""
    sizes = (x_MC.shape[-1] * x_MC.itemsize, x_MC.stride(-2) * x_MC.itemsize, x_MC.data_ptr())
    return all(size % 16 == 0 for size in sizes)


def padded(x: Tensor, dimensions: int = 1) -> Tensor:
    """Return ``x`` with zeros up to a multiple of 16 numbers in its last dimensions, aligned.

    Zeros change no scale, and there are as many groups of 128 as before. Where codes are stored at
    other addresses, Triton 3.6 has threads exchange single bytes first, and mixes them up.
    """
    missing = [-size % 16 for size in x.shape[-dimensions:]]
    if not any(missing) and aligned(x):
        return x
    return F.pad(x, [side for size in reversed(missing) for side in (0, size)])


def cut_back(q: Fp8, shape: torch.Size) -> Fp8:
    """Return of a ``padded`` matrix what ``shape``, of one dimension more or fewer, has."""
    codes = q.codes[..., : shape[-1]].contiguous().view(shape)
    return Fp8(codes, q.scales.view(*shape[:-1], q.scales.shape[-1]))


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
        count = tl.load(counts + expert, mask=expert < experts, other=0)
        tiles = (count + 127) // 128
        # Rows above, tiles below: two sums are one.
        past = tl.cumsum((count << 32) | tiles, 0)
        within = tile - ((past & 0xFFFFFFFF) - tiles)
        own = (within >= 0) & (within < tiles)
        start = (past >> 32) - count + within * 128
        left = count - within * 128
        found = tl.sum(tl.where(own, (start << 32) | left, 0), 0)
        first, filled = (found >> 32).to(tl.int32), found.to(tl.int32)
    return first, filled


@triton.jit
def largest(x: tl.tensor, AXIS: tl.constexpr, INTERPRETED: tl.constexpr) -> tl.tensor:
    """Return the largest ``magnitude`` along an axis."""
    if INTERPRETED:
        result = tl.max(magnitude(x), AXIS)
    else:  # one instruction a number; its NaN has the largest magnitude too
        result = magnitude(tl.reduce(tl.abs(x), AXIS, larger))
    return result


@triton.jit
def larger(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """Return the larger of two, NaN if one is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def load_quarter(
    x: tl.tensor,
    quarter: tl.constexpr,
    first: tl.tensor,
    filled: tl.tensor,
    stride: tl.tensor,
    channel: tl.tensor,
    columns: tl.tensor,
) -> tl.tensor:
    """Read a quarter of 128 rows, of columns ``[C]``, as they are stored: ``[32, C]``.

    That is every fourth row, from ``first + quarter``, zeros where there are none: ``filled`` rows
    exist. A thread that has the same number of all four quarters has the codes of a word.
    """
    line = tl.arange(0, 32) * 4 + quarter
    mask = (line < filled)[:, None] & (channel < columns)[None, :]
    # Within the square 32 bits count far enough, in half the instructions.
    within = (line * stride)[:, None] + channel[None, :]
    return tl.load(x + first.to(tl.int64) * stride + within, mask=mask, other=0.0)


@triton.jit
def load_scales(
    scales: tl.tensor,
    quarter: tl.constexpr,
    first: tl.tensor,
    filled: tl.tensor,
    tiles: tl.tensor,
    tile: tl.tensor,
) -> tl.tensor:
    """Read what a quarter's rows have as scales in a column of tiles: ``[32, 1]``."""
    line = tl.arange(0, 32) * 4 + quarter
    at = scales + first.to(tl.int64) * tiles + (line * tiles + tile)
    return tl.load(at, mask=line < filled, other=0.0)[:, None]


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
    EXACT: tl.constexpr = True,
) -> None:
    """Quantise groups, ``[G, 128]``, and store them at their rows and tiles, each ``[G]``."""
    scale = scale_of_magnitude(largest(x, 1, INTERPRETED), POWER_OF_TWO, INTERPRETED)
    column = (tile * 128)[:, None] + tl.arange(0, 128)[None, :]
    code = encode(x, scale[:, None], POWER_OF_TWO, INTERPRETED, EXACT)
    at = codes + (row * columns)[:, None] + column
    tl.store(at, code, mask=valid[:, None] & (column < columns))
    tl.store(scales + row * tl.cdiv(columns, 128) + tile, scale, mask=valid)


@triton.jit
def store_turned(
    a: tl.tensor,
    b: tl.tensor,
    c: tl.tensor,
    d: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    channel: tl.tensor,
    tile: tl.tensor,
    columns: tl.tensor,
    width: tl.tensor,
    POWER_OF_TWO: tl.constexpr,
    INTERPRETED: tl.constexpr,
    EXACT: tl.constexpr = True,
) -> None:
    """Quantise the columns of 128 rows and store them as rows ``channel``, ``[C]``.

    The numbers are FP32 in four quarters (``load_quarter``), ``codes`` words of four. So a thread
    packs numbers of its own, and what threads exchange are words: half the bytes of BF16, and
    Triton 3.6 mixes bytes up when it has to rearrange those (seen on a GPU).
    """
    top = larger(larger(tl.abs(a), tl.abs(b)), larger(tl.abs(c), tl.abs(d)))
    scale = scale_of_magnitude(largest(top, 0, INTERPRETED), POWER_OF_TWO, INTERPRETED)
    by = scale[None, :]
    word = word_of(
        quotients(a, by, POWER_OF_TWO, INTERPRETED, EXACT),
        quotients(b, by, POWER_OF_TWO, INTERPRETED, EXACT),
        quotients(c, by, POWER_OF_TWO, INTERPRETED, EXACT),
        quotients(d, by, POWER_OF_TWO, INTERPRETED, EXACT),
        INTERPRETED,
    )
    row = channel.to(tl.int64)
    at = codes + (row * (width // 4))[:, None] + (tile * 32 + tl.arange(0, 32))[None, :]
    tl.store(at, tl.trans(word), mask=(channel < columns)[:, None])
    tl.store(scales + row * (width // 128) + tile, scale, mask=channel < columns)
