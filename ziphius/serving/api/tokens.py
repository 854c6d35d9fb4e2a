"""``/tokenize``, ``/detokenize`` and ``/tokenizer_info``, as vLLM has them."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Response
from pydantic import Field

from ziphius.config.errors import BadInput
from ziphius.serving.api.context import Context
from ziphius.serving.api.conversation import characters
from ziphius.serving.api.description import answers
from ziphius.serving.api.documents import (
    TALK,
    Detokenized,
    Spoken,
    TokenizerInfo,
    Tokens,
    shown,
)
from ziphius.serving.api.sampling import FIRST, Body, Ids, Objects, Text
from ziphius.serving.api.shapes import json_response


class TokenizeFields(Body):
    """A text, or a conversation."""

    model_config = shown({"prompt": "whales dive"}, {"messages": TALK})

    model: str | None = None
    prompt: Text | None = None
    messages: Annotated[list[Spoken], FIRST] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False
    tools: Objects | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeFields(Body):
    """Token ids."""

    model_config = shown({"tokens": [0, 5]})

    model: str | None = None
    tokens: Ids = Field(max_length=1_000_000)


def router(context: Context) -> APIRouter:
    """Return the routes."""
    routes = APIRouter(tags=["tokens"])
    served = context.served

    @routes.post("/tokenize", response_model=None, responses=answers(Tokens))
    async def tokenize(fields: TokenizeFields) -> Response:
        """Cut a text, or a conversation, into tokens."""
        context.require_model(fields.model)
        if (fields.prompt is None) == (fields.messages is None):
            raise BadInput("give either prompt or messages")
        if fields.prompt is not None:
            size = len(fields.prompt)
            special = fields.add_special_tokens
            ids = await context.aside(size, served.tokens, fields.prompt, special=special)
        else:
            assert fields.messages is not None, "one of the two was given"
            prompt = await context.aside(
                characters(fields.messages),
                served.conversation,
                fields.messages,
                tools=fields.tools,
                add_generation_prompt=fields.add_generation_prompt,
                options=fields.chat_template_kwargs,
            )
            ids = prompt.token_ids
        body = {"tokens": ids, "count": len(ids), "max_model_len": context.length}
        if fields.return_token_strs:
            body["token_strs"] = await context.aside(len(ids), served.texts, ids)
        return json_response(body)

    @routes.post("/detokenize", response_model=None, responses=answers(Detokenized))
    async def detokenize(fields: DetokenizeFields) -> Response:
        """Put tokens together to text."""
        context.require_model(fields.model)
        text = await context.aside(len(fields.tokens), served.text, fields.tokens)
        return json_response({"prompt": text})

    @routes.get("/tokenizer_info", response_model=None, responses=answers(TokenizerInfo))
    async def tokenizer_info() -> Response:
        """Name the special tokens and the chat template."""
        link = context.engine.link
        ends = link.model.eos if link is not None and link.model is not None else []
        return json_response(served.tokenizer_info(ends))

    return routes
