"""Tasks by name, and mixtures of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from ziphius.alignment.tasks.find import OUR_TASKS, find_task
from ziphius.alignment.tasks.mixture import Mixture
from ziphius.alignment.tasks.problem import Problem, problem_at
from ziphius.config.errors import BadInput


def test_names_lead_to_tasks_and_back() -> None:
    assert 10 <= len(OUR_TASKS) == len({task.kind for task in OUR_TASKS})
    for task in OUR_TASKS:
        assert find_task(task.kind).name == task.kind == find_task(f"{task.kind}:1").name
        assert find_task(f"{task.kind}:4").name == f"{task.kind}:4"
        assert isinstance(find_task(f"{task.kind}:4"), task)
        assert find_task(task.kind).judged_by == "answer"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sum", r"task sum: is unknown; did you mean 'sums'\?; others are gym:NAME and file:PATH"),
        ("", "task : is unknown; known: bases, brackets"),
        ("reversals:2", r"did you mean 'reversal'\?"),
        ("sums:9", "task sums:9: there is no level '9': give 1 to 5"),
        ("sums:", "task sums:: there is no level ''"),
        ("sums:x", "there is no level 'x'"),
        ("sums:01", "there is no level '01'"),
        ("file:/no/such/file.jsonl", "/no/such/file.jsonl: cannot be read"),
    ],
)
def test_unknown_names_name_the_nearest(name: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        find_task(name)


def test_a_path_may_hold_colons(tmp_path: Path) -> None:
    path = tmp_path / "a:b.jsonl"
    path.write_text('{"question": "1+1?", "answer": "#### 2"}\n')
    assert find_task(f"file:{path}").name == f"file:{path}"


WEIGHTS = {"sums": 3.0, "reversal:2": 1, "gcd": 4}


def test_a_mixture_draws_by_weight_and_index_alone() -> None:
    mixture = Mixture.named(WEIGHTS)
    problems = [mixture.problem_at(1, "train", index) for index in range(400)]
    counts = Counter(problem.task for problem in problems)
    for name, weight in WEIGHTS.items():
        assert abs(counts[name] / 400 - weight / 8) < 0.08
    again = Mixture.named(WEIGHTS)
    assert [again.problem_at(1, "train", index) for index in (399, 0)] == [
        problems[399], problems[0],
    ]  # fmt: skip
    assert problems[:20] != [mixture.problem_at(2, "train", index) for index in range(20)]


def test_a_mixture_gives_what_its_tasks_give_alone() -> None:
    mixture = Mixture.named(WEIGHTS)
    for index in range(20):
        problem = mixture.problem_at(5, "test", index)
        assert problem.split == "test"
        assert problem == problem_at(find_task(problem.task), 5, "test", index)


def test_a_mixture_judges_as_the_problem_s_task_does() -> None:
    mixture = Mixture.named(WEIGHTS)
    for index in range(20):
        problem = mixture.problem_at(5, "train", index)
        assert mixture.right(problem.answer, problem)
        assert not mixture.right("-1", problem)
    with pytest.raises(BadInput, match="tasks: units: is not among sums, reversal:2, gcd: add it"):
        mixture.right("1", Problem("units", "", "1", ""))


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_weights_are_positive_numbers(weight: float) -> None:
    with pytest.raises(BadInput, match=f"tasks: sums: weight {weight}: give a positive number"):
        Mixture.named({"gcd": 1, "sums": weight})


def test_a_mixture_needs_tasks_of_different_names() -> None:
    with pytest.raises(BadInput, match="tasks: there is none"):
        Mixture.named({})
    with pytest.raises(BadInput, match="tasks: one is named twice"):
        Mixture.named({"sums": 1, "sums:1": 1})
