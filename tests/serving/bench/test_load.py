"""One request against a server that behaves, and against one that misbehaves in each way."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from email.utils import formatdate
from typing import Any, TypeVar

import pytest

from tests.serving.bench.mock import (
    DONE,
    WORDS,
    Asked,
    Behaviour,
    Mock,
    Reply,
    chunk,
    event,
    failure,
    good,
    usage,
)
from ziphius.config.errors import BadInput, ZiphiusError
from ziphius.serving.bench.load import DIALECTS, Asking, Client, base_url, retry_after
from ziphius.serving.bench.outcome import Outcome
from ziphius.serving.bench.prompts import Prompt

Result = TypeVar("Result")
PROMPT = Prompt("text", "Do whales sing?")
END = chunk("", finish="stop")
TAIL = END + event({"choices": [], **usage(1)}) + DONE


def with_client(
    url: str, use: Callable[[Client], Awaitable[Result]], key: str | None = None, **options: Any
) -> Result:
    async def run() -> Result:
        async with Client(url, Asking(**options), key) as client:
            return await use(client)

    return asyncio.run(run())


def ask(behave: Behaviour, prompt: Prompt = PROMPT, **options: Any) -> tuple[Outcome, Mock]:
    """Ask a server that answers as ``behave`` says; return what became of it."""
    with Mock(behave) as mock:
        return with_client(mock.url, lambda client: client.ask(4, prompt), **options), mock


# --- in order -------------------------------------------------------------------------------------


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_an_answer_is_measured(endpoint: str) -> None:
    gap = 0.05
    outcome, mock = ask(lambda a: good(chat=endpoint == "chat", gap=gap), endpoint=endpoint)
    assert outcome.fault is None
    assert outcome.text == "all whales dive deep and long "
    assert (outcome.prompt, outcome.output_tokens, outcome.prompt_tokens) == (4, len(WORDS), 5)
    assert outcome.first is not None
    assert gap <= outcome.first < outcome.seconds
    assert outcome.seconds >= gap * len(WORDS)
    assert outcome.per_token == pytest.approx(gap, rel=0.5)
    assert mock.asked[0].path.endswith(
        endpoint if endpoint == "completions" else "chat/completions"
    )


def test_what_is_sent() -> None:
    asking = {"model": "m", "output_tokens": 9, "temperature": 0.5, "ignore_eos": True}
    _, mock = ask(lambda a: good(), extra={"top_k": 3}, **asking)
    asked = mock.asked[0]
    assert asked.body == {
        "model": "m", "messages": [{"role": "user", "content": PROMPT.value}], "max_tokens": 9,
        "temperature": 0.5, "ignore_eos": True, "top_k": 3, "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }  # fmt: skip
    assert "authorization" not in asked.headers
    messages = [{"role": "system", "content": "Sing."}, {"role": "user", "content": "Go"}]
    _, mock = ask(lambda a: good(), Prompt("messages", messages))
    assert mock.asked[0].body["messages"] == messages
    _, mock = ask(lambda a: good(chat=False), Prompt("ids", [3, 1]), endpoint="completions")
    assert mock.asked[0].body["prompt"] == [3, 1]


def test_a_cold_request_has_a_salt_of_its_own() -> None:
    async def twice(client: Client) -> None:
        await client.ask(0, PROMPT)
        await client.ask(0, PROMPT)

    with Mock() as mock:
        with_client(mock.url, twice, cold=True)
    salts = [asked.body["cache_salt"] for asked in mock.asked]
    assert len(set(salts)) == 2


def test_the_time_of_a_request_that_was_due_counts_from_then() -> None:
    async def late(client: Client) -> Outcome:
        return await client.ask(0, PROMPT, due=time.monotonic() - 5)

    with Mock() as mock:
        outcome = with_client(mock.url, late)
    assert outcome.late == pytest.approx(5, abs=0.5)
    assert outcome.first is not None
    assert outcome.first > 5
    assert outcome.seconds > 5


# --- misbehaviour ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "kind", "said"),
    [
        (Reply([chunk("a"), DONE]), "truncated", "no finish_reason"),
        (Reply([chunk("a"), END]), "truncated", "no [DONE]"),
        (Reply([]), "truncated", "after 0 chunks"),
        (Reply([END, DONE]), "empty", "no text"),
        (Reply([chunk("a"), chunk("b")], end="cut"), "cut off", "broke off after 2 chunks"),
        (Reply([], end="cut"), "connection", "broke off"),
        (Reply([chunk("a"), b"data: {{\n\n", TAIL]), "malformed", "no JSON"),
        (Reply([chunk("a"), event({"error": {"message": "engine died"}})]), "error", "engine died"),
        (Reply([chunk("a"), chunk("", finish="error"), DONE]), "aborted", "'error'"),
        (Reply([chunk("a")] * 3 + [TAIL]), "usage", "3 chunks had text"),
        (Reply([b"{}"], headers={"Content-Type": "application/json"}), "malformed", "json: {}"),
        (failure(500, "Traceback\nline"), "http 500", "Traceback line"),
        (failure(404, "no such model"), "http 404", "no such model"),
        (Reply([], 307, {"Location": "/elsewhere"}), "http 307", "nothing"),
        (failure(429, "full"), "refused", "429: full"),
        (failure(503, "full", Retry_After="7"), "refused", "503: full"),
    ],
)
def test_each_failure_has_its_kind(reply: Reply, kind: str, said: str) -> None:
    outcome, _ = ask(lambda a: reply)
    assert outcome.fault is not None
    assert outcome.fault.kind == kind
    assert said in outcome.fault.message
    assert not outcome.answered
    assert outcome.refused == (kind == "refused")


@pytest.mark.parametrize("pieces", [[], [chunk("a"), chunk("b")]])
def test_a_request_that_hangs_times_out(pieces: list[bytes]) -> None:
    outcome, _ = ask(lambda a: Reply(pieces, end="hang"), timeout=0.3)
    assert outcome.fault is not None
    assert outcome.fault.kind == "timeout"
    assert outcome.fault.message == f"no end after 0.3 s and {len(pieces)} chunks"
    assert 0.3 <= outcome.seconds < 5


def test_a_server_that_is_gone_is_a_failure_of_the_request() -> None:
    with Mock() as mock:
        url = mock.url
    outcome = with_client(url, lambda client: client.ask(0, PROMPT))
    assert outcome.fault is not None
    assert outcome.fault == ("connection", "connection refused")


# --- refusals -------------------------------------------------------------------------------------


def refusing(times: int, **headers: str) -> Behaviour:
    return lambda a: failure(429, "full", **headers) if a.number < times else good()


def test_a_refused_request_comes_again_when_it_is_told_to() -> None:
    outcome, mock = ask(refusing(2, Retry_After="0.2"), retry=True)
    assert outcome.fault is None
    assert (outcome.refusals, outcome.hints, len(mock.asked)) == (2, 2, 3)
    assert outcome.first is not None
    assert 0.4 <= outcome.first < 1.0, "waiting is part of the time to the first token"


def test_without_retry_a_refusal_is_the_end() -> None:
    outcome, mock = ask(refusing(1, Retry_After="0.1"))
    assert outcome.refused
    assert (outcome.refusals, outcome.hints, len(mock.asked)) == (1, 1, 1)


def test_refused_until_the_time_is_up_is_refused_and_not_late() -> None:
    outcome, _ = ask(refusing(99, Retry_After="0.2"), retry=True, timeout=0.5)
    assert outcome.refused
    assert outcome.fault is not None
    assert "times in 0.5 s" in outcome.fault.message
    assert outcome.refusals >= 2


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"Retry-After": "3"}, 3.0),
        ({"Retry-After": "0.25"}, 0.25),
        ({"retry-after-ms": "1500", "Retry-After": "9"}, 1.5),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": formatdate(time.time() - 99, usegmt=True)}, 0.0),
    ],
)
def test_retry_after_is_read(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after(headers) == seconds


def test_retry_after_may_be_a_date() -> None:
    date = formatdate(time.time() + 60, usegmt=True)
    assert retry_after({"Retry-After": date}) == pytest.approx(60, abs=2)


# --- meeting a server -----------------------------------------------------------------------------


def meet(mock: Mock, **options: Any) -> Client:
    async def met(client: Client) -> Client:
        await client.meet()
        return client

    return with_client(mock.url, met, **options)


def test_the_first_model_is_asked_unless_one_is_named() -> None:
    with Mock(models=("deep", "deeper")) as mock:
        client = meet(mock)
        assert client.model == "deep"
        assert client.server == {
            "url": mock.url, "model": "deep", "software": None, "max_model_len": 99,
        }  # fmt: skip
        assert meet(mock, model="deeper").model == "deeper"
        with pytest.raises(BadInput, match="no model 'x': it has deep, deeper"):
            meet(mock, model="x")
    with Mock(models=()) as mock, pytest.raises(BadInput, match="name one with --model"):
        meet(mock)


def test_a_key_is_sent_and_its_want_is_told() -> None:
    with Mock(key="secret") as mock:
        assert meet(mock, key="secret").model == "mock"
        with pytest.raises(BadInput, match=r"401: who are you\?: give its key with --api-key"):
            meet(mock)


def test_no_server_is_told_with_what_to_do() -> None:
    with Mock() as mock:
        pass
    with pytest.raises(
        ZiphiusError, match="connection refused: start a server with 'ziphius serve"
    ):
        meet(mock)


def learn(behave: Behaviour) -> tuple[Client, Mock]:
    async def learned(client: Client) -> Client:
        await client.learn_dialect(PROMPT)
        return client

    with Mock(behave) as mock:
        return with_client(mock.url, learned), mock


def test_a_server_is_asked_as_it_wants_to_be() -> None:
    def strict(asked: Asked) -> Reply:
        return failure(400) if "continuous_usage_stats" in asked.body["stream_options"] else good()

    def stricter(asked: Asked) -> Reply:
        return failure(400) if "max_tokens" in asked.body else good()

    for behave, place in ((lambda a: good(), 0), (strict, 1), (stricter, 2)):
        client, mock = learn(behave)
        assert client.dialect == DIALECTS[place]
        assert len(mock.asked) == place + 1


def test_a_server_that_refuses_every_form_is_told_and_a_broken_one_is_measured() -> None:
    with pytest.raises(ZiphiusError, match="refuses what it is asked: 400: too long"):
        learn(lambda a: failure(400, "too long"))
    client, _ = learn(lambda a: failure(500))
    assert client.dialect == DIALECTS[0]


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://h:1", "http://h:1"),
        ("http://h:1/", "http://h:1"),
        ("http://h:1/v1", "http://h:1"),
        ("https://h/p/v1/", "https://h/p"),
        ("h:1", "http://h:1"),
    ],
)
def test_an_address_has_many_spellings(url: str, base: str) -> None:
    assert base_url(url) == base


@pytest.mark.parametrize("url", ["", "http://", "ftp://h", "file:///x"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(BadInput, match="give http://HOST:PORT"):
        base_url(url)
