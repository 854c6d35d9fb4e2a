"""Our losses and advantages of the tensors of a file of vectors: are they trl's?

``check`` is run on the committed file by the ordinary suite, and by ``python -m tests.trl`` on what
the trl that is installed there gives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from ziphius.alignment.dpo import preference_loss
from ziphius.alignment.grpo import advantages, policy_loss
from ziphius.alignment.pairs import bradley_terry, wins

# What trl adds to a deviation before it divides by it. Ours leaves groups of equal rewards out.
TRL_EPSILON = 1e-4
# trl computes in float32, and its file has all digits of that.
CLOSE = 1e-6

Case = Mapping[str, Any]


def _numbers(case: Case, *names: str) -> list[Tensor]:
    return [torch.tensor(case[name], dtype=torch.float64) for name in names]


def _same(found: float, expected: float) -> None:
    assert found == pytest.approx(expected, rel=CLOSE, abs=CLOSE)


def _same_loss(loss: Tensor, weights: Tensor, case: Case) -> None:
    _same(loss.item(), case["loss"])
    loss.backward()
    assert weights.grad is not None
    (gradient,) = _numbers(case, "gradient")
    torch.testing.assert_close(weights.grad, gradient, rtol=1e-5, atol=CLOSE)


def advantages_are_the_same(case: Case) -> None:
    """Divided by the sample's deviation, but for trl's epsilon; or by nothing."""
    rewards_QG, expected_QG = _numbers(case, "rewards", "advantages")
    found_QG = advantages(rewards_QG, "sample" if case["scale"] == "group" else "none")
    if case["scale"] == "group":
        deviation_Q1 = rewards_QG.std(1, keepdim=True)
        found_QG = found_QG * deviation_Q1 / (deviation_Q1 + TRL_EPSILON)
    torch.testing.assert_close(found_QG, expected_QG, rtol=1e-5, atol=CLOSE)


def policy_losses_are_the_same(case: Case) -> None:
    """The three forms.

    trl's ratio of a whole answer is the geometric mean of its tokens' (GSPO), and its KL part stays
    one of tokens; V3's eq. 26 has the product. The loss of a ratio is the same function.
    """
    log_probs, old, reference, mask, advantage = _numbers(
        case, "log_probs", "old", "reference", "mask", "advantages"
    )
    log_probs.requires_grad_()
    terms = {name: case[name] for name in ("clip", "clip_high")}
    lengths_B1 = mask.sum(1, keepdim=True)
    tokens = policy_loss(
        log_probs, old, advantage[:, None], reference, **terms, kl_weight=case["kl_weight"]
    )
    if case["form"] == "batch":
        loss = (tokens.loss * mask).sum() / mask.sum()
    elif case["form"] == "token":
        loss = (tokens.loss * mask / lengths_B1).sum() / len(mask)
    else:
        now_B, old_B = ((x * mask / lengths_B1).sum(1) for x in (log_probs, old))
        whole_B = policy_loss(now_B, old_B, advantage, **terms).loss
        kl_B = (tokens.kl * mask / lengths_B1).sum(1)
        loss = (whole_B + case["kl_weight"] * kl_B).mean()
    _same_loss(loss, log_probs, case)


def preference_losses_are_the_same(case: Case) -> None:
    """DPO's loss, and the rewards that are told of it."""
    log_probs, reference, mask = _numbers(case, "log_probs", "reference", "mask")
    log_probs.requires_grad_()
    chosen, rejected = ((log_probs - reference) * mask).sum(1).chunk(2)
    terms = preference_loss(chosen, rejected, case["beta"])
    _same_loss(terms.loss.mean(), log_probs, case)
    _same(terms.chosen.mean().item(), case["chosen"])
    _same(terms.rejected.mean().item(), case["rejected"])
    _same((terms.chosen - terms.rejected).mean().item(), case["margin"])
    _same(wins(terms.chosen, terms.rejected).mean().item(), case["accuracy"])


def losses_of_pairs_are_the_same(case: Case) -> None:
    """Bradley and Terry's of scores."""
    chosen, rejected = _numbers(case, "chosen", "rejected")
    scores = torch.cat((chosen, rejected)).requires_grad_()
    chosen, rejected = scores.chunk(2)
    _same_loss(bradley_terry(chosen, rejected).mean(), scores, case)
    _same((chosen - rejected).mean().item(), case["margin"])
    _same(wins(chosen, rejected).mean().item(), case["accuracy"])


def checks() -> dict[str, Callable[[Case], None]]:
    """Return what is checked of every kind of case."""
    return {
        "advantages": advantages_are_the_same,
        "policy": policy_losses_are_the_same,
        "preference": preference_losses_are_the_same,
        "pairs": losses_of_pairs_are_the_same,
    }


def check(vectors: Mapping[str, Any]) -> int:
    """Check every case of a file; return how many there are. Raises AssertionError."""
    number = 0
    for kind, compare in checks().items():
        assert vectors[kind], f"no case of {kind}"
        for case in vectors[kind]:
            compare(case)
            number += 1
    return number
