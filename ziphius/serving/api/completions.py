"""``POST /v1/completions``: text goes on, as text or token ids, one prompt or many."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import Field

from ziphius.config.errors import BadInput
from ziphius.inference.logprobs import Scored
from ziphius.inference.params import SamplingParams
from ziphius.serving.answers import Answering, Collected, Event, Usage, begin_all, merged
from ziphius.serving.api import documents
from ziphius.serving.api import logprobs as logprob_shapes
from ziphius.serving.api.context import Context, guarded, new_id, noted, told
from ziphius.serving.api.description import answers
from ziphius.serving.api.sampling import MOST_LOGPROBS, SamplingFields, Text
from ziphius.serving.api.shapes import json_response
from ziphius.serving.link import Job
from ziphius.serving.parse import Parser
from ziphius.serving.sse import DONE, EventStream, data, until_gone
from ziphius.serving.structured import structure

MOST_PROMPTS = 128


class CompletionFields(SamplingFields):
    """A completion's fields, beside those of every route."""

    model_config = documents.shown({"prompt": "def double(x):", "max_tokens": 8})

    prompt: Text | list[Text] | list[int] | list[list[int]]
    suffix: Text | None = None
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    max_tokens: int | None = Field(None, ge=0)

    def prompts(self) -> list[str | list[int]]:
        """Return the prompts one by one. Raises BadInput for none, or too many."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if prompt and all(isinstance(part, int) for part in prompt):
            return [prompt]  # type: ignore[list-item]
        if not 0 < len(prompt) <= MOST_PROMPTS:
            raise BadInput(f"prompt: give 1 to {MOST_PROMPTS} prompts, not {len(prompt)}")
        return list(prompt)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Ask:
    """One prompt of a request."""

    text: str | None
    token_ids: list[int]


def router(context: Context) -> APIRouter:
    """Return the route."""
    routes = APIRouter(tags=["answers"])

    @routes.post(
        "/v1/completions",
        response_model=None,
        responses=answers(documents.Completion, streams=True),
    )
    async def completions(fields: CompletionFields, request: Request) -> Response:
        """Go on with one or several prompts, streamed or whole."""
        return await Completion(context, fields, request).answer()

    return routes


class Completion:
    """One request of this route."""

    def __init__(self, context: Context, fields: CompletionFields, request: Request) -> None:
        self._context, self._fields, self._request = context, fields, request
        self._head = {
            "id": new_id("cmpl-"),
            "object": "text_completion",
            "created": int(time.time()),
            "model": context.served.name,
        }

    async def answer(self) -> Response:
        """Check, ask the engine, answer."""
        context, fields = self._context, self._fields
        context.require_model(fields.model)
        fields.require_honourable()
        asks = [await self._ask(prompt) for prompt in fields.prompts()]
        params = self._params()
        n, score_only = params.n, fields.max_tokens == 0
        jobs: list[tuple[Job, list[Parser | None]]] = [
            (context.job(ask.token_ids, params, fields, score_only=score_only), [None] * n)
            for ask in asks
        ]
        begun = await begin_all(context.engine, jobs, noted(self._request))
        if fields.streams:
            events = guarded(self._request, self._stream(asks, begun))
            return EventStream(
                events,
                ping_seconds=context.options.limits.ping_seconds,
                headers=told(fields),
            )
        return await until_gone(self._request.receive, self._whole(asks, begun))

    async def _ask(self, prompt: str | list[int]) -> Ask:
        served, fields = self._context.served, self._fields
        if isinstance(prompt, list):
            if fields.suffix is not None:
                raise BadInput("suffix: needs a prompt of text")
            text = served.text(prompt) if fields.echo else None
            return Ask(text, prompt)
        if fields.suffix is not None:
            return Ask(prompt, served.around(prompt, fields.suffix))
        return Ask(prompt, await self._context.aside(len(prompt), served.tokens, prompt))

    def _params(self) -> SamplingParams:
        fields, served = self._fields, self._context.served
        if fields.echo and fields.streams and fields.logprobs is not None:
            raise BadInput("echo with logprobs: the prompt's are known at the end: set stream off")
        more: dict[str, Any] = {
            "max_tokens": max(1, fields.max_tokens if fields.max_tokens is not None else 16),
            "logprobs": fields.logprobs,
            **structure(
                served.markers,
                served.template.calls,
                in_reasoning=False,
                response_format=fields.response_format,
                guided=fields.guided(),
            ),
        }
        if fields.echo and fields.logprobs is not None:
            more["prompt_logprobs"] = fields.logprobs
        return served.params(fields.given(), **more)

    # --- whole ------------------------------------------------------------------------------------

    async def _whole(self, asks: list[Ask], begun: list[Answering]) -> Response:
        choices: list[dict[str, Any]] = []
        async with AsyncExitStack() as stack:
            for answering in begun:
                await stack.enter_async_context(answering)
            for ask, answering in zip(asks, begun, strict=True):
                for collected in await answering.collect():
                    choices.append(self._choice(len(choices), ask, answering, collected))
        body = {**self._head, "choices": choices, "usage": _sum(begun).openai()}
        return json_response(body, told(self._fields))

    def _choice(
        self, index: int, ask: Ask, answering: Answering, collected: Collected
    ) -> dict[str, Any]:
        fields, served = self._fields, self._context.served
        text = "".join(piece.text for piece in collected.pieces)
        echoed = ask.text if fields.echo and ask.text is not None else ""
        scored = None
        if fields.logprobs is not None:
            ids, offsets = list(collected.token_ids), [len(echoed) + o for o in collected.offsets]
            entries: list[Scored | None] = list(collected.logprobs)
            if fields.echo:
                before = answering.prompt_logprobs or []
                entries = [*before, *entries]
                starts = _starts(served.spell, ask.token_ids, echoed)
                ids, offsets = [*ask.token_ids, *ids], [*starts, *offsets]
            scored = logprob_shapes.of_completion(served, entries, ids, offsets)
        choice = {
            "index": index,
            "text": echoed + text,
            "logprobs": scored,
            "finish_reason": collected.finish_reason,
            "stop_reason": collected.stop_reason,
        }
        if fields.return_token_ids:
            choice |= {"token_ids": collected.token_ids, "prompt_token_ids": ask.token_ids}
        if fields.prompt_logprobs is not None:
            choice["prompt_logprobs"] = logprob_shapes.by_id(served, answering.prompt_logprobs)
        return choice

    # --- streamed ---------------------------------------------------------------------------------

    async def _stream(self, asks: list[Ask], begun: list[Answering]) -> AsyncIterator[bytes]:
        fields, n = self._fields, self._fields.n or 1
        echoed: set[int] = set()
        async with AsyncExitStack() as stack:
            for answering in begun:
                await stack.enter_async_context(answering)
            async for place, event in merged(begun):
                index = place * n + event.index
                text = "".join(piece.text for piece in event.pieces)
                if fields.echo and index not in echoed:
                    echoed.add(index)
                    text = (asks[place].text or "") + text
                yield data(self._chunk([self._piece(index, event, text)], _sum(begun)))
            if fields.wants_usage:
                yield data({**self._chunk([]), "usage": _sum(begun).openai()})
        yield DONE

    def _chunk(self, choices: list[dict[str, Any]], usage: Usage | None = None) -> dict[str, Any]:
        fields = self._fields
        chunk = {**self._head, "choices": choices}
        if fields.wants_usage or fields.wants_usage_always:
            now = usage is not None and fields.wants_usage_always
            chunk["usage"] = usage.openai() if now and usage is not None else None
        return chunk

    def _piece(self, index: int, event: Event, text: str) -> dict[str, Any]:
        scored = None
        if self._fields.logprobs is not None:
            scored = logprob_shapes.of_completion(
                self._context.served, event.logprobs, event.token_ids, event.offsets
            )
        piece = {
            "index": index,
            "text": text,
            "logprobs": scored,
            "finish_reason": event.finish_reason,
            "stop_reason": event.stop_reason,
        }
        return piece | ({"token_ids": event.token_ids} if self._fields.return_token_ids else {})


def _sum(begun: Sequence[Answering]) -> Usage:
    whole = Usage(0)
    for answering in begun:
        for known, value in vars(answering.usage).items():
            setattr(whole, known, getattr(whole, known) + value)
    return whole


def _starts(spell: Any, token_ids: Sequence[int], text: str) -> list[int]:
    """Return the character of ``text`` at which each token of a prompt begins.

    The first token, which a text does not spell, begins with it.
    """
    spelled = [bytes(spell(token)[1]) for token in token_ids]
    skipped = len(b"".join(spelled)) - len(text.encode())
    starts, at = [], -max(skipped, 0)
    whole = text.encode()
    for piece in spelled:
        starts.append(len(whole[: max(at, 0)].decode(errors="ignore")))
        at += len(piece)
    return starts
