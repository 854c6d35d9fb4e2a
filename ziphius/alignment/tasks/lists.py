"""Numbers and letters to sort."""

from __future__ import annotations

from collections.abc import Hashable
from random import Random
from string import ascii_lowercase

from ziphius.alignment.tasks.extract import whole_number
from ziphius.alignment.tasks.level import LeveledTask
from ziphius.alignment.tasks.problem import Problem
from ziphius.alignment.tasks.words import letters_of

_RISING = (
    "Sort {items}.",
    "Put in order: {items}",
    "Sort from {first} to {last}: {items}",
)
_FALLING = (
    "Sort {items} in falling order.",
    "Put in falling order: {items}",
    "Sort from {last} to {first}: {items}",
)


class Sorting(LeveledTask):
    """Lists to sort, from level 2 in either direction; the steps insert one after the other."""

    kind = "sorting"

    def draw(self, random: Random) -> Problem:
        """Return letters, with blanks between them, or numbers, with commas."""
        falling = self.level > 1 and random.random() < 0.5
        if of_letters := random.random() < 0.5:
            items = random.choices(ascii_lowercase, k=self.at((4, 6, 8, 12, 18)))
        else:
            low, high, count = self.at(
                ((0, 9, 5), (0, 9, 7), (10, 99, 6), (10, 999, 9), (10, 9999, 13))
            )
            items = [str(random.randint(low, high)) for _ in range(count)]

        def written(some: list[str]) -> str:
            return " ".join(some) if of_letters else ", ".join(map(self.spell, some))

        def in_order(some: list[str]) -> list[str]:
            return sorted(some, key=lambda item: (len(item), item), reverse=falling)

        first, last = ("a", "z") if of_letters else ("small", "large")
        right = in_order(items)
        return self.problem(
            random,
            _FALLING if falling else _RISING,
            {"items": written(items), "first": first, "last": last},
            answer=written(right),
            # The order in which they were given makes no other problem.
            key=("falling " if falling else "rising ") + " ".join(in_order(items)),
            steps=[written(in_order(items[:end])) for end in range(1, len(items))],
        )

    def read(self, text: str) -> Hashable:
        """Return letters or numbers; brackets around them mean nothing."""
        if text.startswith("[") and text.endswith("]"):
            text = text[1:-1]
        if letters := letters_of(text):
            return letters
        parts = text.split(",") if "," in text else text.split()
        numbers = tuple(whole_number(part.strip()) for part in parts)
        return numbers if numbers and None not in numbers else None
