"""Queries and keys of every head out of the up-projections on a GPU, and the way back.

Only what changes is moved. Values stay where they are, and so do the queries if the caller gives
their memory away: their rotary part is turned in its place. A head's position then costs
``2 R + nope + (nope + R)`` numbers instead of ``2 (nope + R) + 2 (nope + v) + R``: 448 instead of
960 at the published widths.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

# Numbers without a rotary part that a program takes at a time, of one token's heads.
NUMBERS = 4096
NUMBERS_BACK = 2048
WARPS = 4


class _Expand(torch.autograd.Function):
    """The map is linear: nothing but the angles is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        q_BTHd: Tensor,
        kv_BTHo: Tensor,
        k_rope_BTR: Tensor,
        cos_Tr: Tensor,
        sin_Tr: Tensor,
        own_q: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        own_q = own_q and q_BTHd.is_contiguous()
        given, kv_BTHo = q_BTHd.contiguous(), kv_BTHo.contiguous()
        cos_Tr, sin_Tr = cos_Tr.contiguous(), sin_Tr.contiguous()
        B, T, H, d = given.shape
        R = k_rope_BTR.shape[-1]
        k_rope_NR = k_rope_BTR.reshape(-1, R)
        if k_rope_NR.stride(-1) != 1:
            k_rope_NR = k_rope_NR.contiguous()
        if own_q:
            # Whoever has saved the queries as they came shall notice. The result is a tensor of its
            # own, not a view: autograd has no business with what was there before.
            torch.autograd.graph.increment_version(q_BTHd)
            q_out = given.data
        else:
            q_out = torch.empty_like(given)
        k_out = torch.empty_like(given)
        shape = _shape(H, d, R, kv_BTHo.shape[-1], NUMBERS)
        if given.numel():
            _expand_kernel[(B * T, triton.cdiv(H, shape["HEADS"]))](
                *(given, kv_BTHo, k_rope_NR, cos_Tr, sin_Tr, q_out, k_out),
                *(k_rope_NR.stride(0), T),
                **shape,
                COPY=not own_q,
                num_warps=WARPS,
                enable_fp_fusion=False,
            )
        ctx.save_for_backward(cos_Tr, sin_Tr)
        return q_out, k_out, kv_BTHo[..., d - R :]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *expand_backward_triton(*grads, *ctx.saved_tensors), None, None, None


def expand_heads_triton(
    q_BTHd: Tensor,
    kv_BTHo: Tensor,
    k_rope_BTR: Tensor,
    cos_Tr: Tensor,
    sin_Tr: Tensor,
    *,
    own_q: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Do what ``expand.expand_heads_compiled`` does, with the bits of the model's own steps.

    Values are a view of ``kv``. With ``own_q`` queries are turned where they are.
    """
    return _Expand.apply(q_BTHd, kv_BTHo, k_rope_BTR, cos_Tr, sin_Tr, own_q)


def expand_backward_triton(
    dq_BTHd: Tensor, dk_BTHd: Tensor, dv_BTHv: Tensor, cos_Tr: Tensor, sin_Tr: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries as they came, of ``kv``, and of the shared rotary key.

    The last sums over heads in the dtype of the angles, in one order, and is rounded once.
    """
    given = [x.contiguous() for x in (dq_BTHd, dk_BTHd, dv_BTHv)]
    B, T, H, d = dq_BTHd.shape
    R = 2 * cos_Tr.shape[-1]
    o = d - R + dv_BTHv.shape[-1]
    dq, dkv, dk_rope = (dq_BTHd.new_empty(B, T, *shape) for shape in ((H, d), (H, o), (R,)))
    if dk_rope.numel():
        _expand_backward_kernel[(B * T,)](
            *(*given, cos_Tr, sin_Tr, dq, dkv, dk_rope, T),
            **_shape(H, d, R, o, NUMBERS_BACK),
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
    return dq, dkv, dk_rope


def _shape(H: int, d: int, R: int, o: int, numbers: int) -> dict[str, Any]:
    nope, power = d - R, triton.next_power_of_2
    v = o - nope
    width = max(power(max(nope, 1)), power(max(v, 1)))
    return {
        "H": H,
        "NOPE": nope,
        "R": R,
        "V": v,
        "NP": power(max(nope, 1)),
        "RP": power(R),
        "VP": power(max(v, 1)),
        "HEADS": min(power(max(H, 1)), max(numbers // width, 1)),
    }


@triton.jit
def _turned(
    x: tl.tensor, cos: tl.tensor, sin: tl.tensor, ROWS: tl.constexpr, RP: tl.constexpr
) -> tl.tensor:
    """Turn neighbouring pairs of ``[ROWS, RP]`` by angles of ``[1, RP / 2]``."""
    even, odd = tl.split(tl.reshape(x.to(cos.dtype), (ROWS, RP // 2, 2)))
    pairs = tl.join(even * cos - odd * sin, even * sin + odd * cos)
    return tl.reshape(pairs, (ROWS, RP))


@triton.jit
def _expand_kernel(
    q: tl.tensor,
    kv: tl.tensor,
    k_rope: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    q_out: tl.tensor,
    k_out: tl.tensor,
    k_rope_stride: tl.tensor,
    T: tl.tensor,
    H: tl.constexpr,
    NOPE: tl.constexpr,
    R: tl.constexpr,
    V: tl.constexpr,
    NP: tl.constexpr,
    RP: tl.constexpr,
    VP: tl.constexpr,
    HEADS: tl.constexpr,
    COPY: tl.constexpr,
) -> None:
    """Take a block of one token's heads."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    row = token * H + head
    inside = head < H
    plain, rotary = tl.arange(0, NP)[None, :], tl.arange(0, RP)[None, :]
    pair = tl.arange(0, RP // 2)[None, :]
    in_plain, in_rotary = inside & (plain < NOPE), inside & (rotary < R)
    angle = token % T * (R // 2) + pair
    c = tl.load(cos + angle, pair < R // 2, other=0.0)
    s = tl.load(sin + angle, pair < R // 2, other=0.0)
    shared = tl.load(k_rope + token * k_rope_stride + rotary, rotary < R, other=0.0)
    place = row * (NOPE + R) + plain
    place_rotary = row * (NOPE + R) + NOPE + rotary
    queries = tl.load(q + place_rotary, in_rotary, other=0.0)
    keys = tl.load(kv + row * (NOPE + V) + plain, in_plain, other=0.0)
    if COPY:
        tl.store(q_out + place, tl.load(q + place, in_plain, other=0.0), in_plain)
    queries = _turned(queries, c, s, HEADS, RP).to(q_out.dtype.element_ty)
    tl.store(q_out + place_rotary, queries, in_rotary)
    tl.store(k_out + place, keys, in_plain)
    shared = _turned(shared, c, s, 1, RP).to(k_out.dtype.element_ty)
    tl.store(k_out + place_rotary, tl.broadcast_to(shared, (HEADS, RP)), in_rotary)


@triton.jit
def _expand_backward_kernel(
    dq_out: tl.tensor,
    dk_out: tl.tensor,
    dv_out: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    dq: tl.tensor,
    dkv: tl.tensor,
    dk_rope: tl.tensor,
    T: tl.tensor,
    H: tl.constexpr,
    NOPE: tl.constexpr,
    R: tl.constexpr,
    V: tl.constexpr,
    NP: tl.constexpr,
    RP: tl.constexpr,
    VP: tl.constexpr,
    HEADS: tl.constexpr,
) -> None:
    """Take all heads of one token, a block after the other."""
    token = tl.program_id(0).to(tl.int64)
    plain, rotary = tl.arange(0, NP)[None, :], tl.arange(0, RP)[None, :]
    value, pair = tl.arange(0, VP)[None, :], tl.arange(0, RP // 2)[None, :]
    angle = token % T * (R // 2) + pair
    c = tl.load(cos + angle, pair < R // 2, other=0.0)
    s = tl.load(sin + angle, pair < R // 2, other=0.0) * -1.0
    total = tl.zeros((HEADS, RP), cos.dtype.element_ty)
    for first in range(0, H, HEADS):
        head = first + tl.arange(0, HEADS)[:, None]
        row, inside = token * H + head, head < H
        in_plain, in_rotary = inside & (plain < NOPE), inside & (rotary < R)
        in_value = inside & (value < V)
        place, up = row * (NOPE + R) + plain, row * (NOPE + V)
        place_rotary = row * (NOPE + R) + NOPE + rotary
        # All that is read before what is written: so much is on its way at once.
        queries = tl.load(dq_out + place, in_plain, other=0.0)
        keys = tl.load(dk_out + place, in_plain, other=0.0)
        values = tl.load(dv_out + row * V + value, in_value, other=0.0)
        turned = tl.load(dq_out + place_rotary, in_rotary, other=0.0)
        total += tl.load(dk_out + place_rotary, in_rotary, other=0.0).to(cos.dtype.element_ty)
        tl.store(dq + place, queries, in_plain)
        tl.store(dkv + up + plain, keys, in_plain)
        tl.store(dkv + up + NOPE + value, values, in_value)
        turned = _turned(turned, c, s, HEADS, RP).to(dq.dtype.element_ty)
        tl.store(dq + place_rotary, turned, in_rotary)
    shared = _turned(tl.sum(total, 0)[None, :], c, s, 1, RP).to(dk_rope.dtype.element_ty)
    tl.store(dk_rope + token * R + rotary, shared, rotary < R)
