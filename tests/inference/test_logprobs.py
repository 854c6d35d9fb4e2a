"""Reported log-probabilities and ranks against a sort of everything."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ziphius.inference.logprobs import Alternative, largest, log_sum_exp, score

# Few values, so that many are equal.
LEVELS = st.lists(st.sampled_from([-3.0, 0.0, 1.0, 2.5, -math.inf]), min_size=1, max_size=40)


def by_sorting(row: np.ndarray, count: int) -> list[int]:
    return sorted(range(len(row)), key=lambda token: (-row[token], token))[:count]


@settings(max_examples=100)
@given(LEVELS, st.integers(0, 45))
def test_the_largest_of_a_short_row(values: list[float], count: int) -> None:
    row = np.array(values)
    assert largest(row, count).tolist() == sorted(by_sorting(row, count))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    size=st.integers(128, 3000),
    levels=st.sampled_from([2, 5, 50, 10**6]),
    count=st.integers(1, 60),
)
def test_the_largest_of_a_long_row(seed: int, size: int, levels: int, count: int) -> None:
    row = np.random.default_rng(seed).integers(0, levels, size).astype(np.float32)
    assert largest(row, count).tolist() == sorted(by_sorting(row, count))


def test_scores_are_the_log_softmax() -> None:
    logits = torch.randn(20_000, generator=torch.Generator().manual_seed(0)) * 4
    row, expected = logits.numpy(), logits.double().log_softmax(0)
    order = by_sorting(row, 7)
    scored = score(row, 17, 7)
    assert scored.logprob == pytest.approx(expected[17].item(), abs=1e-12)
    assert scored.rank == by_sorting(row, len(row)).index(17) + 1
    assert [a.token for a in scored.top] == order
    assert [a.rank for a in scored.top] == list(range(1, 8))
    assert [a.logprob for a in scored.top] == pytest.approx(expected[order].tolist(), abs=1e-12)
    assert sum(math.exp(a.logprob) for a in score(row, 17, -1).top) == pytest.approx(1)


def test_equal_tokens_rank_by_id() -> None:
    row = np.array([0.0, 2.0, 0.0, 2.0])
    assert [score(row, token, 0).rank for token in range(4)] == [3, 1, 4, 2]
    best = score(row, 3, 2)
    assert best.top == (Alternative(1, best.logprob, 1), Alternative(3, best.logprob, 2))


def test_large_and_forbidden_logits() -> None:
    assert log_sum_exp(np.array([1e30, -np.inf], np.float32)) == np.float32(1e30)
    assert score(np.array([1e30, -np.inf], np.float32), 1, 0).logprob == -math.inf
    assert log_sum_exp(np.full(20_000, -1e4)) == pytest.approx(-1e4 + math.log(20_000))
