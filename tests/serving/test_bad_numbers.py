"""A model that computes NaN for one request: its error alone, whatever it shares with others."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from tests.serving.clients import error_of, events_of, nothing_left, tasks_of
from tests.serving.support import TestServer, make_engine, make_model, make_tokenizer, running
from ziphius.kernels.select import Kernels, answering_kernels
from ziphius.model.transformer import Transformer

BAD = 290  # the token whose embedding is spoilt
FORCED = {"logit_bias": {str(BAD): 1000}}
ASK = {"max_tokens": 40, "temperature": 0.8, "ignore_eos": True, "logprobs": 2,
       "logit_bias": {str(BAD): -1000}}  # fmt: skip


@pytest.fixture(scope="module", params=["torch", "compiled"])
def spoilt(request: pytest.FixtureRequest) -> Transformer:
    """A model that gives NaN behind one token."""
    kernels: Kernels = answering_kernels(
        request.getfixturevalue("kernel_folder") if request.param == "compiled" else None
    )
    model = make_model(kernels)
    with torch.no_grad():
        model.embed_tokens.weight[BAD] = torch.nan
    return model


@pytest.fixture
def server(spoilt: Transformer) -> Iterator[TestServer]:
    """A server of it, whose few pages go from one request to the next."""
    tokenizer = make_tokenizer()
    with running(
        lambda: make_engine(spoilt, tokenizer, cache_tokens=1024, prefill_chunk=32),
        tokenizer=tokenizer,
    ) as started:
        yield started


def ask(server: TestServer, **body: Any) -> Any:
    with server.client() as client:
        return client.post("/v1/completions", json={**ASK, **body})


def neighbours(server: TestServer) -> list[Any]:
    """Return the answers of four requests, at once."""
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda seed: ask(server, prompt=[9] * 40, seed=seed), range(4)))
    assert all(answer.is_success for answer in found), [answer.text for answer in found]
    return [answer.json()["choices"] for answer in found]


def test_it_fails_alone(server: TestServer) -> None:
    alone = neighbours(server)
    tasks = tasks_of(server)
    with ThreadPoolExecutor(8) as pool:
        good = pool.submit(neighbours, server)
        bad = [
            pool.submit(ask, server, prompt=[9] * 35 + [BAD], stream=seed % 2 == 1, n=1 + seed % 3)
            for seed in range(8)
        ]
        assert good.result() == alone
        answers = [one.result() for one in bad]
    for number, answer in enumerate(answers):
        if number % 2 == 0:
            assert answer.status_code == 500
            error = error_of(answer)
        else:
            assert answer.status_code == 200
            error = events_of(answer.text)[-1]["error"]
        assert error["type"] == "api_error"
        assert error["code"] == "generation_failed"
        assert "NaN" in error["message"]
    nothing_left(server, tasks)
    assert server.application.engine.restarts == 0
    # Its pages held NaN, and are taken by others now.
    for _ in range(3):
        assert neighbours(server) == alone


def test_it_fails_in_the_middle(server: TestServer) -> None:
    """The bad token is written, and what follows it is none."""
    answer = ask(server, prompt=[9] * 40, stream=True, **FORCED)
    *chunks, last = events_of(answer.text)
    assert chunks, "the first token came before the error"
    assert "NaN" in last["error"]["message"]
    assert "position 1" in last["error"]["message"]
    assert "[DONE]" not in answer.text
    server.until_idle()


def test_a_prompt_that_is_scored_fails_alone(server: TestServer) -> None:
    """Its rows are looked at before there is a token, and in the middle of a long prompt too."""
    alone, tasks = neighbours(server), tasks_of(server)
    scored: list[dict[str, Any]] = [
        {"max_tokens": 0, "echo": True},
        {"max_tokens": 1, "echo": True, "n": 3},
        {"prompt_logprobs": 1},
        {"prompt_logprobs": 1, "n": 2},
    ]
    prompts = ([9, BAD, 9, 9], [9] * 35 + [BAD] + [9] * 40)
    with ThreadPoolExecutor(8) as pool:
        good = pool.submit(neighbours, server)
        bad = [pool.submit(ask, server, prompt=p, **m) for p in prompts for m in scored]
        assert good.result() == alone
        for one in bad:
            answer = one.result()
            error = error_of(answer)
            assert error["code"] == "generation_failed", answer.text
            assert "NaN" in error["message"]
    nothing_left(server, tasks)
    assert server.application.engine.restarts == 0
    assert neighbours(server) == alone
