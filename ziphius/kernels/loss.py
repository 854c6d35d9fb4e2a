"""Cross entropy of a linear output head, without ever holding all logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss and both gradients in one pass over chunks of rows.

    The loss is a scalar, so the gradient of the logits is known at once up to one factor; keeping
    logits for backward, ``N * V`` numbers, would be the largest allocation of a training step.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, chunk: int
    ) -> Tensor:
        high = torch.promote_types(hidden_ND.dtype, torch.float32)
        total = torch.zeros((), dtype=high, device=hidden_ND.device)
        dhidden_ND = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        dweight_VD = torch.zeros_like(weight_VD, dtype=high) if ctx.needs_input_grad[1] else None
        for start in range(0, hidden_ND.shape[0], chunk):
            rows = slice(start, start + chunk)
            logits_nV = (hidden_ND[rows] @ weight_VD.T).to(high)
            counted_n1 = (targets_N[rows] != IGNORED).unsqueeze(1)
            targets_n1 = targets_N[rows].unsqueeze(1).where(counted_n1, 0)
            target_n1 = logits_nV.gather(1, targets_n1)
            largest_n1 = logits_nV.amax(-1, keepdim=True)
            exp_nV = logits_nV.sub_(largest_n1).exp_()
            sum_n1 = exp_nV.sum(-1, keepdim=True)
            total += (largest_n1 + sum_n1.log() - target_n1)[counted_n1].sum()
            if dhidden_ND is None and dweight_VD is None:
                continue
            # softmax - onehot(target), and zero in rows that do not count
            dlogits_nV = exp_nV.mul_(counted_n1 / sum_n1)
            dlogits_nV.scatter_add_(1, targets_n1, -counted_n1.to(high))
            dlogits_nV = dlogits_nV.to(hidden_ND.dtype)
            if dhidden_ND is not None:
                torch.mm(dlogits_nV, weight_VD, out=dhidden_ND[rows])
            if dweight_VD is not None:
                dweight_VD += dlogits_nV.T @ hidden_ND[rows]
        ctx.save_for_backward(dhidden_ND, dweight_VD)
        ctx.weight_dtype = weight_VD.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        dhidden_ND, dweight_VD = ctx.saved_tensors
        factor = grads[0]
        dhidden = None if dhidden_ND is None else dhidden_ND * factor.to(dhidden_ND.dtype)
        dweight = None if dweight_VD is None else (dweight_VD * factor).to(ctx.weight_dtype)
        return dhidden, dweight, None, None


def linear_cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, chunk: int = 1024
) -> Tensor:
    """Sum ``-log softmax(hidden @ weight.T)[target]`` over rows, in nats.

    ``hidden`` is ``[N, D]`` and ``weight`` ``[V, D]`` in one dtype, ``targets`` int64 ``[N]``; rows
    whose target is ``IGNORED`` count nothing. The scalar result is at least FP32. Differentiable
    once, in ``hidden`` and ``weight``.
    """
    return _LinearCrossEntropy.apply(hidden_ND, weight_VD, targets_N, chunk)
