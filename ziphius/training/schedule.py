"""The learning rate as a function of the step: warm-up, then a cosine."""

from __future__ import annotations

import math

from ziphius.config.pretrain import PretrainConfig


def learning_rate(config: PretrainConfig, step: int) -> float:
    """Return the rate of optimizer step ``step``, counted from 1.

    Linear from 0 over ``warmup_steps``, then a cosine from ``learning_rate`` that reaches
    ``final_learning_rate`` at step ``steps`` (the shapes of facts 6.3).
    """
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    remaining = max(1, config.steps - config.warmup_steps)
    fraction = min(1.0, (step - config.warmup_steps) / remaining)
    span = config.learning_rate - config.final_learning_rate
    return config.final_learning_rate + 0.5 * span * (1 + math.cos(math.pi * fraction))
