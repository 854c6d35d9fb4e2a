"""The experts that an answer's tokens chose, as the engine tells them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support import F32, random_model
from ziphius.inference.llm import LLM
from ziphius.inference.outputs import CompletionOutput
from ziphius.inference.params import SamplingParams
from ziphius.model.transformer import Transformer

PROMPTS = [[0, 5, 9, 13, 2, 41], [0, 5, 9, 13, 2, 41, 7, 8], [0, 33]]


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model(precision=F32, vocab_size=61).eval()


def answers(
    model: Transformer, prompts: list[list[int]], n: int = 2, **options: Any
) -> list[tuple[list[int], CompletionOutput]]:
    llm = LLM.of(model, keep_experts=True, **options)
    params = SamplingParams(n=n, max_tokens=40, seed=3, ignore_eos=True, detokenize=False)
    return [
        (prompt, output)
        for prompt, result in zip(prompts, llm.generate(prompts, params), strict=True)
        for output in result.outputs
    ]


def chosen_by_trainer(model: Transformer, tokens: list[int]) -> torch.Tensor:
    """Return what one pass over the whole text chooses, ``[tokens, layers, K]``."""
    with torch.no_grad():
        _, routings = model.trunk(torch.tensor([tokens]))
    return torch.stack([routings[layer].chosen_NK for layer in sorted(routings)], dim=1)


@pytest.mark.parametrize("kernels", ["torch", "compiled"])
@pytest.mark.parametrize("speculation", ["off", "on"])
def test_they_are_those_of_one_pass_over_the_text(
    model: Transformer, kernels: str, speculation: str
) -> None:
    """Random weights have no ties: only an expert of another token would differ."""
    for prompt, output in answers(model, PROMPTS, kernels=kernels, speculation=speculation):
        assert output.experts is not None
        tokens = [*prompt, *output.token_ids]
        expected = chosen_by_trainer(model, tokens[:-1])
        assert output.experts.shape == expected.shape
        assert torch.equal(output.experts.long().sort(-1).values, expected.sort(-1).values)


def test_a_prefix_that_was_found_brings_its_experts(model: Transformer) -> None:
    long = [0, *range(2, 52)]
    llm = LLM.of(model, keep_experts=True)
    params = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True, detokenize=False)
    first, second = (llm.generate([long], params)[0] for _ in range(2))
    assert second.num_cached_tokens >= 32
    one, other = first.outputs[0].experts, second.outputs[0].experts
    assert one is not None
    assert other is not None
    assert torch.equal(one, other)


def test_none_are_told_unless_asked_for(model: Transformer) -> None:
    llm = LLM.of(model)
    params = SamplingParams(max_tokens=2, detokenize=False)
    assert llm.generate([PROMPTS[0]], params)[0].outputs[0].experts is None


def test_a_small_cache_that_preempts_tells_the_same(model: Transformer) -> None:
    whole = answers(model, PROMPTS)
    tight = answers(model, PROMPTS, cache_tokens=128, prefill_chunk=3)
    for (_, one), (_, other) in zip(whole, tight, strict=True):
        assert one.token_ids == other.token_ids
        assert one.experts is not None
        assert other.experts is not None
        assert torch.equal(one.experts, other.experts)


def test_a_model_without_experts_answers_too() -> None:
    dense = random_model(precision=F32, vocab_size=61, first_k_dense_replace=2, num_hidden_layers=2)
    for _, output in answers(dense.eval(), PROMPTS):
        assert output.error is None
        assert len(output.token_ids) == 40
        assert output.experts is None
