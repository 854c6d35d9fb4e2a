"""Lengths: bounded, even, and nothing for what is wrong."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.alignment.rewards.support import respond
from ziphius.alignment.rewards.length import overlong_penalty, short_and_right
from ziphius.config.errors import BadInput


@pytest.mark.parametrize(
    ("tokens", "worth"), [(0, 0), (80, 0), (85, -0.25), (90, -0.5), (100, -1), (1000, -1)]
)
def test_the_penalty_grows_over_the_margin(tokens: int, worth: float) -> None:
    assert overlong_penalty(100, 20)(respond("x", tokens=tokens)) == worth


@pytest.mark.parametrize(("tokens", "worth"), [(0, 1.0), (25, 0.75), (100, 0.0), (900, 0.0)])
def test_short_counts_only_where_it_is_right(tokens: int, worth: float) -> None:
    right = short_and_right(lambda _: 1.0, 100)
    wrong = short_and_right(lambda _: 0.0, 100)
    assert right(respond("x", tokens=tokens)) == worth
    assert wrong(respond("x", tokens=tokens)) == 0.0


@given(st.integers(1, 1000), st.data(), st.integers(-5, 5000), st.floats(-9, 9))
def test_both_are_bounded_and_never_rise(
    longest: int, data: st.DataObject, tokens: int, right: float
) -> None:
    margin = data.draw(st.integers(1, longest))
    penalty, bonus = overlong_penalty(longest, margin), short_and_right(lambda _: right, longest)
    one, more = respond("x", tokens=tokens), respond("x", tokens=tokens + 1)
    assert -1 <= penalty(more) <= penalty(one) <= 0
    assert 0 <= bonus(more) <= bonus(one) <= 1


@pytest.mark.parametrize("margin", [0, -1, 101])
def test_margins_that_make_no_sense_are_refused(margin: int) -> None:
    with pytest.raises(BadInput, match=f"length margin {margin}: use 1 to the longest length, 100"):
        overlong_penalty(100, margin)
    with pytest.raises(BadInput, match="longest length 0"):
        short_and_right(lambda _: 1.0, 0)
