"""Calls of tools, and answers of a form."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

import openai
import pydantic

from tests.clients.checks.case import Case, Check
from tests.clients.checks.openai_base import (
    GREEDY,
    HELLO,
    chat,
    client_of,
    collector,
    gathered,
    raises,
)

CHECKS: list[Check] = []
check = collector(CHECKS)


# --- tools ----------------------------------------------------------------------------------------


# The model writes noise: blanks, where a grammar has room for them, without end.
PLAIN: Any = {"x-guidance": {"whitespace_flexible": False}}
DIVE: Any = {
    "type": "function",
    "function": {
        "name": "dive",
        "description": "Go down.",
        "parameters": {
            "type": "object",
            "properties": {"deep": {"type": "boolean"}, "who": {"enum": ["whale", "squid"]}},
            "required": ["deep", "who"],
            "additionalProperties": False,
            **PLAIN,
        },
    },
}
BREATHE: Any = {
    "type": "function",
    "function": {
        "name": "breathe",
        "parameters": {
            "type": "object",
            "properties": {"often": {"type": "boolean"}},
            "required": ["often"],
            "additionalProperties": False,
            **PLAIN,
        },
    },
}
CALLING: Any = {"tools": [DIVE, BREATHE], "max_tokens": 100, "temperature": 0}
ONE_CALL: Any = {**CALLING, "parallel_tool_calls": False}


def checked_call(call: Any, names: Sequence[str] = ("dive", "breathe")) -> None:
    """Hold a call to its tool's schema."""
    assert call.type == "function"
    assert call.id
    assert call.function.name in names
    arguments = json.loads(call.function.arguments)
    if call.function.name == "dive":
        assert set(arguments) == {"deep", "who"}
        assert arguments["who"] in ("whale", "squid")
        assert isinstance(arguments["deep"], bool)
    else:
        assert set(arguments) == {"often"}
        assert isinstance(arguments["often"], bool)


@check
def a_call_that_is_demanded(case: Case) -> None:
    client = client_of(case)
    for seed in range(3):
        how = {**ONE_CALL, "temperature": 1, "seed": seed, "tool_choice": "required"}
        (choice,) = chat(client, **how).choices
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        (call,) = choice.message.tool_calls
        checked_call(call)


@check
def a_call_of_a_named_tool(case: Case) -> None:
    client = client_of(case)
    for name in ("dive", "breathe"):
        named = {"type": "function", "function": {"name": name}}
        (choice,) = chat(client, tool_choice=named, **ONE_CALL).choices
        (call,) = choice.message.tool_calls
        checked_call(call, (name,))
    nobody = {"type": "function", "function": {"name": "nobody"}}
    raises(openai.BadRequestError, lambda: chat(client, tool_choice=nobody, **ONE_CALL))


@check
def tools_that_may_be_called(case: Case) -> None:
    client = client_of(case)
    for seed in range(4):
        how = {**CALLING, "temperature": 1, "seed": seed, "max_tokens": 30}
        for choice in ("auto", "none"):
            message = chat(client, tool_choice=choice, **how).choices[0].message
            # The model knows no tools: what it writes is text, without a mark of a call.
            assert message.tool_calls is None or choice == "auto"
            assert "tool▁call" not in (message.content or "")


@check
def a_streamed_call_is_put_together(case: Case) -> None:
    client = client_of(case)
    how = {**ONE_CALL, "tool_choice": "required"}
    whole = chat(client, **how).choices[0].message.tool_calls
    chunks = list(chat(client, stream=True, **how))
    deltas = [d for c in chunks for d in c.choices[0].delta.tool_calls or []]
    first, *later = deltas
    assert first.id
    assert first.type == "function"
    assert first.function.name == whole[0].function.name
    for delta in later:  # later pieces are of the arguments alone
        assert (delta.id, delta.type, delta.function.name) == (None, None, None)
    assert {delta.index for delta in deltas} == {0}
    arguments = "".join(delta.function.arguments or "" for delta in deltas)
    assert arguments == whole[0].function.arguments
    assert gathered(chunks)[2] == ["tool_calls"]
    # The client's own accumulator.
    with client.chat.completions.stream(model=case.model, messages=HELLO, **how) as stream:
        for _ in stream:
            pass
        message = stream.get_final_completion().choices[0].message
    (call,) = message.tool_calls or []
    assert call.function.name == whole[0].function.name
    assert call.function.arguments == arguments


@check
def the_answer_of_a_tool_goes_back(case: Case) -> None:
    client = client_of(case)
    (call,) = chat(client, tool_choice="required", **ONE_CALL).choices[0].message.tool_calls
    messages = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]},
        {"role": "tool", "tool_call_id": call.id, "content": "it went down"},
    ]
    answer = chat(client, messages=messages, **{**CALLING, "max_tokens": 8})
    assert answer.usage.prompt_tokens > chat(client, **GREEDY).usage.prompt_tokens


# --- answers of a form ----------------------------------------------------------------------------


class Sighting(pydantic.BaseModel):
    """What a model of noise can be made to say."""

    model_config = pydantic.ConfigDict(json_schema_extra=PLAIN)

    who: Literal["whale", "squid"]
    deep: bool
    metres: int = pydantic.Field(ge=0, le=99)


@check
def answers_are_parsed(case: Case) -> None:
    client = client_of(case)
    for seed in range(3):
        answer = client.chat.completions.parse(
            model=case.model, messages=HELLO, response_format=Sighting, max_tokens=100, seed=seed
        )
        (choice,) = answer.choices
        assert choice.finish_reason == "stop"
        assert isinstance(choice.message.parsed, Sighting)
        assert 0 <= choice.message.parsed.metres <= 99


@check
def streamed_answers_are_parsed(case: Case) -> None:
    client = client_of(case)
    with client.chat.completions.stream(
        model=case.model, messages=HELLO, response_format=Sighting, max_tokens=100, seed=1
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion().choices[0].message.parsed
    assert isinstance(final, Sighting)
    assert {"chunk", "content.delta", "content.done"} <= kinds


@check
def a_schema_binds_an_answer(case: Case) -> None:
    client = client_of(case)
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"],
              "additionalProperties": False, **PLAIN}  # fmt: skip
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    for seed in range(3):
        content = chat(client, response_format=wanted, max_tokens=60, seed=seed)
        assert json.loads(content.choices[0].message.content)["n"] in (1, 2)
    guided = {"guided_choice": ["whale", "squid"]}
    assert chat(client, max_tokens=20, extra_body=guided).choices[0].message.content in (
        "whale", "squid",
    )  # fmt: skip
    wrong = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "whale"}}}
    raises(openai.BadRequestError, lambda: chat(client, response_format=wrong))
    raises(openai.BadRequestError, lambda: chat(client, response_format={"type": "xml"}))
