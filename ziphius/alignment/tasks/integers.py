"""Greatest common divisors, remainders, and numbers in other bases."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable
from random import Random

from ziphius.alignment.tasks.level import LeveledTask
from ziphius.alignment.tasks.problem import Problem

_GCD = (
    "gcd({a}, {b}) = ?",
    "What is the gcd of {a} and {b}?",
    "Find the greatest common divisor of {a} and {b}.",
)
_REMAINDERS = (
    "{value} mod {m} = ?",
    "What is {value} mod {m}?",
    "What is the remainder of {value} divided by {m}?",
)
_BASES = (
    "Write {n} of base {b} in base {c}.",
    "What is {n} (base {b}) in base {c}?",
    "Convert {n} from base {b} to base {c}.",
)
_DIGITS = "0123456789abcdef"
_NUMERAL = re.compile("0*([0-9a-f]+)")


class Gcd(LeveledTask):
    """Greatest common divisors, by Euclid's steps. Divisors above 1 come as often as 1."""

    kind = "gcd"

    def draw(self, random: Random) -> Problem:
        """Return two different numbers."""
        limit = self.at((60, 99, 999, 9999, 10**6))
        factor = random.randrange(1, 11) if self.level < 3 else random.randrange(1, limit // 20)
        a, b = random.sample(range(1, limit // factor + 1), 2)
        a, b = a * factor, b * factor
        return self.problem(
            random,
            _GCD,
            {"a": self.spell(a), "b": self.spell(b)},
            answer=self.spell(math.gcd(a, b)),
            key=f"gcd {min(a, b)} {max(a, b)}",
            steps=self._euclid(max(a, b), min(a, b)),
        )

    def _euclid(self, a: int, b: int) -> list[str]:
        lines = []
        while b:
            lines.append(f"{self.spell(a)} mod {self.spell(b)} = {self.spell(a % b)}")
            a, b = b, a % b
        return lines


class Remainders(LeveledTask):
    """Modular arithmetic: of a number, a sum, a product, powers."""

    kind = "remainders"

    def draw(self, random: Random) -> Problem:
        """Return an expression and a modulus."""
        modulus = random.randrange(*self.at(((2, 10), (3, 20), (3, 20), (5, 30), (7, 100))))
        a = random.randrange(*self.at(((10, 200), (10, 100), (10, 100), (2, 30), (10, 100))))
        b = random.randrange(*self.at(((1, 2), (10, 100), (10, 100), (3, 7), (7, 13))))
        sign = self.at(("", "+", "*", "^", "^"))
        if self.level == 1:
            value, result, steps = self.spell(a), a % modulus, self._divide(a, modulus)
        elif sign == "^":
            value, result = f"{a}^{b}", pow(a, b, modulus)
            steps = self._power(a, b, modulus)
        else:
            value = f"({self.spell(a)} {sign} {self.spell(b)})"
            result = (a + b if sign == "+" else a * b) % modulus
            steps = self._combine(a, sign, b, modulus)
        first, second = (min(a, b), max(a, b)) if sign in ("+", "*") else (a, b)
        return self.problem(
            random,
            _REMAINDERS,
            {"value": value, "m": self.spell(modulus)},
            answer=self.spell(result),
            key=f"{first} {sign} {second} mod {modulus}",
            steps=steps,
        )

    def _divide(self, a: int, modulus: int) -> list[str]:
        multiple = a - a % modulus
        return [
            f"{self.spell(a // modulus)} * {self.spell(modulus)} = {self.spell(multiple)}",
            f"{self.spell(a)} - {self.spell(multiple)} = {self.spell(a % modulus)}",
        ]

    def _reduce(self, a: int, modulus: int) -> str:
        return f"{self.spell(a)} mod {self.spell(modulus)} = {self.spell(a % modulus)}"

    def _combine(self, a: int, sign: str, b: int, modulus: int) -> list[str]:
        x, y = a % modulus, b % modulus
        total = x + y if sign == "+" else x * y
        combined = f"{self.spell(x)} {sign} {self.spell(y)} = {self.spell(total)}"
        reduced = [self._reduce(value, modulus) for value in (a, b, total)]
        return [*reduced[:2], combined, reduced[2]]

    def _power(self, a: int, exponent: int, modulus: int) -> list[str]:
        """Multiply by the remainder once and again."""
        factor = result = a % modulus
        lines = [self._reduce(a, modulus)]
        for _ in range(exponent - 1):
            product = result * factor
            lines.append(f"{result} * {factor} = {product}, {self._reduce(product, modulus)}")
            result = product % modulus
        return lines


class Bases(LeveledTask):
    """Numbers from one base to another, through base 10."""

    kind = "bases"

    def draw(self, random: Random) -> Problem:
        """Return a number and two bases."""
        number = random.randrange(
            *self.at(((5, 256), (16, 512), (64, 10**4), (256, 10**5), (10**4, 10**6)))
        )
        if self.level < 4:
            other = random.randrange(2, self.at((6, 10, 10, 0, 0)))
            to_ten = self.level == 2 or (self.level == 3 and random.random() < 0.5)
            source, target = (other, 10) if to_ten else (10, other)
        else:
            source, target = random.sample([*range(2, 10), 11, 12, 13, 14, 15, 16], 2)
        return self.problem(
            random,
            _BASES,
            {
                "n": self.spell(_numeral(number, source)),
                "b": self.spell(source),
                "c": self.spell(target),
            },
            answer=self.spell(_numeral(number, target)),
            key=f"{number} {source} {target}",
            steps=[*self._to_ten(number, source), *self._from_ten(number, target)],
        )

    def read(self, text: str) -> Hashable:
        """Return the digits: blanks and noughts before them mean nothing."""
        match = _NUMERAL.fullmatch(text.replace(" ", "").lower())
        return match[1] if match else None

    def _to_ten(self, number: int, base: int) -> list[str]:
        """Take in one digit after the other from the left."""
        lines, value = [], 0
        for digit in map(_DIGITS.index, _numeral(number, base)) if base != 10 else ():
            new = value * base + digit
            product = f"{self.spell(value)} * {self.spell(base)}"
            lines.append(f"{product} + {self.spell(digit)} = {self.spell(new)}")
            value = new
        return lines

    def _from_ten(self, number: int, base: int) -> list[str]:
        """Divide until nothing is left: the remainders are the digits from the right."""
        lines = []
        while number and base != 10:
            quotient, digit = divmod(number, base)
            product = f"{self.spell(quotient)} * {self.spell(base)}"
            lines.append(f"{self.spell(number)} = {product} + {self.spell(digit)}")
            number = quotient
        return lines


def _numeral(number: int, base: int) -> str:
    digits = ""
    while number:
        number, digit = divmod(number, base)
        digits = _DIGITS[digit] + digits
    return digits or "0"
