"""Routing: the choice, the weights, the counts and the sequence-wise balance loss."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support import F64, tiny_config
from ziphius.kernels.select import Kernels
from ziphius.model.precision import Precision
from ziphius.model.router import Router, choose, expert_counts, gate, sequence_balance

# Facts, appendix A: 8 experts, 4 groups of 2, keep 2 groups, top-3, scale 2.5.
LOGITS_NE = torch.tensor(
    [[2.0, -1.0, 0.5, 0.4, 1.9, -3.0, 0.1, 0.0], [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]]
)
BIAS_E = torch.tensor([0, 0, 0, 0.05, -0.3, 0, 0.2, 0])
CHOSEN = [[6, 3, 2], [6, 7, 3]]
WEIGHTS = [[0.751634, 0.857166, 0.891200], [0.854818, 0.884648, 0.760534]]


def router(bias_E: Tensor, precision: Precision | None = None, **changes: object) -> Router:
    """Build a router whose logits are its input: the hidden width is the number of experts."""
    E = len(bias_E)
    config = tiny_config(hidden_size=E, n_routed_experts=E, num_experts_per_tok=3, **changes)
    result = Router(config, precision or Precision(), Kernels(), None)
    with torch.no_grad():
        result.weight.copy_(torch.eye(E))
        result.e_score_correction_bias.copy_(bias_E)
    return result


# --- the published vectors ------------------------------------------------------------------------


def test_appendix_a() -> None:
    routing = router(BIAS_E, F64)(LOGITS_NE)
    scores = [0.880797, 0.268941, 0.622459, 0.598688, 0.869892, 0.047426, 0.524979, 0.5]
    assert routing.scores_NE[0].tolist() == pytest.approx(scores, abs=1e-6)
    assert routing.chosen_NK.tolist() == CHOSEN
    assert routing.chosen_NK.dtype == torch.int64
    for weights, expected in zip(routing.weights_NK.tolist(), WEIGHTS, strict=True):
        assert weights == pytest.approx(expected, abs=1e-6)


def test_appendix_a_without_the_group_limit_takes_the_best_expert() -> None:
    """Expert 0 is the best overall; in the test above it is lost to the group limit."""
    assert router(BIAS_E, n_group=1, topk_group=1)(LOGITS_NE[:1]).chosen_NK[0, 0] == 0


# --- the choice -----------------------------------------------------------------------------------


def test_the_bias_decides_the_choice_and_leaves_the_weights_alone() -> None:
    logits_NE = torch.randn(50, 8)
    bias_E = torch.tensor([3.0, 0, 0, 3.0, 0, 3.0, 0, 0])
    plain = {"n_group": 1, "topk_group": 1}
    biased = router(bias_E, **plain)(logits_NE)
    assert (biased.chosen_NK.sort(-1).values == torch.tensor([0, 3, 5])).all()
    expected_NK = logits_NE.sigmoid().gather(1, biased.chosen_NK)
    expected_NK = 2.5 * expected_NK / expected_NK.sum(-1, keepdim=True)
    torch.testing.assert_close(biased.weights_NK, expected_NK)
    assert torch.equal(biased.scores_NE, router(torch.zeros(8), **plain)(logits_NE).scores_NE)


def test_weights_survive_a_bias_that_swallows_the_scores() -> None:
    """Gates recovered as (s + b) - b would be zero, or coarse steps (facts 13.1)."""
    logits_NE = torch.full((1, 8), -12.0) + torch.arange(8) * 0.1
    weights_NK = router(torch.full((8,), 4096.0), norm_topk_prob=False)(logits_NE).weights_NK
    assert (weights_NK > 0).all()
    routing = router(torch.full((8,), 4096.0))(logits_NE)
    expected_NK = logits_NE.double().sigmoid().gather(1, routing.chosen_NK)
    expected_NK = 2.5 * expected_NK / expected_NK.sum(-1, keepdim=True)
    torch.testing.assert_close(routing.weights_NK.double(), expected_NK, rtol=1e-5, atol=0)


def test_group_mask_with_zero_would_let_an_excluded_expert_win() -> None:
    """Allowed experts with negative biased scores must beat excluded ones (facts 13.2)."""
    scores_NE = torch.tensor([[0.9, 0.8, 0.2, 0.1, 0.6, 0.5, 0.4, 0.3]])
    bias_E = torch.tensor([-1.0, -1.0, -9.0, -9.0, -1.2, -1.2, -9.0, -9.0])
    chosen_NK = choose(scores_NE, bias_E, top_k=3, n_group=4, topk_group=2)
    assert chosen_NK.tolist() == [[0, 1, 4]]


def test_a_group_scores_the_sum_of_its_two_best() -> None:
    """Group 0 has the best expert, group 1 the best pair; by maximum group 0 would be kept."""
    scores_NE = torch.tensor([[0.9, 0.1, 0.1, 0.7, 0.6, 0.1]])
    zero_E = torch.zeros(6)
    assert choose(scores_NE, zero_E, 2, n_group=2, topk_group=1).tolist() == [[3, 4]]
    # A third expert must not count: three times 0.5 loses to 0.8 + 0.3.
    scores_NE = torch.tensor([[0.5, 0.5, 0.5, 0.8, 0.3, 0.0]])
    assert choose(scores_NE, zero_E, 2, n_group=2, topk_group=1).tolist() == [[3, 4]]


def test_the_bias_takes_part_in_the_group_scores() -> None:
    scores_NE = torch.tensor([[0.9, 0.9, 0.5, 0.5]])
    bias_E = torch.tensor([0.0, 0.0, 1.0, 0.0])
    assert choose(scores_NE, bias_E, 2, n_group=2, topk_group=1).tolist() == [[2, 3]]


def test_one_group_equals_no_grouping() -> None:
    scores_NE, bias_E = torch.rand(100, 12), torch.randn(12)
    expected_NK = (scores_NE + bias_E).topk(5, -1).indices
    assert torch.equal(choose(scores_NE, bias_E, 5, n_group=1, topk_group=1), expected_NK)
    assert torch.equal(choose(scores_NE, bias_E, 5, n_group=3, topk_group=3), expected_NK)


@st.composite
def routings(draw: st.DrawFn) -> tuple[Tensor, Tensor, int, int, int]:
    """Draw (scores, bias, top_k, n_group, topk_group) without ties."""
    groups, members = draw(st.integers(1, 8)), draw(st.integers(2, 6))
    kept = draw(st.integers(1, groups))
    top_k = draw(st.integers(1, min(8, kept * members)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scores_NE = torch.rand(30, groups * members, generator=generator, dtype=torch.float64)
    bias_E = torch.randn(groups * members, generator=generator, dtype=torch.float64)
    return scores_NE, bias_E, top_k, groups, kept


@settings(max_examples=60)
@given(routings())
def test_the_choice_by_brute_force(drawn: tuple[Tensor, Tensor, int, int, int]) -> None:
    """Plain Python, written from facts 1.7, step by step."""
    scores_NE, bias_E, top_k, n_group, topk_group = drawn
    chosen_NK = choose(scores_NE, bias_E, top_k, n_group, topk_group)
    assert chosen_NK.shape == (30, top_k)
    members = len(bias_E) // n_group
    for row, chosen in zip((scores_NE + bias_E).tolist(), chosen_NK.tolist(), strict=True):
        groups = [row[g * members : (g + 1) * members] for g in range(n_group)]
        order = sorted(range(n_group), key=lambda g: -sum(sorted(groups[g])[-2:]))
        allowed = [e for e in range(len(row)) if e // members in order[:topk_group]]
        assert chosen == sorted(allowed, key=lambda e: -row[e])[:top_k]


@settings(max_examples=60)
@given(routings(), st.randoms(use_true_random=False))
def test_renaming_experts_renames_the_choice(
    drawn: tuple[Tensor, Tensor, int, int, int], random: object
) -> None:
    """Exchange whole groups, and experts inside their groups: the choice follows."""
    scores_NE, bias_E, top_k, n_group, topk_group = drawn
    members = len(bias_E) // n_group
    groups = list(range(n_group))
    random.shuffle(groups)
    renamed = []
    for g in groups:
        inside = list(range(members))
        random.shuffle(inside)
        renamed += [g * members + i for i in inside]
    order_E = torch.tensor(renamed)  # new expert e is old expert order[e]
    old_NK = choose(scores_NE, bias_E, top_k, n_group, topk_group)
    new_NK = choose(scores_NE[:, order_E], bias_E[order_E], top_k, n_group, topk_group)
    assert torch.equal(order_E[new_NK], old_NK)


# --- the weights ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_normalised_weights_sum_to_the_scale(scale: float) -> None:
    routing = router(torch.randn(8), F64, routed_scaling_factor=scale)(torch.randn(40, 8).double())
    torch.testing.assert_close(routing.weights_NK.sum(-1), torch.full((40,), scale).double())


def test_the_scale_applies_without_normalisation_too() -> None:
    routing = router(torch.randn(8), norm_topk_prob=False)(torch.randn(40, 8))
    torch.testing.assert_close(
        routing.weights_NK, 2.5 * routing.scores_NE.gather(1, routing.chosen_NK)
    )


def test_underflown_scores_give_finite_weights() -> None:
    weights_NK = gate(torch.zeros(1, 4), torch.tensor([[0, 2]]), normalise=True, scale=2.5)
    assert weights_NK.tolist() == [[0.0, 0.0]]


def test_weights_stand_in_the_order_of_the_experts_ids() -> None:
    scores_NE = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    for ids in itertools.permutations(range(4), 3):
        weights_NK = gate(scores_NE, torch.tensor([ids]), normalise=False, scale=1.0)
        assert weights_NK[0].tolist() == pytest.approx([0.1 * (i + 1) for i in ids])


def test_a_given_choice_is_replayed() -> None:
    subject, logits_NE = router(BIAS_E), torch.randn(6, 8)
    chosen_NK = torch.tensor([[7, 0, 1]]).expand(6, 3)
    routing = subject(logits_NE, chosen_NK)
    assert torch.equal(routing.chosen_NK, chosen_NK)
    expected_NK = gate(subject(logits_NE).scores_NE, chosen_NK, normalise=True, scale=2.5)
    assert torch.equal(routing.weights_NK, expected_NK)


def test_the_bias_has_no_gradient_and_is_no_parameter() -> None:
    subject = router(BIAS_E)
    assert [name for name, _ in subject.named_parameters()] == ["weight"]
    assert "e_score_correction_bias" in subject.state_dict()
    subject(LOGITS_NE).weights_NK[0, 0].backward()
    assert subject.weight.grad is not None
    assert subject.e_score_correction_bias.grad is None
    assert not subject.e_score_correction_bias.requires_grad


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16, torch.float64])
def test_the_bias_is_fp32_whatever_the_weights_are(storage: torch.dtype) -> None:
    subject = router(torch.zeros(8), Precision(compute=storage, storage=storage))
    assert subject.e_score_correction_bias.dtype == torch.float32
    # The steps of the balance rule must not vanish beside the released biases (facts 13.6).
    subject.e_score_correction_bias.fill_(2.02).add_(0.001)
    assert subject.e_score_correction_bias[0].item() == pytest.approx(2.021, abs=1e-6)


def test_bfloat16_models_route_in_fp32() -> None:
    """Logits that BF16 cannot tell apart: the product of BF16 numbers is exact in FP32 only."""
    subject = router(
        torch.zeros(8), Precision(torch.bfloat16, torch.bfloat16), n_group=1, topk_group=1
    )
    with torch.no_grad():
        subject.weight.zero_()
        subject.weight[:, 0] = 1.0
        subject.weight[:, 1] = torch.arange(8) / 1024
    x_ND = torch.zeros(1, 8, dtype=torch.bfloat16)
    x_ND[0, :2] = 1.0
    routing = subject(x_ND)
    assert routing.scores_NE.dtype == routing.weights_NK.dtype == torch.float32
    assert routing.chosen_NK.tolist() == [[7, 6, 5]]
    assert len(set(routing.scores_NE[0].tolist())) == 8


# --- counting -------------------------------------------------------------------------------------


def test_counts_are_exact_integers_where_bf16_counts_are_not() -> None:
    """BF16 stops counting at 2^8, and FP16 at 2^11."""
    chosen_NK = torch.cat((torch.full((5000, 2), 3), torch.full((257, 2), 1)))
    counts_E = expert_counts(chosen_NK, 6)
    assert counts_E.dtype == torch.int64
    assert counts_E.tolist() == [0, 514, 0, 10000, 0, 0]


@settings(max_examples=40)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=60))
def test_counts_equal_pythons(ids: list[int]) -> None:
    counts = expert_counts(torch.tensor(ids).unsqueeze(-1), 10).tolist()
    assert counts == [ids.count(expert) for expert in range(10)]


# --- the sequence-wise balance loss ---------------------------------------------------------------


def test_balance_of_an_example_by_hand() -> None:
    """Two tokens, four experts, K = 2.

    Token 1 prefers experts 0 and 1, token 2 experts 0 and 2: f = 4 / (2 * 2) * (2, 1, 1, 0).
    """
    scores_BTE = torch.tensor([[[0.8, 0.6, 0.4, 0.2], [0.9, 0.3, 0.6, 0.2]]], dtype=torch.float64)
    P = [(0.4 + 0.45) / 2, (0.3 + 0.15) / 2, (0.2 + 0.3) / 2, (0.1 + 0.1) / 2]
    expected = 2 * P[0] + 1 * P[1] + 1 * P[2] + 0 * P[3]
    assert sequence_balance(scores_BTE, top_k=2).tolist() == pytest.approx([expected])


def test_perfect_balance_gives_one_and_collapse_the_number_of_experts_over_k() -> None:
    scores_BTE = torch.full((1, 8, 8), 1e-9, dtype=torch.float64)
    for t in range(8):
        scores_BTE[0, t, [t, (t + 1) % 8]] = 0.5
    assert sequence_balance(scores_BTE, 2).item() == pytest.approx(1.0)
    collapsed_BTE = torch.full((1, 8, 8), 1e-9, dtype=torch.float64)
    collapsed_BTE[..., :2] = 0.5
    assert sequence_balance(collapsed_BTE, 2).item() == pytest.approx(8 / 2)


def test_balance_is_per_sequence() -> None:
    """Two sequences that are balanced together and collapsed alone."""
    scores_BTE = torch.full((2, 4, 4), 1e-9, dtype=torch.float64)
    scores_BTE[0, :, :2] = scores_BTE[1, :, 2:] = 0.5
    assert sequence_balance(scores_BTE, 2).tolist() == pytest.approx([2.0, 2.0])
    joined_BTE = scores_BTE.flatten(0, 1).unsqueeze(0)
    assert sequence_balance(joined_BTE, 2).item() == pytest.approx(1.0)


def test_real_choices_are_counted_when_given() -> None:
    scores_BTE = torch.tensor([[[0.8, 0.6, 0.4, 0.2]]], dtype=torch.float64)
    chosen_BTK = torch.tensor([[[3, 2]]])
    assert sequence_balance(scores_BTE, 2).item() == pytest.approx(2 * 0.4 + 2 * 0.3)
    assert sequence_balance(scores_BTE, 2, chosen_BTK).item() == pytest.approx(2 * 0.2 + 2 * 0.1)


def test_balance_gradient_flows_through_P_only() -> None:
    """Central differences with f held, written out: the derivative of sum_i f_i P_i."""
    logits_BTE = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    sequence_balance(logits_BTE.sigmoid(), 2).sum().backward()

    scores_BTE = logits_BTE.detach().sigmoid()
    hits_BTE = torch.zeros_like(scores_BTE).scatter(-1, scores_BTE.topk(2, -1).indices, 1.0)
    f_BE = hits_BTE.sum(1) * 6 / (2 * 5)

    def loss(x_BTE: Tensor) -> float:
        s_BTE = x_BTE.sigmoid()
        return ((s_BTE / s_BTE.sum(-1, keepdim=True)).mean(1) * f_BE).sum().item()

    step = 1e-6
    for index in itertools.product(range(2), range(5), range(6)):
        up, down = logits_BTE.detach().clone(), logits_BTE.detach().clone()
        up[index] += step
        down[index] -= step
        numeric = (loss(up) - loss(down)) / (2 * step)
        assert logits_BTE.grad[index].item() == pytest.approx(numeric, abs=1e-8)


def test_balance_in_float64_passes_gradcheck() -> None:
    logits_BTE = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: sequence_balance(x.sigmoid(), 2), (logits_BTE,))


def test_balance_of_underflown_scores_is_finite() -> None:
    """Where the gates stay finite, so must the loss."""
    scores_BTE = torch.zeros(1, 4, 8, requires_grad=True)
    loss_B = sequence_balance(scores_BTE, 2)
    loss_B.sum().backward()
    assert loss_B.tolist() == [0.0]
    assert scores_BTE.grad.isfinite().all()


def test_balance_counts_exactly_in_long_sequences() -> None:
    """4096 tokens that all choose the same experts: a BF16 count would stop at 256."""
    scores_BTE = torch.full((1, 4096, 8), 0.25)
    scores_BTE[..., :2] = 0.5
    share = 0.5 / (2 * 0.5 + 6 * 0.25)
    assert sequence_balance(scores_BTE, 2).item() == pytest.approx(2 * 4 * share, rel=1e-5)
