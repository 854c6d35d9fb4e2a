"""The large FP8 product on Hopper, in Gluon, which says which warp does what.

One warp feeds shared memory through the copy engine; two or three consumers of four warps each own
some rows of a tile. A consumer multiplies 128 of K in the tensor cores, waits, and adds the partial
sum, scaled, to its FP32 registers. Meanwhile the tensor cores work for the others, which Triton's
own schedule, with barriers for all warps in every step, does not do.

A tile has 128 columns and 64 rows for each of two or three consumers. With three, operands are read
from the cache less often: 154 operations a byte, not 128. Measured on an H200, 128 of K take about
790 and 1050 cycles, of which the tensor cores are at work in 512 and 768: consumers run in step.
(256 rows, 128 a consumer of two, do not fit in registers and are half as fast.)

Programs stay and take one tile after the other, so that loading goes on while sums are stored.
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
# Columns behind the scales of the last row: no tile is taller.
_ROOM = 192


@gluon.jit
def _produce(
    a, b, a_ring, b_ring, full, empty, table, tiles, row_tiles, M, N, G,
    FORM: gl.constexpr, BLOCK_M: gl.constexpr, BAND: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    PIECES: gl.constexpr = BLOCK_M // 64
    slot = 0
    turn = 1
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        expert, row, _, column, first, last = locate(
            tile, table, row_tiles, M, N, G, FORM, BLOCK_M, 128, BAND
        )
        b_row = column
        if FORM == ROWS:
            b_row += expert * N
        for group in range(first, last):
            ready = full.index(slot)
            mbarrier.wait(empty.index(slot), turn)
            mbarrier.expect(ready, (BLOCK_M + 128) * 128)
            for i in gl.static_range(PIECES):
                piece = a_ring.index(slot * PIECES + i)
                _LOAD(a, [row + i * 64, group * 128], ready, piece)
            _LOAD(b, [b_row, group * 128], ready, b_ring.index(slot))
            slot += 1
            if slot == STAGES:
                slot = 0
                turn ^= 1


@gluon.jit
def _store(out, sums, row, end, column, N, out_shift):
    # Neighbours in a row lie in other threads: BF16 is rearranged so that each stores 16 bytes.
    x = sums.to(out.dtype.element_ty)
    if out.dtype.element_ty == gl.bfloat16:
        x = gl.convert_layout(x, gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0]))
    rows = row + gl.arange(0, 64, layout=gl.SliceLayout(1, x.type.layout))
    columns = column + gl.arange(0, 128, layout=gl.SliceLayout(0, x.type.layout))
    inside = gl.expand_dims(rows < end, 1) & gl.expand_dims(columns < N, 0)
    at = gl.expand_dims((rows + out_shift).to(gl.int64) * N, 1) + gl.expand_dims(columns, 0)
    gl.store(out + at, x, mask=inside)


@gluon.jit
def _consume(
    SIDE: gl.constexpr, a_ring, b_ring, full, empty, out, a_scales, b_scales, table, tiles,
    row_tiles, M, N, G, a_row, a_stride, b_stride,
    FORM: gl.constexpr, B_ROWS: gl.constexpr, BLOCK_M: gl.constexpr, BAND: gl.constexpr,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    lines = gl.arange(0, 64, layout=gl.SliceLayout(1, MMA))
    nothing = gl.zeros((64, 128), gl.float32, layout=MMA)
    slot = 0
    turn = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        expert, row, end, column, first, last = locate(
            tile, table, row_tiles, M, N, G, FORM, BLOCK_M, 128, BAND
        )
        row += SIDE * 64
        # Rows outside take scales from inside: their sums are not stored. So do empty segments.
        inside = gl.minimum(row + lines, M - 1).to(gl.int64)
        a_scale_at = a_scales + inside * a_row + gl.minimum(first, G - 1).to(gl.int64) * a_stride
        if B_ROWS == 1:
            columns = gl.arange(0, 128, layout=gl.SliceLayout(0, MMA)).to(gl.int64)
            b_scale_at = b_scales + (column + columns) + first * b_stride.to(gl.int64)
        else:
            block = column // 128
            if FORM == ROWS:
                block += expert * gl.cdiv(N, 128)
            b_scale_at = b_scales + block * G + first
        sums = nothing
        # Scales of rows are loaded a step ahead: products would wait behind them.
        a_scale = gl.load(a_scale_at)
        b_scale = gl.load(b_scale_at)
        for group in range(first, last):
            scale = a_scale
            if B_ROWS == 1:
                b_scale = gl.load(b_scale_at)
            else:
                scale = a_scale * b_scale
            if group + 1 < last:
                a_scale_at += a_stride
                b_scale_at += b_stride
            a_scale = gl.load(a_scale_at)
            if B_ROWS != 1:
                b_scale = gl.load(b_scale_at)
            mbarrier.wait(full.index(slot), turn)
            a_codes = a_ring.index(slot * CONSUMERS + SIDE)
            b_codes = b_ring.index(slot).permute((1, 0))
            part = warpgroup_mma(a_codes, b_codes, nothing, use_acc=False, is_async=True)
            part = warpgroup_mma_wait(0, deps=(part,))
            mbarrier.arrive(empty.index(slot))
            part = part * gl.expand_dims(scale, 1)
            if B_ROWS == 1:
                part = part * gl.expand_dims(b_scale, 0)
            sums += part
            slot += 1
            if slot == STAGES:
                slot = 0
                turn ^= 1
        out_shift = 0
        if FORM == ALONG_K:
            out_shift = expert * M
        _store(out, sums, row, end, column, N, out_shift)


@gluon.jit
def _hopper_kernel(
    a, b, out, a_scales, b_scales, table, total, M, N, G, a_row, a_stride, b_stride, experts,
    FORM: gl.constexpr, B_ROWS: gl.constexpr, BLOCK_M: gl.constexpr, BAND: gl.constexpr,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    a_ring = gl.allocate_shared_memory(a.dtype, [STAGES * BLOCK_M // 64, 64, 128], a.layout)
    b_ring = gl.allocate_shared_memory(b.dtype, [STAGES, 128, 128], b.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=CONSUMERS)
    _BARRIER()
    row_tiles = gl.load(total) if FORM == ROWS else gl.cdiv(M, BLOCK_M)
    tiles = row_tiles * gl.cdiv(N, 128)
    if FORM == ALONG_K:
        tiles *= experts
    # Written out for every part: the compiler knows no unpacking, and a name would lose constants.
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (
                    0, a_ring, b_ring, full, empty, out, a_scales, b_scales, table, tiles,
                    row_tiles, M, N, G, a_row, a_stride, b_stride,
                    FORM, B_ROWS, BLOCK_M, BAND, CONSUMERS, STAGES,
                )),
                (_consume, (
                    1, a_ring, b_ring, full, empty, out, a_scales, b_scales, table, tiles,
                    row_tiles, M, N, G, a_row, a_stride, b_stride,
                    FORM, B_ROWS, BLOCK_M, BAND, CONSUMERS, STAGES,
                )),
                (_produce, (
                    a, b, a_ring, b_ring, full, empty, table, tiles, row_tiles, M, N, G,
                    FORM, BLOCK_M, BAND, STAGES,
                )),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume, (
                    0, a_ring, b_ring, full, empty, out, a_scales, b_scales, table, tiles,
                    row_tiles, M, N, G, a_row, a_stride, b_stride,
                    FORM, B_ROWS, BLOCK_M, BAND, CONSUMERS, STAGES,
                )),
                (_consume, (
                    1, a_ring, b_ring, full, empty, out, a_scales, b_scales, table, tiles,
                    row_tiles, M, N, G, a_row, a_stride, b_stride,
                    FORM, B_ROWS, BLOCK_M, BAND, CONSUMERS, STAGES,
                )),
                (_consume, (
                    2, a_ring, b_ring, full, empty, out, a_scales, b_scales, table, tiles,
                    row_tiles, M, N, G, a_row, a_stride, b_stride,
                    FORM, B_ROWS, BLOCK_M, BAND, CONSUMERS, STAGES,
                )),
                (_produce, (
                    a, b, a_ring, b_ring, full, empty, table, tiles, row_tiles, M, N, G,
                    FORM, BLOCK_M, BAND, STAGES,
                )),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )  # fmt: skip


def launch(
    a: Fp8, b: Fp8, out: Tensor, shape: Shape, form: int, config: Config, table: Any, total: Any,
    *, row_tiles: int,
) -> None:  # fmt: skip
    """Run the kernel; as ``product.launch``, for operands that are ``product.copyable``."""
    M, N, K, G, experts = shape
    a_scales = a.scales.view(-1, G).T if config.direct else _turned(a.scales)
    b_scales = _turned(b.scales) if b.rows == 1 else b.scales
    b_stride = b_scales.stride(0) if b.rows == 1 else 1
    each = experts if form == ALONG_K.value else 1
    tiles = row_tiles * triton.cdiv(N, config.block_n) * each
    programs = torch.cuda.get_device_properties(out.device).multi_processor_count
    consumers = 3 if config.block_m == 3 * 64 else 2
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    _hopper_kernel[(min(tiles, programs),)](
        TensorDescriptor.from_tensor(a.codes.view(-1, K), [64, TILE], layout),
        TensorDescriptor.from_tensor(b.codes.view(-1, K), [128, TILE], layout),
        out, a_scales, b_scales, table, total, M, N, G,
        a_scales.stride(1), a_scales.stride(0), b_stride, experts,
        form, b.rows, config.block_m, config.band, consumers, config.stages,
        num_warps=4,
    )  # fmt: skip


def _turned(scales: Tensor) -> Tensor:
    """Return scales of rows ``[..., R, G]`` as ``[G + 1, R + room]``: a group's lie side by side.

    A tile that juts out, and an expert without rows at the end, read the room, whatever is there.
    """
    G = scales.shape[-1]
    scales_RG = scales.view(-1, G)
    rows = len(scales_RG)
    turned = scales_RG.new_empty(G + 1, -(-rows // TILE) * TILE + _ROOM)
    turned[:G, :rows] = scales_RG.T
    return turned
