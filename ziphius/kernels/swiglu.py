"""SwiGLU with the routing weight folded in (report section 3.3; facts 1.2, 1.7)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu_reference(gate_MF: Tensor, up_MF: Tensor, gates_M: Tensor | None = None) -> Tensor:
    """Compute ``silu(gate) * up``, times the row's routing weight if there is one.

    ``gate`` and ``up`` are ``[..., F]``, and so is the result, in their dtype; the arithmetic is at
    least FP32, rounded once. ``gates`` is ``[M]``.
    """
    high = torch.promote_types(gate_MF.dtype, torch.float32)
    hidden_MF = F.silu(gate_MF.to(high)) * up_MF.to(high)
    if gates_M is not None:
        hidden_MF = hidden_MF * gates_M.to(high).unsqueeze(-1)
    return hidden_MF.to(gate_MF.dtype)


class _SwiGLU(torch.autograd.Function):
    """The same, keeping its inputs only: backward computes the activation again (facts 5.7)."""

    @staticmethod
    def forward(ctx: Any, gate_MF: Tensor, up_MF: Tensor, gates_M: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate_MF, up_MF, gates_M)
        return swiglu_reference(gate_MF, up_MF, gates_M)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        gate_MF, up_MF, gates_M = ctx.saved_tensors
        high = torch.promote_types(gate_MF.dtype, torch.float32)
        g, u, dh = gate_MF.to(high), up_MF.to(high), grads[0].to(high)
        sigmoid = g.sigmoid()
        silu = g * sigmoid
        dgates_M = None
        if gates_M is not None:
            dgates_M = (dh * silu * u).sum(-1).to(gates_M.dtype)
            dh = dh * gates_M.to(high).unsqueeze(-1)
        du = dh * silu
        # silu'(g) = sigmoid(g) + silu(g) * (1 - sigmoid(g))
        dg = (dh * u).mul_(silu.addcmul(silu, sigmoid, value=-1).add_(sigmoid))
        return dg.to(gate_MF.dtype), du.to(up_MF.dtype), dgates_M


def swiglu(gate_MF: Tensor, up_MF: Tensor, gates_M: Tensor | None = None) -> Tensor:
    """Compute what ``swiglu_reference`` does, with less memory kept for backward."""
    return _SwiGLU.apply(gate_MF, up_MF, gates_M)
