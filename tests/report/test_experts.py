"""Figures of the experts against plain loops over tokens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ziphius.report.balance import Balance, Layer
from ziphius.report.experts import by_column, layer_figures, load_map, relative, violation_map

loads = arrays(
    np.int64, st.tuples(st.integers(1, 8), st.integers(1, 5)), elements=st.integers(0, 3)
)


def balance(*layers: np.ndarray, every: int = 10) -> Balance:
    steps = np.arange(1, len(layers[0]) + 1) * every
    bias = np.zeros((len(steps), 3))
    rows = [Layer(i, rows.astype(np.float32), bias) for i, rows in enumerate(layers, start=1)]
    return Balance(steps, tuple(rows), len(steps))


@given(loads)
def test_figures_equal_a_loop_over_steps_and_experts(loads_RE: np.ndarray) -> None:
    told = balance(loads_RE)
    (figures,) = layer_figures(told)
    dead_by_step, violations = [], []
    longest: tuple[int, int, int] | None = None  # lines, first row, expert
    running = [0] * loads_RE.shape[1]
    for r, row in enumerate(loads_RE):
        total = int(row.sum())
        dead = [total > 0 and load == 0 for load in row]
        dead_by_step.append(sum(dead))
        violations.append(max(row) * len(row) / total - 1 if total else np.nan)
        for expert, is_dead in enumerate(dead):
            running[expert] = running[expert] + 1 if is_dead else 0
            if running[expert] > (longest[0] if longest else 0):
                longest = (running[expert], r - running[expert] + 1, expert)
    assert figures.dead_R.tolist() == dead_by_step
    assert figures.last_dead == dead_by_step[-1]
    assert np.allclose(figures.violation_R, violations, equal_nan=True, atol=1e-6)
    used_RE = loads_RE[loads_RE.sum(axis=1) > 0]
    assert figures.ever_dead == sum((used_RE == 0).any(axis=0))
    if longest is None:
        assert figures.worst is None
    else:
        assert figures.worst is not None
        lines, first, _ = longest
        assert figures.worst.lines == lines
        assert figures.worst.first == told.steps[first]
        assert figures.worst.last == told.steps[first + lines - 1]
        stretch = loads_RE[first : first + lines, figures.worst.expert]
        assert not stretch.any()


@given(loads)
def test_relative_loads_have_the_mean_one(loads_RE: np.ndarray) -> None:
    got = relative(loads_RE.astype(np.float32))
    for row, told in zip(got, loads_RE, strict=True):
        if told.sum():
            assert row.mean() == pytest.approx(1, abs=1e-5)
            assert ((row == 0) == (told == 0)).all()
        else:
            assert np.isnan(row).all()


def test_columns_add_up_the_tokens_of_their_steps() -> None:
    rows = np.array([[1, 0], [2, 0], [3, 0], [4, 5]], float)
    assert by_column(rows, np.array([1, 2, 3, 4]), 2).tolist() == [[3, 7], [0, 5]]


def test_a_column_without_a_line_repeats_the_one_before() -> None:
    rows = np.array([[1, 1], [2, 4], [3, 9]], float)
    steps = np.array([0, 10, 100])
    assert by_column(rows, steps, 3).tolist() == [[3, 3, 3], [5, 5, 9]]


def test_a_map_is_dead_only_where_a_whole_column_is() -> None:
    told = balance(np.array([[0, 4], [2, 2], [0, 4], [0, 4]]))
    (figures,) = layer_figures(told)
    # Columns of two steps: tokens [2, 6] and [0, 8] of the two experts.
    assert load_map(figures, told.steps, 2).tolist() == [[0.5, 0.0], [1.5, 2.0]]


def test_violations_by_layer_are_means_over_a_columns_steps() -> None:
    told = balance(np.array([[1, 1], [2, 0], [1, 3], [1, 3]]), np.array([[2, 2]] * 4))
    layers = layer_figures(told)
    assert violation_map(layers, told.steps, 2).tolist() == [[0.5, 0.5], [0.0, 0.0]]


def test_missing_rows_do_not_count() -> None:
    layer = Layer(1, np.array([[1, 3], [np.nan, np.nan]], np.float32), np.zeros((2, 3)))
    told = Balance(np.array([1, 2]), (layer,), 2)
    (figures,) = layer_figures(told)
    assert figures.last_violation == figures.late_violation == 0.5
    assert figures.dead_R.tolist() == [0, 0]
    assert np.isnan(load_map(figures, told.steps, 2)[:, 1]).all()
