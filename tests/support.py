"""What the tests share: small configurations, random weights, and a twin in transformers.

Import it as ``from tests.support import tiny_config, random_model, randomise``.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ziphius.config.model import ModelConfig
from ziphius.config.pretrain import PretrainConfig
from ziphius.data.rows import Batch
from ziphius.inference.paged import Batch as Step
from ziphius.inference.paged import Feed, PagedCache
from ziphius.kernels.latent import TILE, LatentPages
from ziphius.kernels.select import Kernels
from ziphius.model.precision import Precision
from ziphius.model.transformer import Transformer
from ziphius.model.weights import named_weights
from ziphius.training.schedule import StepSettings, settings_at

if TYPE_CHECKING:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

F64 = Precision(compute=torch.float64, storage=torch.float64)
F32 = Precision(compute=torch.float32, storage=torch.float32)

# Every width differs from every other one, so that a swapped pair shows.
_TINY: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 128,
    "num_attention_heads": 3,
    "q_lora_rank": 14,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 7,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 11,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
}


def tiny_config(**changes: Any) -> ModelConfig:
    """Return a small configuration with every part of V3, with ``changes`` to its fields."""
    return ModelConfig(**{**_TINY, **changes})


@torch.no_grad()
def randomise(
    model: Transformer, std: float = 0.2, bias_std: float = 0.3, seed: int = 0
) -> Transformer:
    """Fill a model in place so that mistakes show; return it.

    Matrices are N(0, std^2), norm gains 1 + N(0, std^2), routing biases N(0, bias_std^2). The
    numbers are drawn in float64 in the order of ``named_weights``, the same for every dtype.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in named_weights(model):
        drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        if name.endswith("e_score_correction_bias"):
            tensor.copy_(drawn * bias_std)
        elif name.endswith("norm.weight"):
            tensor.copy_(1 + drawn * std)
        else:
            tensor.copy_(drawn * std)
    return model


def random_model(
    config: ModelConfig | None = None,
    *,
    precision: Precision = F32,
    kernels: Kernels | None = None,
    seed: int = 0,
    **changes: Any,
) -> Transformer:
    """Build a model with random weights, of ``config`` or of ``tiny_config(**changes)``."""
    config = config or tiny_config(**changes)
    return randomise(Transformer(config, precision, kernels=kernels), seed=seed)


def random_tokens(
    config: ModelConfig, batch: int, length: int, *, seed: int = 0, low: int = 0
) -> Tensor:
    """Draw token ids, int64 ``[batch, length]``, from ``low`` up to the vocabulary's end."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, config.vocab_size, (batch, length), generator=generator)


def as_batch(tokens_BS: Tensor) -> Batch:
    """Return rows that are one document each."""
    return Batch(tokens_BS, torch.zeros_like(tokens_BS, dtype=torch.int32))


def random_batch(config: ModelConfig, batch: int, length: int, *, seed: int = 0) -> Batch:
    """Draw rows of one document each."""
    return as_batch(random_tokens(config, batch, length, seed=seed))


def latent_pages(
    spans: Sequence[tuple[int, int]],
    width: int,
    dtype: torch.dtype,
    *,
    page: int = TILE,
    first: int = 0,
    seed: int = 0,
) -> LatentPages:
    """Make a layer's pages for sequences whose new tokens stand at positions ``start`` to ``end``.

    Pages come in no order and hold random rows, those of the new tokens too.
    """
    generator = torch.Generator().manual_seed(seed)
    needed = [-(-end // page) for _, end in spans]
    shuffled = torch.randperm(sum(needed) + 1, generator=generator).tolist()
    longest = max(needed)
    tables = torch.zeros(len(spans), longest, dtype=torch.int64)
    slots, sequence, position = [], [], []
    for number, (start, end) in enumerate(spans):
        own = [shuffled.pop() for _ in range(needed[number])]
        tables[number, : len(own)] = torch.tensor(own)
        slots += [own[p // page] * page + p % page for p in range(start, end)]
        sequence += [number] * (end - start)
        position += range(start, end)
    pages = torch.randn(sum(needed) + 1, page, width, generator=generator, dtype=torch.float64)
    where = (torch.tensor(numbers) for numbers in (slots, sequence, position))
    slots_N, sequence_N, position_N = where
    return LatentPages(pages.to(dtype), slots_N, tables, sequence_N, position_N, first)


class Past:
    """What a model has read of ``batch`` sequences of equal length, in pages that lie in no order.

    Calling it feeds the next tokens ``[batch, T]`` and returns their logits ``[batch, T, V]``.
    """

    def __init__(self, model: Transformer, batch: int, capacity: int) -> None:
        needed = -(-capacity // TILE)
        self.model, self.length = model, 0
        self.cache = PagedCache(model, batch * needed, TILE)
        order = torch.randperm(batch * needed, generator=torch.Generator().manual_seed(1))
        self.tables = order.view(batch, needed).tolist()

    def step(self, tokens_BT: Tensor) -> Step:
        """Return the next tokens as a model takes them, without feeding them."""
        feeds = []
        for table, tokens in zip(self.tables, tokens_BT.tolist(), strict=True):
            positions = range(self.length, self.length + len(tokens))
            slots = [table[p // TILE] * TILE + p % TILE for p in positions]
            feeds.append(Feed(table, self.length, tokens, slots))
        return Step(self.cache, feeds)

    def __call__(self, tokens_BT: Tensor) -> Tensor:
        step = self.step(tokens_BT)
        logits_1NV = self.model(step.tokens_BT, step)
        self.length += tokens_BT.shape[1]
        return logits_1NV[0].unflatten(0, tokens_BT.shape)


def step_settings(config: PretrainConfig, rate: float) -> StepSettings:
    """Return the settings of a first step, with its own learning rate."""
    return replace(settings_at(config, 1, 0), learning_rate=rate)


def hf_config(config: ModelConfig, **changes: Any) -> DeepseekV3Config:
    """Spell a configuration as transformers does, field by field and not through ``config_json``.

    ``changes`` go to DeepseekV3Config as they are.
    """
    from transformers import DeepseekV3Config

    skipped = {"rope_theta", "rope_scaling", "initializer_range", "scoring_func", "topk_method"}
    fields = {k: v for k, v in config.model_dump().items() if k not in skipped}
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        rope |= config.rope_scaling.model_dump() | {"rope_type": "yarn"}
    return DeepseekV3Config(
        **fields
        | {
            "num_key_value_heads": config.num_attention_heads,
            "rope_parameters": rope,
            "dtype": "float32",
        }
        | changes
    )


def open_in_transformers(
    path: Path,
    dtype: torch.dtype = torch.float32,
    attention: str = "eager",
    *,
    unused: Collection[str] = (),
) -> DeepseekV3ForCausalLM:
    """Open a checkpoint folder with transformers' own class, in evaluation mode.

    Raises AssertionError when a weight is missing, left over (MTP layers excepted, which this class
    does not run, and those ``unused``) or of another shape: transformers itself only warns.
    """
    from transformers import DeepseekV3ForCausalLM

    model, report = DeepseekV3ForCausalLM.from_pretrained(
        path,
        dtype=dtype,
        attn_implementation=attention,
        # Its grouped product wants rows that are multiples of 16 bytes.
        experts_implementation="eager",
        output_loading_info=True,
    )
    layers = model.config.num_hidden_layers
    left_over = {n for n in report["unexpected_keys"] if _layer(n) < layers} - set(unused)
    assert not report["missing_keys"], report["missing_keys"]
    assert not left_over, left_over
    assert not report["mismatched_keys"], report["mismatched_keys"]
    return model.eval()


def transformers_twin(
    model: Transformer, path: Path, dtype: torch.dtype = torch.float32
) -> DeepseekV3ForCausalLM:
    """Save a model into the folder ``path`` and open it with transformers."""
    import ziphius

    ziphius.save(model, path)
    return open_in_transformers(path, dtype)


def _layer(name: str) -> int:
    parts = name.split(".")
    return int(parts[2]) if parts[:2] == ["model", "layers"] else -1
