"""Answers that take their time: streams of events, and what a client's leaving ends."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Coroutine, Mapping
from typing import Any, TypeVar

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")

PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"


class ClientGone(Exception):
    """The client has left before it had its answer."""


def data(body: Any) -> bytes:
    """Return one event without a name."""
    return b"data: " + orjson.dumps(body) + b"\n\n"


def event(name: str, body: Any) -> bytes:
    """Return one event with a name."""
    return b"event: " + name.encode() + b"\ndata: " + orjson.dumps(body) + b"\n\n"


async def until_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Return what ``work`` returns. Where the client leaves first, cancel it, raise ClientGone."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_leaves(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        tasks: set[asyncio.Future[Any]] = {working, leaving}
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)  # what they hold is given back before anybody goes on
        for task in tasks:
            if not task.cancelled():
                task.exception()  # seen: it is of no more interest


async def _leaves(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends events as they come, a comment where there are none for ``ping_seconds``.

    ``events`` is closed when the client leaves, whatever it waits for.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes],
        *,
        ping_seconds: float,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._events, self._ping_seconds = events, ping_seconds
        self.status_code, self.background = 200, None
        quiet = {"cache-control": "no-store", "x-accel-buffering": "no"}
        self.init_headers({**quiet, **(headers or {})})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything."""
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        try:
            await until_gone(receive, self._send_events(send))
        except ClientGone:
            scope["noted"].finish = "client gone"

    async def _send_events(self, send: Send) -> None:
        async with contextlib.aclosing(self._events), _Pinged(send, self._ping_seconds) as line:
            async for body in self._events:
                await line.send(body)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class _Pinged:
    """Sends bodies one after another, and a comment after every ``seconds`` without one.

    One task and one timer a stream look at when something was last sent: a chunk costs neither.
    """

    def __init__(self, send: Send, seconds: float) -> None:
        self._send, self._seconds = send, seconds
        self._now = asyncio.get_running_loop().time
        self._last = self._now()
        self._line = asyncio.Lock()

    async def send(self, body: bytes) -> None:
        """Send a body, once the one before it is sent."""
        async with self._line:
            await self._send({"type": "http.response.body", "body": body, "more_body": True})
            self._last = self._now()

    async def _watch(self) -> None:
        while True:
            left = self._last + self._seconds - self._now()
            # An event that waits for its client needs no comment behind it.
            if left <= 0 and not self._line.locked():
                await self.send(PING)
            await asyncio.sleep(left if left > 0 else self._seconds)

    async def __aenter__(self) -> _Pinged:
        self._watching = asyncio.create_task(self._watch(), name="pings")
        return self

    async def __aexit__(self, *raised: object) -> None:
        self._watching.cancel()
        await asyncio.wait({self._watching})
        if not self._watching.cancelled():
            self._watching.exception()  # seen: the events' own sends meet it too
