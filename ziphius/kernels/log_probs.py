"""Log-probabilities of chosen tokens under a linear output head, without holding all logits."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ziphius.kernels.loss import IGNORED, Rows, cross_entropy_rows


class Softmax(Protocol):
    """What is needed of all logits of a row, wherever they lie; ``v`` of them are here."""

    def reduce(self, logits_nv: Tensor, targets_n: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logarithm of the sum of exponentials, and the target's logit, ``[n]``."""
        ...

    def less_target(self, logits_nv: Tensor, targets_n: Tensor, lse_n: Tensor) -> None:
        """Put ``softmax - onehot(target)`` in the place of logits; ``lse`` is what they gave."""
        ...


class WholeSoftmax:
    """All logits are here. ``rows_loss`` is a version of ``cross_entropy_rows``."""

    def __init__(self, rows_loss: Rows = cross_entropy_rows) -> None:
        self.rows_loss = rows_loss

    def reduce(self, logits_nv: Tensor, targets_n: Tensor) -> tuple[Tensor, Tensor]:
        return logits_nv.logsumexp(-1), logits_nv.gather(1, targets_n[:, None]).squeeze(1)

    def less_target(self, logits_nv: Tensor, targets_n: Tensor, lse_n: Tensor) -> None:
        self.rows_loss(logits_nv, targets_n)


class _LinearLogProbs(torch.autograd.Function):
    """Backward computes the logits again, chunk by chunk: they are the largest tensor of all.

    Rows that do not count, such as prompts and padding, have no logits.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_vD: Tensor,
        targets_N: Tensor,
        chunk: int,
        widened: bool,
        softmax: Softmax,
    ) -> Tensor:
        ctx.chunk, ctx.softmax = chunk, softmax
        ctx.dtype = _dtype(hidden_ND, widened)
        used_vD = weight_vD.to(ctx.dtype)
        counted_M = (targets_N != IGNORED).nonzero().squeeze(1)
        targets_M = targets_N[counted_M]
        high = torch.promote_types(hidden_ND.dtype, torch.float32)
        lse_M, target_M = hidden_ND.new_empty(2, len(counted_M), dtype=high)
        for start in range(0, len(counted_M), chunk):
            rows = slice(start, start + chunk)
            logits_nv = (hidden_ND[counted_M[rows]].to(ctx.dtype) @ used_vD.T).to(high)
            lse_M[rows], target_M[rows] = softmax.reduce(logits_nv, targets_M[rows])
        ctx.save_for_backward(hidden_ND, weight_vD, counted_M, targets_M, lse_M)
        found_N = lse_M.new_zeros(len(hidden_ND))
        found_N[counted_M] = target_M - lse_M
        return found_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_vD, counted_M, targets_M, lse_M = ctx.saved_tensors
        used_vD = weight_vD.to(ctx.dtype)
        dhidden_ND = torch.zeros_like(hidden_ND)
        dweight_vD = torch.zeros_like(weight_vD, dtype=lse_M.dtype)
        for start in range(0, len(counted_M), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            counted_n = counted_M[rows]
            hidden_nD, scale_n1 = hidden_ND[counted_n].to(ctx.dtype), grads[0][counted_n, None]
            # -g (softmax - onehot), with g on the narrow side of both products
            residual_nv = hidden_nD @ used_vD.T
            ctx.softmax.less_target(residual_nv, targets_M[rows], lse_M[rows])
            dhidden_nD = (residual_nv @ used_vD).to(lse_M.dtype).mul_(-scale_n1)
            dhidden_ND[counted_n] = dhidden_nD.to(dhidden_ND.dtype)
            dweight_vD += residual_nv.T @ (hidden_nD * -scale_n1).to(ctx.dtype)
        return dhidden_ND, dweight_vD.to(weight_vD.dtype), None, None, None, None


def linear_log_probs(
    hidden_ND: Tensor,
    weight_vD: Tensor,
    targets_N: Tensor,
    chunk: int = 1024,
    *,
    widened: bool = False,
    softmax: Softmax | None = None,
) -> Tensor:
    """Return ``log softmax(hidden @ weight.T)[target]`` of every row, at least FP32 ``[N]``.

    ``hidden`` is ``[N, D]`` and ``weight`` ``[V, D]``, which is rounded to the dtype of ``hidden``;
    ``targets`` are int64 ``[N]``; of rows whose target is ``IGNORED`` it is 0. ``widened`` writes
    BF16 operands in FP32, logits are then not rounded. ``softmax`` says what else there is where
    only a stretch of the vocabulary is here. Differentiable once, in ``hidden`` and ``weight``.
    """
    return _LinearLogProbs.apply(
        hidden_ND, weight_vD, targets_N, chunk, widened, softmax or WholeSoftmax()
    )


def _dtype(hidden_ND: Tensor, widened: bool) -> torch.dtype:
    high = torch.promote_types(hidden_ND.dtype, torch.float32)
    return high if widened else hidden_ND.dtype
