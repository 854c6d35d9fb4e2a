"""Brackets to close."""

from __future__ import annotations

from collections.abc import Hashable
from random import Random

from ziphius.alignment.tasks.level import LeveledTask
from ziphius.alignment.tasks.problem import Problem

_WORDINGS = (
    "Close all brackets: {text}",
    "What closes {text}",
    "Complete the brackets {text}",
)
# No braces: an answer within \boxed{} could not hold them.
_CLOSING = {"(": ")", "[": "]", "<": ">"}


class Brackets(LeveledTask):
    """Which brackets close what is open; the steps say after every bracket what is to close."""

    kind = "brackets"

    def draw(self, random: Random) -> Problem:
        """Return brackets of which some are open."""
        low, high = self.at(((4, 6), (7, 9), (10, 13), (14, 19), (20, 28)))
        length = random.randint(low, high)
        text, owed, steps = "", "", []
        # The last one must leave something open.
        while len(text) < length:
            closes = len(owed) > (len(text) + 1 == length) and random.random() < 0.4
            if closes:
                text, owed = text + owed[0], owed[1:]
            else:
                bracket = random.choice("([<")
                text, owed = text + bracket, _CLOSING[bracket] + owed
            steps.append(" ".join(owed) or "none")
        return self.problem(
            random,
            _WORDINGS,
            {"text": " ".join(text)},
            answer=" ".join(owed),
            key=text,
            steps=steps[:-1],
        )

    def read(self, text: str) -> Hashable:
        """Return the brackets without blanks."""
        brackets = "".join(text.split())
        return brackets if brackets and set(brackets) <= set("()[]<>") else None
