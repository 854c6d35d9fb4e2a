"""A message as it comes: its blocks, and the events that tell of them.

Whole and streamed answers are made by the same steps, so that they are the same.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import orjson

from ziphius.serving.answers import Event, Usage
from ziphius.serving.api.context import new_id
from ziphius.serving.api.messages_in import INVALID
from ziphius.serving.parse import Piece

Json = dict[str, Any]


class Blocks:
    """The content of one message. ``content`` are the blocks that are whole."""

    def __init__(self, *, eager: Collection[str] = (), shows_thinking: bool = True) -> None:
        """Arguments of ``eager`` tools are told as they come, others when they are whole: clients
        read JSON while it comes, and fail where a model writes what is none.
        """
        self.content: list[Json] = []
        self._eager, self._shows_thinking = frozenset(eager), shows_thinking
        self._block: Json | None = None
        self._text: list[str] = []

    def add(self, event: Event) -> list[Json]:
        """Take what has come; return the events that tell of it."""
        events: list[Json] = []
        for piece in event.pieces:
            events += self._piece(piece)
        if event.finish_reason is not None:
            events += self._end()
        return events

    def _piece(self, piece: Piece) -> list[Json]:
        events: list[Json] = []
        kind = {"reasoning": "thinking", "content": "text"}.get(piece.kind, "tool_use")
        if piece.kind == "call" or self._block is None or self._block["type"] != kind:
            events += self._end()
            events.append(self._begin(kind, piece.text))
        if piece.kind == "call":
            return events
        self._text.append(piece.text)
        told = self._delta(kind, piece.text)
        return events if told is None else [*events, told]

    def _begin(self, kind: str, name: str) -> Json:
        if kind == "tool_use":
            self._block = {"type": kind, "id": new_id("toolu_"), "name": name, "input": {}}
        elif kind == "thinking":
            self._block = {"type": kind, "thinking": "", "signature": ""}
        else:
            self._block = {"type": kind, "text": ""}
        self._text = []
        return self._event("content_block_start", content_block=self._block)

    def _delta(self, kind: str, text: str) -> Json | None:
        if kind == "text":
            return self._told({"type": "text_delta", "text": text})
        if kind == "thinking":
            told = self._told({"type": "thinking_delta", "thinking": text})
            return told if self._shows_thinking else None
        assert self._block is not None, "arguments belong to a call"
        eager = self._block["name"] in self._eager
        return self._told({"type": "input_json_delta", "partial_json": text}) if eager else None

    def _end(self) -> list[Json]:
        if self._block is None:
            return []
        block, text, events = self._block, "".join(self._text), []
        if block["type"] == "thinking":
            events.append(self._told({"type": "signature_delta", "signature": ""}))
            block = {**block, "thinking": text if self._shows_thinking else ""}
        elif block["type"] == "text":
            block = {**block, "text": text}
        else:
            block = {**block, "input": as_input(text)}
            if text and block["name"] not in self._eager:
                whole = text if block["input"].keys() != {INVALID} else _json(block["input"])
                events.append(self._told({"type": "input_json_delta", "partial_json": whole}))
        events.append(self._event("content_block_stop"))
        self.content.append(block)
        self._block = None
        return events

    def _told(self, delta: Json) -> Json:
        return self._event("content_block_delta", delta=delta)

    def _event(self, kind: str, **more: Any) -> Json:
        return {"type": kind, "index": len(self.content), **more}


def as_input(arguments: str) -> Json:
    """Return a call's arguments as an object; what is none is under ``INVALID``, as it is."""
    if not arguments.strip():
        return {}
    try:
        found = orjson.loads(arguments)
        orjson.dumps(found)  # what can't be written can't be answered
    except (ValueError, TypeError, RecursionError):
        return {INVALID: arguments}
    return found if isinstance(found, dict) else {INVALID: arguments}


def _json(value: Json) -> str:
    return orjson.dumps(value).decode()


def ending(event: Event) -> Json:
    """Return why an answer ended, by its last event."""
    reason, matched = event.finish_reason, event.stop_reason
    if isinstance(matched, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": matched}
    names = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
    return {"stop_reason": names.get(str(reason), "end_turn"), "stop_sequence": None}


def usage(counted: Usage) -> Json:
    """Return the usage as this format has it: what was read from the cache counts apart."""
    return {
        "input_tokens": counted.prompt - counted.cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": counted.cached,
        "output_tokens": counted.completion,
        "output_tokens_details": {"thinking_tokens": counted.reasoning},
    }
