"""Clients that leave, at any moment and in any way, take everything of theirs along."""

from __future__ import annotations

import os
import random
import socket
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from tests.serving.clients import (
    KNOWN,
    LONG,
    connected,
    events_of,
    known,
    known_at,
    nothing_left,
    read_all,
    read_until,
    request,
    reset,
    tasks_of,
)
from tests.serving.programs import Program, program
from tests.serving.support import NAME, TestServer, make_engine, make_tokenizer, running
from ziphius.model.transformer import Transformer
from ziphius.serving.options import Limits

CHAT = "/v1/chat/completions"

# The last events of streams that are told apart by their types.
ENDS = ("error", "message_stop", "response.completed", "response.incomplete", "response.failed")


def body_of(random: random.Random) -> tuple[str, dict[str, Any]]:
    """Draw a route and a body: more is asked for than is waited for."""
    more: dict[str, Any] = {
        "stream": random.random() < 0.6,
        "max_tokens": random.choice((3, 40, 300)),
        "n": random.choice((1, 1, 2, 3)),
        "ignore_eos": True,
    }
    if random.random() < 0.2:
        talk = {"messages": [{"role": "user", "content": "a whale"}], "stream": more["stream"]}
        return "/v1/messages", {**talk, "model": NAME, "max_tokens": more["max_tokens"]}
    if random.random() < 0.2:
        talk = {"input": "a whale", "stream": more["stream"]}
        return "/v1/responses", {**talk, "max_output_tokens": max(more["max_tokens"], 16)}
    if random.random() < 0.3 and not more["stream"]:
        more["prompt_logprobs"] = 2
    if random.random() < 0.3:
        return CHAT, {"messages": [{"role": "user", "content": "a whale"}], **more}
    if random.random() < 0.3 and not more["stream"]:
        more |= {"echo": True, "logprobs": 1}
    prompt: Any = random.choice(("a whale", ["deep", "into the cold sea"], [[5, 6, 7]] * 3))
    return "/v1/completions", {"prompt": prompt, **more}


class Client:
    """Does one thing that a client may do, and leaves."""

    def __init__(self, url: str, seed: int, expected: Any) -> None:
        self.url, self.random, self.expected = url, random.Random(seed), expected
        path, self.body = body_of(self.random)
        self.bytes = request(self.body, path, "connection: close")
        self.path = path

    def run(self) -> str:
        """Return what was done."""
        ways: list[Callable[[], None]] = [
            self.in_head, self.in_body, self.before_answer, self.in_answer, self.half_closed,
            self.no_patience, self.to_the_end, self.pipelined, self.nonsense, self.as_it_should,
        ]  # fmt: skip
        way = self.random.choice(ways)
        way()
        return way.__name__

    def leave(self, raw: socket.socket) -> None:
        """Close a connection: with a goodbye, or without."""
        if self.random.random() < 0.5:
            reset(raw)
        else:
            raw.close()

    def in_head(self) -> None:
        with connected(self.url) as raw:
            raw.sendall(self.bytes[: self.random.randrange(60)])
            self.leave(raw)

    def in_body(self) -> None:
        with connected(self.url) as raw:
            raw.sendall(self.bytes[: -self.random.randrange(1, 20)])
            time.sleep(self.random.random() * 0.02)
            self.leave(raw)

    def before_answer(self) -> None:
        with connected(self.url) as raw:
            raw.sendall(self.bytes)
            time.sleep(self.random.random() * 0.05)
            self.leave(raw)

    def in_answer(self) -> None:
        with connected(self.url) as raw:
            raw.sendall(self.bytes)
            for _ in range(self.random.randrange(1, 5)):
                raw.recv(self.random.randrange(1, 2000))
            self.leave(raw)

    def half_closed(self) -> None:
        with connected(self.url) as raw:
            raw.sendall(self.bytes)
            raw.shutdown(socket.SHUT_WR)
            if self.random.random() < 0.5:
                read_all(raw)
            self.leave(raw)

    def no_patience(self) -> None:
        try:
            httpx.post(self.url + self.path, json=self.body, timeout=self.random.random() * 0.05)
        except httpx.TimeoutException:
            return

    def to_the_end(self) -> None:
        """Wait for the end, which the server's own time limit brings where it is late."""
        answer = httpx.post(self.url + self.path, json=self.body, timeout=60)
        assert answer.status_code in (200, 504), answer.text
        if self.body["stream"] and answer.status_code == 200:
            last = events_of(answer.text)[-1]
            assert last == "[DONE]" or last["type"] in ENDS, last
            assert last == "[DONE]" or "error" not in last or "longer than" in str(last)

    def pipelined(self) -> None:
        with connected(self.url) as raw:
            raw.sendall(request(self.body, self.path) * 3)
            raw.recv(100)
            self.leave(raw)

    def nonsense(self) -> None:
        bad = self.random.choice((b"{", b"[]", b'{"prompt": 3}', b"\xff", b""))
        with connected(self.url) as raw:
            raw.sendall(request(bad, self.path))
            assert b" 400 " in read_until(raw, b"\r\n")
            self.leave(raw)

    def as_it_should(self) -> None:
        answer = httpx.post(self.url + "/v1/completions", json=KNOWN, timeout=60)
        if answer.status_code != 504:
            assert answer.status_code == 200, answer.text
            assert answer.json()["choices"] == self.expected


def test_whoever_leaves_leaves_nothing(whale: Transformer, chaos: bool) -> None:
    count = 2000 if chaos else 150
    limits = Limits(request_seconds=0.5, body_seconds=2.0, drain_seconds=2.0)
    tokenizer = make_tokenizer()
    with running(
        lambda: make_engine(whale, tokenizer), tokenizer=tokenizer, limits=limits
    ) as server:
        expected = known(server)
        server.until(lambda: not server.server.server_state.connections)
        tasks = tasks_of(server)
        with ThreadPoolExecutor(12) as pool:
            done = pool.map(lambda seed: Client(server.url, seed, expected).run(), range(count))
            ways = Counter(done)
        assert len(ways) == 10, ways
        nothing_left(server, tasks)
        assert known(server) == expected
        stats = server.engine.stats()
        print(dict(ways), f"{stats.expired} expired, {stats.preemptions} preempted")
        if chaos:
            assert stats.expired, "no time limit was reached"


def test_a_real_server_grows_by_nothing(checkpoint: Path, home: Path, chaos: bool) -> None:
    """Neither its memory nor its open files, and its engine holds no page at the end."""
    first, count = (300, 2000) if chaos else (40, 80)
    limits = {"request_seconds": 0.5, "body_seconds": 2.0}
    with program(checkpoint, home, limits=limits) as server, ThreadPoolExecutor(12) as pool:
        server.until_ready()
        expected = known_at(server.url)
        sizes: list[tuple[int, int]] = []

        def go(seeds: range) -> None:
            list(pool.map(lambda seed: Client(server.url, seed, expected).run(), seeds))
            server.until(lambda: at_rest(server), 20)
            sizes.append((resident(server.process.pid), resident(server.engine())))

        go(range(first))  # what grows once: caches, buffers, arenas
        files = open_files(server.process.pid)
        go(range(first, first + count))
        assert open_files(server.process.pid) <= files + 1  # our own, which asks for metrics
        grown = [(after - before) >> 20 for before, after in zip(*sizes, strict=True)]
        print(f"{count} faults: server +{grown[0]} MiB, engine +{grown[1]} MiB of {sizes[0]}")
        assert max(grown) < 24
        assert known_at(server.url) == expected
        assert "Traceback" not in "".join(server.lines)
        assert httpx.get(f"{server.url}/metrics").text.count("ziphius_engine_restarts_total{") == 1


def at_rest(server: Program) -> bool:
    """Whether the engine has nothing to do, by what it reports."""
    text = httpx.get(f"{server.url}/metrics").text
    wanted = ("requests_running", "requests_waiting", "cache_pages_used", "engine_restarts_total")
    found = {line.split("{")[0]: float(line.split()[-1]) for line in text.splitlines()
             if line.startswith("ziphius_")}  # fmt: skip
    return all(found[f"ziphius_{name}"] == 0 for name in wanted)


def resident(process: int) -> int:
    """Return the bytes of memory that a process has."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def open_files(process: int) -> int:
    return len(list(Path(f"/proc/{process}/fd").iterdir()))


def test_a_request_before_another_is_ended_too(server: TestServer) -> None:
    # Two requests in one go: the second waits, and the first must still be told of the loss.
    expected, tasks = known(server), tasks_of(server)
    link = server.application.engine.link
    assert link is not None
    ended: list[int] = []
    link.on_end, before = lambda stream: ended.append(stream.number), link.on_end
    for stream in (True, False):
        with connected(server.url) as raw:
            raw.sendall(request({**LONG, "n": 8, "stream": stream}) * 2)
            server.until(lambda: link.open == 8)
        nothing_left(server, tasks)
    assert not ended, "it was answered to the end, for nobody"
    link.on_end = before
    assert known(server) == expected


def test_a_number_too_large_for_a_message_leaves_nothing(server: TestServer) -> None:
    tasks = tasks_of(server)
    with server.client() as client:
        for body in ({"prompt": [10**30]}, {"prompt": "a", "top_k": 10**30}):
            answer = client.post("/v1/completions", json=body)
            assert answer.status_code == 400, answer.text
    nothing_left(server, tasks, seconds=2)


def test_the_cache_is_cleared_while_answers_come(whale: Transformer) -> None:
    key, tokenizer = {"authorization": "Bearer admin-key"}, make_tokenizer()
    with running(
        lambda: make_engine(whale, tokenizer), tokenizer=tokenizer, admin_key="admin-key"
    ) as server:
        expected = known(server)
        with connected(server.url) as raw, server.client() as client:
            raw.sendall(request(LONG))
            read_until(raw, b"data: ")
            assert client.post("/admin/cache/clear", headers=key).status_code == 200
            assert known(server) == expected
            assert server.application.engine.restarts == 0
            assert b"[DONE]" in read_until(raw, b"[DONE]")
        server.until_idle()
        with server.client() as client:
            assert client.post("/admin/cache/clear", headers=key).status_code == 200
        server.until(lambda: server.engine.pool.cached == 0)
        server.engine.scheduler.check()


def test_a_client_that_does_not_read_is_dropped(whale: Transformer) -> None:
    # Answers of several MB: more than the sockets hold between them.
    limits = Limits(write_seconds=0.5, drain_seconds=1.0)
    big = {**LONG, "n": 12, "logprobs": 20, "max_tokens": 490}
    with running(lambda: make_engine(whale), limits=limits, kernel_bytes=8192) as server:
        expected, tasks = known(server), tasks_of(server)
        for body in (big, {**big, "stream": False}):
            with connected(server.url, window=4096) as raw:
                raw.sendall(request(body))
                server.until(lambda: bool(server.server.server_state.connections))
                if body["stream"]:
                    full_and_no_more(server)
                # Nobody reads: the connection goes, and with it what is not written yet.
                nothing_left(server, tasks, seconds=15)
        assert known(server) == expected


def full_and_no_more(server: TestServer) -> None:
    """Wait until a connection takes no more: the rest waits in one delta an answer."""
    (connection,) = server.server.server_state.connections
    server.until(lambda: "write" in connection._timers)  # type: ignore[union-attr]
    assert connection.transport.get_write_buffer_size() < 1 << 19


def test_an_error_mid_stream_is_the_last_event(whale: Transformer) -> None:
    limits = Limits(request_seconds=0.2, drain_seconds=1.0)
    with running(lambda: make_engine(whale), limits=limits) as server, server.client() as client:
        answer = client.post("/v1/completions", json={**LONG, "n": 8, "max_tokens": 490})
        assert answer.status_code == 200
        *chunks, last = events_of(answer.text)
        assert last["error"]["type"] == "timeout_error"
        assert chunks
        assert "[DONE]" not in answer.text
        whole = client.post("/v1/completions", json={**LONG, "n": 8, "stream": False})
        assert whole.status_code == 504
        server.until_idle()
