"""From logits to a token: the distribution, and draws from it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ziphius.config.errors import BadInput
from ziphius.inference.sampler import SamplingParams, probabilities, sample

LOGITS = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=12)


def p(logits: list[float], **params: Any) -> list[float]:
    return probabilities(torch.tensor(logits), SamplingParams(**params)).tolist()


@settings(max_examples=60)
@given(LOGITS, st.floats(0.1, 5))
def test_temperature_divides_the_logits(logits: list[float], temperature: float) -> None:
    largest = max(logits)
    weights = [math.exp((x - largest) / temperature) for x in logits]
    expected = [w / sum(weights) for w in weights]
    assert p(logits, temperature=temperature) == pytest.approx(expected, abs=1e-9)


@settings(max_examples=100)
@given(LOGITS, st.floats(0.01, 0.999))
def test_top_p_keeps_the_smallest_sufficient_set(logits: list[float], top_p: float) -> None:
    whole = p(logits, temperature=1.0)
    kept = p(logits, temperature=1.0, top_p=top_p)
    chosen = [i for i, share in enumerate(kept) if share > 0]
    assert chosen
    dropped = [whole[i] for i in range(len(whole)) if i not in chosen]
    assert min(whole[i] for i in chosen) >= max(dropped, default=0)
    total = sum(whole[i] for i in chosen)
    assert total >= top_p - 1e-9
    assert total - min(whole[i] for i in chosen) < top_p + 1e-9, "a smaller set would do"
    assert sum(kept) == pytest.approx(1)
    for i in chosen:
        assert kept[i] == pytest.approx(whole[i] / total)


def test_top_p_by_hand() -> None:
    logits = [math.log(x) for x in (0.1, 0.5, 0.15, 0.25)]
    assert p(logits, temperature=1.0, top_p=0.5) == pytest.approx([0, 1, 0, 0])
    assert p(logits, temperature=1.0, top_p=0.6) == pytest.approx([0, 2 / 3, 0, 1 / 3])
    assert p(logits, temperature=1.0, top_p=0.76) == pytest.approx([0, 5 / 9, 1.5 / 9, 2.5 / 9])
    assert p(logits, temperature=1.0, top_p=1e-9) == pytest.approx([0, 1, 0, 0])


def test_low_temperatures_approach_greedy() -> None:
    logits = torch.randn(50)
    best = int(logits.argmax())
    assert probabilities(logits, SamplingParams(temperature=1e-4))[best].item() == pytest.approx(1)
    generator = torch.Generator().manual_seed(0)
    assert sample(logits, SamplingParams(), generator) == best
    assert {sample(logits, SamplingParams(temperature=1e-4), generator) for _ in range(20)} == {
        best
    }


@pytest.mark.parametrize("temperature", [1e-310, 5e-324, 1e300])
def test_extreme_temperatures_give_a_distribution(temperature: float) -> None:
    shares = p([1.0, 300.0, -300.0, 299.0], temperature=temperature)
    expected = [0, 1, 0, 0] if temperature < 1 else [0.25] * 4
    assert shares == pytest.approx(expected)


def test_greedy_draws_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    sample(torch.randn(9), SamplingParams(), generator)
    assert torch.equal(generator.get_state(), state)


def test_draws_follow_the_distribution() -> None:
    logits, params = torch.tensor([0.0, 1.0, 2.0, -1.0]), SamplingParams(temperature=1.5)
    generator = torch.Generator().manual_seed(0)
    draws = torch.tensor([sample(logits, params, generator) for _ in range(4000)])
    shares = draws.bincount(minlength=4).double() / 4000
    expected = (logits.double() / 1.5).softmax(0)
    # Four standard errors.
    assert ((shares - expected).abs() < 4 * (expected * (1 - expected) / 4000).sqrt()).all()


def test_a_seed_repeats() -> None:
    logits, params = torch.randn(100), SamplingParams(temperature=1.0)
    runs = []
    for seed in (1, 1, 2):
        generator = torch.Generator().manual_seed(seed)
        runs.append([sample(logits, params, generator) for _ in range(20)])
    assert runs[0] == runs[1] != runs[2]


def test_bfloat16_logits_are_sampled_in_float64() -> None:
    result = probabilities(torch.randn(20).bfloat16(), SamplingParams(temperature=0.7))
    assert result.dtype == torch.float64
    assert result.sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"max_tokens": 0}, "max tokens = 0"),
        ({"temperature": -0.1}, "temperature = -0.1"),
        ({"temperature": math.inf}, "temperature = inf"),
        ({"temperature": math.nan}, "temperature = nan"),
        ({"top_p": 0.0}, "top-p = 0.0"),
        ({"top_p": 1.1}, "top-p = 1.1"),
        ({"top_p": math.nan}, "top-p = nan"),
    ],
)
def test_impossible_parameters(params: dict[str, Any], expected: str) -> None:
    with pytest.raises(BadInput, match=expected):
        SamplingParams(**params)


def test_possible_extremes() -> None:
    SamplingParams(max_tokens=1, temperature=0.0, top_p=1.0)
    SamplingParams(temperature=100.0, top_p=1e-6)
