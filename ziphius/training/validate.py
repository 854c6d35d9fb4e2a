"""What a model is worth on held-out text: bits per byte, and whether MTP agrees with it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ziphius.data.heldout import HeldoutRows
from ziphius.data.tokenizer import EOS_ID
from ziphius.kernels.loss import IGNORED
from ziphius.model.transformer import Transformer

# Rows of a pass: as many as have so many tokens together, and never more than a pass says.
_PASS_TOKENS = 16_384
# Agreement is a share of some thousand tokens; more rows would cost more than they tell.
AGREEMENT_ROWS = 32


@dataclass(frozen=True)
class Validation:
    """``mtp_agreement``: how often the first MTP module's likeliest token is the main model's.

    That is the share of drafts that greedy speculation would accept. ``None`` without MTP.
    """

    bits_per_byte: float
    mtp_agreement: float | None


def validate(model: Transformer, rows: HeldoutRows) -> Validation:
    """Measure a model on held-out rows, on its own device."""
    device = model.lm_head.weight.device
    tokens_MT, targets_MT = rows.tokens_MT.to(device), rows.targets_MT.to(device)
    masked_MS = None if rows.masked_MS is None else rows.masked_MS.to(device)
    few = slice(AGREEMENT_ROWS)
    few_MS = None if masked_MS is None else masked_MS[few]
    return Validation(
        bits_per_byte(model, tokens_MT, targets_MT, rows.bytes, masked_MS),
        mtp_agreement(model, tokens_MT[few], targets_MT[few], few_MS),
    )


def rows_of_a_pass(length: int, most: int) -> int:
    """Return how many rows of ``length`` tokens a pass takes: fewer of long ones, at least one."""
    return max(1, min(most, _PASS_TOKENS // length))


@torch.no_grad()
def bits_per_byte(
    model: Transformer,
    tokens_MT: Tensor,
    targets_MT: Tensor,
    n_bytes: int,
    documents_MS: Tensor | None = None,
    batch: int = 16,
) -> float:
    """Return total negative log-likelihood in bits over the bytes of the text (facts 10.1).

    It is comparable across tokenizers. ``tokens`` and ``targets`` are int64 ``[M, T]``; targets of
    -100 count nothing. ``n_bytes`` is the UTF-8 size of the text that the targets spell.
    ``documents`` int ``[M, T + 1]`` keep attention inside documents.
    """
    nats = 0.0
    batch = rows_of_a_pass(tokens_MT.shape[1], batch)
    for first in range(0, len(tokens_MT), batch):
        rows = slice(first, first + batch)
        tokens_BT, targets_BT = tokens_MT[rows], targets_MT[rows]
        documents_BT = None if documents_MS is None else documents_MS[rows, :-1]
        hidden_BTD, _ = model.trunk(tokens_BT, documents_BT=documents_BT)
        own = model.positions.cross_entropy(model, hidden_BTD, targets_BT, 0)
        nats += model.positions.sum(own).item()
    return nats / math.log(2) / n_bytes


@torch.no_grad()
def mtp_agreement(
    model: Transformer,
    tokens_MT: Tensor,
    targets_MT: Tensor,
    documents_MS: Tensor | None = None,
    batch: int = 8,
) -> float | None:
    """Return how often the first MTP module and the main model predict the same token.

    The module at position i and the main model at i + 1 both predict token i + 2. Arguments as in
    ``bits_per_byte``; positions whose target is -100 do not count.
    """
    if not len(model.mtp):
        return None
    agreed = counted = 0
    batch = rows_of_a_pass(tokens_MT.shape[1], batch)
    for first in range(0, len(tokens_MT), batch):
        rows = slice(first, first + batch)
        tokens_BT, targets_BT = tokens_MT[rows], targets_MT[rows]
        documents_BS = None if documents_MS is None else documents_MS[rows]
        last_B1 = targets_BT[:, -1:].where(targets_BT[:, -1:] != IGNORED, EOS_ID)
        features = model.features(torch.cat((tokens_BT, last_B1), dim=1), documents_BS)
        T, likeliest = tokens_BT.shape[1], model.positions.likeliest
        main_Bt = likeliest(model, features.hidden_BTD, T, 0)[:, 1:]
        draft_Bt = likeliest(model, features.mtp_hidden[0], T, 1)
        real_Bt = targets_BT[:, 1:] != IGNORED
        agreed += int(((main_Bt == draft_Bt) & real_Bt).sum())
        counted += int(real_Bt.sum())
    return agreed / counted if counted else None
