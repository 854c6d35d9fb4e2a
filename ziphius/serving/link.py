"""The server's end of the line to one engine process: requests in, their streams out.

Everything here is on the event loop. What a slow client has not taken is kept as one delta an
answer, so it holds nobody up and needs no more memory than the answer.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as List
from dataclasses import dataclass
from typing import cast

import msgspec
import zmq
import zmq.asyncio

from ziphius.config.errors import BadInput, ZiphiusError
from ziphius.inference.errors import RequestError
from ziphius.inference.outputs import Delta
from ziphius.inference.params import SamplingParams
from ziphius.inference.stream import DeltaStream
from ziphius.serving.wire import (
    Add,
    Beat,
    Cancel,
    Command,
    End,
    Failed,
    Forget,
    ModelInfo,
    Numbers,
    Part,
    Ready,
    Refused,
    Report,
    Stop,
    Taken,
    pack_params,
)

LOG = logging.getLogger("ziphius.serving")


class EngineGone(ZiphiusError):
    """The engine has failed, was stopped, or is not loaded yet: nothing is answered now."""


class Busy(ZiphiusError):
    """There is no room for another request now. ``seconds``: when to try again."""

    def __init__(self, message: str, seconds: int) -> None:
        super().__init__(message)
        self.seconds = seconds


@dataclass(frozen=True, kw_only=True)
class Job:
    """A request as the engine takes it; ``seconds`` is how long it may take, waiting included."""

    prompt_ids: List[int]
    params: SamplingParams
    priority: int = 0
    salt: bytes = b""
    seconds: float | None = None
    score_only: bool = False


class Stream(DeltaStream):
    """The answers of one request. ``end`` is there once all of them have ended.

    Raises what the request is refused with, and EngineGone where the engine ends before the answer.
    """

    def __init__(self, link: Link, number: int, job: Job) -> None:
        super().__init__()
        self.number, self.job = number, job
        self.end: End | None = None
        self.began = self.last = time.monotonic()
        self.first: float | None = None  # when the first token came
        self.tokens = self.ended = 0  # tokens of all answers, and answers that have ended
        self._link = link

    def _leave(self) -> None:
        self._link._leave(self)

    def put(self, part: Part) -> None:
        """Add what a step has given."""
        now = time.monotonic()
        self.first, self.last = self.first or now, now
        self.tokens += len(part.token_ids)
        self.ended += part.finish_reason is not None
        delta = Delta(
            part.index, part.text, part.token_ids, part.offsets, part.logprobs,
            part.finish_reason, part.stop_reason, part.error,
        )  # fmt: skip
        self.fill([delta])

    def finish(self, end: End | None = None, error: Exception | None = None) -> None:
        """Note that nothing more will come."""
        self.end = end
        self.fill(ended=True, error=error)


class Link:
    """One engine process, from its start to its end."""

    def __init__(self, socket: zmq.asyncio.Socket, *, clock: Callable[[], float] = time.monotonic):
        self.model: ModelInfo | None = None
        self.numbers = Numbers()
        self.failed: Failed | None = None
        self.load_seconds = 0.0
        self.on_part: Callable[[Stream, Part], None] = lambda stream, part: None
        self.on_end: Callable[[Stream], None] = lambda stream: None
        self.on_leave: Callable[[Stream], None] = lambda stream: None
        # The server's own end of it; and a request's first step, after so many seconds.
        self.on_loss: Callable[[Stream], None] = lambda stream: None
        self.on_begin: Callable[[Stream, float], None] = lambda stream, seconds: None
        self._socket, self._clock = socket, clock
        self._last_heard = clock()
        self._streams: dict[int, Stream] = {}
        self._numbered = 0
        self._waiting_tokens = 0  # prompts of requests without a first token
        self._gone: str | None = None
        self._unsent: deque[Cancel] = deque()  # for which the line had no room
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Report)
        self._listening = asyncio.create_task(self._listen(), name="engine-link")

    @property
    def open(self) -> int:
        """Answers that somebody waits for: of every request its ``n``."""
        return sum(stream.job.params.n for stream in self._streams.values())

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens of the requests that have no token yet."""
        return self._waiting_tokens

    @property
    def silent(self) -> float:
        """Seconds since the engine's last sign of life; 0 while it loads."""
        return self._clock() - self._last_heard if self.model is not None else 0.0

    @property
    def gone(self) -> str | None:
        """Why nothing is answered any more; None while all is well."""
        return self._gone

    def submit(self, job: Job) -> Stream:
        """Return a request's stream. Raises EngineGone and Busy where it can't be taken.

        Raises BadInput for what no message can hold.
        """
        if self._gone is not None or self.model is None:
            raise EngineGone(self._gone or "the model is being loaded: try again soon")
        self._numbered += 1
        stream = Stream(self, self._numbered, job)
        try:
            sent = self._send(_add(stream))
        except (OverflowError, UnicodeEncodeError, RecursionError):
            raise BadInput(
                "the request holds a number of more than 64 bits, a text that is no Unicode, or "
                "objects too deep in one another"
            ) from None
        if not sent:
            raise Busy("the engine takes no more requests at the moment: try again later", 5)
        self._streams[stream.number] = stream
        self._waiting_tokens += len(job.prompt_ids)
        return stream

    def forget(self) -> None:
        """Drop the cached prefixes that nobody uses."""
        self._send(Forget())

    def stop(self) -> None:
        """Ask the engine's process to end."""
        self._send(Stop())

    def end_all(self, reason: str) -> None:
        """End every request with EngineGone; the engine is told to forget them."""
        for stream in list(self._streams.values()):
            self._drop(stream)
            self._cancel(stream)
            stream.finish(error=EngineGone(reason))
            self.on_loss(stream)

    def close(self, reason: str) -> None:
        """Take nothing more, and end every request with EngineGone. Safe to repeat."""
        if self._gone is None:
            self._gone = reason
            self._listening.cancel()
            for stream in list(self._streams.values()):
                self._drop(stream)
                stream.finish(error=EngineGone(reason))
                self.on_loss(stream)
            self._socket.close(linger=0)

    # --- the line ---------------------------------------------------------------------------------

    def _send(self, command: Command) -> bool:
        """Send without waiting; return whether the line had room, which a frozen engine's has not
        for ever.
        """
        if self._gone is not None:
            return False
        # With this flag the future is done at once, and the order of sends is that of the calls.
        sent = cast(
            "asyncio.Future[object]", self._socket.send(self._encoder.encode(command), zmq.NOBLOCK)
        )
        return sent.exception() is None

    async def _listen(self) -> None:
        try:
            while True:
                self._hear(self._decoder.decode(await self._socket.recv()))
        except Exception as error:  # a deaf link answers nobody: the engine is started again
            if self._gone is None:
                LOG.exception("the line to the engine broke")
                self.close(f"the line to the engine broke: {type(error).__name__}")

    def _cancel(self, stream: Stream) -> None:
        """Tell the engine to forget a request, now or when the line has room."""
        self._unsent.append(Cancel(stream.number))
        self._send_again()

    def _send_again(self) -> None:
        while self._unsent and self._send(self._unsent[0]):
            self._unsent.popleft()

    def _hear(self, report: Report) -> None:
        self._last_heard = self._clock()
        self._send_again()
        if isinstance(report, Beat):
            self.numbers = report.numbers
            began = time.monotonic() - report.ago
            for number in report.begun:
                if (stream := self._streams.get(number)) is not None:
                    self.on_begin(stream, max(0.0, began - stream.began))
            for part in report.parts:
                if (stream := self._streams.get(part.id)) is not None:
                    if stream.first is None:
                        self._waiting_tokens -= len(stream.job.prompt_ids)
                    self.on_part(stream, part)
                    stream.put(part)
            for end in report.ends:
                if (stream := self._streams.get(end.id)) is not None:
                    self._drop(stream)
                    stream.finish(end)
                    self.on_end(stream)
        elif isinstance(report, Refused):
            if (stream := self._streams.get(report.id)) is not None:
                self._drop(stream)
                stream.finish(error=_refusal(report))
        elif isinstance(report, Taken):
            if (stream := self._streams.get(report.id)) is not None:
                stream.fill(taken=True)
        elif isinstance(report, Ready):
            self.model, self.load_seconds = report.model, report.seconds
        else:
            self.failed = report
            self.close("the engine failed")  # clients need not know at what

    def _drop(self, stream: Stream) -> None:
        if self._streams.pop(stream.number, None) is not None and stream.first is None:
            self._waiting_tokens -= len(stream.job.prompt_ids)

    def _leave(self, stream: Stream) -> None:
        if stream.number in self._streams:
            self._drop(stream)
            self._cancel(stream)
            self.on_leave(stream)


def _add(stream: Stream) -> Add:
    job = stream.job
    return Add(
        id=stream.number,
        prompt_ids=list(job.prompt_ids),
        params=pack_params(job.params),
        priority=job.priority,
        salt=job.salt,
        seconds=job.seconds,
        score_only=job.score_only,
    )


def _refusal(report: Refused) -> Exception:
    if report.kind == "bad_input":
        return BadInput(report.message)
    return Busy(report.message, 1) if report.kind == "full" else RequestError(report.message)
