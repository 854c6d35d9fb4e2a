"""What fails before it is a request: operators see it as they see the rest."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest

from tests.serving.clients import connected, error_of, read_all, read_until, request, status_of
from tests.serving.support import TestServer, make_engine, running
from ziphius.model.transformer import Transformer
from ziphius.serving.options import Limits

PLAIN = b"GET /health HTTP/1.1\r\nhost: x\r\n"
CHUNKED = b"POST /tokenize HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n"


@pytest.fixture(scope="module")
def server(whale: Transformer) -> Iterator[TestServer]:
    limits = Limits(head_seconds=0.5, max_head_bytes=16 << 10, drain_seconds=1.0)
    with running(lambda: make_engine(whale), limits=limits) as started:
        yield started
        started.until_idle()


@pytest.fixture
def records(server: TestServer) -> Iterator[list[logging.LogRecord]]:
    """What is logged, uvicorn's own lines too."""
    found: list[logging.LogRecord] = []

    class Keeping(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.name != "uvicorn.access":  # which this process has on, and ours off
                found.append(record)

    handler, loggers = Keeping(), [logging.getLogger(n) for n in ("ziphius", "uvicorn")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel("INFO")
    yield found
    for logger, level in zip(loggers, before, strict=True):
        logger.removeHandler(handler)
        logger.setLevel(level)


@pytest.mark.parametrize(
    ("sent", "status", "route"),
    [
        (b"hello\r\n\r\n", 400, "none"),
        (b"\x16\x03\x01\x02\x00\x01\x00", 400, "none"),
        (PLAIN + b"x: " + b"a" * 20_000 + b"\r\n\r\n", 431, "none"),
        (PLAIN, 408, "none"),
        # The head was one, and is with the routes: the request has one line, and one id.
        (CHUNKED + b"x-request-id: mine\r\n\r\nzz\r\n", 400, None),
        (CHUNKED + b"\r\n1;x=" + b"a" * 20_000, 431, None),
    ],
)
def test_it_has_an_id_a_line_and_a_count(
    server: TestServer,
    records: list[logging.LogRecord],
    sent: bytes,
    status: int,
    route: str | None,
) -> None:
    before = counted(server)
    with connected(server.url) as raw:
        raw.sendall(sent)
        answer = read_all(raw)
    assert status_of(answer) == status
    said = error_of(answer)
    head = answer.partition(b"\r\n\r\n")[0].decode().lower()
    (told,) = [line for line in head.split("\r\n") if line.startswith("x-request-id: ")]
    server.until(lambda: bool(records), 5)
    server.until(lambda: not server.server.server_state.tasks, 5)
    (record,) = records
    assert record.name == "ziphius.access"
    fields: dict[str, Any] = record.fields  # type: ignore[attr-defined]
    assert fields["request_id"] == told.split(": ")[1]
    assert (fields["status"], fields["error"]) == (status, said["message"])
    after = counted(server)
    (new,) = [key for key in after if after[key] != before.get(key, 0) and "/metrics" not in key]
    assert f'status="{status}"' in new
    assert after[new] == before.get(new, 0) + 1
    if route is not None:
        assert f'route="{route}"' in new
        assert fields["path"] == "-"
    else:
        assert fields["path"] == "/tokenize"
        if b"mine" in sent:
            assert fields["request_id"] == "mine"


def test_a_bad_head_behind_a_good_request_is_its_own(
    server: TestServer, records: list[logging.LogRecord]
) -> None:
    """It is not taken for the one before it, whether that has its answer or waits for it."""
    good, bad = PLAIN.replace(b"/health", b"/nothing") + b"\r\n", PLAIN + b"x: " + b"a" * 20_000
    with connected(server.url) as raw:
        raw.sendall(good)
        assert status_of(read_until(raw, b"}}")) == 404
        raw.sendall(bad + b"\r\n\r\n")
        assert status_of(read_all(raw)) == 431
    server.until(lambda: len(records) == 2, 5)
    told = [(r.fields["path"], r.fields["status"]) for r in records]  # type: ignore[attr-defined]
    assert told == [("/nothing", 404), ("-", 431)]
    server.runner.frozen.set()
    server.until(lambda: server.runner.standing.is_set())
    with connected(server.url) as raw:
        raw.sendall(request({"prompt": "a"}) + bad + b"\r\n\r\n")
        assert read_all(raw) == b""  # none is sent in the place of the first one's
    server.runner.frozen.clear()
    server.until(lambda: len(records) == 3, 5)
    assert records[2].fields["status"] == 499  # type: ignore[attr-defined]


def counted(server: TestServer) -> dict[str, float]:
    """Return the counts of HTTP requests."""
    with server.client() as client:
        lines = client.get("/metrics").text.splitlines()
    named = [line.rpartition(" ") for line in lines if line.startswith("ziphius_http_requests_t")]
    return {name: float(value) for name, _, value in named}
