"""Models and chats, whole and streamed."""

from __future__ import annotations

from typing import Any

import openai

from tests.clients.checks.case import Case, Check
from tests.clients.checks.openai_base import (
    GREEDY,
    SEEDED,
    ascii_part,
    chat,
    client_of,
    collector,
    gathered,
    raises,
    strict_client,
)

CHECKS: list[Check] = []
check = collector(CHECKS)


# --- models ---------------------------------------------------------------------------------------


@check
def models_are_listed_and_retrieved(case: Case) -> None:
    client = client_of(case)
    (model,) = client.models.list().data
    assert model.id == case.model
    assert model.object == "model"
    assert model.created > 1_600_000_000
    assert model.owned_by
    assert client.models.retrieve(case.model) == model
    assert model.max_model_len > 0  # type: ignore[attr-defined]
    raises(openai.NotFoundError, lambda: client.models.retrieve("another"))


# --- chats ----------------------------------------------------------------------------------------


@check
def a_chat(case: Case) -> None:
    answer = chat(client_of(case), **GREEDY)
    (choice,) = answer.choices
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == case.model
    assert choice.message.role == "assistant"
    assert isinstance(choice.message.content, str)
    assert choice.finish_reason == "length"
    assert choice.message.tool_calls is None
    assert choice.logprobs is None
    usage = answer.usage
    assert usage.completion_tokens == 16
    assert usage.total_tokens == usage.prompt_tokens + 16
    assert usage.prompt_tokens_details.cached_tokens <= usage.prompt_tokens
    assert usage.completion_tokens_details.reasoning_tokens == 0


@check
def a_seed_repeats_an_answer(case: Case) -> None:
    client = client_of(case)
    first, again, other = (chat(client, **{**SEEDED, "seed": s}) for s in (7, 7, 8))
    assert first.choices == again.choices
    assert first.choices[0].message.content != other.choices[0].message.content
    assert first.system_fingerprint == again.system_fingerprint
    assert chat(client, **{**SEEDED, "seed": -1}).choices, "any integer is a seed"


@check
def a_stream_is_the_whole_answer(case: Case) -> None:
    client = client_of(case)
    for how in (GREEDY, SEEDED):
        whole = chat(client, **how)
        chunks = list(chat(client, stream=True, **how))
        role, content, reasons = gathered(chunks)
        assert role == "assistant"
        assert content == whole.choices[0].message.content
        assert reasons == ["length"]
        assert len({chunk.id for chunk in chunks}) == 1
        assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
        assert all(chunk.usage is None for chunk in chunks)
        assert chunks[-1].choices[0].finish_reason == "length"


@check
def stream_options_tell_the_usage(case: Case) -> None:
    client = client_of(case)
    whole = chat(client, **GREEDY)
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}, **GREEDY))
    assert chunks[-1].choices == []
    assert all(chunk.choices and chunk.usage is None for chunk in chunks[:-1])
    usage = chunks[-1].usage
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert getattr(usage, name) == getattr(whole.usage, name)
    options = {"include_usage": True, "continuous_usage_stats": True}
    steps = list(chat(client, stream=True, stream_options=options, **GREEDY))
    counts = [chunk.usage.completion_tokens for chunk in steps]
    assert counts == sorted(counts)
    assert counts[-1] == 16
    error = raises(
        openai.BadRequestError,
        lambda: chat(client, stream_options={"include_usage": True}, **GREEDY),
    )
    assert "stream" in str(error)


@check
def several_answers(case: Case) -> None:
    client = client_of(case)
    whole = chat(client, n=3, **SEEDED)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    texts = [choice.message.content for choice in whole.choices]
    assert len(set(texts)) == 3
    assert whole.usage.completion_tokens == 3 * 16
    chunks = list(chat(client, n=3, stream=True, **SEEDED))
    for index, text in enumerate(texts):
        assert gathered(chunks, index) == ("assistant", text, ["length"])


@check
def stop_strings_end_a_chat(case: Case) -> None:
    client = client_of(case)
    for seed in range(50):  # a model that has learnt nothing writes few letters
        how = {**SEEDED, "seed": seed, "max_tokens": 32}
        text = chat(client, **how).choices[0].message.content
        if (stop := ascii_part(text)) is not None:
            break
    assert stop is not None, "no answer with two letters"
    expected = text[: text.index(stop)]
    for given in (stop, ["never in it", stop]):
        whole = chat(client, stop=given, **how)
        assert whole.choices[0].message.content.rstrip() == expected.rstrip()
        assert whole.choices[0].finish_reason == "stop"
        chunks = list(chat(client, stop=given, stream=True, **how))
        assert gathered(chunks)[1].rstrip() == expected.rstrip()
        assert gathered(chunks)[2] == ["stop"]


@check
def every_token_has_its_logprob(case: Case) -> None:
    client = client_of(case)
    how = {**GREEDY, "logprobs": True, "top_logprobs": 3}
    whole = chat(client, **how)
    content = whole.choices[0].logprobs.content
    assert len(content) == whole.usage.completion_tokens == 16
    for entry in content:
        assert entry.logprob <= 0
        assert len(entry.top_logprobs) == 3
        logprobs = [top.logprob for top in entry.top_logprobs]
        assert logprobs == sorted(logprobs, reverse=True)
        assert entry.logprob == logprobs[0], "greedy takes the likeliest, and it is the same float"
        assert bytes(entry.bytes).decode(errors="replace") == entry.token
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}, **how))
    pieces = [c.choices[0].logprobs for c in chunks if c.choices]
    streamed = [entry for piece in pieces if piece is not None for entry in piece.content]
    assert streamed == content
    assert len(streamed) == chunks[-1].usage.completion_tokens


@check
def the_end_token_has_its_logprob_too(case: Case) -> None:
    client, end = client_of(case), case.end_token()
    how: Any = {
        "max_tokens": 9, "temperature": 0, "logprobs": True, "logit_bias": {str(end): 100},
        "extra_body": {"min_tokens": 3},
    }  # fmt: skip
    whole = chat(client, **how)
    assert whole.choices[0].finish_reason == "stop"
    content = whole.choices[0].logprobs.content
    assert len(content) == whole.usage.completion_tokens == 4
    assert content[-1].token == case.get("/tokenizer_info")["eos_token"]
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}, **how))
    pieces = [c.choices[0].logprobs for c in chunks if c.choices]
    streamed = [entry for piece in pieces if piece is not None for entry in piece.content]
    assert streamed == content
    assert chunks[-1].usage.completion_tokens == 4


@check
def both_reasoning_fields_say_the_same(case: Case) -> None:
    client = strict_client(case)
    how: Any = {**GREEDY, "extra_body": {
        "ignore_eos": True, "chat_template_kwargs": {"thinking": True},
    }}  # fmt: skip
    whole = chat(client, **how)
    message = whole.choices[0].message
    assert message.reasoning
    assert message.reasoning == message.reasoning_content
    assert whole.usage.completion_tokens_details.reasoning_tokens == 16
    chunks = list(chat(client, stream=True, **how))
    deltas = [c.choices[0].delta.model_dump(exclude_unset=True) for c in chunks]
    texts = [delta for delta in deltas if "reasoning" in delta or "reasoning_content" in delta]
    assert all(delta["reasoning"] == delta["reasoning_content"] for delta in texts)
    assert "".join(delta["reasoning"] for delta in texts) == message.reasoning
