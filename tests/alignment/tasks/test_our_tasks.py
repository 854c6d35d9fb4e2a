"""Laws that every task of our own keeps, and what each one's steps and judge are worth."""

from __future__ import annotations

import math
import re
from datetime import date
from itertools import pairwise
from random import Random
from statistics import mean
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.alignment.tasks.support import checked_equations, joined
from ziphius.alignment.tasks.find import OUR_TASKS, find_task
from ziphius.alignment.tasks.level import LEVELS, LeveledTask
from ziphius.alignment.tasks.problem import Problem, distinct_problems, problem_at
from ziphius.config.errors import BadInput

ALL = [task(level) for task in OUR_TASKS for level in range(1, LEVELS + 1)]
KINDS = [task.kind for task in OUR_TASKS]
some_task = st.sampled_from(ALL)
seeds = st.integers(0, 2**32)


def drawn(task: Any, count: int) -> list[Problem]:
    return [task.draw(Random(f"test {n}")) for n in range(count)]


def numbers_in(text: str) -> list[int]:
    return [int(n) for n in re.findall("[0-9]+", joined(text))]


def last_line(problem: Problem) -> str:
    return problem.steps.splitlines()[-1]


# Laws of all


@given(some_task, seeds)
def test_nothing_but_the_random_decides(task: LeveledTask, seed: int) -> None:
    problem = task.draw(Random(seed))
    assert problem == type(task)(task.level).draw(Random(seed))
    assert problem.task == task.name
    assert find_task(problem.task).right(problem.answer, problem)


@given(some_task, seeds)
def test_one_question_can_be_worded_in_several_ways_and_is_one_problem(
    task: LeveledTask, seed: int
) -> None:
    class FirstWording(Random):
        def choice(self, some: Any) -> Any:
            words = isinstance(some, tuple) and all(isinstance(s, str) and "{" in s for s in some)
            picked = super().choice(some)
            return some[0] if words else picked

    usual, other = task.draw(Random(seed)), task.draw(FirstWording(seed))
    assert (usual.key, usual.answer, usual.steps) == (other.key, other.answer, other.steps)


@pytest.mark.parametrize("task", ALL, ids=lambda task: task.name)
def test_there_are_several_wordings(task: LeveledTask) -> None:
    starts = {problem.question.split()[0] for problem in drawn(task, 25)}
    assert len(starts) >= 2


@given(some_task, seeds, st.sampled_from(["{}", " {} ", "{}.", "The answer is {}.", "$ {} $"]))
def test_the_own_answer_is_right_however_it_is_given(
    task: LeveledTask, seed: int, form: str
) -> None:
    problem = task.draw(Random(seed))
    answer = problem.answer
    assert task.right(form.format(answer), problem)
    assert task.right(f"\\boxed{{{answer}}}", problem)
    assert task.right(f"So the final answer is \\boxed{{{answer}}}.", problem)
    assert task.right(joined(answer), problem)


@given(some_task, seeds, seeds)
def test_an_answer_of_another_problem_is_wrong(task: LeveledTask, one: int, two: int) -> None:
    a, b = task.draw(Random(one)), task.draw(Random(two))
    if task.kind == "countdown":
        same = a.facts["target"] == b.facts["target"]
    else:
        same = a.answer.replace(" ", "") == b.answer.replace(" ", "")
    if not same:
        assert not task.right(b.answer, a)
        assert not task.right(f"\\boxed{{{b.answer}}}", a)


@given(some_task, seeds, st.data())
def test_a_changed_answer_is_wrong(task: LeveledTask, seed: int, data: st.DataObject) -> None:
    problem = task.draw(Random(seed))
    answer = problem.answer
    places = [i for i, c in enumerate(answer) if c.isalnum()] or [0]
    place = data.draw(st.sampled_from(places))
    letter = answer[place]
    alphabet = "0123456789" if letter.isdigit() else "()[]<>" if letter in "()[]<>" else "abcxyz"
    other = data.draw(st.sampled_from([c for c in alphabet if c != letter.lower()]))
    changed = answer[:place] + other + answer[place + 1 :]
    assert not task.right(changed, problem)
    for more in (f"{answer} {answer}", f"{answer} or so", f"not {answer}", f"{answer}{other}", ""):
        assert not task.right(more, problem), more


@settings(max_examples=60)
@given(st.sampled_from([find_task(kind) for kind in KINDS]), st.text(max_size=20))
def test_no_text_breaks_a_judge(task: LeveledTask, text: str) -> None:
    problem = task.draw(Random(1))
    if task.right(text, problem):
        # Hypothesis may find a right answer; then it has nothing but the answer's characters.
        assert set(text.lower()) <= set(problem.answer.lower()) | set(" .,\n\t")


@pytest.mark.parametrize("kind", KINDS)
def test_no_problem_is_for_training_and_for_tests_whatever_the_level(kind: str) -> None:
    levels = [find_task(f"{kind}:{level}") for level in range(1, LEVELS + 1)]
    train = {problem_at(task, 3, "train", i).key for task in levels for i in range(60)}
    test = {problem_at(task, 4, "test", i).key for task in levels for i in range(15)}
    assert not train & test
    assert len(train) > 200


@pytest.mark.parametrize("kind", KINDS)
def test_the_easiest_level_has_enough_problems_to_test_on(kind: str) -> None:
    problems = distinct_problems(find_task(kind), 1, "test", 30)
    assert len({problem.key for problem in problems}) == 30


@pytest.mark.parametrize("kind", KINDS)
def test_levels_get_harder(kind: str) -> None:
    def size(level: int) -> float:
        problems = drawn(find_task(f"{kind}:{level}"), 60)
        return mean(len(joined(p.question)) + len(joined(p.steps)) for p in problems)

    easiest, second, *others = map(size, range(1, LEVELS + 1))
    # A level may be hard by what it asks, not by its length.
    assert second > 0.9 * easiest
    assert min(others) > 1.1 * easiest
    assert others[-1] > 1.5 * easiest


@given(some_task, seeds)
def test_steps_are_true_and_end_at_the_answer(task: LeveledTask, seed: int) -> None:
    problem = task.draw(Random(seed))
    assert last_line(problem) == problem.answer
    assert len(problem.steps.splitlines()) > 1
    equations = checked_equations(problem.steps)
    if task.kind not in ("reversal", "letters", "sorting", "brackets"):
        assert equations


@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_digits_stand_alone_where_tiny_networks_learn(kind: str, level: int) -> None:
    for problem in drawn(find_task(f"{kind}:{level}"), 20):
        assert not re.search("[0-9]{2}", f"{problem.question} {problem.answer}")
    hard = "".join(p.question + p.answer for p in drawn(find_task("sums:4"), 3))
    assert re.search("[0-9]{6}", hard)


@pytest.mark.parametrize("level", [-1, 0, LEVELS + 1])
def test_there_are_five_levels(level: int) -> None:
    for task in OUR_TASKS:
        with pytest.raises(BadInput, match=rf"task {task.kind}: there is no level {level}: give 1"):
            task(level)


# What each asks, worked out by other means


@settings(max_examples=40)
@given(st.integers(1, LEVELS), seeds)
def test_sums_have_a_carry_and_are_right(level: int, seed: int) -> None:
    problem = find_task(f"sums:{level}").draw(Random(seed))
    a, b = numbers_in(problem.question)
    assert a + b == int(problem.answer.replace(" ", ""))
    assert "carry 1" in problem.steps


def test_sums_with_and_without_carry_from_column_to_column() -> None:
    for problem in drawn(find_task("sums:4"), 100):
        a, b = numbers_in(problem.question)
        columns = problem.steps.splitlines()[:-1]
        digits = [int(column.split("=")[1].split(",")[0]) % 10 for column in columns]
        assert digits == [int(d) for d in reversed(str(a + b)[-len(digits) :])]
        assert len(columns) == max(len(str(a)), len(str(b)))


@settings(max_examples=40)
@given(st.integers(1, LEVELS), seeds)
def test_products(level: int, seed: int) -> None:
    problem = find_task(f"products:{level}").draw(Random(seed))
    assert math.prod(numbers_in(problem.question)) == int(problem.answer.replace(" ", ""))


@settings(max_examples=40)
@given(st.integers(1, LEVELS), seeds)
def test_gcd(level: int, seed: int) -> None:
    problem = find_task(f"gcd:{level}").draw(Random(seed))
    assert math.gcd(*numbers_in(problem.question)) == int(problem.answer.replace(" ", ""))
    assert "= 0" in problem.steps.splitlines()[-2]


def test_a_gcd_cannot_be_guessed() -> None:
    answers = [problem.answer for problem in drawn(find_task("gcd"), 500)]
    assert max(map(answers.count, answers)) < 0.35 * len(answers)


@settings(max_examples=40)
@given(st.integers(1, LEVELS), seeds)
def test_remainders(level: int, seed: int) -> None:
    problem = find_task(f"remainders:{level}").draw(Random(seed))
    *values, modulus = numbers_in(problem.question)
    operation = {1: lambda a: a, 2: lambda a, b: a + b, 3: lambda a, b: a * b}.get(level, pow)
    assert operation(*values) % modulus == int(problem.answer.replace(" ", ""))


@settings(max_examples=40)
@given(st.integers(1, LEVELS), seeds)
def test_bases(level: int, seed: int) -> None:
    problem = find_task(f"bases:{level}").draw(Random(seed))
    number, source, target = map(int, problem.key.split())
    numeral = next(w for w in re.findall(r"[0-9a-f]+", joined(problem.question)) if not w.isalpha())
    assert int(numeral, source) == number == int(problem.answer.replace(" ", ""), target)
    assert source != target


@settings(max_examples=40)
@given(st.integers(1, LEVELS), seeds)
def test_sequences(level: int, seed: int) -> None:
    problem = find_task(f"sequences:{level}").draw(Random(seed))
    terms = [*numbers_in(problem.question), int(problem.answer.replace(" ", ""))]
    first = [b - a for a, b in pairwise(terms)]
    second = {b - a for a, b in pairwise(first)}
    if level < 4:
        assert len(second) == 1
        assert (second == {0}) == (level < 3)
    elif level == 4:
        assert first[1:] == terms[:-2]
    else:
        assert len({b / a for a, b in pairwise(first)}) == 1


@settings(max_examples=40)
@given(st.integers(1, LEVELS), seeds)
def test_reversal(level: int, seed: int) -> None:
    problem = find_task(f"reversal:{level}").draw(Random(seed))
    answer = problem.answer.replace(" ", "")
    assert answer[::-1] == problem.key != answer
    assert " ".join(problem.key) in problem.question


@settings(max_examples=40)
@given(st.integers(1, LEVELS), seeds)
def test_letters(level: int, seed: int) -> None:
    problem = find_task(f"letters:{level}").draw(Random(seed))
    letter, _, word = problem.key.split()
    assert word.count(letter) == int(problem.answer.replace(" ", ""))
    assert " ".join(word) in problem.question
    assert f" {letter} " in problem.question.replace(" ".join(word), "")


@settings(max_examples=40)
@given(st.integers(1, LEVELS), seeds)
def test_sorting(level: int, seed: int) -> None:
    task = find_task(f"sorting:{level}")
    problem = task.draw(Random(seed))
    items = numbers_in(problem.answer) or problem.answer.split()
    falling = "falling" in problem.key
    assert items == sorted(items, reverse=falling)
    if isinstance(items[0], int):
        assert sorted(numbers_in(problem.question)) == sorted(items)
        assert task.right(str(items), problem)
    if len(set(map(str, items))) > 1:
        wrong = ", ".join(map(str, reversed(items)))
        assert not task.right(wrong, problem)
    assert ("large to small" in problem.question or "z to a" in problem.question) <= falling


@settings(max_examples=40)
@given(st.integers(1, LEVELS), seeds)
def test_brackets(level: int, seed: int) -> None:
    problem = find_task(f"brackets:{level}").draw(Random(seed))
    whole = problem.key + problem.answer.replace(" ", "")
    assert problem.answer
    while whole:
        shorter = whole.replace("()", "").replace("[]", "").replace("<>", "")
        assert shorter != whole, "does not balance"
        whole = shorter


@settings(max_examples=40)
@given(st.integers(1, LEVELS), seeds)
def test_units(level: int, seed: int) -> None:
    sizes = {
        "weeks": 604800, "days": 86400, "hours": 3600, "minutes": 60, "seconds": 1,
        "kilometres": 10**6, "metres": 1000, "centimetres": 10, "millimetres": 1,
        "yards": 36, "feet": 12, "inches": 1, "tonnes": 10**6, "kilograms": 1000, "grams": 1,
        "gallons": 16, "quarts": 4, "pints": 2, "cups": 1,
    }  # fmt: skip
    task = find_task(f"units:{level}")
    problem = task.draw(Random(seed))
    parts = re.findall("([0-9]+) ([a-z]+)", joined(problem.question))
    total = sum(int(amount) * sizes[unit] for amount, unit in parts)
    unit = problem.facts["unit"]
    assert total == int(problem.answer.replace(" ", "")) * sizes[unit]
    assert task.right(f"The answer is {problem.answer} {unit}.", problem)
    assert not task.right(f"{problem.answer} parsecs", problem)
    assert not task.right(f"{problem.answer}{unit}", problem)


@given(st.integers(1, 2), seeds)
def test_weekdays_later_and_earlier(level: int, seed: int) -> None:
    problem = find_task(f"weekdays:{level}").draw(Random(seed))
    day, shift = problem.key.split()
    start = date(2024, 1, 1)  # a Monday
    while f"{start:%A}" != day:
        start = date.fromordinal(start.toordinal() + 1)
    assert f"{date.fromordinal(start.toordinal() + int(shift)):%A}" == problem.answer
    assert day in problem.question
    assert str(abs(int(shift))) in joined(problem.question)


@given(st.integers(3, 5), seeds)
def test_weekdays_of_dates(level: int, seed: int) -> None:
    problem = find_task(f"weekdays:{level}").draw(Random(seed))
    dates = [date.fromisoformat(part) for part in problem.key.split()]
    assert f"{dates[-1]:%A}" == problem.answer
    question = joined(problem.question)
    if level == 3:
        assert f"{dates[0]:%A}" in question
        assert dates[0] < dates[1]
    written = problem.key if level == 5 else f"{dates[-1].day} {dates[-1]:%B}"
    assert written in question


@settings(max_examples=40)
@given(st.integers(1, LEVELS), seeds)
def test_countdown(level: int, seed: int) -> None:
    problem = find_task(f"countdown:{level}").draw(Random(seed))
    text = joined(problem.answer)
    assert eval(text) == problem.facts["target"]
    used = [int(n) for n in re.findall("[0-9]+", text)]
    left = list(problem.facts["numbers"])
    for number in used:
        left.remove(number)
    assert problem.facts["target"] not in problem.facts["numbers"]
    shown = numbers_in(problem.question)
    assert sorted(shown) == sorted([*problem.facts["numbers"], problem.facts["target"]])


COUNTDOWN = Problem("countdown", "", "9 + 5 - 3", "", facts={"numbers": [3, 5, 9, 9], "target": 11})


@pytest.mark.parametrize(
    "answer",
    ["9+5-3", "5 - 3 + 9", "(9 - 3) + 5", "9 + 5 - 3 = 11", "9+5-3=1 1", r"\boxed{9 + 5 - 3}",
     "-3 + 9 + 5", "9 \u2212 3 + 5", "-(3 - 9) + 5", "The answer is 9 + 5 - 3.", "$9 + 5 - 3$",
     "9 + 5 - 3\n"],
)  # fmt: skip
def test_every_right_expression_counts(answer: str) -> None:
    assert find_task("countdown").right(answer, COUNTDOWN)


@pytest.mark.parametrize(
    "answer",
    ["11", "9 + 5", "9 + 5 - 3 = 12", "9 + 5 - 3 = 11 = 11", "5 + 5 + 9 - 5 - 3", "9 + 9 + 9 - 16",
     "9 + 1 + 1", "9 + 5 - 3 + 0", "9 + 5 - 3, 9", "__import__('os').getpid()", "9 ** 1 + 5 - 3",
     "9 // 1 + 5 - 3", "(9 + 5 - 3", "9 + 5 - True", "", "= 11", "3 / (9 - 9)", "9 5 - 3",
     "+" * 199, "(" * 150 + "9 + 5 - 3" + ")" * 150, "-" * 200 + "9 + 5 - 3", "9.0 + 5 - 3"],
)  # fmt: skip
def test_other_expressions_do_not(answer: str) -> None:
    assert not find_task("countdown").right(answer, COUNTDOWN)


def test_signs_of_latex_mean_products_and_quotients() -> None:
    problem = Problem("countdown", "", "", "", facts={"numbers": [2, 3, 4], "target": 6})
    for answer in (
        r"3 \times 4 \div 2",
        r"3 \cdot 4 / 2",
        "3 \u00d7 4 \u00f7 2",
        r"\left(3 * 4\right) / 2",
    ):
        assert find_task("countdown").right(answer, problem), answer
    assert not find_task("countdown").right(r"3 \times 4", problem)
