"""Pairs of documents in rows, of which the first is preferred: their loss and their means."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ziphius.alignment.documents import documents_in
from ziphius.data.rows import Batch


def bradley_terry(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Return how surprising it is that the first of two rewards wins: ``-log sigmoid(w - l)``."""
    return -F.logsigmoid(chosen - rejected)


def both(sums_Bd: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the first and the second document of every pair have, ``[B, pairs]`` each.

    In rows of pairs a document with an even number and the one behind it are a pair.
    """
    return sums_Bd[:, ::2], sums_Bd[:, 1::2]


def pairs_of_rows(rows: Batch) -> Tensor:
    """Say of every pair that a row has room for whether it has it, bool ``[B, pairs]``."""
    number_B = rows.documents_BS.amax(1).long() + 1
    places_p = torch.arange(documents_in(rows) // 2, device=number_B.device)
    return places_p < number_B[:, None] // 2


def count_pairs(rows: Batch) -> int:
    """Count the pairs of rows."""
    return int(pairs_of_rows(rows).sum())


def mean_of_pairs(values_Bp: Tensor, rows: Batch, pairs: int) -> Tensor:
    """Return these rows' part of the mean over ``pairs`` pairs."""
    return values_Bp.masked_fill(~pairs_of_rows(rows), 0).sum() / max(1, pairs)


def told_of_pairs(chosen: Tensor, rejected: Tensor) -> list[Tensor]:
    """Return of pairs of rewards whether the right one is higher, the margin, and both."""
    return [wins(chosen, rejected), chosen - rejected, chosen, rejected]


def wins(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Say by 1 and 0 whether the first is higher; equal ones count half."""
    return (chosen > rejected).to(chosen.dtype) + 0.5 * (chosen == rejected)
