"""The engine's process is killed, frozen, broken: what clients and operators see of it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serving.clients import KNOWN, LONG, error_of
from tests.serving.programs import ENDLESS, Asking, Program, alive, program, written

STALL, RESTART = 2.5, 5.0


@pytest.fixture(scope="module")
def served(checkpoint: Path, home: Path) -> Iterator[Program]:
    """A server that soon takes silence for a failure."""
    limits = {"stall_seconds": STALL, "stall_restart_seconds": RESTART}
    with program(checkpoint, home, limits=limits) as started:
        started.until_ready()
        yield started


def choices(answer: httpx.Response) -> Any:
    """Return an answer's choices."""
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"]


def test_killed_while_it_answers(served: Program) -> None:
    before = choices(served.post(KNOWN))
    streams = [Asking(served, ENDLESS) for _ in range(4)]
    whole = [Asking(served, {**ENDLESS, "stream": False}) for _ in range(2)]
    waiting = [Asking(served, ENDLESS) for _ in range(20)]  # more than run at a time
    for asking in streams:
        assert asking.begun.wait(30)
    time.sleep(0.2)
    killed = time.monotonic()
    os.kill(served.engine(), signal.SIGKILL)
    for asking in (*streams, *whole, *waiting):
        asking.join(10)
        assert 0 < asking.ended - killed < 5
        assert asking.error()["code"] == "engine_unavailable"
        assert "SIGKILL" not in asking.text
    assert {asking.status for asking in whole} == {503}
    assert served.health() == 503
    refused = served.post(KNOWN)
    assert refused.status_code == 503
    assert refused.headers["retry-after"]
    served.until(lambda: served.health() == 200, 60)
    assert choices(served.post(KNOWN)) == before


def test_frozen_while_nobody_asks(served: Program) -> None:
    served.until(lambda: served.health() == 200, 60)
    engine = served.engine()
    os.kill(engine, signal.SIGSTOP)
    took = served.until(lambda: served.health() == 503, STALL + 5)
    assert took > STALL - 1.2, "a beat a second is no silence"
    answer = httpx.get(f"{served.url}/health").json()
    assert answer["status"] == "stalled"
    assert "no sign of life" in answer["detail"]
    assert error_of(served.post(KNOWN))["code"] == "engine_unavailable"
    os.kill(engine, signal.SIGCONT)
    served.until(lambda: served.health() == 200, 5)
    choices(served.post(KNOWN))
    assert served.engine() == engine


def test_frozen_while_it_answers(served: Program) -> None:
    body = {**LONG, "max_tokens": 600, "seed": 3}
    undisturbed = Asking(served, body)
    undisturbed.join(60)
    engine = served.engine()
    asking = Asking(served, body)
    assert asking.begun.wait(30)
    os.kill(engine, signal.SIGSTOP)
    served.until(lambda: served.health() == 503, STALL + 5)
    os.kill(engine, signal.SIGCONT)
    served.until(lambda: served.health() == 200, 5)
    asking.join(60)
    assert written(asking) == written(undisturbed)


def test_frozen_for_too_long(served: Program) -> None:
    before = choices(served.post(KNOWN))
    engine, asking = served.engine(), Asking(served, ENDLESS)
    assert asking.begun.wait(30)
    os.kill(engine, signal.SIGSTOP)
    stopped = time.monotonic()
    asking.join(60)
    assert RESTART - 1.2 < asking.ended - stopped < RESTART + 5
    assert "no sign of life" in asking.error()["message"]
    served.until(lambda: not alive(engine), 5)
    served.until(lambda: served.health() == 200, 60)
    assert served.engine() != engine
    assert choices(served.post(KNOWN)) == before


def test_the_server_itself_stood_still(served: Program) -> None:
    # A laptop that slept: the engine was well all the time, and is not started again.
    served.until(lambda: served.health() == 200, 60)
    engine = served.engine()
    os.kill(served.process.pid, signal.SIGSTOP)
    time.sleep(RESTART + 0.5)
    os.kill(served.process.pid, signal.SIGCONT)
    served.until(lambda: served.health() == 200, 5)
    time.sleep(1.2)  # two looks
    assert served.engine() == engine
    choices(served.post(KNOWN))


def test_default_limits_notice_within_15_s(checkpoint: Path, home: Path, chaos: bool) -> None:
    """The long form waits for it; the short one does the sum."""
    from ziphius.serving.options import Limits
    from ziphius.serving.worker import BEAT_SECONDS

    assert Limits().stall_seconds + BEAT_SECONDS < 15
    if chaos:
        with program(checkpoint, home) as started:
            started.until_ready()
            for body in (None, ENDLESS):
                asking = Asking(started, body) if body else None
                assert asking is None or asking.begun.wait(30)
                engine = started.engine()
                os.kill(engine, signal.SIGSTOP)
                took = started.until(lambda: started.health() == 503, 15)
                print(f"/health red after {took:.1f} s, {'busy' if body else 'idle'}")
                os.kill(engine, signal.SIGCONT)
                started.until(lambda: started.health() == 200, 5)
