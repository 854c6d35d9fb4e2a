"""Validation of a network that lies on several ranks: each runs its part on its share of rows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ziphius.data.heldout import HeldoutRows
from ziphius.data.rows import Batch
from ziphius.data.tokenizer import EOS_ID
from ziphius.kernels.loss import IGNORED
from ziphius.model.transformer import Features, Transformer
from ziphius.parallel.passes import Passes
from ziphius.parallel.rows import MicroBatch
from ziphius.training.validate import AGREEMENT_ROWS, Validation, rows_of_a_pass

_ROWS = 8  # of a pass


@dataclass(frozen=True, kw_only=True)
class _Rows(Batch):
    """Held-out rows: ``compared`` is how many of them MTP's agreement is measured on."""

    targets_BT: Tensor
    compared: int


@dataclass(frozen=True)
class _Measured:
    """Nats, and how many tokens agreed, of how many."""

    total: Tensor
    agreed: Tensor
    counted: Tensor

    def numbers(self) -> Tensor:
        return torch.stack((self.total.double(), self.agreed.double(), self.counted.double()))


class _Heldout:
    """What the last part of the network says of held-out rows."""

    size = 3

    def __call__(self, model: Transformer, features: Features, rows: Batch) -> _Measured:
        assert isinstance(rows, _Rows)
        zero = torch.zeros((), device=rows.tokens_BS.device)
        if not model.part.ends:
            return _Measured(zero, zero, zero)
        hidden_BTD, targets_BT = features.hidden_BTD, rows.targets_BT
        positions, T = model.positions, targets_BT.shape[1]
        nats = positions.cross_entropy(model, hidden_BTD, targets_BT, 0)
        if not features.mtp_hidden or not rows.compared:
            return _Measured(nats, zero, zero)
        few = slice(rows.compared)
        # Ranks that share rows count the same tokens: the share is that of each.
        main_Bt = positions.likeliest(model, hidden_BTD[few], T, 0)[:, 1:]
        draft_Bt = positions.likeliest(model, features.mtp_hidden[0][few], T, 1)
        real_Bt = targets_BT[few, 1:] != IGNORED
        return _Measured(nats, ((main_Bt == draft_Bt) & real_Bt).sum(), real_Bt.sum())


def validate_together(passes: Passes, heldout: HeldoutRows) -> Validation:
    """Measure what ``validate`` does; all ranks do this together, and return the same."""
    axis, device = passes.mesh["batch"], passes.models[0].device
    parts = _parts(heldout, device)
    # As many passes on every rank: experts are reached together.
    turns = -(-len(parts) // axis.size)
    own = [MicroBatch(part, counts=True) for part in parts[axis.place :: axis.size]]
    own += [MicroBatch(parts[0], counts=False)] * (turns - len(own))
    sums = passes.measure(own, _Heldout()).over(passes.mesh["world"]).sums
    nats, agreed, counted = sums.tolist()
    bits = nats / math.log(2) / heldout.bytes
    return Validation(bits, agreed / counted if counted else None)


def _parts(heldout: HeldoutRows, device: torch.device) -> list[_Rows]:
    targets_MT = heldout.targets_MT
    last_M1 = targets_MT[:, -1:].where(targets_MT[:, -1:] != IGNORED, EOS_ID)
    tokens_MS = torch.cat((heldout.tokens_MT, last_M1), dim=1).to(device)
    documents_MS = torch.zeros_like(tokens_MS, dtype=torch.int32)
    if heldout.masked_MS is not None:
        documents_MS = heldout.masked_MS.to(device)
    found, size = [], rows_of_a_pass(targets_MT.shape[1], _ROWS)
    for first in range(0, len(tokens_MS), size):
        rows = slice(first, first + size)
        targets_BT = targets_MT[rows].to(device)
        compared = min(max(AGREEMENT_ROWS - first, 0), len(targets_BT))
        tokens_BS, documents_BS = tokens_MS[rows], documents_MS[rows]
        found.append(_Rows(tokens_BS, documents_BS, targets_BT=targets_BT, compared=compared))
    return found
