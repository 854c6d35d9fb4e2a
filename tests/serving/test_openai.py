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


@pytest.fixture(scope="module")
def patient(fast: Kernels) -> Transformer:
    """A model with room for the descriptions of tools."""
    return make_model(fast, max_position_embeddings=1024)


@pytest.fixture(scope="module")
def server(patient: Transformer) -> Iterator[TestServer]:
    tokenizer = make_tokenizer()
    with running(
        lambda: make_engine(patient, tokenizer, cache_tokens=8192), tokenizer=tokenizer
    ) as started:
        yield started
        started.until_idle()


@pytest.fixture(scope="module")
def case(server: TestServer, patient: Transformer) -> Iterator[Case]:
    """That server, and a strict one beside it."""
    tokenizer = make_tokenizer()
    known = Case(server.url, NAME, "")
    with running(
        lambda: make_engine(patient, tokenizer, max_running=1),
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
