"""Bits per byte of a model on text: comparable across tokenizers (facts 10.1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ziphius.kernels.loss import linear_cross_entropy
from ziphius.model.transformer import Transformer


@torch.no_grad()
def bits_per_byte(
    model: Transformer, tokens_MT: Tensor, targets_MT: Tensor, n_bytes: int, batch: int = 16
) -> float:
    """Return total negative log-likelihood in bits over the bytes of the text.

    ``tokens`` and ``targets`` are int64 ``[M, T]``; targets of -100 count nothing. ``n_bytes`` is
    the UTF-8 size of the text that the targets spell.
    """
    nats = 0.0
    for tokens_BT, targets_BT in zip(tokens_MT.split(batch), targets_MT.split(batch), strict=True):
        hidden_BTD, _ = model.trunk(tokens_BT)
        hidden_ND = hidden_BTD.flatten(0, 1)
        weight_VD = model.lm_head.weight.to(hidden_ND.dtype)
        nats += linear_cross_entropy(hidden_ND, weight_VD, targets_BT.flatten()).item()
    return nats / math.log(2) / n_bytes
