"""``anthropic``: messages, whole and streamed, tools, thinking, errors and retries."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import anthropic
from anthropic import Anthropic, AsyncAnthropic

from tests.clients.checks.case import Case, Check, events, run

HELLO: Any = [{"role": "user", "content": "a whale dives"}]
# The client has no field for the temperature any more; the route has.
GREEDY: Any = {"max_tokens": 16, "extra_body": {"ignore_eos": True, "temperature": 0}}
SEEDED: Any = {"max_tokens": 16, "extra_body": {"ignore_eos": True, "temperature": 1, "seed": 7}}
DIVE: Any = {
    "name": "dive",
    "description": "Go down.",
    "input_schema": {
        "type": "object",
        "properties": {"deep": {"type": "boolean"}, "who": {"enum": ["whale", "squid"]}},
        "required": ["deep", "who"],
        "additionalProperties": False,
        # The model writes noise: blanks, where it may, without end.
        "x-guidance": {"whitespace_flexible": False},
    },
}

CHECKS: list[Check] = []


def check(function: Check) -> Check:
    """Add a check to the list."""
    CHECKS.append(function)
    return function


def client_of(case: Case, **options: Any) -> Anthropic:
    """Return a client of the server that takes any key."""
    given = {"api_key": "anything", "timeout": 60, "max_retries": 0, **options}
    return Anthropic(base_url=case.url, **given)


def strict_client(case: Case, **options: Any) -> Anthropic:
    """Return a client of the server that wants a key."""
    given = {"api_key": case.keys[0], "timeout": 60, "max_retries": 0, **options}
    return Anthropic(base_url=case.strict_url, **given)


def ask(case: Case, client: Anthropic, **more: Any) -> Any:
    """Answer the one conversation."""
    return client.messages.create(**{"model": case.model, "messages": HELLO, **more})


def raises(kind: type[Exception], call: Callable[[], Any]) -> Any:
    """Return the error that a call raises, which must be just of this kind."""
    try:
        call()
    except anthropic.AnthropicError as raised:
        error = raised
    else:
        raise AssertionError(f"no {kind.__name__}")
    assert type(error) is kind, f"{type(error).__name__} instead of {kind.__name__}: {error}"
    return error


@check
def a_message(case: Case) -> None:
    message = ask(case, client_of(case), **GREEDY)
    assert message.type == "message"
    assert message.role == "assistant"
    assert message.model == case.model
    (block,) = message.content
    assert block.type == "text"
    assert block.text
    assert message.stop_reason == "max_tokens"
    assert message.usage.output_tokens == 16
    assert message.usage.input_tokens + message.usage.cache_read_input_tokens > 0


@check
def a_system_prompt_and_blocks(case: Case) -> None:
    client = client_of(case)
    plain = client.messages.count_tokens(model=case.model, messages=HELLO).input_tokens
    blocks: Any = [{"role": "user", "content": [{"type": "text", "text": "a whale dives"}]}]
    assert client.messages.count_tokens(model=case.model, messages=blocks).input_tokens == plain
    told = client.messages.count_tokens(model=case.model, messages=HELLO, system="be brief")
    assert told.input_tokens > plain
    used = ask(case, client, **GREEDY).usage
    assert used.input_tokens + used.cache_read_input_tokens == plain


@check
def a_stream_is_the_whole_message(case: Case) -> None:
    client = client_of(case)
    for how in (GREEDY, SEEDED):
        whole = ask(case, client, **how)
        with client.messages.stream(model=case.model, messages=HELLO, **how) as stream:
            text = "".join(stream.text_stream)
            final = stream.get_final_message()
        assert text == whole.content[0].text
        assert final.content[0].text == text  # type: ignore[union-attr]
        assert final.stop_reason == whole.stop_reason == "max_tokens"
        assert final.usage.output_tokens == 16


@check
def asynchronous_messages(case: Case) -> None:
    alone = ask(case, client_of(case), **GREEDY).content[0].text

    async def one(client: AsyncAnthropic) -> str:
        answer = await client.messages.create(model=case.model, messages=HELLO, **GREEDY)
        return answer.content[0].text  # type: ignore[union-attr]

    async def several() -> list[str]:
        async with AsyncAnthropic(base_url=case.url, api_key="x", max_retries=0) as client:
            return await asyncio.gather(*(one(client) for _ in range(4)))

    assert asyncio.run(several()) == [alone] * 4


@check
def events_to_the_letter(case: Case) -> None:
    body = {
        "model": case.model, "messages": HELLO, "max_tokens": 8, "temperature": 0,
        "ignore_eos": True, "stream": True,
    }  # fmt: skip
    found = [(name, json.loads(data)) for name, data in events(case.post("/v1/messages", body))]
    assert all(name == data["type"] for name, data in found)
    names = [name for name, _ in found if name != "ping"]
    assert names[:2] == ["message_start", "content_block_start"]
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(names[2:-3]) == {"content_block_delta"}
    assert found[0][1]["message"]["stop_reason"] is None
    assert found[-2][1]["delta"]["stop_reason"] == "max_tokens"


@check
def a_demanded_call(case: Case) -> None:
    client = client_of(case)
    for choice in ({"type": "any"}, {"type": "tool", "name": "dive"}):
        choice = {**choice, "disable_parallel_tool_use": True}
        how: Any = {"tools": [DIVE], "tool_choice": choice, "max_tokens": 100}
        how["extra_body"] = {"temperature": 0}
        message = ask(case, client, **how)
        assert message.stop_reason == "tool_use"
        (call,) = message.content
        assert call.type == "tool_use"
        assert call.name == "dive"
        assert set(call.input) == {"deep", "who"}
        with client.messages.stream(model=case.model, messages=HELLO, **how) as stream:
            final = stream.get_final_message()
        assert final.content[0].input == call.input  # type: ignore[union-attr]
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "it went down"}
        back: Any = [
            *HELLO,
            {"role": "assistant", "content": [call.model_dump()]},
            {"role": "user", "content": [result]},
        ]
        assert ask(case, client, messages=back, tools=[DIVE], max_tokens=4).content


@check
def thinking_is_a_block_of_its_own(case: Case) -> None:
    client = strict_client(case)
    how: Any = {**GREEDY, "thinking": {"type": "enabled", "budget_tokens": 1024}}
    (block,) = ask(case, client, **how).content
    assert block.type == "thinking"
    assert block.thinking
    with client.messages.stream(model=case.model, messages=HELLO, **how) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_message()
    assert final.content[0].thinking == block.thinking  # type: ignore[union-attr]
    assert "thinking" in kinds


@check
def stop_sequences_end_a_message(case: Case) -> None:
    client = client_of(case)
    for seed in range(50):
        how: Any = {"max_tokens": 32}
        how["extra_body"] = {"ignore_eos": True, "temperature": 1, "seed": seed}
        text = ask(case, client, **how).content[0].text
        found = [text[at : at + 2] for at in range(3, len(text) - 2)]
        stop = next((one for one in found if one.isascii() and one.isalpha()), None)
        if stop is not None:
            break
    assert stop is not None
    message = ask(case, client, stop_sequences=[stop], **how)
    assert message.stop_reason == "stop_sequence"
    assert message.stop_sequence == stop
    assert message.content[0].text.rstrip() == text[: text.index(stop)].rstrip()


@check
def errors_have_their_classes(case: Case) -> None:
    client = client_of(case)
    wrong: list[dict[str, Any]] = [
        {"max_tokens": 0}, {"extra_body": {"temperature": 5}}, {"messages": []},
        {"messages": [{"role": "nobody", "content": "x"}]},
    ]  # fmt: skip
    for given in wrong:
        error = raises(
            anthropic.BadRequestError,
            lambda given=given: ask(case, client, **{"max_tokens": 4, **given}),
        )
        assert error.body["type"] == "error"
        assert error.body["error"]["type"] == "invalid_request_error"
    raises(anthropic.NotFoundError, lambda: ask(case, client, model="another", max_tokens=4))
    stranger = strict_client(case, api_key="not-one-of-the-keys")
    raises(anthropic.AuthenticationError, lambda: ask(case, stranger, max_tokens=4))
    assert ask(case, strict_client(case), max_tokens=4).content
    bearer = Anthropic(base_url=case.strict_url, auth_token=case.keys[0], max_retries=0)
    assert ask(case, bearer, max_tokens=4).content


if __name__ == "__main__":
    raise SystemExit(run(CHECKS, "anthropic"))
