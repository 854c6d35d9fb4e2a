"""The last step of the reasoning gives the answer, read by other means than the task's own."""

from __future__ import annotations

import re
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.alignment.tasks.support import joined
from ziphius.alignment.tasks.find import find_task
from ziphius.alignment.tasks.level import LEVELS
from ziphius.alignment.tasks.problem import Problem

WEEK = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()  # noqa: SIM905
levels = st.integers(1, LEVELS)
seeds = st.integers(0, 2**32)


def drawn(kind: str, level: int, seed: int) -> tuple[Problem, list[str]]:
    """Return a problem and its lines of reasoning, without the answer and blanks in numbers."""
    problem = find_task(f"{kind}:{level}").draw(Random(seed))
    return problem, joined(problem.steps).splitlines()[:-1]


def last_result(lines: list[str]) -> str:
    return re.split("[,:]", lines[-1])[-1].partition("=")[2].strip()


@pytest.mark.parametrize("kind", ["products", "remainders", "sequences", "units"])
@settings(max_examples=40)
@given(level=levels, seed=seeds)
def test_the_last_result_is_the_answer(kind: str, level: int, seed: int) -> None:
    problem, lines = drawn(kind, level, seed)
    assert last_result(lines) == joined(problem.answer)


@settings(max_examples=60)
@given(levels, seeds)
def test_results_that_need_a_last_thought(level: int, seed: int) -> None:
    problem, lines = drawn("countdown", level, seed)
    assert int(last_result(lines)) == problem.facts["target"]
    problem, lines = drawn("gcd", level, seed)
    assert re.fullmatch(f"[0-9]+ mod {joined(problem.answer)} = 0", lines[-1])
    problem, lines = drawn("sums", level, seed)
    digits = [re.search("=([0-9]+)", line)[1] for line in lines]  # type: ignore[index]
    assert "".join([digits[-1], *(d[-1] for d in reversed(digits[:-1]))]) == joined(problem.answer)


@settings(max_examples=60)
@given(levels, seeds)
def test_remainders_of_divisions_are_digits(level: int, seed: int) -> None:
    problem, lines = drawn("bases", level, seed)
    number, _, target = map(int, problem.key.split())
    if target == 10:
        assert last_result(lines) == joined(problem.answer) == str(number)
        return
    divisions = [line for line in lines if re.match("[0-9]+ =", line)]
    assert divisions[0].startswith(f"{number} = ")
    digits = ["0123456789abcdef"[int(line.rpartition("+ ")[2])] for line in divisions]
    assert "".join(reversed(digits)) == problem.answer.replace(" ", "")


@settings(max_examples=60)
@given(st.integers(1, 3), seeds)
def test_days_are_walked_one_by_one(level: int, seed: int) -> None:
    problem, lines = drawn("weekdays", level, seed)
    days = [WEEK.index(day) for day in lines[-1].split(", ")]
    step = -1 if level < 3 and "-" in problem.key else 1
    assert all((b - a - step) % 7 == 0 for a, b in pairwise(days))
    assert WEEK[days[-1]] == problem.answer
    assert WEEK[days[0]] in problem.question
    assert len(days) - 1 == int(last_result(lines[:-1]))


@settings(max_examples=60)
@given(levels, seeds)
def test_weeks_are_left_out_place_by_place(level: int, seed: int) -> None:
    # No step asks for more than a small table by heart: a place's rest, or that of a sum of rests
    # of at most five places and a last digit.
    _, lines = drawn("weekdays", level, seed)
    for step in lines[-2].split(", "):
        divided, is_mod, _ = step.replace(" ", "").partition("mod7=")
        if is_mod:
            assert int(divided) <= 5 * 6 + 9 or int(divided[1:]) == 0


@settings(max_examples=60)
@given(st.integers(4, 5), seeds)
def test_the_day_s_number_leads_to_its_name(level: int, seed: int) -> None:
    problem, lines = drawn("weekdays", level, seed)
    assert lines[-1] == "1 is Monday"
    assert WEEK[int(last_result(lines[:-1])) - 1] == problem.answer


@settings(max_examples=60)
@given(levels, seeds)
def test_letters_are_numbered_and_counted(level: int, seed: int) -> None:
    problem = find_task(f"reversal:{level}").draw(Random(seed))
    there, back, _ = problem.steps.splitlines()
    assert there.split(", ") == [f"{n} {letter}" for n, letter in enumerate(problem.key, 1)]
    assert back.split(", ") == there.split(", ")[::-1]
    problem = find_task(f"letters:{level}").draw(Random(seed))
    letter, _, word = problem.key.split()
    counted = problem.steps.splitlines()[0].split(", ")
    assert [entry[0] for entry in counted] == list(word)
    count = 0
    for entry in counted:
        count += entry[0] == letter
        assert int(entry[2:]) == count
    assert count == int(problem.answer.replace(" ", ""))


@settings(max_examples=60)
@given(levels, seeds)
def test_lists_grow_by_one_and_stay_in_order(level: int, seed: int) -> None:
    problem = find_task(f"sorting:{level}").draw(Random(seed))
    lists = [
        [int(n) if n.isdigit() else n for n in re.split(", | ", joined(line))]
        for line in problem.steps.splitlines()
    ]
    assert [len(some) for some in lists] == list(range(1, len(lists) + 1))
    for some, more in pairwise(lists):
        assert more == sorted(more, reverse="falling" in problem.key)
        (new,) = [item for item in set(more) if more.count(item) > some.count(item)]
        assert some.count(new) + 1 == more.count(new)


@settings(max_examples=60)
@given(levels, seeds)
def test_what_is_to_close_is_said_after_every_bracket(level: int, seed: int) -> None:
    problem = find_task(f"brackets:{level}").draw(Random(seed))
    lines = problem.steps.splitlines()
    assert len(lines) == len(problem.key)
    for end, line in enumerate(lines, start=1):
        whole = problem.key[:end] + line.replace(" ", "").replace("none", "")
        while whole:
            shorter = whole.replace("()", "").replace("[]", "").replace("<>", "")
            assert shorter != whole
            whole = shorter
