"""``/v1/responses``: OpenAI's Responses API."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response

from ziphius.config.errors import BadInput
from ziphius.serving.answers import Answering
from ziphius.serving.api.context import Context, guarded, new_id, noted, told
from ziphius.serving.api.conversation import Turn
from ziphius.serving.api.description import answers
from ziphius.serving.api.documents_translated import Answered, Deleted
from ziphius.serving.api.responses_in import ResponseFields
from ziphius.serving.api.responses_out import Output, TextScores, usage
from ziphius.serving.api.responses_store import Kept, ResponseStore
from ziphius.serving.api.shapes import json_response
from ziphius.serving.api.translated import as_json
from ziphius.serving.gate import keys_of, known_key
from ziphius.serving.sse import EventStream, event, until_gone

Json = dict[str, Any]


def router(context: Context) -> APIRouter:
    """Return the routes."""
    routes = APIRouter(tags=["answers"])
    limits = context.options.limits
    store = ResponseStore(limits.max_stored, limits.max_stored_bytes)

    @routes.post("/v1/responses", response_model=None, responses=answers(Answered, streams=True))
    async def responses(fields: ResponseFields, request: Request) -> Response:
        """Answer a text or a list of items, streamed or whole."""
        return await Responding(context, store, fields, request).answer()

    @routes.get(
        "/v1/responses/{response_id}",
        summary="Get a stored response",
        response_model=None,
        responses=answers(Answered),
    )
    async def kept(response_id: str, request: Request, stream: bool = False) -> Response:
        """Give a stored response again."""
        if stream:
            raise BadInput("stream: a stored response is given whole")
        found = store.get(response_id, owner(context, request))
        return Response(found.response, media_type="application/json")

    @routes.delete(
        "/v1/responses/{response_id}",
        summary="Delete a stored response",
        response_model=None,
        responses=answers(Deleted),
    )
    async def forget(response_id: str, request: Request) -> Response:
        """Forget a stored response."""
        store.delete(response_id, owner(context, request))
        return json_response({"id": response_id, "object": "response.deleted", "deleted": True})

    @routes.post(
        "/v1/responses/{response_id}/cancel",
        summary="Cancel a response",
        response_model=None,
        responses=answers(Answered),
    )
    async def cancel(response_id: str, request: Request) -> Response:
        """Refuse: what is stored has ended. To end one that runs, close its connection."""
        store.get(response_id, owner(context, request))
        raise BadInput("only a response that is made in the background can be cancelled")

    return routes


def owner(context: Context, request: Request) -> str:
    """Return whose responses a request may see: where keys are set, those of its key."""
    return known_key(keys_of(request.scope), context.options.api_keys) or ""


class Responding:
    """One request of this route."""

    def __init__(
        self, context: Context, store: ResponseStore, fields: ResponseFields, request: Request
    ) -> None:
        self._context, self._store, self._fields = context, store, fields
        self._request = request
        self._owner = owner(context, request)
        self._id = new_id("resp_")
        self._number = 0  # of the next event
        self._head: Json = {}
        self._items: list[Any] = []
        self._output = Output(context.served)

    async def answer(self) -> Response:
        """Check, ask the engine, answer."""
        context, fields = self._context, self._fields
        context.require_model(fields.model)
        fields.require_honourable()
        self._items = [*self._earlier(), *fields.items()]
        conversation = fields.as_conversation(self._items)
        self._head = head(context, fields, self._id)
        as_json([self._head, self._items], "the request")
        turn = await Turn.of(context, conversation, logprobs=fields.counted_logprobs)
        self._output = Output(context.served, self._scores(turn))
        answering = await turn.begin(context, conversation, noted(self._request))
        if fields.streams:
            return EventStream(
                guarded(self._request, self._stream(answering), shape=self._broken),
                ping_seconds=context.options.limits.ping_seconds,
                headers=told(fields),
            )
        return await until_gone(self._request.receive, self._whole(answering))

    def _earlier(self) -> list[Any]:
        """Return the items of the conversation that goes on."""
        earlier = self._fields.previous_response_id
        if earlier is None:
            return []
        kept = self._store.get(earlier, self._owner, param="previous_response_id")
        items: list[Any] = orjson.loads(kept.items)
        return items

    def _scores(self, turn: Turn) -> TextScores | None:
        if self._fields.counted_logprobs is None:
            return None
        return TextScores(
            self._context.served,
            in_reasoning=turn.prompt.in_reasoning,
            tools=turn.tools,
            skip_special=turn.params.skip_special_tokens,
        )

    # --- whole ------------------------------------------------------------------------------------

    async def _whole(self, answering: Answering) -> Response:
        finish = None
        async with answering:
            async for came in answering:
                self._output.add(came)
                finish = came.finish_reason or finish
        return json_response(self._finished(answering, finish), told(self._fields))

    def _finished(self, answering: Answering, finish: str | None) -> Json:
        """Return the response at its end, and keep it."""
        cut = finish == "length"
        body = {
            **self._head,
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "completed_at": None if cut else int(time.time()),
            "output": self._output.items,
            "usage": usage(answering.usage),
        }
        if self._fields.stores:
            items = [*self._items, *self._output.items]
            kept = Kept(self._owner, orjson.dumps(body), orjson.dumps(items))
            self._store.put(self._id, kept)
        return body

    # --- streamed ---------------------------------------------------------------------------------

    async def _stream(self, answering: Answering) -> AsyncIterator[bytes]:
        finish = None
        async with answering:
            for kind in ("response.created", "response.in_progress"):
                yield self._event({"type": kind, "response": self._head})
            async for came in answering:
                finish = came.finish_reason or finish
                for told_event in self._output.add(came):
                    yield self._event(told_event)
            body = self._finished(answering, finish)
        yield self._event({"type": f"response.{body['status']}", "response": body})

    def _event(self, body: Json) -> bytes:
        numbered = {**body, "sequence_number": self._number}
        self._number += 1
        return event(body["type"], numbered)

    def _broken(self, told_error: Json) -> bytes:
        """Return the last two events of a stream that failed: the error, and what there is."""
        error = told_error["error"]
        about = {name: error[name] for name in ("code", "message", "param")}
        body = {
            **self._head,
            "status": "failed",
            "error": {"code": "server_error", "message": error["message"]},
            "output": self._output.so_far(),
        }
        return self._event({"type": "error", **about}) + self._event(
            {"type": "response.failed", "response": body}
        )


def head(context: Context, fields: ResponseFields, response_id: str) -> Json:
    """Return a response that has just begun: what was asked for, under its own names."""
    served = context.served
    reasoning, text = fields.reasoning, fields.text
    chosen = {**served.defaults, **fields.given()}
    return {
        "id": response_id,
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": fields.instructions,
        "max_output_tokens": fields.max_output_tokens,
        "max_tool_calls": fields.max_tool_calls,
        "metadata": fields.metadata or {},
        "model": served.name,
        "output": [],
        "parallel_tool_calls": fields.parallel_tool_calls is not False,
        "previous_response_id": fields.previous_response_id,
        "prompt_cache_key": fields.prompt_cache_key,
        "reasoning": {
            "effort": reasoning.effort if reasoning is not None else None,
            "summary": reasoning.summary if reasoning is not None else None,
        },
        "safety_identifier": fields.safety_identifier,
        "service_tier": "default",
        "store": fields.stores,
        "temperature": chosen["temperature"],
        "text": {
            "format": (text.format if text is not None else None) or {"type": "text"},
            "verbosity": text.verbosity if text is not None else None,
        },
        "tool_choice": fields.tool_choice or "auto",
        "tools": [
            {"parameters": None, "strict": None, "description": None, **tool}
            for tool in fields.tools or ()
        ],
        "top_logprobs": fields.top_logprobs or 0,
        "top_p": chosen["top_p"],
        "truncation": "disabled",
        "usage": None,
        "user": fields.user,
    }
