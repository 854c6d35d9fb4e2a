"""``POST /v1/chat/completions``"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import Field

from ziphius.config.errors import BadInput
from ziphius.inference.logprobs import Scored
from ziphius.serving.answers import Answering, Collected, Event, Usage
from ziphius.serving.api import logprobs as logprob_shapes
from ziphius.serving.api.context import Context, guarded, new_id, noted, told
from ziphius.serving.api.conversation import ConversationFields, Turn
from ziphius.serving.api.description import answers
from ziphius.serving.api.documents import TALK, ChatCompletion, shown
from ziphius.serving.api.sampling import MOST_LOGPROBS
from ziphius.serving.api.shapes import json_response
from ziphius.serving.parse import Parsed, Piece, collect
from ziphius.serving.sse import DONE, EventStream, data, until_gone


class ChatFields(ConversationFields):
    """A chat's fields, beside those of every conversation."""

    model_config = shown({"messages": TALK, "max_tokens": 8})

    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)

    def counted_logprobs(self) -> int | None:
        """Return how many alternatives to report beside each token; None reports nothing."""
        if self.top_logprobs and not self.logprobs:
            raise BadInput("top_logprobs: needs logprobs = true")
        return (self.top_logprobs or 0) if self.logprobs else None


def router(context: Context) -> APIRouter:
    """Return the route."""
    routes = APIRouter(tags=["answers"])

    @routes.post(
        "/v1/chat/completions",
        response_model=None,
        responses=answers(ChatCompletion, streams=True),
    )
    async def chat_completions(fields: ChatFields, request: Request) -> Response:
        """Answer a conversation, streamed or whole."""
        return await Chat(context, fields, request).answer()

    return routes


class Chat:
    """One request of this route."""

    def __init__(self, context: Context, fields: ChatFields, request: Request) -> None:
        self._context, self._fields, self._request = context, fields, request
        self._head = {
            "id": new_id("chatcmpl-"),
            "created": int(time.time()),
            "model": context.served.name,
            "system_fingerprint": context.fingerprint,
        }
        # Ids of calls, and names that the stream has told already: by answer and call.
        self._call_ids: dict[tuple[int, int], str] = {}
        self._begun: set[int] = set()

    async def answer(self) -> Response:
        """Check, ask the engine, answer."""
        context, fields = self._context, self._fields
        turn = await Turn.of(context, fields, logprobs=fields.counted_logprobs())
        answering = await turn.begin(context, fields, noted(self._request))
        if fields.streams:
            return EventStream(
                guarded(self._request, self._stream(answering, turn)),
                ping_seconds=context.options.limits.ping_seconds,
                headers=told(fields),
            )
        return await until_gone(self._request.receive, self._whole(answering, turn))

    # --- whole ------------------------------------------------------------------------------------

    async def _whole(self, answering: Answering, turn: Turn) -> Response:
        async with answering:
            answers = await answering.collect()
        fields, served = self._fields, self._context.served

        def answer() -> Response:
            body = {
                **self._head,
                "object": "chat.completion",
                "choices": [self._choice(answer) for answer in answers],
                "usage": answering.usage.openai(),
            }
            if fields.return_token_ids:
                body["prompt_token_ids"] = turn.prompt.token_ids
            if fields.prompt_logprobs is not None:
                body["prompt_logprobs"] = logprob_shapes.by_id(served, answering.prompt_logprobs)
            return json_response(body, told(fields))

        return await self._context.aside(logprob_shapes.work(fields, answering.usage), answer)

    def _choice(self, answer: Collected) -> dict[str, Any]:
        choice = {
            "index": answer.index,
            "message": self._message(answer.index, collect(answer.pieces)),
            "logprobs": self._scored(answer.logprobs),
            "finish_reason": answer.finish_reason,
            "stop_reason": answer.stop_reason,
        }
        return choice | ({"token_ids": answer.token_ids} if self._fields.return_token_ids else {})

    def _message(self, index: int, parsed: Parsed) -> dict[str, Any]:
        message: dict[str, Any] = {
            "role": "assistant",
            "content": parsed.content or (None if parsed.calls else ""),
            "refusal": None,
            "reasoning": parsed.reasoning or None,
            "reasoning_content": parsed.reasoning or None,
        }
        if parsed.calls:
            message["tool_calls"] = [
                {
                    "id": self._call_id(index, place),
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for place, call in enumerate(parsed.calls)
            ]
        return message

    # --- streamed ---------------------------------------------------------------------------------

    async def _stream(self, answering: Answering, turn: Turn) -> AsyncIterator[bytes]:
        fields = self._fields
        more = {"prompt_token_ids": turn.prompt.token_ids} if fields.return_token_ids else {}
        async with answering:
            async for event in answering:
                for chunk in self._chunks(event):
                    yield data({**self._chunk(chunk, answering.usage), **more})
                    more = {}
            if fields.wants_usage:
                yield data({**self._chunk(None), "usage": answering.usage.openai()})
        yield DONE

    def _chunks(self, event: Event) -> list[dict[str, Any]]:
        """Return an event as choices: one, or several where a delta can't hold all of it.

        The first has the tokens' log-probabilities, the last why the answer ended.
        """
        deltas = self._deltas(event.index, event.pieces)
        if not deltas:
            if event.finish_reason is None and not (event.logprobs or self._wants_ids(event)):
                return []
            deltas = [{}]
        if event.index not in self._begun:  # with the first token, never before it
            self._begun.add(event.index)
            deltas[0] = {"role": "assistant", "content": "", **deltas[0]}
        choices: list[dict[str, Any]] = [
            {"index": event.index, "delta": delta, "logprobs": None, "finish_reason": None}
            for delta in deltas
        ]
        choices[0]["logprobs"] = self._scored(event.logprobs)
        choices[-1] |= {"finish_reason": event.finish_reason, "stop_reason": event.stop_reason}
        if self._wants_ids(event):
            choices[0]["token_ids"] = event.token_ids
        return choices

    def _deltas(self, index: int, pieces: list[Piece]) -> list[dict[str, Any]]:
        deltas: list[dict[str, Any]] = []
        for piece in pieces:
            if piece.kind == "content":
                deltas.append({"content": piece.text})
            elif piece.kind == "reasoning":
                deltas.append({"reasoning": piece.text, "reasoning_content": piece.text})
            else:
                assert piece.call is not None, "it belongs to a call"
                deltas.append({"tool_calls": [self._call(index, piece, piece.call)]})
        return deltas

    def _call(self, index: int, piece: Piece, call: int) -> dict[str, Any]:
        """Return a piece of a call: its name with its id and type, later arguments alone."""
        if piece.kind == "call":
            return {
                "index": call,
                "id": self._call_id(index, call),
                "type": "function",
                "function": {"name": piece.text, "arguments": ""},
            }
        return {"index": call, "function": {"arguments": piece.text}}

    def _call_id(self, index: int, call: int) -> str:
        return self._call_ids.setdefault((index, call), new_id("call_")[:29])

    def _chunk(self, choice: dict[str, Any] | None, usage: Usage | None = None) -> dict[str, Any]:
        fields = self._fields
        choices = [] if choice is None else [choice]
        chunk = {**self._head, "object": "chat.completion.chunk", "choices": choices}
        if fields.wants_usage or fields.wants_usage_always:
            always = usage is not None and fields.wants_usage_always
            chunk["usage"] = usage.openai() if always and usage is not None else None
        return chunk

    def _scored(self, scored: list[Scored]) -> dict[str, Any] | None:
        if not self._fields.logprobs:
            return None
        return {"content": logprob_shapes.of_chat(self._context.served, scored), "refusal": None}

    def _wants_ids(self, event: Event) -> bool:
        return bool(self._fields.return_token_ids and event.token_ids)
