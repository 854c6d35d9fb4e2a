"""An independent check of worked steps: arithmetic by Python's own, clause by clause."""

from __future__ import annotations

import re
from fractions import Fraction

_CLAUSE = re.compile(r"[,:\n]")
_SIDE = re.compile(r"[0-9+\-*/%() ]+")


def checked_equations(steps: str) -> int:
    """Assert that every clause with an equals sign is true; return how many there are."""
    count = 0
    for clause in _CLAUSE.split(steps):
        if "=" not in clause:
            continue
        left, right = (_value(side) for side in clause.split("="))
        assert left == right, clause
        count += 1
    return count


def _value(side: str) -> Fraction:
    """Evaluate one side; digits may stand apart, ``mod`` is the remainder."""
    code = re.sub("(?<=[0-9]) +(?=[0-9])", "", side.replace("mod", "%"))
    assert _SIDE.fullmatch(code), side
    return Fraction(eval(re.sub("([0-9]+)", r"Fraction(\1)", code), {"Fraction": Fraction}))


def joined(text: str) -> str:
    """Return a text without blanks between single digits, as ordinary print has it."""
    return re.sub(r"(?<=\b[0-9]) (?=[0-9]\b)", "", text)
