"""How much room there is, who goes first, and whose prefixes are whose."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.serving.asking import chat, complete, events, post
from tests.serving.support import TestServer, make_engine, make_model, make_tokenizer, running
from ziphius.kernels.select import Kernels
from ziphius.model.transformer import Transformer

ROOM = 256 + 1  # of the cache, which never holds the last token


@pytest.fixture(scope="module")
def small(fast: Kernels) -> Iterator[TestServer]:
    """A server whose cache is smaller than its model's context."""
    tokenizer, model = make_tokenizer(), make_model(fast)
    with running(
        lambda: make_engine(model, tokenizer, cache_tokens=256), tokenizer=tokenizer
    ) as started:
        yield started
        started.until_idle()


def test_the_room_that_is_told_is_the_room_there_is(small: TestServer) -> None:
    with small.client() as client:
        card = client.get("/v1/models").json()["data"][0]
    assert card["max_model_len"] == ROOM
    answer = complete(small, prompt=[0] * (ROOM - 1), max_tokens=5)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == ROOM


@pytest.mark.parametrize("beyond", [0, 1, 200])
def test_a_prompt_beyond_it(small: TestServer, beyond: int) -> None:
    error = complete(small, 400, prompt=[0] * (ROOM + beyond), max_tokens=1)["error"]
    assert error["code"] == "context_length_exceeded"
    assert str(ROOM) in error["message"]


def test_an_answer_is_as_long_as_there_is_room(small: TestServer) -> None:
    """Clients ask for more tokens than there are; the answer ends where it must."""
    for most in (10_000, None):
        answer = chat(small, max_completion_tokens=most)
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["total_tokens"] == ROOM


@pytest.mark.parametrize(("keep", "kept"), [(3, 3), (-1, ROOM - 1), (10_000, None)])
def test_the_last_tokens_of_a_prompt(small: TestServer, keep: int, kept: int | None) -> None:
    ids = [0, *range(5, 5 + 299)]
    status = 200 if kept is not None else 400
    answer = complete(
        small, status, prompt=ids, truncate_prompt_tokens=keep, max_tokens=1, return_token_ids=True
    )
    if kept is not None:
        assert answer["choices"][0]["prompt_token_ids"] == ids[-kept:]


def test_no_token_cannot_be_kept(small: TestServer) -> None:
    error = complete(small, 400, prompt="a", truncate_prompt_tokens=0)["error"]
    assert "truncate_prompt_tokens" in error["message"]


def test_a_prompt_without_its_first_token(server: TestServer) -> None:
    asked = {"prompt": "a whale", "max_tokens": 1, "return_token_ids": True}
    plain, bare = (
        complete(server, **asked, add_special_tokens=special)["choices"][0]["prompt_token_ids"]
        for special in (True, False)
    )
    assert plain == [0, *bare]


# --- who goes first -------------------------------------------------------------------------------


def test_nobody_goes_first_unless_the_operator_lets_them(server: TestServer) -> None:
    error = complete(server, 400, prompt="a whale", priority=-1)["error"]
    assert "priority" in error["message"]
    assert complete(server, prompt="a whale", priority=0, max_tokens=1)


def test_the_lower_priority_is_the_sooner(whale: Transformer) -> None:
    """As in vLLM, whose field it is."""
    seen: list[int] = []

    def watched() -> Any:
        engine = make_engine(whale)
        inner = engine.add

        def add(*given: Any, priority: int = 0, **named: Any) -> Any:
            seen.append(priority)
            return inner(*given, priority=priority, **named)

        engine.add = add  # type: ignore[method-assign]
        return engine

    with running(watched, priorities=True) as started:
        for priority in (-5, 0, 5):
            complete(started, prompt="a whale", priority=priority, max_tokens=1)
    assert seen == sorted(seen, reverse=True)
    assert seen[0] > 0 > seen[-1]  # the scheduler takes the highest first


# --- prefixes -------------------------------------------------------------------------------------


def cached(started: TestServer, key: str, **body: Any) -> int:
    """Return how much of a prompt was found in the cache."""
    given = {"prompt": [0, *range(5, 5 + 100)], "max_tokens": 1, "temperature": 0, **body}
    with started.client(headers={"authorization": f"Bearer {key}"}) as client:
        usage = client.post("/v1/completions", json=given).json()["usage"]
    return int(usage["prompt_tokens_details"]["cached_tokens"])


def test_keys_do_not_find_what_others_have_sent(whale: Transformer) -> None:
    """Else the count, and the time, would tell one what another has asked."""
    keys = ("first-key", "second-key")
    with running(lambda: make_engine(whale), api_keys=keys) as started:
        assert cached(started, keys[0]) == 0
        assert cached(started, keys[1]) == 0
        assert cached(started, keys[0]) > 0
        assert cached(started, keys[1]) > 0
        assert cached(started, keys[1], cache_salt="a") == 0


def test_without_keys_all_share(server: TestServer) -> None:
    salt = {"cache_salt": "of this test"}
    assert cached(server, "any", **salt) == 0
    assert cached(server, "other", **salt) > 0


# --- the prompt in the answer ---------------------------------------------------------------------


def test_a_stream_tells_the_prompts_tokens_once(server: TestServer) -> None:
    body = {"max_tokens": 5, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    chunks = list(events(server, "/v1/completions", prompt="a whale", n=2, **body))
    told = [c for chunk in chunks for c in chunk["choices"] if "prompt_token_ids" in c]
    assert sorted(choice["index"] for choice in told) == [0, 1]
    messages = [{"role": "user", "content": "a whale"}]
    chunks = list(events(server, "/v1/chat/completions", messages=messages, **body))
    assert [("prompt_token_ids" in chunk) for chunk in chunks] == [True] + [False] * (
        len(chunks) - 1
    )


def test_logprobs_of_a_prompt_cannot_be_streamed(server: TestServer) -> None:
    """They are known at the end; a stream that left them out would have cost them for nothing."""
    for path, asked in (
        ("/v1/completions", {"prompt": "a whale"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a whale"}]}),
    ):
        error = post(server, path, 400, **asked, stream=True, prompt_logprobs=1)["error"]
        assert "prompt_logprobs" in error["message"]


def test_both_kinds_of_prompt_logprobs_have_what_they_ask_for(server: TestServer) -> None:
    answer = complete(
        server, prompt="a whale", max_tokens=1, echo=True, logprobs=1, prompt_logprobs=5
    )
    (choice,) = answer["choices"]
    assert all(len(entry) in (5, 6) for entry in choice["prompt_logprobs"][1:])
    assert all(len(top) in (1, 2) for top in choice["logprobs"]["top_logprobs"][1:])
