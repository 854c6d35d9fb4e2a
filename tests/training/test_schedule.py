"""Schedules: the published table at its breakpoints, and the shapes between them."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ziphius.config.errors import BadInput
from ziphius.config.moment import moment_tokens
from ziphius.config.pretrain import PretrainConfig
from ziphius.config.recipe import load_recipe
from ziphius.training.schedule import (
    batch_size,
    bias_update_speed,
    count_steps,
    learning_rate,
    mtp_loss_weight,
    settings_at,
)

T, B = 10**12, 10**9


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


@pytest.mark.parametrize(
    ("tokens", "rate", "batch", "gamma", "weight"),
    [
        (0, 2.2e-4, 3072, 0.001, 0.3),
        (469 * B // 2, 2.2e-4, 9216, 0.001, 0.3),
        (469 * B - 1, 2.2e-4, 15359, 0.001, 0.3),
        (469 * B, 2.2e-4, 15360, 0.001, 0.3),
        (10 * T - 1, 2.2e-4, 15360, 0.001, 0.3),
        (10 * T, 2.2e-4, 15360, 0.001, 0.1),
        (12_150 * B, (2.2e-4 + 2.2e-5) / 2, 15360, 0.001, 0.1),
        (14_300 * B - 1, 2.2e-5, 15360, 0.001, 0.1),
        (14_300 * B, 2.2e-5, 15360, 0.0, 0.1),
        (14_633 * B - 1, 2.2e-5, 15360, 0.0, 0.1),
        (14_633 * B, 7.3e-6, 15360, 0.0, 0.1),
        (14_800 * B - 1, 7.3e-6, 15360, 0.0, 0.1),
    ],
)
def test_the_published_run_at_its_breakpoints(
    tokens: int, rate: float, batch: int, gamma: float, weight: float
) -> None:
    """Facts 6.3, after the warm-up. The ramp is linear in tokens, which is ours."""
    found = settings_at(load_recipe("671b").pretrain, 5000, tokens)
    assert found.learning_rate == pytest.approx(rate, rel=1e-9)
    assert (found.batch_size, found.bias_update_speed, found.mtp_loss_weight) == (
        batch, gamma, weight,
    )  # fmt: skip


@pytest.mark.parametrize(("step", "rate"), [(1, 1.1e-7), (1000, 1.1e-4), (2000, 2.2e-4)])
def test_the_published_warm_up(step: int, rate: float) -> None:
    assert learning_rate(load_recipe("671b").pretrain, step, 0) == pytest.approx(rate)


def test_the_published_cosine() -> None:
    """Facts 6.3: 2.2e-5 + 0.5 (2.2e-4 - 2.2e-5) (1 + cos(pi (x - 10T) / 4.3T))."""
    config = load_recipe("671b").pretrain
    for share in range(44):
        x = 10 * T + share * 100 * B
        expected = 2.2e-5 + 0.5 * (2.2e-4 - 2.2e-5) * (1 + math.cos(math.pi * (x - 10e12) / 4.3e12))
        assert learning_rate(config, 10**5, x) == pytest.approx(expected, rel=1e-12)


def test_the_published_number_of_steps() -> None:
    """After the ramp about 227.8 thousand steps remain (facts 6.3)."""
    config = load_recipe("671b").pretrain
    after = (config.total_tokens - 469 * B) / (15360 * 4096)
    assert after == pytest.approx(227_800, rel=1e-3)
    steps, tokens = 0, 0
    while tokens < 470 * B:
        tokens += batch_size(config, tokens) * 4096
        steps += 1
    rest = math.ceil((config.total_tokens - tokens) / (15360 * 4096))
    assert count_steps(config) == steps + rest


def test_warm_up_is_linear_from_zero() -> None:
    config = settings(decay_start="100%")
    rates = [learning_rate(config, step, 8 * (step - 1)) for step in range(1, 21)]
    assert rates == pytest.approx([2.2e-4 * step / 20 for step in range(1, 21)])


def test_a_run_without_warm_up_starts_at_the_peak_and_ends_near_the_end() -> None:
    config = settings(warmup_steps=0, steps=10)
    rates = [learning_rate(config, step, 8 * (step - 1)) for step in range(1, 11)]
    assert rates[0] == 2.2e-4
    assert rates == sorted(rates, reverse=True)
    assert learning_rate(config, 11, 80) == pytest.approx(2.2e-5)


@given(
    start=st.integers(0, 100),
    length=st.integers(0, 100),
    tokens=st.integers(0, 1000),
    more=st.integers(0, 1000),
)
def test_after_the_warm_up_it_never_rises_and_stays_between_the_ends(
    start: int, length: int, tokens: int, more: int
) -> None:
    config = settings(decay_start=f"{start}%", decay_end=f"{min(100, start + length)}%")
    early, late = (learning_rate(config, 50, at) for at in (tokens, tokens + more))
    assert 2.2e-4 >= early >= late >= 2.2e-5 * (1 - 1e-12)


@given(
    first=st.integers(1, 50),
    last=st.integers(1, 50),
    micro=st.integers(1, 4),
    at=st.integers(0, 99),
)
def test_the_ramp_moves_in_whole_micro_batches_between_its_ends(
    first: int, last: int, micro: int, at: int
) -> None:
    config = settings(
        steps=None, tokens=10**6, batch_size=last * micro, batch_size_start=first * micro,
        micro_batch_size=micro, batch_ramp_end=100,
    )  # fmt: skip
    size = batch_size(config, at)
    assert size % micro == 0
    assert min(first, last) * micro <= size <= max(first, last) * micro
    assert batch_size(config, 0) == first * micro
    assert batch_size(config, 100) == last * micro


@given(tokens=st.integers(1, 10**5), size=st.integers(1, 9), ramp=st.integers(0, 2 * 10**5))
def test_counted_steps_are_those_of_the_loop(tokens: int, size: int, ramp: int) -> None:
    config = settings(
        steps=None, tokens=tokens, batch_size=size * 3, batch_size_start=size, batch_ramp_end=ramp
    )
    seen = steps = 0
    while seen < tokens:
        seen += batch_size(config, seen) * 8
        steps += 1
    assert count_steps(config) == steps


def test_gamma_stops_and_lambda_changes_once() -> None:
    config = settings(
        bias_update_speed=0.5, bias_update_stop="50%", mtp_loss_weight=0.3,
        mtp_loss_weight_late=0.1, mtp_loss_weight_change=200,
    )  # fmt: skip
    assert [bias_update_speed(config, at) for at in (0, 399, 400, 800)] == [0.5, 0.5, 0, 0]
    assert [mtp_loss_weight(config, at) for at in (0, 199, 200, 800)] == [0.3, 0.3, 0.1, 0.1]


def test_without_their_moments_gamma_and_lambda_stay() -> None:
    config = settings()
    assert {bias_update_speed(config, at) for at in (0, 799)} == {0.001}
    assert {mtp_loss_weight(config, at) for at in (0, 799, 10**9)} == {0.3}


def test_moments_are_tokens_or_shares() -> None:
    assert moment_tokens(7, 1000) == 7
    assert moment_tokens("67.5%", 1000) == 675
    assert moment_tokens("100 %", 14_800 * B) == 14_800 * B


@pytest.mark.parametrize("value", ["half", "-1", "101%", '"-5%"', "1.5"])
def test_other_moments_are_refused(value: str) -> None:
    with pytest.raises(BadInput, match=r"pretrain\.decay_start"):
        load_recipe("tiny", [f"pretrain.decay_start={value}"])


def test_length_is_tokens_or_steps() -> None:
    assert settings(steps=5, batch_size=3).total_tokens == 5 * 3 * 8
    for changes in ({"tokens": 80}, {"steps": None}):
        with pytest.raises(ValueError, match="give one of them"):
            settings(**changes)
    with pytest.raises(ValueError, match="set tokens in place of steps"):
        settings(batch_size_start=1)
