"""The large FP8 product on Hopper, in Gluon, which says which warp does what.

One warp feeds shared memory through the copy engine; three consumers of four warps each own 64 of
the 192 rows of a tile of 128 columns. A consumer multiplies 128 of K in the tensor cores, waits,
and adds the partial sum, scaled, to its FP32 registers. Meanwhile the tensor cores work for the
others, which Triton's own schedule, with barriers for all warps in every step, does not do.

Measured on an H200, 128 of K take about 1050 cycles, of which the tensor cores are at work in 768:
consumers run in step. So ``hopper_pairs`` is faster but where its smaller tiles leave a rest.
(256 rows, 128 a consumer of two, do not fit in registers and are half as fast.)

Programs stay and take one tile after the other, so that loading goes on while sums are stored.
"""

# Arguments of kernels have the compiler's types.
# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ziphius.kernels.quantize import TILE, Fp8
from ziphius.kernels.triton.gluon_names import BARRIER, LOAD
from ziphius.kernels.triton.product import Config, Shape
from ziphius.kernels.triton.tiles import ALONG_K, ROWS, locate

# Rows of a tile; and, of each consumer, of what is copied at a time.
_HEIGHT = gl.constexpr(192)
_EACH = gl.constexpr(64)


@gluon.jit
def _produce(
    a, b, a_ring, b_ring, full, empty, table, tiles, row_tiles, M, N, G,
    FORM: gl.constexpr, BAND: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    slot = 0
    turn = 1
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        expert, row, _, column, first, last = locate(
            tile, table, row_tiles, M, N, G, FORM, _HEIGHT, 128, BAND
        )
        b_row = column
        if FORM == ROWS:
            b_row += expert * N
        for group in range(first, last):
            ready = full.index(slot)
            mbarrier.wait(empty.index(slot), turn)
            mbarrier.expect(ready, (_HEIGHT + 128) * 128)
            for i in gl.static_range(3):
                LOAD(a, [row + i * _EACH, group * 128], ready, a_ring.index(slot * 3 + i))
            LOAD(b, [b_row, group * 128], ready, b_ring.index(slot))
            slot += 1
            if slot == STAGES:
                slot = 0
                turn ^= 1


@gluon.jit
def _store(out, sums, row, end, column, N):
    # Neighbours in a row lie in other threads: BF16 is rearranged so that each stores 16 bytes.
    x = sums.to(out.dtype.element_ty)
    if out.dtype.element_ty == gl.bfloat16:
        x = gl.convert_layout(x, gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0]))
    rows = row + gl.arange(0, 64, layout=gl.SliceLayout(1, x.type.layout))
    columns = column + gl.arange(0, 128, layout=gl.SliceLayout(0, x.type.layout))
    inside = gl.expand_dims(rows < end, 1) & gl.expand_dims(columns < N, 0)
    at = gl.expand_dims(rows.to(gl.int64) * N, 1) + gl.expand_dims(columns, 0)
    gl.store(out + at, x, mask=inside)


@gluon.jit
def _consume(
    SIDE: gl.constexpr, a_ring, b_ring, full, empty, out, a_scales, b_scales, table, tiles,
    row_tiles, M, N, G, a_stride,
    FORM: gl.constexpr, BAND: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    lines = gl.arange(0, 64, layout=gl.SliceLayout(1, MMA))
    nothing = gl.zeros((64, 128), gl.float32, layout=MMA)
    slot = 0
    turn = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        expert, row, end, column, first, last = locate(
            tile, table, row_tiles, M, N, G, FORM, _HEIGHT, 128, BAND
        )
        row += SIDE * _EACH
        # Rows outside take scales from inside: their sums are not stored.
        a_scale_at = a_scales + gl.minimum(row + lines, M - 1).to(gl.int64)
        block = column // 128
        if FORM == ROWS:
            block += expert * gl.cdiv(N, 128)
        b_scale_at = b_scales + block * G
        sums = nothing
        # Scales of rows are loaded a step ahead: products would wait behind them.
        a_scale = gl.load(a_scale_at)
        b_scale = gl.load(b_scale_at)
        for group in range(first, last):
            scale = a_scale * b_scale
            if group + 1 < last:
                a_scale_at += a_stride
                b_scale_at += 1
            a_scale = gl.load(a_scale_at)
            b_scale = gl.load(b_scale_at)
            mbarrier.wait(full.index(slot), turn)
            a_codes = a_ring.index(slot * 3 + SIDE)
            b_codes = b_ring.index(slot).permute((1, 0))
            part = warpgroup_mma(a_codes, b_codes, nothing, use_acc=False, is_async=True)
            part = warpgroup_mma_wait(0, deps=(part,))
            mbarrier.arrive(empty.index(slot))
            sums += part * gl.expand_dims(scale, 1)
            slot += 1
            if slot == STAGES:
                slot = 0
                turn ^= 1
        _store(out, sums, row, end, column, N)


@gluon.jit
def _hopper_kernel(
    a, b, out, a_scales, b_scales, table, total, M, N, G, a_stride,
    FORM: gl.constexpr, BAND: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    a_ring = gl.allocate_shared_memory(a.dtype, [STAGES * 3, 64, 128], a.layout)
    b_ring = gl.allocate_shared_memory(b.dtype, [STAGES, 128, 128], b.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=3)
    BARRIER()
    row_tiles = gl.load(total) if FORM == ROWS else gl.cdiv(M, _HEIGHT)
    tiles = row_tiles * gl.cdiv(N, 128)
    # Written out for every part: the compiler knows no unpacking, and a name would lose constants.
    gl.warp_specialize(
        [
            (_consume, (
                0, a_ring, b_ring, full, empty, out, a_scales, b_scales, table, tiles,
                row_tiles, M, N, G, a_stride, FORM, BAND, STAGES,
            )),
            (_consume, (
                1, a_ring, b_ring, full, empty, out, a_scales, b_scales, table, tiles,
                row_tiles, M, N, G, a_stride, FORM, BAND, STAGES,
            )),
            (_consume, (
                2, a_ring, b_ring, full, empty, out, a_scales, b_scales, table, tiles,
                row_tiles, M, N, G, a_stride, FORM, BAND, STAGES,
            )),
            (_produce, (
                a, b, a_ring, b_ring, full, empty, table, tiles, row_tiles, M, N, G,
                FORM, BAND, STAGES,
            )),
        ],
        [4, 4, 1],
        [160, 160, 24],
    )  # fmt: skip


def launch(
    a: Fp8, b: Fp8, out: Tensor, shape: Shape, form: int, config: Config, table: Any, total: Any,
    *, row_tiles: int, programs: int,
) -> None:  # fmt: skip
    """Run the kernel on so many multiprocessors; for operands that are ``product.copyable``.

    ``b`` has scales of blocks; segments are of rows.
    """
    assert (b.rows, config.block_m) == (TILE, _HEIGHT.value)
    assert form != ALONG_K.value
    M, N, K, G, _ = shape
    a_scales = _turned(a.scales)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    _hopper_kernel[(min(row_tiles * triton.cdiv(N, 128), programs),)](
        TensorDescriptor.from_tensor(a.codes.view(-1, K), [64, TILE], layout),
        TensorDescriptor.from_tensor(b.codes.view(-1, K), [128, TILE], layout),
        out, a_scales, b.scales, table, total, M, N, G, a_scales.stride(0),
        form, config.band, config.stages,
        num_warps=4,
    )  # fmt: skip


def _turned(scales: Tensor) -> Tensor:
    """Return scales of rows ``[..., R, G]`` as ``[G, R]``: a group's lie side by side."""
    return scales.view(-1, scales.shape[-1]).T.contiguous()
