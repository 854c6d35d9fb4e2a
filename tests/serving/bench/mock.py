"""A server that answers as it is told to, rightly or not."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

DONE = b"data: [DONE]\n\n"
WORDS = ("all", "whales", "dive", "deep", "and", "long")


@dataclass
class Reply:
    """An answer: pieces of bytes, each some seconds after the one before.

    ``end`` says how the connection ends: ``well``, ``cut`` in the middle of the body, ``hang``.
    """

    pieces: Sequence[bytes | tuple[float, bytes]] = ()
    status: int = 200
    headers: dict[str, str] = field(default_factory=lambda: {"Content-Type": "text/event-stream"})
    end: str = "well"


@dataclass(frozen=True)
class Asked:
    """What the server was asked: the number of the request among those for completions."""

    number: int
    path: str
    headers: dict[str, str]
    body: dict[str, Any]


def event(payload: Any) -> bytes:
    return b"data: " + json.dumps(payload).encode() + b"\n\n"


def chunk(text: str | None, *, chat: bool = True, finish: str | None = None, **more: Any) -> bytes:
    """Return a chunk with one choice."""
    said = {"delta": {"content": text} if text is not None else {}} if chat else {"text": text}
    return event({"choices": [{"index": 0, **said, "finish_reason": finish}], **more})


def usage(tokens: int, prompt: int = 5, **more: Any) -> dict[str, Any]:
    counts = {"prompt_tokens": prompt, "completion_tokens": tokens}
    return {"usage": {**counts, "total_tokens": prompt + tokens, **more}}


def good(
    texts: Sequence[str] = WORDS, *, chat: bool = True, gap: float = 0.0, **more: Any
) -> Reply:
    """Answer rightly: a chunk a token, the end, the usage, the mark."""
    pieces: list[bytes | tuple[float, bytes]] = [(gap, chunk(f"{t} ", chat=chat)) for t in texts]
    tail = chunk("", chat=chat, finish="stop") + event({"choices": [], **usage(len(texts))}) + DONE
    return Reply([*pieces, tail], **more)


def failure(status: int, message: str = "no", **headers: str) -> Reply:
    """Refuse with a status, in OpenAI's shape."""
    body = json.dumps({"error": {"message": message, "type": "x", "param": None, "code": None}})
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply([body.encode()], status, {"Content-Type": "application/json", **named})


Behaviour = Callable[[Asked], Reply]


class Mock:
    """Serves on a free port of loopback, on a thread of its own, in ``with``.

    ``reply`` answers chats and completions; ``tokens`` is the length of a word in ``/tokenize``,
    which is missing without it.
    """

    def __init__(
        self, reply: Behaviour = lambda asked: good(), *, tokens: int | None = None,
        models: Sequence[str] = ("mock",), key: str | None = None,
    ) -> None:  # fmt: skip
        self.reply, self.tokens, self.models, self.key = reply, tokens, models, key
        self.asked: list[Asked] = []
        self.running = self.most = 0

    def __enter__(self) -> Mock:
        ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(ready)))
        self._thread.start()
        assert ready.wait(10)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def _serve(self, ready: threading.Event) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        await self._stop.wait()
        server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while await self._answer(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        path = head[0].split(" ")[1]
        headers = {n.lower(): v for n, _, v in (line.partition(": ") for line in head[1:] if line)}
        body = json.loads(await reader.readexactly(int(headers.get("content-length", 0))) or "{}")
        if self.key is not None and headers.get("authorization") != f"Bearer {self.key}":
            return await self._send(writer, failure(401, "who are you?"))
        if path == "/v1/models":
            data = [{"id": name, "object": "model", "max_model_len": 99} for name in self.models]
            return await self._send(writer, _json({"object": "list", "data": data}))
        if path == "/tokenize" and self.tokens:
            count = len(body["prompt"].split()) * self.tokens
            return await self._send(writer, _json({"tokens": list(range(1, count + 1))}))
        if path not in ("/v1/chat/completions", "/v1/completions"):
            return await self._send(writer, failure(404))
        asked = Asked(len(self.asked), path, headers, body)
        self.asked.append(asked)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            return await self._send(writer, self.reply(asked))
        finally:
            self.running -= 1

    async def _send(self, writer: asyncio.StreamWriter, reply: Reply) -> bool:
        lines = [f"HTTP/1.1 {reply.status} X", "Transfer-Encoding: chunked"]
        lines += [f"{name}: {value}" for name, value in reply.headers.items()]
        writer.write("\r\n".join([*lines, "", ""]).encode())
        for piece in reply.pieces:
            seconds, data = piece if isinstance(piece, tuple) else (0.0, piece)
            if seconds:
                await asyncio.sleep(seconds)
            writer.write(b"%x\r\n%s\r\n" % (len(data), data))
            await writer.drain()
        if reply.end == "hang":
            await self._stop.wait()
        if reply.end != "well":
            return False
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True


def _json(payload: Any) -> Reply:
    return Reply([json.dumps(payload).encode()], 200, {"Content-Type": "application/json"})
