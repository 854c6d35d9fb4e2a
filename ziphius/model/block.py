"""One decoder block, cut into five stages at its communication boundaries (design seam 1).

    attend    norm, MLA, residual, norm, router, local sort
    dispatch  rows travel to their experts
    experts   routed experts (the shared one, ``shared``, may fill the time of ``dispatch``)
    combine   rows travel back and are summed
    add       residual

The plain forward runs them in order. Overlapped schedules interleave the stages of two
micro-batches, dispatch and combine each as a beginning and an end; recomputation and profiling name
them. In a dense block dispatch and combine are the
identity.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from ziphius.config.model import ModelConfig
from ziphius.kernels.fp8 import Operand
from ziphius.kernels.latent import LatentPages
from ziphius.kernels.select import Kernels
from ziphius.model.dispatch import Lane, Sent
from ziphius.model.ffn import Dense, FeedForward, MixtureOfExperts, Routed
from ziphius.model.layers import Device, RMSNorm
from ziphius.model.mla import MLA
from ziphius.model.precision import Precision
from ziphius.model.rope import Rope
from ziphius.model.router import Routing


class Attended(NamedTuple):
    """What stage ``attend`` leaves to the others."""

    x_BTD: Tensor  # the residual stream
    u_ND: Operand  # its norm: the input of the feed-forward half
    routed: Routed | None


class Block(nn.Module):
    """One pre-norm decoder block: ``x + MLA(norm(x))``, then ``x + FFN(norm(x))`` (facts 1.2)."""

    def __init__(
        self,
        config: ModelConfig,
        precision: Precision,
        kernels: Kernels,
        device: Device,
        *,
        dense: bool,
    ) -> None:
        super().__init__()
        eps, D = config.rms_norm_eps, config.hidden_size
        self.input_layernorm = RMSNorm(D, eps, precision, kernels, device)
        self.self_attn = MLA(config, precision, kernels, device)
        self.post_attention_layernorm = RMSNorm(D, eps, precision, kernels, device)
        self.plus = kernels.function("residual")
        feed_forward = Dense if dense else MixtureOfExperts
        self.mlp: FeedForward = feed_forward(config, precision, kernels, device)

    def forward(
        self,
        x_BTD: Tensor,
        rope: Rope,
        cache: LatentPages | None = None,
        documents_BT: Tensor | None = None,
        chosen_NK: Tensor | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """Run the five stages; return the new residual stream and the layer's routing.

        ``chosen`` replays an earlier choice of experts.
        """
        attended = self.attend(x_BTD, rope, cache, chosen_NK, documents_BT)
        sent = self.dispatch(attended)
        shared_ND = self.shared(attended)
        routed_ND = self.combine(self.experts(sent), sent)
        routing = attended.routed.routing if attended.routed else None
        return self.add(attended, routed_ND, shared_ND), routing

    def attend(
        self,
        x_BTD: Tensor,
        rope: Rope,
        cache: LatentPages | None = None,
        chosen_NK: Tensor | None = None,
        documents_BT: Tensor | None = None,
    ) -> Attended:
        """Attend, inside documents if they are given, then decide where rows go.

        ``chosen`` replays an earlier choice of experts.
        """
        attended_BTD = self.self_attn(
            self.input_layernorm.operand(x_BTD), rope, cache, documents_BT
        )
        x_BTD = self.plus(x_BTD, attended_BTD)
        u_ND = self.post_attention_layernorm.operand(x_BTD.flatten(0, 1), dispatched=True)
        return Attended(x_BTD, u_ND, self.mlp.route(u_ND, chosen_NK))

    def dispatch(self, attended: Attended) -> Sent | Operand:
        """Bring every row to the experts that were chosen for it."""
        return self.mlp.dispatch(attended.u_ND, attended.routed)

    def shared(self, attended: Attended) -> Tensor | None:
        """Compute the shared experts, which need nothing from other ranks."""
        return self.mlp.shared(attended.u_ND)

    def experts(self, sent: Sent | Operand) -> Tensor:
        """Compute the experts on the rows that arrived."""
        return self.mlp.run_experts(sent)

    def combine(self, rows: Tensor, sent: Sent | Operand) -> Tensor:
        """Bring the experts' rows back and sum them for every token: ``[N, D]``."""
        return self.mlp.combine(rows, sent)

    def begin_dispatch(self, attended: Attended, lane: Lane) -> object:
        """Begin to bring rows to their experts; see ``Dispatcher`` for what may be done with it."""
        return self.mlp.begin_dispatch(attended.u_ND, attended.routed, lane)

    def end_dispatch(self, begun: object) -> Sent | Operand:
        """Return the rows that have arrived."""
        return self.mlp.end_dispatch(begun)

    def begin_combine(self, rows: Tensor, sent: Sent | Operand, lane: Lane) -> object:
        """Begin to bring the experts' rows back."""
        return self.mlp.begin_combine(rows, sent, lane)

    def end_combine(self, begun: object) -> Tensor:
        """Return every token's sum of them."""
        return self.mlp.end_combine(begun)

    def add(self, attended: Attended, routed_ND: Tensor, shared_ND: Tensor | None) -> Tensor:
        """Add everything to the residual stream: ``[B, T, D]``."""
        if shared_ND is not None:
            routed_ND = routed_ND + shared_ND
        x_BTD: Tensor = self.plus(attended.x_BTD, routed_ND.view_as(attended.x_BTD))
        return x_BTD
