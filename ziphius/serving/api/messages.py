"""``/v1/messages``: Anthropic's Messages API."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response

from ziphius.serving.answers import Answering
from ziphius.serving.api.context import Context, guarded, new_id, noted, told
from ziphius.serving.api.conversation import Turn
from ziphius.serving.api.description import answers
from ziphius.serving.api.documents_translated import AnsweredMessage, CountedTokens
from ziphius.serving.api.messages_in import CountFields, MessageFields
from ziphius.serving.api.messages_out import Blocks, ending, usage
from ziphius.serving.api.shapes import json_response
from ziphius.serving.sse import EventStream, event, until_gone

Json = dict[str, Any]

_NOT_ENDED: Json = {"stop_reason": None, "stop_sequence": None}


def router(context: Context) -> APIRouter:
    """Return the routes."""
    routes = APIRouter(tags=["answers"])

    @routes.post(
        "/v1/messages", response_model=None, responses=answers(AnsweredMessage, streams=True)
    )
    async def messages(fields: MessageFields, request: Request) -> Response:
        """Answer a conversation, streamed or whole."""
        return await Messaging(context, fields, request).answer()

    @routes.post("/v1/messages/count_tokens", response_model=None, responses=answers(CountedTokens))
    async def count_tokens(fields: CountFields) -> Response:
        """Count the tokens of a conversation as the model would read it."""
        context.require_model(fields.model)
        fields.require_honourable()
        turn = await Turn.of(context, fields.as_conversation())
        return json_response({"input_tokens": len(turn.prompt.token_ids)}, told(fields))

    return routes


class Messaging:
    """One request of this route."""

    def __init__(self, context: Context, fields: MessageFields, request: Request) -> None:
        self._context, self._fields, self._request = context, fields, request
        self._id = new_id("msg_")
        shows = fields.thinking is None or fields.thinking.display != "omitted"
        self._shows_thinking = shows
        self._blocks = Blocks(shows_thinking=shows)
        self._ending = _NOT_ENDED

    async def answer(self) -> Response:
        """Check, ask the engine, answer."""
        context, fields = self._context, self._fields
        context.require_model(fields.model)
        fields.require_honourable()
        conversation = fields.as_conversation()
        self._blocks = Blocks(eager=fields.eager, shows_thinking=self._shows_thinking)
        turn = await Turn.of(context, conversation)
        answering = await turn.begin(context, conversation, noted(self._request))
        if fields.streams:
            return EventStream(
                guarded(self._request, self._stream(answering), shape=_broken),
                ping_seconds=context.options.limits.ping_seconds,
                headers=told(fields),
            )
        return await until_gone(self._request.receive, self._whole(answering))

    async def _events(self, answering: Answering) -> AsyncIterator[Json]:
        """Yield what tells of the content; afterwards the answer's end is known."""
        async for came in answering:
            for body in self._blocks.add(came):
                yield body
            if came.finish_reason is not None:
                self._ending = ending(came)

    async def _whole(self, answering: Answering) -> Response:
        async with answering:
            async for _ in self._events(answering):
                pass
        return json_response(self._message(answering), told(self._fields))

    async def _stream(self, answering: Answering) -> AsyncIterator[bytes]:
        async with answering:
            yield _event({"type": "message_start", "message": self._message(answering)})
            pinged = False
            async for body in self._events(answering):
                yield _event(body)
                if not pinged:
                    yield _event({"type": "ping"})
                    pinged = True
        end = {"type": "message_delta", "delta": self._ending, "usage": usage(answering.usage)}
        yield _event(end)
        yield _event({"type": "message_stop"})

    def _message(self, answering: Answering) -> Json:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._context.served.name,
            "content": self._blocks.content,
            **self._ending,
            "usage": usage(answering.usage),
        }


def _event(body: Json) -> bytes:
    return event(body["type"], body)


def _broken(error: Json) -> bytes:
    """Return the last event of a stream that failed."""
    return event("error", error)
