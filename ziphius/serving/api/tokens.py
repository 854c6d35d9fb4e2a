"""``/tokenize``, ``/detokenize`` and ``/tokenizer_info``, as vLLM has them."""

from __future__ import annotations

from typing import Any

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
from ziphius.serving.api.sampling import Body, Text
from ziphius.serving.api.shapes import json_response


class TokenizeFields(Body):
    """A text, or a conversation."""

    model_config = shown({"prompt": "whales dive"}, {"messages": TALK})

    model: str | None = None
    prompt: Text | None = None
    messages: list[Spoken] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeFields(Body):
    """Token ids."""

    model_config = shown({"tokens": [0, 5]})

    model: str | None = None
    tokens: list[int] = Field(max_length=1_000_000)


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
        link = context.engine.link
        context_length = link.model.context if link is not None and link.model else None
        body = {"tokens": ids, "count": len(ids), "max_model_len": context_length}
        if fields.return_token_strs:
            body["token_strs"] = [served.spell(token)[0] for token in ids]
        return json_response(body)

    @routes.post("/detokenize", response_model=None, responses=answers(Detokenized))
    async def detokenize(fields: DetokenizeFields) -> Response:
        """Put tokens together to text."""
        context.require_model(fields.model)
        return json_response({"prompt": served.text(fields.tokens)})

    @routes.get("/tokenizer_info", response_model=None, responses=answers(TokenizerInfo))
    async def tokenizer_info() -> Response:
        """Name the special tokens and the chat template."""
        link = context.engine.link
        ends = link.model.eos if link is not None and link.model is not None else []
        return json_response(served.tokenizer_info(ends))

    return routes
