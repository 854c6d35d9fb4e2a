"""The router after its product: sigmoid affinities, the choice of experts, and their weights."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Keeps normalisations finite when every score underflows (facts 1.7, step 7).
NORM_EPS = 1e-20


class Rule(NamedTuple):
    """How experts are chosen and weighed: of ``topk_group`` groups in ``n_group``, ``top_k``."""

    top_k: int
    n_group: int
    topk_group: int
    normalise: bool
    scale: float


def choose(scores_NE: Tensor, bias_E: Tensor, top_k: int, n_group: int, topk_group: int) -> Tensor:
    """Choose ``top_k`` experts a token among those of its best groups: int64 ``[N, K]``.

    The bias takes part here and nowhere else (eq. 16). A group's score is the sum of its two best
    biased scores; experts of other groups are out of the question, hence minus infinity and not
    zero, which a negative biased score would lose to (facts 1.7, 13.2).
    """
    biased_NE = scores_NE + bias_E
    if n_group > 1:
        grouped_NGe = biased_NE.unflatten(-1, (n_group, -1))
        group_scores_NG = grouped_NGe.topk(2, dim=-1).values.sum(-1)
        kept_NG = group_scores_NG.topk(topk_group, dim=-1).indices
        excluded_NG = torch.ones_like(group_scores_NG, dtype=torch.bool).scatter(1, kept_NG, False)
        biased_NE = grouped_NGe.masked_fill(excluded_NG.unsqueeze(-1), float("-inf")).flatten(-2)
    return biased_NE.topk(top_k, dim=-1).indices


def gate(scores_NE: Tensor, chosen_NK: Tensor, *, normalise: bool, scale: float) -> Tensor:
    """Weigh the chosen experts by their unbiased scores (eq. 13-15), times the routed scale."""
    weights_NK = scores_NE.gather(1, chosen_NK)
    if normalise:
        weights_NK = weights_NK / (weights_NK.sum(-1, keepdim=True) + NORM_EPS)
    return weights_NK * scale


def route_reference(
    logits_NE: Tensor,
    bias_E: Tensor,
    *,
    top_k: int,
    n_group: int,
    topk_group: int,
    normalise: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Route by facts 1.7, steps 2 to 7: int64 experts ``[N, K]``, their weights, scores ``[N, E]``.

    Experts of groups that are not kept are out of the question: minus infinity, not zero, which a
    negative biased score would lose to. The bias takes part in the choice alone. Weights and scores
    have the dtype of the logits, and are differentiable in them.
    """
    scores_NE = logits_NE.sigmoid()
    with torch.no_grad():
        chosen_NK = choose(scores_NE, bias_E, top_k, n_group, topk_group)
    weights_NK = gate(scores_NE, chosen_NK, normalise=normalise, scale=scale)
    return chosen_NK, weights_NK, scores_NE
