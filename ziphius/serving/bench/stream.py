"""One streamed answer, read from the server's events."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

# What a server may say at the end of an answer; ``abort`` or ``error`` say that it is none.
FINISH_REASONS = ("stop", "length", "tool_calls", "content_filter", "function_call")
_DONE = b"[DONE]"
_LONGEST = 200  # characters of a server's message


class Piece(NamedTuple):
    """A chunk with something in it: when it came, and the server's count of tokens by then."""

    at: float
    tokens: int | None


class Fault(NamedTuple):
    """Why a request gave no answer that can be used: a kind to count by, and a message."""

    kind: str
    message: str


class Reader:
    """Reads the events of one answer, however the network cuts them.

    ``pieces`` are the chunks that brought text, ``text`` the answer with reasoning and tool calls,
    ``fault`` the first thing that a server must not send.
    """

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.finish_reason: str | None = None
        self.finished_at: float | None = None
        self.usage: dict[str, Any] = {}
        self.done = False
        self.fault: Fault | None = None
        self._parts: dict[str, list[str]] = {"reasoning": [], "content": [], "tools": []}
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, at: float, data: bytes) -> None:
        """Read bytes that came at a time in seconds."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                event, self._data = b"\n".join(self._data), []
                self._event(at, event)

    def end(self) -> None:
        """Read what the connection's end leaves: half an event is none, but for the last mark."""
        if _DONE in (*self._data, self._rest.removeprefix(b"data:").strip()):
            self.done = True

    @property
    def text(self) -> str:
        """The answer: reasoning, content and tool calls, each in one piece."""
        return "\0".join("".join(parts) for parts in self._parts.values()).strip("\0")

    def _event(self, at: float, event: bytes) -> None:
        if self.fault is not None:
            return
        if event.strip() == _DONE:
            self.done = True
            return
        try:
            chunk = json.loads(event)
        except ValueError:
            self.fault = Fault("malformed", f"an event is no JSON: {one_line(event)}")
            return
        if not isinstance(chunk, dict):
            self.fault = Fault("malformed", f"an event is no object: {one_line(event)}")
        elif chunk.get("error"):
            self.fault = Fault("error", f"in the stream: {message_of(chunk)}")
        else:
            self._chunk(at, chunk)

    def _chunk(self, at: float, chunk: dict[str, Any]) -> None:
        usage, choices = chunk.get("usage"), chunk.get("choices")
        if isinstance(usage, dict):
            self.usage = usage
        if not isinstance(choices, list) or not all(isinstance(c, dict) for c in choices):
            self.fault = Fault(
                "malformed", f"a chunk's choices are no list of objects: {choices!r:.80}"
            )
            return
        tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
        tokens = tokens if isinstance(tokens, int) else None
        for choice in choices:
            if self._add(choice):
                self.pieces.append(Piece(at, tokens))
            if choice.get("finish_reason"):
                self.finish_reason, self.finished_at = str(choice["finish_reason"]), at

    def _add(self, choice: dict[str, Any]) -> bool:
        """Take in a choice's text; say whether there was any."""
        delta = choice.get("delta")
        given = delta if isinstance(delta, dict) else {"content": choice.get("text")}
        # Servers send reasoning under one of two names, or the same under both.
        said = {
            "reasoning": given.get("reasoning_content") or given.get("reasoning"),
            "content": given.get("content") or given.get("refusal"),
            "tools": _calls(given.get("tool_calls")),
        }
        texts = {name: text for name, text in said.items() if isinstance(text, str) and text}
        for name, text in texts.items():
            self._parts[name].append(text)
        return bool(texts)


def _calls(calls: Any) -> str:
    """Return what a chunk adds to tool calls, without the ids that differ each time."""
    listed = calls if isinstance(calls, list) else []
    functions = [call.get("function") for call in listed if isinstance(call, dict)]
    return "".join(
        str(function.get(part) or "")
        for function in functions
        if isinstance(function, dict)
        for part in ("name", "arguments")
    )


def message_of(body: Any) -> str:
    """Return the message of an error's body, of OpenAI's shape or flatter, as one short line."""
    while isinstance(body, dict):
        body = next(
            (body[key] for key in ("error", "message", "detail") if body.get(key)), str(body)
        )
    return one_line(body)


def one_line(said: Any) -> str:
    """Return anything as one short line."""
    text = said.decode("utf-8", "replace") if isinstance(said, bytes) else str(said)
    line = " ".join(text.split()) or "nothing"
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}…"
