"""RMSNorm and quantisation in one kernel, as a layer of a network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ziphius.kernels.triton.norm import norm_backward_triton, norm_tiles_triton


class _NormOperand(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, power_of_two: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        value, tiles, inverse_root = norm_tiles_triton(x, weight, eps, power_of_two=power_of_two)
        ctx.save_for_backward(x, weight, inverse_root)
        ctx.mark_non_differentiable(tiles.codes, tiles.scales)
        return value, tiles.codes, tiles.scales

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse_root = ctx.saved_tensors
        return *norm_backward_triton(x, weight, inverse_root, grads[0]), None, None


def norm_operand_triton(
    x: Tensor, weight: Tensor, eps: float, power_of_two: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Norm rows ``[..., D]`` and quantise them in tiles: the value, its codes and scales.

    Differentiable in ``x`` and ``weight`` through the value; the bits are those of the norm and the
    quantiser one after the other.
    """
    result: tuple[Tensor, Tensor, Tensor] = _NormOperand.apply(x, weight, eps, power_of_two)
    return result
