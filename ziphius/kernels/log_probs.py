"""Log-probabilities of chosen tokens under a linear output head, without holding all logits."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ziphius.kernels.loss import IGNORED


class Softmax(Protocol):
    """What is needed of all logits of a row, wherever they lie; ``v`` of them are here."""

    def reduce(self, logits_nv: Tensor, targets_n: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logarithm of the sum of exponentials, and the target's logit, ``[n]``."""
        ...

    def place(self, targets_n: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Return the targets' columns here, int64 ``[n]``, and which targets are here, bool."""
        ...


class WholeSoftmax:
    """All logits are here."""

    def reduce(self, logits_nv: Tensor, targets_n: Tensor) -> tuple[Tensor, Tensor]:
        return logits_nv.logsumexp(-1), logits_nv.gather(1, targets_n[:, None]).squeeze(1)

    def place(self, targets_n: Tensor, width: int) -> tuple[Tensor, Tensor]:
        return targets_n, torch.ones_like(targets_n, dtype=torch.bool)


class _LinearLogProbs(torch.autograd.Function):
    """Backward computes the logits again, chunk by chunk: they are the largest tensor of all."""

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
        counted_N = targets_N != IGNORED
        known_N = targets_N.where(counted_N, 0)
        high = torch.promote_types(hidden_ND.dtype, torch.float32)
        lse_N, target_N = hidden_ND.new_empty(2, len(hidden_ND), dtype=high)
        for start in range(0, len(hidden_ND), chunk):
            rows = slice(start, start + chunk)
            logits_nv = (hidden_ND[rows].to(ctx.dtype) @ used_vD.T).to(high)
            lse_N[rows], target_N[rows] = softmax.reduce(logits_nv, known_N[rows])
        ctx.save_for_backward(hidden_ND, weight_vD, known_N, counted_N, lse_N)
        return (target_N - lse_N).masked_fill(~counted_N, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_vD, known_N, counted_N, lse_N = ctx.saved_tensors
        used_vD = weight_vD.to(ctx.dtype)
        scale_N = grads[0].masked_fill(~counted_N, 0)
        dhidden_ND = torch.empty_like(hidden_ND)
        dweight_vD = torch.zeros_like(weight_vD, dtype=lse_N.dtype)
        for start in range(0, len(hidden_ND), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            hidden_nD, scale_n1 = hidden_ND[rows].to(ctx.dtype), scale_N[rows, None]
            logits_nv = (hidden_nD @ used_vD.T).to(lse_N.dtype)
            # g (onehot - softmax)
            dlogits_nv = (logits_nv - lse_N[rows, None]).exp_().mul_(-scale_n1)
            columns_n, here_n = ctx.softmax.place(known_N[rows], len(weight_vD))
            dlogits_nv.scatter_add_(1, columns_n[:, None], scale_n1 * here_n[:, None])
            dlogits_nv = dlogits_nv.to(ctx.dtype)
            dhidden_ND[rows] = (dlogits_nv @ used_vD).to(dhidden_ND.dtype)
            dweight_vD += dlogits_nv.T @ hidden_nD
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
