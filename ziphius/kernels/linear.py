"""The product of every linear layer: ``x W^T`` in a compute dtype under master weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ziphius.kernels.cpu.library import Library
from ziphius.kernels.project import project_compiled
from ziphius.kernels.stored import Codes, Weight

# Rows that are widened at a time: enough for a product's full speed, few enough for a cache.
ROWS = 1024


def linear_native(x: Tensor, weight_OI: Weight, dtype: torch.dtype) -> Tensor:
    """Cast both to ``dtype`` and leave the product to torch: ``[..., I]`` to ``[..., O]``."""
    matrix = weight_OI.decode(dtype) if isinstance(weight_OI, Codes) else weight_OI.to(dtype)
    return F.linear(x.to(dtype), matrix)


class _Widened(torch.autograd.Function):
    """Keeps its input in the input's own dtype, and casts some rows at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        x_NI, wide_OI = x.reshape(-1, x.shape[-1]), weight_OI.float()
        out_NO = x.new_empty(len(x_NI), len(weight_OI))
        for x_nI, out_nO in zip(x_NI.split(ROWS), out_NO.split(ROWS), strict=True):
            out_nO.copy_(x_nI.float() @ wide_OI.T)
        return out_NO.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight_OI = ctx.saved_tensors
        x_NI, dout_NO = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, len(weight_OI))
        dx_NI, wide_OI = torch.empty_like(x_NI), weight_OI.float()
        dweight_OI = torch.zeros_like(wide_OI)
        for start in range(0, len(x_NI), ROWS):
            rows = slice(start, start + ROWS)
            dout_nO = dout_NO[rows].float()
            dx_NI[rows] = dout_nO @ wide_OI
            dweight_OI.addmm_(dout_nO.T, x_NI[rows].float())
        return dx_NI.view(x.shape), dweight_OI.to(weight_OI.dtype)


def linear_widened(x: Tensor, weight_OI: Weight, dtype: torch.dtype) -> Tensor:
    """Multiply BF16 rows in FP32, by weights as they are stored; only the result is rounded.

    For processors whose FP32 products are faster than those in BF16: no product is less exact than
    ``linear_native``'s. Other dtypes than BF16 are left to torch.
    """
    if dtype != torch.bfloat16 or isinstance(weight_OI, Codes):
        return linear_native(x, weight_OI, dtype)
    return _Widened.apply(x.to(dtype), weight_OI)


def linear_compiled(library: Library, x: Tensor, weight_OI: Weight, dtype: torch.dtype) -> Tensor:
    """Do the same by products that read weights where they are stored; for answering only.

    No row depends on how many there are.
    """
    x_NI = x.to(dtype).reshape(-1, x.shape[-1])
    return project_compiled(library, x_NI, weight_OI).view(*x.shape[:-1], -1)


VERSIONS: dict[str, Callable[[Tensor, Weight, torch.dtype], Tensor]] = {
    "native": linear_native,
    "widened": linear_widened,
}
COMPILED = linear_compiled
