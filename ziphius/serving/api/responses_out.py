"""A response as it comes: its items, and the events that tell of them.

Whole and streamed answers are made by the same steps, so that they are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ziphius.inference.logprobs import Scored
from ziphius.serving.answers import Event, Usage
from ziphius.serving.api import logprobs as logprob_shapes
from ziphius.serving.api.context import new_id
from ziphius.serving.parse import Piece
from ziphius.serving.served import Served

Json = dict[str, Any]


class TextScores:
    """Tells whose log-probabilities are those of a message's text, by the tokens alone.

    Thoughts, calls and marks have none, nor have the blanks next to marks. Text that thoughts
    divide is several stretches, which are the messages of a response, in this order. Behind the
    mark of a call there are no more.
    """

    def __init__(
        self, served: Served, *, in_reasoning: bool, tools: bool, skip_special: bool = True
    ) -> None:
        self._served, self._tools, self._skip_special = served, tools, skip_special
        self._thinking, self._called = in_reasoning, False
        self._begun = self._at_mark = False
        self._blank: list[Scored] = []  # they count once more text follows
        self._stretches: list[list[Scored]] = []

    def add(self, scored: Sequence[Scored]) -> None:
        """Take what has come, in any pieces."""
        for one in scored:
            name = self._served.markers.names.get(one.token)
            if name is None:
                if not self._called:
                    self._text(one)
            elif name in ("think", "end_think"):
                self._thinking = name == "think"
                self._mark()
            elif self._tools:
                self._called = self._called or "call" in name
                self._mark()

    def take(self, stretch: int) -> list[Scored]:
        """Return what has come of a stretch since the last call."""
        if stretch >= len(self._stretches):
            return []
        taken, self._stretches[stretch] = self._stretches[stretch], []
        return taken

    def _mark(self) -> None:
        self._at_mark = True
        if not self._begun:
            self._blank = []

    def _text(self, one: Scored) -> None:
        spelled = self._served.vocabulary.text_bytes(one.token, self._skip_special)
        if not spelled.strip():
            if spelled and not (self._thinking or self._at_mark):
                self._blank.append(one)
        elif self._thinking:
            self._begun, self._blank = False, []
        else:
            if not self._begun:
                self._stretches.append([])
            self._stretches[-1] += [*self._blank, one]
            self._begun, self._at_mark, self._blank = True, False, []


@dataclass
class _Open:
    """The item that is being written."""

    kind: str  # that of its pieces; a call's is "call"
    head: Json
    index: int
    stretch: int = 0  # of a message, its number
    text: list[str] = field(default_factory=list)
    logprobs: list[Json] = field(default_factory=list)

    def part(self) -> Json:
        """Return the content so far as a part."""
        text = "".join(self.text)
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": self.logprobs}

    def item(self, status: str) -> Json:
        """Return the whole item."""
        if self.kind == "call":
            return {**self.head, "status": status, "arguments": "".join(self.text)}
        return {**self.head, "status": status, "content": [self.part()]}


class Output:
    """The items of one response. ``items`` are those that are whole."""

    def __init__(self, served: Served, scores: TextScores | None = None) -> None:
        """With ``scores`` the text comes with its log-probabilities."""
        self.items: list[Json] = []
        self._served, self._scores = served, scores
        self._open: _Open | None = None
        self._messages = 0

    def add(self, event: Event) -> list[Json]:
        """Take what has come; return the events that tell of it, without their numbers."""
        if self._scores is not None:
            self._scores.add(event.logprobs)
        events: list[Json] = []
        for piece in event.pieces:
            events += self._piece(piece)
        if event.finish_reason is not None:
            if not self.items and self._open is None:
                events += self._begin("content", "")  # an answer of nothing is an empty message
            events += self._end("incomplete" if event.finish_reason == "length" else "completed")
        return events

    def so_far(self) -> list[Json]:
        """Return the items with the one that breaks off here."""
        broken = [self._open.item("incomplete")] if self._open is not None else []
        return [*self.items, *broken]

    def _piece(self, piece: Piece) -> list[Json]:
        events: list[Json] = []
        here = self._open.kind if self._open is not None else None
        if piece.kind == "call" or (piece.kind != "arguments" and piece.kind != here):
            events += self._end("completed")
            events += self._begin(piece.kind, piece.text)
        return events if piece.kind == "call" else [*events, self._more(piece.text)]

    def _begin(self, kind: str, name: str) -> list[Json]:
        index = len(self.items)
        head: Json
        if kind == "call":
            head = {
                "type": "function_call",
                "id": new_id("fc_"),
                "call_id": new_id("call_")[:29],
                "name": name,
            }
            self._open = _Open(kind, head, index)
            return [self._item_event("added", {**head, "status": "in_progress", "arguments": ""})]
        if kind == "reasoning":
            head = {"type": "reasoning", "id": new_id("rs_"), "summary": []}
            self._open = _Open(kind, head, index)
        else:
            head = {"type": "message", "id": new_id("msg_"), "role": "assistant"}
            self._open = _Open(kind, head, index, self._messages)
            self._messages += 1
        begun = {**head, "status": "in_progress", "content": []}
        part = {**self._part_event("added"), "part": _Open(kind, head, index).part()}
        return [self._item_event("added", begun), part]

    def _more(self, text: str) -> Json:
        here = self._here
        here.text.append(text)
        if here.kind == "call":
            told = {"output_index": here.index, "item_id": here.head["id"], "delta": text}
            return {"type": "response.function_call_arguments.delta", **told}
        if here.kind == "reasoning":
            return {**self._text_event("response.reasoning_text.delta"), "delta": text}
        logprobs = self._taken()
        told = {"delta": text, "logprobs": logprobs}
        return {**self._text_event("response.output_text.delta"), **told}

    def _end(self, status: str) -> list[Json]:
        if self._open is None:
            return []
        here, events = self._here, []
        if here.kind == "call":
            told = {"output_index": here.index, "item_id": here.head["id"]}
            done = {"name": here.head["name"], "arguments": "".join(here.text)}
            events.append({"type": "response.function_call_arguments.done", **told, **done})
        else:
            done = {"text": "".join(here.text)}
            if here.kind == "reasoning":
                events.append({**self._text_event("response.reasoning_text.done"), **done})
            else:
                self._taken()
                done["logprobs"] = here.logprobs
                events.append({**self._text_event("response.output_text.done"), **done})
            events.append({**self._part_event("done"), "part": here.part()})
        item = here.item(status)
        events.append(self._item_event("done", item))
        self.items.append(item)
        self._open = None
        return events

    def _taken(self) -> list[Json]:
        """Return the log-probabilities that have come for the present message."""
        here = self._here
        if self._scores is None:
            return []
        taken = logprob_shapes.of_chat(self._served, self._scores.take(here.stretch))
        here.logprobs += taken
        return taken

    @property
    def _here(self) -> _Open:
        assert self._open is not None, "an item is open"
        return self._open

    def _item_event(self, what: str, item: Json) -> Json:
        kind = f"response.output_item.{what}"
        return {"type": kind, "output_index": self._here.index, "item": item}

    def _part_event(self, what: str) -> Json:
        return self._text_event(f"response.content_part.{what}")

    def _text_event(self, kind: str) -> Json:
        here = self._here
        told = {"item_id": here.head["id"], "output_index": here.index, "content_index": 0}
        return {"type": kind, **told}


def usage(counted: Usage) -> Json:
    """Return the usage as this format has it."""
    return {
        "input_tokens": counted.prompt,
        "input_tokens_details": {"cached_tokens": counted.cached, "cache_write_tokens": 0},
        "output_tokens": counted.completion,
        "output_tokens_details": {"reasoning_tokens": counted.reasoning},
        "total_tokens": counted.prompt + counted.completion,
    }
