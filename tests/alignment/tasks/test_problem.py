"""Splits and draws: what is drawn for training is never drawn for tests."""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ziphius.alignment.tasks.problem import (
    Judge,
    Problem,
    Task,
    distinct_problems,
    problem_at,
)
from ziphius.config.errors import BadInput


@dataclass
class Numbers:
    """A task with ``count`` problems."""

    count: int
    name: str = "numbers"
    judged_by: Judge = "answer"

    def draw(self, random: Random) -> Problem:
        key = str(random.randrange(self.count))
        return Problem(self.name, f"{key}?", key, key)

    def right(self, answer: str, problem: Problem) -> bool:
        return answer == problem.answer


@given(st.text(), st.text(max_size=8).filter(lambda kind: ":" not in kind))
def test_wording_level_answer_and_facts_do_not_decide_the_split(key: str, kind: str) -> None:
    problem = Problem(kind, "one", "1", key)
    other = Problem(f"{kind}:3", "two", "2", key, "steps", {"fact": 1})
    assert problem.split == other.split


def test_an_eighth_is_for_tests() -> None:
    splits = [Problem("a", "", "", str(n)).split for n in range(4000)]
    assert 0.11 < splits.count("test") / len(splits) < 0.14
    other = [Problem("b", "", "", str(n)).split for n in range(4000)]
    assert splits != other


def test_an_index_gives_the_same_problem_whatever_else_is_drawn() -> None:
    task: Task = Numbers(10**6)
    alone = problem_at(task, 1, "train", 7)
    for index in (3, 9, 7):
        problem_at(task, 1, "train", index)
    assert problem_at(Numbers(10**6), 1, "train", 7) == alone
    others = [
        problem_at(task, 1, "train", 8),
        problem_at(task, 2, "train", 7),
        problem_at(task, 1, "test", 7),
        problem_at(replace(task, name="letters"), 1, "train", 7),
    ]
    assert len({alone.key, *(other.key for other in others)}) == 5


def test_splits_share_nothing() -> None:
    task = Numbers(100)
    train = {p.key for p in distinct_problems(task, 1, "train", 60)}
    test = {p.key for p in distinct_problems(task, 1, "test", 8)}
    assert len(train) == 60
    assert len(test) == 8
    assert not train & test


def test_a_task_without_problems_of_a_split_says_so() -> None:
    split = Problem("numbers", "", "", "0").split
    missing = "test" if split == "train" else "train"
    assert problem_at(Numbers(1), 1, split, 0).key == "0"
    with pytest.raises(BadInput, match=f"task numbers: found no problem to {missing} on"):
        problem_at(Numbers(1), 1, missing, 0)


def test_too_few_different_problems_are_counted() -> None:
    with pytest.raises(BadInput, match=r"has only about [0-9]+ problems to train on, 500 were"):
        distinct_problems(Numbers(100), 1, "train", 500)
