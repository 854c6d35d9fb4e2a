"""A model behind any OpenAI-compatible server, asked many things at once within bounds."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import aiohttp

from ziphius.config.errors import BadInput, in_one_line

T = TypeVar("T")
_MOST_TRIES = 3
_PAUSE_SECONDS = 0.2
_MOST_BYTES = 4 << 20
_SHOWN = 200

Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Endpoint:
    """Where a model answers: ``url`` ends before ``/chat/completions``, as ``.../v1``.

    ``seconds`` bounds one answer with its further tries, ``concurrency`` those under way. ``key``
    is sent as a bearer token and shown nowhere.
    """

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    seconds: float = 60.0
    concurrency: int = 8
    temperature: float = 1.0
    max_tokens: int = 2048

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise BadInput(f"endpoint {self.url!r}: give an address as http://host:port/v1")
        if self.key is not None and not (self.key.isascii() and self.key.isprintable()):
            raise BadInput(
                f"endpoint {self.url}: its key has other characters than a header may have"
            )
        if not self.seconds > 0 or self.concurrency < 1 or self.max_tokens < 1:
            raise BadInput(
                f"endpoint {self.url}: seconds {self.seconds}, concurrency {self.concurrency} and "
                f"max_tokens {self.max_tokens} must be above 0"
            )


class Said(NamedTuple):
    """What came back: text, or the ``problem`` in one line because of which there is none."""

    text: str | None = None
    reasoning: str = ""
    finished: bool = False
    tokens: int = 0
    problem: str = ""


class Client:
    """Asks an endpoint. Any thread may; all of them share its concurrency.

    Busy servers and broken connections are tried again, as long as the answer's time lasts.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self._starting = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._session: aiohttp.ClientSession | None = None
        self._places: asyncio.Semaphore | None = None

    def ask(self, requests: Sequence[tuple[Messages, int]]) -> list[Said]:
        """Return what is said to every (messages, seed), in their order. Nothing is raised."""

        async def all_of_them() -> list[Said]:
            return await asyncio.gather(*(self._one(*request) for request in requests))

        return self._run(all_of_them())

    def close(self) -> None:
        """End the connections and the thread that holds them. Another question opens new ones."""
        with self._starting:
            loop, self._loop = self._loop, None
            if loop is None:
                return
            asyncio.run_coroutine_threadsafe(self._end(), loop).result()
            loop.call_soon_threadsafe(loop.stop)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run work on the client's own loop, from any thread."""
        with self._starting:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=_turn, args=(self._loop,), daemon=True).start()
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        return future.result()

    async def _end(self) -> None:
        """Cancel what is under way, so that nobody waits for it, and close the connections."""
        under_way = asyncio.all_tasks() - {asyncio.current_task()}
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)
        if self._session is not None:
            await self._session.close()
        self._session = self._places = None

    async def _one(self, messages: Messages, seed: int) -> Said:
        endpoint = self.endpoint
        body = {
            "model": endpoint.model,
            "messages": list(messages),
            "temperature": endpoint.temperature,
            "max_tokens": endpoint.max_tokens,
            "seed": seed,
        }
        if self._places is None:
            self._places = asyncio.Semaphore(endpoint.concurrency)
        async with self._places:
            try:
                async with asyncio.timeout(endpoint.seconds):
                    return await self._post(body)
            except TimeoutError:
                problem = f"no answer within {endpoint.seconds:g} s"
            except _Refused as error:
                problem = str(error)
            except (aiohttp.ClientError, OSError) as error:
                problem = f"{type(error).__name__}: {error}".removesuffix(": ")
        if endpoint.key:
            problem = problem.replace(endpoint.key, "***")
        return Said(problem=short(problem))

    async def _post(self, body: dict[str, Any]) -> Said:
        if self._session is None:
            # An answer's own bound is around this.
            self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None))
        key = self.endpoint.key
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        url = self.endpoint.url.rstrip("/") + "/chat/completions"
        for tries in range(1, _MOST_TRIES + 1):
            try:
                async with self._session.post(
                    url, json=body, headers=headers, allow_redirects=False
                ) as reply:
                    data = await reply.content.read(_MOST_BYTES)
                    if reply.status == 200:
                        return _said(await _whole(reply, data))
                    refused = _Refused(f"status {reply.status}: {data.decode('utf-8', 'replace')}")
                if tries == _MOST_TRIES or (reply.status < 500 and reply.status != 429):
                    raise refused
            except aiohttp.ClientConnectionError:
                if tries == _MOST_TRIES:
                    raise
            await asyncio.sleep(_PAUSE_SECONDS * tries)
        raise AssertionError("the last try returns or raises")


class _Refused(Exception):
    """The endpoint answered, but not with a chat completion."""


async def _whole(reply: aiohttp.ClientResponse, data: bytes) -> bytes:
    """Return a body whose first piece has come; raises _Refused for one that is too long."""
    while len(data) < _MOST_BYTES:
        piece = await reply.content.read(_MOST_BYTES - len(data))
        if not piece:
            return data
        data += piece
    raise _Refused(f"its answer is longer than {_MOST_BYTES} bytes")


def _said(data: bytes) -> Said:
    try:
        value = json.loads(data)
        choice = value["choices"][0]
        text, reasoning = choice["message"]["content"], choice["message"].get("reasoning_content")
        tokens = (value.get("usage") or {}).get("completion_tokens") or 0
        finished = choice.get("finish_reason") in ("stop", None)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        raise _Refused(f"no chat completion: {data.decode('utf-8', 'replace')}") from None
    if not isinstance(text, str):
        raise _Refused("a chat completion without text")
    return Said(text, reasoning if isinstance(reasoning, str) else "", finished, int(tokens))


def short(text: str) -> str:
    """Return a text in one line that is not too long to be shown."""
    line = in_one_line(text)
    return line if len(line) <= _SHOWN else line[:_SHOWN] + "..."


def _turn(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()
