"""The [reward] table: a model that scores answers (facts 8.2, 8.8)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ziphius.config.records import RecordsConfig


class RewardConfig(RecordsConfig):
    """``kind`` is what records say: of two answers the better one (``pairwise``), whether an
    answer is good or safe (``binary``), or how good it is (``regression``).

    Records may have the reasoning that leads to the score: the model learns to write it behind the
    answer, with weight ``reasoning_weight`` in the loss, and the score is read at its end.

    R1's reward models were trained so: pairs for helpfulness, single answers for safety, one epoch
    at 6e-6 over 8192 tokens in batches of 256. Here ``batch_size`` counts rows, which hold as many
    answers as fit. The rate's course and the weight of the reasoning are ours.
    """

    kind: Literal["pairwise", "binary", "regression"] = "pairwise"
    reasoning_weight: float = Field(1.0, ge=0)

    sequence_length: int = Field(8192, ge=2)
    batch_size: int = Field(256, ge=1)
    micro_batch_size: int = Field(1, ge=1)
    learning_rate: float = Field(6e-6, ge=0)
    final_learning_rate: float = Field(6e-6, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    bias_update_speed: float = Field(0.0, ge=0)
    balance_loss_weight: float = Field(0.0, ge=0)
    mtp_loss_weight: float = Field(0.0, ge=0)
