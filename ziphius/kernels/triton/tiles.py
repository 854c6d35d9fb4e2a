"""Which part of a product a program makes: the order of tiles, and the tables of ragged segments.

A product is cut into tiles of BLOCK_M rows by BLOCK_N columns. Segments of any length come without
padding, so a small kernel first writes, on the device, which rows each tile has; grids are bounded
by shapes, and the host never waits for counts.
"""

# Arguments of kernels have the compiler's types.
# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Forms of a product: one matrix; segments of rows, each with its own matrix; segments along K.
DENSE = tl.constexpr(0)
ROWS = tl.constexpr(1)
ALONG_K = tl.constexpr(2)


@triton.jit
def locate(
    tile,
    table,
    row_tiles,
    M,
    N,
    G,
    FORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BAND: tl.constexpr,
):
    """Return ``(expert, first row, end of rows, first column, first group, end of groups)``.

    Tiles go in bands of ``BAND`` tiles of rows, column by column, so that those that run at one
    time share operands in the cache. ``row_tiles`` is how many tiles of rows there are (of one
    expert, along K).
    """
    column_tiles = tl.cdiv(N, BLOCK_N)
    expert, end, first_group, end_group = 0, M, 0, G
    if FORM == ALONG_K:
        each = row_tiles * column_tiles
        expert = tile // each
        tile = tile % each
        first_group = tl.load(table + expert * 2)
        end_group = tl.load(table + expert * 2 + 1)
    band = tile // (BAND * column_tiles)
    inside = tile % (BAND * column_tiles)
    height = tl.maximum(tl.minimum(row_tiles - band * BAND, BAND), 1)
    row_tile = band * BAND + inside % height
    column = inside // height * BLOCK_N
    row = row_tile * BLOCK_M
    if FORM == ROWS:
        expert = tl.load(table + row_tile * 3)
        row = tl.load(table + row_tile * 3 + 1)
        end = tl.load(table + row_tile * 3 + 2)
    return expert, row, end, column, first_group, end_group


@triton.jit
def _rows_kernel(
    counts, table, total, experts, stride, BLOCK_M: tl.constexpr, EXPERTS: tl.constexpr
):
    tile = tl.program_id(0)
    numbers = tl.arange(0, EXPERTS)
    counts_E = tl.load(counts + numbers, mask=numbers < experts, other=0).to(tl.int32)
    tiles_E = tl.cdiv(counts_E, BLOCK_M)
    ends_E = tl.cumsum(tiles_E, 0)
    expert = tl.sum((ends_E <= tile).to(tl.int32), 0)
    before = numbers < expert
    within = tile - tl.sum(tl.where(before, tiles_E, 0), 0)
    start = tl.sum(tl.where(before, counts_E, 0), 0) if stride == 0 else expert * stride
    count = tl.sum(tl.where(numbers == expert, counts_E, 0), 0)
    tl.store(table + tile * 3, expert)
    tl.store(table + tile * 3 + 1, start + within * BLOCK_M)
    tl.store(table + tile * 3 + 2, start + count)
    if tile == 0:
        tl.store(total, tl.sum(tiles_E, 0))


@triton.jit
def _groups_kernel(counts, table, experts, GROUP: tl.constexpr, EXPERTS: tl.constexpr):
    numbers = tl.arange(0, EXPERTS)
    inside = numbers < experts
    groups_E = tl.cdiv(tl.load(counts + numbers, mask=inside, other=0).to(tl.int32), GROUP)
    ends_E = tl.cumsum(groups_E, 0)
    tl.store(table + numbers * 2, ends_E - groups_E, mask=inside)
    tl.store(table + numbers * 2 + 1, ends_E, mask=inside)


def tiles_of_rows(
    counts_E: Tensor, bound: int, block_rows: int, stride: int = 0
) -> tuple[Tensor, Tensor]:
    """Say which rows each tile has: ``(table, total)``, int32 ``[bound, 3]`` and ``[1]``.

    A line is ``(expert, first row, end of the expert's rows)``; only the first ``total`` mean
    something. Experts' rows follow each other, or begin every ``stride`` rows.
    """
    experts = len(counts_E)
    table = torch.empty(bound, 3, dtype=torch.int32, device=counts_E.device)
    total = torch.empty(1, dtype=torch.int32, device=counts_E.device)
    _rows_kernel[(bound,)](
        counts_E, table, total, experts, stride, block_rows, triton.next_power_of_2(experts),
        num_warps=1,
    )  # fmt: skip
    return table, total


def groups_of_segments(counts_E: Tensor, group: int = 128) -> Tensor:
    """Return which groups each segment has along K: int32 ``[E, 2]``, first and end.

    Groups of 128 are those of turned segments in FP8; groups of one are rows.
    """
    experts = len(counts_E)
    table = torch.empty(experts, 2, dtype=torch.int32, device=counts_E.device)
    size = triton.next_power_of_2(experts)
    _groups_kernel[(1,)](counts_E, table, experts, group, size, num_warps=1)
    return table
