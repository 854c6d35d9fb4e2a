"""Which experts a token goes to, with which weight, and their balance (report section 2.1.2)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ziphius.config.model import ModelConfig
from ziphius.kernels.route import NORM_EPS, choose, gate
from ziphius.kernels.select import Kernels
from ziphius.model.layers import Device
from ziphius.model.precision import Precision


class Routing(NamedTuple):
    """One layer's decision for ``N`` tokens."""

    chosen_NK: Tensor  # int64 expert ids
    weights_NK: Tensor  # gate values, normalised and scaled, in the order of the ids
    scores_NE: Tensor  # unbiased sigmoid affinities


class Router(nn.Module):
    """Sigmoid affinities in at least FP32, and the bias that balances without a loss.

    The bias is no parameter: it has no gradient, no optimizer touches it, and it is FP32 however a
    file stored it. ``training/balance.py`` moves it by the sign rule.
    """

    e_score_correction_bias: Tensor

    def __init__(
        self, config: ModelConfig, precision: Precision, kernels: Kernels, device: Device
    ) -> None:
        super().__init__()
        self.choose = kernels.function("choose") or choose
        self.route = kernels.function("route")
        self.sigmoid = kernels.function("sigmoid")
        self.weigh = kernels.function("gate")
        self.linear = kernels.function("linear")
        self.wider = kernels.function("widen")
        E, D = config.n_routed_experts, config.hidden_size
        self.top_k = config.num_experts_per_tok
        self.n_group, self.topk_group = config.n_group, config.topk_group
        self.normalise = config.norm_topk_prob
        self.scale = config.routed_scaling_factor
        self.dtype = precision.dtype("router")
        self.weight = nn.Parameter(torch.empty(E, D, dtype=precision.storage, device=device))
        self.register_buffer(
            "e_score_correction_bias", torch.empty(E, dtype=torch.float32, device=device)
        )

    def widen(self, u_ND: Tensor) -> Tensor:
        """Bring the input to the router's arithmetic."""
        wide_ND: Tensor = self.wider(u_ND, self.dtype)
        return wide_ND

    def forward(self, u_ND: Tensor, chosen_NK: Tensor | None = None) -> Routing:
        """Route normed tokens ``[N, D]``. Given ``chosen``, replay that choice."""
        logits_NE = self.linear(self.widen(u_ND), self.weight, self.dtype)
        if self.route is not None and chosen_NK is None:
            return self._in_one(logits_NE)
        scores_NE = self.sigmoid(logits_NE)
        if chosen_NK is None:
            chosen_NK = self.choice(scores_NE)
        if self.weigh is None:
            weights_NK = gate(scores_NE, chosen_NK, normalise=self.normalise, scale=self.scale)
        else:
            rule = {"normalise": self.normalise, "scale": self.scale, "least": NORM_EPS}
            weights_NK = self.weigh(scores_NE, chosen_NK, **rule)
        return Routing(chosen_NK, weights_NK, scores_NE)

    @torch.no_grad()
    def choice(self, scores_NE: Tensor) -> Tensor:
        """Choose experts by affinities and biases: int64 ``[N, K]``."""
        chosen_NK: Tensor = self.choose(
            scores_NE, self.e_score_correction_bias, self.top_k, self.n_group, self.topk_group
        )
        return chosen_NK

    def _in_one(self, logits_NE: Tensor) -> Routing:
        """Do the same by one kernel after the product."""
        rule = {"top_k": self.top_k, "n_group": self.n_group, "topk_group": self.topk_group}
        how = {**rule, "normalise": self.normalise, "scale": self.scale}
        return Routing(*self.route(logits_NE, self.e_score_correction_bias, **how))


def expert_counts(chosen_NK: Tensor, n_experts: int) -> Tensor:
    """Count the tokens of every expert: int64 ``[E]``, exact at any size."""
    return torch.bincount(chosen_NK.flatten(), minlength=n_experts)


def sequence_balance(scores_BTE: Tensor, top_k: int, chosen_BTK: Tensor | None = None) -> Tensor:
    """Compute ``sum_i f_i P_i`` for every sequence (eq. 17-20, without alpha): ``[B]``.

    ``f`` counts the top ``top_k`` of the unbiased scores, as the report writes it, or the real
    choices when they are given; it has no gradient. Perfect balance gives 1.
    """
    hits_BE = sequence_hits(scores_BTE, top_k, chosen_BTK)
    return balance_of(scores_BTE, hits_BE, top_k, scores_BTE.shape[1])


def sequence_hits(scores_BTE: Tensor, top_k: int, chosen_BTK: Tensor | None = None) -> Tensor:
    """Count how often every expert is among the choices of a sequence, ``[B, E]``."""
    if chosen_BTK is None:
        chosen_BTK = scores_BTE.detach().topk(top_k, dim=-1).indices
    hits_BE = scores_BTE.new_zeros(scores_BTE.shape[0], scores_BTE.shape[2])
    flat = chosen_BTK.flatten(1)
    return hits_BE.scatter_add_(1, flat, torch.ones_like(flat, dtype=hits_BE.dtype))


def balance_of(scores_BtE: Tensor, hits_BE: Tensor, top_k: int, length: int) -> Tensor:
    """Compute what some positions add to the balance loss of sequences of ``length``: ``[B]``.

    ``hits`` are those of the whole sequences, so that parts add up, and their gradients too.
    """
    f_BE = hits_BE * (hits_BE.shape[1] / (top_k * length))
    P_BE = (scores_BtE / (scores_BtE.sum(-1, keepdim=True) + NORM_EPS)).sum(1) / length
    return (f_BE * P_BE).sum(-1)
