"""The product of every linear layer: ``x W^T`` in a compute dtype under master weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows that are widened at a time: enough for a product's full speed, few enough for a cache.
ROWS = 1024


def linear_native(x: Tensor, weight_OI: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast both to ``dtype`` and leave the product to torch: ``[..., I]`` to ``[..., O]``."""
    return F.linear(x.to(dtype), weight_OI.to(dtype))


class _Widened(torch.autograd.Function):
    """The weight's gradient is summed in FP32 and never rounded to BF16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        x_NI, wide_OI = x.reshape(-1, x.shape[-1]), widen(weight_OI, x.dtype)
        out_NO = x.new_empty(len(x_NI), len(weight_OI))
        for x_nI, out_nO in zip(x_NI.split(ROWS), out_NO.split(ROWS), strict=True):
            out_nO.copy_(x_nI.float() @ wide_OI.T)
        return out_NO.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight_OI = ctx.saved_tensors
        x_NI, dout_NO = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, len(weight_OI))
        wide_OI = widen(weight_OI, x.dtype) if ctx.needs_input_grad[0] else None
        dx_NI = torch.empty_like(x_NI) if ctx.needs_input_grad[0] else None
        dweight_OI = torch.zeros(weight_OI.shape) if ctx.needs_input_grad[1] else None
        for start in range(0, len(x_NI), ROWS):
            rows = slice(start, start + ROWS)
            dout_nO = dout_NO[rows].float()
            if dx_NI is not None:
                dx_NI[rows] = dout_nO @ wide_OI
            if dweight_OI is not None:
                dweight_OI.addmm_(dout_nO.T, x_NI[rows].float())
        dx = None if dx_NI is None else dx_NI.view(x.shape)
        return dx, None if dweight_OI is None else dweight_OI.to(weight_OI.dtype)


def widen(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Round a weight to ``dtype`` and write it in FP32, exactly."""
    return weight.to(dtype).float()


def linear_widened(x: Tensor, weight_OI: Tensor, dtype: torch.dtype) -> Tensor:
    """Do the same with BF16 operands written in FP32: for processors that multiply those faster.

    Products of two BF16 numbers are exact in FP32, and sums are FP32 in both versions; they differ
    in the order of the sums alone. Other dtypes than BF16 are left to torch.
    """
    if dtype != torch.bfloat16:
        return linear_native(x, weight_OI, dtype)
    return _Widened.apply(x.to(dtype), weight_OI)


VERSIONS: dict[str, Callable[[Tensor, Tensor, torch.dtype], Tensor]] = {
    "native": linear_native,
    "widened": linear_widened,
}
