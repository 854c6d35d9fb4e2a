"""The weighted sum: linear, each reward on its part, and nothing lost to one that fails."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.alignment.rewards.support import respond
from ziphius.alignment.rewards.compose import Composed, Weighted
from ziphius.alignment.rewards.reward import Response
from ziphius.config.errors import BadInput

NUMBERS = st.floats(-1e6, 1e6)


def silent(text: str) -> None:
    raise AssertionError(f"nothing should be said: {text}")


def constant(value: float) -> object:
    return lambda response: value


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=4), NUMBERS)
def test_the_sum_is_linear_in_its_weights(parts: list[tuple[float, float]], factor: float) -> None:
    def total(scale: float) -> float:
        rewards = [
            Weighted(str(i), constant(value), weight * scale)  # type: ignore[arg-type]
            for i, (weight, value) in enumerate(parts)
        ]
        return Composed(rewards, say=silent, threads=1)(respond("x"))

    expected = sum(weight * value for weight, value in parts)
    size = sum(abs(weight * value) for weight, value in parts)
    assert total(1.0) == pytest.approx(expected, abs=1e-9 * size)
    assert total(factor) == pytest.approx(factor * expected, abs=1e-9 * size * abs(factor) + 1e-12)


def test_each_reward_sees_its_part() -> None:
    seen: dict[str, str] = {}

    def note(name: str) -> object:
        def reward(response: Response) -> float:
            seen[name] = response.text
            return float(response.tokens)

        return reward

    rewards = [
        Weighted("safe", note("safe"), 2.0),  # type: ignore[arg-type]
        Weighted("helpful", note("helpful"), 1.0, "summary"),  # type: ignore[arg-type]
        Weighted("thought", note("thought"), 0.5, "thinking"),  # type: ignore[arg-type]
    ]
    scored = Composed(rewards, say=silent).score([respond("<think>why</think>so", tokens=4)])
    assert seen == {"safe": "<think>why</think>so", "helpful": "so", "thought": "why"}
    assert scored[0].values == {"safe": 4, "helpful": 4, "thought": 4}
    assert scored[0].total == 14


def test_the_order_is_kept_and_work_is_done_side_by_side() -> None:
    together, most, lock = 0, 0, threading.Lock()

    def slow(response: Response) -> float:
        nonlocal together, most
        with lock:
            together += 1
            most = max(most, together)
        time.sleep(0.02 * (3 - int(response.text) % 3))
        with lock:
            together -= 1
        return float(response.text)

    composed = Composed([Weighted("slow", slow)], say=silent, threads=3)
    scored = composed.score([respond(str(i)) for i in range(9)])
    assert [one.total for one in scored] == list(range(9))
    assert most == 3
    assert composed.score([]) == []


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (lambda r: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda r: float("nan"), "gave nan"),
        (lambda r: float("inf"), "gave inf"),
        (lambda r: None, "TypeError: "),
        (lambda r: exit(1), "SystemExit: 1"),
    ],
    ids=["raises", "nan", "inf", "None", "exits"],
)
def test_a_reward_that_fails_counts_nothing_and_says_so_once(bad: object, words: str) -> None:
    said: list[str] = []
    composed = Composed(
        [Weighted("bad", bad), Weighted("good", lambda r: 1.0, 3.0)],  # type: ignore[arg-type]
        say=said.append,
    )
    for _ in range(2):
        for scored in composed.score([respond("x", task="sums")] * 3):
            assert (scored.total, scored.failed) == (3.0, ("bad",))
            assert scored.values == {"bad": 0.0, "good": 1.0}
    assert composed.failures == {"bad": 6, "good": 0}
    assert len(said) == 1
    assert said[0].startswith(f"reward bad: {words}")
    assert "task sums" in said[0]
    assert "\n" not in said[0]


def test_a_reward_that_hangs_is_left_behind() -> None:
    said: list[str] = []
    gone = threading.Event()

    def hangs(response: Response) -> float:
        if response.text == "hang":
            gone.wait(30)
        return 1.0

    composed = Composed([Weighted("judge", hangs)], say=said.append, threads=2, seconds=0.3)
    start = time.monotonic()
    scored = composed.score([respond(text) for text in ("hang", "a", "hang", "b", "hang", "c")])
    assert time.monotonic() - start < 5
    assert [one.total for one in scored] == [0, 1, 0, 1, 0, 1]
    assert said == [
        "reward judge: gave nothing within 0.3 s: it counts 0 for this sample of task t; later "
        "failures are only counted"
    ]
    gone.set()


def test_threads_of_a_reward_that_always_hangs_are_bounded() -> None:
    gone = threading.Event()
    before = threading.active_count()
    composed = Composed(
        [Weighted("hung", lambda r: float(gone.wait(30)))],
        say=lambda text: None, threads=2, seconds=0.05,
    )  # fmt: skip
    start = time.monotonic()
    scored = composed.score([respond("x")] * 40)
    assert time.monotonic() - start < 5
    assert [one.failed for one in scored] == [("hung",)] * 40
    assert composed.failures == {"hung": 40}
    assert threading.active_count() - before <= 6
    gone.set()
    time.sleep(0.2)
    # Those that hung have ended, so it is asked again.
    assert composed.score([respond("x")])[0].total == 1.0


@pytest.mark.parametrize(
    "rewards",
    [
        [],
        [Weighted("a", lambda r: 0.0), Weighted("a", lambda r: 0.0)],
        [Weighted("a", lambda r: 0.0, float("nan"))],
    ],
)
def test_impossible_sums_are_refused(rewards: list[Weighted]) -> None:
    with pytest.raises(BadInput):
        Composed(rewards, say=silent)
