"""Levels of load: how many at a time, when they come, what they ask, and equal answers."""

from __future__ import annotations

import asyncio
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.serving.bench.mock import Asked, Mock, Reply, good
from ziphius.config.errors import BadInput
from ziphius.serving.bench.load import Asking, Client
from ziphius.serving.bench.measure import Goal, Summary
from ziphius.serving.bench.outcome import Outcome
from ziphius.serving.bench.prompts import Prompt, make_text, read_prompts, require_taken
from ziphius.serving.bench.stream import Fault
from ziphius.serving.bench.sweep import Level, arrivals, make_prompts, sweep
from ziphius.serving.bench.texts import Texts

PROMPTS = [Prompt("text", text) for text in ("one", "two", "three")]


def swept(mock: Mock, levels: list[Level], **options: Any) -> tuple[list[Summary], Texts]:
    texts = Texts()

    async def run() -> list[Summary]:
        async with Client(mock.url, Asking()) as client:
            return await sweep(client, PROMPTS, levels, goal=Goal(), texts=texts, **options)

    return asyncio.run(run()), texts


def last_word(asked: Asked) -> str:
    return str(asked.body["messages"][-1]["content"])


# --- levels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("streams", [1, 3, 8])
def test_a_closed_loop_keeps_so_many_at_a_time(streams: int) -> None:
    with Mock(lambda a: good(gap=0.01)) as mock:
        (summary,), _ = swept(mock, [Level(7, concurrency=streams)])
    assert mock.most == min(streams, 7)
    assert (summary.requests, summary.answered, summary.concurrency) == (7, 7, streams)
    asked = [last_word(a) for a in mock.asked]
    assert sorted(asked) == sorted(PROMPTS[n % 3].value for n in range(7))


def test_no_limit_of_the_client_hides_the_load() -> None:
    with Mock(lambda a: good(["one"], gap=0.5)) as mock:
        (summary,), _ = swept(mock, [Level(130, concurrency=130)])
    assert (mock.most, summary.answered) == (130, 130)


def test_an_open_loop_does_not_wait_for_answers() -> None:
    with Mock(lambda a: good(gap=0.1)) as mock:  # an answer takes 0.6 s
        (summary,), _ = swept(mock, [Level(20, rate=50.0)], seed=3)
    assert mock.most > 10
    assert (summary.answered, summary.rate, summary.concurrency) == (20, 50.0, None)
    assert summary.late is not None
    # A closed loop of one would be late by 0.6 s for each request before: 5.7 s in the middle.
    assert summary.late.p50 < 0.6
    assert summary.seconds < 20 * 0.6


def test_progress_and_levels_are_told_in_order() -> None:
    told: list[tuple[str, int]] = []
    with Mock() as mock:
        swept(
            mock,
            [Level(2, concurrency=1), Level(3, concurrency=2)],
            on_request=lambda level, done, outcome: told.append((level.name, done)),
            on_level=lambda level, summary: told.append((level.name, -summary.requests)),
        )
    assert told == [("1", 1), ("1", 2), ("1", -2), ("2", 1), ("2", 2), ("2", 3), ("2", -3)]


@given(st.floats(0.1, 100), st.integers(1, 50), st.integers(0, 9))
def test_arrivals_are_those_of_the_seed_denser_or_thinner(
    rate: float, count: int, seed: int
) -> None:
    times = arrivals(rate, count, seed)
    assert times[0] == 0
    assert times == sorted(times)
    assert [rate * at for at in times] == pytest.approx(arrivals(1.0, count, seed))


def test_arrivals_are_poisson() -> None:
    times = arrivals(5.0, 20_001, seed=1)
    gaps = [b - a for a, b in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(0.2, rel=0.03)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert variance == pytest.approx(mean**2, rel=0.06)
    assert arrivals(5.0, 9, seed=2) != arrivals(5.0, 9, seed=1)


# --- texts ----------------------------------------------------------------------------------------


def test_answers_are_compared_over_levels_and_repetitions() -> None:
    def behave(asked: Asked) -> Reply:
        # One answer to one prompt differs, in the second level.
        return good(["two", "many" if asked.number == 7 else "few"]) if last_word(asked) == "two" \
            else good([last_word(asked)])  # fmt: skip

    with Mock(behave) as mock:
        _, texts = swept(mock, [Level(6, concurrency=1), Level(6, concurrency=1)])
    assert (texts.compared, texts.differing) == (12, 1)
    first = texts.first_difference()
    assert first is not None
    assert (first["prompt"], first["text"], first["texts"]) == (1, "two", 2)
    assert (first["at"], first["own"], first["other"]) == (4, "two few ", "two many ")
    assert first["answers"] == {"own": 3, "other": 1}
    assert texts.report()["share"] == pytest.approx(1 / 12)


def said(prompt: int, text: str, fault: Fault | None = None) -> Outcome:
    return Outcome(prompt=prompt, began=0.0, ended=1.0, text=text, fault=fault)


def test_failures_and_single_answers_are_not_compared() -> None:
    texts = Texts()
    texts.add([said(0, "a"), said(1, "b"), said(0, "half", Fault("timeout", ""))], PROMPTS)
    assert (texts.compared, texts.differing, texts.first_difference()) == (0, 0, None)
    assert texts.report()["share"] == 0


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["", "a", "ab", "b"])), max_size=20))
def test_laws_of_differing_texts(answers: list[tuple[int, str]]) -> None:
    texts = Texts()
    texts.add([said(*answer) for answer in answers], PROMPTS)
    by_prompt = [{text for p, text in answers if p == prompt} for prompt in range(3)]
    assert (texts.differing == 0) == all(len(group) <= 1 for group in by_prompt)
    assert 0 <= texts.differing <= max(0, texts.compared - 1)
    assert (texts.first_difference() is None) == (texts.differing == 0)
    parted = texts.first_difference()
    if parted is not None:
        assert parted["own"] != parted["other"]


def test_a_text_that_is_the_beginning_of_another_differs() -> None:
    texts = Texts()
    texts.add([said(0, "x" * 100), said(0, "x" * 100 + "y")], PROMPTS)
    first = texts.first_difference()
    assert first is not None
    assert first["at"] == 100
    assert {first["own"][-1], first["other"][-1]} == {"x", "y"}


# --- prompts --------------------------------------------------------------------------------------


def made(endpoint: Any, tokens: int | None, count: int = 3) -> list[Prompt]:
    async def run(url: str) -> list[Prompt]:
        async with Client(url, Asking(endpoint=endpoint)) as client:
            return await make_prompts(client, count, 40, seed=1)

    with Mock(tokens=tokens) as mock:
        return asyncio.run(run(mock.url))


def test_made_up_prompts_have_the_length_that_is_asked_for() -> None:
    ids = made("completions", 3)
    assert [prompt.kind for prompt in ids] == ["ids"] * 3
    assert [len(prompt.value) for prompt in ids] == [40] * 3
    chats = made("chat", 2)
    assert [len(prompt.value.split()) for prompt in chats] == [20] * 3
    for endpoint in ("chat", "completions"):
        texts = made(endpoint, None)
        assert [len(prompt.value.split()) for prompt in texts] == [40] * 3
        assert len({prompt.value.split()[0] for prompt in texts}) == 3


def test_a_text_depends_on_its_number_and_seed_alone() -> None:
    assert make_text(2, 30, 0) == make_text(2, 30, 0)
    assert make_text(2, 30, 0) != make_text(2, 30, 1)
    assert make_text(2, 30, 0)[2:] != make_text(3, 30, 0)[2:]
    assert len(make_text(0, 1, 0).split()) >= 1


def test_a_file_of_prompts(tmp_path: Path) -> None:
    path = tmp_path / "prompts"
    path.write_text("first line\r\n\n  second {line}\n", "utf-8")
    assert read_prompts(path) == [Prompt("text", "first line"), Prompt("text", "  second {line}")]
    messages = [{"role": "user", "content": "hi"}]
    records = [{"prompt": "a"}, {"prompt": [1, 2], "id": 7}, {"messages": messages}]
    path.write_text("\n".join(map(json.dumps, records)), "utf-8")
    prompts = read_prompts(path)
    assert prompts == [("text", "a"), ("ids", [1, 2]), ("messages", messages)]
    require_taken(prompts[:1], "chat")
    with pytest.raises(BadInput, match="prompt 2 has token ids: use --endpoint completions"):
        require_taken(prompts, "chat")
    with pytest.raises(BadInput, match="prompt 3 has messages: use --endpoint chat"):
        require_taken(prompts, "completions")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no prompt"),
        ('{"prompt": "a"}\n{oops', "line 2: is no JSON"),
        ('{"text": "a"}', "line 1: needs either 'prompt' or 'messages'"),
        ('{"prompt": "a", "messages": []}', "needs either"),
        ('{"prompt": ""}', "text or a list of token ids"),
        ('{"prompt": [1, "a"]}', "text or a list of token ids"),
        ('{"messages": "hello"}', "list of objects"),
        ('{"prompt": "a"}\n[1]', "line 2: needs either"),
    ],
)
def test_a_file_that_holds_no_prompts(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts"
    path.write_text(text, "utf-8")
    with pytest.raises(BadInput, match=said):
        read_prompts(path)
    with pytest.raises(BadInput, match="cannot be read"):
        read_prompts(tmp_path / "none")
