"""The final answer, judged by the task that asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ziphius.alignment.rewards.reward import Response, Reward
from ziphius.alignment.tasks.problem import Task
from ziphius.config.errors import BadInput

# Finds the final answer in what follows the reasoning; None or nothing where there is none.
Extract = Callable[[str], str | None]


def right_answer(tasks: Mapping[str, Task], extract: Extract) -> Reward:
    """Return a reward of 1 for a right final answer and 0 for any other, an unfinished one too.

    ``tasks`` by name: a problem is judged by the one it names. Raises BadInput, when it is asked,
    for a problem of a task that is not there.
    """

    def reward(response: Response) -> float:
        task = tasks.get(response.problem.task)
        if task is None:
            known = ", ".join(sorted(tasks)) or "none"
            raise BadInput(f"no task {response.problem.task!r} judges this problem: have {known}")
        answer = extract(response.summary) if response.finished else None
        return float(bool(answer) and task.right(answer or "", response.problem))

    return reward
