"""RMSNorm that keeps for backward its input, in the input's own dtype, and one number a row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute ``g * x / sqrt(mean(x^2) + eps)`` over the last dimension (facts 1.2).

    The arithmetic is at least FP32; the result has the dtype of ``x``, rounded once.
    """
    return _normalise(x, weight, eps)[0]


def _normalise(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the norm, and the inverse root of every row, ``[..., 1]``."""
    high = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(high)
    inverse_root = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return (wide * inverse_root).mul_(weight.to(high)).to(x.dtype), inverse_root


class _RMSNorm(torch.autograd.Function):
    """torch's own keeps the normalised input as well, which is as large as the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed, inverse_root = _normalise(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse_root)
        return normed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse_root = ctx.saved_tensors
        high = inverse_root.dtype
        unit, dout = x.to(high) * inverse_root, grads[0].to(high)
        dweight = (dout * unit).sum_to_size(weight.shape)
        dunit = dout * weight.to(high)
        # The norm does not change along the input itself: that part of the gradient drops out.
        along = (dunit * unit).mean(-1, keepdim=True)
        dx = (dunit - unit * along) * inverse_root
        return dx.to(x.dtype), dweight.to(weight.dtype), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute what ``rms_norm_reference`` does, with less kept for backward."""
    return _RMSNorm.apply(x, weight, eps)
