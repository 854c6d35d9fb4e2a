"""What OpenAI's client asks for again, and what it had better not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from openai import APIStatusError, OpenAI

from tests.serving.support import NAME, TestServer, make_engine, running
from ziphius.inference.errors import RequestError
from ziphius.model.transformer import Transformer
from ziphius.serving.options import Limits


def fail(server: TestServer, spoil: Callable[[], Any]) -> tuple[APIStatusError, int]:
    """Ask for an answer that is not to be had; return the error, and how often it was asked for."""
    asked: list[int] = []
    link = server.application.engine.link
    assert link is not None
    submit = link.submit

    def counting(job: Any) -> Any:
        asked.append(1)
        return submit(job)

    link.submit = counting  # type: ignore[method-assign]
    spoil()
    with (
        OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=2) as client,
        pytest.raises(APIStatusError) as raised,
    ):
        client.completions.create(
            model=NAME, prompt="a whale", max_tokens=400, extra_body={"ignore_eos": True}
        )
    return raised.value, len(asked)


def test_an_answer_that_takes_too_long_is_not_asked_for_again(whale: Transformer) -> None:
    """It would take as long again, and the server's time with it."""
    limits = Limits(request_seconds=0.05, drain_seconds=1.0)
    with running(lambda: make_engine(whale), limits=limits) as server:
        error, asked = fail(server, lambda: None)
        assert (error.status_code, error.code, asked) == (504, "timeout", 1)
        server.until_idle()


def test_an_answer_that_fails_is_not_asked_for_again(whale: Transformer) -> None:
    with running(lambda: make_engine(whale)) as server:

        def spoil() -> None:
            def add(*given: Any, **named: Any) -> Any:
                raise RequestError("its logits are not finite")

            server.engine.add = add  # type: ignore[method-assign]

        error, asked = fail(server, spoil)
        assert (error.status_code, error.code, asked) == (500, "generation_failed", 1)
        server.until_idle()
