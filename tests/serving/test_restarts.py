"""The life of an engine: failures, restarts, giving up, and the line to it."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest

from tests.serving.clients import (
    LONG,
    connected,
    error_of,
    events_of,
    known,
    nothing_left,
    read_until,
    request,
    tasks_of,
)
from tests.serving.support import make_engine, running
from ziphius.config.errors import BadInput
from ziphius.inference.engine import Engine
from ziphius.inference.params import SamplingParams
from ziphius.model.transformer import Transformer
from ziphius.serving.engine import EngineProcess, Runner
from ziphius.serving.link import EngineGone, Job
from ziphius.serving.options import Limits


class Broken(Runner):
    """A worker that ends at once, or can't be started."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    async def start(self, address: str) -> None:
        if self.error is not None:
            raise self.error

    async def wait(self) -> str:
        return "its process ended (7)"

    def kill(self) -> None:
        pass


def life(make: Callable[[], Runner], **limits: Any) -> EngineProcess:
    """Let an engine live to its end, within ten seconds."""

    async def live() -> EngineProcess:
        engine = EngineProcess(make, Limits(**limits))
        await asyncio.wait_for(engine.run(), 10)
        return engine

    return asyncio.run(live())


def test_one_that_never_started_is_not_tried_again() -> None:
    starts: list[Broken] = []

    def make() -> Runner:
        starts.append(Broken())
        return starts[-1]

    engine = life(make)
    assert len(starts) == 1
    assert engine.fatal == "the engine did not start: its process ended (7)"
    assert engine.exit_code == 1
    assert engine.state == "gone"


def test_one_whose_process_cannot_be_made_is_told() -> None:
    engine = life(lambda: Broken(OSError(12, "Cannot allocate memory")))
    assert engine.fatal is not None
    assert "Cannot allocate memory" in engine.fatal
    assert engine.exit_code == 1


def test_a_mistake_of_ours_does_not_leave_a_server_without_an_engine() -> None:
    engine = life(lambda: Broken(RuntimeError("a mistake")))
    assert engine.fatal is not None
    assert "a mistake" in engine.fatal
    assert engine.state == "gone"


def test_what_it_failed_with_is_told(whale: Transformer) -> None:
    """The reason of the engine's own process, and its exit code."""
    calls: list[int] = []

    def make() -> Engine:
        calls.append(1)
        if len(calls) > 1:
            raise BadInput("no weights in /somewhere: download them")
        return make_engine(whale)

    limits = Limits(max_restarts=2, drain_seconds=1.0)
    with running(make, limits=limits) as server:
        known(server)
        server.runner.kill()
        server.until(lambda: server.application.engine.fatal is not None)
        fatal = server.application.engine.fatal
        assert fatal is not None
        assert "3 times in a row" in fatal
        assert "no weights in /somewhere" in fatal
        assert server.application.engine.exit_code == 1
        server.until(lambda: not server.thread.is_alive())  # it does not go on without one
        assert len(calls) == 4 - 1


def test_a_step_that_breaks_the_engine(whale: Transformer, caplog: Any) -> None:
    """Every client gets an error, the reason is in the log alone, and the next engine answers."""
    logging.getLogger("ziphius").propagate = True
    with running(lambda: make_engine(whale)) as server, server.client() as client:
        expected, tasks = known(server), tasks_of(server)

        def step() -> Any:
            raise MemoryError("out of the whale's memory")

        with connected(server.url) as raw:
            raw.sendall(request(LONG))
            read_until(raw, b"data: ")
            server.engine.step = step  # type: ignore[method-assign]
            told = read_until(raw, b"error")
        assert b"engine_unavailable" in told
        assert b"memory" not in told
        server.until(lambda: server.application.engine.restarts == 1)
        server.until(lambda: client.get("/health").is_success)
        assert known(server) == expected
        client.close()
        nothing_left(server, tasks)
    assert "out of the whale's memory" in caplog.text


def test_killed_again_and_again(whale: Transformer, chaos: bool) -> None:
    """With clients that wait, each time: none is forgotten, and nothing is left at the end."""
    limits = Limits(max_restarts=2, drain_seconds=1.0)
    with running(lambda: make_engine(whale), limits=limits) as server:
        expected, tasks = known(server), tasks_of(server)
        for _ in range(40 if chaos else 4):
            with connected(server.url) as streamed, connected(server.url) as whole:
                streamed.sendall(request(LONG))
                whole.sendall(request({**LONG, "stream": False}))
                read_until(streamed, b"data: ")
                server.runner.kill()
                assert b"engine_unavailable" in read_until(streamed, b"}}")
                assert b" 503 " in read_until(whole, b"}}")
            server.until(lambda: server.application.engine.state == "ready")
            assert known(server) == expected  # an answer: not in a row
        nothing_left(server, tasks)


def test_a_restart_does_not_hold_up_the_end(whale: Transformer) -> None:
    """The pause before a start ends with the server."""
    calls: list[int] = []

    def make() -> Engine:
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("not now")
        return make_engine(whale)

    with running(make, limits=Limits(drain_seconds=1.0)) as server:
        server.until(lambda: server.application.engine.state == "ready")
        server.runner.kill()
        server.until(lambda: len(calls) == 5)  # the next pause is 4 s
        server.server.should_exit = True
        server.thread.join(3)
        assert not server.thread.is_alive()


def test_while_it_loads(whale: Transformer) -> None:
    may = threading.Event()
    may.set()

    def make() -> Engine:
        may.wait(20)
        return make_engine(whale)

    with running(make) as server, server.client() as client:
        may.clear()
        server.runner.kill()
        server.until(lambda: server.application.engine.state == "restarting")
        for path in ("/health", "/ready"):
            assert client.get(path).status_code == 503
        for path in ("/metrics", "/v1/models", "/"):
            assert client.get(path).status_code == 200
        answer = client.post("/v1/completions", json={"prompt": "a"})
        assert answer.status_code == 503
        assert "started again" in error_of(answer)["message"]
        assert answer.headers["retry-after"]
        may.set()
        server.until(lambda: client.get("/ready").is_success)
        known(server)


def test_a_client_that_leaves_a_frozen_engine(whale: Transformer) -> None:
    """It is told apart from one that waits: its place is free at once, and later its pages."""
    with running(lambda: make_engine(whale)) as server:
        expected, tasks = known(server), tasks_of(server)
        server.runner.frozen.set()
        server.until(lambda: server.runner.standing.is_set())
        link = server.application.engine.link
        assert link is not None
        for stream in (True, False):
            with connected(server.url) as raw:
                raw.sendall(request({**LONG, "stream": stream}))
                server.until(lambda: link.open == 1)
            server.until(lambda: link.open == 0 and server.application.gate.open == 0, 3)
        server.runner.frozen.clear()
        nothing_left(server, tasks)
        assert known(server) == expected


def test_a_line_without_room_forgets_no_request(whale: Transformer) -> None:
    """What could not be sent to a frozen engine is sent when it goes on."""
    with running(lambda: make_engine(whale)) as server:
        expected, tasks = known(server), tasks_of(server)
        link = server.application.engine.link
        assert link is not None
        with connected(server.url) as raw:
            raw.sendall(request({**LONG, "n": 4}))
            read_until(raw, b"data: ")
            send, refused = link._send, []

            def full(command: Any) -> bool:
                refused.append(command)
                return False

            link._send = full  # type: ignore[method-assign]
        server.until(lambda: bool(refused))
        link._send = send  # type: ignore[method-assign]
        nothing_left(server, tasks)
        assert known(server) == expected


def test_a_link_that_hears_nonsense(whale: Transformer) -> None:
    """A report that breaks the server's end does not leave it deaf."""
    with running(lambda: make_engine(whale)) as server, server.client() as client:
        expected = known(server)
        link = server.application.engine.link
        assert link is not None

        def wrong(stream: Any, part: Any) -> None:
            raise KeyError("a mistake")

        link.on_part = wrong
        answer = client.post("/v1/completions", json=LONG)
        assert events_of(answer.text)[-1]["error"]["code"] == "engine_unavailable"
        assert "a mistake" not in answer.text
        server.until(lambda: server.application.engine.restarts == 1)
        server.until(lambda: client.get("/health").is_success)
        assert known(server) == expected


def test_no_job_for_an_engine_that_is_gone() -> None:
    engine = life(Broken)
    job = Job(prompt_ids=[1], params=SamplingParams())
    with pytest.raises(EngineGone, match="shutting down"):
        engine.submit(job)


class Idle(Runner):
    """A worker that never gets ready, and ends when it is killed."""

    def __init__(self, started: list[Idle]) -> None:
        self._killed = asyncio.Event()
        started.append(self)

    async def start(self, address: str) -> None:
        pass

    async def wait(self) -> str:
        await self._killed.wait()
        return "its process ended by signal 9"

    def kill(self) -> None:
        self._killed.set()


def test_an_operators_restart_while_it_loads_is_no_failure() -> None:
    """It would have ended the server: what has never worked is not tried again."""

    async def live() -> None:
        started: list[Idle] = []
        engine = EngineProcess(lambda: Idle(started), Limits(max_restarts=1))
        running_on = asyncio.create_task(engine.run())
        for count in range(1, 5):
            while len(started) < count:
                await asyncio.sleep(0.01)
            engine.restart()
        while len(started) < 5:
            await asyncio.sleep(0.01)
        assert engine.fatal is None
        assert engine.restarts == 4
        await engine.stop(0.1)
        await asyncio.wait_for(running_on, 10)

    asyncio.run(asyncio.wait_for(live(), 20))


def test_there_is_nothing_to_restart_before_the_start() -> None:
    async def ask() -> None:
        engine = EngineProcess(Broken, Limits())
        with pytest.raises(EngineGone):
            engine.restart()
        await engine.stop(0.1)
        await engine.run()

    asyncio.run(ask())


def test_an_operator_may_restart_as_often_as_they_like(whale: Transformer) -> None:
    limits = Limits(max_restarts=1, drain_seconds=2.0)
    with (
        running(lambda: make_engine(whale), limits=limits, admin_key="operator-key") as started,
        started.client(headers={"authorization": "Bearer operator-key"}) as client,
    ):
        for count in range(1, 4):
            started.until(lambda: started.application.engine.state == "ready")
            assert client.post("/admin/engine/restart").json() == {"restarting": True}
            started.until(lambda count=count: started.application.engine.restarts == count)
        started.until(lambda: started.application.engine.state == "ready")
        known(started)
