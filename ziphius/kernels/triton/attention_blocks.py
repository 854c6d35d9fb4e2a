"""What the kernels of causal attention share: blocks of rows, their scores, and who sees whom."""

# Arguments of kernels have the compiler's types.
# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_rows(ptr, stride, A: tl.constexpr, B: tl.constexpr, ROWS: tl.constexpr):
    """Load ``ROWS`` rows of ``A + B`` columns in two parts; with ``B = 0`` the second is the first.

    All of them are there: callers pad, because a GPU read outside of ragged blocks.
    """
    places = ptr + tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, A)[None, :]
    a = tl.load(places)
    b = a
    if B > 0:
        b = tl.load(ptr + tl.arange(0, ROWS)[:, None] * stride + A + tl.arange(0, B)[None, :])
    return a, b


@triton.jit
def store_rows(ptr, stride, a, b, A: tl.constexpr, B: tl.constexpr, ROWS: tl.constexpr):
    """Store what ``load_rows`` loads, rounded to what ``ptr`` points to."""
    rows = ptr + tl.arange(0, ROWS)[:, None] * stride
    tl.store(rows + tl.arange(0, A)[None, :], a.to(ptr.dtype.element_ty))
    if B > 0:
        tl.store(rows + A + tl.arange(0, B)[None, :], b.to(ptr.dtype.element_ty))


@triton.jit
def scores(xa, xb, ya, yb, B: tl.constexpr):
    """Multiply rows with rows, part by part: ``[rows of x, rows of y]`` in FP32."""
    s = tl.dot(xa, tl.trans(ya), input_precision="ieee")
    if B > 0:
        s = tl.dot(xb, tl.trans(yb), s, input_precision="ieee")
    return s


@triton.jit
def masked_scores(
    s, own_documents, documents_ptr, begin, met,
    DOCUMENTS: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    """Hide from queries (rows of ``s``, from ``begin``) keys (from ``met``) they may not see."""
    if DIAGONAL:
        queries = begin + tl.arange(0, s.shape[0])
        keys = met + tl.arange(0, s.shape[1])
        s = tl.where(queries[:, None] >= keys[None, :], s, float("-inf"))
    if DOCUMENTS:
        keys = met + tl.arange(0, s.shape[1])
        documents = tl.load(documents_ptr + keys)
        s = tl.where(own_documents[:, None] == documents[None, :], s, float("-inf"))
    return s


@triton.jit
def reach_kernel(documents_ptr, first_ptr, last_ptr, T, OWN: tl.constexpr, MET: tl.constexpr):
    """Find the first and the last position whose document could be one of a block's.

    That is: lies between the block's least and greatest. Padding, -1, stands behind the documents,
    so it counts as the greatest. ``T`` is whole blocks of ``OWN``.
    """
    b = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    documents_ptr += b * T
    own = block * OWN + tl.arange(0, OWN)
    documents = _behind(tl.load(documents_ptr + own))
    least, greatest = tl.min(documents, 0), tl.max(documents, 0)
    first = tl.cast(T, tl.int32)
    last = tl.cast(0, tl.int32)
    for met in tl.range(0, T, MET):
        at = met + tl.arange(0, MET)
        others = _behind(tl.load(documents_ptr + at, at < T, other=0))
        near = (others >= least) & (others <= greatest) & (at < T)
        first = tl.minimum(first, tl.min(tl.where(near, at, T), 0))
        last = tl.maximum(last, tl.max(tl.where(near, at, 0), 0))
    tl.store(first_ptr + b * tl.num_programs(1) + block, first)
    tl.store(last_ptr + b * tl.num_programs(1) + block, last)


@triton.jit
def _behind(documents):
    return tl.where(documents < 0, 0x7FFFFFFF, documents)
