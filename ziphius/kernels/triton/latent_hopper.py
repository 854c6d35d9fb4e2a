"""Attention over the paged latent cache on Hopper, in Gluon, which says which warp does what.

One warp feeds shared memory through the copy engine, 32 rows of the cache at a time in four places;
two consumers of four warps each share a tile of 64 rows of queries and heads. Of 64 keys a consumer
scores 32, both exchange largest scores and weights through shared memory, and each then adds up
256 of the 512 columns of values, so that sums (128 registers a thread) fit beside everything else.
The key is the value: what was copied once serves both products.

Tiles with fewer rows are padded: what the tensor cores do for nothing hides behind the copies (64
keys are 2200 cycles of products, and about 4300 of a multiprocessor's share of memory bandwidth).
For 64 keys shared memory is read for about 1750 cycles in the first product and 600 in the second.
"""

# Arguments of kernels have the compiler's types.
# mypy: allow-untyped-defs

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ziphius.kernels.latent import LatentPages
from ziphius.kernels.triton.gluon_names import BARRIER, LOAD

ROWS = 64  # queries times heads of a program
COLUMNS, TURNED = 512, 64  # of a row of the cache: key and value, and key only
PIECE = 32  # rows of the cache of one copy; a page holds whole ones
_SLOTS = 2  # of two pieces each, one a consumer: no third fits beside the queries


@gluon.jit
def _produce(
    queries, turned_queries, halves, turns, tables, q_left, q_right, q_turned, left, right, turned,
    q_ready, full, empty, place, begin, end,
    PAGE: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    if begin < end:
        mbarrier.expect(q_ready, 64 * 576 * 2)
        LOAD(queries, [place, 0], q_ready, q_left)
        LOAD(queries, [place, 256], q_ready, q_right)
        LOAD(turned_queries, [place, 512], q_ready, q_turned)
    slot = 0
    turn = 1
    for met in range(begin, end, 64):
        # Behind the end some row that exists is read, not what no page is.
        first_row = _row(tables, met, end, PAGE)
        second_row = _row(tables, met + 32, end, PAGE)
        for i in gl.static_range(2):
            at = slot * 2 + i
            row = first_row if i == 0 else second_row
            ready = full.index(at)
            mbarrier.wait(empty.index(at), turn)
            mbarrier.expect(ready, 32 * 576 * 2)
            LOAD(halves, [row, 0], ready, left.index(at))
            LOAD(halves, [row, 256], ready, right.index(at))
            LOAD(turns, [row, 512], ready, turned.index(at))
        slot += 1
        if slot == SLOTS:
            slot = 0
            turn ^= 1


@gluon.jit
def _row(tables, key, end, PAGE: gl.constexpr):
    page = gl.load(tables + gl.minimum(key // PAGE, (end - 1) // PAGE)).to(gl.int32)
    return page * PAGE + key % PAGE


@gluon.jit
def _positions(sequences, positions, sequence, place, rows, limit, N, H):
    """Return the positions of a tile's rows, -1 for those that are not the program's."""
    token = (place + rows) // H
    inside = (rows < limit) & (token < N)
    own = inside & (gl.load(sequences + token, mask=inside, other=-1) == sequence)
    return gl.load(positions + token, mask=own, other=-1).to(gl.int32)


@gluon.jit
def _meet(barrier, phase):
    """Wait for the other consumer; what either wrote to shared memory before can then be read."""
    BARRIER()
    mbarrier.arrive(barrier, count=1)
    mbarrier.wait(barrier, phase)
    return phase ^ 1


@gluon.jit
def _clear(values, met, first, end):
    """Zero what is no key: it may be anything, NaN too, and no weight makes that zero."""
    LINES: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
    keys = met + gl.arange(0, 32, layout=gl.SliceLayout(1, LINES))
    x = values.load(LINES)
    there = gl.expand_dims((keys >= first) & (keys < end), 1)
    values.store(gl.where(there, x, gl.zeros_like(x)))


@gluon.jit
def _consume(
    SIDE: gl.constexpr, q_left, q_right, q_turned, left, right, turned, largest_ring, weights,
    q_ready, full, empty, met_largest, met_weights, out, lse_out, sequences, positions_in, sequence,
    place, limit, begin, end, first, N, H, scale_log2, part,
    SLOTS: gl.constexpr,
):  # fmt: skip
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 32, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    LINES: gl.constexpr = gl.SliceLayout(1, SCORES)
    if SIDE == 0:
        values = left
        room = q_left
    else:
        values = right
        room = q_right
    rows = gl.arange(0, 64, layout=LINES)
    positions = _positions(sequences, positions_in, sequence, place, rows, limit, N, H)
    nothing = gl.zeros((64, 32), gl.float32, layout=SCORES)
    sums = gl.zeros((64, 256), gl.float32, layout=SUMS)
    largest = gl.full((64,), float("-inf"), gl.float32, layout=LINES)
    total = gl.zeros((64,), gl.float32, layout=LINES)
    slot = 0
    turn = 0
    phase = 0
    weights_phase = 0
    if begin < end:
        mbarrier.wait(q_ready, 0)
    for met in range(begin, end, 64):
        at = slot * 2 + SIDE
        mbarrier.wait(full.index(at), turn)
        s = warpgroup_mma(
            q_left, left.index(at).permute((1, 0)), nothing, use_acc=False, is_async=True
        )
        s = warpgroup_mma(q_right, right.index(at).permute((1, 0)), s, is_async=True)
        s = warpgroup_mma(q_turned, turned.index(at).permute((1, 0)), s, is_async=True)
        s = warpgroup_mma_wait(0, deps=(s,))
        keys = met + SIDE * 32 + gl.arange(0, 32, layout=gl.SliceLayout(0, SCORES))
        keys_1k = gl.expand_dims(keys, 0)
        seen = (keys_1k <= gl.expand_dims(positions, 1)) & (keys_1k >= first)
        s = gl.where(seen, s * scale_log2, float("-inf"))
        mine = gl.max(s, 1)
        largest_ring.index(SIDE).store(mine)
        phase = _meet(met_largest, phase)
        larger = gl.maximum(gl.maximum(mine, largest_ring.index(1 - SIDE).load(LINES)), largest)
        # A query that has seen nothing yet has no largest score to take off.
        shift = gl.where(larger == float("-inf"), 0.0, larger)
        p = gl.exp2(s - gl.expand_dims(shift, 1))
        shrink = gl.exp2(largest - shift)
        total = total * shrink + gl.sum(p, 1)
        largest = larger
        weights.index(SIDE).store(p.to(gl.bfloat16))
        mbarrier.wait(full.index(slot * 2 + 1 - SIDE), turn)
        if (met < first) | (met + 64 > end):
            _clear(values.index(slot * 2), met, first, end)
            _clear(values.index(slot * 2 + 1), met + 32, first, end)
        fence_async_shared()
        sums *= gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, SUMS)), 1)
        weights_phase = _meet(met_weights, weights_phase)
        sums = warpgroup_mma(weights.index(0), values.index(slot * 2), sums, is_async=True)
        sums = warpgroup_mma(weights.index(1), values.index(slot * 2 + 1), sums, is_async=True)
        # The first piece is copied over while the second is multiplied.
        sums = warpgroup_mma_wait(1, deps=(sums,))
        mbarrier.arrive(empty.index(slot * 2), count=1)
        sums = warpgroup_mma_wait(0, deps=(sums,))
        mbarrier.arrive(empty.index(slot * 2 + 1), count=1)
        slot += 1
        if slot == SLOTS:
            slot = 0
            turn ^= 1
    largest_ring.index(SIDE).store(total)
    _meet(met_largest, phase)
    total += largest_ring.index(1 - SIDE).load(LINES)
    divisor = gl.where(total == 0.0, 1.0, total)
    sums /= gl.expand_dims(gl.convert_layout(divisor, gl.SliceLayout(1, SUMS)), 1)
    out += part * N * H * 512 + SIDE * 256
    own = positions >= 0
    if SIDE == 0:
        lse = gl.where(total == 0.0, float("-inf"), largest + gl.log2(divisor))
        gl.store(lse_out + part * N * H + place + rows, lse, mask=own)
    if out.dtype.element_ty == gl.bfloat16:
        # Neighbours in a row lie in other threads; no query is needed any more, so there is room.
        WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
        room.store(sums.to(gl.bfloat16))
        BARRIER()
        wide_rows = gl.arange(0, 64, layout=gl.SliceLayout(1, WIDE))
        wide = _positions(sequences, positions_in, sequence, place, wide_rows, limit, N, H)
        _store(out, room.load(WIDE), wide_rows, wide >= 0, place, WIDE)
    elif begin < end:
        # What nothing was read of is not read either.
        _store(out, sums, gl.convert_layout(rows, gl.SliceLayout(1, SUMS)),
               gl.convert_layout(own, gl.SliceLayout(1, SUMS)), place, SUMS)  # fmt: skip


@gluon.jit
def _store(out, x, rows, own, place, LAYOUT: gl.constexpr):
    columns = gl.arange(0, 256, layout=gl.SliceLayout(0, LAYOUT))
    at = gl.expand_dims((place + rows).to(gl.int64) * 512, 1) + gl.expand_dims(columns, 0)
    inside = gl.expand_dims(own, 1) & gl.expand_dims(columns >= 0, 0)
    gl.store(out + at, x, mask=inside)


@gluon.jit
def _rank(sequences, token, sequence):
    """Count the tokens of its sequence that stand before a token."""
    before = gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [4], [0]))
    rank = token * 0
    found = rank + 128
    while found == 128:
        at = token - rank - 1 - before
        others = gl.load(sequences + at, mask=at >= 0, other=-1)
        found = gl.min(gl.where(others == sequence, 128, before), 0)
        rank += found
    return rank


@gluon.jit
def hopper_attend_kernel(
    queries, turned_queries, halves, turns, tables, sequences, positions, out, lse,
    tables_row, N, H, first, scale_log2,
    PAGE: gl.constexpr, QUERIES: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """As ``latent_attend.attend_kernel``, for rows of 512 + 64 columns and pages of whole pieces.

    A tile's rows lie side by side: all heads of up to ``QUERIES`` neighbours, or 64 of one token's.
    """
    blocks = gl.cdiv(H, 64)
    token = gl.program_id(0) // blocks
    place = token * H + gl.program_id(0) % blocks * 64
    sequence = gl.load(sequences + token)
    limit = gl.minimum(QUERIES * H, (token + 1) * H - place) if QUERIES == 1 else QUERIES * H
    if QUERIES > 1:
        limit = gl.where(_rank(sequences, token, sequence) % QUERIES == 0, limit, 0)
    lines = gl.arange(0, 64, layout=gl.BlockedLayout([1], [32], [4], [0]))
    last = gl.max(_positions(sequences, positions, sequence, place, lines, limit, N, H), 0)
    aligned = first // 64 * 64
    size = gl.cdiv(gl.cdiv(gl.maximum(last + 1 - aligned, 0), 64), gl.num_programs(1)) * 64
    begin = aligned + gl.program_id(1) * size
    end = gl.minimum(begin + size, last + 1)
    tables += sequence * tables_row
    q_left = gl.allocate_shared_memory(gl.bfloat16, [64, 256], queries.layout)
    q_right = gl.allocate_shared_memory(gl.bfloat16, [64, 256], queries.layout)
    q_turned = gl.allocate_shared_memory(gl.bfloat16, [64, 64], queries.layout)
    left = gl.allocate_shared_memory(gl.bfloat16, [SLOTS * 2, 32, 256], halves.layout)
    right = gl.allocate_shared_memory(gl.bfloat16, [SLOTS * 2, 32, 256], halves.layout)
    turned = gl.allocate_shared_memory(gl.bfloat16, [SLOTS * 2, 32, 64], halves.layout)
    HALF: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=2)
    weights = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 32], HALF)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    largest = gl.allocate_shared_memory(gl.float32, [2, 64], FLAT)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS * 2, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS * 2, 1], mbarrier.MBarrierLayout())
    singles = gl.allocate_shared_memory(gl.int64, [3, 1], mbarrier.MBarrierLayout())
    for piece in gl.static_range(SLOTS * 2):
        mbarrier.init(full.index(piece), count=1)
        mbarrier.init(empty.index(piece), count=2)
    q_ready = singles.index(0)
    met_largest = singles.index(1)
    met_weights = singles.index(2)
    mbarrier.init(q_ready, count=1)
    mbarrier.init(met_largest, count=2)
    mbarrier.init(met_weights, count=2)
    BARRIER()
    part = gl.program_id(1).to(gl.int64)
    # Written out for every part: the compiler knows no unpacking, and a name would lose constants.
    gl.warp_specialize(
        [
            (_consume, (
                0, q_left, q_right, q_turned, left, right, turned, largest, weights, q_ready, full,
                empty, met_largest, met_weights, out, lse, sequences, positions, sequence, place,
                limit, begin, end, first, N, H, scale_log2, part, SLOTS,
            )),
            (_consume, (
                1, q_left, q_right, q_turned, left, right, turned, largest, weights, q_ready, full,
                empty, met_largest, met_weights, out, lse, sequences, positions, sequence, place,
                limit, begin, end, first, N, H, scale_log2, part, SLOTS,
            )),
            (_produce, (
                queries, turned_queries, halves, turns, tables, q_left, q_right, q_turned, left,
                right, turned, q_ready, full, empty, place, begin, end, PAGE, SLOTS,
            )),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip


def launch(
    q_NHc: Tensor, cache: LatentPages, part_SNHC: Tensor, lse_SNH: Tensor, scale_log2: float,
    *, queries: int, grid: tuple[int, int],
) -> None:  # fmt: skip
    """Run the kernel over programs of up to 64 rows, and parts of sequences."""
    N, H, width = q_NHc.shape
    pages = cache.pages
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    q_rows, rows = q_NHc.view(-1, width), pages.view(-1, width)
    hopper_attend_kernel[grid](
        TensorDescriptor.from_tensor(q_rows, [ROWS, COLUMNS // 2], layout),
        TensorDescriptor.from_tensor(q_rows, [ROWS, TURNED], layout),
        TensorDescriptor.from_tensor(rows, [PIECE, COLUMNS // 2], layout),
        TensorDescriptor.from_tensor(rows, [PIECE, TURNED], layout),
        cache.tables, cache.sequence_N, cache.position_N, part_SNHC, lse_SNH,
        cache.tables.stride(0), N, H, cache.first, scale_log2,
        pages.shape[1], queries, _SLOTS,
        num_warps=4,
    )  # fmt: skip
