"""Answers of mathematics by meaning, in threads, with comparisons that hang."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.alignment.rewards.support import boxed, respond
from ziphius.alignment.rewards import math as rewards_math
from ziphius.alignment.rewards.math import MathAnswers
from ziphius.config.errors import BadInput

pytest.importorskip("math_verify")


@pytest.fixture(scope="module")
def answers() -> Iterator[MathAnswers]:
    with MathAnswers(boxed, seconds=20) as found:
        yield found


@pytest.mark.parametrize(
    ("gold", "answer", "equal"),
    [
        ("1/2", "0.5", True),
        (r"\frac{1}{2}", "0.5", True),
        (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}", True),
        ("(x+1)^2", "x^2+2x+1", True),
        ("1000", "1,000", True),
        ("42", "42", True),
        ("42", "43", False),
        ("1/2", "1/3", False),
        ("x+1", "x-1", False),
        ("42", r"\frac{", False),
        ("42", "the answer", False),
        ("42", "", False),
        ("7", "7" * 2000, False),
    ],
)
def test_answers_are_equal_by_meaning(
    answers: MathAnswers, gold: str, answer: str, equal: bool
) -> None:
    assert answers.equal(gold, answer) is equal


def test_it_is_a_reward(answers: MathAnswers) -> None:
    assert answers(respond(r"<think>\boxed{3}</think>\boxed{0.5}", answer="1/2")) == 1.0
    assert answers(respond(r"<think>\boxed{0.5}</think>\boxed{3}", answer="1/2")) == 0.0
    assert answers(respond(r"\boxed{0.5}", answer="1/2", finished=False)) == 0.0
    assert answers(respond("0.5", answer="1/2")) == 0.0


def test_threads_get_their_own_verdicts(answers: MathAnswers) -> None:
    cases = [(str(n), str(n + n % 2)) for n in range(40)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda case: answers.equal(*case), cases))
    assert found == [n % 2 == 0 for n in range(40)]


def test_a_comparison_that_hangs_counts_nothing_and_the_next_is_judged() -> None:
    with MathAnswers(boxed, seconds=3) as answers:
        assert answers.equal("1/2", "0.5")
        start = time.monotonic()
        assert not answers.equal("2", "9^(9^(9^(9^9)))+1/(7!!!!!!)")
        first = answers.timeouts
        process = answers._workers[0]._process
        assert process is None or first == 0
        # One that hangs for sure: its process is stopped.
        answers.equal("1", "1")
        process = answers._workers[0]._process
        assert process is not None
        os.kill(process.pid, signal.SIGSTOP)
        assert not answers.equal("1", "1")
        assert answers.timeouts == first + 1
        assert process.returncode == -signal.SIGKILL
        assert answers.equal("1", "1")
        assert time.monotonic() - start < 60


def test_a_process_that_dies_is_replaced() -> None:
    with MathAnswers(boxed, seconds=20) as answers:
        assert answers.equal("1", "1")
        process = answers._workers[0]._process
        assert process is not None
        process.kill()
        process.wait()
        assert answers.equal("1/2", "0.5")
    assert answers._workers[0]._process is None


def test_where_it_is_not_installed_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewards_math, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"not installed: pip install 'ziphius\[rl\]'"):
        MathAnswers(boxed)
