"""The [dpo] table: direct preference optimisation on pairs of answers (facts 8.4)."""

from __future__ import annotations

from pydantic import Field

from ziphius.config.records import RecordsConfig


class DpoConfig(RecordsConfig):
    """``beta`` says how dear it is to leave the reference, the checkpoint that is begun with.

    DeepSeek-LLM's chat model was trained so: one epoch, a rate of 5e-6 with warm-up and cosine,
    batches of 512 (read in secondary sources, unconfirmed). Ours are beta, the end of the cosine,
    and row length: a row holds as many whole pairs as fit, and ``batch_size`` counts rows. Routing
    biases stay as they are; MTP modules are not trained.
    """

    beta: float = Field(0.1, gt=0)

    sequence_length: int = Field(4096, ge=2)
    batch_size: int = Field(64, ge=1)
    micro_batch_size: int = Field(1, ge=1)
    learning_rate: float = Field(5e-6, ge=0)
    final_learning_rate: float = Field(5e-7, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    bias_update_speed: float = Field(0.0, ge=0)
    balance_loss_weight: float = Field(0.0, ge=0)
    mtp_loss_weight: float = Field(0.0, ge=0)
