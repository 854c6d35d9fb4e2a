"""Completions over HTTP."""

from __future__ import annotations

from tests.serving.support import NAME, TestServer


def test_a_completion(server: TestServer) -> None:
    with server.client() as client:
        body = {"prompt": "a whale", "max_tokens": 6, "temperature": 0, "ignore_eos": True}
        answer = client.post("/v1/completions", json=body).json()
    assert answer["model"] == NAME
    assert answer["usage"]["completion_tokens"] == 6
    assert answer["choices"][0]["finish_reason"] == "length"
