"""Streams of events: what is sent when, what a chunk costs, and what is left at the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from typing import Any

import pytest
from starlette.types import Message

from ziphius.serving.sse import PING, EventStream, data

PERIOD = 0.05


class Client:
    """Takes what a stream sends; ``leaves`` ends it."""

    def __init__(self, *, slow: float = 0.0) -> None:
        self.bodies: list[bytes] = []
        self.ended = False
        self.leaves, self.commented = asyncio.Event(), asyncio.Event()
        self.slow, self._taking = slow, False

    async def receive(self) -> Message:
        await self.leaves.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        assert not self._taking, "something is sent while something else is"
        assert not self.ended, "something is sent behind the end"
        if message["type"] != "http.response.body":
            return
        self._taking = True
        if message["body"] == PING:
            self.commented.set()
        await asyncio.sleep(self.slow)
        self._taking = False
        self.ended = not message["more_body"]
        if message["body"]:
            self.bodies.append(message["body"])


async def stream(events: AsyncGenerator[bytes], client: Client, seconds: float = PERIOD) -> None:
    scope: dict[str, Any] = {"noted": type("Noted", (), {})()}
    await EventStream(events, ping_seconds=seconds)(scope, client.receive, client.send)
    assert len(asyncio.all_tasks()) == 1, "a task is left"


async def events(pauses: list[float]) -> AsyncGenerator[bytes]:
    for number, pause in enumerate(pauses):
        await asyncio.sleep(pause)
        yield data(number)


def run(work: Coroutine[Any, Any, Any]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await work

    asyncio.run(bounded())


def test_a_comment_comes_where_nothing_else_does() -> None:
    async def check() -> None:
        client = Client()
        await stream(events([0, 3.5 * PERIOD, 0, 1.5 * PERIOD, 0]), client)
        assert client.ended
        told = [body for body in client.bodies if body != PING]
        assert told == [data(number) for number in range(5)]
        places = [place for place, body in enumerate(client.bodies) if body == PING]
        # Behind the first event and behind the third; a machine that is busy may send fewer.
        assert 2 <= len(places) <= 4
        assert client.bodies[0] == data(0)
        assert client.bodies[-1] == data(4)
        between = client.bodies[client.bodies.index(data(1)) : client.bodies.index(data(2))]
        assert between == [data(1)]

    run(check())


def test_none_comes_where_there_is_no_pause() -> None:
    async def check() -> None:
        client = Client()
        await stream(events([0.03] * 40), client, seconds=0.5)
        assert client.bodies == [data(number) for number in range(40)]

    run(check())


def test_none_comes_while_the_client_takes_nothing() -> None:
    """What it does not read would only be more; and no event is cut in two by a comment."""

    async def check() -> None:
        client = Client(slow=2.5 * PERIOD)
        await stream(events([0, 0, 0]), client)
        assert client.bodies == [data(0), data(1), data(2)]

    run(check())


def test_an_event_that_comes_while_a_comment_is_sent_waits_for_it() -> None:
    async def check() -> None:
        client = Client(slow=PERIOD / 2)

        async def made() -> AsyncGenerator[bytes]:
            yield data(0)
            await client.commented.wait()
            yield data(1)

        await stream(made(), client)
        assert client.bodies == [data(0), PING, data(1)]

    run(check())


def test_a_chunk_costs_no_task_and_no_timer() -> None:
    async def check() -> None:
        made: list[int] = []
        loop = asyncio.get_running_loop()

        def factory(loop: Any, work: Any, **how: Any) -> asyncio.Task[Any]:
            made.append(1)
            return asyncio.Task(work, loop=loop, **how)

        loop.set_task_factory(factory)
        call_at = loop.call_at
        loop.call_at = lambda *given, **how: (made.append(1), call_at(*given, **how))[1]  # type: ignore
        await stream(events([0] * 500), Client())
        assert len(made) < 10

    run(check())


@pytest.mark.parametrize("pauses", [[9.0], [0, 9.0], [0.001] * 10_000])
def test_a_client_that_leaves_ends_what_makes_the_events(pauses: list[float]) -> None:
    async def check() -> None:
        client, closed = Client(), []

        async def made() -> AsyncGenerator[bytes]:
            try:
                async for body in events(pauses):
                    yield body
            finally:
                closed.append(1)

        asyncio.get_running_loop().call_later(1.5 * PERIOD, client.leaves.set)
        await stream(made(), client)
        assert closed == [1]
        assert not client.ended

    run(check())


def test_an_error_of_the_events_is_raised() -> None:
    async def check() -> None:
        async def made() -> AsyncGenerator[bytes]:
            yield data(0)
            raise RuntimeError("a mistake")

        with pytest.raises(RuntimeError, match="a mistake"):
            await stream(made(), Client())
        await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) == 1

    run(check())
