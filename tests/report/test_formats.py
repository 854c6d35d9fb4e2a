"""Numbers read as an engineer writes them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ziphius.report import formats


@pytest.mark.parametrize(
    ("write", "number", "text"),
    [
        (formats.short, 250_000, "250K"),
        (formats.short, 14.8e12, "14.8T"),
        (formats.short, 7, "7"),
        (formats.tidy, 2.2e-4, "2.2e-4"),
        (formats.tidy, 1e-4, "1e-4"),
        (formats.tidy, 6e-3, "0.006"),
        (formats.tidy, 0, "0"),
        (formats.tidy, -0.25, "-0.25"),
        (formats.whole, 1671168, "1,671,168"),
        (formats.percent, 0.1166, "11.7 %"),
        (formats.percent, 909.4, "90,940 %"),
        (formats.duration, 291.63, "4 min 52 s"),
        (formats.duration, 59.6, "59.6 s"),
        (formats.duration, 3599.7, "1 h 00 min"),
        (formats.duration, 187_200, "2 d 4 h"),
        (formats.si, None, None),
        (formats.size, 12_079_736, "12.08 MB"),
        (formats.size, 900, "900 B"),
        (formats.plain, True, "true"),
        (formats.plain, ["a", 2], "a, 2"),
        (formats.plain, 12_345, "12,345"),
        (formats.plain, 0.1, "0.1"),
        (formats.plain, None, "none"),
    ],
)
def test_examples(write, number, text) -> None:  # type: ignore[no-untyped-def]
    if write is formats.si:
        assert formats.si(2.14e7, "FLOP") == "21.4 MFLOP"
    else:
        assert write(number) == text


@given(st.floats(1e-9, 1e9))
def test_a_tidy_number_is_the_number_to_three_digits(number: float) -> None:
    assert float(formats.tidy(number)) == pytest.approx(number, rel=6e-3)
