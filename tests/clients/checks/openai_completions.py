"""Completions, many answers at once, and streams to the letter."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from openai import AsyncOpenAI

from tests.clients.checks.case import Case, Check, events
from tests.clients.checks.openai_base import (
    GREEDY,
    HELLO,
    LONG,
    SEEDED,
    chat,
    client_of,
    collector,
)

CHECKS: list[Check] = []
check = collector(CHECKS)


# --- completions ----------------------------------------------------------------------------------


@check
def completions_of_every_kind_of_prompt(case: Case) -> None:
    client = client_of(case)
    texts = ["a whale", "the cold sea"]
    first = case.tokens(case.get("/tokenizer_info")["bos_token"])
    ids = [first + case.tokens(text) for text in texts]

    def complete(prompt: Any) -> list[str]:
        answer = client.completions.create(model=case.model, prompt=prompt, **GREEDY)
        assert answer.object == "text_completion"
        assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 16 * len(answer.choices)
        return [choice.text for choice in answer.choices]

    alone = [complete(text)[0] for text in texts]
    assert complete(texts) == alone
    assert complete(ids) == alone
    assert complete(ids[1]) == alone[1:]
    stream = client.completions.create(model=case.model, prompt=texts, stream=True, **GREEDY)
    streamed = ["", ""]
    for chunk in stream:
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == alone


@check
def an_echo_has_the_logprobs_of_its_prompt(case: Case) -> None:
    client, prompt = client_of(case), "a whale dives deep"
    how = {**GREEDY, "max_tokens": 4}
    plain = client.completions.create(model=case.model, prompt=prompt, **how)
    answer = client.completions.create(
        model=case.model, prompt=prompt, echo=True, logprobs=2, **how
    )
    choice, usage = answer.choices[0], answer.usage
    assert usage is not None
    assert choice.text == prompt + plain.choices[0].text
    scored = choice.logprobs
    assert scored is not None
    assert usage.completion_tokens == 4
    for known in (scored.tokens, scored.token_logprobs, scored.top_logprobs, scored.text_offset):
        assert known is not None
        assert len(known) == usage.prompt_tokens + 4
    assert scored.token_logprobs is not None
    assert scored.top_logprobs is not None
    assert scored.token_logprobs[0] is None
    assert all(value <= 0 for value in scored.token_logprobs[1:])
    assert all(len(top) in (2, 3) for top in scored.top_logprobs[1:])
    offsets, tokens = scored.text_offset or [], scored.tokens or []
    for at, token in list(zip(offsets, tokens, strict=True))[1 : usage.prompt_tokens]:
        assert choice.text[at : at + len(token)] == token
    only = client.completions.create(
        model=case.model, prompt=prompt, echo=True, logprobs=2, **{**how, "max_tokens": 0}
    )
    assert only.choices[0].text == prompt
    assert only.choices[0].logprobs is not None
    assert only.choices[0].logprobs.token_logprobs == scored.token_logprobs[: usage.prompt_tokens]


@check
def completions_have_a_logprob_a_token(case: Case) -> None:
    client, end = client_of(case), case.end_token()
    how: Any = {
        "max_tokens": 9, "temperature": 0, "logprobs": 1, "logit_bias": {str(end): 100},
        "extra_body": {"min_tokens": 3},
    }  # fmt: skip
    whole = client.completions.create(model=case.model, prompt="a whale", **how)
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 4
    scored = whole.choices[0].logprobs
    assert scored is not None
    assert whole.choices[0].finish_reason == "stop"
    assert len(scored.token_logprobs or []) == 4
    chunks = list(client.completions.create(
        model=case.model, prompt="a whale", stream=True, stream_options={"include_usage": True},
        **how,
    ))  # fmt: skip
    pieces = [c.choices[0].logprobs for c in chunks if c.choices]
    streamed = [one for p in pieces if p is not None for one in p.token_logprobs or []]
    assert streamed == scored.token_logprobs
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 4


# --- many at once ---------------------------------------------------------------------------------


@check
def asynchronous_answers_are_those_of_one_at_a_time(case: Case) -> None:
    alone = [chat(client_of(case), **{**SEEDED, "seed": s}) for s in range(6)]

    async def one(client: AsyncOpenAI, seed: int, stream: bool) -> str:
        how: Any = {**SEEDED, "seed": seed, "model": case.model, "messages": HELLO}
        if not stream:
            answer = await client.chat.completions.create(**how)
            return answer.choices[0].message.content or ""
        text = ""
        async for chunk in await client.chat.completions.create(stream=True, **how):
            text += chunk.choices[0].delta.content or ""
        return text

    async def both() -> None:
        async with AsyncOpenAI(base_url=f"{case.url}/v1", api_key="x", max_retries=0) as client:
            for stream in (False, True):
                texts = await asyncio.gather(*(one(client, s, stream) for s in range(6)))
                assert texts == [answer.choices[0].message.content for answer in alone]

    asyncio.run(both())


@check
def a_stream_may_be_left(case: Case) -> None:
    client = client_of(case)
    how = {**GREEDY, "max_tokens": LONG}
    for _ in range(3):
        with chat(client, stream=True, **how) as stream:
            next(iter(stream))
    assert chat(client, **GREEDY).choices[0].finish_reason == "length"


# --- as it is on the wire -------------------------------------------------------------------------


@check
def the_stream_to_the_letter(case: Case) -> None:
    """What broke other servers' clients: see the comments."""
    body = {
        "messages": HELLO, "max_tokens": 8, "temperature": 0, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    found = list(events(case.post("/v1/chat/completions", body)))
    assert all(name is None for name, _ in found)
    assert found[-1][1] == "[DONE]"
    chunks = [json.loads(data) for _, data in found[:-1]]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 8
    for place, chunk in enumerate(chunks[:-1]):
        (choice,) = chunk["choices"]
        # Load generators count the first chunk with a choice as the first token.
        assert ("role" in choice["delta"]) == (place == 0)
        assert isinstance(choice["delta"], dict)
        # The key is there and null until the end, never an empty string.
        last = place == len(chunks) - 2
        assert choice["finish_reason"] == ("length" if last else None)
        assert chunk["usage"] is None
    first = chunks[0]["choices"][0]["delta"]
    assert first["role"] == "assistant"
    assert first["content"] or first.get("reasoning"), "the role comes with the first text"
    bare = list(events(case.post("/v1/completions", {
        "prompt": "a whale", "max_tokens": 4, "stream": True, "temperature": 0, "ignore_eos": True,
    })))  # fmt: skip
    assert bare[-1][1] == "[DONE]"
    pieces = [json.loads(data)["choices"][0] for _, data in bare[:-1]]
    assert [piece["finish_reason"] for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1]["finish_reason"] == "length"
