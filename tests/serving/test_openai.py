"""OpenAI's own client against the server; ``make test-clients`` does the same over a process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.clients.checks.case import Case, Check
from tests.clients.checks.with_openai import CHECKS
from tests.serving.support import (
    NAME,
    TestServer,
    make_engine,
    make_model,
    make_tokenizer,
    running,
)
from ziphius.inference.chat import ChatTemplate
from ziphius.kernels.select import Kernels
from ziphius.model.transformer import Transformer
from ziphius.serving.options import Limits


def patient(kernels: Kernels) -> Transformer:
    """Return a model with room for the descriptions of tools."""
    return make_model(kernels, max_position_embeddings=1024)


@pytest.fixture(scope="module")
def server(fast: Kernels) -> Iterator[TestServer]:
    tokenizer, model = make_tokenizer(), patient(fast)
    with running(
        lambda: make_engine(model, tokenizer, cache_tokens=8192), tokenizer=tokenizer
    ) as started:
        yield started
        started.until_idle()


@pytest.fixture(scope="module")
def case(server: TestServer, fast: Kernels) -> Iterator[Case]:
    """That server, and a strict one beside it with a model of its own."""
    tokenizer, model = make_tokenizer(), patient(fast)
    known = Case(server.url, NAME, "")
    with running(
        lambda: make_engine(model, tokenizer, max_running=1),
        tokenizer=tokenizer,
        template=ChatTemplate(format="v3.1"),
        limits=Limits(max_waiting=2, max_per_client=2, drain_seconds=2.0),
        api_keys=known.keys,
        admin_key=known.admin_key,
    ) as strict:
        yield Case(server.url, NAME, strict.url)
        strict.until_idle()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_openai(case: Case, check: Check, server: TestServer) -> None:
    check(case)
    server.until_idle()
