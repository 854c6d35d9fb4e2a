"""Parameters, bytes and arithmetic of a configuration, counted on the meta device (facts 1.10)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ziphius.config.model import ModelConfig
from ziphius.model.precision import Precision
from ziphius.model.transformer import Transformer
from ziphius.model.weights import ROUTING_BIAS, named_weights

FLOPS_FORMULA = (
    "forward = 2 * (active - embedding) + layers * heads * (qk_head_dim + v_head_dim) * (T + 1); "
    "training = 3 * forward"
)


@dataclass(frozen=True)
class Count:
    """Numbers of a network. Parameters include routing biases, as the published totals do.

    ``active`` is what one token meets in the main model, embedding and head included: of the
    routed experts, the chosen ones. ``mtp_unique`` leaves out the copies of embedding and head that
    a checkpoint holds beside each MTP module; ``checkpoint`` counts them.
    """

    total: int
    active: int
    embedding: int
    head: int
    mtp_unique: int
    mtp_active: int
    mtp_copies: int
    routing_biases: int

    @property
    def checkpoint(self) -> int:
        """Parameters of a whole Hugging Face checkpoint."""
        return self.total + self.mtp_unique + self.mtp_copies

    @property
    def active_without_embedding(self) -> int:
        """What one token multiplies with: an embedding is looked up, not multiplied."""
        return self.active - self.embedding


def count(config: ModelConfig) -> Count:
    """Count a configuration's parameters exactly, from the very modules that run."""
    model = Transformer(config, Precision(), device="meta")
    sizes = {name: tensor.numel() for name, tensor in named_weights(model)}
    mtp = {name for name in sizes if _layer(name) >= config.num_hidden_layers}

    def tally(names: set[str]) -> tuple[int, int]:
        """Count all weights among ``names``, and those that one token meets."""
        routed = sum(sizes[name] for name in names if ".mlp.experts." in name)
        all_of_them = sum(sizes[name] for name in names)
        chosen = routed // config.n_routed_experts * config.num_experts_per_tok
        return all_of_them, all_of_them - routed + chosen

    total, active = tally(set(sizes) - mtp)
    mtp_unique, mtp_active = tally(mtp)
    embedding, head = sizes["model.embed_tokens.weight"], sizes["lm_head.weight"]
    return Count(
        total=total,
        active=active,
        embedding=embedding,
        head=head,
        mtp_unique=mtp_unique,
        mtp_active=mtp_active,
        mtp_copies=config.num_nextn_predict_layers * (embedding + head),
        routing_biases=sum(size for name, size in sizes.items() if name.endswith(ROUTING_BIAS)),
    )


def forward_flops(config: ModelConfig, length: int, counted: Count | None = None) -> int:
    """Count operations per token of the main model's forward pass at sequence length ``length``.

    A multiplication and an addition are two operations. Attention is counted as causal: a query
    meets ``(length + 1) / 2`` keys on average, for a product with the key and one with the value
    (``FLOPS_FORMULA``; facts 1.11). Training costs three times as much.
    """
    counted = counted or count(config)
    widths = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    attention = config.num_hidden_layers * widths * (length + 1)
    return 2 * counted.active_without_embedding + attention


def training_flops(config: ModelConfig, length: int) -> int:
    """Count operations per token of a training step, MTP modules included: three forward passes.

    An MTP module meets its own weights, the output head once more, and as many keys as a layer.
    Recomputed activations do not count: what is useful is counted, as usual in MFU.
    """
    counted = count(config)
    depths = config.num_nextn_predict_layers
    widths = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    mtp = 2 * (counted.mtp_active + depths * counted.head) + depths * widths * (length + 1)
    return 3 * (forward_flops(config, length, counted) + mtp)


def cache_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of latent cache a token, over the main layers (facts 1.5)."""
    width = config.kv_lora_rank + config.qk_rope_head_dim
    return config.num_hidden_layers * width * dtype.itemsize


def _layer(name: str) -> int:
    """Return the layer in a weight's name, -1 outside the layers."""
    parts = name.split(".")
    return int(parts[2]) if parts[:2] == ["model", "layers"] else -1
