"""What pre-training minimises: ``L_main + L_MTP + L_Bal`` (report sections 2.1.2 and 2.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ziphius.config.pretrain import PretrainConfig
from ziphius.data.rows import Batch, row_targets
from ziphius.kernels.loss import IGNORED
from ziphius.model.router import Routing, sequence_balance
from ziphius.model.transformer import Transformer


@dataclass(frozen=True)
class Losses:
    """A micro-batch's part of the losses of its global batch, in nats; parts add up.

    ``main``: cross entropy per target token. ``mtp``: the mean over depths of eq. 24, unweighted.
    ``balance``: eq. 17 with its weight, averaged over sequences and summed over layers.
    """

    main: Tensor
    mtp: Tensor
    balance: Tensor
    total: Tensor


def losses(
    model: Transformer,
    batch: Batch,
    config: PretrainConfig,
    *,
    mtp_loss_weight: float,
    target_count: int,
    sequence_count: int,
    document_mask: bool = False,
) -> tuple[Losses, Mapping[int, Routing]]:
    """Compute a micro-batch's losses and every layer's routing.

    ``target_count`` (the main loss's) and ``sequence_count`` are the global batch's, so that
    micro-batches and ranks may simply be added up. Every MTP depth is divided by the same count
    although its sum has k fewer terms a row, as eq. 24 writes it. With ``document_mask`` neither
    attention nor a target crosses from one document of a row into another.
    """
    tokens_BS = batch.tokens_BS
    features = model.features(tokens_BS, batch.documents_BS if document_mask else None)
    high = model.precision.high

    def cross_entropy(hidden_BTD: Tensor, depth: int) -> Tensor:
        targets_BT = row_targets(batch, depth, document_mask=document_mask)
        return model.cross_entropy(hidden_BTD.flatten(0, 1), targets_BT.flatten()) / target_count

    main = cross_entropy(features.hidden_BTD, 0)
    mtp = torch.zeros((), dtype=high, device=tokens_BS.device)
    for depth, hidden_BTD in enumerate(features.mtp_hidden, start=1):
        mtp = mtp + cross_entropy(hidden_BTD, depth) / len(features.mtp_hidden)
    balance = torch.zeros((), dtype=high, device=tokens_BS.device)
    # Without a weight there is nothing to compute.
    for routing in features.routings.values() if config.balance_loss_weight else ():
        balance = balance + _balance(routing, tokens_BS.shape[0], config) / sequence_count
    balance = balance * config.balance_loss_weight
    total = main + mtp_loss_weight * mtp + balance
    return Losses(main, mtp, balance, total), features.routings


def count_targets(batch: Batch, *, document_mask: bool = False) -> int:
    """Count the tokens that the main loss predicts."""
    return int((row_targets(batch, 0, document_mask=document_mask) != IGNORED).sum())


def _balance(routing: Routing, sequences: int, config: PretrainConfig) -> Tensor:
    """Sum one layer's sequence-wise balance loss over the sequences of a micro-batch."""
    top_k = routing.chosen_NK.shape[-1]
    chosen_BTK = None
    if config.balance_loss_choices == "real":
        chosen_BTK = routing.chosen_NK.unflatten(0, (sequences, -1))
    return sequence_balance(
        routing.scores_NE.unflatten(0, (sequences, -1)), top_k, chosen_BTK
    ).sum()
