"""Tasks as text of pre-training: no test problem is ever among them."""

from __future__ import annotations

from ziphius.alignment.tasks.documents import task_documents
from ziphius.alignment.tasks.mixture import Mixture
from ziphius.alignment.tasks.problem import distinct_problems

TASKS = Mixture.named({"reversal": 1.0, "gcd": 1.0})


def test_documents_are_solved_training_problems() -> None:
    found = list(task_documents(TASKS, 50, seed=1, problems=3))
    assert len(found) == 50
    assert found == list(task_documents(TASKS, 50, seed=1, problems=3))
    assert found[0] != next(task_documents(TASKS, 1, seed=2, problems=3))
    first = [TASKS.problem_at(1, "train", n) for n in range(3)]
    assert all(f"{p.question}\n{p.steps}\n{p.answer}\n" in found[0] for p in first)


def test_no_test_problem_is_in_them() -> None:
    text = "".join(task_documents(TASKS, 400, seed=0))
    asked = [
        problem.question
        for task in TASKS.tasks.values()
        for problem in distinct_problems(task, 5, "test", 100)
    ]
    assert not [question for question in asked if question in text]
