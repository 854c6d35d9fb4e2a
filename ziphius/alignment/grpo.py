"""Group relative policy optimisation: advantages, losses, and the objective of a step (facts 8.3).

Losses are to be minimised: ``-min(rho A, clip(rho) A) + beta k3``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ziphius.alignment.documents import DocumentSums
from ziphius.alignment.reference import REFERENCE, NearReference, Reference
from ziphius.config.grpo import GrpoConfig
from ziphius.data.rows import EXPERTS, Batch, row_targets
from ziphius.kernels.loss import IGNORED
from ziphius.model.ffn import MixtureOfExperts
from ziphius.model.positions import Judged
from ziphius.model.transformer import Features, Transformer
from ziphius.training.objective import Losses, LossParts

Deviation = Literal["population", "sample", "none"]
# What every learned token knows besides ``REFERENCE``, by name in ``Batch.fields``: its
# log-probability when it was sampled, the advantage of its answer, and its share of the mean.
OLD, ADVANTAGE, SHARE = "old", "advantage", "share"


def advantages(rewards_QG: Tensor, deviation: Deviation = "population") -> Tensor:
    """Return how much better than its group every answer is: ``(r - mean) / std``, ``[Q, G]``.

    Groups of equal rewards give zeros.
    """
    centred_QG = rewards_QG - rewards_QG.mean(1, keepdim=True)
    if deviation == "none":
        return centred_QG
    std_Q1 = rewards_QG.std(1, correction=int(deviation == "sample"), keepdim=True)
    equal_Q1 = (rewards_QG == rewards_QG[:, :1]).all(1, keepdim=True)
    return torch.where(equal_Q1, 0.0, centred_QG / std_Q1.masked_fill(equal_Q1, 1.0))


class PolicyLoss(NamedTuple):
    """Terms of each ratio: what is minimised, its KL part unweighted, and whether it is clipped."""

    loss: Tensor
    kl: Tensor
    clipped: Tensor


def policy_loss(
    log_probs: Tensor,
    old: Tensor,
    advantage: Tensor,
    reference: Tensor | None = None,
    *,
    clip: float,
    clip_high: float | None = None,
    kl_weight: float = 0.0,
) -> PolicyLoss:
    """Compute the loss of every ratio, of tokens or of whole answers; all of one shape.

    The KL estimator is k3, ``exp(d) - d - 1`` with ``d = log ref - log pi``: never negative, and
    right in the mean. Without a reference it is zero.
    """
    ratio = (log_probs - old).exp()
    bounded = ratio.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))
    gain = torch.minimum(ratio * advantage, bounded * advantage)
    clipped = bounded * advantage < ratio * advantage
    if reference is None:
        return PolicyLoss(-gain, torch.zeros_like(gain), clipped)
    distance = reference - log_probs
    kl = distance.exp() - distance - 1
    return PolicyLoss(kl_weight * kl - gain, kl, clipped)


@dataclass(frozen=True)
class Grpo(NearReference):
    """The objective of one step: an ``Aim`` makes it of the step's global batch.

    ``tokens`` counts the learned tokens of the batch. Means are over these. ``mismatch`` is
    ``|log pi - log old|`` before anything was learned from the rollout's first batch: what trainer
    and engine differ by; ``experts_differ`` is the share of a layer's tokens for which the trainer
    would have chosen other experts than the engine.
    """

    config: GrpoConfig
    tokens: int
    routed: int
    size = 9
    extra = ("kl", "clipped", "mismatch", "experts_differ", "entropy")

    def __call__(self, model: Transformer, features: Features, rows: Batch) -> LossParts:
        """Compute what a part of the network gives of some rows."""
        zero = torch.zeros((), dtype=model.precision.high, device=rows.tokens_BS.device)
        differ = zero + math.nan  # where the trainer chooses by itself, nobody knows
        if self.routed:
            differ = _experts_differ(model, features, rows) / self.routed
        if not model.part.ends:
            nothing = Losses(zero, zero, zero, zero)
            return LossParts(zero, nothing, torch.stack((zero, zero, zero, differ, zero)))
        targets_BT = row_targets(rows, 0, document_mask=True)
        judged = model.positions.log_probs(model, features.hidden_BTD, targets_BT, 0)
        needed = {OLD, REFERENCE, ADVANTAGE, SHARE} & rows.fields.keys()
        high = model.precision.high
        fields = {name: judged.pick(rows.fields[name][:, 1:]).to(high) for name in needed}
        learned_Bj = judged.pick(targets_BT) != IGNORED
        loss_Bj, terms = self._losses(model, judged, fields, rows, learned_Bj)
        total = loss_Bj.sum()
        log_probs_Bj = judged.log_probs_Bj.detach()

        def mean(values_Bj: Tensor) -> Tensor:
            counted_Bj = judged.only_counted(values_Bj.to(high) * learned_Bj)
            return counted_Bj.sum() / max(1, self.tokens)

        gap_Bj = (log_probs_Bj - fields[OLD]).abs()
        others = [mean(terms.kl.detach()), mean(terms.clipped), mean(gap_Bj)]
        others += [differ.to(zero.dtype), mean(-log_probs_Bj)]
        main = judged.only_counted(loss_Bj.detach()).sum()
        return LossParts(total, Losses(main, zero, zero, main), torch.stack(others))

    def _losses(
        self,
        model: Transformer,
        judged: Judged,
        fields: Mapping[str, Tensor],
        rows: Batch,
        learned_Bj: Tensor,
    ) -> tuple[Tensor, PolicyLoss]:
        """Return every token's part of the loss, ``[B, j]``, and the terms it is made of."""
        config, reference = self.config, fields.get(REFERENCE)
        log_probs_Bj, old_Bj = judged.log_probs_Bj, fields[OLD]
        if config.form == "sequence":
            sums = DocumentSums.of_judged(model, judged, rows)
            log_probs_Bj, old_Bj = (sums.of_tokens(x, learned_Bj) for x in (log_probs_Bj, old_Bj))
            reference = None if reference is None else sums.of_tokens(reference, learned_Bj)
        terms = policy_loss(
            log_probs_Bj,
            old_Bj,
            fields[ADVANTAGE],
            reference,
            clip=config.clip,
            clip_high=config.clip_high,
            kl_weight=config.kl_weight,
        )
        return (terms.loss * fields[SHARE]).masked_fill(~learned_Bj, 0), terms


@torch.no_grad()
def _experts_differ(model: Transformer, features: Features, rows: Batch) -> Tensor:
    """Count the learned tokens' positions whose experts the trainer would not have chosen."""
    differ = torch.zeros((), dtype=torch.float64, device=rows.tokens_BS.device)
    if EXPERTS not in rows.fields:
        return differ
    targets_BT = row_targets(rows, 0, document_mask=True)
    learned_N = model.positions.own(targets_BT, 0).flatten() != IGNORED
    for layer, depth, block in model.blocks():
        if depth or not isinstance(block.mlp, MixtureOfExperts):
            continue
        routing = features.routings[layer]
        own_NK = block.mlp.gate.choice(routing.scores_NE).sort(-1).values
        other_N = (own_NK != routing.chosen_NK.sort(-1).values).any(-1)
        differ += (other_N & learned_N).sum()
    return differ


def aim(config: GrpoConfig, batch: Batch, reference: Reference | None = None) -> Grpo:
    """Return what a step minimises of a rollout's part."""
    tokens = int((row_targets(batch, 0, document_mask=True) != IGNORED).sum())
    experts = batch.fields.get(EXPERTS)
    layers = 0 if experts is None else experts.shape[2]
    return Grpo(config, tokens, tokens * layers, reference=reference)
