"""The engine on a thread of its own, for many consumers on an event loop."""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable
from collections.abc import Sequence as List
from contextlib import suppress
from typing import Any, TypeVar

from ziphius.config.errors import ZiphiusError, in_one_line
from ziphius.inference.engine import Engine
from ziphius.inference.outputs import Delta, RequestOutput
from ziphius.inference.params import SamplingParams
from ziphius.inference.request import Request
from ziphius.inference.sequence import QueueFull
from ziphius.inference.stream import DeltaStream

T = TypeVar("T")


class EngineStopped(ZiphiusError):
    """The engine has failed or was closed: no request is answered any more."""


class AsyncEngine:
    """Answers requests of an event loop with an ``Engine`` that belongs to one worker thread.

    A consumer that leaves ends its request. A request that fails ends alone, with the error in its
    last delta. Where the engine itself fails, every request ends with ``EngineStopped``, and so
    does every later one.

    What a slow consumer has not taken is kept as one delta an answer, so it holds nobody up and
    needs no more memory than the answer. Requests that wait are bounded by the engine's options.
    """

    def __init__(self, engine: Engine, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine, self._clock = engine, clock
        self._changed = threading.Condition()
        self._inbox: deque[Callable[[], None]] = deque()  # each is called once, between two steps
        # The worker's. Not held: a stream that nobody holds has no consumer.
        self._streams: dict[Request, weakref.ref[Stream]] = {}
        self._stopped: str | None = None  # why
        self._closing = self._busy = False
        self.last_progress = clock()
        self.steps = 0
        self._thread = threading.Thread(target=self._run, name="ziphius-engine", daemon=True)
        self._thread.start()

    # --- for the event loop -----------------------------------------------------------------------

    async def generate(
        self, prompt_ids: List[int], params: SamplingParams, **options: Any
    ) -> AsyncIterator[Delta]:
        """Yield what every step adds to the answers of one prompt, until they have ended.

        ``options`` are those of ``Engine.add``, whose errors are raised here.
        """
        async with await self.submit(prompt_ids, params, **options) as stream:
            async for delta in stream:
                yield delta

    async def submit(self, prompt_ids: List[int], params: SamplingParams, **options: Any) -> Stream:
        """Return the stream of a request that was taken; raise what ``Engine.add`` raises."""
        stream = Stream(self, asyncio.get_running_loop())
        limit = self._engine.options.max_waiting
        if len(self._inbox) >= limit:
            raise QueueFull("requests", len(self._inbox), limit)
        self._post(lambda: self._add(stream, prompt_ids, params, options))
        try:
            await stream.taken()
        except BaseException:
            stream.close()
            raise
        return stream

    async def call(self, function: Callable[[Engine], T]) -> T:
        """Return what a function makes of the engine, called on its thread between two steps."""
        loop = asyncio.get_running_loop()
        result: asyncio.Future[T] = loop.create_future()

        def tell(set_result: Callable[[Any], None], value: Any) -> None:
            if not result.done():
                set_result(value)

        def run() -> None:
            with suppress(RuntimeError):  # the loop is gone
                if self._stopped is not None:
                    error: Exception = EngineStopped(self._stopped)
                    loop.call_soon_threadsafe(tell, result.set_exception, error)
                    return
                try:
                    value = function(self._engine)
                except Exception as raised:
                    loop.call_soon_threadsafe(tell, result.set_exception, raised)
                else:
                    loop.call_soon_threadsafe(tell, result.set_result, value)

        self._post(run)
        return await result

    # --- for anybody ------------------------------------------------------------------------------

    @property
    def stopped(self) -> str | None:
        """Why nothing is answered any more, in one line; None while all is well."""
        return self._stopped

    @property
    def stalled(self) -> float:
        """Seconds since the last step ended, while there is something to do; else 0."""
        return self._clock() - self.last_progress if self._busy else 0.0

    def close(self, timeout: float = 30.0) -> None:
        """End every request and the thread. Safe to repeat.

        Raises ZiphiusError if the step that is being computed takes longer than ``timeout``.
        """
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise ZiphiusError(
                f"the engine is still computing {timeout:g} s after it was told to stop: "
                "end the process"
            )

    def _post(self, command: Callable[[], None]) -> None:
        with self._changed:
            if self._stopped is None:
                self._inbox.append(command)
                self._changed.notify()
                return
        command()  # the thread has ended: the command finds out why

    def _cancel(self, stream: Stream) -> None:
        self._post(lambda: self._end(stream.request))

    # --- the worker -------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    while not self._inbox and self._engine.idle and not self._closing:
                        self._busy = False
                        self._changed.wait()
                    if not self._busy:
                        self.last_progress = self._clock()
                    self._busy = True
                    if self._closing:
                        break
                for _ in range(len(self._inbox)):
                    self._inbox.popleft()()  # no name keeps the command, nor the stream in it
                if not self._engine.idle:
                    self._deliver(self._engine.step())
                    self.steps += 1
                self.last_progress = self._clock()
            self._stop("the engine was closed")
        except BaseException as error:
            said = in_one_line(error)
            self._stop(f"the engine failed: {type(error).__name__}: {said}: restart it")

    def _add(
        self, stream: Stream, prompt_ids: List[int], params: SamplingParams, options: dict[str, Any]
    ) -> None:
        if self._stopped is not None:
            stream.put([], error=EngineStopped(self._stopped))
            return
        if stream.closed:
            return
        try:
            request = self._engine.add(prompt_ids, params, **options)
        except Exception as error:
            stream.put([], error=error)
            return
        self._streams[request] = weakref.ref(stream)
        stream.request = request
        stream.put([])

    def _end(self, request: Request | None) -> None:
        if request is not None and self._streams.pop(request, None) is not None:
            self._engine.cancel(request)

    def _deliver(self, touched: List[Request]) -> None:
        for request in touched:
            if request not in self._streams:
                continue
            stream = self._streams[request]()
            deltas = [answer.pull() for answer in request.answers]
            output = request.result() if request.finished else None
            heard = stream is not None and stream.put(deltas, output=output)
            if output is not None:
                del self._streams[request]
            elif not heard:
                self._end(request)

    def _stop(self, reason: str) -> None:
        """End all requests, those not taken yet too. Nothing is computed from here on."""
        streams, self._streams = self._streams, {}
        for request in streams:
            with suppress(Exception):  # an engine that has failed may fail at this too
                self._engine.cancel(request)
        with self._changed:
            self._stopped = reason
            self._busy = False
        for held in streams.values():
            if (stream := held()) is not None:
                stream.put([], error=EngineStopped(reason))
        while self._inbox:
            self._inbox.popleft()()


class Stream(DeltaStream):
    """The answers of one request on an event loop: an asynchronous iterator of deltas.

    ``output`` is everything, once all answers have ended. One that nobody holds any more ends with
    the next step.
    """

    def __init__(self, engine: AsyncEngine, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self.request: Request | None = None
        self.output: RequestOutput | None = None
        self._engine, self._loop = engine, loop

    def _leave(self) -> None:
        self._engine._cancel(self)

    def _wake(self) -> None:
        self._loop.call_soon_threadsafe(self._news.set)

    def put(
        self,
        deltas: List[Delta],
        *,
        output: RequestOutput | None = None,
        error: Exception | None = None,
    ) -> bool:
        """Add what the worker has and wake the consumer; return False if its loop is gone."""
        self.output = output
        news = [delta for delta in deltas if delta.token_ids or delta.text or delta.finish_reason]
        try:
            self.fill(news, taken=self.request is not None, ended=output is not None, error=error)
        except RuntimeError:
            return False
        return True
