"""``openai``: what its users do, and what the client makes of the answers."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import openai
import pydantic
from openai import AsyncOpenAI, OpenAI

from tests.clients.checks.case import Case, Check, events, run

HELLO: Any = [{"role": "user", "content": "a whale dives"}]
# Short prompts and answers: the smallest checkpoints have short contexts.
GREEDY: Any = {"max_tokens": 16, "temperature": 0, "extra_body": {"ignore_eos": True}}
SEEDED: Any = {**GREEDY, "temperature": 1, "seed": 7}
LONG = 150

CHECKS: list[Check] = []


def check(function: Check) -> Check:
    """Add a check to the list."""
    CHECKS.append(function)
    return function


def client_of(case: Case, **options: Any) -> OpenAI:
    """Return a client of the server that takes any key."""
    given = {"api_key": "anything", "timeout": 60, "max_retries": 0, **options}
    return OpenAI(base_url=f"{case.url}/v1", **given)


def strict_client(case: Case, **options: Any) -> OpenAI:
    """Return a client of the server that wants a key and has room for two answers."""
    given = {"api_key": case.keys[0], "timeout": 60, "max_retries": 0, **options}
    return OpenAI(base_url=f"{case.strict_url}/v1", **given)


def raises(kind: type[Exception], call: Callable[[], Any]) -> Any:
    """Return the error that a call raises, which must be just of this kind."""
    error: openai.OpenAIError | None = None
    try:
        call()
    except openai.OpenAIError as raised:
        error = raised
    assert type(error) is kind, f"{type(error).__name__} instead of {kind.__name__}: {error}"
    return error


def ascii_part(text: str, size: int = 2) -> str | None:
    """Return a piece of a text, not at its beginning, that no token of half a character spoils."""
    for at in range(3, len(text) - size):
        piece = text[at : at + size]
        if piece.isascii() and piece.isprintable() and piece.strip() == piece:
            return piece
    return None


def chat(client: OpenAI, **more: Any) -> Any:
    """Answer the one conversation, by whatever model is there."""
    return client.chat.completions.create(**{"model": None, "messages": HELLO, **more})


# --- models -----------------------------------------------------------------------------------


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


# --- chats ------------------------------------------------------------------------------------


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


def gathered(chunks: list[Any], index: int = 0) -> tuple[str, str, list[str]]:
    """Return role, content and finish reasons of one answer of a stream."""
    mine = [c for chunk in chunks for c in chunk.choices if c.index == index]
    role = "".join(c.delta.role or "" for c in mine)
    content = "".join(c.delta.content or "" for c in mine)
    return role, content, [c.finish_reason for c in mine if c.finish_reason is not None]


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


# --- tools ------------------------------------------------------------------------------------

# The model writes noise: blanks, where a grammar has room for them, without end.
PLAIN: Any = {"x-guidance": {"whitespace_flexible": False}}
DIVE: Any = {
    "type": "function",
    "function": {
        "name": "dive",
        "description": "Go down.",
        "parameters": {
            "type": "object",
            "properties": {"deep": {"type": "boolean"}, "who": {"enum": ["whale", "squid"]}},
            "required": ["deep", "who"],
            "additionalProperties": False,
            **PLAIN,
        },
    },
}
BREATHE: Any = {
    "type": "function",
    "function": {
        "name": "breathe",
        "parameters": {
            "type": "object",
            "properties": {"often": {"type": "boolean"}},
            "required": ["often"],
            "additionalProperties": False,
            **PLAIN,
        },
    },
}
CALLING: Any = {"tools": [DIVE, BREATHE], "max_tokens": 100, "temperature": 0}
ONE_CALL: Any = {**CALLING, "parallel_tool_calls": False}


def checked_call(call: Any, names: Sequence[str] = ("dive", "breathe")) -> None:
    """Hold a call to its tool's schema."""
    assert call.type == "function"
    assert call.id
    assert call.function.name in names
    arguments = json.loads(call.function.arguments)
    if call.function.name == "dive":
        assert set(arguments) == {"deep", "who"}
        assert arguments["who"] in ("whale", "squid")
        assert isinstance(arguments["deep"], bool)
    else:
        assert set(arguments) == {"often"}
        assert isinstance(arguments["often"], bool)


@check
def a_call_that_is_demanded(case: Case) -> None:
    client = client_of(case)
    for seed in range(3):
        how = {**ONE_CALL, "temperature": 1, "seed": seed, "tool_choice": "required"}
        (choice,) = chat(client, **how).choices
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        (call,) = choice.message.tool_calls
        checked_call(call)


@check
def a_call_of_a_named_tool(case: Case) -> None:
    client = client_of(case)
    for name in ("dive", "breathe"):
        named = {"type": "function", "function": {"name": name}}
        (choice,) = chat(client, tool_choice=named, **ONE_CALL).choices
        (call,) = choice.message.tool_calls
        checked_call(call, (name,))
    nobody = {"type": "function", "function": {"name": "nobody"}}
    raises(openai.BadRequestError, lambda: chat(client, tool_choice=nobody, **ONE_CALL))


@check
def tools_that_may_be_called(case: Case) -> None:
    client = client_of(case)
    for seed in range(4):
        how = {**CALLING, "temperature": 1, "seed": seed, "max_tokens": 30}
        for choice in ("auto", "none"):
            message = chat(client, tool_choice=choice, **how).choices[0].message
            # The model knows no tools: what it writes is text, without a mark of a call.
            assert message.tool_calls is None or choice == "auto"
            assert "tool▁call" not in (message.content or "")


@check
def a_streamed_call_is_put_together(case: Case) -> None:
    client = client_of(case)
    how = {**ONE_CALL, "tool_choice": "required"}
    whole = chat(client, **how).choices[0].message.tool_calls
    chunks = list(chat(client, stream=True, **how))
    deltas = [d for c in chunks for d in c.choices[0].delta.tool_calls or []]
    first, *later = deltas
    assert first.id
    assert first.type == "function"
    assert first.function.name == whole[0].function.name
    for delta in later:  # later pieces are of the arguments alone
        assert (delta.id, delta.type, delta.function.name) == (None, None, None)
    assert {delta.index for delta in deltas} == {0}
    arguments = "".join(delta.function.arguments or "" for delta in deltas)
    assert arguments == whole[0].function.arguments
    assert gathered(chunks)[2] == ["tool_calls"]
    # The client's own accumulator.
    with client.chat.completions.stream(model=case.model, messages=HELLO, **how) as stream:
        for _ in stream:
            pass
        message = stream.get_final_completion().choices[0].message
    (call,) = message.tool_calls or []
    assert call.function.name == whole[0].function.name
    assert call.function.arguments == arguments


@check
def the_answer_of_a_tool_goes_back(case: Case) -> None:
    client = client_of(case)
    (call,) = chat(client, tool_choice="required", **ONE_CALL).choices[0].message.tool_calls
    messages = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]},
        {"role": "tool", "tool_call_id": call.id, "content": "it went down"},
    ]
    answer = chat(client, messages=messages, **{**CALLING, "max_tokens": 8})
    assert answer.usage.prompt_tokens > chat(client, **GREEDY).usage.prompt_tokens


# --- answers of a form ------------------------------------------------------------------------


class Sighting(pydantic.BaseModel):
    """What a model of noise can be made to say."""

    model_config = pydantic.ConfigDict(json_schema_extra=PLAIN)

    who: Literal["whale", "squid"]
    deep: bool
    metres: int = pydantic.Field(ge=0, le=99)


@check
def answers_are_parsed(case: Case) -> None:
    client = client_of(case)
    for seed in range(3):
        answer = client.chat.completions.parse(
            model=case.model, messages=HELLO, response_format=Sighting, max_tokens=100, seed=seed
        )
        (choice,) = answer.choices
        assert choice.finish_reason == "stop"
        assert isinstance(choice.message.parsed, Sighting)
        assert 0 <= choice.message.parsed.metres <= 99


@check
def streamed_answers_are_parsed(case: Case) -> None:
    client = client_of(case)
    with client.chat.completions.stream(
        model=case.model, messages=HELLO, response_format=Sighting, max_tokens=100, seed=1
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion().choices[0].message.parsed
    assert isinstance(final, Sighting)
    assert {"chunk", "content.delta", "content.done"} <= kinds


@check
def a_schema_binds_an_answer(case: Case) -> None:
    client = client_of(case)
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"],
              "additionalProperties": False, **PLAIN}  # fmt: skip
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    for seed in range(3):
        content = chat(client, response_format=wanted, max_tokens=60, seed=seed)
        assert json.loads(content.choices[0].message.content)["n"] in (1, 2)
    guided = {"guided_choice": ["whale", "squid"]}
    assert chat(client, max_tokens=20, extra_body=guided).choices[0].message.content in (
        "whale", "squid",
    )  # fmt: skip
    wrong = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "whale"}}}
    raises(openai.BadRequestError, lambda: chat(client, response_format=wrong))
    raises(openai.BadRequestError, lambda: chat(client, response_format={"type": "xml"}))


# --- completions ------------------------------------------------------------------------------


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


# --- many at once -----------------------------------------------------------------------------


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


# --- errors -----------------------------------------------------------------------------------


@check
def what_is_wrong_with_a_request_is_told(case: Case) -> None:
    client = client_of(case)
    wrong: list[dict[str, Any]] = [
        {"temperature": 3}, {"temperature": "hot"}, {"n": 0}, {"messages": []}, {"top_p": 0},
        {"messages": [{"role": "nobody", "content": "x"}]}, {"messages": "hello"},
        {"logit_bias": {"1000000000": 1}}, {"max_tokens": 0}, {"stop": 3}, {"top_logprobs": 2},
        # What no number of the model's can be multiplied by, or be added to.
        {"logit_bias": {"5": 1e308}}, {"extra_body": {"repetition_penalty": 5e-324}},
    ]  # fmt: skip
    for given in wrong:
        error = raises(openai.BadRequestError, lambda given=given: chat(client, **given))
        assert error.status_code == 400
        assert error.type == "invalid_request_error"
        assert error.code, f"{given}: no code"
        assert error.body["message"]
        assert error.request_id == error.response.headers["x-request-id"]
        assert "Traceback" not in error.response.text
    assert raises(openai.BadRequestError, lambda: chat(client, n=0)).param == "n"


@check
def a_prompt_beyond_the_context_is_told(case: Case) -> None:
    client = client_of(case)
    long: Any = [{"role": "user", "content": "a whale and a squid. " * 2000}]
    for stream in (False, True):
        error = raises(
            openai.BadRequestError, lambda s=stream: chat(client, messages=long, stream=s)
        )
        assert error.code == "context_length_exceeded"


@check
def models_and_routes_that_are_none(case: Case) -> None:
    client = client_of(case)
    error = raises(openai.NotFoundError, lambda: chat(client, model="another"))
    assert (error.code, error.param) == ("model_not_found", "model")
    raises(openai.NotFoundError, lambda: client.post("/nowhere", cast_to=object, body={}))
    raises(openai.NotFoundError, lambda: client.files.list())


@check
def keys_open_the_server_that_wants_them(case: Case) -> None:
    assert chat(strict_client(case), **GREEDY).choices
    stranger = strict_client(case, api_key="not-one-of-the-keys")
    error = raises(openai.AuthenticationError, lambda: stranger.models.list())
    assert error.code == "invalid_api_key"
    raises(
        openai.AuthenticationError,
        lambda: stranger.chat.completions.create(model=case.model, messages=HELLO),
    )


def crowd(calls: list[Callable[[], Any]]) -> list[Any]:
    """Call all at once; return what each returned, or the error it raised."""
    found: list[Any] = [None] * len(calls)

    def call(place: int) -> None:
        try:
            found[place] = calls[place]()
        except Exception as error:
            found[place] = error

    threads = [threading.Thread(target=call, args=(place,)) for place in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return found


def _be_quick(client: OpenAI) -> None:
    """Let the server learn that answers are short: what it tells to wait follows from that."""
    for _ in range(35):
        chat(client, max_tokens=1)


@check
def a_full_server_is_tried_again(case: Case) -> None:
    """Four at a time, where there is room for three: the client's own retries get all through."""
    _be_quick(strict_client(case))
    how: Any = {**GREEDY, "max_tokens": LONG, "model": case.model}
    once = [strict_client(case, api_key=key) for key in case.keys * 2]
    results = crowd([lambda client=client: chat(client, **how) for client in once])
    refused = [one for one in results if isinstance(one, Exception)]
    assert refused, "four requests had room, which is for three"
    for error in refused:
        assert type(error) is openai.InternalServerError, repr(error)
        assert error.status_code == 503
        assert error.code == "server_full"
        assert 1 <= int(error.response.headers["retry-after"]) <= 60
    began = time.monotonic()
    patient = [strict_client(case, api_key=key, max_retries=20) for key in case.keys * 2]
    raw = [client.chat.completions.with_raw_response for client in patient]
    results = crowd([lambda one=one: one.create(messages=HELLO, **how) for one in raw])
    for one in results:
        assert not isinstance(one, Exception), repr(one)
        assert one.parse().usage.completion_tokens == LONG
    tries = [one.retries_taken for one in results]
    assert any(tries), "nobody was refused"
    waited = time.monotonic() - began
    assert waited >= 1, "Retry-After is at least a second"


@check
def a_client_with_too_many_requests_is_told(case: Case) -> None:
    client = strict_client(case)
    how: Any = {**GREEDY, "max_tokens": LONG, "model": case.model}
    results = crowd([lambda: chat(client, **how)] * 6)
    errors = [one for one in results if isinstance(one, Exception)]
    assert errors, "six requests of one key were open, where two may be"
    for error in errors:
        assert type(error) is openai.RateLimitError, repr(error)
        assert error.status_code == 429
        assert error.code == "too_many_requests"
        assert int(error.response.headers["retry-after"]) >= 1


@check
def an_error_in_a_stream_is_raised(case: Case) -> None:
    """The engine is started anew in the middle of an answer."""
    client = strict_client(case)
    chat(client, **GREEDY)
    how: Any = {**GREEDY, "max_tokens": LONG}

    def read() -> None:
        stream = chat(client, stream=True, **how)
        next(iter(stream))
        case.post("/admin/engine/restart", {}, strict=True, key=case.admin_key)
        for _ in stream:
            pass

    error = raises(openai.APIError, read)
    assert error.body["message"]
    assert error.body["code"] == "engine_unavailable"
    time.sleep(0.5)
    case.until_ready(strict=True)
    assert chat(client, **GREEDY).choices


# --- as it is on the wire ---------------------------------------------------------------------


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


if __name__ == "__main__":
    raise SystemExit(run(CHECKS, "openai"))
