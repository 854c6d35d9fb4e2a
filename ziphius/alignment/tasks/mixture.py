"""Several tasks together, each as often as its weight says."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from random import Random

from ziphius.alignment.tasks.find import find_task
from ziphius.alignment.tasks.problem import Problem, Split, Task, problem_at
from ziphius.config.errors import BadInput


class Mixture:
    """Tasks and their weights.

    Which task gives the problem of an index depends on seed, split, index and the weights alone.
    What it gives is what it would alone, so that no problem of one split is in the other. Raises
    BadInput for weights that are no positive numbers, no tasks at all, and tasks of one name.
    """

    def __init__(self, weights: Iterable[tuple[Task, float]]) -> None:
        pairs = list(weights)
        self.tasks: Mapping[str, Task] = {task.name: task for task, _ in pairs}
        self._weights = [weight for _, weight in pairs]
        if not pairs:
            raise BadInput("tasks: there is none: name at least one")
        if len(self.tasks) < len(pairs):
            raise BadInput("tasks: one is named twice: give it one weight")
        for task, weight in pairs:
            if not (math.isfinite(weight) and weight > 0):
                raise BadInput(f"tasks: {task.name}: weight {weight}: give a positive number")

    @classmethod
    def named(cls, weights: Mapping[str, float]) -> Mixture:
        """Return the mixture of the tasks of these names. Raises BadInput as ``find_task`` does."""
        return cls((find_task(name), weight) for name, weight in weights.items())

    def problem_at(self, seed: int, split: Split, index: int) -> Problem:
        """Return a draw's problem number ``index``, whatever else has been drawn."""
        random = Random(f"mixture/{seed}/{split}/{index}")
        (name,) = random.choices(list(self.tasks), self._weights)
        return problem_at(self.tasks[name], seed, split, index)

    def task_of(self, problem: Problem) -> Task:
        """Return the task that drew a problem. Raises BadInput if it is none of these."""
        if problem.task not in self.tasks:
            raise BadInput(f"tasks: {problem.task}: is not among {', '.join(self.tasks)}: add it")
        return self.tasks[problem.task]

    def right(self, answer: str, problem: Problem) -> bool:
        """Judge a final answer as the problem's own task does."""
        return self.task_of(problem).right(answer, problem)
