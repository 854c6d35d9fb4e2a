"""A judge that votes, and every way in which it may not."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.alignment.rewards.judges import Decide, FakeJudge, fake_judge, shown
from tests.alignment.rewards.support import respond
from ziphius.alignment.endpoint import Endpoint
from ziphius.alignment.questions import mixture_of
from ziphius.alignment.rewards.compose import Composed, Weighted
from ziphius.alignment.rewards.find import find_rewards
from ziphius.alignment.rewards.judge import Judge
from ziphius.alignment.rewards.verdicts import majority, read_choice, read_grade, swapped
from ziphius.config.errors import BadInput, ZiphiusError

KEY = "sk-very-secret"


def endpoint(fake: FakeJudge, **settings: Any) -> Endpoint:
    return Endpoint(fake.url, "judge", **{"key": KEY, "seconds": 10.0, **settings})


def prefers_longer(body: dict[str, Any]) -> str:
    a, b = shown(body)
    return "Because.\n[[A]]" if len(a) > len(b) else "Because.\n[[B]]"


# Words and votes


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("[[A]]", "first"),
        ("A is good. [[B]]", "second"),
        ("first [[A]], no: [[ B ]]", "second"),
        ("[[C]]", "tie"),
        ("<think>[[A]]</think> [[B]]", "second"),
        ("<think>[[A]]</think> neither", None),
        ("A", None),
        ("[[D]]", None),
        ("", None),
    ],
)
def test_the_last_verdict_after_the_reasoning_counts(text: str, verdict: str | None) -> None:
    assert read_choice(text, swap=False) == verdict
    turned = {"first": "second", "second": "first"}
    assert read_choice(text, swap=True) == turned.get(str(verdict), verdict)


@pytest.mark.parametrize(
    ("text", "grade"),
    [
        ("[[1]]", 0.0), ("[[10]]", 1.0), ("[[3]] no [[ 4 ]]", 1 / 3),
        ("<think>[[9]]</think>", None), ("[[0]]", None),
        ("[[11]]", None), ("[[-5]]", None), ("7", None), ("", None),
    ],
)  # fmt: skip
def test_grades_become_shares(text: str, grade: float | None) -> None:
    assert read_grade(text) == (None if grade is None else pytest.approx(grade))


VOTES = st.lists(st.sampled_from(["first", "second", "tie", None]), max_size=9)


@given(VOTES)
def test_a_majority_treats_both_answers_alike(votes: list[Any]) -> None:
    turn = {"first": "second", "second": "first", "tie": "tie", None: None}
    winner = majority(votes)
    assert majority([turn[vote] for vote in votes]) == turn[winner]
    assert majority(votes[::-1]) == winner
    assert (winner is None) == all(vote is None for vote in votes)
    if winner in ("first", "second"):
        assert votes.count(winner) > votes.count(turn[winner])


@pytest.mark.parametrize(
    ("votes", "winner"),
    [
        (["first", "second", "second"], "second"),
        (["first", "second"], "tie"),
        (["first", None, None], "first"),
        (["tie", "tie", "first"], "tie"),
        (["tie", "first", "first"], "first"),
        (["tie", "first"], "first"),
        ([None], None),
    ],
)
def test_majorities(votes: list[Any], winner: Any) -> None:
    assert majority(votes) == winner


def test_the_order_is_the_seeds_and_even() -> None:
    orders = [swapped(3, vote, "q", "a", "b") for vote in range(1000)]
    assert orders == [swapped(3, vote, "q", "a", "b") for vote in range(1000)]
    assert orders != [swapped(4, vote, "q", "a", "b") for vote in range(1000)]
    assert 430 < sum(orders) < 570


# Over the network


def test_votes_see_both_orders_and_the_better_answer_wins() -> None:
    with fake_judge(prefers_longer) as fake, Judge(endpoint(fake), votes=9) as judge:
        assert judge.choose("q", "long answer", "short").winner == "first"
        assert judge.choose("q", "short", "long answer").winner == "second"
        assert {shown(body)[0] for body in fake.asked} == {"long answer", "short"}
        assert {body["path"] for body in fake.asked} == {"/v1/chat/completions"}
        assert {body["seed"] for body in fake.asked} == set(range(9))
        assert {headers["Authorization"] for headers in fake.headers} == {f"Bearer {KEY}"}


def test_a_judge_that_always_says_a_is_no_judge() -> None:
    with fake_judge(lambda body: "[[A]]") as fake, Judge(endpoint(fake), votes=40) as judge:
        votes = judge.choose("q", "a", "b").votes
        assert 8 <= votes.count("first") <= 32


def test_the_constitution_is_told() -> None:
    with (
        fake_judge(lambda body: "[[5]]") as fake,
        Judge(endpoint(fake), constitution="Be kind to whales.") as judge,
        Judge(endpoint(fake)) as plain,
    ):
        judge.grade("q", "a")
        plain.grade("q", "a")
        told, untold = (body["messages"][0]["content"] for body in fake.asked)
        assert told.endswith("Be kind to whales.")
        assert told.startswith(untold)


def test_grades_are_the_mean_of_votes_and_a_reward() -> None:
    numbers = count()
    said = ("[[10]]", "[[1]]", "no grade", "[[4]]")
    with (
        fake_judge(lambda body: said[next(numbers) % 4]) as fake,
        Judge(endpoint(fake), votes=4) as judge,
    ):
        assert judge(respond("text")) == pytest.approx((1 + 0 + 1 / 3) / 3)
        assert judge.abstained == 1
        assert judge.last_problem == "no verdict in its words: no grade"
        assert judge(respond("text", finished=False)) == 0.0


FAULTS: dict[str, tuple[Decide, str]] = {
    "500": (lambda body: 500, "status 500: refused"),
    "401": (lambda body: 401, "status 401: refused"),
    "no answer": (lambda body: 30.0, "no answer within 0.5 s"),
    "nonsense": (lambda body: "hello", "no verdict in its words: hello"),
    "no JSON": (lambda body: b"<html>", "no chat completion: <html>"),
    "other JSON": (lambda body: b'{"choices": []}', "no chat completion: "),
    "no text": (lambda body: b'{"choices": [{"message": {"content": null}}]}', "without text"),
    "redirect": (lambda body: 302, "status 302"),
    "deep JSON": (lambda body: b"[" * 100_000, "no chat completion: "),
    "huge": (lambda body: b" " * (5 << 20), "longer than"),
}


@pytest.mark.parametrize(("decide", "words"), FAULTS.values(), ids=FAULTS)
def test_a_judge_that_fails_abstains_and_says_why(decide: Decide, words: str) -> None:
    seconds = 0.5 if words.endswith("0.5 s") else 10.0
    with fake_judge(decide) as fake, Judge(endpoint(fake, seconds=seconds), votes=2) as judge:
        choice = judge.choose("q", "a", "b")
        assert (choice.winner, choice.votes) == (None, (None, None))
        with pytest.raises(ZiphiusError, match="judge judge gave no verdict in 2 votes: ") as info:
            judge.grade("q", "a")
        assert words in str(info.value)
        assert "\n" not in str(info.value)
        assert KEY not in str(info.value) + repr(judge._client.endpoint) + judge.last_problem
        assert judge.abstained == 4


def test_the_sample_of_a_judge_that_times_out_counts_zero() -> None:
    said: list[str] = []
    with fake_judge(lambda body: 30.0) as fake, Judge(endpoint(fake, seconds=0.3)) as judge:
        rewards = [Weighted("judge", judge), Weighted("rule", lambda r: 1.0)]
        composed = Composed(rewards, say=said.append)
        scored = composed.score([respond("x"), respond("y")])
    assert [one.values for one in scored] == [{"judge": 0.0, "rule": 1.0}] * 2
    assert composed.failures["judge"] == 2
    assert len(said) == 1
    assert "no answer within 0.3 s" in said[0]


def test_failures_that_pass_are_tried_again() -> None:
    numbers = count()
    with (
        fake_judge(lambda body: (503, 429, "[[10]]")[next(numbers) % 3]) as fake,
        Judge(endpoint(fake)) as judge,
    ):
        assert judge.grade("q", "a") == 1.0
        assert len(fake.asked) == 3


def test_a_judge_that_is_not_there_abstains() -> None:
    with Judge(Endpoint("http://127.0.0.1:9/v1", "judge")) as judge:
        assert judge.choose("q", "a", "b").winner is None
        assert "Connect" in judge.last_problem


def test_threads_share_the_bound_on_votes_under_way() -> None:
    with (
        fake_judge(lambda body: 0.05) as fake,
        Judge(endpoint(fake, concurrency=3), votes=4) as judge,
        ThreadPoolExecutor(6) as pool,
    ):
        choices = list(pool.map(lambda n: judge.choose(f"q{n}", "a", "b"), range(6)))
    assert all(None not in choice.votes for choice in choices)
    assert fake.most == 3


def test_closing_frees_who_waits_and_can_be_followed_by_questions() -> None:
    slow = iter([30.0])
    with fake_judge(lambda body: next(slow, "[[10]]")) as fake, Judge(endpoint(fake)) as judge:
        errors: list[BaseException] = []

        def ask() -> None:
            try:
                judge.grade("q", "a")
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        while not fake.asked:
            time.sleep(0.01)
        judge.close()
        thread.join(5)
        assert isinstance(errors[0], CancelledError)
        assert judge.grade("q", "a") == 1.0


@pytest.fixture(autouse=True)
def _no_threads_left() -> Iterator[None]:
    yield
    deadline = time.monotonic() + 5
    while any("_turn" in thread.name for thread in threading.enumerate()):
        assert time.monotonic() < deadline, threading.enumerate()
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"url": "localhost:80"}, "give an address"),
        ({"url": "http://x", "seconds": 0}, "must be above 0"),
        ({"url": "http://x", "concurrency": 0}, "must be above 0"),
        ({"url": "http://x", "key": "secret\nline"}, "its key has other characters"),
    ],
)
def test_impossible_endpoints_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words) as info:
        Endpoint(model="m", **settings)
    assert "secret" not in str(info.value)
    with pytest.raises(BadInput, match="0 votes"):
        Judge(Endpoint("http://x", "m"), votes=0)


def test_a_judge_is_a_reward_by_its_name(tmp_path: Path) -> None:
    tasks = mixture_of("sums")
    (tmp_path / "key").write_text("secret\n", "utf-8")
    with fake_judge(lambda body: "[[7]]") as fake:
        spec = f"judge:{fake.url}#m#{tmp_path / 'key'}=2,form"
        composed = find_rewards(spec, tasks, 9, lambda text: None)
        (scored,) = composed.score([respond("x")])
        judge = composed.rewards[0].reward
        assert isinstance(judge, Judge)
        judge.close()
    (name,) = [weighted.name for weighted in composed.rewards if weighted.name != "form"]
    assert scored.total == pytest.approx(2 * scored.values[name])
    assert scored.values[name] > 0
    assert fake.asked[0]["model"] == "m"
    assert fake.headers[0]["Authorization"] == "Bearer secret"


@pytest.mark.parametrize("needs", ["", "http://a/v1", "http://a/v1#m#no/such/key"])
def test_a_judge_without_an_address_a_model_or_its_key_is_refused(needs: str) -> None:
    with pytest.raises(BadInput, match="judge"):
        find_rewards(f"judge:{needs}", mixture_of("sums"), 9, lambda text: None)
