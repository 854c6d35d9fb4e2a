"""``/v1/messages``, by the client that it was made for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from anthropic.types import Message, RawMessageStreamEvent
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from tests.serving import scripted as scripts
from tests.serving.scripted import ScriptedEngine, calls
from tests.serving.support import NAME, TestServer, make_engine, make_tokenizer, running
from ziphius.data.tokenizer import END_THINK, THINK
from ziphius.inference.chat import ChatTemplate
from ziphius.model.transformer import Transformer
from ziphius.serving.api.messages_out import Blocks, as_input
from ziphius.serving.profiles import PROFILES
from ziphius.serving.served import Served

TOOLS: list[Any] = [
    {"name": "dive", "input_schema": {"type": "object"}},
    {"name": "rise", "input_schema": {"type": "object"}},
]
HELLO: list[Any] = [{"role": "user", "content": "hi"}]
EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
SAID = (
    "I think", END_THINK, "Deep it is.\n\n",
    calls(("dive", '{"metres": 3}'), ("rise", '{"up": true}')),
)  # fmt: skip
ASKED: dict[str, Any] = {
    "model": NAME, "max_tokens": 200, "messages": HELLO, "tools": TOOLS,
    "thinking": {"type": "enabled", "budget_tokens": 1024},
}  # fmt: skip


@pytest.fixture
def client(scripted: TestServer) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=scripted.url, api_key="any", max_retries=0) as made:
        yield made


def engine(server: TestServer) -> ScriptedEngine:
    found = server.engine
    assert isinstance(found, ScriptedEngine)
    return found


def stream_of(server: TestServer, **body: Any) -> list[dict[str, Any]]:
    """Return the events of a stream, each accepted by the client's own types as they stand."""
    with server.client() as raw:
        text = raw.post("/v1/messages", json={**ASKED, "stream": True, **body}).text
    events = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        named, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert named == f"event: {events[-1]['type']}"
        if events[-1]["type"] not in ("ping", "error"):
            EVENT.validate_python(events[-1])
    return events


def plain(content: list[Any]) -> list[dict[str, Any]]:
    """Return blocks without the ids, which are fresh every time, and without empty fields."""
    found = [block if isinstance(block, dict) else block.to_dict() for block in content]
    return [{k: v for k, v in block.items() if k != "id" and v is not None} for block in found]


# --- answers --------------------------------------------------------------------------------------


def test_a_whole_message(scripted: TestServer, client: anthropic.Anthropic) -> None:
    engine(scripted).say(*SAID)
    answer = client.messages.with_raw_response.create(
        **ASKED, system="Be brief.", metadata={"user_id": "me"},
        extra_body={"temperature": 0.5, "top_p": 0.9, "top_k": 5},
    )  # fmt: skip
    message = Message.model_validate_json(answer.text())  # every field, as the client has it
    assert (message.role, message.model, message.stop_sequence) == ("assistant", NAME, None)
    assert message.stop_reason == "tool_use"
    assert plain(message.content) == [
        {"type": "thinking", "thinking": "I think", "signature": ""},
        {"type": "text", "text": "Deep it is."},
        {"type": "tool_use", "name": "dive", "input": {"metres": 3}},
        {"type": "tool_use", "name": "rise", "input": {"up": True}},
    ]
    prompt, usage = engine(scripted).prompts[-1], message.usage
    assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == len(prompt)
    assert usage.output_tokens == len(engine(scripted).script)
    assert usage.output_tokens_details is not None
    assert usage.output_tokens_details.thinking_tokens == len(
        make_tokenizer().encode("I think" + END_THINK).ids
    )
    again = client.messages.create(**ASKED, system="Be brief.")
    assert again.usage.cache_read_input_tokens
    assert again.usage.input_tokens + again.usage.cache_read_input_tokens == len(prompt)
    assert again._request_id not in (None, answer.headers["request-id"])


def test_a_stream_tells_of_everything_in_order(scripted: TestServer) -> None:
    engine(scripted).say(*SAID)
    events = stream_of(scripted)
    told = []
    for event in events:
        delta = event.get("delta", {})
        name = delta.get("type") or event.get("content_block", {}).get("type")
        told.append(f"{event['type']} {name}" if name else event["type"])
    assert [one for place, one in enumerate(told) if told[place - 1 : place] != [one]] == [
        "message_start",
        "content_block_start thinking", "ping", "content_block_delta thinking_delta",
        "content_block_delta signature_delta", "content_block_stop",
        "content_block_start text", "content_block_delta text_delta", "content_block_stop",
        "content_block_start tool_use", "content_block_delta input_json_delta",
        "content_block_stop",
        "content_block_start tool_use", "content_block_delta input_json_delta",
        "content_block_stop",
        "message_delta", "message_stop",
    ]  # fmt: skip
    places = [event["index"] for event in events if "index" in event]
    assert places == sorted(places)
    assert set(places) == {0, 1, 2, 3}
    start, end = events[0]["message"], events[-2]
    assert (start["content"], start["stop_reason"]) == ([], None)
    assert end["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert end["usage"]["output_tokens"] == len(engine(scripted).script)
    # The cache's share is known at the end; the sum was known before.
    assert start["usage"]["input_tokens"] == (
        end["usage"]["input_tokens"] + end["usage"]["cache_read_input_tokens"]
    )


def test_the_clients_stream_helper_takes_it(
    scripted: TestServer, client: anthropic.Anthropic
) -> None:
    engine(scripted).say(*SAID)
    with client.messages.stream(**ASKED) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    whole = client.messages.create(**ASKED)
    assert text == "Deep it is."
    assert plain(final.content) == plain(whole.content)
    assert (final.stop_reason, final.usage) == (whole.stop_reason, whole.usage)


@pytest.mark.parametrize("written", ['{"up": tr', "[1]", "up", '{"up": NaN}', '{"up": "\\ud800"}'])
def test_arguments_that_are_no_object_fail_nobody(
    scripted: TestServer, client: anthropic.Anthropic, written: str
) -> None:
    engine(scripted).say(END_THINK, calls(("rise", written)))
    with client.messages.stream(**ASKED) as stream:
        (block,) = stream.get_final_message().content
    assert plain([block]) == [
        {"type": "tool_use", "name": "rise", "input": {"INVALID_JSON": written}}
    ]
    whole = client.messages.create(**ASKED)
    assert plain(whole.content) == plain([block])
    # Sent back, they are what the model wrote.
    assert block.type == "tool_use"
    said = [
        *HELLO,
        {"role": "assistant", "content": [block.to_dict()]},
        {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": block.id, "is_error": True}],
        },
    ]
    client.messages.create(**{**ASKED, "messages": said})
    prompt = scripted.application.served.text(engine(scripted).prompts[-1])
    assert calls(("rise", written)) in prompt
    assert "Error: " in prompt


def test_an_eager_tool_has_its_arguments_as_they_come(scripted: TestServer) -> None:
    engine(scripted).say(END_THINK, calls(("rise", '{"up": tr')))
    events = stream_of(scripted, tools=[{**TOOLS[1], "eager_input_streaming": True}])
    pieces = [e["delta"]["partial_json"] for e in events if e["type"] == "content_block_delta"]
    assert "".join(pieces) == '{"up": tr'


@pytest.mark.parametrize(
    ("said", "asked", "reason", "sequence"),
    [
        (("a whale",), {}, "end_turn", None),
        (("a whale dives",), {"max_tokens": 2}, "max_tokens", None),
        (("a whale dives",), {"stop_sequences": ["xyz", " di"]}, "stop_sequence", " di"),
        ((calls(("rise", "{}")),), {}, "tool_use", None),
    ],
)
def test_why_it_ended(
    scripted: TestServer, client: anthropic.Anthropic, said: Any, asked: Any, reason: str,
    sequence: str | None,
) -> None:  # fmt: skip
    engine(scripted).say(*said)
    given = {**ASKED, "thinking": {"type": "disabled"}, **asked}
    message = client.messages.create(**given)
    assert (message.stop_reason, message.stop_sequence) == (reason, sequence)
    end = stream_of(scripted, **given)[-2]
    assert end["delta"] == {"stop_reason": reason, "stop_sequence": sequence}
    if sequence is not None:
        assert plain(message.content) == [{"type": "text", "text": "a whale"}]


@pytest.mark.parametrize(
    ("thinking", "opened"),
    [
        ({"type": "enabled", "budget_tokens": 1024}, True),
        ({"type": "adaptive"}, True),
        ({"type": "disabled"}, False),
        (None, False),
    ],
)
def test_thinking_opens_the_prompt(scripted: TestServer, thinking: Any, opened: bool) -> None:
    engine(scripted).say("a whale")
    stream_of(scripted, thinking=thinking)
    prompt = scripted.application.served.text(engine(scripted).prompts[-1])
    assert prompt.endswith(THINK if opened else END_THINK)


def test_thoughts_may_be_left_out(scripted: TestServer, client: anthropic.Anthropic) -> None:
    engine(scripted).say(*SAID[:3])
    asked: Any = {**ASKED, "thinking": {"type": "adaptive", "display": "omitted"}}
    with client.messages.stream(**asked) as stream:
        final = stream.get_final_message()
    whole = client.messages.create(**asked)
    assert plain(final.content) == plain(whole.content)
    assert plain(final.content)[0] == {"type": "thinking", "thinking": "", "signature": ""}


def test_a_last_message_of_the_assistants_is_gone_on_with(
    scripted: TestServer, client: anthropic.Anthropic
) -> None:
    engine(scripted).say(" dives")
    said: Any = [*HELLO, {"role": "assistant", "content": "a whale"}]
    message = client.messages.create(model=NAME, max_tokens=20, messages=said)
    assert plain(message.content) == [{"type": "text", "text": " dives"}]
    prompt = scripted.application.served.text(engine(scripted).prompts[-1])
    assert prompt.endswith("a whale")


def test_tokens_are_counted_as_they_are_read(
    scripted: TestServer, client: anthropic.Anthropic
) -> None:
    engine(scripted).say("a whale")
    asked: Any = {name: ASKED[name] for name in ("model", "messages", "tools", "thinking")}
    counted = client.messages.count_tokens(**asked, system=[{"type": "text", "text": "Be brief."}])
    client.messages.create(**asked, max_tokens=20, system="Be brief.")
    assert counted.input_tokens == len(engine(scripted).prompts[-1])


# --- how an answer is cut changes nothing ---------------------------------------------------------

PIECES = st.sampled_from(
    ["a whale", " ", "\n\n", "é", THINK, END_THINK, calls(("dive", '{"a": 1}'), ("rise", "{"))]
)


@pytest.fixture(scope="module")
def served() -> Served:
    return Served(NAME, make_tokenizer(), ChatTemplate(), bos=0, profile=PROFILES["none"])


@given(
    said=st.lists(PIECES, max_size=8),
    in_reasoning=st.booleans(),
    cuts=st.lists(st.integers(1, 60), max_size=6),
    eager=st.booleans(),
)
def test_how_an_answer_is_cut_changes_no_block(
    served: Served, said: list[str], in_reasoning: bool, cuts: list[int], eager: bool
) -> None:
    tokens = scripts.spell(served.tokenizer, said)

    def made(where: list[int]) -> list[dict[str, Any]]:
        blocks, told = Blocks(eager=["dive", "rise"] if eager else []), []
        parser = served.parser(in_reasoning, tools=True)
        for event in scripts.events(served.tokenizer, tokens, parser, where):
            told += blocks.add(event)
        for place, block in enumerate(blocks.content):
            deltas = [e["delta"] for e in told if e["index"] == place and "delta" in e]
            kind = {"tool_use": "partial_json"}.get(block["type"], block["type"])
            text = "".join(delta.get(kind, "") for delta in deltas)
            assert as_input(text) == block["input"] if kind == "partial_json" else block[kind]
        return plain(blocks.content)

    assert made([]) == made([0, *cuts])


# --- failures -------------------------------------------------------------------------------------


def test_a_failure_in_a_stream_ends_it(scripted: TestServer, client: anthropic.Anthropic) -> None:
    engine(scripted).say("half an answ", fails=True)
    last = stream_of(scripted)[-1]
    assert last["type"] == "error"
    assert last["error"]["type"] == "api_error"
    with (
        pytest.raises(anthropic.APIStatusError, match="the script says so"),
        client.messages.stream(**ASKED) as stream,
    ):
        stream.until_done()
    with pytest.raises(anthropic.InternalServerError):
        client.messages.create(**ASKED)


IMAGE = {"type": "image", "source": {"type": "url", "url": "http://x/y.png"}}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "reads text only"),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "reads text only"),
        ({"messages": [{"role": "assistant", "content": [IMAGE]}]}, "can't be read"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role = 'tool'"),
        ({"messages": []}, "messages"),
        ({"max_tokens": None}, "max_tokens"),
        ({"system": [IMAGE]}, "system[0]"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0]: type"),
        ({"tools": [{"name": "dive"}]}, "tools[0].input_schema"),
        ({"tool_choice": {"type": "tool"}}, "needs the tool's name"),
        ({"thinking": {"type": "between_tools"}}, "thinking.type"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format"),
        ({"container": "c"}, "container:"),
        ({"n": 2}, "n and"),
    ],
)
def test_what_cannot_be_done_is_refused(
    scripted: TestServer, body: dict[str, Any], message: str
) -> None:
    engine(scripted).say("a whale")
    with scripted.client() as raw:
        answer = raw.post("/v1/messages", json={**ASKED, **body})
    assert answer.status_code == 400, answer.text
    told = answer.json()
    assert (told["type"], told["error"]["type"]) == ("error", "invalid_request_error")
    assert message in told["error"]["message"]


def test_the_clients_key_is_read(whale: Transformer) -> None:
    tokenizer = make_tokenizer()
    with running(
        lambda: make_engine(whale, tokenizer), tokenizer=tokenizer, api_keys=("the-right-key",)
    ) as server:
        server.until(lambda: server.application.engine.state == "ready")
        asked: Any = {"model": NAME, "max_tokens": 2, "messages": HELLO}
        with anthropic.Anthropic(base_url=server.url, api_key="the-right-key") as right:
            assert right.messages.create(**asked).usage.output_tokens <= 2
            with pytest.raises(anthropic.NotFoundError):
                right.messages.create(**{**asked, "model": "claude"})
        with (
            anthropic.Anthropic(base_url=server.url, api_key="another-key") as wrong,
            pytest.raises(anthropic.AuthenticationError) as raised,
        ):
            wrong.messages.create(**asked)
        assert raised.value.request_id
