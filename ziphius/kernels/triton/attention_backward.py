"""Gradients of causal attention: no atomics, so the same bits every time.

With ``p`` the weights and ``delta`` a query's ``sum(out * dout)``: ``ds = p (dout v^T - delta)``,
``dq = scale ds k``, ``dk = scale ds^T q``, ``dv = p^T dout``.
"""

# Arguments of kernels have the compiler's types.
# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from ziphius.kernels.triton.attention_blocks import load_rows, masked_scores, scores, store_rows


@triton.jit
def delta_kernel(
    out_ptr, dout_ptr, delta_ptr, out_b, out_h, out_t, dout_b, dout_h, dout_t, H, T,
    DV: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """Compute ``sum(out * dout)`` of every query."""
    blocks = T // OWN
    begin = tl.program_id(0) % blocks * OWN
    head = tl.program_id(0) // blocks
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    at = begin.to(tl.int64)
    out_ptr += b * out_b + h * out_h + at * out_t
    dout_ptr += b * dout_b + h * dout_h + at * dout_t
    out, _ = load_rows(out_ptr, out_t, DV, 0, OWN)
    dout, _ = load_rows(dout_ptr, dout_t, DV, 0, OWN)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    rows = begin + tl.arange(0, OWN)
    tl.store(delta_ptr + head.to(tl.int64) * T + rows, delta)


@triton.jit
def dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, documents_ptr, first_ptr, dq_ptr,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, dout_b, dout_h, dout_t, dq_b, dq_h, dq_t,
    H, T, scale_log2, scale,
    DA: tl.constexpr, DB: tl.constexpr, DV: tl.constexpr,
    DOCUMENTS: tl.constexpr, OWN: tl.constexpr, MET: tl.constexpr,
):  # fmt: skip
    """Sum ``ds k`` of one block of queries over the keys it sees."""
    blocks = T // OWN
    block = blocks - 1 - tl.program_id(0) % blocks
    head = tl.program_id(0) // blocks
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    begin = block * OWN
    at = begin.to(tl.int64)
    k_ptr += b * k_b + h * k_h
    v_ptr += b * v_b + h * v_h
    rows = begin + tl.arange(0, OWN)
    row_ptr = head.to(tl.int64) * T + rows
    qa, qb = load_rows(q_ptr + b * q_b + h * q_h + at * q_t, q_t, DA, DB, OWN)
    dout_ptr += b * dout_b + h * dout_h + at * dout_t
    dout, _ = load_rows(dout_ptr, dout_t, DV, 0, OWN)
    lse = tl.load(lse_ptr + row_ptr)
    delta = tl.load(delta_ptr + row_ptr)
    documents = rows
    start = 0
    if DOCUMENTS:
        documents_ptr += b * T
        documents = tl.load(documents_ptr + rows)
        start = tl.load(first_ptr + b * blocks + block) // MET * MET
    dqa = tl.zeros([OWN, DA], tl.float32)
    dqb = tl.zeros([OWN, DB if DB > 0 else 1], tl.float32)
    dqa, dqb = _dq_meet(
        dqa, dqb, qa, qb, dout, lse, delta, k_ptr, v_ptr, k_t, v_t, documents_ptr, documents,
        start, begin, begin, scale_log2, DA, DB, DV, DOCUMENTS, False, MET,
    )  # fmt: skip
    dqa, dqb = _dq_meet(
        dqa, dqb, qa, qb, dout, lse, delta, k_ptr, v_ptr, k_t, v_t, documents_ptr, documents,
        begin, begin + OWN, begin, scale_log2,
        DA, DB, DV, DOCUMENTS, True, MET,
    )  # fmt: skip
    dq_ptr += b * dq_b + h * dq_h + at * dq_t
    store_rows(dq_ptr, dq_t, dqa * scale, dqb * scale, DA, DB, OWN)


@triton.jit
def _dq_meet(
    dqa, dqb, qa, qb, dout, lse, delta, k_ptr, v_ptr, k_t, v_t, documents_ptr, documents,
    start, end, begin, scale_log2,
    DA: tl.constexpr, DB: tl.constexpr, DV: tl.constexpr,
    DOCUMENTS: tl.constexpr, DIAGONAL: tl.constexpr, MET: tl.constexpr,
):  # fmt: skip
    for met in tl.range(start, end, MET):
        at = tl.cast(met, tl.int64)
        ka, kb = load_rows(k_ptr + at * k_t, k_t, DA, DB, MET)
        v, _ = load_rows(v_ptr + at * v_t, v_t, DV, 0, MET)
        s = scores(qa, qb, ka, kb, DB) * scale_log2
        s = masked_scores(s, documents, documents_ptr, begin, met, DOCUMENTS, DIAGONAL)
        p = tl.exp2(s - lse[:, None])
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        ds = (p * (dp - delta[:, None])).to(ka.dtype)
        dqa = tl.dot(ds, ka, dqa, input_precision="ieee")
        if DB > 0:
            dqb = tl.dot(ds, kb, dqb, input_precision="ieee")
    return dqa, dqb


@triton.jit
def dkdv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, documents_ptr, last_ptr, dk_ptr, dv_ptr,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, dout_b, dout_h, dout_t,
    dk_b, dk_h, dk_t, dv_b, dv_h, dv_t,
    H, T, scale_log2, scale,
    DA: tl.constexpr, DB: tl.constexpr, DV: tl.constexpr,
    DOCUMENTS: tl.constexpr, OWN: tl.constexpr, MET: tl.constexpr,
):  # fmt: skip
    """Sum ``ds^T q`` and ``p^T dout`` of one block of keys over the queries that see it."""
    blocks = T // OWN
    block = tl.program_id(0) % blocks
    head = tl.program_id(0) // blocks
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    begin = block * OWN
    at = begin.to(tl.int64)
    q_ptr += b * q_b + h * q_h
    dout_ptr += b * dout_b + h * dout_h
    lse_ptr += head.to(tl.int64) * T
    delta_ptr += head.to(tl.int64) * T
    ka, kb = load_rows(k_ptr + b * k_b + h * k_h + at * k_t, k_t, DA, DB, OWN)
    v, _ = load_rows(v_ptr + b * v_b + h * v_h + at * v_t, v_t, DV, 0, OWN)
    keys = begin + tl.arange(0, OWN)
    documents = keys
    end = T
    if DOCUMENTS:
        documents_ptr += b * T
        documents = tl.load(documents_ptr + keys)
        end = tl.load(last_ptr + b * blocks + block) + 1
    dka = tl.zeros([OWN, DA], tl.float32)
    dkb = tl.zeros([OWN, DB if DB > 0 else 1], tl.float32)
    dv = tl.zeros([OWN, DV], tl.float32)
    dka, dkb, dv = _dkdv_meet(
        dka, dkb, dv, ka, kb, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, q_t, dout_t,
        documents_ptr, documents, begin, tl.minimum(begin + OWN, end), begin, scale_log2,
        DA, DB, DV, DOCUMENTS, True, MET,
    )  # fmt: skip
    dka, dkb, dv = _dkdv_meet(
        dka, dkb, dv, ka, kb, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, q_t, dout_t,
        documents_ptr, documents, begin + OWN, end, begin, scale_log2,
        DA, DB, DV, DOCUMENTS, False, MET,
    )  # fmt: skip
    dk_ptr += b * dk_b + h * dk_h + at * dk_t
    dv_ptr += b * dv_b + h * dv_h + at * dv_t
    store_rows(dk_ptr, dk_t, dka * scale, dkb * scale, DA, DB, OWN)
    store_rows(dv_ptr, dv_t, dv, dv, DV, 0, OWN)


@triton.jit
def _dkdv_meet(
    dka, dkb, dv, ka, kb, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, q_t, dout_t,
    documents_ptr, documents, start, end, begin, scale_log2,
    DA: tl.constexpr, DB: tl.constexpr, DV: tl.constexpr,
    DOCUMENTS: tl.constexpr, DIAGONAL: tl.constexpr, MET: tl.constexpr,
):  # fmt: skip
    """Scores stand with the keys in rows, so that they multiply from registers."""
    for met in tl.range(start, end, MET):
        at = tl.cast(met, tl.int64)
        qa, qb = load_rows(q_ptr + at * q_t, q_t, DA, DB, MET)
        dout, _ = load_rows(dout_ptr + at * dout_t, dout_t, DV, 0, MET)
        queries = met + tl.arange(0, MET)
        lse = tl.load(lse_ptr + queries)
        delta = tl.load(delta_ptr + queries)
        p = tl.exp2(scores(ka, kb, qa, qb, DB) * scale_log2 - lse[None, :])
        if DIAGONAL:
            keys = begin + tl.arange(0, p.shape[0])
            p = tl.where(queries[None, :] >= keys[:, None], p, 0.0)
        if DOCUMENTS:
            others = tl.load(documents_ptr + queries)
            p = tl.where(documents[:, None] == others[None, :], p, 0.0)
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
        dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
        ds = (p * (dp - delta[None, :])).to(qa.dtype)
        dka = tl.dot(ds, qa, dka, input_precision="ieee")
        if DB > 0:
            dkb = tl.dot(ds, qb, dkb, input_precision="ieee")
    return dka, dkb, dv
