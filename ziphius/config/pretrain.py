"""What is optimised, how, and for how long: the [pretrain] table, and what other stages share.

The tables are flat; their fields come in four groups, one class each (facts 6.3). A moment of the
run is a number of tokens seen or a share of the run, as in ``"67.5%"``.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from ziphius.config.moment import Moment
from ziphius.config.table import Table


class _Length(Table):
    steps: int | None = Field(None, ge=1)
    tokens: int | None = Field(None, ge=1)
    sequence_length: int = Field(ge=2)
    batch_size: int = Field(ge=1)
    micro_batch_size: int = Field(ge=1)
    batch_size_start: int | None = Field(None, ge=1)
    batch_ramp_end: Moment = 0


class _Rate(Table):
    learning_rate: float = Field(ge=0)
    warmup_steps: int = Field(0, ge=0)
    decay_start: Moment = 0
    decay_end: Moment = "100%"
    final_learning_rate: float = Field(ge=0)
    last_learning_rate: float | None = Field(None, ge=0)
    last_start: Moment = "100%"


class OptimizerSettings(Table):
    """AdamW, clipping, and the average of the weights."""

    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    adam_eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    clip_norm: float = Field(1.0, gt=0)
    moments: Literal["float32", "bfloat16"] = "bfloat16"
    ema_decay: float = Field(0.0, ge=0, lt=1)


class ObjectiveSettings(Table):
    """What is minimised, and how routing biases move."""

    bias_update_speed: float = Field(0.001, ge=0)
    bias_update_stop: Moment = "100%"
    balance_loss_weight: float = Field(0.0001, ge=0)
    balance_loss_choices: Literal["unbiased", "real"] = "unbiased"
    mtp_loss_weight: float = Field(0.3, ge=0)
    mtp_loss_weight_late: float | None = Field(None, ge=0)
    mtp_loss_weight_change: Moment = "100%"


class TrainingConfig(_Length, _Rate, OptimizerSettings, ObjectiveSettings):
    """A stage's length is ``tokens``, or ``steps`` of a constant batch; batches count sequences.

    ``batch_size`` is one optimizer step's over all ranks; it grows from ``batch_size_start`` until
    ``batch_ramp_end``. The learning rate is warmed up over ``warmup_steps``, constant until
    ``decay_start``, falls by a cosine to ``final_learning_rate`` at ``decay_end``, stays there, and
    is ``last_learning_rate`` from ``last_start`` on. ``bias_update_speed`` is gamma, 0 from
    ``bias_update_stop`` on; the MTP weight is lambda and changes once. ``ema_decay`` = 0 keeps no
    average of the weights.
    """

    @property
    def total_tokens(self) -> int:
        """How many tokens the run is meant to see."""
        if self.tokens is not None:
            return self.tokens
        assert self.steps is not None, "the table is checked when it is read"
        return self.steps * self.batch_size * self.sequence_length

    def until(self, tokens: int) -> Self:
        """Return the table of a stage that has ended after so many tokens."""
        if self.steps is None:
            return self.model_copy(update={"tokens": tokens})
        return self.model_copy(update={"steps": tokens // (self.batch_size * self.sequence_length)})

    @model_validator(mode="after")
    def _batches_divide(self) -> Self:
        for name in ("batch_size", "batch_size_start"):
            size = getattr(self, name)
            if size is not None and size % self.micro_batch_size:
                raise ValueError(
                    f"{name} = {size} is no multiple of micro_batch_size = {self.micro_batch_size}"
                )
        return self

    @model_validator(mode="after")
    def _length_is_known(self) -> Self:
        if (self.steps is None) == (self.tokens is None):
            raise ValueError(
                f"steps = {self.steps} and tokens = {self.tokens}: give one of them and unset the "
                "other with null"
            )
        if self.steps is not None and self.batch_size_start is not None:
            raise ValueError(
                f"batch_size_start = {self.batch_size_start}: a run whose batch grows is measured "
                "in tokens: set tokens in place of steps"
            )
        return self


class PretrainConfig(TrainingConfig):
    """The [pretrain] table."""

    @property
    def ending_rate(self) -> float:
        """The learning rate of the last steps, which the next stages go on with."""
        last = self.last_learning_rate
        return self.final_learning_rate if last is None else last
