"""The [sft] table: supervised fine-tuning on conversations (facts 8.1)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from ziphius.config.records import RecordsConfig


class SftConfig(RecordsConfig):
    """Published are two epochs and a cosine from 5e-6 to 1e-6.

    Row length, batch and warm-up are ours. ``bias_update_speed`` is 0: routing biases stay as
    pre-training left them. MTP stays in the objective at the weight that pre-training ended with.
    """

    usual_epochs: ClassVar[int] = 2

    sequence_length: int = Field(4096, ge=2)
    batch_size: int = Field(32, ge=1)
    micro_batch_size: int = Field(1, ge=1)
    learning_rate: float = Field(5e-6, ge=0)
    final_learning_rate: float = Field(1e-6, ge=0)
    bias_update_speed: float = Field(0.0, ge=0)
    mtp_loss_weight: float = Field(0.1, ge=0)
