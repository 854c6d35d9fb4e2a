"""Queries, keys and values of every head out of the up-projections, in one pass.

What it computes is written out in ``model/mla.py`` and ``model/rope.py``; this is the same for
processors, without a copy for every step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ziphius.kernels.cpu.library import Library


class _Compiled(torch.autograd.Function):
    """The map is linear: nothing but the angles is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        library: Library,
        q_BTHd: Tensor,
        kv_BTHo: Tensor,
        k_rope_BTR: Tensor,
        cos_Tr: Tensor,
        sin_Tr: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        B, T, H, d = q_BTHd.shape
        R = k_rope_BTR.shape[-1]
        v = kv_BTHo.shape[-1] - (d - R)
        q_BTHd, kv_BTHo = q_BTHd.contiguous(), kv_BTHo.contiguous()
        k_rope_NR = k_rope_BTR.reshape(-1, R)
        if k_rope_NR.stride(-1) != 1:
            k_rope_NR = k_rope_NR.contiguous()
        outputs = (
            q_BTHd.new_empty(B, T, H, d),
            q_BTHd.new_empty(B, T, H, d),
            q_BTHd.new_empty(B, T, H, v),
        )
        ctx.size = (B * T, T, H, d - R, R, v)
        inputs = (q_BTHd, kv_BTHo, k_rope_NR, k_rope_NR.stride(0), cos_Tr, sin_Tr)
        library.call("expand_forward", q_BTHd.dtype, *inputs, *outputs, *ctx.size)
        ctx.save_for_backward(cos_Tr, sin_Tr)
        ctx.library, ctx.shapes = library, (q_BTHd.shape, kv_BTHo.shape, k_rope_BTR.shape)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, Tensor, Tensor, None, None]:
        cos_Tr, sin_Tr = ctx.saved_tensors
        given = [x.contiguous() for x in grads]
        dq, dkv, dk_rope = (given[0].new_empty(shape) for shape in ctx.shapes)
        outputs = (cos_Tr, sin_Tr, dq, dkv, dk_rope)
        ctx.library.call("expand_backward", dq.dtype, *given, *outputs, *ctx.size)
        return None, dq, dkv, dk_rope, None, None


def expand_heads_compiled(
    library: Library,
    q_BTHd: Tensor,
    kv_BTHo: Tensor,
    k_rope_BTR: Tensor,
    cos_Tr: Tensor,
    sin_Tr: Tensor,
    *,
    own_q: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn the rotary parts, and give every head the rotary key that all share.

    ``q`` is ``[B, T, H, nope + R]``, ``kv`` ``[B, T, H, nope + v]``, ``k_rope`` ``[B, T, R]``, in
    one dtype; the angles' ``[T, R/2]`` are in at least FP32. Returns queries, keys and values,
    ``[B, T, H, nope + R]`` twice and ``[B, T, H, v]``. With ``own_q`` nobody else reads ``q``: a
    version may put the queries where it was. This one does not.
    """
    return _Compiled.apply(library, q_BTHd, kv_BTHo, k_rope_BTR, cos_Tr, sin_Tr)


# None: the model's own steps, which are the specification.
VERSIONS: dict[str, Callable[..., tuple[Tensor, Tensor, Tensor]] | None] = {"torch": None}
COMPILED = expand_heads_compiled
