"""More clients than there is room for: those that are let in do not feel it."""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from tests.serving.clients import (
    LONG,
    connected,
    error_of,
    known,
    nothing_left,
    read_until,
    request,
    tasks_of,
)
from tests.serving.support import TestServer, make_engine, make_tokenizer, running
from ziphius.model.transformer import Transformer
from ziphius.serving.options import Limits

RUNNING, WAITING = 4, 32
ROOM = RUNNING + WAITING
LIMITS = Limits(max_waiting=WAITING, drain_seconds=2.0)
ASK = {"prompt": "a whale", "max_tokens": 24, "ignore_eos": True, "seed": 1}


class Crowd:
    """Clients that ask again and again, and what came of it."""

    def __init__(self, server: TestServer, clients: int) -> None:
        self.server, self.clients = server, clients
        self.seconds: list[float] = []  # of accepted requests
        self.statuses: Counter[int] = Counter()
        self.most_open = 0
        self._lock = threading.Lock()

    def ask(self, seconds: float, pause: float) -> None:
        """Let every client ask for a while; a refused one asks again after ``pause``."""
        ends = time.monotonic() + seconds
        watching = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(watching,))
        watcher.start()
        with ThreadPoolExecutor(self.clients) as pool:
            for done in [pool.submit(self._client, ends, pause) for _ in range(self.clients)]:
                done.result()
        watching.set()
        watcher.join()

    def _watch(self, stop: threading.Event) -> None:
        link = self.server.application.engine.link
        assert link is not None
        while not stop.wait(0.001):
            self.most_open = max(self.most_open, link.open)

    def _client(self, ends: float, pause: float) -> None:
        with self.server.client(timeout=60) as client:
            while time.monotonic() < ends:
                began = time.monotonic()
                answer = client.post("/v1/completions", json=ASK)
                took = time.monotonic() - began
                with self._lock:
                    self.statuses[answer.status_code] += 1
                    if answer.status_code == 200:
                        self.seconds.append(took)
                if answer.status_code != 200:
                    self.check_refusal(answer)
                    time.sleep(pause)

    def check_refusal(self, answer: httpx.Response) -> None:
        """A refusal says when to come again."""
        assert answer.status_code == 503, answer.text
        assert error_of(answer)["code"] == "server_full"
        assert error_of(answer)["type"] == "overloaded_error"
        assert 1 <= int(answer.headers["retry-after"]) <= 60

    def share(self, percent: int) -> float:
        """Return a percentile of the seconds."""
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, math.ceil(len(ordered) * percent / 100) - 1)]


def test_two_hundred_clients_and_a_queue_of_32(whale: Transformer) -> None:
    """What an accepted request waits for is bounded, however many are refused.

    Requests run in the order in which they are taken. So when one ends, at most those that were
    open when it was taken, less itself, can have ended before it that were taken before it, and
    they are never more than there is room for.
    """
    tokenizer = make_tokenizer()
    with running(
        lambda: make_engine(whale, tokenizer), tokenizer=tokenizer, limits=LIMITS
    ) as server:
        expected = known(server)
        server.until(lambda: not server.server.server_state.connections)
        tasks = tasks_of(server)
        ahead = count_ahead(server)
        crowd = Crowd(server, 200)
        crowd.ask(seconds=2.0, pause=0.2)
        assert crowd.statuses[200] > ROOM
        assert crowd.statuses[503] > 100
        assert crowd.most_open == ROOM  # it was full, and never more than that
        assert max(ahead) < ROOM
        assert max(ahead) > RUNNING, "nobody has waited"
        nothing_left(server, tasks)
        assert known(server) == expected


def count_ahead(server: TestServer) -> list[int]:
    """Note of every request that ends how many that were taken before it had ended by then, since
    it was taken.
    """
    link = server.application.engine.link
    assert link is not None
    ended: list[int] = []  # numbers, in the order of their ends
    taken_at: dict[int, int] = {}
    ahead: list[int] = []
    submit, end = link.submit, link.on_end

    def submitting(job: Any) -> Any:
        stream = submit(job)
        taken_at[stream.number] = len(ended)
        return stream

    def ending(stream: Any) -> None:
        since = ended[taken_at.pop(stream.number) :]
        ahead.append(sum(number < stream.number for number in since))
        ended.append(stream.number)
        end(stream)

    link.submit, link.on_end = submitting, ending  # type: ignore[method-assign]
    return ahead


def test_latency_does_not_grow_with_the_crowd(whale: Transformer, chaos: bool) -> None:
    """Accepted requests take as long with 200 clients as with those that fill the room.

    The clients share the two cores with the engine, and each refusal costs the server some time:
    twice as long is allowed. Without a bound, 200 clients would take 200/36 = 5.6 times as long.
    """
    rounds, seconds = (5, 8.0) if chaos else (1, 1.0)
    ratios: dict[int, list[float]] = {50: [], 99: []}
    with running(lambda: make_engine(whale), limits=LIMITS) as server:
        for _ in range(rounds):
            few, many = Crowd(server, ROOM), Crowd(server, 200)
            for crowd in (few, many):
                crowd.ask(seconds, pause=1.0)  # what Retry-After asks for, at least
            for percent, found in ratios.items():
                found.append(many.share(percent) / few.share(percent))
            print(
                f"\n{ROOM} clients: p50 {few.share(50):.3f} s, p99 {few.share(99):.3f} s "
                f"({len(few.seconds)}); 200: p50 {many.share(50):.3f} s, p99 "
                f"{many.share(99):.3f} s ({len(many.seconds)}, {many.statuses[503]} refused)"
            )
        server.until_idle()
    medians = {percent: statistics.median(found) for percent, found in ratios.items()}
    print("200 clients to 36, medians:", medians)
    if chaos:
        assert medians[50] < 2, ratios
        assert medians[99] < 3, ratios


def test_answers_of_one_request_count_each(whale: Transformer) -> None:
    with running(lambda: make_engine(whale), limits=LIMITS) as server, server.client() as client:
        full = {**LONG, "prompt": ["a", "whale"], "n": 18, "max_tokens": 200}
        more = {"prompt": "a", "n": ROOM + 1}
        answer = client.post("/v1/completions", json=more)
        assert answer.status_code == 400  # it would never fit
        assert "at a time" in error_of(answer)["message"]
        link = server.application.engine.link
        assert link is not None
        with connected(server.url) as raw:
            raw.sendall(request({**full, "n": 16}))
            read_until(raw, b"data: ")
            assert link.open == 32
            # Two prompts of three answers: neither is taken, though one would fit.
            answer = client.post("/v1/completions", json={**ASK, "prompt": ["a", "b"], "n": 3})
            assert answer.status_code == 503
            assert link.open == 32
        server.until_idle()


def test_tokens_that_wait_are_bounded(whale: Transformer) -> None:
    limits = Limits(max_waiting=32, max_waiting_tokens=300, drain_seconds=2.0)
    with running(lambda: make_engine(whale), limits=limits) as server, server.client() as client:
        long = {"prompt": [5] * 200, "max_tokens": 1}
        # A prompt longer than the bound is taken where nothing waits: else it never would be.
        assert client.post("/v1/completions", json={**long, "prompt": [5] * 400}).is_success
        server.runner.frozen.set()
        server.until(lambda: server.runner.standing.is_set())
        with connected(server.url) as raw:
            raw.sendall(request(long))
            link = server.application.engine.link
            assert link is not None
            server.until(lambda: link.waiting_tokens == 200)
            answer = client.post("/v1/completions", json=long)
            assert answer.status_code == 503
            assert "tokens wait" in error_of(answer)["message"]
        server.runner.frozen.clear()
        server.until_idle()


def test_the_number_of_open_requests_is_bounded(whale: Transformer) -> None:
    limits = Limits(max_open=3, drain_seconds=2.0)
    with running(lambda: make_engine(whale), limits=limits) as server, server.client() as client:
        raws = [connected(server.url) for _ in range(3)]
        opened = [raw.__enter__() for raw in raws]
        for raw in opened:
            raw.sendall(request(LONG))
            read_until(raw, b"data: ")
        answer = client.post("/v1/completions", json=ASK)
        assert answer.status_code == 503
        assert answer.headers["retry-after"]
        error_of(answer)
        assert client.get("/health").status_code == 200
        assert client.get("/metrics").status_code == 200
        for one in raws:
            one.__exit__(None, None, None)
        server.until_idle()
        assert client.post("/v1/completions", json=ASK).is_success
