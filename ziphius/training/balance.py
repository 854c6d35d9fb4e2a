"""Auxiliary-loss-free balancing: integer loads, and the sign rule (report section 2.1.2)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ziphius.model.ffn import MixtureOfExperts
from ziphius.model.router import Routing, expert_counts
from ziphius.model.transformer import Transformer


class ExpertLoads:
    """Tokens of every expert over one optimizer step's global batch, per layer: int64 ``[E]``.

    Loads are taken from what the forward pass returned, so a recomputed stage cannot count twice.
    """

    def __init__(self, n_experts: int, counts: Mapping[int, Tensor] | None = None) -> None:
        self.n_experts = n_experts
        self.counts = dict(counts or {})

    def add(self, routings: Mapping[int, Routing]) -> None:
        """Add a micro-batch's choices."""
        for layer, routing in routings.items():
            counts_E = expert_counts(routing.chosen_NK, self.n_experts)
            self.counts[layer] = self.counts[layer] + counts_E if layer in self.counts else counts_E

    def max_violation(self) -> float:
        """``(max load - mean load) / mean load``, averaged over layers (facts 2.1)."""
        worst = [
            counts_E.max().item() * self.n_experts / counts_E.sum().item() - 1
            for counts_E in self.counts.values()
        ]
        return sum(worst) / len(worst) if worst else 0.0


@torch.no_grad()
def update_biases(model: Transformer, loads: ExpertLoads, speed: float) -> None:
    """Move every routing bias against its load by ``speed`` (gamma), MTP routers included.

    ``b_i += speed * sign(mean(c) - c_i)``, in integers up to the sign: ``sum(c) - E * c_i`` has the
    sign of the difference and no rounding.
    """
    for layer, _, block in model.blocks():
        if isinstance(block.mlp, MixtureOfExperts):
            counts_E = loads.counts[layer]
            direction_E = (counts_E.sum() - loads.n_experts * counts_E).sign()
            bias_E = block.mlp.gate.e_score_correction_bias
            bias_E.add_(direction_E.to(bias_E.dtype), alpha=speed)
