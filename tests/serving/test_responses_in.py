"""What a request of ``/v1/responses`` stands for: the fields of a chat."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any

import pytest
from fastapi.exceptions import RequestValidationError
from hypothesis import given
from hypothesis import strategies as st

from ziphius.config.errors import BadInput
from ziphius.serving.api.responses_in import ResponseFields, as_messages, as_tools

TOOLS: list[Any] = [
    {"type": "function", "name": name, "parameters": {"type": "object"}, "strict": None}
    for name in ("dive", "rise")
]
CALL = {"type": "function_call", "call_id": "1", "name": "dive", "arguments": "{}"}
CALL_2 = {**CALL, "call_id": "2", "name": "rise"}


def done(call_id: str, output: Any = "wet") -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": call_id, "output": output}


def asked(call_id: str, name: str) -> dict[str, Any]:
    function = {"name": name, "arguments": "{}"}
    return {"id": call_id, "type": "function", "function": function}


def result(call_id: str, text: str = "wet") -> dict[str, Any]:
    return {"role": "tool", "content": text, "tool_call_id": call_id}


@pytest.mark.parametrize(
    ("items", "messages"),
    [
        (
            [{"role": "developer", "content": [{"type": "input_text", "text": "x"}]}],
            [{"role": "developer", "content": "x"}],
        ),
        (
            [
                {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "t"}]},
                {"role": "assistant", "content": [{"type": "output_text", "text": "a"}]},
                CALL, CALL_2, done("2", [{"type": "input_text", "text": "dry"}]), done("1"),
                {"role": "user", "content": "go on"},
            ],
            [
                {
                    "role": "assistant", "content": "a", "reasoning_content": "t",
                    "tool_calls": [asked("1", "dive"), asked("2", "rise")],
                },
                result("1"), result("2", "dry"),
                {"role": "user", "content": "go on"},
            ],
        ),
        (
            [CALL, done("1"), CALL_2, done("2")],
            [
                {"role": "assistant", "content": "", "tool_calls": [asked("1", "dive")]},
                result("1"),
                {"role": "assistant", "content": "", "tool_calls": [asked("2", "rise")]},
                result("2"),
            ],
        ),
        (  # Reasoning that came to nothing is nobody's.
            [{"type": "reasoning", "summary": [{"type": "summary_text", "text": "t"}]},
             {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"},
             {"role": "assistant", "content": "b"}],
            [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"},
             {"role": "assistant", "content": "b"}],
        ),
    ],
)  # fmt: skip
def test_items_are_messages(items: list[Any], messages: list[Any]) -> None:
    assert as_messages(items) == messages


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([{"type": "item_reference", "id": "x"}], "item itself"),
        ([{"type": "web_search_call"}], "can't be read"),
        ([{"role": "tool", "content": "x"}], "role = 'tool'"),
        ([{"role": "user"}], "input[0].content: give"),
        ([{"role": "user", "content": [{"type": "input_text"}]}], "input[0].content[0].text"),
        ([CALL], "the call '1' has no result"),
        ([done("1")], "no call of that id"),
        ([CALL, done("1"), done("2")], "no such call"),
        ([{**CALL, "arguments": {}}], "input[0].arguments"),
    ],
)
def test_items_that_cannot_be_read(items: list[Any], message: str) -> None:
    with pytest.raises(BadInput, match=re.escape(message)):
        as_messages(items)


def test_fields_become_those_of_a_chat() -> None:
    schema = {"type": "object"}
    fields = ResponseFields(
        input="hi", tools=TOOLS, max_output_tokens=7, parallel_tool_calls=False, seed=3, top_k=5,
        tool_choice={"type": "function", "name": "dive"},
        text={"format": {"type": "json_schema", "name": "s", "schema": schema, "strict": True}},
    )  # fmt: skip
    chat = fields.as_conversation(fields.items())
    assert chat.messages == [{"role": "user", "content": "hi"}]
    assert (chat.max_completion_tokens, chat.seed, chat.top_k) == (7, 3, 5)
    assert chat.parallel_tool_calls is False
    assert chat.tool_choice == {"type": "function", "function": {"name": "dive"}}
    assert chat.response_format == {
        "type": "json_schema", "json_schema": {"name": "s", "schema": schema, "strict": True},
    }  # fmt: skip
    assert chat.tools == as_tools(TOOLS)
    assert chat.tools[0] == {
        "type": "function", "function": {"name": "dive", "parameters": {"type": "object"}},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("effort", "thinks"), [("none", False), ("minimal", False), ("high", True)]
)
def test_effort_decides_whether_it_thinks(effort: Any, thinks: bool) -> None:
    fields = ResponseFields(input="hi", reasoning={"effort": effort})
    assert fields.as_conversation(fields.items()).template_options() == {"thinking": thinks}


def test_tools_that_are_not_allowed_are_not_told() -> None:
    allowed = {
        "type": "allowed_tools",
        "mode": "required",
        "tools": [{"type": "function", "name": "rise"}],
    }
    fields = ResponseFields(input="hi", tools=TOOLS, tool_choice=allowed)
    chat = fields.as_conversation(fields.items())
    assert chat.tool_choice == "required"
    assert chat.tools is not None
    assert [tool["function"]["name"] for tool in chat.tools] == ["rise"]
    allowed["tools"] = [{"type": "function", "name": "swim"}]
    with pytest.raises(BadInput, match="'swim' is not among"):
        ResponseFields(input="hi", tools=TOOLS, tool_choice=allowed).as_conversation(fields.items())


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
KINDS = ["message", "reasoning", "function_call", "function_call_output", "input_text", "function"]
ITEM = st.fixed_dictionaries(
    {"type": st.sampled_from(KINDS) | JUNK},
    optional={
        name: st.sampled_from(["user", "assistant", "1"]) | JUNK
        for name in ("role", "content", "call_id", "name", "arguments", "output", "summary", "text")
    },
)
PARTS = st.lists(ITEM, max_size=2)


@given(
    items=st.lists(ITEM | st.builds(lambda i, p: {**i, "content": p}, ITEM, PARTS), max_size=4),
    tools=PARTS,
    choice=ITEM | st.builds(lambda p: {"type": "allowed_tools", "mode": "auto", "tools": p}, PARTS),
)
def test_junk_is_refused_and_breaks_nothing(
    items: list[Any], tools: list[Any], choice: Any
) -> None:
    fields = ResponseFields(input=items, tools=tools, tool_choice=choice)
    with suppress(BadInput, RequestValidationError):
        fields.as_conversation(fields.items())
