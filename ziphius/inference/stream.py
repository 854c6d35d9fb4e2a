"""What comes of one request, for a consumer on an event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from ziphius.inference.outputs import Delta


class DeltaStream:
    """An asynchronous iterator of deltas. Leave it by ``close``, or use it as a context manager.

    What its consumer has not taken is one delta an answer: a slow consumer holds nobody up and
    needs no more memory than the answer. It is iterated on one event loop; it may be filled from
    another thread by whoever says how that loop wakes (``_wake``).
    """

    def __init__(self) -> None:
        self.closed = False
        self._lock = threading.Lock()
        self._news = asyncio.Event()
        self._deltas: dict[int, Delta] = {}
        self._taken = self._ended = False
        self._error: Exception | None = None

    async def taken(self) -> None:
        """Return when the engine has the request. Raises what it is refused with."""
        while not self._taken:
            if self._error is not None:
                raise self._error
            await self._next_news()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        while True:
            with self._lock:
                if self.closed:
                    raise StopAsyncIteration
                for index in sorted(self._deltas):
                    return self._deltas.pop(index)
                if self._error is not None:
                    raise self._error
                if self._ended:
                    raise StopAsyncIteration
            await self._next_news()

    async def _next_news(self) -> None:
        # Only the loop's own thread sets the event, so none is missed after a look without any.
        self._news.clear()
        await self._news.wait()

    def close(self) -> None:
        """End the request, unless it has ended."""
        if not self.closed:
            self.closed = True
            self._news.set()
            if not self._ended:
                self._leave()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # --- for whoever fills it ---------------------------------------------------------------------

    def fill(
        self,
        deltas: Sequence[Delta] = (),
        *,
        taken: bool = False,
        ended: bool = False,
        error: Exception | None = None,
    ) -> None:
        """Add what is new and wake the consumer. An ``error`` ends it behind what came before."""
        with self._lock:
            for delta in deltas:
                if delta.index in self._deltas:
                    self._deltas[delta.index].add(delta)
                else:
                    self._deltas[delta.index] = delta
            self._taken = self._taken or taken
            self._ended = self._ended or ended or error is not None
            self._error = self._error or error
        self._wake()

    def _wake(self) -> None:
        """Tell the loop that there is something new."""
        self._news.set()

    def _leave(self) -> None:
        """Tell the engine that nobody waits any more."""
        raise NotImplementedError
