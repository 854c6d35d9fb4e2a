"""Anthropic's and OpenAI's newer routes under bad bodies: refused, and never a failure of ours."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.serving.clients import well
from tests.serving.support import NAME, TestServer
from tests.serving.test_bad_requests import ANY, BODIES, JSON, nested
from ziphius.model.transformer import Transformer
from ziphius.serving.options import Limits

MESSAGES, COUNT, RESPONSES = "/v1/messages", "/v1/messages/count_tokens", "/v1/responses"
USER = {"role": "user", "content": "a"}
# What would be answered, of each route.
GOOD: dict[str, dict[str, Any]] = {
    MESSAGES: {"model": NAME, "messages": [USER], "max_tokens": 1},
    COUNT: {"model": NAME, "messages": [USER]},
    RESPONSES: {"model": NAME, "input": "a", "max_output_tokens": 16},
}


@pytest.fixture(scope="module")
def server(whale: Transformer) -> Iterator[TestServer]:
    """A server that is well at the end."""
    with well(whale, Limits(drain_seconds=2.0)) as started:
        yield started


@pytest.fixture(scope="module")
def client(server: TestServer) -> Iterator[httpx.Client]:
    """A client of it."""
    with server.client() as made:
        yield made


def refused(answer: httpx.Response) -> None:
    """Check an error's shape, which both families of clients read."""
    body = answer.json()
    assert isinstance(body["error"]["message"], str)
    assert body["error"]["message"]
    assert body["error"]["type"].endswith(("_error", "_large"))
    assert "Traceback" not in answer.text
    assert "ziphius/" not in answer.text


@pytest.mark.parametrize("path", list(GOOD))
@pytest.mark.parametrize("body", list(BODIES.values()), ids=list(BODIES))
def test_bodies(client: httpx.Client, path: str, body: bytes) -> None:
    answer = client.post(path, content=body, headers=JSON)
    assert answer.status_code in (400, 404), answer.text
    refused(answer)


@pytest.mark.parametrize("levels", [50, 300, 600, 900])
@pytest.mark.parametrize("path", list(GOOD))
def test_objects_in_objects(client: httpx.Client, path: str, levels: int) -> None:
    deep = json.loads(nested(levels))
    call = {"type": "tool_use", "id": "x", "name": "f", "input": deep}
    result = {
        "type": "tool_result",
        "tool_use_id": "x",
        "content": [{"type": "text", "text": deep}],
    }
    turns = [USER, {"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]
    items = [{"type": "function_call", "call_id": "x", "name": "f", "arguments": deep}]
    tool = {"name": "f", "type": "function", "input_schema": deep, "parameters": deep}
    schema = {"type": "json_schema", "name": "x"}
    for more in (
        {"tools": [tool]}, {"metadata": deep}, {"whatever": deep}, {"messages": turns},
        {"input": items}, {"text": {"format": {**schema, "schema": deep}}},
    ):  # fmt: skip
        body = json.dumps({**GOOD[path], **more})
        answer = client.post(path, content=body, headers=JSON)
        assert answer.status_code in (200, 400, 404), answer.text
        if answer.status_code != 200:
            refused(answer)


NAMES = [
    "messages", "input", "system", "instructions", "tools", "tool_choice", "thinking", "reasoning",
    "stop_sequences", "temperature", "top_p", "top_k", "metadata", "text", "store", "include",
    "previous_response_id", "truncation", "max_output_tokens", "max_tokens", "parallel_tool_calls",
    "stream_options", "service_tier", "whatever", "top_logprobs", "user", "background",
]  # fmt: skip
MORE = st.dictionaries(st.sampled_from(NAMES), ANY, max_size=3)


def test_any_json_is_answered_or_refused(client: httpx.Client, chaos: bool) -> None:
    @settings(
        max_examples=3000 if chaos else 120,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(path=st.sampled_from(list(GOOD)), more=MORE, stream=st.booleans(), whole=st.booleans())
    def check(path: str, more: Any, stream: bool, whole: bool) -> None:
        body = {**GOOD[path], **more, **({"stream": stream} if path != COUNT else {})}
        if not whole:
            body = more
        answer = client.post(path, content=json.dumps(body), headers=JSON)
        assert answer.status_code in (200, 400, 404), answer.text
        if answer.status_code != 200:
            refused(answer)

    check()
