"""What a request of ``/v1/messages`` stands for: the fields of a chat."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any

import pytest
from fastapi.exceptions import RequestValidationError
from hypothesis import given
from hypothesis import strategies as st

from ziphius.config.errors import BadInput
from ziphius.serving.api.messages_in import CountFields, MessageFields, as_messages

HELLO: list[Any] = [{"role": "user", "content": "hi"}]


def text(said: str) -> dict[str, Any]:
    return {"type": "text", "text": said}


def use(call_id: str, name: str, **given: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": call_id, "name": name, "input": given}


def done(call_id: str, content: Any = "wet", **more: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": call_id, "content": content, **more}


def asked(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def result(call_id: str, said: str = "wet") -> dict[str, Any]:
    return {"role": "tool", "content": said, "tool_call_id": call_id}


def test_blocks_are_messages() -> None:
    assert as_messages(
        [
            {"role": "user", "content": [text("one"), text("two")]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "t", "signature": ""},
                    {"type": "redacted_thinking", "data": "x"},
                    text("x"), use("a", "dive", metres=3), use("b", "rise"),
                ],
            },
            {
                "role": "user",
                "content": [
                    text("go on"),
                    done("b", [text("dry"), text("warm")], is_error=True), done("a"),
                ],
            },
            {"role": "assistant", "content": "bye"},
            {"role": "user", "content": []},
        ]
    ) == [
        {"role": "user", "content": "one\n\ntwo"},
        {
            "role": "assistant", "content": "x", "reasoning_content": "t",
            "tool_calls": [asked("a", "dive", '{"metres": 3}'), asked("b", "rise", "{}")],
        },
        result("a"), result("b", "Error: dry\n\nwarm"),
        {"role": "user", "content": "go on"},
        {"role": "assistant", "content": "bye"},
        {"role": "user", "content": ""},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "assistant", "content": [use("a", "dive")]}], "the call 'a' has no result"),
        ([{"role": "user", "content": [done("a")]}], "no call of that id"),
        (
            [
                {"role": "assistant", "content": [use("a", "dive")]},
                {"role": "user", "content": [done("a"), done("b")]},
            ],
            "no such call",
        ),
        ([{"role": "user", "content": 3}], "messages[0].content: give"),
        ([{"role": "user", "content": [3]}], "messages[0].content: give"),
        ([{"role": "assistant", "content": [{**use("a", "b"), "input": "x"}]}], "[0].input"),
        ([{"role": "assistant", "content": [{"type": "text"}]}], "content[0].text"),
    ],
)
def test_messages_that_cannot_be_read(messages: list[Any], message: str) -> None:
    with pytest.raises(BadInput, match=re.escape(message)):
        as_messages(messages)


@pytest.mark.parametrize(
    ("choice", "chats", "parallel"),
    [
        ({"type": "auto"}, "auto", None),
        ({"type": "any", "disable_parallel_tool_use": True}, "required", False),
        ({"type": "none"}, "none", None),
        (
            {"type": "tool", "name": "dive"},
            {"type": "function", "function": {"name": "dive"}},
            None,
        ),
    ],
)
def test_choices_of_tools(choice: Any, chats: Any, parallel: bool | None) -> None:
    chat = CountFields(messages=HELLO, tool_choice=choice).as_conversation()
    assert (chat.tool_choice, chat.parallel_tool_calls) == (chats, parallel)


def test_fields_become_those_of_a_chat() -> None:
    schema = {"type": "object"}
    fields = MessageFields(
        messages=HELLO, max_tokens=7, top_k=5, stop_sequences=["x"], system=[text("a"), text("b")],
        tools=[{"name": "dive", "description": "Go.", "input_schema": schema, "strict": True}],
        output_config={"format": {"type": "json_schema", "schema": schema}},
    )  # fmt: skip
    chat = fields.as_conversation()
    assert chat.messages == [{"role": "system", "content": "a\n\nb"}, *HELLO]
    assert (chat.max_tokens, chat.top_k, chat.stop) == (7, 5, ["x"])
    assert chat.continue_final_message is None
    function = {"name": "dive", "description": "Go.", "parameters": schema, "strict": True}
    assert chat.tools == [{"type": "function", "function": function}]
    assert chat.response_format == {
        "type": "json_schema", "json_schema": {"name": "answer", "schema": schema},
    }  # fmt: skip


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
BLOCK = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "thinking", "tool_use", "tool_result", "custom"]) | JUNK},
    optional={
        name: st.sampled_from(["1", "2"]) | JUNK
        for name in (
            "text",
            "thinking",
            "id",
            "name",
            "input",
            "tool_use_id",
            "content",
            "is_error",
        )
    },
)
BLOCKS = st.lists(BLOCK, max_size=3)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant"]) | JUNK, "content": BLOCKS | JUNK}
)


@given(messages=st.lists(MESSAGE, min_size=1, max_size=4), system=BLOCKS, tools=BLOCKS)
def test_junk_is_refused_and_breaks_nothing(
    messages: list[Any], system: list[Any], tools: list[Any]
) -> None:
    fields = MessageFields(messages=messages, system=system, tools=tools, max_tokens=1)
    with suppress(BadInput, RequestValidationError):
        fields.as_conversation()
