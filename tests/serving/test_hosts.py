"""Which names a server answers to: a page of elsewhere must not reach one of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serving.clients import connected, error_of, read_until, request, status_of
from tests.serving.programs import program
from tests.serving.support import TestServer, make_engine, running
from ziphius.config.errors import BadInput
from ziphius.model.transformer import Transformer
from ziphius.serving.hosts import hosts_for
from ziphius.serving.options import EngineSettings, ServeOptions

HERE = ("localhost", "127.0.0.1", "[::1]")
PATHS = ("/", "/docs", "/health", "/ready", "/metrics", "/openapi.json", "/page/main.js",
         "/v1/models", "/nothing")  # fmt: skip


@pytest.fixture(scope="module")
def server(whale: Transformer) -> Iterator[TestServer]:
    hosts = hosts_for("127.0.0.1", ["Whale.example:8000"])
    with running(lambda: make_engine(whale), allowed_hosts=hosts) as started:
        yield started
        started.until_idle()


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]", "LocalHost", "whale.example"])
def test_its_own_names_by_any_port(server: TestServer, host: str) -> None:
    with server.client() as client:
        for port in ("", ":80", ":8000"):
            answer = client.get("/health", headers={"host": host + port})
            assert answer.status_code == 200, (host + port, answer.text)
        assert client.get("/health").status_code == 200


@pytest.mark.parametrize("path", PATHS)
def test_other_names_have_no_answer(server: TestServer, path: str) -> None:
    with server.client() as client:
        for host in (
            "evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example",
            "evil.example:localhost", "localhost@evil.example", "[::1].evil.example", "127.0.0.2",
            "xlocalhost", "::1", "", "0.0.0.0", "localhost:x",
        ):  # fmt: skip
            answer = client.get(path, headers={"host": host})
            assert answer.status_code == 403, (host, answer.text)
            error = error_of(answer)
            assert (error["type"], error["code"]) == ("permission_error", "host_not_allowed")
            assert "--allowed-host" in error["message"]
            assert "x-request-id" in answer.headers


def test_several_or_none_are_none_of_its_own(server: TestServer) -> None:
    head = b"GET /health HTTP/1.1\r\nconnection: close\r\n"
    for lines in (b"", b"host: localhost\r\nhost: evil.example\r\n"):
        with connected(server.url) as raw:
            raw.sendall(head + lines + b"\r\n")
            assert status_of(read_until(raw, b"}}")) == 403


def test_a_page_may_not_ask_by_another_name(whale: Transformer) -> None:
    """Nor whether it may: where pages of other origins are let in too."""
    options: dict[str, Any] = {"allowed_hosts": HERE, "cors_origins": ("https://page.example",)}
    with running(lambda: make_engine(whale), **options) as server, server.client() as client:
        asks = {"origin": "https://page.example", "access-control-request-method": "POST"}
        assert client.options("/v1/completions", headers=asks).status_code == 200
        evil = {**asks, "host": "evil.example"}
        answer = client.options("/v1/completions", headers=evil)
        assert (answer.status_code, error_of(answer)["code"]) == (403, "host_not_allowed")


def test_without_names_all_are_answered(whale: Transformer) -> None:
    with running(lambda: make_engine(whale)) as server, connected(server.url) as raw:
        raw.sendall(request({"prompt": "a", "max_tokens": 1}, "/v1/completions", "host: any.thing"))
        assert status_of(read_until(raw, b"}}")) == 200


def test_where_names_are_asked_for() -> None:
    for here in ("localhost", "127.0.0.1", "::1"):
        assert hosts_for(here, []) == HERE
    assert hosts_for("127.0.0.2", []) == (*HERE, "127.0.0.2")
    assert hosts_for("127.0.0.1", ["Box.local:80", "::2"]) == (*HERE, "box.local", "[::2]")
    for anywhere in ("0.0.0.0", "::", "192.168.0.7", "box.local"):
        assert hosts_for(anywhere, []) == ()
        assert hosts_for(anywhere, ["box.local"]) == (*HERE, "box.local")


def test_names_that_are_none() -> None:
    for bad in (
        "",
        "http://box",
        "a b",
        "*",
        "*.example",
        "box/x",
        "bo\nx",
        "börse.example",
        ":80",
    ):
        with pytest.raises(BadInput, match="--allowed-host"):
            hosts_for("127.0.0.1", [bad])


def test_the_options_have_any_by_default() -> None:
    options = ServeOptions(model_name="m", engine=EngineSettings(checkpoint="c"))
    assert options.allowed_hosts == ()


def test_the_program_asks_for_names(checkpoint: Path, home: Path) -> None:
    with program(checkpoint, home, "--allowed-host", "box.local") as server:
        server.until_ready()
        for host, status in (("box.local:80", 200), ("localhost", 200), ("evil.example", 403)):
            answer = httpx.get(f"{server.url}/ready", headers={"host": host}, timeout=10)
            assert answer.status_code == status, host
