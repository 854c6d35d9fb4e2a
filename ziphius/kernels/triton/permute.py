"""Token rows to their experts and back on a GPU, and the sorting of pairs by expert before it.

A row is read once and written to its places, wherever they are; back, a token's rows are read and
summed in registers. The sort counts, and every (token, choice) pair finds its own place.
"""

# Tuples of kernels grow.
# mypy: disable-error-code="assignment"

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ziphius.kernels.quantize import Fp8, tile_count
from ziphius.kernels.triton.groups import codes_of, empty_tiles

# Of a program that moves rows: bytes of a row, bytes in all.
ROW_BYTES = 2048
PROGRAM_BYTES = 8192


class TilesLaunch(NamedTuple):
    """A program's warps; codes of a row that it moves at a time, rows, and how often in a row."""

    warps: int = 4
    block: int = 1024
    lines: int = 2
    blocks: int = 7


TILES_CANDIDATES = (
    TilesLaunch(),
    TilesLaunch(lines=8, blocks=1),
    TilesLaunch(2, 1024, 1),
)
# Of the sort: pairs of a program, and counts that a scan takes at once.
PAIRS = 128
SCAN = 1024


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u_ND: Tensor, order_M: Tensor, inverse_M: Tensor, K: int) -> Tensor:
        ctx.save_for_backward(order_M, inverse_M)
        ctx.K = K
        u_ND = u_ND.contiguous()
        out_MD = u_ND.new_empty(len(order_M), u_ND.shape[1])
        _launch(_permute_kernel, u_ND, inverse_M, out_MD, u_ND.shape, K)
        return out_MD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        order_M, inverse_M = ctx.saved_tensors
        return unpermute_triton(grads[0], order_M, inverse_M, ctx.K), None, None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_MD: Tensor, order_M: Tensor, inverse_M: Tensor, K: int) -> Tensor:
        ctx.save_for_backward(order_M, inverse_M)
        ctx.K = K
        rows_MD = rows_MD.contiguous()
        out_ND = rows_MD.new_empty(len(rows_MD) // K, rows_MD.shape[1])
        _launch(_unpermute_kernel, rows_MD, inverse_M, out_ND, out_ND.shape, K)
        return out_ND

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        order_M, inverse_M = ctx.saved_tensors
        return permute_triton(grads[0], order_M, inverse_M, ctx.K), None, None, None


def permute_triton(u_ND: Tensor, order_M: Tensor, inverse_M: Tensor, K: int) -> Tensor:
    """Do what ``permute.permute`` does: every row is read once and written ``K`` times."""
    return _Permute.apply(u_ND, order_M, inverse_M, K)


def unpermute_triton(rows_MD: Tensor, order_M: Tensor, inverse_M: Tensor, K: int) -> Tensor:
    """Do what ``permute.unpermute`` does, bit for bit."""
    return _Unpermute.apply(rows_MD, order_M, inverse_M, K)


def permute_tiles_triton(
    q: Fp8, order_M: Tensor, inverse_M: Tensor, K: int, *, launch: TilesLaunch | None = None
) -> Fp8:
    """Do what ``permute.permute_tiles`` does, codes and scales in one launch.

    Rows are read in their order and written ``K`` times: read in the order of the result, they
    come from memory again for most of their places, since they do not fit into the cache.
    """
    (tokens, columns), size = q.codes.shape, launch or TilesLaunch()
    out = empty_tiles(torch.Size((len(order_M), columns)), q.codes.device)
    block = min(size.block, max(triton.next_power_of_2(columns), 128))
    blocks, lines = min(size.blocks, triton.cdiv(columns, block)), size.lines * size.block // block
    if out.codes.numel():
        parts = triton.cdiv(columns, block * blocks)
        _permute_tiles_kernel[(parts * triton.cdiv(tokens, lines),)](
            codes_of(q),
            q.scales,
            inverse_M,
            codes_of(out),
            out.scales,
            tokens,
            columns,
            tile_count(columns),
            parts,
            K=K,
            LINES=lines,
            BLOCK=block,
            BLOCKS=blocks,
            TILES=triton.next_power_of_2(block * blocks // 128),
            num_warps=size.warps,
        )
    return out


def sort_by_slot_triton(slots_NK: Tensor, n_slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort (token, choice) pairs by slot, stably: ``(order_M, inverse_M, counts_E)``, all int64.

    ``order[m]`` is the flat pair of row ``m``, ``inverse`` its inverse, ``counts`` the rows of each
    of ``n_slots``. The host waits for nothing.
    """
    flat_M = slots_NK.flatten()
    pairs, programs = len(flat_M), triton.cdiv(len(flat_M), PAIRS)
    order_M = torch.empty(pairs, dtype=torch.int64, device=flat_M.device)
    inverse_M = torch.empty_like(order_M)
    counts_E = torch.zeros(n_slots, dtype=torch.int64, device=flat_M.device)
    if pairs:
        size = {"PAIRS": PAIRS, "SLOTS": triton.next_power_of_2(n_slots), "num_warps": 8}
        before_EP = torch.empty(n_slots, programs, dtype=torch.int32, device=flat_M.device)
        _count_kernel[(programs,)](flat_M, before_EP, pairs, n_slots, programs, **size)
        block = min(triton.next_power_of_2(programs), SCAN)
        _scan_kernel[(n_slots,)](before_EP, counts_E, programs, BLOCK=block, num_warps=4)
        places = order_M, inverse_M
        _place_kernel[(programs,)](
            flat_M, before_EP, counts_E, *places, pairs, n_slots, programs, **size
        )
    return order_M, inverse_M, counts_E


def _blocks(columns: int, size: int) -> tuple[int, int]:
    """Return columns and rows of a program, of numbers of ``size`` bytes."""
    block = min(ROW_BYTES // size, triton.next_power_of_2(columns))
    return block, max(PROGRAM_BYTES // size // block, 1)


def _launch(
    kernel: Any, source: Tensor, inverse_M: Tensor, out: Tensor, shape: torch.Size, K: int
) -> None:
    """Run a kernel over ``[N, D]``, which has a program for some tokens and columns."""
    tokens, columns = shape
    block, lines = _blocks(columns, source.element_size())
    if out.numel():
        kernel[(triton.cdiv(columns, block) * triton.cdiv(tokens, lines),)](
            source, inverse_M, out, tokens, columns, K=K, LINES=lines, BLOCK=block, num_warps=4
        )


@triton.jit
def _permute_kernel(
    u: tl.tensor,
    inverse: tl.tensor,
    out: tl.tensor,
    tokens: tl.tensor,
    columns: tl.tensor,
    K: tl.constexpr,
    LINES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    blocks = tl.cdiv(columns, BLOCK)
    token = (tl.program_id(0) // blocks * LINES + tl.arange(0, LINES)).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    valid = token < tokens
    mask = valid[:, None] & (column < columns)
    row = tl.load(u + (token * columns)[:, None] + column, mask=mask)
    for choice in tl.static_range(K):
        place = tl.load(inverse + token * K + choice, mask=valid, other=0)
        tl.store(out + (place * columns)[:, None] + column, row, mask=mask)


@triton.jit
def _unpermute_kernel(
    rows: tl.tensor,
    inverse: tl.tensor,
    out: tl.tensor,
    tokens: tl.tensor,
    columns: tl.tensor,
    K: tl.constexpr,
    LINES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    blocks = tl.cdiv(columns, BLOCK)
    token = (tl.program_id(0) // blocks * LINES + tl.arange(0, LINES)).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    valid = token < tokens
    mask = valid[:, None] & (column < columns)
    place = tl.load(inverse + token * K, mask=valid, other=0)
    total = _widened(tl.load(rows + (place * columns)[:, None] + column, mask=mask))
    for choice in tl.static_range(1, K):
        place = tl.load(inverse + token * K + choice, mask=valid, other=0)
        total += _widened(tl.load(rows + (place * columns)[:, None] + column, mask=mask))
    at = out + (token * columns)[:, None] + column
    tl.store(at, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _widened(x: tl.tensor) -> tl.tensor:
    """Sums are taken in at least FP32."""
    return x if x.dtype == tl.float64 else x.to(tl.float32)


@triton.jit
def _permute_tiles_kernel(
    codes: tl.tensor,
    scales: tl.tensor,
    inverse: tl.tensor,
    out_codes: tl.tensor,
    out_scales: tl.tensor,
    tokens: tl.tensor,
    columns: tl.tensor,
    tiles: tl.tensor,
    parts: tl.tensor,
    K: tl.constexpr,
    LINES: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILES: tl.constexpr,
) -> None:
    part = tl.program_id(0) % parts
    token = (tl.program_id(0) // parts * LINES + tl.arange(0, LINES)).to(tl.int64)
    valid = token < tokens
    begin, column = part * (BLOCK * BLOCKS), tl.arange(0, BLOCK)[None, :]
    code, own = (), codes + (token * columns)[:, None]
    for block in tl.static_range(BLOCKS):
        at = begin + block * BLOCK + column
        code += (tl.load(own + at, mask=valid[:, None] & (at < columns)),)
    number = tl.arange(0, TILES)[None, :]
    tile = part * (BLOCK * BLOCKS // 128) + number
    there = valid[:, None] & (number < BLOCK * BLOCKS // 128) & (tile < tiles)
    scale = tl.load(scales + (token * tiles)[:, None] + tile, mask=there)
    for choice in tl.static_range(K):
        row = tl.load(inverse + token * K + choice, mask=valid, other=0)[:, None]
        for block in tl.static_range(BLOCKS):
            at = begin + block * BLOCK + column
            mask = valid[:, None] & (at < columns)
            # What is written leaves the cache first: what is still to be read stays.
            own = out_codes + row * columns + at
            tl.store(own, code[block], mask=mask, eviction_policy="evict_first")
        own = out_scales + row * tiles + tile
        tl.store(own, scale, mask=there, eviction_policy="evict_first")


@triton.jit
def _count_kernel(
    slots: tl.tensor,
    before: tl.tensor,
    pairs: tl.tensor,
    n_slots: tl.tensor,
    programs: tl.tensor,
    PAIRS: tl.constexpr,
    SLOTS: tl.constexpr,
) -> None:
    """Count a program's pairs of every slot: ``before[slot, program]``."""
    program = tl.program_id(0)
    pair = program * PAIRS + tl.arange(0, PAIRS)
    own = tl.load(slots + pair, mask=pair < pairs, other=-1).to(tl.int32)
    slot = tl.arange(0, SLOTS)
    count = tl.sum((own[:, None] == slot[None, :]).to(tl.int32), 0)
    tl.store(before + slot * programs + program, count, mask=slot < n_slots)


@triton.jit
def _scan_kernel(
    before: tl.tensor, counts: tl.tensor, programs: tl.tensor, BLOCK: tl.constexpr
) -> None:
    """Turn a slot's counts into those of all programs before, and sum them up."""
    begin = before + tl.program_id(0).to(tl.int64) * programs
    total = tl.program_id(0) * 0
    for start in range(0, programs, BLOCK):
        program = start + tl.arange(0, BLOCK)
        count = tl.load(begin + program, mask=program < programs, other=0)
        earlier = total + tl.cumsum(count, 0) - count
        tl.store(begin + program, earlier, mask=program < programs)
        total += tl.sum(count, 0)
    tl.store(counts + tl.program_id(0), total.to(tl.int64))


@triton.jit
def _place_kernel(
    slots: tl.tensor,
    before: tl.tensor,
    counts: tl.tensor,
    order: tl.tensor,
    inverse: tl.tensor,
    pairs: tl.tensor,
    n_slots: tl.tensor,
    programs: tl.tensor,
    PAIRS: tl.constexpr,
    SLOTS: tl.constexpr,
) -> None:
    """Find every pair's row: after lesser slots, earlier programs, and its program's equals."""
    program = tl.program_id(0)
    line = tl.arange(0, PAIRS)
    pair = program * PAIRS + line
    valid = pair < pairs
    own = tl.load(slots + pair, mask=valid, other=0).to(tl.int32)
    slot = tl.arange(0, SLOTS)
    count = tl.load(counts + slot, mask=slot < n_slots, other=0).to(tl.int32)
    lesser = tl.sum(tl.where(slot[None, :] < own[:, None], count[None, :], 0), 1)
    earlier = tl.load(before + own.to(tl.int64) * programs + program, mask=valid, other=0)
    # The same slots again along the other dimension: a read from a cache is no conversion.
    others = tl.load(slots + program * PAIRS + line, mask=valid, other=-1).to(tl.int32)
    equal = (own[:, None] == others[None, :]) & (line[None, :] < line[:, None])
    row = lesser + earlier + tl.sum(equal.to(tl.int32), 1)
    tl.store(order + row, pair.to(tl.int64), mask=valid)
    tl.store(inverse + pair, row.to(tl.int64), mask=valid)
