"""Learning rate and bias update speed as functions of the step."""

from __future__ import annotations

import math

from ziphius.config.pretrain import PretrainConfig


def bias_update_speed(config: PretrainConfig, step: int) -> float:
    """Return gamma of optimizer step ``step``, counted from 1: constant, then 0 (facts 2.1)."""
    stop = config.bias_update_stop_step
    return config.bias_update_speed if stop is None or step <= stop else 0.0


def learning_rate(config: PretrainConfig, step: float) -> float:
    """Return the rate of optimizer step ``step``, counted from 1; it may lie between two steps.

    Linear from 0 over ``warmup_steps``, then a cosine from ``learning_rate`` that reaches
    ``final_learning_rate`` at step ``steps`` (the shapes of facts 6.3).
    """
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    remaining = max(1, config.steps - config.warmup_steps)
    fraction = min(1.0, (step - config.warmup_steps) / remaining)
    span = config.learning_rate - config.final_learning_rate
    return config.final_learning_rate + 0.5 * span * (1 + math.cos(math.pi * fraction))
