"""How well a model predicts at every place of a long row."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ziphius.config.errors import BadInput
from ziphius.data.heldout import HeldoutRows
from ziphius.kernels.loss import IGNORED
from ziphius.model.transformer import Transformer

_PASS_TOKENS = 16_384


@dataclass(frozen=True)
class ByPosition:
    """Mean nats a token in ``[edges[i], edges[i + 1])``, and of how many tokens that is the mean.

    A stretch without a token has NaN. Perplexity is ``exp(nats)``.
    """

    edges: tuple[int, ...]
    nats: tuple[float, ...]
    tokens: tuple[int, ...]


def doubling_edges(length: int, first: int = 64) -> tuple[int, ...]:
    """Return the borders of stretches that double: 0, ``first``, 2 ``first``, .. ``length``."""
    edges = [0]
    while first < length:
        edges.append(first)
        first *= 2
    return (*edges, length)


@torch.no_grad()
def by_position(model: Transformer, rows: HeldoutRows, edges: Sequence[int]) -> ByPosition:
    """Measure a model on held-out rows by position, on its own device.

    Position t is that of the token which is predicted from those before it in the row. Rows that
    end early are left out: their text is shorter, which is another text. Raises BadInput for edges
    that do not rise, or go beyond the rows.
    """
    length = rows.tokens_MT.shape[1]
    borders = np.array(edges)
    if len(borders) < 2 or (np.diff(borders) <= 0).any() or borders[0] < 0 or borders[-1] > length:
        raise BadInput(f"edges = {list(edges)}: give places that rise, up to {length}")
    whole_M = (rows.targets_MT != IGNORED).all(dim=1)
    if not whole_M.any():
        raise BadInput(f"held-out text: none of its rows has {length} tokens: give more text")
    nats_T, count = _nats(model, rows, whole_M)
    return ByPosition(
        tuple(int(edge) for edge in borders),
        tuple(float(nats_T[a:b].mean()) / count for a, b in itertools.pairwise(borders)),
        tuple(int(b - a) * count for a, b in itertools.pairwise(borders)),
    )


def _nats(
    model: Transformer, rows: HeldoutRows, whole_M: torch.Tensor
) -> tuple[NDArray[np.float64], int]:
    """Return nats summed over rows by position, float64 ``[T]``, and how many rows there are."""
    chosen = whole_M.nonzero().flatten()
    length = rows.tokens_MT.shape[1]
    nats_T = np.zeros(length)
    for some in chosen.split(max(1, _PASS_TOKENS // length)):
        tokens_BT, targets_BT = (
            x[some].to(model.device) for x in (rows.tokens_MT, rows.targets_MT)
        )
        documents_BT = (
            None if rows.masked_MS is None else rows.masked_MS[some, :-1].to(model.device)
        )
        hidden_BTD, _ = model.trunk(tokens_BT, documents_BT=documents_BT)
        log_probs_N = model.log_probs(hidden_BTD.flatten(0, 1), targets_BT.flatten())
        nats_T -= log_probs_N.view(targets_BT.shape).double().sum(0).cpu().numpy()
    return nats_T, len(chosen)
