"""The [grpo] table: reinforcement learning from rewards of whole groups (facts 8.3, 8.7)."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from ziphius.config.pretrain import TrainingConfig


class _Questions(TrainingConfig):
    tasks: str = ""
    rewards: str = "answer"
    prompt: Literal["v3", "r1", "v3.1", "zero"] = "v3.1"
    questions: int = Field(32, ge=1)
    group: int = Field(16, ge=2)
    max_tokens: int = Field(2048, ge=1)
    temperature: float = Field(1.0, gt=0)


class _Update(_Questions):
    form: Literal["token", "batch", "sequence"] = "token"
    deviation: Literal["population", "sample", "none"] = "population"
    clip: float = Field(0.2, gt=0)
    clip_high: float | None = Field(None, gt=0)
    kl_weight: float = Field(0.001, ge=0)
    reference_every: int | None = Field(400, ge=1)
    updates: int = Field(1, ge=1)
    epochs: int = Field(1, ge=1)
    replay: bool = True


class _Samplers(_Update):
    samplers: int = Field(0, ge=0)
    samplers_address: str | None = None
    sampler_threads: int = Field(1, ge=1)
    sampler_seconds: float = Field(600, gt=0)
    ahead: int = Field(0, ge=0, le=1)


class GrpoConfig(_Samplers):
    """A rollout asks ``questions`` of ``tasks`` and takes ``group`` answers to each.

    Answers have ``max_tokens`` at most. A rollout is learned in ``updates`` steps, ``epochs``
    times. ``form`` says what a ratio is of, and how losses are averaged: of a token, over an
    answer's tokens and then over answers (DeepSeekMath's); of a token, over all tokens (``batch``);
    or of a whole answer (V3's eq. 26). Ratios are clipped to ``1 - clip`` and ``1 + clip_high``,
    which is ``clip`` where nothing else is said. ``kl_weight`` is beta, of the distance to the
    policy that the stage began with or, every ``reference_every`` rollouts, has become.
    ``deviation`` divides a group's advantages; groups of equal rewards teach nothing and are left
    out. With ``replay`` experts are those that the engine chose. Log-probabilities are the model's
    own, at temperature 1, whatever the ``temperature`` that answers are drawn at.

    Without ``samplers`` the trainer's processes answer. Otherwise so many Ray actors do, each with
    ``sampler_threads``, on this machine or on the cluster at ``samplers_address``; one that takes
    longer than ``sampler_seconds`` is replaced. With ``ahead`` 1 they answer the next rollout while
    the last one is learned, by weights that are one rollout old.

    Of V3 neither rates nor sizes are published: learning rate, beta, group, questions and refresh
    are R1-Zero's, the others ours. Routing biases stay as they are; MTP modules are not trained.
    """

    steps: int | None = Field(None, ge=1)
    sequence_length: int = Field(4096, ge=2)
    batch_size: int = Field(32, ge=1)
    micro_batch_size: int = Field(1, ge=1)
    learning_rate: float = Field(3e-6, ge=0)
    final_learning_rate: float = Field(3e-6, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    bias_update_speed: float = Field(0.0, ge=0)
    balance_loss_weight: float = Field(0.0, ge=0)
    mtp_loss_weight: float = Field(0.0, ge=0)

    @property
    def steps_per_rollout(self) -> int:
        """How many steps learn one rollout."""
        return self.updates * self.epochs

    @model_validator(mode="after")
    def _length_is_known(self) -> Self:
        if self.tokens is not None or self.batch_size_start is not None:
            raise ValueError("tokens and batch_size_start: rollouts are counted in steps")
        if self.steps is not None and self.steps % self.steps_per_rollout:
            raise ValueError(
                f"steps = {self.steps} is no multiple of updates * epochs = "
                f"{self.steps_per_rollout}: end with a whole rollout"
            )
        if self.ahead and not self.samplers:
            raise ValueError("ahead = 1: only samplers can answer meanwhile: set samplers")
        if self.questions * self.group < self.updates:
            raise ValueError(f"updates = {self.updates}: more than the answers of a rollout")
        return self
