"""The product of every linear layer: ``x W^T`` in a compute dtype under master weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ziphius.kernels.cpu.library import Library
from ziphius.kernels.later import Later, put_off
from ziphius.kernels.project import project_compiled
from ziphius.kernels.stored import Codes, Weight

# Rows that are widened at a time: enough for a product's full speed, few enough for a cache.
ROWS = 1024


def linear_native(
    x: Tensor, weight_OI: Weight, dtype: torch.dtype, later: Later | None = None
) -> Tensor:
    """Cast both to ``dtype`` and leave the product to torch: ``[..., I]`` to ``[..., O]``.

    With ``later`` the weight's gradient may be put off; it is the same.
    """
    if isinstance(weight_OI, Codes):
        return F.linear(x.to(dtype), weight_OI.decode(dtype))
    if later is not None:
        return _Split.apply(x.to(dtype), weight_OI, later)
    return F.linear(x.to(dtype), weight_OI.to(dtype))


class _Split(torch.autograd.Function):
    """torch's product, and its backward in two halves."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, later: Later) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        ctx.parameter, ctx.later = weight_OI, later
        return F.linear(x, weight_OI.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight_OI = ctx.saved_tensors
        x_NI, dout_NO = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, len(weight_OI))
        dx = dweight_OI = None
        if ctx.needs_input_grad[0]:
            dx = (dout_NO @ weight_OI.to(x.dtype)).view(x.shape)
        if ctx.needs_input_grad[1]:
            dweight_OI = put_off(
                ctx.later, ctx.parameter, lambda: (dout_NO.T @ x_NI).to(weight_OI.dtype)
            )
        return dx, dweight_OI, None


class _Widened(torch.autograd.Function):
    """Keeps its input in the input's own dtype, and casts some rows at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, later: Later | None) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        ctx.parameter, ctx.later = weight_OI, later
        x_NI, wide_OI = x.reshape(-1, x.shape[-1]), weight_OI.float()
        out_NO = x.new_empty(len(x_NI), len(weight_OI))
        for x_nI, out_nO in zip(x_NI.split(ROWS), out_NO.split(ROWS), strict=True):
            out_nO.copy_(x_nI.float() @ wide_OI.T)
        return out_NO.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight_OI = ctx.saved_tensors
        x_NI, dout_NO = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, len(weight_OI))
        dx_NI, wide_OI = torch.empty_like(x_NI), weight_OI.float()
        for dx_nI, dout_nO in zip(dx_NI.split(ROWS), dout_NO.split(ROWS), strict=True):
            dx_nI.copy_(dout_nO.float() @ wide_OI)

        def gradient() -> Tensor:
            dweight_OI = torch.zeros_like(weight_OI, dtype=torch.float32)
            for x_nI, dout_nO in zip(x_NI.split(ROWS), dout_NO.split(ROWS), strict=True):
                dweight_OI.addmm_(dout_nO.float().T, x_nI.float())
            return dweight_OI.to(weight_OI.dtype)

        return dx_NI.view(x.shape), put_off(ctx.later, ctx.parameter, gradient), None


def linear_widened(
    x: Tensor, weight_OI: Weight, dtype: torch.dtype, later: Later | None = None
) -> Tensor:
    """Multiply BF16 rows in FP32, by weights as they are stored; only the result is rounded.

    For processors whose FP32 products are faster than those in BF16: no product is less exact than
    ``linear_native``'s. Other dtypes than BF16 are left to torch. ``later`` as there.
    """
    if dtype != torch.bfloat16 or isinstance(weight_OI, Codes):
        return linear_native(x, weight_OI, dtype, later)
    return _Widened.apply(x.to(dtype), weight_OI, later)


def linear_compiled(library: Library, x: Tensor, weight_OI: Weight, dtype: torch.dtype) -> Tensor:
    """Do the same by products that read weights where they are stored; for answering only.

    No row depends on how many there are.
    """
    x_NI = x.to(dtype).reshape(-1, x.shape[-1])
    return project_compiled(library, x_NI, weight_OI).view(*x.shape[:-1], -1)


VERSIONS: dict[str, Callable[..., Tensor]] = {
    "native": linear_native,
    "widened": linear_widened,
}
COMPILED = linear_compiled
