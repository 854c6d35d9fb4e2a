"""GRPO's advantages and losses: hand-worked numbers, laws, and gradients by finite differences."""

from __future__ import annotations

import math
from statistics import fmean, pstdev, stdev

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support import F64, random_model
from ziphius.alignment.grpo import (
    ADVANTAGE,
    OLD,
    SHARE,
    Grpo,
    advantages,
    policy_loss,
)
from ziphius.alignment.reference import REFERENCE
from ziphius.config.grpo import GrpoConfig
from ziphius.data.rows import EXPERTS, LEARNED, Batch

REWARDS = st.lists(st.integers(-3, 3).map(float), min_size=2, max_size=8)


def one(value: float) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float64)


# --- advantages -----------------------------------------------------------------------------------


def test_advantages_by_hand() -> None:
    """Rewards 1, 0, 0, 1: mean 1/2, population deviation 1/2, sample deviation 1/sqrt(3)."""
    rewards_QG = torch.tensor([[1.0, 0.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0]], dtype=torch.float64)
    expected = torch.tensor([[1.0, -1, -1, 1], [0, 0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(advantages(rewards_QG), expected)
    torch.testing.assert_close(advantages(rewards_QG, "sample"), expected * math.sqrt(3) / 2)
    torch.testing.assert_close(advantages(rewards_QG, "none"), expected / 2)


@given(REWARDS, st.sampled_from(["population", "sample"]))
def test_advantages_are_standard_scores(rewards: list[float], deviation: str) -> None:
    found = advantages(torch.tensor([rewards], dtype=torch.float64), deviation)[0].tolist()
    spread = pstdev(rewards) if deviation == "population" else stdev(rewards)
    if len(set(rewards)) == 1:
        assert found == [0.0] * len(rewards)
    else:
        expected = [(r - fmean(rewards)) / spread for r in rewards]
        assert found == pytest.approx(expected, abs=1e-12)


def test_rewards_that_differ_by_rounding_alone_are_no_reason_to_learn() -> None:
    assert not advantages(torch.full((1, 3), 0.1, dtype=torch.float32)).any()


# --- the loss of a ratio --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (1.0, 2.0, -2.0, False),
        (1.1, 1.0, -1.1, False),
        (1.5, 1.0, -1.2, True),  # a good answer's gain ends at 1 + clip
        (0.5, 1.0, -0.5, False),  # there is no bound below for a good answer
        (0.5, -1.0, 0.8, True),  # a bad one's at 1 - clip
        (1.5, -1.0, 1.5, False),  # and no bound above for a bad one
    ],
)
def test_loss_by_hand(ratio: float, advantage: float, loss: float, clipped: bool) -> None:
    terms = policy_loss(one(math.log(ratio)), one(0.0), one(advantage), clip=0.2)
    assert terms.loss.item() == pytest.approx(loss, abs=1e-12)
    assert terms.clipped.item() == clipped


def test_the_upper_bound_may_be_wider() -> None:
    terms = policy_loss(one(math.log(1.5)), one(0.0), one(1.0), clip=0.2, clip_high=0.28)
    assert terms.loss.item() == pytest.approx(-1.28)


def test_kl_by_hand() -> None:
    """log ref - log pi = log 2: 2 - log 2 - 1."""
    terms = policy_loss(
        one(-2.0), one(-2.0), one(0.0), one(-2.0 + math.log(2)), clip=0.2, kl_weight=0.5
    )
    assert terms.kl.item() == pytest.approx(1 - math.log(2))
    assert terms.loss.item() == pytest.approx(0.5 * (1 - math.log(2)))


@given(st.floats(-5, 5), st.floats(-5, 5))
def test_kl_is_never_negative(log_prob: float, reference: float) -> None:
    terms = policy_loss(one(log_prob), one(log_prob), one(1.0), one(reference), clip=0.2)
    assert terms.kl.item() >= 0


def test_kl_is_right_in_the_mean() -> None:
    """Over draws from the policy the estimator's mean is the divergence itself."""
    generator = torch.Generator().manual_seed(0)
    policy_V = torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(0)
    reference_V = torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(0)
    exact = (policy_V.exp() * (policy_V - reference_V)).sum().item()
    drawn_N = torch.multinomial(policy_V.exp(), 200_000, replacement=True, generator=generator)
    terms = policy_loss(
        policy_V[drawn_N], policy_V[drawn_N], one(0.0), reference_V[drawn_N], clip=0.2
    )
    error = terms.kl.std().item() / math.sqrt(len(drawn_N))
    assert abs(terms.kl.mean().item() - exact) < 4 * error
    # The plain estimator, log pi - log ref, has the same mean and varies more.
    assert (policy_V - reference_V)[drawn_N].std() > terms.kl.std()


def test_gradients_by_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    old, reference, advantage = torch.randn(3, 20, generator=generator, dtype=torch.float64)
    log_probs = (old + 0.5 * torch.randn(20, generator=generator, dtype=torch.float64)).detach()
    assert torch.autograd.gradcheck(
        lambda x: policy_loss(x, old, advantage, reference, clip=0.2, kl_weight=0.1).loss,
        log_probs.requires_grad_(),
    )


# --- the objective of a step ----------------------------------------------------------------------


def rows(model, *, epsilon: float = 0.0) -> tuple[Batch, torch.Tensor]:
    """Two rows of answers: of tokens 2-4 and 7-8 the first, of 3-6 the second, with padding.

    Returns also their log-probabilities by the model ``[B, T]``; the old ones differ by
    ``epsilon`` times a fixed noise.
    """
    generator = torch.Generator().manual_seed(1)
    tokens_BS = torch.randint(3, model.config.vocab_size, (2, 10), generator=generator)
    documents_BS = torch.tensor([[0] * 5 + [1] * 4 + [-1], [0] * 7 + [-1] * 3], dtype=torch.int32)
    learned_BS = torch.zeros(2, 10, dtype=torch.bool)
    learned_BS[0, [2, 3, 4, 7, 8]] = learned_BS[1, 3:7] = True
    with torch.no_grad():
        hidden_BTD = model.features(tokens_BS, documents_BS).hidden_BTD
        log_BTV = model.lm_head(hidden_BTD).log_softmax(-1)
        own_BT = log_BTV.gather(2, tokens_BS[:, 1:, None]).squeeze(2)
    old_BS = torch.zeros(2, 10, dtype=torch.float64)
    noise_BT = torch.randn(own_BT.shape, generator=generator, dtype=torch.float64)
    old_BS[:, 1:] = own_BT + epsilon * noise_BT
    fields = {
        LEARNED: learned_BS,
        OLD: old_BS,
        ADVANTAGE: torch.where(documents_BS == 0, 1.5, -0.5).double(),
        SHARE: learned_BS.double() * 0.1,
        REFERENCE: old_BS - 0.3,
    }
    return Batch(tokens_BS, documents_BS, fields), own_BT


def objective(form: str = "token", **more) -> Grpo:
    return Grpo(GrpoConfig(form=form, kl_weight=0.2, **more), tokens=9, routed=18)


@pytest.fixture(scope="module")
def model():
    return random_model(precision=F64)


def parts_of(model, batch: Batch, aim: Grpo):
    return aim(model, model.features(batch.tokens_BS, batch.documents_BS), batch)


def test_a_step_of_tokens_is_the_sum_over_them(model) -> None:
    batch, own_BT = rows(model, epsilon=0.4)
    expected = 0.0
    for b, t in batch.fields[LEARNED][:, 1:].nonzero().tolist():
        terms = policy_loss(
            own_BT[b, t],
            *(batch.fields[name][b, t + 1] for name in (OLD, ADVANTAGE, REFERENCE)),
            clip=0.2,
            kl_weight=0.2,
        )
        expected += 0.1 * terms.loss.item()
    parts = parts_of(model, batch, objective())
    assert parts.total.item() == pytest.approx(expected, rel=1e-12)
    assert parts.numbers()[0].item() == pytest.approx(expected, rel=1e-12)


def test_a_step_of_whole_answers_has_one_ratio_each(model) -> None:
    batch, own_BT = rows(model, epsilon=0.1)
    learned_BT, documents_BT = batch.fields[LEARNED][:, 1:], batch.documents_BS[:, 1:]
    expected = 0.0
    for b, document in ((0, 0), (0, 1), (1, 0)):
        chosen = learned_BT[b] & (documents_BT[b] == document)
        sums = [x[b][chosen].sum() for x in (own_BT, batch.fields[OLD][:, 1:])]
        reference = batch.fields[REFERENCE][:, 1:][b][chosen].sum()
        advantage = batch.fields[ADVANTAGE][:, 1:][b][chosen][0]
        terms = policy_loss(*sums, advantage, reference, clip=0.2, kl_weight=0.2)
        expected += 0.1 * int(chosen.sum()) * terms.loss.item()
    assert parts_of(model, batch, objective("sequence")).total.item() == pytest.approx(expected)


@pytest.mark.parametrize("form", ["token", "sequence"])
def test_gradients_of_a_step_by_finite_differences(model, form: str) -> None:
    batch, _ = rows(model, epsilon=0.05)
    weight = model.lm_head.weight
    weight.grad = None
    parts_of(model, batch, objective(form)).total.backward()
    assert weight.grad is not None
    place, step = (7, 3), 1e-6
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight[place] += sign * step
            values.append(parts_of(model, batch, objective(form)).total.item())
            weight[place] -= sign * step
    assert weight.grad[place].item() == pytest.approx((values[0] - values[1]) / 2 / step, rel=1e-5)


def test_what_metrics_tell(model) -> None:
    batch, own_BT = rows(model)
    parts = parts_of(model, batch, objective())
    told = dict(
        zip(
            ("kl", "clipped", "mismatch", "experts_differ", "entropy"),
            parts.numbers()[4:].tolist(),
            strict=True,
        )
    )
    learned_BT = batch.fields[LEARNED][:, 1:]
    assert told["mismatch"] == pytest.approx(0, abs=1e-12)
    assert told["clipped"] == 0
    assert told["kl"] == pytest.approx(math.exp(-0.3) + 0.3 - 1)
    assert told["entropy"] == pytest.approx(-own_BT[learned_BT].mean().item())


def test_experts_that_the_trainer_would_not_choose_are_counted(model) -> None:
    batch, _ = rows(model)
    features = model.features(batch.tokens_BS, batch.documents_BS)
    own_BTLK = torch.stack([features.routings[n].chosen_NK.view(2, 9, -1) for n in (1, 2)], dim=2)
    told_BSLK = torch.cat((own_BTLK, own_BTLK[:, -1:]), dim=1).to(torch.int16)
    # Token 3 of row 1 predicts a learned token, token 0 does not.
    for place in (3, 0):
        told_BSLK[1, place, 0] = (told_BSLK[1, place, 0] + 1) % model.config.n_routed_experts
    replayed = Batch(batch.tokens_BS, batch.documents_BS, {**batch.fields, EXPERTS: told_BSLK})
    features = model.features(batch.tokens_BS, batch.documents_BS, experts_BSLK=told_BSLK)
    differ = objective()(model, features, replayed).numbers()[7].item()
    # One (token, layer) of 18, and perhaps layer 2 of the same token, whose input has changed.
    assert differ in (pytest.approx(1 / 18), pytest.approx(2 / 18))
