"""Telling that the engine is ready: whatever comes of it, the server goes on and is watched."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from tests.serving.clients import known
from tests.serving.support import make_engine, running
from ziphius.cli.serve import _tell_ready
from ziphius.model.transformer import Transformer
from ziphius.serving.app import Application


def test_an_operator_that_fails_is_no_reason_to_stop_watching(
    whale: Transformer, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("ziphius").propagate = True
    calls: list[int] = []

    def on_ready(application: Application) -> None:
        calls.append(1)
        raise BrokenPipeError("nobody reads what is told")

    with running(lambda: make_engine(whale), on_ready=on_ready) as server:
        known(server)
        server.until(lambda: "nobody reads" in caplog.text)
        # The server still ends where there will be no engine.
        server.application.engine.fatal = "it is gone for good"
        server.until(lambda: not server.thread.is_alive())
    assert calls == [1]


@pytest.mark.parametrize(
    "link",
    [
        None,
        SimpleNamespace(model=None, load_seconds=0.0),
        SimpleNamespace(
            model=SimpleNamespace(kernels="no pairs", parameters=5, dtype="float32", device="cpu"),
            load_seconds=1.0,
        ),
    ],
)
def test_what_is_told_needs_no_engine(link: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """It may have gone again in the meantime."""
    application: Any = SimpleNamespace(
        engine=SimpleNamespace(link=link), served=SimpleNamespace(name="whale")
    )
    _tell_ready(application, "http://127.0.0.1:8000")
    assert "chat page http://127.0.0.1:8000/ " in capsys.readouterr().err


def test_nobody_reads_what_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def echo(*given: Any, **named: Any) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("typer.echo", echo)
    application: Any = SimpleNamespace(
        engine=SimpleNamespace(link=None), served=SimpleNamespace(name="whale")
    )
    _tell_ready(application, "http://127.0.0.1:8000")
