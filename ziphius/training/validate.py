"""What a model is worth on held-out text: bits per byte, and whether MTP agrees with it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ziphius.data.heldout import HeldoutRows
from ziphius.data.tokenizer import EOS_ID
from ziphius.kernels.loss import IGNORED, linear_cross_entropy
from ziphius.model.transformer import Transformer

# Agreement is a share of some thousand tokens; more rows would cost more than they tell.
_AGREEMENT_ROWS = 32


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
    few = slice(_AGREEMENT_ROWS)
    return Validation(
        bits_per_byte(model, tokens_MT, targets_MT, rows.bytes),
        mtp_agreement(model, tokens_MT[few], targets_MT[few]),
    )


@torch.no_grad()
def bits_per_byte(
    model: Transformer, tokens_MT: Tensor, targets_MT: Tensor, n_bytes: int, batch: int = 16
) -> float:
    """Return total negative log-likelihood in bits over the bytes of the text (facts 10.1).

    It is comparable across tokenizers. ``tokens`` and ``targets`` are int64 ``[M, T]``; targets of
    -100 count nothing. ``n_bytes`` is the UTF-8 size of the text that the targets spell.
    """
    nats = 0.0
    for tokens_BT, targets_BT in zip(tokens_MT.split(batch), targets_MT.split(batch), strict=True):
        hidden_BTD, _ = model.trunk(tokens_BT)
        hidden_ND = hidden_BTD.flatten(0, 1)
        weight_VD = model.lm_head.weight.to(hidden_ND.dtype)
        nats += linear_cross_entropy(hidden_ND, weight_VD, targets_BT.flatten()).item()
    return nats / math.log(2) / n_bytes


@torch.no_grad()
def mtp_agreement(
    model: Transformer, tokens_MT: Tensor, targets_MT: Tensor, batch: int = 8
) -> float | None:
    """Return how often the first MTP module and the main model predict the same token.

    The module at position i and the main model at i + 1 both predict token i + 2. Arguments as in
    ``bits_per_byte``; positions whose target is -100 do not count.
    """
    if not len(model.mtp):
        return None
    agreed = counted = 0
    for tokens_BT, targets_BT in zip(tokens_MT.split(batch), targets_MT.split(batch), strict=True):
        last_B1 = targets_BT[:, -1:].where(targets_BT[:, -1:] != IGNORED, EOS_ID)
        features = model.features(torch.cat((tokens_BT, last_B1), dim=1))
        main_Bt = model.lm_head(features.hidden_BTD[:, 1:]).argmax(-1)
        draft_Bt = model.lm_head(features.mtp_hidden[0]).argmax(-1)
        real_Bt = targets_BT[:, 1:] != IGNORED
        agreed += int(((main_Bt == draft_Bt) & real_Bt).sum())
        counted += int(real_Bt.sum())
    return agreed / counted if counted else None
