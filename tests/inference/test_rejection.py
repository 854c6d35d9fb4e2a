"""Whatever the drafts are drawn from, what stands in the end is drawn from the model."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ziphius.inference.noise import Noise, Stream
from ziphius.inference.rejection import acceptance, draw, residual, verify

SHARES = st.lists(st.integers(0, 20), min_size=5, max_size=5).filter(any)


def shares(weights: list[int]) -> np.ndarray:
    return np.array(weights) / sum(weights)


@settings(max_examples=100)
@given(SHARES, SHARES)
def test_accepted_and_rejected_together_are_the_model(p: list[int], q: list[int]) -> None:
    """In closed form: q accepted, plus what is rejected times the residual, is p."""
    p_V, q_V = shares(p), shares(q)
    accepted = np.array([q_V[token] * acceptance(p_V, q_V, token) for token in range(5)])
    total = accepted + (1 - accepted.sum()) * residual(p_V, q_V)
    assert total == pytest.approx(p_V, abs=1e-12)
    assert residual(p_V, q_V).sum() == pytest.approx(1)


def test_verified_tokens_follow_the_model() -> None:
    p_V, q_V = shares([5, 3, 0, 1, 1]), shares([1, 1, 4, 4, 0])
    counts, accepted, N = np.zeros(5), 0, 20_000
    for position in range(N):
        noise = Noise(1)
        draft = draw(q_V, noise, position, Stream.DRAFT)
        verified = verify(p_V, q_V, draft, noise, position)
        assert not verified.accepted or verified.token == draft
        counts[verified.token] += 1
        accepted += verified.accepted
    assert counts[2] == 0
    kept = p_V > 0
    chi = ((counts - N * p_V)[kept] ** 2 / (N * p_V[kept])).sum()
    assert chi < 21.1  # three degrees of freedom, one in ten thousand
    expected = np.minimum(p_V, q_V).sum()
    assert abs(accepted / N - expected) < 4 * (expected * (1 - expected) / N) ** 0.5


def test_equal_distributions_accept_everything() -> None:
    p_V = shares([1, 2, 3, 4, 0])
    assert all(acceptance(p_V, p_V, token) == 1 for token in range(4))
    assert residual(p_V, p_V).tolist() == p_V.tolist()


def test_a_draft_its_drafter_never_draws() -> None:
    assert acceptance(shares([1, 1, 0, 0, 0]), shares([0, 1, 1, 0, 0]), 0) == 1
    assert acceptance(shares([1, 1, 0, 0, 0]), shares([0, 1, 1, 0, 0]), 3) == 0
