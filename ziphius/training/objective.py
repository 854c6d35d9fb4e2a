"""What pre-training minimises: ``L_main + L_MTP + L_Bal`` (report sections 2.1.2 and 2.2)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ziphius.config.pretrain import TrainingConfig
from ziphius.data.rows import Batch, row_targets
from ziphius.kernels.loss import IGNORED
from ziphius.model.router import Routing, balance_of, sequence_hits
from ziphius.model.transformer import Features, Transformer
from ziphius.parallel.passes import Passes
from ziphius.parallel.rows import MicroBatch


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

    def numbers(self) -> Tensor:
        """Return all four, ``[4]``."""
        return torch.stack((self.main, self.mtp, self.balance, self.total))


@dataclass(frozen=True)
class LossParts:
    """A micro-batch's part of a loss that is no pre-training's, and what metrics tell besides.

    Backward goes from ``total``, of all tokens that are judged here; ``losses`` are of those that
    are counted here.
    """

    total: Tensor
    losses: Losses
    others: Tensor

    def numbers(self) -> Tensor:
        """Return the losses, and the others in the order of the objective's ``extra``."""
        return torch.cat((self.losses.numbers().double(), self.others.double()))


@dataclass(frozen=True)
class PreTraining:
    """``part_losses`` of one global batch."""

    config: TrainingConfig
    mtp_loss_weight: float
    target_count: int
    sequence_count: int
    document_mask: bool = False
    size = 4
    extra: tuple[str, ...] = ()

    def prepare(self, passes: Passes, parts: list[MicroBatch]) -> None:
        """Nothing comes before the passes."""

    def __call__(self, model: Transformer, features: Features, rows: Batch) -> Losses:
        """Compute what a part of the network gives of some rows."""
        return part_losses(
            model,
            features,
            rows,
            self.config,
            mtp_loss_weight=self.mtp_loss_weight,
            target_count=self.target_count,
            sequence_count=self.sequence_count,
            document_mask=self.document_mask,
        )


def losses(
    model: Transformer,
    batch: Batch,
    config: TrainingConfig,
    *,
    mtp_loss_weight: float,
    target_count: int,
    sequence_count: int,
    document_mask: bool = False,
) -> tuple[Losses, Mapping[int, Routing]]:
    """Compute a micro-batch's losses and every layer's routing (see ``part_losses``)."""
    documents_BS = batch.documents_BS if document_mask else None
    features = model.features(batch.tokens_BS, documents_BS)
    parts = part_losses(
        model,
        features,
        batch,
        config,
        mtp_loss_weight=mtp_loss_weight,
        target_count=target_count,
        sequence_count=sequence_count,
        document_mask=document_mask,
    )
    return parts, features.routings


def part_losses(
    model: Transformer,
    features: Features,
    batch: Batch,
    config: TrainingConfig,
    *,
    mtp_loss_weight: float,
    target_count: int,
    sequence_count: int,
    document_mask: bool = False,
) -> Losses:
    """Compute what a model, or a part of one, adds to the losses of a micro-batch.

    A part has the balance losses of its layers, and the one that ends the network the others.

    ``target_count`` (the main loss's) and ``sequence_count`` are the global batch's, so that
    micro-batches and ranks may simply be added up. Every MTP depth is divided by the same count
    although its sum has k fewer terms a row, as eq. 24 writes it. With ``document_mask`` neither
    attention nor a target crosses from one document of a row into another.
    """
    high = model.precision.high

    def zero() -> Tensor:
        return torch.zeros((), dtype=high, device=batch.tokens_BS.device)

    def cross_entropy(hidden_BTD: Tensor, depth: int) -> Tensor:
        targets_BT = row_targets(batch, depth, document_mask=document_mask)
        sums = model.positions.cross_entropy(model, hidden_BTD, targets_BT, depth)
        return sums / target_count

    main = cross_entropy(features.hidden_BTD, 0) if model.part.ends else zero()
    mtp = zero()
    for depth, hidden_BTD in enumerate(features.mtp_hidden, start=1):
        mtp = mtp + cross_entropy(hidden_BTD, depth) / len(features.mtp_hidden)
    balance = zero()
    # Without a weight there is nothing to compute.
    if config.balance_loss_weight and features.routings:
        for layer in _balances(model, features.routings, batch, config):
            balance = balance + layer / sequence_count
    balance = balance * config.balance_loss_weight
    total = main + mtp_loss_weight * mtp + balance
    return Losses(main, mtp, balance, total)


def count_targets(batch: Batch, *, document_mask: bool = False) -> int:
    """Count the tokens that the main loss predicts."""
    return int((row_targets(batch, 0, document_mask=document_mask) != IGNORED).sum())


def _balances(
    model: Transformer, routings: Mapping[int, Routing], batch: Batch, config: TrainingConfig
) -> Iterator[Tensor]:
    """Yield of every layer its sequence-wise balance loss, summed over a micro-batch's sequences.

    Of sequences that several processes share it is the part of this one's positions: the choices
    of all of them are counted together, for all layers at once.
    """
    B, T = batch.tokens_BS.shape[0], batch.tokens_BS.shape[1] - 1
    real, top_k = config.balance_loss_choices == "real", model.config.num_experts_per_tok
    scores, hits = [], []
    for routing in routings.values():
        scores_BtE = routing.scores_NE.unflatten(0, (B, -1))
        chosen_BtK = routing.chosen_NK.unflatten(0, (B, -1)) if real else None
        scores.append(scores_BtE)
        hits.append(sequence_hits(scores_BtE, top_k, chosen_BtK))
    counts = model.positions.sum(torch.stack(hits)).unbind()
    for layer, scores_BtE, hits_BE in zip(routings, scores, counts, strict=True):
        depth = max(0, layer + 1 - model.config.num_hidden_layers)
        yield balance_of(scores_BtE, hits_BE, top_k, T - depth).sum()
