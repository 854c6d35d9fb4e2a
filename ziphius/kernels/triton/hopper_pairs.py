"""The large FP8 product on Hopper with two products on their way for each consumer.

``hopper.py`` says who does what. There a consumer waits for the tensor cores, and they for it:
consumers run in step, so little of what they do between products is hidden. Here two consumers of
64 rows each have the next product under way while they scale and add up the one before:

- tiles of 128 x 128: the next is that of the next 128 of K;
- tiles of 128 x 192: 128 columns and the other 64 take turns, so that registers suffice and
  operands are read from the cache less often (154 operations a byte, not 128). The 128 are one
  block of scales; the 64 are half of the block behind or, in every second tile, before it.

Scales of rows are read where quantisers leave them; those of columns come through shared memory.
"""

# Arguments of kernels have the compiler's types.
# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ziphius.kernels.quantize import TILE, Fp8
from ziphius.kernels.triton.product import Config, Shape
from ziphius.kernels.triton.tiles import ALONG_K, ROWS, locate

# Triton 3.6 and later ones call them differently.
_LOAD = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_BARRIER = getattr(gl, "barrier", None) or gl.thread_barrier


@gluon.jit
def _place(
    tile, table, row_tiles, M, N, G, FORM: gl.constexpr, WIDE: gl.constexpr, BAND: gl.constexpr
):
    """Return what ``locate`` does, with the first of the other columns behind the column."""
    expert, row, end, column, first, last = locate(
        tile, table, row_tiles, M, N, G, FORM, 128, 192 if WIDE else 128, BAND
    )
    other = column
    if WIDE:
        # The 128 columns are a whole block of scales, before the other 64 or behind them.
        half = column % 128
        other = column + 128 - half * 2
        column += half
    return expert, row, end, column, other, first, last


@gluon.jit
def _produce(
    a, b, others, b_scales, a_ring, b_ring, other_ring, scale_ring, full, empty, table, tiles,
    row_tiles, M, N, G,
    FORM: gl.constexpr, B_ROWS: gl.constexpr, WIDE: gl.constexpr, BAND: gl.constexpr,
    STAGES: gl.constexpr, AT_ONCE: gl.constexpr,
):  # fmt: skip
    OTHERS: gl.constexpr = 64 * 128 if WIDE else 0
    SCALES: gl.constexpr = 128 * 4 if B_ROWS == 1 else 0
    slot = 0
    turn = 1
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        expert, row, _, column, other, first, last = _place(
            tile, table, row_tiles, M, N, G, FORM, WIDE, BAND
        )
        b_row = column
        if FORM == ROWS:
            b_row += expert * N
        for i in range(gl.cdiv(last - first, AT_ONCE) * AT_ONCE):
            # Behind the last group is nothing: the copy engine writes zeros.
            group = gl.where(first + i < last, first + i, G)
            ready = full.index(slot)
            mbarrier.wait(empty.index(slot), turn)
            mbarrier.expect(ready, (128 + 128) * 128 + OTHERS + SCALES)
            _LOAD(a, [row, group * 128], ready, a_ring.index(slot * 2))
            _LOAD(a, [row + 64, group * 128], ready, a_ring.index(slot * 2 + 1))
            _LOAD(b, [b_row, group * 128], ready, b_ring.index(slot))
            if WIDE:
                other_row = b_row + other - column
                _LOAD(others, [other_row, group * 128], ready, other_ring.index(slot))
            if B_ROWS == 1:
                _LOAD(b_scales, [group, b_row], ready, scale_ring.index(slot))
            slot, turn = _advance(slot, turn, STAGES)


@gluon.jit
def _advance(slot, turn, STAGES: gl.constexpr):
    slot += 1
    if slot == STAGES:
        slot = 0
        turn ^= 1
    return slot, turn


@gluon.jit
def _multiply(a_ring, codes, at, nothing):
    return warpgroup_mma(
        a_ring.index(at), codes.permute((1, 0)), nothing, use_acc=False, is_async=True
    )


@gluon.jit
def _scale(a_at, b_at, group, last, B_ROWS: gl.constexpr):
    """Return what a partial sum's rows are scaled by; 0 behind the last group."""
    scale = gl.load(a_at + group, mask=group < last, other=0.0)
    if B_ROWS != 1:
        scale *= gl.load(b_at + group, mask=group < last, other=0.0)
    return scale


@gluon.jit
def _add(sums, part, scale, scale_ring, slot, B_ROWS: gl.constexpr):
    part *= gl.expand_dims(gl.convert_layout(scale, gl.SliceLayout(1, part.type.layout)), 1)
    if B_ROWS == 1:
        part *= scale_ring.index(slot).load(part.type.layout)
    return sums + part


@gluon.jit
def _store(out, sums, row, end, column, N, out_shift, WIDTH: gl.constexpr):
    # Neighbours in a row lie in other threads: BF16 is rearranged so that each stores 16 bytes.
    x = sums.to(out.dtype.element_ty)
    if out.dtype.element_ty == gl.bfloat16:
        x = gl.convert_layout(
            x, gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
        )
    rows = row + gl.arange(0, 64, layout=gl.SliceLayout(1, x.type.layout))
    columns = column + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, x.type.layout))
    inside = gl.expand_dims(rows < end, 1) & gl.expand_dims(columns < N, 0)
    at = gl.expand_dims((rows + out_shift).to(gl.int64) * N, 1) + gl.expand_dims(columns, 0)
    gl.store(out + at, x, mask=inside)


@gluon.jit
def _consume(
    SIDE: gl.constexpr, a_ring, b_ring, other_ring, scale_ring, full, empty, out, a_scales,
    b_scales, table, tiles, row_tiles, M, N, G,
    FORM: gl.constexpr, B_ROWS: gl.constexpr, WIDE: gl.constexpr, BAND: gl.constexpr,
    STAGES: gl.constexpr, AT_ONCE: gl.constexpr,
):  # fmt: skip
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    HALF: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 32])
    lines = gl.arange(0, 64, layout=gl.SliceLayout(1, MMA))
    nothing = gl.zeros((64, 128), gl.float32, layout=MMA)
    half = gl.zeros((64, 64), gl.float32, layout=HALF)
    blocks = gl.cdiv(N, 128)
    slot = 0
    turn = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        expert, row, end, column, other, first, last = _place(
            tile, table, row_tiles, M, N, G, FORM, WIDE, BAND
        )
        row += SIDE * 64
        # Rows and columns outside take scales from inside: their sums are not stored.
        a_at = a_scales + gl.minimum(row + lines, M - 1).to(gl.int64) * G
        block = 0
        if FORM == ROWS:
            block = expert * blocks
        b_at = b_scales + (block + gl.minimum(column // 128, blocks - 1)) * G
        other_at = b_scales + (block + gl.minimum(other // 128, blocks - 1)) * G
        sums = nothing
        others = half
        # A partial sum is read while the next is made. Across rounds of the loop the compiler
        # does not see that, and lets every product wait; so a round has several.
        for group in range(first, last, AT_ONCE):
            mbarrier.wait(full.index(slot), turn)
            scale = _scale(a_at, b_at, group, last, B_ROWS)
            part = _multiply(a_ring, b_ring.index(slot), slot * 2 + SIDE, nothing)
            for i in gl.static_range(1, AT_ONCE + 1):
                done = slot
                if WIDE:
                    other_scale = _scale(a_at, other_at, group + i - 1, last, B_ROWS)
                    other_part = _multiply(a_ring, other_ring.index(slot), slot * 2 + SIDE, half)
                    part, other_part = warpgroup_mma_wait(1, deps=(part, other_part))
                    sums = _add(sums, part, scale, scale_ring, done, B_ROWS)
                    sums, other_part = warpgroup_mma_wait(1, deps=(sums, other_part))
                slot, turn = _advance(slot, turn, STAGES)
                if i < AT_ONCE:
                    mbarrier.wait(full.index(slot), turn)
                    next_scale = _scale(a_at, b_at, group + i, last, B_ROWS)
                    next_part = _multiply(a_ring, b_ring.index(slot), slot * 2 + SIDE, nothing)
                    if WIDE:
                        other_part, next_part = warpgroup_mma_wait(1, deps=(other_part, next_part))
                    else:
                        part, next_part = warpgroup_mma_wait(1, deps=(part, next_part))
                elif WIDE:
                    other_part = warpgroup_mma_wait(0, deps=(other_part,))
                else:
                    part = warpgroup_mma_wait(0, deps=(part,))
                if WIDE:
                    others = _add(others, other_part, other_scale, scale_ring, done, B_ROWS)
                else:
                    sums = _add(sums, part, scale, scale_ring, done, B_ROWS)
                if i < AT_ONCE:
                    # Waits for nothing more, but says that this is added up first.
                    if WIDE:
                        others, part = warpgroup_mma_wait(1, deps=(others, next_part))
                    else:
                        sums, part = warpgroup_mma_wait(1, deps=(sums, next_part))
                    scale = next_scale
                mbarrier.arrive(empty.index(done))
        out_shift = 0
        if FORM == ALONG_K:
            out_shift = expert * M
        _store(out, sums, row, end, column, N, out_shift, 128)
        if WIDE:
            _store(out, others, row, end, other, N, out_shift, 64)


@gluon.jit
def _pairs_kernel(
    a, b, others, b_scale_rows, out, a_scales, b_scales, table, total, M, N, G, experts,
    FORM: gl.constexpr, B_ROWS: gl.constexpr, WIDE: gl.constexpr, BAND: gl.constexpr,
    STAGES: gl.constexpr, AT_ONCE: gl.constexpr,
):  # fmt: skip
    a_ring = gl.allocate_shared_memory(a.dtype, [STAGES * 2, 64, 128], a.layout)
    b_ring = gl.allocate_shared_memory(b.dtype, [STAGES, 128, 128], b.layout)
    other_ring = b_ring
    if WIDE:
        other_ring = gl.allocate_shared_memory(b.dtype, [STAGES, 64, 128], b.layout)
    scale_ring = b_ring
    if B_ROWS == 1:
        scale_ring = gl.allocate_shared_memory(gl.float32, [STAGES, 1, 128], b_scale_rows.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=2)
    _BARRIER()
    row_tiles = gl.load(total) if FORM == ROWS else gl.cdiv(M, 128)
    tiles = row_tiles * gl.cdiv(N, 192 if WIDE else 128)
    if FORM == ALONG_K:
        tiles *= experts
    # Written out for every part: the compiler knows no unpacking, and a name would lose constants.
    gl.warp_specialize(
        [
            (_consume, (
                0, a_ring, b_ring, other_ring, scale_ring, full, empty, out, a_scales, b_scales,
                table, tiles, row_tiles, M, N, G, FORM, B_ROWS, WIDE, BAND, STAGES,
                AT_ONCE,
            )),
            (_consume, (
                1, a_ring, b_ring, other_ring, scale_ring, full, empty, out, a_scales, b_scales,
                table, tiles, row_tiles, M, N, G, FORM, B_ROWS, WIDE, BAND, STAGES,
                AT_ONCE,
            )),
            (_produce, (
                a, b, others, b_scale_rows, a_ring, b_ring, other_ring, scale_ring, full, empty,
                table, tiles, row_tiles, M, N, G, FORM, B_ROWS, WIDE, BAND, STAGES,
                AT_ONCE,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def launch(
    a: Fp8, b: Fp8, out: Tensor, shape: Shape, form: int, config: Config, table: Any, total: Any,
    *, row_tiles: int,
) -> None:  # fmt: skip
    """Run the kernel; as ``product.launch``, for operands that are ``product.copyable``."""
    M, N, K, G, experts = shape
    each = experts if form == ALONG_K.value else 1
    tiles = row_tiles * triton.cdiv(N, config.block_n) * each
    programs = torch.cuda.get_device_properties(out.device).multi_processor_count
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    wide = config.block_n == 192
    a_codes, b_codes = a.codes.view(-1, K), b.codes.view(-1, K)
    halves = TensorDescriptor.from_tensor(b_codes, [64, TILE], layout)
    b_scale_rows = halves
    if b.rows == 1:
        rows = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
        b_scale_rows = TensorDescriptor.from_tensor(_turned(b.scales), [1, TILE], rows)
    _pairs_kernel[(min(tiles, programs),)](
        TensorDescriptor.from_tensor(a_codes, [64, TILE], layout),
        TensorDescriptor.from_tensor(b_codes, [128, TILE], layout),
        halves, b_scale_rows, out, a.scales, b.scales, table, total, M, N, G, experts,
        form, b.rows, wide, config.band, config.stages, config.at_once,
        num_warps=4,
    )  # fmt: skip


def _turned(scales: Tensor) -> Tensor:
    """Return scales of rows ``[..., R, G]`` as ``[G, R]``, as the copy engine can read them."""
    G = scales.shape[-1]
    scales_RG = scales.view(-1, G)
    rows = len(scales_RG)
    turned = scales_RG.new_empty(G, -(-rows // 4) * 4)
    turned[:, :rows] = scales_RG.T
    return turned[:, :rows]
