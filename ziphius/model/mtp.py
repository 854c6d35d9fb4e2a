"""Multi-token prediction: a module a depth, sharing embedding and head (report section 2.2)."""

from __future__ import annotations

from torch import Tensor, nn

from ziphius.config.model import ModelConfig
from ziphius.kernels.latent import LatentPages
from ziphius.kernels.select import Kernels
from ziphius.model.block import Block
from ziphius.model.layers import Device, Linear, RMSNorm
from ziphius.model.precision import Precision
from ziphius.model.rope import Rope
from ziphius.model.router import Routing


class MTPModule(nn.Module):
    """``h^k = TRM(M [norm(Emb(t_{i+k})) ; norm(h^{k-1}_i)])`` (eq. 21-22).

    The embedding comes first in the concatenation, as the released weights have it and against
    the order of eq. 21 (facts 3.2). ``norm`` stands before the shared output head; the next depth
    takes ``h^k`` without it.
    """

    def __init__(
        self, config: ModelConfig, precision: Precision, kernels: Kernels, device: Device
    ) -> None:
        super().__init__()
        eps, D = config.rms_norm_eps, config.hidden_size
        self.enorm = RMSNorm(D, eps, precision, kernels, device)
        self.hnorm = RMSNorm(D, eps, precision, kernels, device)
        self.join = kernels.function("join")
        self.eh_proj = Linear(2 * D, D, precision, kernels, device, kind="join")
        self.block = Block(config, precision, kernels, device, dense=False)
        self.norm = RMSNorm(D, eps, precision, kernels, device)

    def forward(
        self,
        h_BTD: Tensor,
        embedded_BTD: Tensor,
        rope: Rope,
        cache: LatentPages | None = None,
        documents_BT: Tensor | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """Go one depth on: ``h`` of position i meets the embedding of token i + k.

        ``documents`` are those of the positions i.
        """
        return self.block(self.joined(h_BTD, embedded_BTD), rope, cache, documents_BT)

    def joined(self, h_BTD: Tensor, embedded_BTD: Tensor) -> Tensor:
        """Return the block's input: ``[B, T, D]``."""
        return self.eh_proj(self.join(self.enorm(embedded_BTD), self.hnorm(h_BTD)))
