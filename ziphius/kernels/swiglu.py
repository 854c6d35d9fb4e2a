"""SwiGLU with the routing weight folded in (report section 3.3; facts 1.2, 1.7)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ziphius.kernels.cpu.library import Library


def swiglu_reference(
    gate_MF: Tensor, up_MF: Tensor | None = None, gates_M: Tensor | None = None
) -> Tensor:
    """Compute ``silu(gate) * up``, times the row's routing weight if there is one.

    ``gate`` and ``up`` are ``[..., F]``, and so is the result, in their dtype; the arithmetic is at
    least FP32, rounded once. Without ``up``, rows of ``gate`` are ``[..., 2F]`` and hold both, the
    gate first. ``gates`` is ``[M]``.
    """
    gate_MF, up_MF = _halves(gate_MF, up_MF)
    high = torch.promote_types(gate_MF.dtype, torch.float32)
    hidden_MF = F.silu(gate_MF.to(high)) * up_MF.to(high)
    if gates_M is not None:
        hidden_MF = hidden_MF * gates_M.to(high).unsqueeze(-1)
    return hidden_MF.to(gate_MF.dtype)


def swiglu_gradients(
    gate_MF: Tensor, up_MF: Tensor, gates_M: Tensor | None, dhidden_MF: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradients of gate, up and routing weights, in at least FP32."""
    high = torch.promote_types(gate_MF.dtype, torch.float32)
    g, u, dh = gate_MF.to(high), up_MF.to(high), dhidden_MF.to(high)
    sigmoid = g.sigmoid()
    silu = g * sigmoid
    dgates_M = None
    if gates_M is not None:
        dgates_M = (dh * silu * u).sum(-1)
        dh = dh * gates_M.to(high).unsqueeze(-1)
    du = dh * silu
    # silu'(g) = sigmoid(g) + silu(g) * (1 - sigmoid(g))
    dg = (dh * u).mul_(silu.addcmul(silu, sigmoid, value=-1).add_(sigmoid))
    return dg, du, dgates_M


class _SwiGLU(torch.autograd.Function):
    """The same, keeping its inputs only: backward computes the activation again (facts 5.7)."""

    @staticmethod
    def forward(ctx: Any, gate_MF: Tensor, up_MF: Tensor, gates_M: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate_MF, up_MF, gates_M)
        return swiglu_reference(gate_MF, up_MF, gates_M)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        gate_MF, up_MF, gates_M = ctx.saved_tensors
        dg, du, dgates_M = swiglu_gradients(gate_MF, up_MF, gates_M, grads[0])
        if gates_M is not None and dgates_M is not None:
            dgates_M = dgates_M.to(gates_M.dtype)
        return dg.to(gate_MF.dtype), du.to(up_MF.dtype), dgates_M


def swiglu(gate_MF: Tensor, up_MF: Tensor | None = None, gates_M: Tensor | None = None) -> Tensor:
    """Compute what ``swiglu_reference`` does, with less memory kept for backward."""
    return _SwiGLU.apply(*_halves(gate_MF, up_MF), gates_M)


class _Compiled(torch.autograd.Function):
    """What is kept is the input, joined or in two."""

    @staticmethod
    def forward(
        ctx: Any, library: Library, gate: Tensor, up: Tensor | None, gates_M: Tensor | None
    ) -> Tensor:
        gate, up, gates_M = gate.contiguous(), _contiguous(up), _contiguous(gates_M)
        high = torch.promote_types(gate.dtype, torch.float32)
        wide_M = None if gates_M is None else gates_M.to(high)
        gate_MF, up_MF = _halves(gate, up)
        out = torch.empty(gate_MF.shape, dtype=gate.dtype)
        rows = (gate_MF, up_MF, gate_MF.stride(-2), wide_M)
        size = (out.shape[-1] and out.numel() // out.shape[-1], out.shape[-1])
        library.call("swiglu_forward", gate.dtype, *rows, out, *size)
        ctx.save_for_backward(gate, up, gates_M)
        ctx.library, ctx.size = library, size
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, Tensor | None, Tensor | None]:
        gate, up, gates_M = ctx.saved_tensors
        high = torch.promote_types(gate.dtype, torch.float32)
        wide_M = None if gates_M is None else gates_M.to(high)
        dgates_M = None if wide_M is None else torch.empty_like(wide_M)
        dgate, dup = torch.empty_like(gate), None if up is None else torch.empty_like(up)
        gate_MF, up_MF = _halves(gate, up)
        dgate_MF, dup_MF = _halves(dgate, dup)
        stride, dout_MF = gate_MF.stride(-2), grads[0].contiguous()
        rows = (gate_MF, up_MF, stride, wide_M, dout_MF, dgate_MF, dup_MF, stride, dgates_M)
        ctx.library.call("swiglu_backward", gate.dtype, *rows, *ctx.size)
        if dgates_M is not None:
            dgates_M = dgates_M.to(gates_M.dtype)
        return None, dgate, dup, dgates_M


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    if up is not None:
        return gate, up
    gate_MF, up_MF = gate.chunk(2, dim=-1)
    return gate_MF, up_MF


def swiglu_compiled(
    library: Library,
    gate_MF: Tensor,
    up_MF: Tensor | None = None,
    gates_M: Tensor | None = None,
) -> Tensor:
    """Compute what ``swiglu_reference`` does in one pass over memory, and one back."""
    return _Compiled.apply(library, gate_MF, up_MF, gates_M)


VERSIONS: dict[str, Callable[[Tensor, Tensor | None, Tensor | None], Tensor]] = {
    "reference": swiglu_reference,
    "torch": swiglu,
}
COMPILED = swiglu_compiled
