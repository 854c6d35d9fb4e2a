"""reasoning-gym's tasks under our law of splits, judged strictly and without running answers."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest

from ziphius.alignment.tasks.find import find_task
from ziphius.alignment.tasks.gym import GymTask, is_harmless
from ziphius.alignment.tasks.problem import Problem, problem_at
from ziphius.config.errors import BadInput

pytest.importorskip("reasoning_gym", reason='needs: pip install "ziphius[tasks]"')

SOME = ("basic_arithmetic", "gcd", "spell_backward", "countdown", "n_queens", "leg_counting")


@pytest.mark.parametrize("name", SOME)
def test_problems_are_drawn_by_seed_and_judged_by_the_library(name: str) -> None:
    task = find_task(f"gym:{name}")
    problems = [task.draw(Random(seed)) for seed in range(6)]
    assert problems == [GymTask(name).draw(Random(seed)) for seed in range(6)]
    assert len({problem.key for problem in problems}) == 6
    for problem in problems:
        assert problem.task == task.name == f"gym:{name}"
        assert task.right(problem.answer, problem)
        assert not task.right("no answer at all", problem)
        assert not task.right(f"{problem.answer} or else", problem)
        assert not task.right("", problem)
    assert task.right(f"\\boxed{{{problems[0].answer}}}", problems[0])


def test_splits_share_no_question() -> None:
    task = GymTask("gcd")
    train = {problem_at(task, 1, "train", i).question for i in range(60)}
    test = {problem_at(task, 1, "test", i).question for i in range(8)}
    assert not train & test


def test_another_right_answer_counts() -> None:
    task = GymTask("countdown")
    problem = task.draw(Random(1))
    assert task.right(f"0 * 1 + {problem.answer}"[8:], problem)
    assert task.right(f"({problem.answer})", problem)
    assert not task.right("1 + 1", problem)


def test_half_a_mark_is_wrong() -> None:
    task = GymTask("spell_backward")
    problem = task.draw(Random(1))
    dataset, entry = task._made(problem.facts["seed"])
    near = problem.answer[1:] + problem.answer[0]
    assert 0 <= dataset.score_answer(near, entry) < 1
    assert not task.right(near, problem)


def test_a_rule_that_likes_nonsense_is_not_asked() -> None:
    task = GymTask("game_of_life_halting")
    problem = next(
        p for p in (task.draw(Random(seed)) for seed in range(20)) if p.answer == "False"
    )
    dataset, entry = task._made(problem.facts["seed"])
    assert dataset.score_answer("nonsense", entry) == 1, "the library has mended its rule"
    assert not task.right("nonsense", problem)
    assert task.right("False", problem)


def test_where_the_library_knows_no_answer_it_judges() -> None:
    task = GymTask("propositional_logic")
    problem = task.draw(Random(2))
    assert problem.answer == ""
    assert not task.right("", problem)
    assert not task.right("x", problem)


@pytest.mark.parametrize(
    "answer",
    ["__import__('os').mkdir('PLACE')", "[__import__('os').mkdir('PLACE')]",
     "[q for q in [open('PLACE', 'w')]]", "open('PLACE', 'w')", "(lambda: open('PLACE', 'w'))()"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["n_queens", "countdown", "string_insertion"])
def test_no_answer_is_run(name: str, answer: str, tmp_path: Path) -> None:
    place = tmp_path / "made"
    task = GymTask(name)
    problem = task.draw(Random(1))
    dataset, entry = task._made(problem.facts["seed"])
    attack = answer.replace("PLACE", os.fspath(place))
    assert not task.right(attack, problem)
    assert not place.exists()
    if name == "n_queens":
        # The library itself would have run it.
        dataset.score_answer(attack, entry)
        assert place.exists()


@pytest.mark.parametrize(
    "answer",
    ["9**9**9", "9**(9**9)", "2**999999999", "(x+1)**100", "'a' * 999999999", "[0] * 9999999999",
     "99999!!!", "f(3)", "x.y", "x[0]", "1 << 99999999", "lambda x: x", "{1: 2}", "f'{1}'",
     "(yield)", "sin(x, y=1)", "9" * 100, "(a := 1)", "('a' + 'b') * 9",
     "lambda + __import__('os')", "print (1) 2", "x" * 5000, "'%999999999d' % 1"],
)  # fmt: skip
def test_what_could_do_more_than_arithmetic_is_not_shown_to_a_rule(answer: str) -> None:
    assert not is_harmless(answer)


@pytest.mark.parametrize(
    "answer",
    ["42", "-3.5", "Monday", "a b c", "[1, 2, 3]", "['a', 'b']", "(1 + 2) * 3 / 4", "x**2 - 3*x",
     "2*sin(x) + C", "sqrt(2)", "1 2 3\n4 5 6", "A -> B", "it's", "True", "_ Q _\nQ _ _", "x**-2"],
)  # fmt: skip
def test_plain_answers_are(answer: str) -> None:
    assert is_harmless(answer)


def test_towers_of_powers_take_no_time() -> None:
    task = GymTask("countdown")
    problem = task.draw(Random(1))
    start = time.process_time()
    assert not task.right("9**9**9**9", problem)
    assert time.process_time() - start < 2


def test_names_it_does_not_have() -> None:
    with pytest.raises(
        BadInput, match="task gym:gdc: reasoning-gym has no 'gdc'; did you mean 'gc"
    ):
        find_task("gym:gdc")
    with pytest.raises(BadInput, match="task gym:composite: makes no problem by itself"):
        find_task("gym:composite")


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(BadInput, match=r'gym:gcd: needs reasoning_gym.*"ziphius\[tasks\]"'):
        find_task("gym:gcd")


def test_a_rule_that_fails_gives_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    task = GymTask("gcd")
    problem = task.draw(Random(1))
    made = task._made(problem.facts["seed"])

    def fails(*_: Any) -> float:
        raise RuntimeError("no mark")

    monkeypatch.setattr(type(made[0]), "score_answer", fails)
    assert not task.right("12345678", problem)
    assert task.right(problem.answer, problem)


def test_problem_facts_are_small() -> None:
    problem: Problem = GymTask("gcd").draw(Random(1))
    assert set(problem.facts) == {"seed"}


def test_letters_that_add_up_to_more_than_a_full_mark_are_wrong() -> None:
    task = GymTask("spell_backward")
    nine = next(p for p in (task.draw(Random(seed)) for seed in range(200)) if len(p.answer) == 9)
    dataset, entry = task._made(nine.facts["seed"])
    assert dataset.score_answer(f"{nine.answer} or else", entry) > 1, "the library adds otherwise"
    assert not task.right(f"{nine.answer} or else", nine)
