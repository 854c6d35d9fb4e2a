"""What is no request, or a bad one: an error that says so, and a server that lives on."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.serving.clients import (
    connected,
    error_of,
    read_all,
    read_until,
    request,
    status_of,
    well,
)
from tests.serving.support import NAME, TestServer
from ziphius.model.transformer import Transformer
from ziphius.serving.options import Limits

LIMITS = Limits(
    max_body_bytes=1 << 20, body_seconds=1.0, head_seconds=1.0, max_head_bytes=16 << 10,
    request_seconds=30.0, drain_seconds=2.0,
)  # fmt: skip
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def server(whale: Transformer) -> Iterator[TestServer]:
    """A server with narrow limits; it is well at the end."""
    with well(whale, LIMITS) as started:
        yield started


@pytest.fixture(scope="module")
def client(server: TestServer) -> Iterator[httpx.Client]:
    """A client of it."""
    with server.client() as made:
        yield made


def nested(levels: int, inside: str = "1") -> str:
    return '{"a":' * levels + inside + "}" * levels


BODIES: dict[str, bytes] = {
    "empty": b"",
    "no JSON": b"{",
    "a word": b"hello",
    "null": b"null",
    "a list": b"[]",
    "a text": b'"prompt"',
    "a number": b"1",
    "no UTF-8": b'{"prompt": "\xff\xfe"}',
    "UTF-16": '{"prompt": "a"'.encode("utf-16"),
    "zeros": b"\0" * 100,
    "10,000 lists": b"[" * 10_000,
    "10,000 lists, closed": b"[" * 10_000 + b"]" * 10_000,
    "10,000 objects": f'{{"prompt": "a", "logit_bias": {nested(10_000)}}}'.encode(),
    "objects in an unknown field": f'{{"prompt": "a", "x": {nested(10_000)}}}'.encode(),
    "an integer of 5000 digits": b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
    "a lone surrogate": b'{"prompt": "a\\ud800b"}',
    "a lone surrogate in stop": b'{"prompt": "a", "stop": "\\udc00"}',
    "a lone surrogate as the model": b'{"prompt": "a", "model": "\\udc00"}',
    "temperature NaN": b'{"prompt": "a", "temperature": NaN}',
    "temperature Infinity": b'{"prompt": "a", "temperature": Infinity}',
    "bias NaN": b'{"prompt": "a", "logit_bias": {"5": NaN}}',
    "bias -Infinity": b'{"prompt": "a", "logit_bias": {"5": -Infinity}}',
    "max_tokens 1e400": b'{"prompt": "a", "max_tokens": 1e400}',
    "two prompts by one name": b'{"prompt": "a", "prompt": 5}',
}
FIELDS: dict[str, dict[str, Any]] = {
    "no prompt": {"max_tokens": 3},
    "prompt of a number": {"prompt": 3},
    "prompt of true": {"prompt": True},
    "no text": {"prompt": ""} | {"prompt": []},
    "an empty list of ids": {"prompt": [[]]},
    "mixed prompts": {"prompt": ["a", 5]},
    "129 prompts": {"prompt": ["a"] * 129},
    "a negative id": {"prompt": [-1]},
    "an id out of the vocabulary": {"prompt": [420]},
    "an id of 100 bits": {"prompt": [2**100]},
    "ids of true": {"prompt": [True, False]},
    "an id out of the vocabulary, echoed": {"prompt": [5, 10**9], "echo": True},
    "n 0": {"prompt": "a", "n": 0},
    "n 129": {"prompt": "a", "n": 129},
    "n beyond the room": {"prompt": ["a"] * 128, "n": 128},
    "n a text": {"prompt": "a", "n": "2"},
    "stream a text": {"prompt": "a", "stream": "yes"},
    "max_tokens negative": {"prompt": "a", "max_tokens": -1},
    "max_tokens half": {"prompt": "a", "max_tokens": 1.5},
    "min_tokens huge": {"prompt": "a", "min_tokens": 2**70, "max_tokens": 2**71},
    "top_k huge": {"prompt": "a", "top_k": 2**70},
    "stop id huge": {"prompt": "a", "stop_token_ids": [2**70]},
    "stop id out of the vocabulary": {"prompt": "a", "stop_token_ids": [420]},
    "bias of no token": {"prompt": "a", "logit_bias": {"x": 1}},
    "bias of a huge token": {"prompt": "a", "logit_bias": {str(2**70): 1}},
    "logprobs 101": {"prompt": "a", "logprobs": 101},
    "stream options without a stream": {"prompt": "a", "stream_options": {}},
    "best of": {"prompt": "a", "best_of": 3},
    "cache salt empty": {"prompt": "a", "cache_salt": ""},
}
CONVERSATIONS: dict[str, dict[str, Any]] = {
    "no messages": {},
    "an empty list": {"messages": []},
    "messages a text": {"messages": "hello"},
    "a message a text": {"messages": ["hello"]},
    "no role": {"messages": [{"content": "a"}]},
    "an unknown role": {"messages": [{"role": "whale", "content": "a"}]},
    "content a number": {"messages": [{"role": "user", "content": 5}]},
    "content an image": {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
    "a surrogate": {"messages": [{"role": "user", "content": "\ud800"}]},
    "tools a text": {"messages": [{"role": "user", "content": "a"}], "tools": "x"},
    "tools of nothing": {"messages": [{"role": "user", "content": "a"}], "tools": [{}]},
    "a choice of none": {"messages": [{"role": "user", "content": "a"}], "tool_choice": "x"},
    "top_logprobs alone": {"messages": [{"role": "user", "content": "a"}], "top_logprobs": 3},
}


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/tokenize", "/detokenize"])
@pytest.mark.parametrize("body", list(BODIES.values()), ids=list(BODIES))
def test_bodies(client: httpx.Client, path: str, body: bytes) -> None:
    answer = client.post(path, content=body, headers=JSON)
    if answer.status_code == 200:  # /tokenize knows no stop
        assert path == "/tokenize"
        return
    assert answer.status_code in (400, 404), answer.text
    error_of(answer)


@pytest.mark.parametrize("fields", list(FIELDS.values()), ids=list(FIELDS))
def test_completions(client: httpx.Client, fields: dict[str, Any]) -> None:
    answer = client.post(COMPLETIONS, json=fields)
    assert answer.status_code == 400, answer.text
    assert error_of(answer)["type"] == "invalid_request_error"


@pytest.mark.parametrize("fields", list(CONVERSATIONS.values()), ids=list(CONVERSATIONS))
def test_conversations(client: httpx.Client, fields: dict[str, Any]) -> None:
    answer = client.post(CHAT, content=json.dumps(fields), headers=JSON)
    assert answer.status_code == 400, answer.text
    assert error_of(answer)["type"] == "invalid_request_error"


@pytest.mark.parametrize("levels", [20, 100, 300, 500, 700, 900])
@pytest.mark.parametrize("where", ["tools", "content", "template", "schema", "unknown", "calls"])
def test_objects_in_objects(client: httpx.Client, levels: int, where: str) -> None:
    deep, user = json.loads(nested(levels)), {"role": "user", "content": "a"}
    calls = [{"id": "x", "type": "function", "function": {"name": "f", "arguments": deep}}]
    fields: dict[str, Any] = {
        "tools": {"tools": [{"type": "function", "function": {"name": "f", "parameters": deep}}]},
        "content": {"messages": [{"role": "user", "content": [{"type": "text", "text": deep}]}]},
        "template": {"chat_template_kwargs": {"x": deep}},
        "schema": {"guided_json": deep},
        "unknown": {"x": deep},
        "calls": {"messages": [user, {"role": "assistant", "content": "", "tool_calls": calls}]},
    }[where]
    body = json.dumps({"messages": [user], "max_tokens": 1, **fields})
    answer = client.post(CHAT, content=body, headers=JSON)
    assert answer.status_code in (200, 400), answer.text
    if answer.status_code == 400:
        error_of(answer)


def test_a_prompt_beyond_the_context(client: httpx.Client) -> None:
    long = "a whale dives " * 400
    for path, body in (
        (COMPLETIONS, {"prompt": long}),
        (COMPLETIONS, {"prompt": [5] * 512}),
        (CHAT, {"messages": [{"role": "user", "content": long}]}),
    ):
        answer = client.post(path, json=body)
        assert answer.status_code == 400
        assert error_of(answer)["code"] == "context_length_exceeded"
        assert "512" in error_of(answer)["message"]
    # What fits is answered to the context's end, whatever more is asked for.
    answer = client.post(COMPLETIONS, json={"prompt": [5] * 500, "max_tokens": 10**6}).json()
    assert answer["usage"]["completion_tokens"] <= 12


def test_routes_methods_models(client: httpx.Client) -> None:
    for method, path, status, code in (
        ("GET", "/v1/nothing", 404, None),
        ("POST", "/", 405, None),
        ("GET", "/page/../../options.py", 404, None),
        ("GET", "/page/%2e%2e/options.py", 404, None),
        ("GET", COMPLETIONS, 405, None),
        ("DELETE", CHAT, 405, None),
        ("POST", "/health", 405, None),
        ("GET", "/v1/models/other", 404, "model_not_found"),
        ("GET", "/admin/nothing", 403, None),
    ):
        answer = client.request(method, path)
        assert answer.status_code == status, (method, path, answer.text)
        assert code in (None, error_of(answer)["code"])
    answer = client.post(COMPLETIONS, json={"prompt": "a", "model": "other"})
    assert answer.status_code == 404
    assert error_of(answer)["code"] == "model_not_found"
    assert error_of(answer)["param"] == "model"
    assert client.post(COMPLETIONS, json={"prompt": "a", "model": NAME}).is_success


def test_a_slash_too_many_leads_nowhere(client: httpx.Client) -> None:
    for path in ("/health/", "/docs/", "/v1/models/", COMPLETIONS + "/"):
        for method in ("GET", "POST"):
            answer = client.request(method, path, headers={"host": "elsewhere.example"})
            assert answer.status_code in (404, 405), (method, path, answer.headers)
            error_of(answer)
    assert client.get("/health/").status_code == 404


def test_probes_may_ask_for_the_head_alone(client: httpx.Client) -> None:
    for path in ("/health", "/ready"):
        whole, head = client.get(path), client.head(path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == whole.headers["content-length"]
        assert client.post(path).headers["allow"] == "GET, HEAD"


def test_files_of_the_pages_are_asked_for_anew(client: httpx.Client) -> None:
    """A page must not run with the parts of another version."""
    answer = client.get("/page/main.js")
    assert answer.headers["cache-control"] == "no-cache"
    again = client.get("/page/main.js", headers={"if-none-match": answer.headers["etag"]})
    assert (again.status_code, again.headers["cache-control"]) == (304, "no-cache")


def test_another_content_type(client: httpx.Client) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "x"):
        answer = client.post(
            COMPLETIONS, content=b'{"prompt": "a"}', headers={"content-type": kind}
        )
        assert answer.status_code == 400
        assert "application/json" in error_of(answer)["message"]


def test_a_body_beyond_the_limit(server: TestServer, client: httpx.Client) -> None:
    large = json.dumps({"prompt": "a" * (3 << 20)}).encode()
    parts = [large[at : at + 50_000] for at in range(0, len(large), 50_000)]
    for content in (large, iter(parts)):  # the second without a content-length
        answer = client.post(COMPLETIONS, content=content, headers=JSON)
        assert answer.status_code == 413, answer.text
        assert error_of(answer)["type"] == "request_too_large"
        assert "1048576" in error_of(answer)["message"]
    # One that never ends is not read for ever.
    with connected(server.url) as raw:
        raw.sendall(request(b"", COMPLETIONS).replace(b"length: 0", b"length: 9999999999"))
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            send_for(raw, seconds=15)


def send_for(raw: socket.socket, seconds: float) -> None:
    """Send blanks for a while."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        raw.sendall(b" " * 10_000)
        time.sleep(0.001)


def test_slow_senders(server: TestServer) -> None:
    """A byte now and then: the head and the body have their time."""
    body = request({"prompt": "a"})
    for sent, status in ((body[:50], 408), (body[:-5], 408), (b"", None), (b"\r\n", None)):
        with connected(server.url) as raw:
            raw.sendall(sent)
            began = time.monotonic()
            answer = drip(raw, body[len(sent) :] if sent.strip() else b"\r\n" * 100)
            assert 0.5 < time.monotonic() - began < 6
            assert (status_of(answer) if answer else None) == status
            if answer:
                assert error_of(answer)["type"] == "timeout_error"


def drip(raw: socket.socket, content: bytes) -> bytes:
    """Send a byte at a time until something comes back, or the connection ends."""
    raw.settimeout(0.3)
    for byte in content[:-1]:
        try:
            raw.sendall(bytes([byte]))
            return raw.recv(65_536)
        except TimeoutError:
            continue
        except OSError:
            break
    return b""


def test_heads(server: TestServer) -> None:
    plain = b"GET /health HTTP/1.1\r\nhost: x\r\n"
    for head, status in (
        (plain + b"x: " + b"a" * 20_000 + b"\r\n\r\n", 431),
        (plain + b"x: y\r\n" * 5000 + b"\r\n", 431),
        (plain.replace(b"/health", b"/" + b"a" * 20_000) + b"\r\n", 431),
        (b"hello\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00", 400),  # TLS to a port without
        (plain + b"content-length: -1\r\n\r\n", 400),
        (plain + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n", 400),
        (b"POST /tokenize HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", 400),
    ):
        with connected(server.url) as raw:
            raw.sendall(head)
            answer = read_all(raw)
        assert status_of(answer) == status, (head[:80], answer)
        error_of(answer)


def test_heads_without_an_end(server: TestServer) -> None:
    """A header, a chunk's extension, a trailer that goes on and on is cut off."""
    chunked = b"POST /tokenize HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n"
    for begins in (b"GET / HTTP/1.1\r\nx: ", chunked + b"1;x=", chunked + b"0\r\nx: "):
        with connected(server.url) as raw:
            raw.sendall(begins)
            sent = 0
            try:
                while sent < 50 << 20:
                    sent += raw.send(b"a" * 10_000)
            except OSError:
                pass
            assert sent < 20 << 20, begins


def test_a_body_of_single_bytes_is_no_overhead(server: TestServer) -> None:
    content = json.dumps({"prompt": "a" * 5000, "max_tokens": 1}).encode()
    chunks = b"".join(b"1\r\n" + bytes([byte]) + b"\r\n" for byte in content) + b"0\r\n\r\n"
    head = b"POST /tokenize HTTP/1.1\r\ncontent-type: application/json\r\nconnection: close\r\n"
    with connected(server.url) as raw:
        raw.sendall(head + b"transfer-encoding: chunked\r\n\r\n" + chunks)
        assert status_of(read_all(raw)) == 200


def test_requests_one_behind_another(server: TestServer) -> None:
    ask = request({"prompt": "a", "max_tokens": 2})
    with connected(server.url) as raw:
        raw.sendall(ask * 2 + request(b"{") + request(ask, "/tokenize", "connection: close"))
        answers = read_all(raw)
    statuses = [int(one[:3]) for one in answers.split(b"HTTP/1.1 ")[1:]]
    assert statuses == [200, 200, 400, 400]


def test_an_answer_before_its_body(server: TestServer) -> None:
    """Refused before its body has come: the rest is passed over, and the connection goes on."""
    large = b" " * 200_000
    with connected(server.url) as raw:
        raw.sendall(request(large, "/v1/nothing")[:100_000])
        assert b" 404 " in read_until(raw, b"}}")
        raw.sendall(request(large, "/v1/nothing")[100_000:])
        raw.sendall(request({"prompt": "a"}, "/tokenize", "connection: close"))
        assert status_of(read_all(raw)) == 200


ANY = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.integers(-3, 600)
    | st.floats()
    | st.text(st.characters(), max_size=20)
    | st.sampled_from(["a whale", "user", "text", "function", "system", "assistant", "auto"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "function"]), inner)
    ),
    max_leaves=12,
)
NAMES = [
    "prompt", "messages", "max_tokens", "n", "temperature", "top_p", "top_k", "min_p", "seed",
    "stop", "stop_token_ids", "logit_bias", "logprobs", "top_logprobs", "prompt_logprobs", "echo",
    "suffix", "tools", "tool_choice", "response_format", "guided_json", "guided_regex", "user",
    "guided_choice", "structured_outputs", "chat_template_kwargs", "reasoning_effort", "priority",
    "cache_salt", "min_tokens", "allowed_token_ids", "bad_words", "repetition_penalty", "tokens",
    "continue_final_message", "add_generation_prompt", "stream_options", "whatever",
]  # fmt: skip
BODY = st.fixed_dictionaries(
    {"max_tokens": st.just(1)},
    optional={
        "prompt": st.just("a") | ANY,
        "messages": st.just([{"role": "user", "content": "a"}]) | ANY,
        "stream": st.booleans(),
    },
).flatmap(
    lambda known: st.dictionaries(st.sampled_from(NAMES), ANY, max_size=4).map(
        lambda more: {**more, **known}
    )
)
PATHS = st.sampled_from([COMPLETIONS, CHAT, "/tokenize", "/detokenize"])


def test_any_json_is_answered_or_refused(client: httpx.Client, chaos: bool) -> None:
    @settings(
        max_examples=3000 if chaos else 150,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(path=PATHS, body=BODY | ANY)
    def check(path: str, body: Any) -> None:
        answer = client.post(path, content=json.dumps(body), headers=JSON)
        assert answer.status_code in (200, 400, 404), answer.text
        if answer.status_code != 200:
            error_of(answer)

    check()
