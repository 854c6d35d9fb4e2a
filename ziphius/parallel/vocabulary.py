"""Embedding and cross entropy whose vocabulary lies on several ranks, a stretch on each."""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ziphius.kernels.loss import IGNORED, linear_cross_entropy
from ziphius.parallel.collectives import Axis


def look_up(weight_vD: Tensor, first: int, tokens_BT: Tensor) -> Tensor:
    """Embed the tokens whose rows are here, from ``first`` on; others give zeros."""
    here_BT = (tokens_BT >= first) & (tokens_BT < first + len(weight_vD))
    x_BTD = F.embedding(torch.where(here_BT, tokens_BT - first, 0), weight_vD)
    return x_BTD.masked_fill(~here_BT[..., None], 0)


def likeliest(axis: Axis, logits_Nv: Tensor, first: int) -> Tensor:
    """Return the token of the largest logit of every row, of equal ones the first: int64 ``[N]``.

    Every rank has the logits of its stretch, from ``first`` on, of the same rows.
    """
    value_N, place_N = logits_Nv.max(-1)
    values_RN = axis.all_gather(value_N[None])
    tokens_RN = axis.all_gather(place_N[None] + first)
    return tokens_RN.gather(0, values_RN.argmax(0, keepdim=True)).squeeze(0)


def split_cross_entropy(
    axis: Axis,
    hidden_ND: Tensor,
    weight_vD: Tensor,
    first: int,
    targets_N: Tensor,
    counted_N: Tensor,
    chunk: int = 1024,
    *,
    widened: bool = False,
) -> Tensor:
    """Do what ``linear_cross_entropy`` does where every rank has rows of ``weight`` from ``first``.

    All ranks of the axis give the same rows and targets, and get the sum over those rows that are
    ``counted``, bool ``[N]``; together each row is to be counted once. The gradient of ``weight``
    is that of all rows, that of ``hidden`` the share of this rank's stretch: it is to be summed
    over the axis. For this the ranks' results must have one gradient, as parts of one sum do.
    """
    judged_N2 = torch.stack((targets_N, counted_N.to(targets_N.dtype)), dim=1)
    rows_loss = partial(_rows_loss, axis, first)
    return linear_cross_entropy(
        hidden_ND, weight_vD, judged_N2, chunk, rows_loss=rows_loss, widened=widened
    )


def _rows_loss(axis: Axis, first: int, logits_nv: Tensor, judged_n2: Tensor) -> Tensor:
    """Do what ``cross_entropy_rows`` does for this rank's stretch of the logits.

    ``judged`` has a row's target, and whether its loss is counted here; its gradient always is.
    """
    targets_n, counted_n = judged_n2.unbind(1)
    losses_n, dlogits_nv = _rows(axis, logits_nv, first, targets_n)
    logits_nv.copy_(dlogits_nv)
    return losses_n.masked_fill(counted_n == 0, 0).sum()


def _rows(axis: Axis, given_nv: Tensor, first: int, targets_n: Tensor) -> tuple[Tensor, Tensor]:
    """Return the losses of rows of logits and the gradient of this rank's stretch of them.

    Two numbers a row travel, and its largest logit before them.
    """
    logits_nv = given_nv.to(torch.promote_types(given_nv.dtype, torch.float32))
    counted_n = targets_n != IGNORED
    here_n1 = ((targets_n >= first) & (targets_n < first + logits_nv.shape[1])).unsqueeze(1)
    local_n1 = torch.where(here_n1, targets_n.unsqueeze(1) - first, 0)
    target_n1 = logits_nv.gather(1, local_n1).masked_fill(~here_n1, 0)
    largest_n1 = axis.all_reduce(logits_nv.amax(-1, keepdim=True), dist.ReduceOp.MAX)
    exp_nv = (logits_nv - largest_n1).exp_()
    sums_n2 = axis.all_reduce(torch.cat((exp_nv.sum(-1, keepdim=True), target_n1), dim=1))
    sum_n1, target_n = sums_n2[:, :1], sums_n2[:, 1]
    losses_n = (largest_n1 + sum_n1.log()).squeeze(1) - target_n
    # softmax - onehot(target), and zero in rows that do not count
    exp_nv.mul_(counted_n.unsqueeze(1) / sum_n1)
    exp_nv.scatter_add_(1, local_n1, -here_n1.to(exp_nv.dtype))
    return losses_n.masked_fill(~counted_n, 0), exp_nv


class SplitSoftmax:
    """Rows whose logits lie on the ranks of an axis; of this one from token ``first`` on."""

    def __init__(self, axis: Axis, first: int) -> None:
        self.axis, self.first = axis, first

    def reduce(self, logits_nv: Tensor, targets_n: Tensor) -> tuple[Tensor, Tensor]:
        columns_n, here_n = self._place(targets_n, logits_nv.shape[1])
        target_n = logits_nv.gather(1, columns_n[:, None]).squeeze(1).masked_fill(~here_n, 0)
        largest_n = self.axis.all_reduce(logits_nv.amax(-1), dist.ReduceOp.MAX)
        sum_n = logits_nv.sub_(largest_n[:, None]).exp_().sum(-1)
        sums_2n = self.axis.all_reduce(torch.stack((sum_n, target_n)))
        return largest_n + sums_2n[0].log(), sums_2n[1]

    def less_target(self, logits_nv: Tensor, targets_n: Tensor, lse_n: Tensor) -> None:
        columns_n, here_n = self._place(targets_n, logits_nv.shape[1])
        softmax_nv = (logits_nv.to(lse_n.dtype) - lse_n[:, None]).exp_()
        softmax_nv.scatter_add_(1, columns_n[:, None], -here_n[:, None].to(softmax_nv.dtype))
        logits_nv.copy_(softmax_nv)

    def _place(self, targets_n: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Return the targets' columns here, int64 ``[n]``, and which targets are here, bool."""
        here_n = (targets_n >= self.first) & (targets_n < self.first + width)
        return torch.where(here_n, targets_n - self.first, 0), here_n
