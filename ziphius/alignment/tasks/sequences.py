"""The next number of a sequence."""

from __future__ import annotations

from itertools import pairwise
from random import Random

from ziphius.alignment.tasks.level import LeveledTask
from ziphius.alignment.tasks.problem import Problem

_WORDINGS = (
    "What comes next: {terms}?",
    "Which number follows {terms}?",
    "Continue by one number: {terms}",
)


class Sequences(LeveledTask):
    """Constant differences at first, then growing ones, sums of the two before, ``r * t + c``."""

    kind = "sequences"

    def draw(self, random: Random) -> Problem:
        """Return a sequence without its last number."""
        terms = self.at((_even, _steep, _growing, _summed, _affine))(random)
        rule = self.at(
            (self._by_difference,) * 2 + (self._by_growth, self._by_sum, self._by_affine)
        )
        *shown, last = terms
        return self.problem(
            random,
            _WORDINGS,
            {"terms": ", ".join(map(self.spell, shown))},
            answer=self.spell(last),
            key=" ".join(map(str, shown)),
            steps=rule(terms),
        )

    def _differences(self, terms: list[int]) -> list[str]:
        """Subtract every number that is shown from the next one."""
        pairs = pairwise(terms[:-1])
        return [f"{self.spell(b)} - {self.spell(a)} = {self.spell(b - a)}" for a, b in pairs]

    def _by_difference(self, terms: list[int]) -> list[str]:
        *_, before, last = terms
        sign, step = "+" if last > before else "-", self.spell(abs(last - before))
        lines = self._differences(terms)
        return [*lines, f"{self.spell(before)} {sign} {step} = {self.spell(last)}"]

    def _by_growth(self, terms: list[int]) -> list[str]:
        *_, c, d, last = terms
        growth = (last - d) - (d - c)
        lines = [
            *self._differences(terms),
            f"{self.spell(d - c)} + {growth} = {self.spell(last - d)}",
        ]
        return [*lines, f"{self.spell(d)} + {self.spell(last - d)} = {self.spell(last)}"]

    def _by_sum(self, terms: list[int]) -> list[str]:
        triples = zip(terms, terms[1:], terms[2:], strict=False)
        return [f"{self.spell(a)} + {self.spell(b)} = {self.spell(c)}" for a, b, c in triples]

    def _by_affine(self, terms: list[int]) -> list[str]:
        first, second, third, *_ = terms
        factor = (third - second) // (second - first)
        more = second - factor * first
        ratio = f"{third - second} / {second - first} = {factor}"
        offset = f"{second} - {factor} * {first} = {more}"
        *_, before, last = terms
        return [*self._differences(terms), ratio, offset, f"{factor} * {before} + {more} = {last}"]


def _even(random: Random) -> list[int]:
    start, step = random.randrange(100), random.randrange(1, 10)
    return [start + step * i for i in range(5)]


def _steep(random: Random) -> list[int]:
    step = random.choice((-1, 1)) * random.randrange(11, 60)
    start = random.randrange(100, 400) - min(0, step * 5)
    return [start + step * i for i in range(6)]


def _growing(random: Random) -> list[int]:
    start, step, growth = random.randrange(100), random.randrange(1, 20), random.randrange(1, 9)
    return [start + step * i + growth * i * (i - 1) // 2 for i in range(7)]


def _summed(random: Random) -> list[int]:
    terms = [random.randrange(11, 99), random.randrange(11, 99)]
    while len(terms) < 9:
        terms.append(terms[-2] + terms[-1])
    return terms


def _affine(random: Random) -> list[int]:
    factor, more = random.randrange(2, 6), random.randrange(1, 50)
    terms = [random.randrange(11, 99)]
    while len(terms) < 9:
        terms.append(factor * terms[-1] + more)
    return terms
