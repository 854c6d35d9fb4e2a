"""The [pretrain] table: what is optimised, how, and for how long (facts 6.3).

The table is flat; its fields come in three groups, one class each.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ziphius.config.table import Table


class _Length(Table):
    steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    micro_batch_size: int = Field(ge=1)
    sequence_length: int = Field(ge=2)


class _Optimizer(Table):
    learning_rate: float = Field(ge=0)
    final_learning_rate: float = Field(ge=0)
    warmup_steps: int = Field(0, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    adam_eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    clip_norm: float = Field(1.0, gt=0)
    moments: Literal["float32", "bfloat16"] = "bfloat16"


class _Objective(Table):
    bias_update_speed: float = Field(0.001, ge=0)
    bias_update_stop_step: int | None = Field(None, ge=0)
    balance_loss_weight: float = Field(0.0001, ge=0)
    balance_loss_choices: Literal["unbiased", "real"] = "unbiased"
    mtp_loss_weight: float = Field(0.3, ge=0)


class PretrainConfig(_Length, _Optimizer, _Objective):
    """Batches are counted in sequences; ``batch_size`` is one optimizer step's, over all ranks.

    ``bias_update_speed`` is gamma; after ``bias_update_stop_step`` it is 0 and biases are frozen.
    """

    @model_validator(mode="after")
    def _batches_divide(self) -> PretrainConfig:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size = {self.batch_size} is no multiple of "
                f"micro_batch_size = {self.micro_batch_size}"
            )
        return self
