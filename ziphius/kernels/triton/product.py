"""The FP8 product in Triton proper: one kernel for one matrix, segments of rows, and along K.

It runs anywhere, interpreted too, and is what small products run: those that wait for memory.
Large ones on Hopper run ``hopper.py``.
"""

# Arguments of kernels have the compiler's types.
# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ziphius.kernels.quantize import TILE, Fp8
from ziphius.kernels.triton.tiles import ALONG_K, DENSE, ROWS, locate

# Bytes: what the copy engine asks of addresses and of rows.
_ALIGNMENT = 16
_SUM_BLOCK = 1024


class Config(NamedTuple):
    """How a product is cut: ``engine`` is "hopper", "pairs" or "plain".

    ``splits`` programs share the sum of one tile; with ``copies`` the copy engine (TMA) loads the
    operands. Both are ``plain``'s; the others always copy, with their own number of warps.
    ``at_once`` groups of K are in a round of ``pairs``' loop: with more than 4 registers do not
    suffice.
    """

    engine: str
    block_m: int
    block_n: int
    stages: int
    warps: int = 4
    splits: int = 1
    copies: bool = True
    band: int = 8
    at_once: int = 1


class Shape(NamedTuple):
    """A product: ``M`` rows of ``a``, ``N`` of each ``b``, ``G`` groups of 128 along ``K``."""

    M: int
    N: int
    K: int
    G: int
    experts: int = 1


@triton.jit
def _product_kernel(
    a, b, out, a_scales, b_scales, table, total, M, N, K, G,
    FORM: tl.constexpr, B_ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BAND: tl.constexpr, SPLITS: tl.constexpr, COPIES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    row_tiles = tl.load(total) if FORM == ROWS else tl.cdiv(M, BLOCK_M)
    if FORM == ROWS and tile >= row_tiles * tl.cdiv(N, BLOCK_N):
        return
    expert, row, end, column, first, last = locate(
        tile, table, row_tiles, M, N, G, FORM, BLOCK_M, BLOCK_N, BAND
    )
    split = tl.program_id(1)
    if SPLITS > 1:
        share = tl.cdiv(G, SPLITS)
        first = split * share
        last = tl.minimum(first + share, G)
    rows = row + tl.arange(0, BLOCK_M)
    columns = column + tl.arange(0, BLOCK_N)
    b_row = expert * N if FORM == ROWS else 0
    row_inside, column_inside = rows < end, columns < N
    # What is outside is read from the last row inside: its sums are not stored.
    a_scale_at = a_scales + tl.minimum(rows, end - 1) * G
    if B_ROWS == 1:
        b_scale_at = b_scales + (b_row + tl.minimum(columns, N - 1)) * G
    else:
        block = expert * tl.cdiv(N, B_ROWS) if FORM == ROWS else 0
        b_scale_at = b_scales + (block + column // B_ROWS) * G
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for group in tl.range(first, last):
        k = group * 128
        if COPIES:
            a_codes = a.load([row, k])
            b_codes = b.load([b_row + column, k])
        else:
            ks = k + tl.arange(0, 128)
            k_inside = (ks < K)[None, :]
            a_at = a + rows.to(tl.int64)[:, None] * K + ks[None, :]
            b_at = b + (b_row + columns).to(tl.int64)[:, None] * K + ks[None, :]
            a_codes = tl.load(a_at, mask=row_inside[:, None] & k_inside, other=0.0)
            b_codes = tl.load(b_at, mask=column_inside[:, None] & k_inside, other=0.0)
        if INTERPRETED:
            part = tl.dot(a_codes.to(tl.float32), b_codes.to(tl.float32).T, input_precision="ieee")
        else:
            part = tl.dot(a_codes, b_codes.T)
        a_scale = tl.load(a_scale_at + group)
        b_scale = tl.load(b_scale_at + group)
        if B_ROWS == 1:
            sums += part * (a_scale[:, None] * b_scale[None, :])
        else:
            sums += part * (a_scale * b_scale)[:, None]
    out_row = rows.to(tl.int64)
    if FORM == ALONG_K:
        out_row += expert.to(tl.int64) * M
    if SPLITS > 1:
        out_row += split.to(tl.int64) * M
    at = out + out_row[:, None] * N + columns[None, :]
    inside = row_inside[:, None] & column_inside[None, :]
    tl.store(at, sums.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _sum_kernel(parts, out, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    sums = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        sums += tl.load(parts + split * size + at, mask=inside, other=0.0)
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=inside)


def copyable(*operands: Fp8) -> bool:
    """Say whether the copy engine can load them: rows and addresses are multiples of 16 bytes."""
    return all(
        q.codes.shape[-1] % _ALIGNMENT == 0 and q.codes.data_ptr() % _ALIGNMENT == 0
        for q in operands
    )


def launch(
    a: Fp8, b: Fp8, out: Tensor, shape: Shape, form: int, config: Config, table: Any, total: Any,
    *, row_tiles: int, interpreted: bool,
) -> None:  # fmt: skip
    """Run the kernel: ``a`` and ``b`` are contiguous, ``row_tiles`` bounds the tiles of rows.

    ``config.copies`` only for operands that are ``copyable``. ``table`` and ``total`` come from
    ``tiles``, None where ``form`` needs none.
    """
    copies = config.copies
    M, N, K, G, experts = shape
    splits = min(config.splits, G) if form == DENSE.value else 1
    target = out
    if splits > 1:
        target = torch.empty(splits, M, N, dtype=torch.float32, device=out.device)
    column_tiles = triton.cdiv(N, config.block_n)
    each = experts if form == ALONG_K.value else 1
    a_codes, b_codes = a.codes.view(-1, K), b.codes.view(-1, K)
    _product_kernel[(row_tiles * column_tiles * each, splits)](
        TensorDescriptor.from_tensor(a_codes, [config.block_m, TILE]) if copies else a_codes,
        TensorDescriptor.from_tensor(b_codes, [config.block_n, TILE]) if copies else b_codes,
        target, a.scales, b.scales, table, total, M, N, K, G,
        form, b.rows, config.block_m, config.block_n, config.band, splits, copies, interpreted,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    if splits > 1:
        sum_parts(target, out)


def sum_parts(parts: Tensor, out: Tensor) -> None:
    """Add up FP32 ``parts`` ``[S, ...]``, in their order, into ``out`` ``[...]``."""
    size = out.numel()
    grid = (triton.cdiv(size, _SUM_BLOCK),)
    _sum_kernel[grid](parts, out, size, len(parts), _SUM_BLOCK, num_warps=4)
