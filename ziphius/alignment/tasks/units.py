"""Amounts in other units."""

from __future__ import annotations

import re
from random import Random

from ziphius.alignment.tasks.extract import bare_answer
from ziphius.alignment.tasks.level import LeveledTask
from ziphius.alignment.tasks.problem import Problem

_WORDINGS = (
    "How many {unit} are {amount}?",
    "Convert {amount} to {unit}.",
    "{amount} in {unit} = ?",
)
# From the largest unit: how many of the next smaller one make it.
_CHAINS: tuple[tuple[tuple[str, int], ...], ...] = (
    (("weeks", 7), ("days", 24), ("hours", 60), ("minutes", 60), ("seconds", 1)),
    (("kilometres", 1000), ("metres", 100), ("centimetres", 10), ("millimetres", 1)),
    (("yards", 3), ("feet", 12), ("inches", 1)),
    (("tonnes", 1000), ("kilograms", 1000), ("grams", 1)),
    (("gallons", 4), ("quarts", 2), ("pints", 2), ("cups", 1)),
)


class Units(LeveledTask):
    """To smaller units; at level 2 to larger ones; then from two units, by two steps, from 3."""

    kind = "units"

    def draw(self, random: Random) -> Problem:
        """Return an amount and a unit; the answer is a whole number."""
        steps_down = self.at((1, 1, 1, 2, 2))
        parts = self.at((1, 1, 2, 1, 3))
        chain = random.choice(_CHAINS)
        place = random.randrange(len(chain) - steps_down)
        units = chain[place : place + steps_down + 1]
        amounts = [random.randrange(2, 100)]
        amounts += [random.randrange(2, max(3, units[i][1])) for i in range(parts - 1)]
        steps, total = self._down(amounts, units)
        source, target, answer = self._amount(amounts, units), units[-1][0], total
        if self.level == 2:
            factor = units[0][1]
            source, target, answer = f"{self.spell(total)} {units[1][0]}", units[0][0], amounts[0]
            steps = [f"{self.spell(total)} / {self.spell(factor)} = {self.spell(answer)}"]
        return self.problem(
            random,
            _WORDINGS,
            {"amount": source, "unit": target},
            answer=self.spell(answer),
            key=f"{amounts} {units[0][0]} {target} {self.level == 2}",
            steps=steps,
            facts={"unit": target},
        )

    def right(self, answer: str, problem: Problem) -> bool:
        """Judge the number; the unit that was asked for may follow it."""
        unit = re.escape(problem.facts["unit"])
        return super().right(re.sub(rf"\s+{unit}$", "", bare_answer(answer)), problem)

    def _amount(self, amounts: list[int], units: tuple[tuple[str, int], ...]) -> str:
        named = zip(amounts, units, strict=False)
        return " and ".join(f"{self.spell(amount)} {unit}" for amount, (unit, _) in named)

    def _down(
        self, amounts: list[int], units: tuple[tuple[str, int], ...]
    ) -> tuple[list[str], int]:
        """Go down the units, adding what the amount has of each."""
        lines, total = [], amounts[0]
        for place, (_, factor) in enumerate(units[:-1], start=1):
            product = total * factor
            lines.append(f"{self.spell(total)} * {self.spell(factor)} = {self.spell(product)}")
            total = product
            if place < len(amounts):
                total += amounts[place]
                more = f"{self.spell(product)} + {self.spell(amounts[place])}"
                lines.append(f"{more} = {self.spell(total)}")
        return lines, total
