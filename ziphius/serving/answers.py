"""From a request to the pieces of its answers, whatever the route: what all of them share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from ziphius.inference.errors import RequestError
from ziphius.inference.logprobs import Scored
from ziphius.inference.outputs import Delta
from ziphius.serving.engine import EngineProcess
from ziphius.serving.errors import TimedOut
from ziphius.serving.gate import Noted
from ziphius.serving.link import Job, Stream
from ziphius.serving.parse import Parser, Piece
from ziphius.serving.sse import until_gone


@dataclass
class Event:
    """What has been added to one answer: tokens, their text in pieces, log-probabilities."""

    index: int
    pieces: list[Piece]
    token_ids: list[int]
    offsets: list[int]
    logprobs: list[Scored]
    finish_reason: str | None = None  # OpenAI's: stop, length or tool_calls
    stop_reason: str | int | None = None


@dataclass
class Usage:
    """Tokens of a request so far."""

    prompt: int
    completion: int = 0
    reasoning: int = 0
    cached: int = 0
    drafted: int = 0
    accepted: int = 0

    def openai(self) -> dict[str, Any]:
        """Return OpenAI's object; drafts are there as predicted tokens."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
            "completion_tokens_details": {
                "reasoning_tokens": self.reasoning,
                "accepted_prediction_tokens": self.accepted,
                "rejected_prediction_tokens": self.drafted - self.accepted,
            },
            # DeepSeek's own.
            "prompt_cache_hit_tokens": self.cached,
            "prompt_cache_miss_tokens": self.prompt - self.cached,
        }


@dataclass
class Collected:
    """One whole answer."""

    index: int
    pieces: list[Piece] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    logprobs: list[Scored] = field(default_factory=list)
    finish_reason: str = "stop"
    stop_reason: str | int | None = None

    def add(self, event: Event) -> None:
        """Take in what has been added."""
        self.pieces += event.pieces
        self.token_ids += event.token_ids
        self.offsets += event.offsets
        self.logprobs += event.logprobs
        if event.finish_reason is not None:
            self.finish_reason, self.stop_reason = event.finish_reason, event.stop_reason


class Answering:
    """The answers of a request that the engine has taken: an asynchronous iterator of events.

    Raises RequestError where an answer breaks off, TimedOut where its time was up, and EngineGone.
    Close it, or use it as a context manager.
    """

    def __init__(self, stream: Stream, parsers: list[Parser | None], noted: Noted) -> None:
        self._stream, self._parsers, self._noted = stream, parsers, noted
        self.usage = Usage(len(stream.job.prompt_ids))
        noted.prompt_tokens = self.usage.prompt
        noted.closing.append(self.close)

    @classmethod
    async def begin(
        cls, engine: EngineProcess, job: Job, parsers: list[Parser | None], noted: Noted
    ) -> Answering:
        """Give a job to the engine, and return when it is taken. Raises what it is refused with."""
        (answering,) = await begin_all(engine, [(job, parsers)], noted)
        return answering

    @property
    def prompt_logprobs(self) -> list[Scored | None] | None:
        """Those of the prompt, at the end, where they were asked for."""
        return self._stream.end.prompt_logprobs if self._stream.end is not None else None

    def __aiter__(self) -> AsyncIterator[Event]:
        return self._events()

    async def _events(self) -> AsyncIterator[Event]:
        async for delta in self._stream:
            if delta.error is None:
                yield self._event(delta)
                continue
            self._noted.finish = "error"
            if delta.token_ids or delta.text:  # what came before it broke off
                yield self._event(replace(delta, finish_reason=None))
            raise self._failure(delta.error)
        self._end()

    def _failure(self, reason: str) -> Exception:
        job, stream = self._stream.job, self._stream
        if job.seconds is not None and stream.last - stream.began >= job.seconds:
            return TimedOut(f"the answer took longer than {job.seconds:g} s: ask for fewer tokens")
        return RequestError(reason)

    def _event(self, delta: Delta) -> Event:
        parser = self._parsers[delta.index]
        finish = delta.finish_reason
        self.usage.completion += len(delta.token_ids)
        if parser is None:
            pieces = [Piece("content", delta.text)] if delta.text else []
        else:
            before = parser.reasoning_tokens
            pieces = list(parser.push(delta.text, delta.token_ids, delta.offsets))
            if finish is not None:
                pieces += parser.finish()
                finish = "tool_calls" if parser.called and finish == "stop" else finish
            self.usage.reasoning += parser.reasoning_tokens - before
        if finish is not None:
            self._noted.finish = finish
            self._noted.completion_tokens = self.usage.completion
        return Event(
            delta.index, pieces, delta.token_ids, delta.offsets, delta.logprobs,
            finish, delta.stop_reason,
        )  # fmt: skip

    def _end(self) -> None:
        end = self._stream.end
        if end is not None:
            self.usage.cached = end.cached_tokens
            self.usage.drafted, self.usage.accepted = end.drafted, end.accepted
        self._noted.completion_tokens = self.usage.completion
        stream = self._stream
        if stream.first is not None:
            self._noted.times = {"began": stream.began, "first": stream.first, "last": stream.last}

    async def collect(self) -> list[Collected]:
        """Return all answers, whole, in the order of their index."""
        whole = [Collected(index) for index in range(len(self._parsers))]
        async for event in self:
            whole[event.index].add(event)
        return whole

    def close(self) -> None:
        """End the request, unless it has ended."""
        self._stream.close()

    async def __aenter__(self) -> Answering:
        return self

    async def __aexit__(self, *raised: object) -> None:
        self.close()


async def begin_all(
    engine: EngineProcess, jobs: list[tuple[Job, list[Parser | None]]], noted: Noted
) -> list[Answering]:
    """Begin several jobs: all of them, or none.

    Raises what they are refused with, and ClientGone.
    """
    streams = engine.submit_all([job for job, _ in jobs])
    begun = [Answering(*both, noted) for both in zip(streams, (p for _, p in jobs), strict=True)]
    try:
        if noted.receive is None:
            await _all_taken(streams)
        else:  # a frozen engine takes none: who leaves meanwhile is let go
            await until_gone(noted.receive, _all_taken(streams))
    except BaseException:
        for answering in begun:
            answering.close()
        raise
    noted.prompt_tokens = sum(answering.usage.prompt for answering in begun)
    return begun


async def _all_taken(streams: list[Stream]) -> None:
    for stream in streams:
        await stream.taken()


async def merged(several: list[Answering]) -> AsyncIterator[tuple[int, Event]]:
    """Yield (place, event) of several as they come; one that fails ends all."""
    queue: asyncio.Queue[tuple[int, Event | None, BaseException | None]] = asyncio.Queue(maxsize=1)

    async def read(place: int, answering: Answering) -> None:
        try:
            async for event in answering:
                await queue.put((place, event, None))
            await queue.put((place, None, None))
        except Exception as error:
            await queue.put((place, None, error))

    readers = [asyncio.create_task(read(*one)) for one in enumerate(several)]
    try:
        left = len(readers)
        while left:
            place, event, error = await queue.get()
            if error is not None:
                raise error
            if event is None:
                left -= 1
            else:
                yield place, event
    finally:
        for reader in readers:
            reader.cancel()
        for reader in readers:
            with suppress(asyncio.CancelledError):
                await reader
