"""Log-probabilities of chosen tokens under a linear output head, without holding all logits."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ziphius.kernels.loss import IGNORED, Rows, cross_entropy_rows

_STEP = 128  # rows


class Softmax(Protocol):
    """What is needed of all logits of a row, wherever they lie; ``v`` of them are here."""

    def reduce(self, logits_nv: Tensor, targets_n: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logarithm of the sum of exponentials, and the target's logit, ``[n]``.

        The logits may be lost.
        """
        ...

    def less_target(self, logits_nv: Tensor, targets_n: Tensor, lse_n: Tensor) -> None:
        """Put ``softmax - onehot(target)`` in the place of logits; ``lse`` is what they gave."""
        ...


class WholeSoftmax:
    """All logits are here. ``rows_loss`` is a version of ``cross_entropy_rows``."""

    def __init__(self, rows_loss: Rows = cross_entropy_rows) -> None:
        self.rows_loss = rows_loss

    def reduce(self, logits_nv: Tensor, targets_n: Tensor) -> tuple[Tensor, Tensor]:
        target_n = logits_nv.gather(1, targets_n[:, None]).squeeze(1)
        largest_n = logits_nv.amax(-1)
        sum_n = logits_nv.sub_(largest_n[:, None]).exp_().sum(-1)
        return largest_n + sum_n.log(), target_n

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
        counted = (targets_N != IGNORED).nonzero().squeeze(1)
        rows_M = _filled(counted)
        targets_M = _filled(targets_N[counted])
        high = torch.promote_types(hidden_ND.dtype, torch.float32)
        lse_M, target_M = hidden_ND.new_empty(2, len(rows_M), dtype=high)
        memory = _Logits(used_vD, min(chunk, len(rows_M)))
        for start in range(0, len(rows_M), chunk):
            part = slice(start, start + chunk)
            logits_nv = memory.of(hidden_ND[rows_M[part]].to(ctx.dtype), high)
            lse_M[part], target_M[part] = softmax.reduce(logits_nv, targets_M[part])
        ctx.save_for_backward(hidden_ND, weight_vD, counted, rows_M, targets_M, lse_M)
        found_N = lse_M.new_zeros(len(hidden_ND))
        found_N[counted] = (target_M - lse_M)[: len(counted)]
        return found_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_vD, counted, rows_M, targets_M, lse_M = ctx.saved_tensors
        used_vD = weight_vD.to(ctx.dtype)
        dhidden_ND = torch.zeros_like(hidden_ND)
        dweight_vD = torch.zeros_like(weight_vD, dtype=lse_M.dtype)
        memory = _Logits(used_vD, min(ctx.chunk, len(rows_M)))
        scale_M1 = _filled(grads[0][counted])[:, None]  # nothing for what fills
        for start in range(0, len(rows_M), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            hidden_nD, scale_n1 = hidden_ND[rows_M[part]].to(ctx.dtype), scale_M1[part]
            # -g (softmax - onehot), with g on the narrow side of both products
            residual_nv = memory.of(hidden_nD, ctx.dtype)
            ctx.softmax.less_target(residual_nv, targets_M[part], lse_M[part])
            dhidden_nD = (residual_nv @ used_vD).to(lse_M.dtype).mul_(-scale_n1)
            own = counted[part]
            dhidden_ND[own] = dhidden_nD[: len(own)].to(dhidden_ND.dtype)
            dweight_vD += residual_nv.T @ (hidden_nD * -scale_n1).to(ctx.dtype)
        return dhidden_ND, dweight_vD.to(weight_vD.dtype), None, None, None, None


def _filled(values_n: Tensor) -> Tensor:
    """Fill up with zeros to whole steps of rows.

    Products have few different sizes then. oneDNN keeps a program for every size that it meets: a
    megabyte or so each, and a thousand of them.
    """
    return F.pad(values_n, (0, -len(values_n) % _STEP))


class _Logits:
    """Memory for the logits of up to so many rows."""

    def __init__(self, weight_vD: Tensor, rows: int) -> None:
        self.weight_vD = weight_vD
        self.memory_nv = weight_vD.new_empty(rows, len(weight_vD))
        self._other: Tensor | None = None

    def of(self, hidden_nD: Tensor, dtype: torch.dtype) -> Tensor:
        """Return rows' logits in ``dtype``, which the next call overwrites."""
        out_nv = self.memory_nv[: len(hidden_nD)]
        logits_nv = torch.mm(hidden_nD, self.weight_vD.T, out=out_nv)
        if dtype == logits_nv.dtype:
            return logits_nv
        if self._other is None:
            self._other = torch.empty_like(self.memory_nv, dtype=dtype)
        return self._other[: len(hidden_nD)].copy_(logits_nv)


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
