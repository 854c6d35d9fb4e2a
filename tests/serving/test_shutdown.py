"""SIGTERM: what runs may end, what is idle does not matter, what is too long is told."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.serving.clients import LONG, connected, events_of, read_until, request
from tests.serving.programs import ENDLESS, Asking, Program, alive, children, program, written


@contextmanager
def serving(checkpoint: Path, home: Path, drain: float) -> Iterator[Program]:
    with program(checkpoint, home, "--drain-seconds", str(drain)) as started:
        started.until_ready()
        yield started


def test_streams_end_and_nothing_holds_them_up(checkpoint: Path, home: Path) -> None:
    body = {**LONG, "max_tokens": 600}
    with (
        serving(checkpoint, home, 30) as started,
        httpx.Client(base_url=started.url) as idle,
        connected(started.url),  # says nothing
        connected(started.url) as half,
    ):
        url, engine = started.url, started.engine()
        assert idle.get("/health").status_code == 200  # and its connection is kept
        half.sendall(request(LONG)[:40])
        whole = Asking(started, {**body, "stream": False})
        # It must be there before the signal: a client that connects later is refused.
        running = re.compile(r"^ziphius_requests_running\{.*\} 1\.0$", re.M)
        started.until(lambda: running.search(idle.get("/metrics").text), 30)
        asking = Asking(started, body)
        assert asking.begun.wait(30)
        started.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")
        assert started.ends(30) == 0
        ended = time.monotonic()
        for one in (asking, whole):
            one.join(10)
        written(asking)  # to its [DONE]
        assert whole.status == 200
        assert ended - max(asking.ended, whole.ended) < 5, "it waited for somebody who is idle"
        assert not alive(engine)


def test_what_takes_too_long_is_told(checkpoint: Path, home: Path) -> None:
    with serving(checkpoint, home, 0.5) as started:
        streamed = Asking(started, ENDLESS)
        whole = Asking(started, {**ENDLESS, "stream": False})
        assert streamed.begun.wait(30)
        started.process.send_signal(signal.SIGTERM)
        sent = time.monotonic()
        assert started.ends(30) == 0
        assert time.monotonic() - sent < 8
        for one in (streamed, whole):
            one.join(10)
            assert "shutting down" in one.error()["message"]
        assert whole.status == 503
        assert "Traceback" not in "".join(started.lines)


def test_a_second_signal_does_not_wait(checkpoint: Path, home: Path) -> None:
    with serving(checkpoint, home, 30) as started:
        engine, asking = started.engine(), Asking(started, ENDLESS)
        assert asking.begun.wait(30)
        # One who never reads would hold it up for the whole time.
        with connected(started.url, window=4096) as deaf:
            deaf.sendall(request({**ENDLESS, "logprobs": 20}))
            read_until(deaf, b"data: ")
            started.process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            assert started.process.poll() is None
            assert events_of(asking.text)[-1] != "[DONE]"
            started.process.send_signal(signal.SIGTERM)
            sent = time.monotonic()
            started.ends(10)
            assert time.monotonic() - sent < 6
        asking.join(10)
        assert "stopped" in asking.error()["message"]
        assert not alive(engine)


def test_a_signal_while_it_loads(checkpoint: Path, home: Path) -> None:
    with program(checkpoint, home) as started:
        started.until(lambda: children(started.process.pid), 60)
        time.sleep(0.3)
        started.process.send_signal(signal.SIGTERM)
        assert started.ends(30) == 0
        assert "Traceback" not in "".join(started.lines)
