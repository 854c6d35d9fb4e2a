"""The [model] table: the network's dimensions, under the names of the Hugging Face config.

The table is flat, as ``config.json`` is; its fields come in three groups, one class each.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ziphius.config.table import Table

# Facts 6.2: the published init is N(0, 0.006^2) at hidden size 7168. Smaller networks keep the
# same std * sqrt(hidden), so that a linear layer changes the size of its input equally.
PUBLISHED_INIT_STD = 0.006
PUBLISHED_HIDDEN_SIZE = 7168


class Yarn(Table):
    """YaRN context extension (report section 4.3). It is active if and only if it is present."""

    factor: float = Field(40.0, ge=1.0)
    original_max_position_embeddings: int = Field(4096, ge=1)
    beta_fast: float = Field(32.0, gt=0)
    beta_slow: float = Field(1.0, gt=0)
    mscale: float = Field(1.0, ge=0)
    mscale_all_dim: float = Field(1.0, ge=0)


class _Trunk(Table):
    vocab_size: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    intermediate_size: int = Field(ge=1)
    num_hidden_layers: int = Field(ge=1)
    first_k_dense_replace: int = Field(ge=0)
    num_nextn_predict_layers: int = Field(0, ge=0)
    max_position_embeddings: int = Field(4096, ge=1)
    rms_norm_eps: float = Field(1e-6, gt=0)
    initializer_range: float | None = Field(None, gt=0)
    num_labels: int = Field(0, ge=0)
    bos_token_id: int = Field(0, ge=0)
    eos_token_id: int | tuple[int, ...] = 1


class _Attention(Table):
    num_attention_heads: int = Field(ge=1)
    q_lora_rank: int | None = Field(None, ge=1)
    kv_lora_rank: int = Field(ge=1)
    qk_nope_head_dim: int = Field(ge=1)
    qk_rope_head_dim: int = Field(ge=2)
    v_head_dim: int = Field(ge=1)
    rope_theta: float = Field(10000.0, gt=1)
    rope_scaling: Yarn | None = None


class _Experts(Table):
    n_routed_experts: int = Field(ge=1)
    n_shared_experts: int = Field(1, ge=1)
    num_experts_per_tok: int = Field(ge=1)
    moe_intermediate_size: int = Field(ge=1)
    n_group: int = Field(1, ge=1)
    topk_group: int = Field(1, ge=1)
    norm_topk_prob: bool = True
    routed_scaling_factor: float = Field(1.0, gt=0)
    scoring_func: Literal["sigmoid"] = "sigmoid"
    topk_method: Literal["noaux_tc"] = "noaux_tc"


class ModelConfig(_Trunk, _Attention, _Experts):
    """Dimensions of a DeepSeek-V3 network (facts 1.1, 1.8).

    With ``num_labels`` there is a second head beside that of tokens, which gives so many scores.
    """

    @property
    def qk_head_dim(self) -> int:
        """Width of one query or key head: the part without position, then the rotary part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def init_std(self) -> float:
        """Standard deviation of every initial weight (facts 1.2 and the rule above)."""
        if self.initializer_range is not None:
            return self.initializer_range
        return PUBLISHED_INIT_STD * (PUBLISHED_HIDDEN_SIZE / self.hidden_size) ** 0.5

    @model_validator(mode="after")
    def _dimensions_are_possible(self) -> ModelConfig:
        for problem in _impossible(self):
            raise ValueError(problem)
        return self


def _impossible(c: ModelConfig) -> list[str]:
    """Say which dimensions contradict each other, and how to mend them."""
    problems = []
    if c.qk_rope_head_dim % 2:
        problems.append(
            f"qk_rope_head_dim = {c.qk_rope_head_dim} is odd: rotary pairs need an even width"
        )
    if c.first_k_dense_replace > c.num_hidden_layers:
        problems.append(
            f"first_k_dense_replace = {c.first_k_dense_replace} exceeds "
            f"num_hidden_layers = {c.num_hidden_layers}"
        )
    if c.n_routed_experts % c.n_group:
        problems.append(
            f"n_routed_experts = {c.n_routed_experts} does not divide into n_group = {c.n_group}"
        )
        return problems
    group_size = c.n_routed_experts // c.n_group
    if c.n_group > 1 and group_size < 2:
        problems.append(
            f"n_group = {c.n_group} leaves {group_size} expert a group: a group's score is the sum "
            "of its two best, so use fewer groups"
        )
    if c.topk_group > c.n_group:
        problems.append(f"topk_group = {c.topk_group} exceeds n_group = {c.n_group}")
    allowed = min(c.topk_group, c.n_group) * group_size
    if c.num_experts_per_tok > allowed:
        problems.append(
            f"num_experts_per_tok = {c.num_experts_per_tok} exceeds the {allowed} experts of the "
            f"{c.topk_group} allowed groups: raise topk_group or lower num_experts_per_tok"
        )
    return problems
