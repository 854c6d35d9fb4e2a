"""The [extend] table: a longer context by YaRN, in phases (report section 4.3; facts 7)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Self

from pydantic import Field, model_validator

from ziphius.config.errors import BadInput
from ziphius.config.model import ModelConfig, Yarn
from ziphius.config.pretrain import ObjectiveSettings, OptimizerSettings, TrainingConfig
from ziphius.config.table import Table


class _Phases(Table):
    lengths: tuple[int, ...] = Field((32_768, 131_072), min_length=1)
    batch_sizes: tuple[int, ...] = (1920, 480)
    steps: tuple[int, ...] = (1000, 1000)
    micro_batch_size: int = Field(1, ge=1)
    learning_rate: float | None = Field(None, ge=0)
    warmup_steps: int = Field(0, ge=0)


class _Frequencies(Table):
    factor: float = Field(40.0, ge=1.0)
    beta_fast: float = Field(32.0, gt=0)
    beta_slow: float = Field(1.0, gt=0)
    mscale: float = Field(1.0, ge=0)
    mscale_all_dim: float = Field(1.0, ge=0)


class ExtendConfig(_Phases, _Frequencies, OptimizerSettings, ObjectiveSettings):
    """Phase k trains ``steps[k]`` steps of ``batch_sizes[k]`` rows of ``lengths[k]`` tokens.

    One number stands for all phases. The learning rate is constant; where none is given it is the
    one that [pretrain] ends with. Lengths, batches, steps, rate and YaRN's settings are the
    published ones; alpha is ``beta_slow``, beta ``beta_fast``. YaRN is the same in all phases: its
    ``factor`` is over the context that the checkpoint was trained with, and factor times as many
    positions are possible. A checkpoint that is extended already keeps what it has.

    Unpublished and ours: routing biases stay as pre-training left them (``bias_update_speed`` = 0),
    MTP keeps the weight that pre-training ended with, no warm-up.
    """

    bias_update_speed: float = Field(0.0, ge=0)
    mtp_loss_weight: float = Field(0.1, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _one_for_all(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        lengths = values.get("lengths", cls.model_fields["lengths"].default)
        if not isinstance(lengths, list | tuple):
            values = {**values, "lengths": (lengths,)}
            lengths = values["lengths"]
        for name in ("batch_sizes", "steps"):
            value = values.get(name)
            if value is not None and not isinstance(value, list | tuple):
                values = {**values, name: (value,) * len(lengths)}
        return values

    @model_validator(mode="after")
    def _phases_are_possible(self) -> Self:
        for name in ("batch_sizes", "steps"):
            given = getattr(self, name)
            if len(given) != len(self.lengths):
                raise ValueError(
                    f"lengths = {list(self.lengths)} and {name} = {list(given)}: give one of each "
                    "a phase"
                )
            if min(given) < 1:
                raise ValueError(f"{name} = {list(given)}: give at least 1 a phase")
        if min(self.lengths) < 2 or list(self.lengths) != sorted(set(self.lengths)):
            raise ValueError(f"lengths = {list(self.lengths)}: every phase is longer than the last")
        odd = [size for size in self.batch_sizes if size % self.micro_batch_size]
        if odd:
            raise ValueError(
                f"batch_sizes = {list(self.batch_sizes)}: {odd[0]} is no multiple of "
                f"micro_batch_size = {self.micro_batch_size}"
            )
        return self

    def phase(self, number: int, ending_rate: float) -> TrainingConfig:
        """Return what the training loop needs of a phase, counted from 0.

        ``ending_rate`` is the learning rate that pre-training ended with.
        """
        rate = ending_rate if self.learning_rate is None else self.learning_rate
        shared = {
            name: getattr(self, name)
            for table in (OptimizerSettings, ObjectiveSettings)
            for name in table.model_fields
        }
        return TrainingConfig(
            steps=self.steps[number],
            sequence_length=self.lengths[number],
            batch_size=self.batch_sizes[number],
            micro_batch_size=self.micro_batch_size,
            learning_rate=rate,
            final_learning_rate=rate,
            warmup_steps=self.warmup_steps,
            **shared,
        )

    def shortened(self, number: int, tokens: int) -> Self:
        """Return the table of a run whose phase ended after so many tokens."""
        steps = list(self.steps)
        steps[number] = max(1, tokens // (self.batch_sizes[number] * self.lengths[number]))
        return self.model_copy(update={"steps": tuple(steps)})


def extended(model: ModelConfig, config: ExtendConfig) -> ModelConfig:
    """Return a network with YaRN and the positions that it makes possible.

    The context before is ``max_position_embeddings``. Raises BadInput for phases that are longer
    than the context after.
    """
    if model.rope_scaling is None:
        before = model.max_position_embeddings
        yarn = Yarn(
            original_max_position_embeddings=before,
            **{name: getattr(config, name) for name in _Frequencies.model_fields},
        )
        context = math.floor(config.factor * before)
        model = model.model_copy(update={"rope_scaling": yarn, "max_position_embeddings": context})
    longest = config.lengths[-1]
    if longest > model.max_position_embeddings:
        yarn_now = model.rope_scaling
        assert yarn_now is not None, "it has just been set"
        raise BadInput(
            f"extend.lengths: {longest} tokens exceed the {model.max_position_embeddings:,} "
            f"positions of YaRN over {yarn_now.original_max_position_embeddings:,} with factor "
            f"{yarn_now.factor:g}: lower the lengths, or raise extend.factor of a checkpoint that "
            "is not extended yet"
        )
    return model
