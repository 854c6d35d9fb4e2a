"""Keys, ids, limits of a client, and what the log says of a request."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator

import httpx
import pytest

from tests.serving.clients import LONG, connected, error_of, nothing_left, read_until, request
from tests.serving.clients import tasks_of as count_tasks
from tests.serving.support import TestServer, make_engine, running
from ziphius.config.errors import BadInput
from ziphius.model.transformer import Transformer
from ziphius.serving.logs import PlainFormatter, _json_formatter
from ziphius.serving.options import EngineSettings, Limits, ServeOptions

KEY, OTHER, ADMIN = "key-of-a-client", "key-of-another", "key-of-the-operator"
ASK = {"prompt": "a whale", "max_tokens": 2}
GUARDED = [
    ("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("GET", "/v1/models"),
    ("POST", "/tokenize"), ("POST", "/detokenize"), ("GET", "/tokenizer_info"),
    ("GET", "/v1/nothing"), ("GET", "/v1/models/whale"),
]  # fmt: skip


@pytest.fixture(scope="module")
def server(whale: Transformer) -> Iterator[TestServer]:
    """A server with keys, of which a client may have two requests open."""
    limits = Limits(max_per_client=2, drain_seconds=2.0)
    with running(
        lambda: make_engine(whale), limits=limits, api_keys=(KEY, OTHER), admin_key=ADMIN,
        cors_origins=("https://page.example",),
    ) as started:  # fmt: skip
        yield started
        started.until_idle()


@pytest.fixture(scope="module")
def client(server: TestServer) -> Iterator[httpx.Client]:
    """A client without a key."""
    with server.client() as made:
        yield made


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.mark.parametrize(("method", "path"), GUARDED)
def test_a_key_is_needed(client: httpx.Client, method: str, path: str) -> None:
    for headers in (
        {}, bearer("wrong-key-here"), {"authorization": "Bearer"}, bearer(KEY[:-1]),
        bearer(KEY + "x"), bearer(ADMIN), {"authorization": KEY}, {"authorization": f"Basic {KEY}"},
        {"x-api-key": "wrong"}, {"authorization": b"Bearer \xff\xfe"},
    ):  # fmt: skip
        answer = client.request(method, path, headers=headers, json=ASK)  # type: ignore[arg-type]
        assert answer.status_code == 401, (headers, answer.text)
        assert error_of(answer)["code"] == "invalid_api_key"
        assert error_of(answer)["type"] == "authentication_error"
        assert answer.headers["www-authenticate"] == "Bearer"
        assert KEY not in answer.text


def test_forms_of_a_key(client: httpx.Client) -> None:
    for headers in (
        bearer(KEY), bearer(OTHER), {"x-api-key": KEY}, {"authorization": f"bearer {KEY}"},
        {"authorization": f"Bearer  {KEY}"}, {"Authorization": "Basic x", "X-Api-Key": OTHER},
        # A client's own default beside what it was told.
        {**bearer("made-up-by-a-client"), "x-api-key": KEY}, {**bearer(KEY), "x-api-key": "none"},
    ):  # fmt: skip
        assert client.post("/v1/completions", headers=headers, json=ASK).is_success


def test_paths_are_guarded_however_they_are_spelled(client: httpx.Client) -> None:
    for path in (
        "/%76%31/models",
        "/v1//models",
        "/v1/./models",
        "/v1/models/",
        "/tokenizer_info/",
    ):
        assert client.get(path).status_code in (401, 404), path
    with connected(str(client.base_url)) as raw:
        raw.sendall(b"GET http://x/v1/models HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        assert b" 401 " in read_until(raw, b"\r\n")


def test_what_is_open(client: httpx.Client) -> None:
    for path in ("/", "/health", "/ready", "/metrics", "/openapi.json"):
        assert client.get(path).is_success, path


def test_the_admin_key(client: httpx.Client, whale: Transformer) -> None:
    path = "/admin/cache/clear"
    for headers in ({}, bearer(KEY), bearer("wrong-key-here")):
        answer = client.post(path, headers=headers)
        assert answer.status_code == 401
        assert error_of(answer)["code"] == "invalid_api_key"
    assert client.post(path, headers=bearer(ADMIN)).is_success
    with running(lambda: make_engine(whale)) as without, without.client() as other:
        answer = other.post(path, headers=bearer(ADMIN))
        assert answer.status_code == 403
        assert error_of(answer)["type"] == "permission_error"


def test_keys_that_are_none() -> None:
    for given in (
        {"api_keys": ("short",)},
        {"api_keys": ("a key with blanks",)},
        {"admin_key": ""},
    ):
        with pytest.raises(BadInput, match="8 visible"):
            ServeOptions(model_name="m", engine=EngineSettings(checkpoint="c"), **given)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="differ"):
        ServeOptions(
            model_name="m", engine=EngineSettings(checkpoint="c"), api_keys=(KEY,), admin_key=KEY
        )
    shown = repr(
        ServeOptions(
            model_name="m", engine=EngineSettings(checkpoint="c"), api_keys=(KEY,), admin_key=ADMIN
        )
    )
    assert KEY not in shown
    assert ADMIN not in shown


def test_requests_of_one_client_are_bounded(server: TestServer, client: httpx.Client) -> None:
    server.until(lambda: not server.application.gate._of_client)
    auth = f"authorization: Bearer {KEY}"
    with connected(server.url) as first, connected(server.url) as second:
        for raw in (first, second):
            raw.sendall(request(LONG, "/v1/completions", auth))
            read_until(raw, b"data: ")
        answer = client.post("/v1/completions", headers=bearer(KEY), json=ASK)
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        assert error_of(answer)["type"] == "rate_limit_error"
        assert error_of(answer)["code"] == "too_many_requests"
        assert client.post("/v1/completions", headers=bearer(OTHER), json=ASK).is_success
        assert client.get("/health").is_success
    server.until(lambda: not server.application.gate._of_client)
    assert client.post("/v1/completions", headers=bearer(KEY), json=ASK).is_success


def test_without_keys_an_address_is_a_client(whale: Transformer) -> None:
    limits = Limits(max_per_client=1, drain_seconds=2.0)
    with running(lambda: make_engine(whale), limits=limits) as server, server.client() as client:
        tasks = count_tasks(server)
        with connected(server.url) as raw:
            # Another key is no other client, where any key is accepted.
            raw.sendall(request(LONG, "/v1/completions", "authorization: Bearer made-up-one"))
            read_until(raw, b"data: ")
            answer = client.post("/v1/completions", headers=bearer("made-up-two"), json=ASK)
            assert answer.status_code == 429
        client.close()
        nothing_left(server, tasks)


def test_request_ids(client: httpx.Client) -> None:
    for given, kept in (
        ("my-id_1.2:3", True), ("a" * 64, True), ("a" * 65, False), ("a b", False), ("", False),
        ("<script>", False), ("a;b", False), ('"quoted"', False),
    ):  # fmt: skip
        for path, headers in (("/health", {}), ("/v1/models", {}), ("/nothing", {})):
            answer = client.get(path, headers={**headers, "x-request-id": given})
            told = answer.headers["x-request-id"]
            assert (told == given) == kept, (given, told)
            assert re.fullmatch(r"[A-Za-z0-9_.:-]{1,64}", told)
    ids = {client.get("/health").headers["x-request-id"] for _ in range(5)}
    assert len(ids) == 5


def test_pages_of_an_allowed_origin(client: httpx.Client) -> None:
    """A browser asks without the key whether it may, and can read a refusal."""
    origin = {"origin": "https://page.example"}
    asks = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    answer = client.options("/v1/completions", headers={**origin, **asks})
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == origin["origin"]
    refused = client.post("/v1/completions", headers=origin, json=ASK)
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == origin["origin"]
    assert "x-request-id" in refused.headers["access-control-expose-headers"]
    other = client.options("/v1/completions", headers={**asks, "origin": "https://evil.example"})
    assert "access-control-allow-origin" not in other.headers


SECRETS = ("secret whale", "secret stop", KEY, OTHER, ADMIN, "guess-at-a-key")


def test_the_log(server: TestServer, client: httpx.Client) -> None:
    """JSON lines that parse, one a request, with nothing in them of what was asked or by whom."""
    lines: dict[str, list[str]] = {"json": [], "plain": []}

    class Keeping(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines["json"].append(_json_formatter().format(record))
            lines["plain"].append(PlainFormatter().format(record))

    handler, loggers = Keeping(), [logging.getLogger(n) for n in ("ziphius", "uvicorn")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel("INFO")
    try:
        text = {"prompt": SECRETS[0], "stop": [SECRETS[1]], "max_tokens": 3}
        ask = {"headers": {**bearer(KEY), "x-request-id": "the-id"}}
        client.post("/v1/completions", json=text, **ask)  # type: ignore[arg-type]
        client.post("/v1/completions?key=" + OTHER, json={**text, "stream": True}, **ask)  # type: ignore[arg-type]
        client.post("/v1/completions", json={**text, "temperature": SECRETS[0]}, **ask)  # type: ignore[arg-type]
        client.post("/v1/completions", json={**text, "n": 10**30}, **ask)  # type: ignore[arg-type]
        client.post("/v1/completions", json={**text, "top_k": 10**30}, **ask)  # type: ignore[arg-type]
        client.post("/v1/completions", content=json.dumps(text)[:-1], **ask)  # type: ignore[arg-type]
        client.post("/v1/completions", json=text, headers=bearer("guess-at-a-key"))
        client.post("/admin/cache/clear", headers=bearer(ADMIN))
        client.get("/health")
        with connected(server.url) as raw:
            raw.sendall(request(text, "/v1/completions", f"authorization: Bearer {KEY}")[:-3])
        server.until(lambda: sum("499" in line for line in lines["json"]) == 1)
        server.until_idle()
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
    for line in (*lines["json"], *lines["plain"]):
        assert not [secret for secret in SECRETS if secret in line], line
        assert "\n" not in line
    records = [json.loads(line) for line in lines["json"]]
    told = [record for record in records if record["logger"] == "ziphius.access"]
    # A line is written once a request has ended, which the client may know a little before.
    statuses = sorted(record["status"] for record in told)
    assert statuses == [200, 200, 200, 400, 400, 400, 400, 401, 499]
    first = told[0]
    assert first["request_id"] == "the-id"
    assert (first["method"], first["path"]) == ("POST", "/v1/completions")
    assert first["prompt_tokens"] > 0
    assert first["completion_tokens"] > 0
    assert first["finish"] in ("stop", "length")
    assert {"time", "level", "seconds"} <= set(first)
