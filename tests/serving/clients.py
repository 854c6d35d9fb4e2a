"""Clients of a server that speak HTTP byte by byte: they stop where a test wants them to."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from tests.serving.support import TestServer, make_engine, make_tokenizer, running
from ziphius.model.transformer import Transformer
from ziphius.serving.options import Limits

# An answer whose every bit is told: drawn by a seed, with log-probabilities.
KNOWN = {
    "prompt": "a whale dives", "max_tokens": 12, "temperature": 0.9, "seed": 7, "logprobs": 3,
    "ignore_eos": True,
}  # fmt: skip
# A stream that does not end by itself for a while.
LONG = {"prompt": "a whale", "max_tokens": 400, "ignore_eos": True, "stream": True}


def request(body: Any, path: str = "/v1/completions", *headers: str, method: str = "POST") -> bytes:
    """Return a request's bytes; a body that is not bytes is sent as JSON."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [
        f"{method} {path} HTTP/1.1", "host: localhost", "content-type: application/json",
        f"content-length: {len(content)}", *headers,
    ]  # fmt: skip
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + content


@contextmanager
def connected(url: str, *, timeout: float = 20.0, window: int = 0) -> Iterator[socket.socket]:
    """Connect to a server; ``window`` bounds the bytes that wait here to be read."""
    parts = httpx.URL(url)
    with socket.socket() as raw:
        if window:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
        raw.settimeout(timeout)
        raw.connect((parts.host, parts.port))
        yield raw


def read_until(raw: socket.socket, wanted: bytes) -> bytes:
    """Read until some bytes have come, or the end."""
    read = b""
    while wanted not in read and (part := raw.recv(65_536)):
        read += part
    return read


def read_all(raw: socket.socket) -> bytes:
    """Read to the end of the connection; one that is cut off ends there."""
    read = b""
    try:
        while part := raw.recv(65_536):
            read += part
    except ConnectionResetError:
        pass
    return read


def reset(raw: socket.socket) -> None:
    """Cut a connection off, without a goodbye."""
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    raw.close()


def status_of(answer: bytes) -> int:
    """Return the status of an answer's bytes."""
    return int(answer.split(b" ", 2)[1])


def error_of(answer: bytes | httpx.Response) -> dict[str, Any]:
    """Return the error of an answer, and check its shape."""
    content = answer.partition(b"\r\n\r\n")[2] if isinstance(answer, bytes) else answer.content
    body = json.loads(content)
    assert set(body) == {"type", "error"}
    assert body["type"] == "error"
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    assert body["error"]["type"].endswith(("_error", "_large"))
    assert "Traceback" not in body["error"]["message"]
    assert "ziphius/" not in body["error"]["message"]
    return dict(body["error"])


def events_of(answer: bytes | str) -> list[Any]:
    """Return the data of a stream's events."""
    text = answer.decode(errors="replace") if isinstance(answer, bytes) else answer
    lines = (line.strip() for line in text.splitlines())
    told = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    return [one if one == "[DONE]" else json.loads(one) for one in told]


def known(server: TestServer) -> list[dict[str, Any]]:
    """Return the choices of the answer that must not change."""
    return known_at(server.url)


def known_at(url: str) -> list[dict[str, Any]]:
    """Return them from any server. One with little time may need several tries."""
    for _ in range(20):
        answer = httpx.post(f"{url}/v1/completions", json=KNOWN, timeout=60)
        if answer.status_code != 504:
            break
    assert answer.status_code == 200, answer.text
    choices: list[dict[str, Any]] = answer.json()["choices"]
    return choices


def tasks_of(server: TestServer) -> int:
    """Count the tasks on the server's loop."""

    async def count() -> int:
        return len(asyncio.all_tasks()) - 1

    return asyncio.run_coroutine_threadsafe(count(), server.runner._loop).result(10)


def nothing_left(server: TestServer, tasks: int, seconds: float = 20.0) -> None:
    """Wait until a server holds nothing of any request. Raises AssertionError for what it keeps.

    ``tasks`` is how many it had when it had nothing to do.
    """
    gate, state = server.application.gate, server.server.server_state
    server.until(lambda: not state.connections and not state.tasks, seconds)
    server.until_idle(seconds)
    assert gate.open == 0
    assert not gate._of_client
    link, worker = server.application.engine.link, server.runner.worker
    assert link is not None
    assert worker is not None
    assert not link._streams
    assert not link._unsent
    server.until(lambda: not worker._requests and not worker._ids)
    assert not server.engine._requests
    server.engine.scheduler.check()
    ends = time.monotonic() + seconds
    while (left := tasks_of(server)) > tasks:
        assert time.monotonic() < ends, f"{left} tasks, not {tasks}"
        time.sleep(0.02)


@contextmanager
def well(model: Transformer, limits: Limits) -> Iterator[TestServer]:
    """A server that, whatever was asked of it, is well at the end: nothing is left in it, it says
    what it said at first, and its engine was not started again.
    """
    tokenizer = make_tokenizer()
    with running(
        lambda: make_engine(model, tokenizer), tokenizer=tokenizer, limits=limits
    ) as started:
        expected, tasks = known(started), tasks_of(started)
        yield started
        nothing_left(started, tasks)
        assert known(started) == expected
        assert started.application.engine.restarts == 0
