"""A whole copy, on every rank, of a model that lies on several: one weight at a time."""

from __future__ import annotations

import torch

from ziphius.model.transformer import Transformer
from ziphius.model.weights import named_weights
from ziphius.parallel.collectives import Axis
from ziphius.parallel.owners import Named, Owners, owned


@torch.no_grad()
def gather_into(copy: Transformer, owners: Owners, weights: Named, axis: Axis) -> None:
    """Overwrite the weights of ``copy``, a whole model, with those that the ranks of an axis hold.

    All ranks do this together; ``weights`` are those that this rank holds. Memory beside the copy
    is one weight. Raises Lost where a rank is gone.
    """
    mine, targets = dict(owned(owners, weights)), dict(named_weights(copy))
    for name, entry in owners.entries.items():
        for piece in entry.pieces:
            view = targets[name].narrow(entry.dim, piece.start, piece.size)
            if piece.owner == axis.place:
                view.copy_(mine[name])
            view.copy_(axis.broadcast(view.contiguous(), piece.owner))
