"""Completions over HTTP: the engine's own answers, in the shapes that clients know."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest

from tests.serving.asking import GREEDY, complete, events
from tests.serving.support import NAME, TestServer, make_engine, make_tokenizer
from ziphius.inference.engine import Engine
from ziphius.inference.outputs import RequestOutput
from ziphius.inference.params import SamplingParams
from ziphius.model.transformer import Transformer

TEXT = "a whale dives"


@pytest.fixture(scope="module")
def engine(whale: Transformer) -> Engine:
    """The same model without a server."""
    return make_engine(whale, make_tokenizer())


def alone(engine: Engine, ids: list[int], **options: Any) -> RequestOutput:
    """Answer without a server."""
    request = engine.add(ids, SamplingParams(**{**GREEDY, **options}))
    while not request.finished:
        engine.step()
    return request.result()


def ids_of(text: str) -> list[int]:
    return [0, *make_tokenizer().encode(text, add_special_tokens=False).ids]


def test_the_answer_is_the_engines(server: TestServer, engine: Engine) -> None:
    whole = complete(server, prompt=TEXT, max_tokens=12, logprobs=2)
    expected = alone(engine, ids_of(TEXT), max_tokens=12, logprobs=2)
    (choice,) = whole["choices"]
    (output,) = expected.outputs
    assert whole["object"] == "text_completion"
    assert whole["model"] == NAME
    assert choice["text"] == output.text
    assert choice["finish_reason"] == "length"
    assert output.logprobs is not None
    # The very same floats.
    assert choice["logprobs"]["token_logprobs"] == [one.logprob for one in output.logprobs]
    assert whole["usage"]["prompt_tokens"] == len(ids_of(TEXT))
    assert whole["usage"]["completion_tokens"] == 12
    assert whole["usage"]["total_tokens"] == len(ids_of(TEXT)) + 12


def test_sixteen_tokens_unless_told(server: TestServer) -> None:
    assert complete(server, prompt=TEXT)["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize(
    "prompt",
    [TEXT, [TEXT], ids_of(TEXT), [ids_of(TEXT)], [TEXT, "the sea"], [ids_of(TEXT), [0, 9]]],
    ids=["text", "texts", "ids", "lists", "two texts", "two lists"],
)
def test_every_form_of_prompt(server: TestServer, engine: Engine, prompt: Any) -> None:
    several = isinstance(prompt, list) and not isinstance(prompt[0], int)
    each = prompt if several else [prompt]
    ids = [ids_of(one) if isinstance(one, str) else one for one in each]
    choices = complete(server, prompt=prompt, max_tokens=5)["choices"]
    assert [choice["index"] for choice in choices] == list(range(len(each)))
    expected = [alone(engine, one, max_tokens=5).outputs[0].text for one in ids]
    assert [choice["text"] for choice in choices] == expected


def test_n_answers_of_each_prompt_in_order(server: TestServer) -> None:
    asked = {"prompt": [TEXT, "the sea"], "n": 3, "max_tokens": 5, "temperature": 1, "seed": 7}
    first, again = (complete(server, **asked)["choices"] for _ in range(2))
    assert [choice["index"] for choice in first] == list(range(6))
    assert first == again
    assert len({choice["text"] for choice in first}) > 2


@pytest.mark.parametrize("echo", [False, True])
def test_a_stream_is_the_whole_answer_in_pieces(server: TestServer, echo: bool) -> None:
    asked = {**GREEDY, "prompt": [TEXT, "the sea"], "n": 2, "max_tokens": 9, "echo": echo}
    whole = complete(server, **asked)
    texts: dict[int, str] = {}
    ends: dict[int, str] = {}
    usage = None
    for chunk in events(server, "/v1/completions", **asked, stream_options={"include_usage": True}):
        assert (chunk["object"], chunk["model"]) == ("text_completion", NAME)
        if not chunk["choices"]:
            usage = chunk["usage"]
            continue
        assert usage is None, "the usage comes last"
        assert chunk["usage"] is None
        (choice,) = chunk["choices"]
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
        assert "finish_reason" in choice
        if choice["finish_reason"] is not None:
            ends[choice["index"]] = choice["finish_reason"]
    assert [texts[c["index"]] for c in whole["choices"]] == [c["text"] for c in whole["choices"]]
    assert ends == dict.fromkeys(range(4), "length")
    assert usage is not None
    assert usage["total_tokens"] == whole["usage"]["total_tokens"]


def test_usage_in_every_chunk(server: TestServer) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(events(server, "/v1/completions", **GREEDY, prompt=TEXT, stream_options=options))
    counted = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counted == sorted(counted)
    assert counted[-1] == 16


# --- log-probabilities ----------------------------------------------------------------------------


def spans(logprobs: dict[str, Any], text: str) -> Iterator[tuple[str, str]]:
    """Yield each token with the text between its offset and the next one's."""
    bounds = [*logprobs["text_offset"], len(text)]
    yield from zip(logprobs["tokens"], (text[a:b] for a, b in pairwise(bounds)), strict=True)


@pytest.mark.parametrize("prompt", [TEXT, ids_of(TEXT), "wal\u00e9 \U0001f433 deep"])
def test_echo_scores_the_prompt_as_the_engine_does(
    server: TestServer, engine: Engine, prompt: Any
) -> None:
    """As lm_eval asks: the first token has none, a token's own number is among the best."""
    answer = complete(server, prompt=prompt, max_tokens=1, echo=True, logprobs=1)
    (choice,) = answer["choices"]
    logprobs = choice["logprobs"]
    ids = ids_of(prompt) if isinstance(prompt, str) else prompt
    expected = alone(engine, ids, max_tokens=1, logprobs=1, prompt_logprobs=1)
    scored = [*(expected.prompt_logprobs or ()), *(expected.outputs[0].logprobs or ())]
    assert logprobs["token_logprobs"] == [None if one is None else one.logprob for one in scored]
    assert logprobs["top_logprobs"][0] is None
    for one, top in zip(scored[1:], logprobs["top_logprobs"][1:], strict=True):
        assert one is not None
        is_best = one.logprob == one.top[0].logprob
        assert (max(top.values()) == one.logprob) is is_best
    assert len(logprobs["tokens"]) == len(ids) + 1
    if prompt == TEXT:
        pieces = list(spans(logprobs, choice["text"]))
        assert pieces[0][1] == ""  # the first token, which the text does not spell
        assert all(token == span for token, span in pieces[1:-1])


def test_offsets_of_an_answer_divide_its_text(server: TestServer) -> None:
    (choice,) = complete(server, prompt=TEXT, max_tokens=60, logprobs=0)["choices"]
    whole = "".join(span for _, span in spans(choice["logprobs"], choice["text"]))
    assert whole == choice["text"]
    plain = [(t, span) for t, span in spans(choice["logprobs"], choice["text"]) if t.isalpha()]
    assert plain
    assert all(token == span for token, span in plain)


def test_an_entry_for_every_token_the_end_included(server: TestServer) -> None:
    asked = {"prompt": TEXT, "logit_bias": {"1": 100}, "ignore_eos": False, "logprobs": 1}
    answer = complete(server, **asked)
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["text"] == ""
    assert answer["usage"]["completion_tokens"] == 1
    assert len(choice["logprobs"]["tokens"]) == 1


def test_nothing_is_written_where_only_the_prompt_is_scored(server: TestServer) -> None:
    answer = complete(server, prompt=TEXT, max_tokens=0, echo=True, logprobs=0)
    assert answer["choices"][0]["text"] == TEXT
    assert answer["usage"]["completion_tokens"] == 0
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == len(ids_of(TEXT))


def test_prompt_logprobs_by_id(server: TestServer) -> None:
    answer = complete(server, prompt=TEXT, max_tokens=1, prompt_logprobs=2)
    scored = answer["choices"][0]["prompt_logprobs"]
    assert scored[0] is None
    for token, entry in zip(ids_of(TEXT)[1:], scored[1:], strict=True):
        assert entry[str(token)]["rank"] >= 1
        assert len(entry) in (2, 3)


# --- ends and forms -------------------------------------------------------------------------------


def test_a_stop_string_ends_it_and_is_named(server: TestServer) -> None:
    whole = complete(server, prompt=TEXT, max_tokens=20)["choices"][0]["text"]
    stop = whole[5:8]
    (choice,) = complete(server, prompt=TEXT, max_tokens=20, stop=[stop])["choices"]
    assert choice["text"] == whole[: whole.index(stop)]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)


def test_a_regular_expression_is_followed(server: TestServer) -> None:
    (choice,) = complete(
        server, prompt=TEXT, max_tokens=20, ignore_eos=False, guided_regex="(yes|no)"
    )["choices"]
    assert choice["text"] in ("yes", "no")
    assert choice["finish_reason"] == "stop"


def test_a_hole_between_two_texts(server: TestServer, engine: Engine) -> None:
    tokenizer = make_tokenizer()
    begin, hole, end = (
        tokenizer.token_to_id(f"<｜fim▁{name}｜>") for name in ("begin", "hole", "end")
    )
    before, after = (ids_of(text)[1:] for text in ("a whale", " sea"))
    ids = [0, begin, *before, hole, *after, end]
    (choice,) = complete(server, prompt="a whale", suffix=" sea", max_tokens=5)["choices"]
    assert choice["text"] == alone(engine, ids, max_tokens=5).outputs[0].text


def test_token_ids_on_request(server: TestServer, engine: Engine) -> None:
    (choice,) = complete(server, prompt=TEXT, max_tokens=5, return_token_ids=True)["choices"]
    expected = alone(engine, ids_of(TEXT), max_tokens=5)
    assert choice["token_ids"] == list(expected.outputs[0].token_ids)
    assert choice["prompt_token_ids"] == ids_of(TEXT)


def test_what_cannot_be_honoured_is_refused(server: TestServer) -> None:
    for field, value in {
        "best_of": 3, "use_beam_search": True, "kv_transfer_params": {"a": 1},
        "stream_options": {"include_usage": True},
    }.items():  # fmt: skip
        error = complete(server, 400, prompt=TEXT, **{field: value})["error"]
        assert field in error["message"]
        assert error["type"] == "invalid_request_error"


def test_unknown_fields_are_ignored_and_named(server: TestServer) -> None:
    with server.client() as client:
        body = {"prompt": TEXT, "max_tokens": 1, "brand_new": 1, "service_tier": "auto"}
        response = client.post("/v1/completions", json=body)
    assert response.status_code == 200
    assert response.headers["x-ziphius-ignored-fields"] == "brand_new,service_tier"
