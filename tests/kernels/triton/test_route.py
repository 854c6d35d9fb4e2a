"""The router: vectors of the facts, transformers' own, ties, groups, and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ziphius.kernels.route import route_reference
from ziphius.kernels.triton.route import route_triton

VERSIONS = {"reference": route_reference, "triton": route_triton}
PUBLISHED = {"top_k": 8, "n_group": 8, "topk_group": 4, "normalise": True, "scale": 2.5}


def logits_and_bias(N: int, E: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.randn(N, E, device=device), torch.randn(E, device=device) * 0.1


@pytest.mark.parametrize("version", VERSIONS)
def test_vectors_of_the_facts(device: torch.device, version: str) -> None:
    """Facts, appendix A: the best expert of all is lost to the limit on groups."""
    logits_NE = torch.tensor([[2.0, -1.0, 0.5, 0.4, 1.9, -3.0, 0.1, 0.0], [0.0] * 8], device=device)
    logits_NE[1] = torch.arange(8, device=device) / 10
    bias_E = torch.tensor([0, 0, 0, 0.05, -0.3, 0, 0.2, 0], device=device)
    rule: Any = {"top_k": 3, "n_group": 4, "topk_group": 2, "normalise": True, "scale": 2.5}
    chosen_NK, weights_NK, scores_NE = VERSIONS[version](logits_NE, bias_E, **rule)
    assert chosen_NK.tolist() == [[6, 3, 2], [6, 7, 3]]
    expected = [[0.751634, 0.857166, 0.891200], [0.854818, 0.884648, 0.760534]]
    torch.testing.assert_close(weights_NK.cpu(), torch.tensor(expected), rtol=0, atol=1e-6)
    scores = [0.880797, 0.268941, 0.622459, 0.598688, 0.869892, 0.047426, 0.524979, 0.5]
    torch.testing.assert_close(scores_NE[0].cpu(), torch.tensor(scores), rtol=0, atol=1e-6)


@pytest.mark.parametrize("version", VERSIONS)
def test_transformers_chooses_the_same(device: torch.device, version: str) -> None:
    """Its router is not ours: the product is taken with an identity, so that it gets our logits."""
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    torch.manual_seed(0)
    logits_NE, bias_E = logits_and_bias(40, 256, torch.device("cpu"))
    config = DeepseekV3Config(
        hidden_size=256,
        moe_intermediate_size=1,
        n_routed_experts=256,
        n_group=8,
        topk_group=4,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        n_shared_experts=1,
    )
    layer = DeepseekV3MoE(config)
    layer.gate.weight.data = torch.eye(256)
    layer.gate.e_score_correction_bias.copy_(bias_E)
    theirs_NK, weights_NK = _their_route(layer, logits_NE)
    found_NK, found_weights_NK, _ = VERSIONS[version](
        logits_NE.to(device), bias_E.to(device), **PUBLISHED
    )
    ours = torch.zeros(40, 256).scatter(1, found_NK.cpu(), found_weights_NK.cpu())
    theirs = torch.zeros(40, 256).scatter(1, theirs_NK, weights_NK.detach())
    torch.testing.assert_close(ours, theirs)


def _their_route(layer: Any, logits_NE: Tensor) -> tuple[Tensor, Tensor]:
    """Return experts and weights; releases differ in where they choose them."""
    given = layer.gate(logits_NE.unsqueeze(0))
    if isinstance(given, tuple):
        numbers = next(x for x in given if not x.is_floating_point())
        weights = next(x for x in given if x.is_floating_point() and x.shape == numbers.shape)
        return numbers, weights
    numbers, weights = layer.route_tokens_to_experts(given)
    return numbers, weights


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 12),
    st.sampled_from([(1, 1), (1, 5), (1, 17), (2, 3), (3, 4), (5, 2), (8, 8)]),
    st.booleans(),
    st.data(),
)
def test_choice_weights_and_gradients(
    device: torch.device, N: int, sizes: tuple[int, int], normalise: bool, data: st.DataObject
) -> None:
    """Any number of groups and experts; gradients of weights and scores together."""
    groups, each = sizes
    kept = data.draw(st.integers(1, groups))
    top_k = data.draw(st.integers(1, kept * each))
    torch.manual_seed(data.draw(st.integers(0, 10**6)))
    logits_NE, bias_E = logits_and_bias(N, groups * each, device)
    rule: Any = {"top_k": top_k, "n_group": groups, "topk_group": kept, "normalise": normalise}
    ours_NE = logits_NE.clone().requires_grad_()
    exact_NE = logits_NE.cpu().double().requires_grad_()
    ours = route_triton(ours_NE, bias_E, **rule, scale=1.7)
    exact = route_reference(exact_NE, bias_E.cpu().double(), **rule, scale=1.7)
    assert torch.equal(ours[0].cpu(), exact[0])
    factors = [torch.randn(x.shape, dtype=torch.float64) for x in exact[1:]]
    for found, expected in zip(ours[1:], exact[1:], strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-5, atol=1e-6)
    for mine, theirs in ((0, 0), (1, 1), (slice(None), slice(None))):
        for graph, use, leaf in ((ours, mine, ours_NE), (exact, theirs, exact_NE)):
            pairs = list(zip(graph[1:], factors, strict=True))
            used = pairs[use] if isinstance(use, slice) else [pairs[use]]
            loss = sum((x * f.to(x.device, x.dtype)).sum() for x, f in used)
            leaf.grad = None
            assert isinstance(loss, Tensor)
            loss.backward(retain_graph=True)
        assert ours_NE.grad is not None
        assert exact_NE.grad is not None
        torch.testing.assert_close(ours_NE.grad.cpu().double(), exact_NE.grad, rtol=1e-4, atol=1e-5)


def test_of_equals_the_lowest_number_is_chosen(device: torch.device) -> None:
    """Groups and experts alike, and scores that are one after rounding."""
    for value in (0.0, 50.0):
        logits_NE = torch.full((3, 12), value, device=device)
        rule: Any = {"top_k": 4, "n_group": 4, "topk_group": 2, "normalise": True, "scale": 1.0}
        chosen_NK, weights_NK, _ = route_triton(logits_NE, torch.zeros(12, device=device), **rule)
        assert chosen_NK.tolist() == [[0, 1, 2, 3]] * 3
        torch.testing.assert_close(weights_NK.cpu(), torch.full((3, 4), 0.25))


def test_a_negative_score_beats_groups_that_are_not_kept(device: torch.device) -> None:
    """Facts 13.2: with a bias below every score, zeros in their place would be chosen."""
    logits_NE, bias_E = torch.zeros(1, 8, device=device), torch.full((8,), -3.0, device=device)
    bias_E[4:6] = -2.0
    rule: Any = {"top_k": 2, "n_group": 4, "topk_group": 1, "normalise": False, "scale": 1.0}
    assert route_triton(logits_NE, bias_E, **rule)[0].tolist() == [[4, 5]]


def test_what_is_no_number_shows(device: torch.device) -> None:
    """It is chosen, by a number that exists, and is in the weights."""
    logits_NE, bias_E = logits_and_bias(3, 6, device)
    logits_NE[1] = float("nan")
    logits_NE[2, 5] = float("nan")
    rule: Any = {"top_k": 3, "n_group": 3, "topk_group": 2, "normalise": True, "scale": 1.0}
    chosen_NK, weights_NK, _ = route_triton(logits_NE, bias_E, **rule)
    assert (chosen_NK >= 0).all()
    assert (chosen_NK < 6).all()
    assert all(len(set(row)) == 3 for row in chosen_NK.tolist())
    assert 5 in chosen_NK[2].tolist()
    assert weights_NK[0].isfinite().all()
    assert weights_NK[1:].isnan().all()


def test_underflowing_scores_are_finite(device: torch.device) -> None:
    logits_NE = torch.full((2, 8), -200.0, device=device).requires_grad_()
    rule: Any = {"top_k": 2, "n_group": 1, "topk_group": 1, "normalise": True, "scale": 2.5}
    _, weights_NK, _ = route_triton(logits_NE, torch.zeros(8, device=device), **rule)
    weights_NK.sum().backward()
    assert weights_NK.isfinite().all()
    assert logits_NE.grad is not None
    assert logits_NE.grad.isfinite().all()


def test_no_tokens(device: torch.device) -> None:
    logits_NE = torch.empty(0, 256, device=device).requires_grad_()
    chosen_NK, weights_NK, scores_NE = route_triton(
        logits_NE, torch.zeros(256, device=device), **PUBLISHED
    )
    (weights_NK.sum() + scores_NE.sum()).backward()
    assert chosen_NK.shape == (0, 8)
