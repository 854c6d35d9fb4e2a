"""A question whose answer a rule can judge, and the draws that training and tests get of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any, Literal, Protocol

from ziphius.config.errors import BadInput

Split = Literal["train", "test"]
# By what an answer is judged: the task's own ``right``, or tests that run a program.
Judge = Literal["answer", "code"]
# One problem in so many is for tests.
_TEST_SHARE = 8
# A task that finds nothing new in so many draws has too few problems.
_MOST_DRAWS = 1000


@dataclass(frozen=True)
class Problem:
    """One question.

    ``task`` names the task that drew it. ``answer`` is a right answer as it is best written (empty
    where the task knows none and can only judge), ``steps`` the reasoning that leads to it, where
    the task can write one; it ends with the answer. Problems with one ``key`` are the same, however
    they are worded. ``facts`` are what a judge needs besides: JSON.
    """

    task: str
    question: str
    answer: str
    key: str
    steps: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def split(self) -> Split:
        """Whether the problem is for training or for tests: its kind and its key decide.

        The kind is the task's name without what follows a colon: a problem that two levels of a
        task, or two files, have in common is on the same side in both.
        """
        kind = self.task.partition(":")[0]
        digest = hashlib.sha256(f"{kind}\0{self.key}".encode(errors="surrogatepass")).digest()
        return "test" if int.from_bytes(digest[:8], "big") % _TEST_SHARE == 0 else "train"


class Task(Protocol):
    """One kind of problem at one difficulty."""

    @property
    def name(self) -> str:
        """How the task is called in recipes and reports."""
        ...

    @property
    def judged_by(self) -> Judge:
        """What tells a right answer: ``right``, or the tests among the problem's facts."""
        ...

    def draw(self, random: Random) -> Problem:
        """Return some problem: nothing but ``random`` decides which."""
        ...

    def right(self, answer: str, problem: Problem) -> bool:
        """Judge a final answer, without the reasoning before it."""
        ...


def problem_at(task: Task, seed: int, split: Split, index: int) -> Problem:
    """Return a draw's problem number ``index``, whatever else has been drawn.

    No problem of one split is in the other. Raises BadInput for a task with too few problems.
    """
    random = Random(f"{task.name}/{seed}/{split}/{index}")
    for _ in range(_MOST_DRAWS):
        problem = task.draw(random)
        if problem.split == split:
            return problem
    raise BadInput(f"task {task.name}: found no problem to {split} on: choose a harder level")


def distinct_problems(task: Task, seed: int, split: Split, count: int) -> list[Problem]:
    """Return ``count`` different problems of a split.

    Raises BadInput where the task has fewer.
    """
    found: dict[str, Problem] = {}
    for index in range(_MOST_DRAWS + 20 * count):
        problem = problem_at(task, seed, split, index)
        found.setdefault(problem.key, problem)
        if len(found) == count:
            return list(found.values())
    raise BadInput(
        f"task {task.name}: has only about {len(found)} problems to {split} on, {count} were "
        "asked for: ask for fewer or choose a harder level"
    )
