"""The learning rate: warm-up, ends, and the published cosine."""

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ziphius.config.pretrain import PretrainConfig
from ziphius.config.recipe import load_recipe
from ziphius.training.schedule import bias_update_speed, learning_rate


def settings(**changes: Any) -> PretrainConfig:
    given: dict[str, Any] = {
        "steps": 100,
        "batch_size": 1,
        "micro_batch_size": 1,
        "sequence_length": 8,
        "learning_rate": 2.2e-4,
        "final_learning_rate": 2.2e-5,
        "warmup_steps": 20,
    }
    return PretrainConfig(**{**given, **changes})


def test_warm_up_is_linear_from_zero() -> None:
    config = settings()
    rates = [learning_rate(config, step) for step in range(1, 21)]
    assert rates == pytest.approx([2.2e-4 * step / 20 for step in range(1, 21)])
    assert learning_rate(config, 0) == 0
    assert learning_rate(config, 20) == 2.2e-4


def test_cosine_equals_the_published_formula() -> None:
    """Facts 6.3: 2.2e-5 + 0.5 (2.2e-4 - 2.2e-5) (1 + cos(pi (x - start) / length))."""
    config = settings()
    for step in range(20, 101):
        expected = 2.2e-5 + 0.5 * (2.2e-4 - 2.2e-5) * (1 + math.cos(math.pi * (step - 20) / 80))
        assert learning_rate(config, step) == pytest.approx(expected, rel=1e-12)
    assert learning_rate(config, 60) == pytest.approx((2.2e-4 + 2.2e-5) / 2)


def test_a_run_without_warm_up_starts_below_the_peak_at_once() -> None:
    config = settings(warmup_steps=0, steps=10)
    rates = [learning_rate(config, step) for step in range(1, 11)]
    assert 0.9 * 2.2e-4 < rates[0] < 2.2e-4
    assert rates[-1] == pytest.approx(2.2e-5)


@given(
    steps=st.integers(1, 60),
    warmup=st.integers(0, 60),
    rate=st.floats(1e-6, 1),
    share=st.floats(0, 1),
)
def test_rises_then_falls_and_stays_between_the_ends(
    steps: int, warmup: int, rate: float, share: float
) -> None:
    final = rate * share
    config = settings(
        steps=steps, warmup_steps=warmup, learning_rate=rate, final_learning_rate=final
    )
    rates = [learning_rate(config, step) for step in range(1, steps + 1)]
    rising, falling = rates[:warmup], rates[warmup:]
    slack = rate * 1e-12
    assert all(a < b for a, b in pairwise(rising))
    assert all(a >= b - slack for a, b in pairwise(falling))
    assert all(0 <= r <= rate + slack for r in rates)
    assert all(r >= final - slack for r in falling)
    if warmup < steps:
        assert rates[-1] == pytest.approx(final, abs=slack)
    # A resumed run may ask beyond the end: the rate stays there.
    after = learning_rate(config, max(steps, warmup) + 7)
    assert after == pytest.approx(final, abs=slack)


def test_gamma_is_constant_and_then_zero() -> None:
    config = load_recipe("671b").pretrain
    frozen = 14.8e12 - 14.3e12
    tokens_a_step = config.batch_size * config.sequence_length
    stop = config.bias_update_stop_step
    assert stop is not None
    assert (config.steps - stop) * tokens_a_step == pytest.approx(frozen, rel=1e-3)
    assert bias_update_speed(config, 1) == bias_update_speed(config, stop) == 0.001
    assert bias_update_speed(config, stop + 1) == bias_update_speed(config, config.steps) == 0
    assert bias_update_speed(load_recipe("tiny").pretrain, 10**9) > 0
