"""Cross entropy of a linear output head, without ever holding all logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ziphius.kernels.cpu.library import Library

IGNORED = -100


Rows = Callable[[Tensor, Tensor], Tensor]


def cross_entropy_rows(logits_nV: Tensor, targets_n: Tensor) -> Tensor:
    """Sum the cross entropy of rows of logits; leave its gradient in their place.

    Rows whose target is ``IGNORED`` count nothing and have no gradient.
    """
    given_nV = logits_nV
    logits_nV = given_nV.to(torch.promote_types(given_nV.dtype, torch.float32))
    counted_n1 = (targets_n != IGNORED).unsqueeze(1)
    targets_n1 = targets_n.unsqueeze(1).where(counted_n1, 0)
    target_n1 = logits_nV.gather(1, targets_n1)
    largest_n1 = logits_nV.amax(-1, keepdim=True)
    exp_nV = logits_nV.sub_(largest_n1).exp_()
    sum_n1 = exp_nV.sum(-1, keepdim=True)
    # softmax - onehot(target), and zero in rows that do not count
    exp_nV.mul_(counted_n1 / sum_n1)
    exp_nV.scatter_add_(1, targets_n1, -counted_n1.to(exp_nV.dtype))
    if exp_nV is not given_nV:
        given_nV.copy_(exp_nV)
    return (largest_n1 + sum_n1.log() - target_n1)[counted_n1].sum()


def cross_entropy_rows_compiled(library: Library, logits_nV: Tensor, targets_n: Tensor) -> Tensor:
    """Do the same in one visit of a row."""
    high = torch.promote_types(logits_nV.dtype, torch.float32)
    losses_n = torch.empty(len(logits_nV), dtype=high)
    library.call("cross_entropy", logits_nV.dtype, logits_nV, targets_n, losses_n, *logits_nV.shape)
    return losses_n.sum()


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss and both gradients in one pass over chunks of rows.

    The loss is a scalar, so the gradient of the logits is known at once up to one factor; keeping
    logits for backward, ``N * V`` numbers, would be the largest allocation of a training step.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        chunk: int,
        rows_loss: Rows,
        widened: bool,
    ) -> Tensor:
        high = torch.promote_types(hidden_ND.dtype, torch.float32)
        dtype = high if widened else hidden_ND.dtype
        used_VD = weight_VD.to(dtype)
        total = torch.zeros((), dtype=high, device=hidden_ND.device)
        dhidden_ND = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        dweight_VD = torch.zeros_like(weight_VD, dtype=high) if ctx.needs_input_grad[1] else None
        memory_nV = hidden_ND.new_empty(min(chunk, len(hidden_ND)), len(weight_VD), dtype=dtype)
        for start in range(0, hidden_ND.shape[0], chunk):
            rows = slice(start, start + chunk)
            hidden_nD = hidden_ND[rows].to(dtype)
            logits_nV = torch.mm(hidden_nD, used_VD.T, out=memory_nV[: len(hidden_nD)])
            total += rows_loss(logits_nV, targets_N[rows].contiguous())
            if dhidden_ND is None and dweight_VD is None:
                continue
            dlogits_nV = logits_nV
            if dhidden_ND is not None:
                dhidden_ND[rows] = dlogits_nV @ used_VD
            if dweight_VD is not None and dtype == high:
                dweight_VD.addmm_(dlogits_nV.T, hidden_nD)
            elif dweight_VD is not None:
                dweight_VD += dlogits_nV.T @ hidden_nD
        ctx.save_for_backward(dhidden_ND, dweight_VD)
        ctx.weight_dtype = weight_VD.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dhidden_ND, dweight_VD = ctx.saved_tensors
        factor = grads[0]
        dhidden = None if dhidden_ND is None else dhidden_ND * factor.to(dhidden_ND.dtype)
        dweight = None if dweight_VD is None else (dweight_VD * factor).to(ctx.weight_dtype)
        return dhidden, dweight, None, None, None, None


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    chunk: int = 1024,
    *,
    rows_loss: Rows = cross_entropy_rows,
    widened: bool = False,
) -> Tensor:
    """Sum ``-log softmax(hidden @ weight.T)[target]`` over rows, in nats.

    ``hidden`` is ``[N, D]`` and ``weight`` ``[V, D]``, which is rounded to the dtype of ``hidden``;
    ``targets`` are int64 ``[N]``; rows whose target is ``IGNORED`` count nothing. The scalar result
    is at least FP32. ``rows_loss`` is a version of ``cross_entropy_rows``, or another judge: it is
    given rows of ``targets`` as they are. ``widened`` writes BF16 operands in FP32 (see
    ``linear_widened``), logits are then not rounded. Differentiable once, in ``hidden`` and
    ``weight``.
    """
    return _LinearCrossEntropy.apply(hidden_ND, weight_VD, targets_N, chunk, rows_loss, widened)


VERSIONS: dict[str, Rows] = {"torch": cross_entropy_rows}
COMPILED = cross_entropy_rows_compiled
