"""What the tasks of our own have in common: five levels, wordings, and how they spell numbers.

Steps of reasoning follow one convention, which the tests rely on: every clause (up to a line's end,
a comma or a colon) with an equals sign is true arithmetic, and the last line is the answer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from random import Random
from typing import Any, ClassVar, TypeVar

from ziphius.alignment.tasks.extract import bare_answer, whole_number
from ziphius.alignment.tasks.problem import Judge, Problem
from ziphius.config.errors import BadInput

T = TypeVar("T")

LEVELS = 5
# Up to this level digits stand alone, so that a network sees each whatever its tokenizer joins:
# V3's takes up to three digits at once (facts 6.1).
_LAST_SPELLED = 3


class LeveledTask(ABC):
    """One kind of problem at a level from 1 to ``LEVELS``.

    Level 1 is for networks of a million parameters. Raises BadInput for any other level.
    """

    kind: ClassVar[str]

    def __init__(self, level: int = 1) -> None:
        if not 1 <= level <= LEVELS:
            raise BadInput(f"task {self.kind}: there is no level {level}: give 1 to {LEVELS}")
        self.level = level

    @property
    def name(self) -> str:
        """The kind, and the level unless it is 1: ``sums``, ``sums:3``."""
        return self.kind if self.level == 1 else f"{self.kind}:{self.level}"

    @property
    def judged_by(self) -> Judge:
        """Their own ``right`` judges them."""
        return "answer"

    @abstractmethod
    def draw(self, random: Random) -> Problem:
        """Return some problem of the level."""

    def read(self, text: str) -> Hashable:
        """Return what a bare answer means, None if nothing: equal answers mean the same."""
        return whole_number(text)

    def right(self, answer: str, problem: Problem) -> bool:
        """Say whether a final answer means what the problem's own does."""
        meaning = self.read(bare_answer(answer))
        return meaning is not None and meaning == self.read(problem.answer)

    def at(self, of_level: Sequence[T]) -> T:
        """Return the entry of a table that has one for every level."""
        return of_level[self.level - 1]

    def spell(self, number: int | str) -> str:
        """Write a number as the level does: ``1 2`` for 12 where digits stand alone."""
        digits = str(number)
        return " ".join(digits) if self.level <= _LAST_SPELLED else digits

    def problem(
        self,
        random: Random,
        wordings: Sequence[str],
        values: Mapping[str, object],
        *,
        answer: str,
        key: str,
        steps: Sequence[str],
        facts: Mapping[str, Any] | None = None,
    ) -> Problem:
        """Fill in one of ``wordings``. ``steps`` are the lines before the answer."""
        question = random.choice(wordings).format_map(values)
        text = "\n".join([*steps, answer])
        return Problem(self.name, question, answer, key, text, facts or {})


def digits_between(random: Random, count: int) -> int:
    """Draw a number of ``count`` digits."""
    return random.randrange(10 ** (count - 1), 10**count)
