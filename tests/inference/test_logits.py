"""Penalties, bias and masks against their definitions, written out token by token."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ziphius.inference import logits as rows

V = 6
ROWS = st.lists(st.floats(-30, 30, width=32), min_size=V, max_size=V)
TOKENS = st.lists(st.integers(0, V - 1), max_size=12)


@settings(max_examples=100)
@given(ROWS, TOKENS, st.floats(0.25, 4))
def test_repetition_divides_or_multiplies_once(
    row: list[float], seen: list[int], penalty: float
) -> None:
    changed = np.array(row)
    rows.penalise_repetition(changed, rows.ids(seen), penalty)
    for token, (before, after) in enumerate(zip(row, changed, strict=True)):
        if token not in seen:
            assert after == before
        else:
            assert after == (before / penalty if before > 0 else before * penalty)


@settings(max_examples=100)
@given(ROWS, TOKENS, st.floats(-2, 2), st.floats(-2, 2))
def test_frequency_counts_and_presence_does_not(
    row: list[float], output: list[int], frequency: float, presence: float
) -> None:
    changed = np.array(row)
    rows.penalise_output(changed, rows.ids(output), frequency, presence)
    expected = [
        value - output.count(token) * frequency - (token in output) * presence
        for token, value in enumerate(row)
    ]
    assert changed == pytest.approx(expected, abs=1e-12)


@settings(max_examples=50)
@given(ROWS, TOKENS)
def test_allowed_forbidden_and_masked(row: list[float], tokens: list[int]) -> None:
    chosen = [token in tokens for token in range(V)]
    allowed, forbidden = np.array(row, np.float32), np.array(row, np.float32)
    rows.allow_only(allowed, rows.ids(tokens))
    rows.forbid(forbidden, rows.ids(tokens))
    masked = np.array(row, np.float32)
    rows.apply_mask(masked, np.array(chosen))
    for token in range(V):
        kept = np.float32(row[token])
        assert allowed[token] == masked[token] == (kept if chosen[token] else -np.inf)
        assert forbidden[token] == (-np.inf if chosen[token] else kept)


def test_a_bias_is_added() -> None:
    row = np.zeros(3, np.float32)
    rows.add_bias(row, {0: 1.5, 2: -100.0})
    assert row.tolist() == [1.5, 0, -100]


def test_a_row_keeps_its_type() -> None:
    for dtype in (np.float32, np.float64):
        row = np.ones(3, dtype)
        rows.add_bias(row, {0: 1.0})
        rows.penalise_repetition(row, rows.ids([0]), 1.3)
        rows.penalise_output(row, rows.ids([0, 0]), 0.1, 0.2)
        rows.apply_mask(row, np.array([True, True, False]))
        assert row.dtype == dtype
