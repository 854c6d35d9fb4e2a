"""MLA's attention in the absorbed form over pages: parts of a sequence, then their sum."""

# Arguments of kernels have the compiler's types.
# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def attend_kernel(
    q_ptr, pages_ptr, tables_ptr, sequence_ptr, position_ptr, out_ptr, lse_ptr,
    tables_row, N, H, first, scale_log2,
    C: tl.constexpr, R: tl.constexpr, CP: tl.constexpr, RP: tl.constexpr, PAGE: tl.constexpr,
    QUERIES: tl.constexpr, HEADS: tl.constexpr, MET: tl.constexpr, KEYS_FIRST: tl.constexpr,
):  # fmt: skip
    """Attend with up to ``QUERIES`` neighbours of a sequence to one part of its rows.

    There is a program for every token; those whose token is no first of a group have nothing to do.
    Without a cut the result is final, else it is FP32, with its log-sum-exp (of base 2).
    """
    blocks = tl.cdiv(H, HEADS)
    token = tl.program_id(0) // blocks
    sequence = tl.load(sequence_ptr + token)
    if _rank(sequence_ptr, token, sequence, QUERIES) % QUERIES != 0:
        return
    rows = tl.arange(0, QUERIES * HEADS)
    tokens = token + rows // HEADS
    heads = tl.program_id(0) % blocks * HEADS + rows % HEADS
    inside = (tokens < N) & (heads < H)
    own = inside & (tl.load(sequence_ptr + tokens, inside, other=-1) == sequence)
    positions = tl.load(position_ptr + tokens, own, other=-1).to(tl.int32)
    begin, end = _part(first, tl.max(positions, 0) + 1, MET)
    place = tokens.to(tl.int64) * H + heads
    width: tl.constexpr = C + R
    columns = tl.arange(0, CP)
    turned = tl.arange(0, RP)
    q_ptr += place[:, None] * width
    qc = tl.load(q_ptr + columns[None, :], own[:, None] & (columns < C)[None, :], other=0.0)
    qr = tl.load(q_ptr + C + turned[None, :], own[:, None] & (turned < R)[None, :], other=0.0)
    largest = tl.full([QUERIES * HEADS], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES * HEADS], tl.float32)
    ROWS: tl.constexpr = QUERIES * HEADS
    acc = tl.zeros([CP, ROWS] if KEYS_FIRST else [ROWS, CP], tl.float32)
    tables_ptr += sequence * tables_row
    for met in tl.range(begin, end, MET):
        keys = met + tl.arange(0, MET)
        there = (keys >= first) & (keys < end)
        row_ptr = _rows(pages_ptr, tables_ptr, met, keys, there, PAGE, MET, C + R)
        # What no key is may be anything, NaN too, and zero weight does not make that zero.
        kc = _load(row_ptr + columns[None, :], there, columns, C, CP)
        kr = _load(row_ptr + C + turned[None, :], there, turned, R, RP)
        if KEYS_FIRST:
            s = tl.dot(kc, tl.trans(qc), input_precision="ieee")
            s = tl.dot(kr, tl.trans(qr), s, input_precision="ieee")
            seen = (keys[:, None] <= positions[None, :]) & (keys >= first)[:, None]
            p, shrink, largest, total = _soften(s, seen, scale_log2, largest, total, 0)
            acc = tl.dot(tl.trans(kc), p.to(kc.dtype), acc * shrink, input_precision="ieee")
        else:
            s = tl.dot(qc, tl.trans(kc), input_precision="ieee")
            s = tl.dot(qr, tl.trans(kr), s, input_precision="ieee")
            seen = (keys[None, :] <= positions[:, None]) & (keys >= first)[None, :]
            p, shrink, largest, total = _soften(s, seen, scale_log2, largest, total, 1)
            acc = tl.dot(p.to(kc.dtype), kc, acc * shrink, input_precision="ieee")
    if KEYS_FIRST:
        acc = tl.trans(acc)
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    part = tl.program_id(1).to(tl.int64) * N * H
    out_ptr += (part + place)[:, None] * C + columns[None, :]
    tl.store(out_ptr, out.to(out_ptr.dtype.element_ty), own[:, None] & (columns < C)[None, :])
    lse = tl.where(
        total == 0.0, float("-inf"), largest + tl.log2(tl.where(total > 0.0, total, 1.0))
    )
    tl.store(lse_ptr + part + place, lse, own)


@triton.jit
def _soften(s, seen, scale_log2, largest, total, KEYS: tl.constexpr):
    """Turn scores into weights, those so far to be shrunk; ``KEYS`` is the axis of keys."""
    s = tl.where(seen, s * scale_log2, float("-inf"))
    larger = tl.maximum(largest, tl.max(s, KEYS))
    # A query that has seen nothing yet has no largest score to take off.
    shift = tl.where(larger == float("-inf"), 0.0, larger)
    p = tl.exp2(s - tl.expand_dims(shift, KEYS))
    shrink = tl.exp2(largest - shift)
    total = total * shrink + tl.sum(p, KEYS)
    return p, tl.expand_dims(shrink, KEYS), larger, total


@triton.jit
def merge_kernel(part_ptr, lse_ptr, out_ptr, rows, parts, C: tl.constexpr, CP: tl.constexpr):
    """Sum the parts of one row, each by its share of all weights, eight at a time, in order."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, CP)
    largest = tl.cast(float("-inf"), tl.float32)
    total = tl.cast(0.0, tl.float32)
    acc = tl.zeros([CP], tl.float32)
    for first in tl.range(0, parts, 8):
        part = first + tl.arange(0, 8)
        place = part.to(tl.int64) * rows + row
        lse = tl.load(lse_ptr + place, part < parts, other=float("-inf"))
        # A part that nothing was read of is not written either.
        inside = (lse > float("-inf"))[:, None] & (columns < C)[None, :]
        x = tl.load(part_ptr + place[:, None] * C + columns[None, :], inside, other=0.0)
        larger = tl.maximum(largest, tl.max(lse, 0))
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        weight = tl.exp2(lse - shift)
        shrink = tl.exp2(largest - shift)
        total = total * shrink + tl.sum(weight, 0)
        acc = acc * shrink + tl.sum(x * weight[:, None], 0)
        largest = larger
    out = acc / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + row * C + columns, out.to(out_ptr.dtype.element_ty), columns < C)


@triton.jit
def _rank(sequence_ptr, token, sequence, QUERIES: tl.constexpr):
    """Count the tokens of its sequence that stand before a token; none are looked for if alone."""
    rank = tl.cast(0, tl.int32)
    found = tl.cast(128 if QUERIES > 1 else 0, tl.int32)
    while found == 128:
        before = tl.arange(0, 128)
        at = token - rank - 1 - before
        others = tl.load(sequence_ptr + at, at >= 0, other=-1)
        found = tl.min(tl.where(others == sequence, 128, before), 0)
        rank += found
    return rank


@triton.jit
def _part(first, end, MET: tl.constexpr):
    """Return where this program's part of the rows ``first`` to ``end`` begins and ends.

    Parts are equal but for the last ones, which may be short or empty.
    """
    aligned = first // MET * MET
    size = tl.cdiv(tl.cdiv(end - aligned, MET), tl.num_programs(1)) * MET
    begin = aligned + tl.program_id(1) * size
    return begin, tl.minimum(begin + size, end)


@triton.jit
def _rows(
    pages_ptr, tables_ptr, met, keys, there,
    PAGE: tl.constexpr, MET: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Point to the rows of keys; those of a block are of one page where a page has whole blocks."""
    if PAGE % MET == 0:
        row = tl.load(tables_ptr + met // PAGE) * PAGE + met % PAGE
        return pages_ptr + row * WIDTH + tl.arange(0, MET)[:, None] * WIDTH
    row = tl.load(tables_ptr + keys // PAGE, there, other=0) * PAGE + keys % PAGE
    return pages_ptr + row[:, None] * WIDTH


@triton.jit
def _load(ptr, rows, columns, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    if WIDTH == PADDED:
        return tl.load(ptr, rows[:, None], other=0.0)
    return tl.load(ptr, rows[:, None] & (columns < WIDTH)[None, :], other=0.0)
