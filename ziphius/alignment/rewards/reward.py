"""A response, the one signature that all rewards have, and their weighted sum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from ziphius.alignment.tasks.problem import Problem
from ziphius.data.tokenizer import END_THINK, THINK


@dataclass(frozen=True)
class Response:
    """What a model wrote to a problem.

    ``text`` is all of it; where the prompt had opened the reasoning, it begins with ``<think>``.
    ``tokens`` counts it. ``finished`` is false where it was cut at its longest.
    """

    problem: Problem
    text: str
    tokens: int = 0
    finished: bool = True

    @cached_property
    def thinking(self) -> str:
        """The reasoning between the think tags; empty where there is none that ends."""
        opened, _, rest = self.text.partition(THINK)
        thought, ended, _ = rest.partition(END_THINK)
        return thought if ended and not opened.strip() else ""

    @cached_property
    def summary(self) -> str:
        """What follows the reasoning, and all of the text where there is no reasoning."""
        if THINK not in self.text and END_THINK not in self.text:
            return self.text
        return self.text.rpartition(END_THINK)[2] if END_THINK in self.text else ""


Reward = Callable[[Response], float]
