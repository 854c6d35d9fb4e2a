"""Expressions are evaluated exactly, and nothing else is."""

from __future__ import annotations

import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ziphius.alignment.tasks.expression import evaluate

leaves = st.integers(0, 99).map(str)
expressions = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from("+-*/"), inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
        inner.map(lambda text: f"(-{text})"),
    ),
    max_leaves=8,
)


@given(expressions)
def test_values_are_python_s_in_exact_fractions(text: str) -> None:
    exact = re.sub("([0-9]+)", r"Fraction(\1)", text)
    try:
        expected = Fraction(eval(exact, {"Fraction": Fraction}))
    except ZeroDivisionError:
        expected = None
    found = evaluate(text)
    if expected is None or len(text) > 200:
        assert found is None
    else:
        assert found == (expected, [int(n) for n in re.findall("[0-9]+", text)])


def test_a_third_of_three_is_one() -> None:
    assert evaluate("1 / 3 * 3") == (Fraction(1), [1, 3, 3])


def test_digits_may_stand_apart() -> None:
    assert evaluate("1 2 + 3 4 5") == (Fraction(357), [12, 345])


@pytest.mark.parametrize(
    "text",
    ["", " ", "2 ** 3", "2 // 3", "2 % 3", "x", "2 + x", "(2)(3)", "2 3 +", "()", "1,2",
     "1 if 1 else 2", "0x10", "1e3", "1.5", "True", "abs(2)", "1 / 0", "1 / (2 - 2)", "07",
     "1\n+ 2", "((1)",     "+" * 201, "1" * 201, "~1", "1 + 2;", "lambda: 1"],
)  # fmt: skip
def test_anything_else_has_no_value(text: str) -> None:
    assert evaluate(text) is None
