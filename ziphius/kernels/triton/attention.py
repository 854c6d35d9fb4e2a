"""Causal attention over expanded heads, blocks of queries against blocks of keys, and its backward.

Keys have two parts (``DA`` columns, a power of two, and the rest in ``DB``): 192 columns are then
128 and 64 and not 256 with a quarter of nothing. Scores are in units of log 2.
"""

# Arguments of kernels have the compiler's types.
# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ziphius.kernels.kept import KeptOutput
from ziphius.kernels.triton.attention_backward import delta_kernel, dkdv_kernel, dq_kernel
from ziphius.kernels.triton.attention_blocks import (
    load_rows,
    masked_scores,
    reach_kernel,
    scores,
    store_rows,
)

LOG2E = 1.4426950408889634
LEAST_BLOCK = 16  # rows; a product wants as many, so all lengths are whole ones
PUBLISHED_WIDTH = 192 + 128  # of a key and a value: what larger blocks have room for


class Launch(NamedTuple):
    """Rows that a program owns, rows it meets at a time, warps, and stages of the pipeline."""

    own: int
    met: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """How the three large kernels are launched; all own blocks of the same size."""

    forward: Launch
    dq: Launch
    dkdv: Launch

    def whole(self, length: int) -> int:
        """Return the least length that is whole blocks for all three, not below ``length``."""
        block = max(size for launch in self for size in (launch.own, launch.met))
        return -(-length // block) * block


# The first is the choice, the others are what a benchmark may try instead.
HALF_TILES = (
    Tiles(Launch(128, 64, 8, 3), Launch(128, 64, 8, 2), Launch(128, 32, 8, 3)),
    Tiles(Launch(128, 128, 8, 2), Launch(128, 64, 8, 3), Launch(128, 64, 8, 2)),
    Tiles(Launch(64, 64, 4, 2), Launch(64, 64, 4, 2), Launch(64, 32, 4, 2)),
)
# FP32 products have no matrix unit: small blocks, which is also quick under the interpreter.
SINGLE_TILES = Tiles(Launch(32, 32, 4, 1), Launch(32, 16, 4, 1), Launch(32, 16, 4, 1))


def causal_attention_triton(
    q_BHTd: Tensor,
    k_BHTd: Tensor,
    v_BHTv: Tensor,
    scale: float,
    documents_BT: Tensor | None = None,
    kept: KeptOutput | None = None,
    *,
    tiles: Tiles | None = None,
) -> Tensor:
    """Compute what ``causal_attention_reference`` does, FP32 scores, weights rounded like values.

    ``scale`` is positive. Numbers of documents fit 32 bits; blocks of other documents are skipped,
    which pays where the documents of a row stand one after the other. Every head's columns lie
    side by side (else a copy is made); results have the memory ``[B, T, H, v]``.
    """
    T, V = v_BHTv.shape[2:]
    tiles = tiles or choose_tiles(q_BHTd.dtype, q_BHTd.shape[-1] + V)
    wide, padded, length = sum(parts(q_BHTd.shape[-1])), _power(V), tiles.whole(T)
    q_BHTd, k_BHTd = (_padded(x, length, wide) for x in (q_BHTd, k_BHTd))
    v_BHTv = _padded(v_BHTv, length, padded)
    if documents_BT is not None:
        documents_BT = F.pad(documents_BT, (0, length - T), value=-1)
    out_BHTv = _Attention.apply(q_BHTd, k_BHTd, v_BHTv, scale, documents_BT, kept, tiles, T)
    return out_BHTv[:, :, :T, :V]


def _padded(x_BHTd: Tensor, length: int, width: int) -> Tensor:
    """Add zeros up to whole blocks: a GPU read outside of ragged ones, so kernels are given none.

    Keys behind the last position are behind every query; columns of zeros change no score.
    """
    T, d = x_BHTd.shape[2:]
    return x_BHTd if (T, d) == (length, width) else F.pad(x_BHTd, (0, width - d, 0, length - T))


@triton.jit
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    documents_ptr,
    first_ptr,
    q_b,
    q_h,
    q_t,
    k_b,
    k_h,
    k_t,
    v_b,
    v_h,
    v_t,
    out_b,
    out_h,
    out_t,
    H,
    T,
    scale_log2,
    DA: tl.constexpr,
    DB: tl.constexpr,
    DV: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    OWN: tl.constexpr,
    MET: tl.constexpr,
):
    """Attend with one block of queries of one head; blocks with most keys come first."""
    blocks = T // OWN
    block = blocks - 1 - tl.program_id(0) % blocks
    head = tl.program_id(0) // blocks
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    begin = block * OWN
    rows = tl.arange(0, OWN)
    q_ptr += b * q_b + h * q_h + begin.to(tl.int64) * q_t
    k_ptr += b * k_b + h * k_h
    v_ptr += b * v_b + h * v_h
    qa, qb = load_rows(q_ptr, q_t, DA, DB, OWN)
    own_documents = rows
    start = 0
    if DOCUMENTS:
        documents_ptr += b * T
        own_documents = tl.load(documents_ptr + begin + rows)
        start = tl.load(first_ptr + b * blocks + block) // MET * MET
    largest = tl.full([OWN], float("-inf"), tl.float32)
    total = tl.zeros([OWN], tl.float32)
    acc = tl.zeros([OWN, DV], tl.float32)
    # Keys before the block, which all of its queries see; then its own.
    acc, largest, total = _meet(
        acc, largest, total, qa, qb, k_ptr, v_ptr, k_t, v_t, documents_ptr, own_documents,
        start, begin, begin, scale_log2, DA, DB, DV, DOCUMENTS, False, MET,
    )  # fmt: skip
    acc, largest, total = _meet(
        acc, largest, total, qa, qb, k_ptr, v_ptr, k_t, v_t, documents_ptr, own_documents,
        begin, begin + OWN, begin, scale_log2, DA, DB, DV, DOCUMENTS, True, MET,
    )  # fmt: skip
    tl.store(lse_ptr + head.to(tl.int64) * T + begin + rows, largest + tl.log2(total))
    out_ptr += b * out_b + h * out_h + begin.to(tl.int64) * out_t
    out = acc / total[:, None]
    store_rows(out_ptr, out_t, out, out, DV, 0, OWN)


@triton.jit
def _meet(
    acc, largest, total, qa, qb, k_ptr, v_ptr, k_t, v_t, documents_ptr, own_documents,
    start, end, begin, scale_log2,
    DA: tl.constexpr, DB: tl.constexpr, DV: tl.constexpr,
    DOCUMENTS: tl.constexpr, DIAGONAL: tl.constexpr, MET: tl.constexpr,
):  # fmt: skip
    """Take up keys ``start`` to ``end``: the softmax so far is made small by what came larger."""
    for met in tl.range(start, end, MET):
        at = tl.cast(met, tl.int64)
        ka, kb = load_rows(k_ptr + at * k_t, k_t, DA, DB, MET)
        s = scores(qa, qb, ka, kb, DB) * scale_log2
        s = masked_scores(s, own_documents, documents_ptr, begin, met, DOCUMENTS, DIAGONAL)
        larger = tl.maximum(largest, tl.max(s, 1))
        # A query that has seen nothing yet has no largest score to take off.
        shift = tl.where(larger == float("-inf"), 0.0, larger) if DOCUMENTS else larger
        p = tl.exp2(s - shift[:, None])
        shrink = tl.exp2(largest - shift)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        v, _ = load_rows(v_ptr + at * v_t, v_t, DV, 0, MET)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
        largest = larger
    return acc, largest, total


class _Attention(torch.autograd.Function):
    """Keeps its inputs, its output or what ``kept`` makes of it, and one number a query."""

    @staticmethod
    def forward(
        ctx: Any,
        q_BHTd: Tensor,
        k_BHTd: Tensor,
        v_BHTv: Tensor,
        scale: float,
        documents_BT: Tensor | None,
        kept: KeptOutput | None,
        tiles: Tiles,
        length: int,
    ) -> Tensor:
        q_BHTd, k_BHTd, v_BHTv = (_rows(x) for x in (q_BHTd, k_BHTd, v_BHTv))
        B, H, T, _ = q_BHTd.shape
        if documents_BT is not None:
            documents_BT = documents_BT.to(torch.int32).contiguous()
        out_BHTv = _like(v_BHTv)
        lse_BHT = q_BHTd.new_empty(B, H, T, dtype=torch.float32)
        reach = _reach(documents_BT, tiles.forward.own)
        inputs = (q_BHTd, k_BHTd, v_BHTv)
        launch, shape = tiles.forward, _shape(q_BHTd, v_BHTv, documents_BT, tiles.forward)
        if out_BHTv.numel():
            forward_kernel[(B * H * T // launch.own,)](
                *(*inputs, out_BHTv, lse_BHT, documents_BT, reach[0]),
                *_strides(*inputs, out_BHTv),
                *(H, T, scale * LOG2E),
                **shape,
                num_warps=launch.warps,
                num_stages=launch.stages,
            )
        saved = (out_BHTv,) if kept is None else kept.keep(out_BHTv[:, :, :length])
        ctx.save_for_backward(*inputs, lse_BHT, documents_BT, *reach, *saved)
        ctx.scale, ctx.tiles, ctx.kept = scale, tiles, kept
        return out_BHTv

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_BHTd, k_BHTd, v_BHTv, lse_BHT, documents_BT, first, last, *saved = ctx.saved_tensors
        out_BHTv = saved[0] if ctx.kept is None else ctx.kept.restore(tuple(saved), v_BHTv)
        B, H, T, _ = q_BHTd.shape
        dout_BHTv, inputs = _rows(grads[0]), (q_BHTd, k_BHTd, v_BHTv)
        dq_BHTd, dk_BHTd, dv_BHTv = (_like(x) for x in inputs)
        delta_BHT = torch.empty_like(lse_BHT)
        sizes = (H, T, ctx.scale * LOG2E, ctx.scale)
        given = (*inputs, dout_BHTv, lse_BHT, delta_BHT, documents_BT)
        if out_BHTv.numel():
            delta_kernel[(B * H * T // LEAST_BLOCK,)](
                *(out_BHTv, dout_BHTv, delta_BHT, *_strides(out_BHTv, dout_BHTv), H, T),
                DV=v_BHTv.shape[-1],
                OWN=LEAST_BLOCK,
            )
        if q_BHTd.numel():
            for kernel, launch, bounds, outputs in (
                (dkdv_kernel, ctx.tiles.dkdv, last, (dk_BHTd, dv_BHTv)),
                (dq_kernel, ctx.tiles.dq, first, (dq_BHTd,)),
            ):
                kernel[(B * H * T // launch.own,)](
                    *(*given, bounds, *outputs, *_strides(*inputs, dout_BHTv, *outputs), *sizes),
                    **_shape(q_BHTd, v_BHTv, documents_BT, launch),
                    num_warps=launch.warps,
                    num_stages=launch.stages,
                )
        return dq_BHTd, dk_BHTd, dv_BHTv, None, None, None, None, None


def choose_tiles(dtype: torch.dtype, width: int) -> Tiles:
    """Return how kernels are launched; ``width`` is that of a key and a value together."""
    if dtype == torch.float32:
        return SINGLE_TILES
    return HALF_TILES[0] if width <= PUBLISHED_WIDTH else HALF_TILES[-1]


def parts(d: int) -> tuple[int, int]:
    """Split the columns of keys: a power of two, and one that has room for the rest (or zero).

    A product wants 16 columns at least.
    """
    whole = max(16, 1 << (d.bit_length() - 1))
    return whole, _power(d - whole) if d > whole else 0


def _power(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def _shape(q_BHTd: Tensor, v_BHTv: Tensor, documents: Tensor | None, launch: Launch) -> Any:
    DA, DB = parts(q_BHTd.shape[-1])
    return {
        "DA": DA,
        "DB": DB,
        "DV": v_BHTv.shape[-1],
        "DOCUMENTS": documents is not None,
        "OWN": launch.own,
        "MET": launch.met,
    }


def _reach(documents_BT: Tensor | None, own: int) -> tuple[Tensor | None, Tensor | None]:
    """Bound where each block's documents stand: int32 ``[B, blocks]``, first and last position."""
    if documents_BT is None:
        return None, None
    B, T = documents_BT.shape
    first, last = documents_BT.new_empty(2, B, T // own).unbind()
    if first.numel():
        reach_kernel[first.shape](documents_BT, first, last, T, OWN=own, MET=1024)
    return first, last


def _rows(x_BHTd: Tensor) -> Tensor:
    """Have the numbers of a head's position side by side."""
    return x_BHTd if x_BHTd.stride(-1) == 1 else x_BHTd.contiguous()


def _like(x_BHTd: Tensor) -> Tensor:
    """Make a ``[B, H, T, d]`` whose memory is ``[B, T, H, d]``, as projections have it."""
    B, H, T, d = x_BHTd.shape
    return x_BHTd.new_empty(B, T, H, d).transpose(1, 2)


def _strides(*tensors: Tensor) -> list[int]:
    return [x.stride(axis) for x in tensors for axis in range(3)]
