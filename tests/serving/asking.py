"""Asking a server: bodies, and streams read to their end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx

from tests.serving.support import TestServer

GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}


def post(server: TestServer, path: str, status: int = 200, **body: Any) -> dict[str, Any]:
    """Ask for a whole answer; check its status."""
    with server.client() as client:
        response = client.post(path, json=body)
    assert response.status_code == status, response.text
    answer: dict[str, Any] = response.json()
    return answer


def complete(server: TestServer, status: int = 200, **body: Any) -> dict[str, Any]:
    """Ask for a completion, greedy unless told otherwise."""
    return post(server, "/v1/completions", status, **{**GREEDY, **body})


def chat(server: TestServer, status: int = 200, **body: Any) -> dict[str, Any]:
    """Ask for an answer to a question, greedy unless told otherwise."""
    given = {**GREEDY, "messages": [{"role": "user", "content": "a whale"}], **body}
    return post(server, "/v1/chat/completions", status, **given)


def events(server: TestServer, path: str, **body: Any) -> Iterator[dict[str, Any]]:
    """Yield the events of a stream, which must end with ``[DONE]``."""
    with (
        server.client() as client,
        client.stream("POST", path, json={"stream": True, **body}) as response,
    ):
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        yield from parsed(response)


def parsed(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """Yield a stream's events; nothing may come behind ``[DONE]``."""
    ended = False
    for line in response.iter_lines():
        if not line or line.startswith(":"):
            continue
        assert line.startswith("data: "), line
        assert not ended, "something came behind [DONE]"
        if line == "data: [DONE]":
            ended = True
        else:
            yield json.loads(line.removeprefix("data: "))
    assert ended, "the stream has no end"
