"""Routed experts, through the whole mixture layer, against a slow loop over tokens and experts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from tests.support import F64, random_model, random_tokens, tiny_config
from ziphius.config.model import ModelConfig
from ziphius.kernels.select import Kernels
from ziphius.model.dispatch import sort_by_slot
from ziphius.model.experts import ExpertStore, StackedExperts
from ziphius.model.ffn import MixtureOfExperts
from ziphius.model.precision import Precision
from ziphius.model.router import Routing
from ziphius.model.transformer import Transformer
from ziphius.model.weights import named_weights

WIDTH = 6


class Layer(torch.nn.Module):
    """A mixture layer with its stages in order, as ``Block.forward`` runs them."""

    def __init__(self, moe: MixtureOfExperts) -> None:
        super().__init__()
        self.moe = moe

    def forward(self, u_ND: Tensor, chosen_NK: Tensor | None = None) -> Tensor:
        sent = self.moe.dispatch(u_ND, self.moe.route(u_ND, chosen_NK))
        return self.moe.combine(self.moe.run_experts(sent), sent) + self.moe.shared(u_ND)


def mixture(
    seed: int = 0, precision: Precision = F64, kernels: Kernels | None = None, **changes: Any
) -> Layer:
    config = small(**changes)
    moe = MixtureOfExperts(config, precision, kernels or Kernels(), None)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*moe.parameters(), *moe.buffers()]:
            tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * 0.5)
    return Layer(moe)


def small(**changes: Any) -> ModelConfig:
    return tiny_config(
        **{"hidden_size": WIDTH, "moe_intermediate_size": 4, "n_shared_experts": 2, **changes}
    )


def slow(moe: MixtureOfExperts, u_ND: Tensor, chosen_NK: Tensor, scale: float = 2.5) -> Tensor:
    """Every expert on every token, and a dense matrix of weights (report eq. 12-13)."""
    scores_NE = (u_ND @ moe.gate.weight.T).sigmoid()
    mask_NE = torch.zeros_like(scores_NE).scatter(1, chosen_NK, 1.0)
    kept_NE = scores_NE * mask_NE
    weights_NE = scale * kept_NE / kept_NE.sum(-1, keepdim=True)
    out_ND = torch.zeros_like(u_ND)
    for expert in range(scores_NE.shape[1]):
        w1, w3 = moe.experts.store.gate_up_proj[expert].chunk(2)
        hidden_NF = F.silu(u_ND @ w1.T) * (u_ND @ w3.T)
        out_ND = out_ND + weights_NE[:, expert, None] * (
            hidden_NF @ moe.experts.store.down_proj[expert].T
        )
    s = moe.shared_experts
    shared_NF = F.silu(u_ND @ s.gate_proj.weight.T) * (u_ND @ s.up_proj.weight.T)
    return out_ND + shared_NF @ s.down_proj.weight.T


@pytest.mark.parametrize("grouped", ["loop", "reference"])
def test_equals_the_slow_loop(grouped: str) -> None:
    layer, u_ND = mixture(kernels=Kernels(grouped=grouped)), torch.randn(40, WIDTH).double()
    chosen_NK = layer.moe.gate(u_ND).chosen_NK
    torch.testing.assert_close(layer(u_ND), slow(layer.moe, u_ND, chosen_NK))


def test_gradients_equal_those_of_the_slow_loop() -> None:
    fast, reference = mixture(), mixture()
    u_ND = torch.randn(30, WIDTH, dtype=torch.float64)
    fast_u_ND, slow_u_ND = u_ND.clone().requires_grad_(), u_ND.clone().requires_grad_()
    chosen_NK, dout_ND = fast.moe.gate(u_ND).chosen_NK, torch.randn_like(u_ND)
    fast(fast_u_ND).backward(dout_ND)
    slow(reference.moe, slow_u_ND, chosen_NK).backward(dout_ND)
    torch.testing.assert_close(fast_u_ND.grad, slow_u_ND.grad)
    for (name, p), q in zip(fast.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("grouped", ["loop", "reference"])
def test_gradients_by_differences(normalise: bool, grouped: str) -> None:
    """In the input and every weight, the router's included: its gates carry the gradient."""
    changes = {
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 2,
        "hidden_size": 3,
        "n_shared_experts": 1,
        "norm_topk_prob": normalise,
    }
    layer = mixture(kernels=Kernels(grouped=grouped), **changes)
    names = [name for name, _ in layer.named_parameters()]
    weights = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    u_ND = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)

    def run(u_ND: Tensor, *weights: Tensor) -> Tensor:
        return functional_call(layer, dict(zip(names, weights, strict=True)), (u_ND,))

    assert torch.autograd.gradcheck(run, (u_ND, *weights))
    layer(u_ND).square().sum().backward()
    assert layer.moe.gate.weight.grad.abs().max() > 1e-6


def test_the_routing_weight_enters_exactly_once() -> None:
    """Twice the routed scale, twice the routed output; the shared expert has none (facts 13.8)."""
    u_ND = torch.randn(20, WIDTH, dtype=torch.float64)
    one, two = mixture(routed_scaling_factor=1.5), mixture(routed_scaling_factor=3.0)
    shared_ND = one.moe.shared(u_ND)
    torch.testing.assert_close(two(u_ND) - shared_ND, 2 * (one(u_ND) - shared_ND))
    chosen_NK = one.moe.gate(u_ND).chosen_NK
    torch.testing.assert_close(one(u_ND), slow(one.moe, u_ND, chosen_NK, scale=1.5))


def test_a_zero_expert_leaves_the_shared_one() -> None:
    layer, u_ND = mixture(), torch.randn(20, WIDTH, dtype=torch.float64)
    torch.nn.init.zeros_(layer.moe.experts.store.down_proj)
    s = layer.moe.shared_experts
    gate_NF, up_NF = u_ND @ s.gate_proj.weight.T, u_ND @ s.up_proj.weight.T
    torch.testing.assert_close(layer(u_ND), (F.silu(gate_NF) * up_NF) @ s.down_proj.weight.T)


def test_no_token_is_dropped_however_skewed_the_routing() -> None:
    """All of 500 tokens meet the same three of eight experts (facts 2.3)."""
    layer, u_ND = mixture(n_group=1, topk_group=1), torch.randn(500, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        layer.moe.gate.e_score_correction_bias.copy_(torch.tensor([0, 9, 0, 0, 9, 0, 0, 9.0]))
    routed = layer.moe.route(u_ND, None)
    assert routed.sort.counts_E.tolist() == [0, 500, 0, 0, 500, 0, 0, 500]
    expected_ND = slow(layer.moe, u_ND, torch.tensor([[1, 4, 7]]).expand(500, 3))
    torch.testing.assert_close(layer(u_ND), expected_ND)


def test_an_expert_without_tokens_gets_a_zero_gradient() -> None:
    layer, u_ND = mixture(), torch.randn(3, WIDTH, dtype=torch.float64)
    layer(u_ND, torch.tensor([[0, 1, 6], [1, 0, 7], [6, 7, 1]])).sum().backward()
    for weight in (layer.moe.experts.store.gate_up_proj, layer.moe.experts.store.down_proj):
        assert weight.grad is not None
        idle = [expert for expert in range(8) if not weight.grad[expert].any()]
        assert idle == [2, 3, 4, 5]


def test_one_token_and_no_token() -> None:
    layer = mixture()
    one_ND = torch.randn(1, WIDTH, dtype=torch.float64)
    expected_ND = slow(layer.moe, one_ND, layer.moe.gate(one_ND).chosen_NK)
    torch.testing.assert_close(layer(one_ND), expected_ND)
    none_ND = torch.empty(0, WIDTH, dtype=torch.float64)
    assert layer(none_ND, torch.empty(0, 3, dtype=torch.int64)).shape == (0, WIDTH)


def test_tokens_do_not_see_each_other() -> None:
    layer, u_ND = mixture(), torch.randn(17, WIDTH, dtype=torch.float64)
    alone_ND = torch.cat([layer(row) for row in u_ND.split(1)])
    torch.testing.assert_close(layer(u_ND), alone_ND)


def test_bfloat16_is_close_to_float64() -> None:
    exact, u_ND = mixture(), torch.randn(60, WIDTH).bfloat16()
    rough = mixture(precision=Precision(torch.bfloat16, torch.bfloat16))
    chosen_NK = exact.moe.gate(u_ND.double()).chosen_NK
    expected_ND = exact(u_ND.double(), chosen_NK)
    result_ND = rough(u_ND, chosen_NK)
    assert result_ND.dtype == torch.bfloat16
    assert (result_ND.double() - expected_ND).abs().max() < 0.03 * expected_ND.abs().max()


# --- sorting and storing --------------------------------------------------------------------------


def test_sorting_is_stable_and_gates_travel_with_their_rows() -> None:
    chosen_NK = torch.tensor([[2, 0], [1, 2], [2, 1]])
    weights_NK = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])
    routing = Routing(chosen_NK, weights_NK, torch.zeros(3, 4))
    sort = sort_by_slot(routing.chosen_NK, 4)
    assert sort.order_M.tolist() == [1, 2, 5, 0, 3, 4]  # flat (token, choice), by expert
    assert sort.counts_E.tolist() == [1, 2, 3, 0]
    assert sort.inverse_M[sort.order_M].tolist() == list(range(6))
    moe = mixture().moe
    sent = moe.dispatcher.dispatch(torch.arange(3.0)[:, None], routing, sort)
    assert sent.rows_MD.flatten().tolist() == [0, 1, 2, 0, 1, 2]
    assert sent.gates_M.tolist() == pytest.approx([0.2, 0.3, 0.6, 0.1, 0.4, 0.5])
    assert sent.counts == [1, 2, 3, 0]


def test_stored_experts_have_their_published_names_the_gate_first() -> None:
    store = StackedExperts(small(), F64, None)
    with torch.no_grad():
        store.gate_up_proj.copy_(torch.arange(store.gate_up_proj.numel()).view(8, 8, WIDTH))
        store.down_proj.copy_(-torch.arange(store.down_proj.numel()).view(8, WIDTH, 4))
    named = dict(store.named_experts())
    assert isinstance(store, ExpertStore)
    assert len(named) == 3 * 8
    assert torch.equal(named["5.gate_proj.weight"], store.gate_up_proj[5, :4])
    assert torch.equal(named["5.up_proj.weight"], store.gate_up_proj[5, 4:])
    assert torch.equal(named["5.down_proj.weight"], store.down_proj[5])
    with torch.no_grad():
        named["3.up_proj.weight"].fill_(7)
    assert (store.gate_up_proj[3, 4:] == 7).all(), "the tensors must be views"
    assert not (store.gate_up_proj[3, :4] == 7).any()


def with_slots(slots: tuple[int, ...]) -> Transformer:
    """The model of ``random_model`` with its experts in other slots, loaded by their names."""
    plain = random_model(precision=F64)
    weights = dict(named_weights(plain))
    model = copy.deepcopy(plain)
    for _, _, block in model.blocks():
        if isinstance(block.mlp, MixtureOfExperts):
            store = StackedExperts(model.config, F64, None, slots)
            block.mlp.experts.store = store
    with torch.no_grad():
        for name, tensor in named_weights(model):
            tensor.copy_(weights[name])
    return model


@pytest.mark.parametrize("slots", [(7, 6, 5, 4, 3, 2, 1, 0), (0, 1, 2, 3, 4, 5, 6, 7, 2, 2, 5)])
def test_experts_in_other_slots_and_in_several_compute_the_same(slots: tuple[int, ...]) -> None:
    plain, model = random_model(precision=F64), with_slots(slots)
    tokens_BT = random_tokens(plain.config, 2, 12)
    torch.testing.assert_close(model(tokens_BT), plain(tokens_BT), rtol=1e-12, atol=1e-12)
    assert {n: t.shape for n, t in named_weights(model)} == {
        n: t.shape for n, t in named_weights(plain)
    }
    routing = model.trunk(tokens_BT)[1][1]
    assert torch.equal(routing.chosen_NK, plain.trunk(tokens_BT)[1][1].chosen_NK)


def test_copies_of_an_expert_take_turns() -> None:
    store = StackedExperts(tiny_config(), F64, None, (0, 1, 2, 3, 4, 5, 6, 7, 2, 2))
    chosen_NK = torch.tensor([[2, 0], [2, 1], [2, 3], [2, 5], [7, 2]])
    assert store.slots(chosen_NK).tolist() == [[2, 0], [8, 1], [9, 3], [2, 5], [7, 8]]


def test_an_expert_that_is_not_resident_is_named() -> None:
    store = StackedExperts(tiny_config(), F64, None, (0, 1, 4))
    assert store.slots(torch.tensor([[4, 0], [1, 4]])).tolist() == [[2, 0], [1, 2]]
    with pytest.raises(ValueError, match=r"\[2, 3\]"):
        store.slots(torch.tensor([[0, 2], [3, 1]]))
    assert len(dict(store.named_experts())) == 9
