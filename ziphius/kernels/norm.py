"""RMSNorm that keeps for backward its input, in the input's own dtype, and one number a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ziphius.kernels.cpu.library import TYPES, Library
from ziphius.kernels.quantize import Fp8, quantize_tiles


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


def norm_tiles_reference(
    x: Tensor, weight: Tensor, eps: float, *, power_of_two: bool = False
) -> tuple[Tensor, Fp8, Tensor]:
    """Return the norm, the norm in tiles, and the inverse root of every row, ``[..., 1]``.

    The tiles are those of the norm as it is returned, rounded to the dtype of ``x``.
    """
    value, inverse_root = _normalise(x, weight, eps)
    return value, quantize_tiles(value, power_of_two=power_of_two), inverse_root


def norm_backward_reference(
    x: Tensor, weight: Tensor, inverse_root: Tensor, dout: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``x`` and of ``weight``, each in its dtype, rounded once."""
    high = inverse_root.dtype
    unit, dout = x.to(high) * inverse_root, dout.to(high)
    dweight = (dout * unit).sum_to_size(weight.shape)
    dunit = dout * weight.to(high)
    # The norm does not change along the input itself: that part of the gradient drops out.
    along = (dunit * unit).mean(-1, keepdim=True)
    dx = (dunit - unit * along) * inverse_root
    return dx.to(x.dtype), dweight.to(weight.dtype)


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
        return *norm_backward_reference(x, weight, inverse_root, grads[0]), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute what ``rms_norm_reference`` does, with less kept for backward."""
    return _RMSNorm.apply(x, weight, eps)


def _compiled_forward(
    library: Library, x: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    x_ND, gain_D = _rows(x), weight.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype)
    inverse_root_N = torch.empty(x_ND.shape[0], dtype=wide)
    gain = (TYPES[gain_D.dtype], gain_D)
    arguments = (x_ND, x_ND.stride(0), *gain, out, inverse_root_N, *x_ND.shape, eps)
    library.call("norm_forward", x.dtype, *arguments)
    return out, inverse_root_N


class _Compiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, library: Library, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, inverse_root_N = _compiled_forward(library, x, weight, eps)
        ctx.save_for_backward(x, weight, inverse_root_N)
        ctx.library = library
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, Tensor, None]:
        x, weight, inverse_root_N = ctx.saved_tensors
        x_ND, gain_D = _rows(x), weight.to(inverse_root_N.dtype).contiguous()
        dout, dx = grads[0].contiguous(), torch.empty(x.shape, dtype=x.dtype)
        partial_PD = torch.zeros(torch.get_num_threads(), x.shape[-1], dtype=gain_D.dtype)
        arguments = (x_ND, x_ND.stride(0), gain_D, inverse_root_N, dout, dx, partial_PD)
        ctx.library.call("norm_backward", x.dtype, *arguments, *x_ND.shape)
        return None, dx, partial_PD.sum(0).to(weight.dtype), None


def _rows(x: Tensor) -> Tensor:
    """View ``x`` as rows whose own numbers lie side by side, or copy it."""
    x_ND = x.reshape(-1, x.shape[-1])
    return x_ND if x_ND.stride(-1) == 1 else x_ND.contiguous()


def rms_norm_compiled(library: Library, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Do the same in two passes over memory forward and back, and not in a dozen."""
    if not torch.is_grad_enabled():
        return _compiled_forward(library, x, weight, eps)[0]
    return _Compiled.apply(library, x, weight, eps)


VERSIONS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "reference": rms_norm_reference,
    "torch": rms_norm,
}
COMPILED = rms_norm_compiled
# None: norm, then quantise.
TILES_VERSIONS: dict[str, Callable[..., tuple[Tensor, Tensor, Tensor]] | None] = {"two_steps": None}
