"""Sums with carry, and products."""

from __future__ import annotations

from random import Random

from ziphius.alignment.tasks.level import LeveledTask, digits_between
from ziphius.alignment.tasks.problem import Problem

_SUMS = (
    "{a} + {b} = ?",
    "What is {a} + {b}?",
    "Add {a} and {b}.",
    "What is the sum of {a} and {b}?",
)
_PRODUCTS = (
    "{a} * {b} = ?",
    "What is {a} * {b}?",
    "Multiply {a} by {b}.",
    "What is the product of {a} and {b}?",
)


class Sums(LeveledTask):
    """Sums of two numbers with at least one carry; the steps go column by column."""

    kind = "sums"

    def draw(self, random: Random) -> Problem:
        """Return two numbers of equally many digits to add."""
        digits = self.at((2, 3, 4, 6, 9))
        a, b = 0, 0
        while not _carries(a, b):
            a, b = digits_between(random, digits), digits_between(random, digits)
        return self.problem(
            random,
            _SUMS,
            {"a": self.spell(a), "b": self.spell(b)},
            answer=self.spell(a + b),
            key=f"{min(a, b)}+{max(a, b)}",
            steps=_columns(a, b),
        )


def _carries(a: int, b: int) -> bool:
    """Say whether some column makes ten or more: every carry takes nine from the sum of digits."""
    return _digit_sum(a) + _digit_sum(b) != _digit_sum(a + b)


def _digit_sum(number: int) -> int:
    return sum(map(int, str(number)))


def _columns(a: int, b: int) -> list[str]:
    """Add from the right; the first column's sum is written whole, as it stands in the answer."""
    lines, carry = [], 0
    for x, y in zip(reversed(str(a)), reversed(str(b)), strict=True):
        total = int(x) + int(y) + carry
        lines.append(f"{x}+{y}{'+1' if carry else ''}={total}")
        carry = total // 10
        if carry:
            lines[-1] += ", carry 1"
    return lines


class Products(LeveledTask):
    """Products of two numbers; the steps multiply place by place and add up."""

    kind = "products"

    def draw(self, random: Random) -> Problem:
        """Return two numbers to multiply, in any order."""
        shorter, longer = self.at(((1, 2), (1, 3), (2, 2), (2, 3), (3, 3)))
        a, b = random.randrange(2, 10), digits_between(random, longer)
        if shorter > 1:
            a = digits_between(random, shorter)
        first, second = random.sample((a, b), 2)
        return self.problem(
            random,
            _PRODUCTS,
            {"a": self.spell(first), "b": self.spell(second)},
            answer=self.spell(a * b),
            key=f"{min(a, b)}*{max(a, b)}",
            steps=self._places(b, a) if shorter == 1 else self._places(a, b),
        )

    def _places(self, divided: int, whole: int) -> list[str]:
        """Multiply ``whole`` by every place of ``divided``, adding as we go."""
        lines, total = [], 0
        for power, digit in enumerate(reversed(str(divided))):
            place = int(digit) * 10**power
            if not place:
                continue
            part = place * whole
            lines.append(f"{self.spell(place)} * {self.spell(whole)} = {self.spell(part)}")
            if total:
                sum_ = self.spell(total + part)
                lines.append(f"{self.spell(total)} + {self.spell(part)} = {sum_}")
            total += part
        return lines
