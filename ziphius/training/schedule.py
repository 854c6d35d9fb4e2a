"""What changes during a run, as functions of the tokens seen (report section 4.2; facts 6.3).

A step's settings are those of the tokens seen before it. Only the warm-up counts steps, as the
report does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ziphius.config.moment import moment_tokens
from ziphius.config.pretrain import TrainingConfig


@dataclass(frozen=True)
class StepSettings:
    """One optimizer step's settings. ``batch_size`` counts sequences over all ranks."""

    learning_rate: float
    batch_size: int
    bias_update_speed: float
    mtp_loss_weight: float


def settings_at(
    config: TrainingConfig, step: int, tokens: int, rate_tokens: float | None = None
) -> StepSettings:
    """Return the settings of optimizer step ``step``, counted from 1, after ``tokens`` tokens.

    ``rate_tokens`` places the learning rate elsewhere in the run; quickstart's clock does so.
    """
    return StepSettings(
        learning_rate=learning_rate(config, step, tokens if rate_tokens is None else rate_tokens),
        batch_size=batch_size(config, tokens),
        bias_update_speed=bias_update_speed(config, tokens),
        mtp_loss_weight=mtp_loss_weight(config, tokens),
    )


def learning_rate(config: TrainingConfig, step: int, tokens: float) -> float:
    """Return the learning rate: warm-up, constant, cosine, constant, constant.

    The warm-up is linear and reaches ``learning_rate`` at step ``warmup_steps``; where it lasts
    longer than the constant phase, it scales the start of the cosine.
    """
    c, total = config, config.total_tokens
    warmth = min(1.0, step / c.warmup_steps) if c.warmup_steps else 1.0
    if c.last_learning_rate is not None and tokens >= moment_tokens(c.last_start, total):
        return warmth * c.last_learning_rate
    start, end = moment_tokens(c.decay_start, total), moment_tokens(c.decay_end, total)
    if tokens <= start:
        return warmth * c.learning_rate
    fraction = min(1.0, (tokens - start) / max(1, end - start))
    span = c.learning_rate - c.final_learning_rate
    return warmth * (c.final_learning_rate + 0.5 * span * (1 + math.cos(math.pi * fraction)))


def batch_size(config: TrainingConfig, tokens: int) -> int:
    """Return the batch size in sequences: linear in tokens, then constant.

    The ramp's shape is unpublished; ours is rounded down to whole micro-batches.
    """
    c = config
    end = moment_tokens(c.batch_ramp_end, c.total_tokens)
    if c.batch_size_start is None or tokens >= end:
        return c.batch_size
    grown = c.batch_size_start + (c.batch_size - c.batch_size_start) * tokens // end
    return max(c.micro_batch_size, grown // c.micro_batch_size * c.micro_batch_size)


def bias_update_speed(config: TrainingConfig, tokens: int) -> float:
    """Return gamma: constant, then 0 (facts 2.1)."""
    stop = moment_tokens(config.bias_update_stop, config.total_tokens)
    return config.bias_update_speed if tokens < stop else 0.0


def mtp_loss_weight(config: TrainingConfig, tokens: int) -> float:
    """Return lambda, which changes once (facts 3.1)."""
    change = moment_tokens(config.mtp_loss_weight_change, config.total_tokens)
    if config.mtp_loss_weight_late is None or tokens < change:
        return config.mtp_loss_weight
    return config.mtp_loss_weight_late


def count_steps(config: TrainingConfig) -> int:
    """Count the optimizer steps of the whole run; the last one may go beyond its tokens."""
    end = moment_tokens(config.batch_ramp_end, config.total_tokens)
    steps = tokens = 0
    while config.batch_size_start is not None and tokens < min(end, config.total_tokens):
        tokens += batch_size(config, tokens) * config.sequence_length
        steps += 1
    left = max(0, config.total_tokens - tokens)
    return steps + -(-left // (config.batch_size * config.sequence_length))
