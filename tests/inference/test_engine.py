"""The engine: answers equal the slow specification, and the same bits however they are computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import F32, random_model, random_tokens, tiny_config
from ziphius.config.errors import BadInput
from ziphius.inference.engine import Engine, EngineOptions
from ziphius.inference.params import SamplingParams
from ziphius.inference.request import Request
from ziphius.inference.speculation import Acceptance
from ziphius.kernels.select import Kernels, answering_kernels
from ziphius.model.precision import Precision
from ziphius.model.transformer import Transformer

BF16 = Precision.for_inference(torch.bfloat16)
PLAIN = EngineOptions(speculation="off", prefix_cache=False, cache_tokens=2048)


@pytest.fixture(scope="module", params=["float32", "bfloat16", "torch"])
def model(request: pytest.FixtureRequest, kernel_folder: Path) -> Transformer:
    """A model in either dtype with compiled kernels, and one with torch's."""
    kernels = answering_kernels(None if request.param == "torch" else kernel_folder)
    precision = BF16 if request.param == "bfloat16" else F32
    built = random_model(tiny_config(vocab_size=67), precision=precision, kernels=kernels, seed=3)
    return built.requires_grad_(False)


def answer(engine: Engine, *requests: Request) -> None:
    for _ in range(2000):
        if all(request.finished for request in requests):
            return
        engine.step()
    raise AssertionError("the engine does not come to an end")


def alone(model: Transformer, prompt: list[int], params: SamplingParams) -> Request:
    """Answer one prompt by itself, computed whole, without speculation or prefixes."""
    engine = Engine(model, options=PLAIN)
    request = engine.add(prompt, params)
    answer(engine, request)
    return request


def bits(request: Request) -> list[Any]:
    """Return everything that must not depend on how a request was computed."""
    result = request.result()
    return [
        (
            o.token_ids,
            o.finish_reason,
            [(s.token, s.logprob, s.rank, s.top) for s in o.logprobs or ()],
        )
        for o in result.outputs
    ] + [result.prompt_logprobs]


def prompt_of(model: Transformer, length: int, seed: int) -> list[int]:
    tokens: list[int] = random_tokens(model.config, 1, length, seed=seed, low=2)[0].tolist()
    return tokens


def greedy_by_hand(model: Transformer, prompt: Sequence[int], count: int) -> list[int]:
    """The specification: the whole sequence again for every token, in the expanded form."""
    plain = random_model(model.config, precision=model.precision, kernels=Kernels(), seed=3)
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(plain(torch.tensor([ids]))[0, -1].argmax()))
            if ids[-1] == model.config.eos_token_id:
                break
    return ids[len(prompt) :]


def test_greedy_answers_equal_the_specification(kernel_folder: Path) -> None:
    for folder in (None, kernel_folder):
        kernels = answering_kernels(folder)
        model = random_model(precision=F32, kernels=kernels, seed=3).requires_grad_(False)
        for length in (1, 5, 40):
            prompt = prompt_of(model, length, seed=length)
            request = alone(model, prompt, SamplingParams(temperature=0, max_tokens=12))
            expected = greedy_by_hand(model, prompt, 12)
            assert list(request.result().outputs[0].token_ids) == expected


JOBS = st.lists(
    st.fixed_dictionaries(
        {
            "prompt": st.integers(0, 3),
            "cut": st.integers(1, 75),
            "max_tokens": st.integers(1, 20),
            "temperature": st.sampled_from([0.0, 0.7, 1.5]),
            "n": st.sampled_from([1, 1, 3]),
            "top_k": st.sampled_from([0, 0, 5]),
            "repetition_penalty": st.sampled_from([1.0, 1.0, 1.3]),
            # With 3 the sampler chooses, else a kernel for many answers at once.
            "logprobs": st.sampled_from([None, 0, 3]),
            # Of few tokens many drafts are right.
            "allowed_token_ids": st.sampled_from([None, None, [5, 9], [7, 8, 30]]),
            "prompt_logprobs": st.sampled_from([None, 2]),
            "later": st.integers(0, 8),
            "cancel": st.sampled_from([None, None, None, 3]),
        }
    ),
    min_size=1,
    max_size=6,
)
HOW = st.fixed_dictionaries(
    {
        "cache_tokens": st.sampled_from([320, 512, 2048]),
        "max_running": st.sampled_from([1, 3, 8]),
        "max_step_tokens": st.sampled_from([8, 33, 512]),
        "prefill_chunk": st.sampled_from([1, 7, 32, 512]),
        "prefix_cache": st.booleans(),
        "speculation": st.sampled_from(["off", "on", "auto"]),
        "draft_depth": st.sampled_from([1, 3]),
    }
)


@settings(max_examples=20, deadline=None)
@given(jobs=JOBS, how=HOW)
def test_the_same_bits_whatever_else_is_computed(
    model: Transformer, jobs: list[dict[str, Any]], how: dict[str, Any]
) -> None:
    """Batch, chunks, prefixes, speculation, preemption, cancelled neighbours: nothing shows."""
    if model.kernels.library is None:
        jobs = [{**job, "max_tokens": min(job["max_tokens"], 6), "n": 1} for job in jobs[:3]]
    engine = Engine(model, options=EngineOptions(**how))
    waiting, running, expected = list(enumerate(jobs)), [], []
    for step in range(3000):
        for number, job in list(waiting):
            if job["later"] <= step:
                waiting.remove((number, job))
                prompt = prompt_of(model, 80, seed=job["prompt"])[: job["cut"]]
                own = {
                    k: v for k, v in job.items() if k not in ("prompt", "cut", "later", "cancel")
                }
                params = SamplingParams(**own, seed=number)
                running.append((engine.add(prompt, params), job, step))
                expected.append((prompt, params))
        for request, job, since in running:
            if job["cancel"] is not None and step == since + job["cancel"]:
                engine.cancel(request)
        if not waiting and all(request.finished for request, _, _ in running):
            break
        engine.step()
        engine.scheduler.check()
    for (request, _, _), (prompt, params) in zip(running, expected, strict=True):
        if any(a.finish_reason == "abort" for a in request.answers):
            continue
        assert bits(request) == bits(alone(model, prompt, params))
    assert engine.idle
    assert engine.pool.used == 0
    engine.pool.check([])


@pytest.mark.parametrize("chunk", [1, 4, 512])
@pytest.mark.parametrize("shared", [0, 40])
def test_drafts_are_what_training_computes(kernel_folder: Path, chunk: int, shared: int) -> None:
    """A draft is the MTP head's likeliest token over the whole sequence so far (eq. 21-23)."""
    model = random_model(kernels=answering_kernels(kernel_folder), seed=3).requires_grad_(False)
    plain = random_model(seed=3)
    prompt = prompt_of(model, 45, 1)
    options = EngineOptions(speculation="on", prefill_chunk=chunk)
    engine = Engine(model, options=options)
    params = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True)
    if shared:
        answer(engine, engine.add([*prompt[:shared], 7, 7], params))
    request = engine.add(prompt, params)
    (sequence,) = request.sequences
    drafted = 0
    while not request.finished:
        engine.step()
        if sequence.drafts:
            ids = torch.tensor([[*sequence.tokens, 0]])
            with torch.no_grad():
                hidden_BTD = plain.features(ids).mtp_hidden[0]
                expected = int(plain.lm_head(hidden_BTD)[0, len(sequence.tokens) - 2].argmax())
            assert sequence.drafts == [expected]
            drafted += 1
    assert drafted >= 20
    assert engine.stats().prefix_hits == (32 if shared else 0)


def test_drafts_are_accepted_and_counted_by_place(kernel_folder: Path) -> None:
    model = random_model(kernels=answering_kernels(kernel_folder), seed=3).requires_grad_(False)
    engine = Engine(model, options=EngineOptions(speculation="on", draft_depth=2))
    # Of two tokens about every second guess is right.
    params = SamplingParams(
        max_tokens=60, temperature=3.0, seed=5, allowed_token_ids=[5, 9], ignore_eos=True
    )
    request = engine.add(prompt_of(model, 9, 1), params)
    answer(engine, request)
    result = request.result()
    assert result.accepted > 10
    assert engine.steps < 55
    assert result.accepted < result.drafted
    assert engine.acceptance.judged[0] > engine.acceptance.judged[1] > 0
    assert sum(engine.acceptance.accepted) == result.accepted


def test_a_draft_that_ends_the_answer_is_accepted(kernel_folder: Path) -> None:
    """Also when it is not the last of its step."""
    model = random_model(kernels=answering_kernels(kernel_folder), seed=3).requires_grad_(False)
    engine = Engine(model, options=EngineOptions(speculation="on", draft_depth=2))
    counted, ended = Acceptance([0, 0], [0, 0]), 0
    for seed in range(12):
        params = SamplingParams(
            max_tokens=20, temperature=3.0, seed=seed, allowed_token_ids=[5, 9], stop_token_ids=[9]
        )
        request = engine.add([3, 4], params)
        (sequence,), (own,) = request.sequences, request.answers
        while not request.finished:
            drafts, before = sequence.drafts, len(own.output)
            engine.step()
            new = own.output[before:]
            for place, (token, draft) in enumerate(zip(new, drafts, strict=False)):
                counted.judged[place] += 1
                counted.accepted[place] += token == draft
        ended += len(drafts) == 2 and new == drafts[:1]
    assert engine.acceptance == counted
    assert ended


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_who_chooses_does_not_show(kernel_folder: Path, temperature: float) -> None:
    """A kernel for all answers at once, or each answer's sampler; with drafts, beside others."""
    model = random_model(kernels=answering_kernels(kernel_folder), seed=3).requires_grad_(False)
    found = []
    for asked in (0, 1):
        engine = Engine(model, options=EngineOptions(speculation="on", draft_depth=2))
        requests = [
            engine.add(
                prompt_of(model, 9, seed),
                SamplingParams(
                    max_tokens=24, temperature=temperature, seed=seed, n=2, logprobs=asked
                ),
            )
            for seed in range(3)
        ]
        answer(engine, *requests)
        outputs = [output for request in requests for output in request.result().outputs]
        found.append([[s[:3] for s in output.logprobs or ()] for output in outputs])
    assert found[0] == found[1]
    assert sum(map(len, found[0])) > 50


@pytest.mark.parametrize(
    "sampled", [{"temperature": 0, "banned_token_ids": [60]}, {"seed": 3}, {"seed": 3, "top_k": 9}]
)
def test_a_bad_row_ends_its_own_request_only(kernel_folder: Path, sampled: dict[str, Any]) -> None:
    model = random_model(
        tiny_config(), precision=F32, kernels=answering_kernels(kernel_folder), seed=3
    ).requires_grad_(False)
    model.embed_tokens.weight[60] = float("nan")
    engine = Engine(model, options=replace(PLAIN, prefix_cache=True))
    params = SamplingParams(max_tokens=8, logprobs=0, **sampled)
    good, bad = engine.add(prompt_of(model, 9, 1), params), engine.add([5, 60, 7], params)
    answer(engine, good, bad)
    assert good.result().outputs[0].finish_reason in ("length", "stop")
    failed = bad.result().outputs[0]
    assert failed.finish_reason == "error"
    assert failed.error is not None
    assert "NaN" in failed.error
    assert engine.pool.used == 0


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([61], {}, "token id 61 is outside the model's vocabulary of 61"),
        ([-1], {}, "token id -1 is outside"),
        ([3] * 128, {}, "the prompt has 128 tokens and the model's context 128"),
        ([3] * 100, {}, "pages of the cache, which has"),
        ([3], {"stop_token_ids": [61]}, "stop_token_ids: token id 61 is outside"),
        ([3], {"json_schema": {}}, "a grammar needs a tokenizer"),
        ([3], {"stop": "x"}, "stop strings need a tokenizer"),
    ],
)
def test_bad_input(
    prompt: list[int], options: dict[str, Any], message: str, kernel_folder: Path
) -> None:
    model = random_model(kernels=answering_kernels(kernel_folder)).requires_grad_(False)
    engine = Engine(model, options=replace(PLAIN, cache_tokens=64))
    with pytest.raises(BadInput, match=message):
        engine.add(prompt, SamplingParams(**options))
    assert engine.idle


def test_an_answer_ends_where_the_context_is_full(kernel_folder: Path) -> None:
    model = random_model(kernels=answering_kernels(kernel_folder), seed=3).requires_grad_(False)
    params = SamplingParams(max_tokens=None, ignore_eos=True, temperature=0)
    for speculation in ("off", "on"):
        engine = Engine(model, options=EngineOptions(speculation=speculation))
        request = engine.add(prompt_of(model, 120, 1), params)
        answer(engine, request)
        output = request.result().outputs[0]
        assert output.finish_reason == "length"
        assert len(output.token_ids) == 8


def test_a_deadline_ends_a_request(kernel_folder: Path) -> None:
    model = random_model(kernels=answering_kernels(kernel_folder)).requires_grad_(False)
    now = [0.0]
    engine = Engine(model, options=PLAIN, clock=lambda: now[0])
    request = engine.add([3, 4], SamplingParams(max_tokens=50, ignore_eos=True), deadline=1.0)
    engine.step()
    now[0] = 2.0
    engine.step()
    output = request.result().outputs[0]
    assert output.finish_reason == "error"
    assert output.error is not None
    assert "time was up" in output.error
    assert engine.pool.used == 0


def test_scores_are_the_models_own(kernel_folder: Path) -> None:
    model = random_model(kernels=answering_kernels(kernel_folder), seed=3).requires_grad_(False)
    prompt = prompt_of(model, 50, 2)
    engine = Engine(model, options=PLAIN)
    params = SamplingParams(prompt_logprobs=0)
    request = engine.add(prompt, params, score_only=True)
    answer(engine, request)
    result = request.result()
    assert result.outputs[0].token_ids == ()
    assert result.prompt_logprobs is not None
    assert result.prompt_logprobs[0] is None
    plain = random_model(precision=F32, seed=3)
    with torch.no_grad():
        logprobs_TV = plain(torch.tensor([prompt]))[0].log_softmax(-1)
    expected = logprobs_TV[:-1].gather(1, torch.tensor(prompt[1:]).unsqueeze(1))[:, 0]
    found = [s.logprob for s in result.prompt_logprobs if s is not None]
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)


def test_an_answer_without_a_bound_ends_where_a_small_cache_does(answering: Kernels) -> None:
    """An error would refuse every request that names no number of tokens."""
    model = random_model(tiny_config(), kernels=answering).requires_grad_(False)
    engine = Engine(model, options=EngineOptions(cache_tokens=64))
    request = engine.add([0, 5, 6], SamplingParams(max_tokens=None, ignore_eos=True))
    while not request.finished:
        engine.step()
    answer = request.result().outputs[0]
    assert answer.finish_reason == "length"
    assert len(answer.token_ids) == 64 - 3


def test_a_kernel_that_fails_is_not_passed_over(
    kernel_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model(kernels=answering_kernels(kernel_folder)).requires_grad_(False)
    engine = Engine(model, options=PLAIN)
    request = engine.add([1, 2], SamplingParams(max_tokens=4, seed=1))

    def broken(*_: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(engine.draw, "tokens", broken)
    with pytest.raises(RuntimeError, match="no such kernel"):
        engine.step()
    assert request.result().outputs[0].finish_reason == "error"
    assert engine.idle
