"""Smoothing and thinning against plain loops; what a picture must not lose is kept."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ziphius.report.series import (
    corners,
    extremes,
    half_window,
    head,
    smooth,
    stretches_of_steps,
    tail,
)

value = st.floats(-1e6, 1e6) | st.just(math.nan)
values = st.lists(value, min_size=1, max_size=60).map(lambda v: np.array(v, np.float64))


@given(values, st.integers(1, 9))
def test_smoothing_is_the_mean_of_a_window_that_narrows_at_the_start(v: np.ndarray, half: int):
    got = smooth(v, half)
    for i in range(len(v)):
        reach = min(half, i)
        window = v[i - reach : i + reach + 1]
        window = window[np.isfinite(window)]
        if len(window):
            assert math.isclose(got[i], window.mean(), rel_tol=1e-6, abs_tol=1e-4)
        else:
            assert math.isnan(got[i])


@given(values, st.integers(4, 20))
def test_thinning_keeps_ends_extremes_and_order(v: np.ndarray, limit: int) -> None:
    steps = np.arange(len(v), dtype=np.float64)
    x, y = extremes(steps, v, limit)
    present = v[np.isfinite(v)]
    assert len(x) == len(y) <= max(limit, 4)
    if len(present):
        assert (y[0], y[-1]) == (present[0], present[-1])
        assert (y.min(), y.max()) == (present.min(), present.max())
    assert (np.diff(x) > 0).all()
    assert np.array_equal(v[x.astype(int)], y)


def test_a_lone_peak_among_many_steps_is_kept() -> None:
    v = np.zeros(200_000)
    v[123_457] = 9.0
    x, y = extremes(np.arange(200_000.0), v, 2000)
    assert x[y.argmax()] == 123_457
    assert len(x) <= 2000


@given(st.lists(st.integers(0, 2), min_size=1, max_size=50))
def test_corners_describe_a_piecewise_constant_curve_completely(levels: list[int]) -> None:
    steps, v = np.arange(len(levels), dtype=np.float64), np.array(levels, np.float64)
    x, y = corners(steps, v, 1000)
    at = np.searchsorted(x, steps, side="right") - 1
    assert np.array_equal(y[at], v)


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=80, unique=True), st.integers(1, 50))
def test_columns_are_equal_stretches_of_steps(numbers: list[int], limit: int) -> None:
    steps = np.array(sorted(numbers), np.int64)
    column = stretches_of_steps(steps, limit)
    assert (np.diff(column) >= 0).all()
    assert column[0] == 0
    count = min(limit, len(steps))
    if count > 1:
        assert column[-1] == count - 1
        width = (steps[-1] - steps[0]) / count
        assert (np.abs((steps - steps[0]) - (column + 0.5) * width) <= width / 2 + 1e-6).all()


def test_regular_steps_have_a_column_each() -> None:
    assert stretches_of_steps(np.arange(10, 210, 10), 200).tolist() == list(range(20))


def test_head_and_tail_are_tenths_of_what_is_there() -> None:
    v = np.array([math.nan, *range(20), math.nan])
    assert head(v).tolist() == [0, 1]
    assert tail(v).tolist() == [18, 19]
    assert tail(np.array([math.nan])).tolist() == []
    assert half_window(600) == 10
