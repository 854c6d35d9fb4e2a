"""``/v1/responses``, by the client that it was made for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from tests.serving import scripted as scripts
from tests.serving.scripted import ScriptedEngine, calls
from tests.serving.support import NAME, TestServer, make_engine, make_tokenizer, running
from ziphius.data.tokenizer import END_THINK, THINK
from ziphius.inference.chat import ChatTemplate
from ziphius.model.transformer import Transformer
from ziphius.serving.api.responses_in import LOGPROBS
from ziphius.serving.api.responses_out import Output, TextScores
from ziphius.serving.api.responses_store import Kept, ResponseStore
from ziphius.serving.errors import ApiError
from ziphius.serving.profiles import PROFILES
from ziphius.serving.served import Served

TOOLS: list[Any] = [
    {"type": "function", "name": "dive", "parameters": {"type": "object"}, "strict": None},
    {"type": "function", "name": "rise", "parameters": {"type": "object"}, "strict": None},
]
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
SAID = (
    "I think", END_THINK, "Deep it is.\n\n",
    calls(("dive", '{"metres": 3}'), ("rise", '{"up": true}')),
)  # fmt: skip


@pytest.fixture
def client(scripted: TestServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{scripted.url}/v1", api_key="any", max_retries=0) as made:
        yield made


def engine(server: TestServer) -> ScriptedEngine:
    found = server.engine
    assert isinstance(found, ScriptedEngine)
    return found


def stream_of(server: TestServer, **body: Any) -> list[dict[str, Any]]:
    """Return the events of a stream, each accepted by the client's own types as they stand."""
    with server.client() as raw:
        text = raw.post("/v1/responses", json={"stream": True, **body}).text
    events = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        named, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert named == f"event: {events[-1]['type']}"
        EVENT.validate_python(events[-1])
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def plain(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return items without the ids, which are fresh every time."""
    return [{k: v for k, v in item.items() if k not in ("id", "call_id")} for item in items]


# --- answers --------------------------------------------------------------------------------------


def test_a_whole_response(scripted: TestServer, client: openai.OpenAI) -> None:
    engine(scripted).say(*SAID)
    answer = client.responses.with_raw_response.create(
        model=NAME, input="hi", tools=TOOLS, reasoning={"effort": "high"}, metadata={"a": "b"},
        instructions="Be brief.", temperature=0.5, user="me", safety_identifier="x",
    )  # fmt: skip
    response = Response.model_validate_json(answer.text)  # every field, as the client has it
    assert response.status == "completed"
    assert response.incomplete_details is response.error is None
    assert response.metadata == {"a": "b"}
    assert (response.instructions, response.temperature, response.top_p) == ("Be brief.", 0.5, 1.0)
    thoughts, message, first, second = response.output
    assert thoughts.type == "reasoning"
    assert thoughts.content is not None
    assert [part.text for part in thoughts.content] == ["I think"]
    assert message.type == "message"
    assert response.output_text == "Deep it is."
    assert first.type == second.type == "function_call"
    assert (first.name, first.arguments) == ("dive", '{"metres": 3}')
    assert (second.name, second.arguments) == ("rise", '{"up": true}')
    assert first.call_id != second.call_id
    usage = response.usage
    assert usage is not None
    assert usage.input_tokens == len(engine(scripted).prompts[-1])
    assert usage.output_tokens == len(engine(scripted).script)
    assert usage.output_tokens_details.reasoning_tokens == len(
        make_tokenizer().encode("I think" + END_THINK).ids
    )
    again = client.responses.create(
        model=NAME, input="hi", tools=TOOLS, reasoning={"effort": "high"}, instructions="Be brief."
    )
    assert again.usage is not None
    assert again.usage.input_tokens_details.cached_tokens > 0


def test_a_stream_tells_of_everything_in_order(scripted: TestServer) -> None:
    engine(scripted).say(*SAID)
    body = {"input": "hi", "tools": TOOLS, "reasoning": {"effort": "high"}}
    events = stream_of(scripted, **body)
    kinds = [event["type"].removeprefix("response.") for event in events]
    shape = [kind for place, kind in enumerate(kinds) if kinds[place - 1 : place] != [kind]]
    text = ["output_item.added", "content_part.added", "{0}.delta", "{0}.done",
            "content_part.done", "output_item.done"]  # fmt: skip
    one_call = ["output_item.added", "function_call_arguments.delta",
                "function_call_arguments.done", "output_item.done"]  # fmt: skip
    assert shape == [
        "created", "in_progress",
        *(kind.format("reasoning_text") for kind in text),
        *(kind.format("output_text") for kind in text),
        *one_call, *one_call,
        "completed",
    ]  # fmt: skip
    final = events[-1]["response"]
    assert final["output"] == [
        e["item"] for e in events if e["type"] == "response.output_item.done"
    ]
    for kind, whole in (("reasoning_text", "I think"), ("output_text", "Deep it is.")):
        deltas = [e["delta"] for e in events if e["type"] == f"response.{kind}.delta"]
        assert "".join(deltas) == whole
    with scripted.client() as raw:
        answer = raw.post("/v1/responses", json=body).json()
    assert plain(answer["output"]) == plain(final["output"])
    assert answer["usage"]["output_tokens"] == final["usage"]["output_tokens"]


def test_the_clients_stream_helper_takes_it(scripted: TestServer, client: openai.OpenAI) -> None:
    engine(scripted).say(*SAID)
    with client.responses.stream(
        model=NAME, input="hi", tools=TOOLS, reasoning={"effort": "low"}
    ) as stream:
        seen = list(stream)
        final = stream.get_final_response()
    assert final.output_text == "Deep it is."
    assert [item.type for item in final.output] == [
        "reasoning", "message", "function_call", "function_call",
    ]  # fmt: skip
    arguments = [e.snapshot for e in seen if e.type == "response.function_call_arguments.delta"]
    assert arguments[-1] == '{"up": true}'


def test_a_cut_answer_is_incomplete(scripted: TestServer, client: openai.OpenAI) -> None:
    engine(scripted).say("I think and think")
    events = stream_of(scripted, input="hi", reasoning={"effort": "high"}, max_output_tokens=4)
    assert events[-1]["type"] == "response.incomplete"
    response = client.responses.create(
        model=NAME, input="hi", reasoning={"effort": "high"}, max_output_tokens=4
    )
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.usage is not None
    assert response.usage.output_tokens == 4
    (thoughts,) = response.output
    assert thoughts.type == "reasoning"
    assert thoughts.status == "incomplete"
    assert plain(events[-1]["response"]["output"]) == plain([thoughts.to_dict()])


def test_an_answer_of_nothing_is_an_empty_message(scripted: TestServer) -> None:
    engine(scripted).say()
    (message,) = stream_of(scripted, input="hi")[-1]["response"]["output"]
    assert [part["text"] for part in message["content"]] == [""]


def test_logprobs_are_those_of_the_text(scripted: TestServer) -> None:
    engine(scripted).say(*SAID)
    asked = {"input": "hi", "tools": TOOLS, "reasoning": {"effort": "high"}}
    events = stream_of(scripted, **asked, include=[LOGPROBS], top_logprobs=2)
    (part,) = events[-1]["response"]["output"][1]["content"]
    assert "".join(entry["token"] for entry in part["logprobs"]) == part["text"]
    assert all(len(entry["top_logprobs"]) == 2 for entry in part["logprobs"])
    deltas = [e["logprobs"] for e in events if e["type"] == "response.output_text.delta"]
    assert [entry for entries in deltas for entry in entries] == part["logprobs"]
    with scripted.client() as raw:
        whole = raw.post("/v1/responses", json={**asked, "include": [LOGPROBS]}).json()
    scored = whole["output"][1]["content"][0]["logprobs"]
    assert [e["logprob"] for e in scored] == [e["logprob"] for e in part["logprobs"]]
    assert all(entry["top_logprobs"] == [] for entry in scored)


# --- how an answer is cut changes nothing ---------------------------------------------------------

PIECES = st.sampled_from(
    ["a whale", " ", "\n\n", "dives", "é", THINK, END_THINK, calls(("dive", '{"a": 1}')), "\n"]
)


@pytest.fixture(scope="module")
def served() -> Served:
    return Served(NAME, make_tokenizer(), ChatTemplate(), bos=0, profile=PROFILES["none"])


@given(
    said=st.lists(PIECES, max_size=8),
    in_reasoning=st.booleans(),
    tools=st.booleans(),
    cuts=st.lists(st.integers(1, 60), max_size=6),
)
def test_how_an_answer_is_cut_changes_no_item(
    served: Served, said: list[str], in_reasoning: bool, tools: bool, cuts: list[int]
) -> None:
    tokens = scripts.spell(served.tokenizer, said)

    def made(where: list[int]) -> list[dict[str, Any]]:
        scores = TextScores(served, in_reasoning=in_reasoning, tools=tools)
        output, told = Output(served, scores), []
        parser = served.parser(in_reasoning, tools=tools)
        for event in scripts.events(served.tokenizer, tokens, parser, where):
            told += output.add(event)
        for item in (item for item in output.items if item["type"] == "message"):
            mine = [event for event in told if event.get("item_id") == item["id"]]
            deltas = [e["delta"] for e in mine if e["type"] == "response.output_text.delta"]
            (part,) = item["content"]
            assert "".join(deltas) == part["text"]
        return plain(output.items)

    items = made([])
    assert items == made([0, *cuts])
    called = False
    for item in items:
        called = called or item["type"] == "function_call"
        if item["type"] != "message":
            continue
        # The blanks around its tokens may be left out of a text; nothing else is.
        (part,) = item["content"]
        spelled = b"".join(bytes(entry["bytes"]) for entry in part["logprobs"]).decode()
        assert called or "".join(spelled.split()) == "".join(part["text"].split())


# --- going on -------------------------------------------------------------------------------------


def test_a_response_goes_on_from_another(scripted: TestServer, client: openai.OpenAI) -> None:
    tools = engine(scripted)
    tools.say("first answer ", calls(("dive", "{}")))
    first = client.responses.create(
        model=NAME, input="hi", tools=TOOLS, instructions="Only for the first."
    )
    result: Any = {
        "type": "function_call_output", "call_id": first.output[1].call_id, "output": "wet",
    }  # fmt: skip
    tools.say("second answer")
    second = client.responses.create(model=NAME, input=[result], previous_response_id=first.id)
    gone_on = tools.prompts[-1]
    made: Any = [item.to_dict() for item in first.output]
    client.responses.create(
        model=NAME, input=[{"role": "user", "content": "hi"}, *made, result], store=False
    )
    assert gone_on == tools.prompts[-1]
    third = client.responses.create(model=NAME, input="more", previous_response_id=second.id)
    text = scripted.application.served.text(tools.prompts[-1])
    assert re.findall("first answer|wet|second answer|more", text) == [
        "first answer", "wet", "second answer", "more",
    ]  # fmt: skip
    assert third.previous_response_id == second.id
    assert client.responses.retrieve(second.id).to_dict() == second.to_dict()


def test_what_is_not_stored_is_not_found(scripted: TestServer, client: openai.OpenAI) -> None:
    engine(scripted).say("an answer")
    kept = client.responses.create(model=NAME, input="hi")
    dropped = client.responses.create(model=NAME, input="hi", store=False)
    with pytest.raises(openai.BadRequestError, match="background"):
        client.responses.cancel(kept.id)
    client.responses.delete(kept.id)
    for name in (kept.id, dropped.id, "resp_none"):
        routes = client.responses
        for call in (routes.retrieve, routes.delete, routes.cancel):
            with pytest.raises(openai.NotFoundError):
                call(name)
        with pytest.raises(openai.NotFoundError) as raised:
            client.responses.create(model=NAME, input="more", previous_response_id=name)
        assert raised.value.code == "previous_response_not_found"
        assert raised.value.param == "previous_response_id"


def test_a_streamed_response_is_stored_before_its_end_is_told(
    scripted: TestServer, client: openai.OpenAI
) -> None:
    engine(scripted).say("an answer")
    with client.responses.create(model=NAME, input="hi", stream=True) as stream:
        for event in stream:
            if event.type == "response.completed":
                found = client.responses.retrieve(event.response.id)
                assert found.to_dict() == event.response.to_dict()
                break
        else:
            raise AssertionError("it did not end")


def test_each_key_has_its_own_responses(whale: Transformer) -> None:
    tokenizer = make_tokenizer()
    keys = ("key-number-one", "key-number-two")
    with running(
        lambda: make_engine(whale, tokenizer), tokenizer=tokenizer, api_keys=keys
    ) as server:
        server.until(lambda: server.application.engine.state == "ready")
        one, two = (
            openai.OpenAI(base_url=f"{server.url}/v1", api_key=k, max_retries=0) for k in keys
        )
        made = one.responses.create(model=NAME, input="hi", max_output_tokens=2)
        assert one.responses.retrieve(made.id).id == made.id
        with pytest.raises(openai.NotFoundError):
            two.responses.retrieve(made.id)
        with pytest.raises(openai.NotFoundError):
            two.responses.create(model=NAME, input="hi", previous_response_id=made.id)
        one.close()
        two.close()


@given(
    sizes=st.lists(st.integers(0, 12), max_size=30),
    used=st.lists(st.integers(0, 29), max_size=30),
)
def test_the_store_keeps_the_latest_within_its_bounds(sizes: list[int], used: list[int]) -> None:
    store = ResponseStore(4, 20)
    order: list[str] = []  # the one used last is last
    size_of = {str(place): size for place, size in enumerate(sizes)}
    for name, size in size_of.items():
        store.put(name, Kept("me", b"r" * size, b""))
        order.append(name)
        while len(order) > 4 or sum(size_of[one] for one in order) > 20:
            order.pop(0)
        for one in map(str, used[:1]):
            if one in order:
                store.get(one, "me")
                order.remove(one)
                order.append(one)
            else:
                with pytest.raises(ApiError):
                    store.get(one, "me")
        used = used[1:]
        assert list(store._kept) == order
        assert store.bytes == sum(size_of[one] for one in order)


def test_a_response_beyond_the_bounds_drops_no_other() -> None:
    store = ResponseStore(4, 20)
    store.put("small", Kept("me", b"r", b""))
    store.put("large", Kept("me", b"r" * 21, b""))
    assert store.get("small", "me").size == 1
    with pytest.raises(ApiError):
        store.get("large", "me")


# --- failures -------------------------------------------------------------------------------------


def test_a_failure_in_a_stream_ends_it(scripted: TestServer) -> None:
    engine(scripted).say("half an answ", fails=True)
    events = stream_of(scripted, input="hi")
    assert [event["type"] for event in events[-2:]] == ["error", "response.failed"]
    assert "the script says so" in events[-2]["message"]
    response = events[-1]["response"]
    assert (response["status"], response["error"]["code"]) == ("failed", "server_error")
    # What came together with the failure is lost with it.
    assert all(item["status"] == "incomplete" for item in response["output"])
    with scripted.client() as raw:
        assert raw.post("/v1/responses", json={"input": "hi"}).status_code == 500
        assert raw.get(f"/v1/responses/{response['id']}").status_code == 404


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"background": True}, "background:"),
        ({"conversation": "conv_1"}, "conversation:"),
        ({"truncation": "auto"}, "truncation:"),
        ({"n": 2}, "n:"),
        ({"prompt": {"id": "x"}}, "prompt:"),
        ({"top_logprobs": 3}, "top_logprobs: needs include"),
        ({"text": {"verbosity": "low"}}, "text.verbosity:"),
        ({"text": {"format": "json"}}, "text.format"),
        ({"metadata": {"k" * 65: "v"}}, "metadata:"),
        ({"metadata": {str(i): "v" for i in range(17)}}, "metadata:"),
        ({"metadata": {"k": "\ud800"}}, "cannot be repeated"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]: type = 'web_search'"),
        ({"tools": [{**TOOLS[0], "parameters": {"maximum": 10**30}}]}, "cannot be repeated"),
        ({"tools": [{"type": "function"}]}, "tools[0]"),
        ({"input": []}, "input: give"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "reads text only"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
    ],
)
def test_what_cannot_be_done_is_refused(
    scripted: TestServer, body: dict[str, Any], message: str
) -> None:
    engine(scripted).say("an answer")
    with scripted.client() as raw:
        content = json.dumps({"input": "hi", **body}).encode()
        answer = raw.post(
            "/v1/responses", content=content, headers={"content-type": "application/json"}
        )
    assert answer.status_code == 400, answer.text
    assert message in answer.json()["error"]["message"]
