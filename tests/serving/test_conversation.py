"""A conversation on its way to the engine: what is rendered, and by which parameters."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.serving.asking import chat, post
from tests.serving.scripted import ScriptedEngine
from tests.serving.support import TestServer
from ziphius.config.errors import BadInput
from ziphius.serving.api.conversation import in_call_order, results_in_order

USER = {"role": "user", "content": "a whale"}


def called(*ids: str) -> dict[str, Any]:
    """An assistant's turn with calls of those ids; each tool has its call's name."""
    calls = [
        {"id": one, "type": "function", "function": {"name": one, "arguments": "{}"}} for one in ids
    ]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def result(of: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": of, "content": f"result of {of}"}


def test_results_come_in_the_order_of_their_calls() -> None:
    """A template renders no ids: the model knows a result by its place alone."""
    messages = [USER, called("a", "b"), result("b"), result("a"), USER]
    assert results_in_order(messages) == [USER, called("a", "b"), result("a"), result("b"), USER]


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([result("a")], "no call of that id"),
        ([USER, called("a", "b"), result("a")], "the call 'b' has no result"),
        ([USER, called("a"), result("a"), result("c")], "the message before has no such call"),
    ],
)
def test_results_and_calls_that_do_not_belong_together(messages: Any, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        results_in_order(messages)


def rendered(server: TestServer, *messages: dict[str, Any]) -> str:
    """Return the prompt that a conversation becomes."""
    ids = post(server, "/tokenize", messages=list(messages))["tokens"]
    text: str = post(server, "/detokenize", tokens=ids)["prompt"]
    return text


def test_a_chat_takes_results_in_any_order(scripted: TestServer) -> None:
    engine = scripted.engine
    assert isinstance(engine, ScriptedEngine)
    before = len(engine.prompts)
    for order in (("b", "a"), ("a", "b")):
        engine.say("well")
        chat(scripted, messages=[USER, called("a", "b"), *map(result, order)], ignore_eos=False)
    first, second = engine.prompts[before:]
    assert first == second


def test_results_without_ids_stay_as_they_are(scripted: TestServer) -> None:
    engine = scripted.engine
    assert isinstance(engine, ScriptedEngine)
    engine.say("well")
    loose = [{"role": "tool", "content": "one"}, {"role": "tool", "content": "two"}]
    assert chat(scripted, messages=[USER, called("a", "b"), *loose], ignore_eos=False)


def test_a_developer_is_the_system(scripted: TestServer) -> None:
    engine = scripted.engine
    assert isinstance(engine, ScriptedEngine)
    before = len(engine.prompts)
    for role in ("developer", "system"):
        engine.say("well")
        chat(scripted, messages=[{"role": role, "content": "deep"}, USER], ignore_eos=False)
    assert engine.prompts[before] == engine.prompts[before + 1]


@pytest.mark.parametrize(
    ("asked", "thinks"),
    [
        ({}, False),
        ({"chat_template_kwargs": {"thinking": True}}, True),
        ({"chat_template_kwargs": {"enable_thinking": True}}, True),
        ({"reasoning_effort": "high"}, True),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "high", "chat_template_kwargs": {"thinking": False}}, False),
    ],
)
def test_who_asks_for_thinking(scripted: TestServer, asked: Any, thinks: bool) -> None:
    engine = scripted.engine
    assert isinstance(engine, ScriptedEngine)
    engine.say(*(["I think", "</think>"] if thinks else []), "well")
    message = chat(scripted, ignore_eos=False, **asked)["choices"][0]["message"]
    assert message["content"] == "well"
    assert message["reasoning"] == message["reasoning_content"]
    assert message["reasoning"] == ("I think" if thinks else None)


def test_the_last_message_is_gone_on_with(scripted: TestServer) -> None:
    engine = scripted.engine
    assert isinstance(engine, ScriptedEngine)
    engine.say("in the sea")
    begun = {"role": "assistant", "content": "It sleeps"}
    chat(scripted, messages=[USER, begun], continue_final_message=True, ignore_eos=False)
    text = scripted.application.served.text(engine.prompts[-1])
    assert text.endswith("It sleeps")


def test_only_text_of_the_assistant_can_be_gone_on_with(scripted: TestServer) -> None:
    error = chat(scripted, 400, messages=[USER], continue_final_message=True)["error"]
    assert "continue_final_message" in error["message"]


def test_text_before_a_failure_is_not_lost(scripted: TestServer) -> None:
    """What came with the failure in one report is told before it."""
    engine = scripted.engine
    assert isinstance(engine, ScriptedEngine)
    engine.say("a whale", fails=True)
    with (
        scripted.client() as client,
        client.stream(
            "POST",
            "/v1/chat/completions",
            json={"messages": [USER], "stream": True, "temperature": 0},
        ) as response,
    ):
        told = [json.loads(line[6:]) for line in response.iter_lines() if line]
    said = [chunk["choices"][0]["delta"].get("content", "") for chunk in told[:-1]]
    assert "".join(said) == "a whale"
    assert told[-1]["error"]["message"] == "the script says so"


def test_a_turn_that_says_it_calls_nothing_changes_no_order(scripted: TestServer) -> None:
    """``"tool_calls": null`` is what clients send of a message that they were given."""
    messages = [
        USER,
        {"role": "assistant", "content": "Hm.", "tool_calls": None},
        USER,
        called("a", "b"),
        result("b"),
        result("a"),
    ]
    ordered = in_call_order(messages)
    assert [m["content"] for m in ordered[-2:]] == ["result of a", "result of b"]


def test_one_turn_without_ids_leaves_the_others_in_order() -> None:
    loose = {"role": "tool", "content": "of nobody"}
    messages = [USER, called("x"), loose, USER, called("a", "b"), result("b"), result("a")]
    ordered = in_call_order(messages)
    assert ordered[:3] == messages[:3]
    assert [m["content"] for m in ordered[-2:]] == ["result of a", "result of b"]
