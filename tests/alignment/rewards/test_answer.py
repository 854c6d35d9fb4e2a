"""The final answer as its task judges it."""

from random import Random

import pytest

from tests.alignment.rewards.support import boxed, respond
from ziphius.alignment.rewards.answer import right_answer
from ziphius.alignment.tasks.problem import Problem
from ziphius.config.errors import BadInput


class Same:
    name = "t"

    def draw(self, random: Random) -> Problem:
        raise AssertionError("a reward draws no problem")

    def right(self, answer: str, problem: Problem) -> bool:
        return answer == problem.answer


REWARD = right_answer({"t": Same()}, boxed)


@pytest.mark.parametrize(
    ("text", "worth"),
    [
        (r"\boxed{7}", 1.0),
        (r"<think>\boxed{8}</think> \boxed{7}", 1.0),
        (r"<think>\boxed{7}</think> \boxed{8}", 0.0),
        # Reasoning that does not end gives no answer, whatever it mentions.
        (r"<think>it is \boxed{7}", 0.0),
        (r"\boxed{}", 0.0),
        ("7", 0.0),
        ("", 0.0),
    ],
)
def test_the_last_answer_after_the_reasoning_counts(text: str, worth: float) -> None:
    assert REWARD(respond(text, answer="7")) == worth


def test_nothing_is_not_right_even_where_nothing_is_the_answer() -> None:
    assert REWARD(respond(r"\boxed{}", answer="")) == 0.0


def test_an_unfinished_response_is_wrong() -> None:
    assert REWARD(respond(r"\boxed{7}", answer="7", finished=False)) == 0.0


def test_a_problem_of_another_task_is_refused_by_name() -> None:
    with pytest.raises(BadInput, match="no task 'u' judges this problem: have t"):
        REWARD(respond(r"\boxed{7}", task="u"))
