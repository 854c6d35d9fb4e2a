"""The latent cache: per token and layer one normed latent and one rotated key (facts 1.5)."""

from __future__ import annotations

import torch
from torch import Tensor

from ziphius.config.errors import BadInput
from ziphius.model.rope import Rope
from ziphius.model.transformer import Transformer


class _LayerCache:
    """A layer's rows of the cache, filled up to ``length``."""

    def __init__(self, latent_BSC: Tensor, k_rope_BSR: Tensor) -> None:
        self._latent_BSC, self._k_rope_BSR = latent_BSC, k_rope_BSR
        self.length = 0

    def append(self, latent_BTC: Tensor, k_rope_BTR: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the new positions; return views of all kept ones."""
        start, end = self.length, self.length + latent_BTC.shape[1]
        latent_BTC, k_rope_BTR = latent_BTC.detach(), k_rope_BTR.detach()
        if end > self._latent_BSC.shape[1]:
            raise BadInput(
                f"the cache holds {self._latent_BSC.shape[1]} positions, {end} are needed: "
                "shorten the prompt or ask for fewer tokens"
            )
        self._latent_BSC[:, start:end] = latent_BTC
        self._k_rope_BSR[:, start:end] = k_rope_BTR
        self.length = end
        return self._latent_BSC[:, :end], self._k_rope_BSR[:, :end]


class LatentCache:
    """The past of ``batch`` sequences of equal length, up to ``capacity`` positions.

    It holds ``(kv_lora_rank + qk_rope_head_dim) * layers`` numbers a position, in the model's
    compute dtype: for the published model 70,272 bytes a token in BF16.
    """

    def __init__(self, model: Transformer, batch: int, capacity: int) -> None:
        config, device = model.config, model.lm_head.weight.device
        C, R = config.kv_lora_rank, config.qk_rope_head_dim

        def layer() -> _LayerCache:
            rows = torch.empty(batch, capacity, C + R, dtype=model.precision.compute, device=device)
            return _LayerCache(rows[..., :C], rows[..., C:])

        self._layers = [layer() for _ in range(config.num_hidden_layers)]

    @property
    def length(self) -> int:
        """Positions kept by every layer."""
        return self._layers[-1].length

    def rope(self, model: Transformer, length: int) -> Rope:
        """Return the rotary tables of the next ``length`` positions."""
        return model.rope(length, start=self.length)

    def layer(self, index: int) -> _LayerCache:
        """Return one layer's part.

        Positions of a forward pass that broke off before the last layer are forgotten.
        """
        layer = self._layers[index]
        layer.length = min(layer.length, self.length)
        return layer
