"""``POST /v1/completions``: text goes on, as text or token ids, one prompt or many."""

from __future__ import annotations

import codecs
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
from ziphius.serving.api.sampling import (
    MOST_LOGPROBS,
    IdLists,
    Ids,
    SamplingFields,
    Text,
    Texts,
)
from ziphius.serving.api.shapes import json_response
from ziphius.serving.link import Job
from ziphius.serving.parse import Parser
from ziphius.serving.sse import DONE, EventStream, data, until_gone
from ziphius.serving.structured import structure

MOST_PROMPTS = 128


class CompletionFields(SamplingFields):
    """A completion's fields, beside those of every route."""

    model_config = documents.shown({"prompt": "def double(x):", "max_tokens": 8})

    prompt: Text | Texts | Ids | IdLists
    suffix: Text | None = None
    add_special_tokens: bool | None = None
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
        prompts = fields.prompts()
        asks = await context.aside(
            sum(map(len, prompts)), lambda: [self._ask(prompt) for prompt in prompts]
        )
        params = self._params()
        n, score_only, log = params.n, fields.max_tokens == 0, noted(self._request)
        jobs: list[tuple[Job, list[Parser | None]]] = [
            (context.job(ask.token_ids, params, fields, log, score_only=score_only), [None] * n)
            for ask in asks
        ]
        begun = await begin_all(context.engine, jobs, log)
        if fields.streams:
            events = guarded(self._request, self._stream(asks, begun))
            return EventStream(
                events,
                ping_seconds=context.options.limits.ping_seconds,
                headers=told(fields),
            )
        return await until_gone(self._request.receive, self._whole(asks, begun))

    def _ask(self, prompt: str | list[int]) -> Ask:
        context, fields = self._context, self._fields
        served = context.served
        if isinstance(prompt, list):
            if fields.suffix is not None:
                raise BadInput("suffix: needs a prompt of text")
            kept = context.kept(prompt, fields)
            return Ask(served.text(kept) if fields.echo else None, kept)
        if fields.suffix is not None:
            return Ask(prompt, served.around(prompt, fields.suffix))
        special = fields.add_special_tokens is not False
        whole = served.tokens(prompt, special=special)
        kept = context.kept(whole, fields)
        return Ask(prompt if len(kept) == len(whole) else served.text(kept), kept)

    def _params(self) -> SamplingParams:
        fields, served = self._fields, self._context.served
        if fields.echo and fields.streams and fields.logprobs is not None:
            raise BadInput("echo with logprobs: the prompt's are known at the end: set stream off")
        if fields.suffix is not None and (fields.echo or fields.truncate_prompt_tokens is not None):
            raise BadInput("suffix: can't be combined with echo or truncate_prompt_tokens")
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
            more["prompt_logprobs"] = max(fields.logprobs, fields.prompt_logprobs or 0)
        return served.params(fields.given(), **more)

    # --- whole ------------------------------------------------------------------------------------

    async def _whole(self, asks: list[Ask], begun: list[Answering]) -> Response:
        whole: list[tuple[Ask, Answering, Collected]] = []
        async with AsyncExitStack() as stack:
            for answering in begun:
                await stack.enter_async_context(answering)
            for ask, answering in zip(asks, begun, strict=True):
                whole += [(ask, answering, one) for one in await answering.collect()]
        usage = _sum(begun)

        def answer() -> Response:
            choices = [self._choice(index, *one) for index, one in enumerate(whole)]
            body = {**self._head, "choices": choices, "usage": usage.openai()}
            return json_response(body, told(self._fields))

        return await self._context.aside(logprob_shapes.work(self._fields, usage), answer)

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
                before = logprob_shapes.cut(answering.prompt_logprobs or [], fields.logprobs)
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
            few = logprob_shapes.cut(answering.prompt_logprobs or [], fields.prompt_logprobs)
            choice["prompt_logprobs"] = logprob_shapes.by_id(served, few)
        return choice

    # --- streamed ---------------------------------------------------------------------------------

    async def _stream(self, asks: list[Ask], begun: list[Answering]) -> AsyncIterator[bytes]:
        fields, n = self._fields, self._fields.n or 1
        begun_choices: set[int] = set()
        always = fields.wants_usage_always
        async with AsyncExitStack() as stack:
            for answering in begun:
                await stack.enter_async_context(answering)
            async for place, event in merged(begun):
                index = place * n + event.index
                text = "".join(piece.text for piece in event.pieces)
                piece = self._piece(index, event, text)
                if index not in begun_choices:
                    begun_choices.add(index)
                    piece |= self._head_of(asks[place], text)
                yield data(self._chunk([piece], _sum(begun) if always else None))
            if fields.wants_usage:
                yield data({**self._chunk([]), "usage": _sum(begun).openai()})
        yield DONE

    def _head_of(self, ask: Ask, text: str) -> dict[str, Any]:
        """Return what only an answer's first piece has, or has otherwise."""
        head: dict[str, Any] = {}
        if self._fields.echo:
            head["text"] = (ask.text or "") + text
        if self._fields.return_token_ids:
            head["prompt_token_ids"] = ask.token_ids
        return head

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
    skipped = max(0, sum(map(len, spelled)) - len(text.encode()))
    decoder = codecs.getincrementaldecoder("utf-8")("ignore")
    starts, at = [], 0
    for piece in spelled:
        starts.append(at)
        left_out = min(skipped, len(piece))
        skipped -= left_out
        at += len(decoder.decode(piece[left_out:]))
    return starts
