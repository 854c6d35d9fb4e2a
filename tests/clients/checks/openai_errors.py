"""Errors by class, retries, and what a full server says."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import openai
from openai import OpenAI

from tests.clients.checks.case import Case, Check
from tests.clients.checks.openai_base import (
    GREEDY,
    HELLO,
    LONG,
    chat,
    client_of,
    collector,
    raises,
    strict_client,
)

CHECKS: list[Check] = []
check = collector(CHECKS)


# --- errors ---------------------------------------------------------------------------------------


@check
def what_is_wrong_with_a_request_is_told(case: Case) -> None:
    client = client_of(case)
    wrong: list[dict[str, Any]] = [
        {"temperature": 3}, {"temperature": "hot"}, {"n": 0}, {"messages": []}, {"top_p": 0},
        {"messages": [{"role": "nobody", "content": "x"}]}, {"messages": "hello"},
        {"logit_bias": {"1000000000": 1}}, {"max_tokens": 0}, {"stop": 3}, {"top_logprobs": 2},
        # What no number of the model's can be multiplied by, or be added to.
        {"logit_bias": {"5": 1e308}}, {"extra_body": {"repetition_penalty": 5e-324}},
    ]  # fmt: skip
    for given in wrong:
        error = raises(openai.BadRequestError, lambda given=given: chat(client, **given))
        assert error.status_code == 400
        assert error.type == "invalid_request_error"
        assert error.code, f"{given}: no code"
        assert error.body["message"]
        assert error.request_id == error.response.headers["x-request-id"]
        assert "Traceback" not in error.response.text
    assert raises(openai.BadRequestError, lambda: chat(client, n=0)).param == "n"


@check
def a_prompt_beyond_the_context_is_told(case: Case) -> None:
    client = client_of(case)
    long: Any = [{"role": "user", "content": "a whale and a squid. " * 2000}]
    for stream in (False, True):
        error = raises(
            openai.BadRequestError, lambda s=stream: chat(client, messages=long, stream=s)
        )
        assert error.code == "context_length_exceeded"


@check
def models_and_routes_that_are_none(case: Case) -> None:
    client = client_of(case)
    error = raises(openai.NotFoundError, lambda: chat(client, model="another"))
    assert (error.code, error.param) == ("model_not_found", "model")
    raises(openai.NotFoundError, lambda: client.post("/nowhere", cast_to=object, body={}))
    raises(openai.NotFoundError, lambda: client.files.list())


@check
def keys_open_the_server_that_wants_them(case: Case) -> None:
    assert chat(strict_client(case), **GREEDY).choices
    stranger = strict_client(case, api_key="not-one-of-the-keys")
    error = raises(openai.AuthenticationError, lambda: stranger.models.list())
    assert error.code == "invalid_api_key"
    raises(
        openai.AuthenticationError,
        lambda: stranger.chat.completions.create(model=case.model, messages=HELLO),
    )


def crowd(calls: list[Callable[[], Any]]) -> list[Any]:
    """Call all at once; return what each returned, or the error it raised."""
    found: list[Any] = [None] * len(calls)

    def call(place: int) -> None:
        try:
            found[place] = calls[place]()
        except Exception as error:
            found[place] = error

    threads = [threading.Thread(target=call, args=(place,)) for place in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return found


def _be_quick(client: OpenAI) -> None:
    """Let the server learn that answers are short: what it tells to wait follows from that."""
    for _ in range(35):
        chat(client, max_tokens=1)


@check
def a_full_server_is_tried_again(case: Case) -> None:
    """Four at a time, where there is room for three: the client's own retries get all through."""
    _be_quick(strict_client(case))
    how: Any = {**GREEDY, "max_tokens": LONG, "model": case.model}
    once = [strict_client(case, api_key=key) for key in case.keys * 2]
    results = crowd([lambda client=client: chat(client, **how) for client in once])
    refused = [one for one in results if isinstance(one, Exception)]
    assert refused, "four requests had room, which is for three"
    for error in refused:
        assert type(error) is openai.InternalServerError, repr(error)
        assert error.status_code == 503
        assert error.code == "server_full"
        assert 1 <= int(error.response.headers["retry-after"]) <= 60
    began = time.monotonic()
    patient = [strict_client(case, api_key=key, max_retries=20) for key in case.keys * 2]
    raw = [client.chat.completions.with_raw_response for client in patient]
    results = crowd([lambda one=one: one.create(messages=HELLO, **how) for one in raw])
    for one in results:
        assert not isinstance(one, Exception), repr(one)
        assert one.parse().usage.completion_tokens == LONG
    tries = [one.retries_taken for one in results]
    assert any(tries), "nobody was refused"
    waited = time.monotonic() - began
    assert waited >= 1, "Retry-After is at least a second"


@check
def a_client_with_too_many_requests_is_told(case: Case) -> None:
    client = strict_client(case)
    how: Any = {**GREEDY, "max_tokens": LONG, "model": case.model}
    results = crowd([lambda: chat(client, **how)] * 6)
    errors = [one for one in results if isinstance(one, Exception)]
    assert errors, "six requests of one key were open, where two may be"
    for error in errors:
        assert type(error) is openai.RateLimitError, repr(error)
        assert error.status_code == 429
        assert error.code == "too_many_requests"
        assert int(error.response.headers["retry-after"]) >= 1


@check
def an_error_in_a_stream_is_raised(case: Case) -> None:
    """The engine is started anew in the middle of an answer."""
    client = strict_client(case)
    chat(client, **GREEDY)
    how: Any = {**GREEDY, "max_tokens": LONG}

    def read() -> None:
        stream = chat(client, stream=True, **how)
        next(iter(stream))
        case.post("/admin/engine/restart", {}, strict=True, key=case.admin_key)
        for _ in stream:
            pass

    error = raises(openai.APIError, read)
    assert error.body["message"]
    assert error.body["code"] == "engine_unavailable"
    time.sleep(0.5)
    case.until_ready(strict=True)
    assert chat(client, **GREEDY).choices
