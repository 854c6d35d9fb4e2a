"""The large FP8 product on Hopper with two products on their way for each consumer.

``hopper.py`` says who does what. There a consumer waits for the tensor cores, and they for it:
consumers run in step, so little of what they do between products is hidden. Here two consumers of
64 rows each of a tile of 128 x 128 have the product of the next 128 of K under way while they scale
and add up the one before. (Tiles of 128 x 192, whose 128 and 64 columns took turns, were slower in
every shape, by a fifth to three times.)

At the end of a tile a consumer leaves its rows in shared memory, in BF16, and goes on; the copy
engine stores them. It is waited for when the next tile needs that memory. (A result in FP32, as
gradients of weights are, does not fit there. To keep one consumer a few groups behind, so that it
multiplies while the other stores, was slower in every shape.) Tiles of a nearly empty last round
are cut along K (``tail.py``).

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
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ziphius.kernels.quantize import TILE, Fp8
from ziphius.kernels.triton.gluon_names import BARRIER, LOAD, STORE
from ziphius.kernels.triton.product import Config, Shape
from ziphius.kernels.triton.tail import cut_tail, sum_pieces, uncut, workspace
from ziphius.kernels.triton.tiles import ALONG_K, DENSE, ROWS, locate


@gluon.jit
def _place(
    item, whole, rest, share, table, row_tiles, M, N, G,
    FORM: gl.constexpr, BAND: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    """Return what ``locate`` does, of an item of ``tail.Tail``."""
    behind = gl.maximum(item - whole, 0)
    tile = item
    if TAIL:
        tile = gl.minimum(item, whole + behind % rest)
    expert, row, end, column, first, last = locate(
        tile, table, row_tiles, M, N, G, FORM, 128, 128, BAND
    )
    if TAIL and item >= whole:
        first = behind // rest * share
        last = gl.minimum(first + share, G)
    return expert, row, end, column, first, last


@gluon.jit
def _produce(
    a, b, b_scales, a_ring, b_ring, scale_ring, full, empty, table, items, whole, rest, share,
    row_tiles, M, N, G,
    FORM: gl.constexpr, B_ROWS: gl.constexpr, BAND: gl.constexpr, STAGES: gl.constexpr,
    AT_ONCE: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    SCALES: gl.constexpr = 128 * 4 if B_ROWS == 1 else 0
    slot = 0
    turn = 1
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        expert, row, _, column, first, last = _place(
            item, whole, rest, share, table, row_tiles, M, N, G, FORM, BAND, TAIL
        )
        b_row = column
        if FORM == ROWS:
            b_row += expert * N
        for i in range(gl.cdiv(last - first, AT_ONCE) * AT_ONCE):
            # Behind the last group is nothing: the copy engine writes zeros.
            group = gl.where(first + i < last, first + i, G)
            ready = full.index(slot)
            mbarrier.wait(empty.index(slot), turn)
            mbarrier.expect(ready, (128 + 128) * 128 + SCALES)
            LOAD(a, [row, group * 128], ready, a_ring.index(slot * 2))
            LOAD(a, [row + 64, group * 128], ready, a_ring.index(slot * 2 + 1))
            LOAD(b, [b_row, group * 128], ready, b_ring.index(slot))
            if B_ROWS == 1:
                LOAD(b_scales, [group, b_row], ready, scale_ring.index(slot))
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
def _store(out, x, row, end, column, columns_end, out_shift, width):
    """Store ``x`` from a row and a column on, up to their ends, into rows of ``width`` numbers."""
    rows = row + gl.arange(0, 64, layout=gl.SliceLayout(1, x.type.layout))
    columns = column + gl.arange(0, 128, layout=gl.SliceLayout(0, x.type.layout))
    inside = gl.expand_dims(rows < end, 1) & gl.expand_dims(columns < columns_end, 0)
    at = gl.expand_dims((rows + out_shift).to(gl.int64) * width, 1) + gl.expand_dims(columns, 0)
    gl.store(out + at, x, mask=inside)


@gluon.jit
def _finish(
    out, out_tiles, staged, sums, row, end, column, N, out_shift, FORM: gl.constexpr,
    COPY: gl.constexpr,
):  # fmt: skip
    x = sums.to(out.dtype.element_ty)
    if COPY:
        # The copy engine stores while the next tile is made. First it must have read the last one.
        tma.store_wait(0)
        staged.store(x)
        fence_async_shared()
        if FORM == DENSE or row + 64 <= end:
            # What juts out of the matrix the copy engine leaves out.
            STORE(out_tiles, [row, column], staged)
        else:
            # Behind a segment's end lies the next one. Each thread stores 16 bytes.
            LINES: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
            _store(out, staged.load(LINES), row, end, column, N, 0, N)
    else:
        _store(out, x, row, end, column, N, out_shift, N)


@gluon.jit
def _consume(
    SIDE: gl.constexpr, a_ring, b_ring, scale_ring, staged, full, empty, out, out_tiles,
    parts, a_scales, b_scales, table, items, whole, rest, share, row_tiles, M, N, G,
    FORM: gl.constexpr, B_ROWS: gl.constexpr, BAND: gl.constexpr, STAGES: gl.constexpr,
    AT_ONCE: gl.constexpr, COPY: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    lines = gl.arange(0, 64, layout=gl.SliceLayout(1, MMA))
    nothing = gl.zeros((64, 128), gl.float32, layout=MMA)
    blocks = gl.cdiv(N, 128)
    slot = 0
    turn = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        expert, row, end, column, first, last = _place(
            item, whole, rest, share, table, row_tiles, M, N, G, FORM, BAND, TAIL
        )
        row += SIDE * 64
        # Rows and columns outside take scales from inside: their sums are not stored.
        a_at = a_scales + gl.minimum(row + lines, M - 1).to(gl.int64) * G
        block = 0
        if FORM == ROWS:
            block = expert * blocks
        b_at = b_scales + (block + gl.minimum(column // 128, blocks - 1)) * G
        sums = nothing
        # A partial sum is read while the next is made. Across rounds of the loop the compiler
        # does not see that, and lets every product wait; so a round has several.
        for group in range(first, last, AT_ONCE):
            mbarrier.wait(full.index(slot), turn)
            scale = _scale(a_at, b_at, group, last, B_ROWS)
            part = _multiply(a_ring, b_ring.index(slot), slot * 2 + SIDE, nothing)
            for i in gl.static_range(1, AT_ONCE + 1):
                done = slot
                slot, turn = _advance(slot, turn, STAGES)
                if i < AT_ONCE:
                    mbarrier.wait(full.index(slot), turn)
                    next_scale = _scale(a_at, b_at, group + i, last, B_ROWS)
                    next_part = _multiply(a_ring, b_ring.index(slot), slot * 2 + SIDE, nothing)
                    part, next_part = warpgroup_mma_wait(1, deps=(part, next_part))
                else:
                    part = warpgroup_mma_wait(0, deps=(part,))
                sums = _add(sums, part, scale, scale_ring, done, B_ROWS)
                if i < AT_ONCE:
                    # Waits for nothing more, but says that this is added up first.
                    sums, part = warpgroup_mma_wait(1, deps=(sums, next_part))
                    scale = next_scale
                mbarrier.arrive(empty.index(done))
        out_shift = 0
        if FORM == ALONG_K:
            out_shift = expert * M
        if TAIL and item >= whole:
            _store(parts, sums, SIDE * 64, 128, 0, N - column, (item - whole) * 128, 128)
        else:
            _finish(
                out, out_tiles, staged.index(SIDE), sums, row, end, column, N, out_shift, FORM,
                COPY,
            )  # fmt: skip
    if COPY:
        # The program's memory must stay until the copy engine has read it.
        tma.store_wait(0)


@gluon.jit
def _pairs_kernel(
    a, b, b_scale_rows, out, out_tiles, parts, a_scales, b_scales, table, total, whole, rest, share,
    tail_items, M, N, G, experts,
    FORM: gl.constexpr, B_ROWS: gl.constexpr, BAND: gl.constexpr, STAGES: gl.constexpr,
    AT_ONCE: gl.constexpr, COPY: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    a_ring = gl.allocate_shared_memory(a.dtype, [STAGES * 2, 64, 128], a.layout)
    b_ring = gl.allocate_shared_memory(b.dtype, [STAGES, 128, 128], b.layout)
    scale_ring = b_ring
    if B_ROWS == 1:
        scale_ring = gl.allocate_shared_memory(gl.float32, [STAGES, 1, 128], b_scale_rows.layout)
    staged = b_ring
    if COPY:
        staged = gl.allocate_shared_memory(out_tiles.dtype, [2, 64, 128], out_tiles.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=2)
    BARRIER()
    row_tiles = gl.load(total) if FORM == ROWS else gl.cdiv(M, 128)
    items = row_tiles * gl.cdiv(N, 128)
    if FORM == ALONG_K:
        items *= experts
    if TAIL:
        items = tail_items
    # Written out for every part: the compiler knows no unpacking, and a name would lose constants.
    gl.warp_specialize(
        [
            (_consume, (
                0, a_ring, b_ring, scale_ring, staged, full, empty, out, out_tiles,
                parts, a_scales, b_scales, table, items, whole, rest, share, row_tiles, M, N, G,
                FORM, B_ROWS, BAND, STAGES, AT_ONCE, COPY, TAIL,
            )),
            (_consume, (
                1, a_ring, b_ring, scale_ring, staged, full, empty, out, out_tiles,
                parts, a_scales, b_scales, table, items, whole, rest, share, row_tiles, M, N, G,
                FORM, B_ROWS, BAND, STAGES, AT_ONCE, COPY, TAIL,
            )),
            (_produce, (
                a, b, b_scale_rows, a_ring, b_ring, scale_ring, full, empty, table, items,
                whole, rest, share, row_tiles, M, N, G, FORM, B_ROWS, BAND, STAGES, AT_ONCE,
                TAIL,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def launch(
    a: Fp8, b: Fp8, out: Tensor, shape: Shape, form: int, config: Config, table: Any, total: Any,
    *, row_tiles: int, programs: int,
) -> None:  # fmt: skip
    """Run the kernel on so many multiprocessors; for operands that are ``product.copyable``."""
    M, N, K, G, experts = shape
    each = experts if form == ALONG_K.value else 1
    tiles = row_tiles * triton.cdiv(N, 128) * each
    tail = uncut(tiles, G)
    if form == DENSE.value:
        tail = cut_tail(tiles, programs, G, config.at_once)
    parts = workspace(tail, out.device) if tail.rest else out
    codes = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    b_codes = TensorDescriptor.from_tensor(b.codes.view(-1, K), [128, TILE], codes)
    b_scale_rows = out_tiles = b_codes
    if b.rows == 1:
        rows = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
        b_scale_rows = TensorDescriptor.from_tensor(_turned(b.scales), [1, TILE], rows)
    # In FP32, or beside scales of columns, there is no room for a tile, and in odd rows no way for
    # the copy engine.
    copy_out = out.dtype == torch.bfloat16 and N % 8 == 0 and b.rows != 1
    if copy_out:
        staged = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
        out_tiles = TensorDescriptor.from_tensor(out.view(-1, N), [64, 128], staged)
    # Numbers that mean nothing are zero: kernels are compiled once for each kind of number.
    cuts = (tail.whole, tail.rest, tail.share, tail.items) if tail.rest else (0, 0, 0, 0)
    _pairs_kernel[(min(tail.items, programs),)](
        TensorDescriptor.from_tensor(a.codes.view(-1, K), [64, TILE], codes), b_codes,
        b_scale_rows, out, out_tiles, parts, a.scales, b.scales, table, total,
        *cuts, M, N, G, experts,
        form, b.rows, config.band, config.stages, config.at_once, copy_out, tail.rest > 0,
        num_warps=4,
    )  # fmt: skip
    if tail.rest:
        sum_pieces(parts, out, tail, config.band)


def _turned(scales: Tensor) -> Tensor:
    """Return scales of rows ``[..., R, G]`` as ``[G, R]``, as the copy engine can read them."""
    G = scales.shape[-1]
    scales_RG = scales.view(-1, G)
    rows = len(scales_RG)
    turned = scales_RG.new_empty(G, -(-rows // 4) * 4)
    turned[:, :rows] = scales_RG.T
    return turned[:, :rows]
