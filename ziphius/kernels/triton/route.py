"""The router after its product, in one kernel a direction."""

# Arguments of kernels have the compiler's types.
# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ziphius.kernels.route import NORM_EPS, Rule

TOKENS = 8  # of a program
WARPS = 8


def route_triton(
    logits_NE: Tensor,
    bias_E: Tensor,
    *,
    top_k: int,
    n_group: int,
    topk_group: int,
    normalise: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what ``route_reference`` does in FP32; of equal scores the lowest number wins.

    A logit that is no number is chosen first, as ``torch.topk`` does, so that it shows.
    """
    rule = Rule(top_k, n_group, topk_group, normalise, scale)
    chosen, weights, scores = _Route.apply(logits_NE, bias_E, rule)
    return chosen, weights, scores


@triton.jit
def route_kernel(
    logits_ptr, bias_ptr, chosen_ptr, weights_ptr, scores_ptr, N, scale, eps,
    E: tl.constexpr, K: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr,
    NORMALISE: tl.constexpr, TOKENS: tl.constexpr, GP: tl.constexpr, EP: tl.constexpr,
    KP: tl.constexpr,
):  # fmt: skip
    """Route a block of tokens; experts stand as ``[tokens, groups, experts of a group]``."""
    EACH: tl.constexpr = E // GROUPS
    tokens = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    group = tl.arange(0, GP)[None, :, None]
    member = tl.arange(0, EP)[None, None, :]
    expert = group * EACH + member
    real = (group < GROUPS) & (member < EACH)
    inside = (tokens < N)[:, None, None] & real
    place = tokens[:, None, None] * E + expert
    logits = tl.load(logits_ptr + place, inside, other=0.0).to(tl.float32)
    scores = tl.div_rn(tl.full([TOKENS, GP, EP], 1.0, tl.float32), 1.0 + tl.exp(-logits))
    tl.store(scores_ptr + place, scores.to(scores_ptr.dtype.element_ty), inside)
    biased = scores + tl.load(bias_ptr + expert, real, other=0.0).to(tl.float32)
    biased = tl.where(biased == biased, biased, float("inf"))
    biased = tl.where(real, biased, float("-inf"))
    if GROUPS > 1:
        biased = _best_groups(biased, group, member, KEPT, GP)
    flat = tl.reshape(biased, [TOKENS, GP * EP])
    flat_scores = tl.reshape(scores, [TOKENS, GP * EP])
    flat_place = tl.arange(0, GP * EP)[None, :]
    choice = tl.arange(0, KP)[None, :]
    chosen = tl.zeros([TOKENS, KP], tl.int32)
    weights = tl.zeros([TOKENS, KP], tl.float32)
    for k in tl.static_range(K):
        best = tl.argmax(flat, 1)[:, None]
        weight = tl.sum(tl.where(flat_place == best, flat_scores, 0.0), 1)[:, None]
        chosen = tl.where(choice == k, best // EP * EACH + best % EP, chosen)
        weights = tl.where(choice == k, weight, weights)
        flat = tl.where(flat_place == best, float("-inf"), flat)
    if NORMALISE:
        weights = tl.div_rn(weights, tl.sum(weights, 1)[:, None] + eps + tl.zeros_like(weights))
    place = tokens[:, None] * K + choice
    inside = (tokens < N)[:, None] & (choice < K)
    tl.store(chosen_ptr + place, chosen.to(tl.int64), inside)
    tl.store(weights_ptr + place, (weights * scale).to(weights_ptr.dtype.element_ty), inside)


@triton.jit
def _best_groups(biased, group, member, KEPT: tl.constexpr, GP: tl.constexpr):
    """Leave the experts of the ``KEPT`` groups whose two best are the greatest in sum."""
    best = tl.argmax(biased, 2)
    second = tl.where(member == tl.expand_dims(best, 2), float("-inf"), biased)
    sums = tl.max(biased, 2) + tl.max(second, 2)
    number = tl.arange(0, GP)[None, :]
    kept = number < 0
    for _ in tl.static_range(KEPT):
        chosen = number == tl.argmax(sums, 1)[:, None]
        kept = kept | chosen
        sums = tl.where(chosen, float("-inf"), sums)
    return tl.where(tl.expand_dims(kept, 2), biased, float("-inf"))


@triton.jit
def route_backward_kernel(
    scores_ptr, chosen_ptr, dweights_ptr, dscores_ptr, dlogits_ptr, N, scale, eps,
    E: tl.constexpr, K: tl.constexpr, NORMALISE: tl.constexpr, WEIGHTS: tl.constexpr,
    SCORES: tl.constexpr, TOKENS: tl.constexpr, EP: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """Bring gradients of weights and of scores to the logits of a block of tokens."""
    tokens = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, EP)[None, :]
    place = tokens[:, None] * E + expert
    inside = (tokens < N)[:, None] & (expert < E)
    score = tl.load(scores_ptr + place, inside, other=0.0).to(tl.float32)
    gradient = tl.zeros([TOKENS, EP], tl.float32)
    if SCORES:
        gradient += tl.load(dscores_ptr + place, inside, other=0.0).to(tl.float32)
    if WEIGHTS:
        choice = tl.arange(0, KP)[None, :]
        own = (tokens < N)[:, None] & (choice < K)
        chosen = tl.load(chosen_ptr + tokens[:, None] * K + choice, own, other=0).to(tl.int32)
        dweight = tl.load(dweights_ptr + tokens[:, None] * K + choice, own, other=0.0)
        dweight = dweight.to(tl.float32) * scale
        if NORMALISE:
            taken = tl.load(scores_ptr + tokens[:, None] * E + chosen, own, other=0.0)
            taken = taken.to(tl.float32)
            total = tl.sum(taken, 1)[:, None] + eps
            along = tl.sum(dweight * taken, 1)[:, None] / total
            dweight = (dweight - along) / total
        for k in tl.static_range(K):
            which = tl.sum(tl.where(choice == k, chosen, 0), 1)[:, None]
            what = tl.sum(tl.where(choice == k, dweight, 0.0), 1)[:, None]
            gradient += tl.where(expert == which, what, 0.0)
    dlogits = gradient * score * (1.0 - score)
    tl.store(dlogits_ptr + place, dlogits.to(dlogits_ptr.dtype.element_ty), inside)


class _Route(torch.autograd.Function):
    """Keeps scores and choice."""

    @staticmethod
    def forward(
        ctx: Any, logits_NE: Tensor, bias_E: Tensor, rule: Rule
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits_NE = logits_NE.contiguous()
        (N, E), K = logits_NE.shape, rule.top_k
        scores_NE = torch.empty_like(logits_NE)
        chosen_NK = logits_NE.new_empty(N, K, dtype=torch.int64)
        weights_NK = logits_NE.new_empty(N, K)
        if N:
            route_kernel[(triton.cdiv(N, TOKENS),)](
                *(logits_NE, bias_E.contiguous(), chosen_NK, weights_NK, scores_NE),
                *(N, float(rule.scale), NORM_EPS),
                E=E,
                K=K,
                GROUPS=rule.n_group,
                KEPT=rule.topk_group,
                NORMALISE=rule.normalise,
                TOKENS=TOKENS,
                GP=_power(rule.n_group),
                EP=_power(E // rule.n_group),
                KP=_power(K),
                num_warps=WARPS,
            )
        ctx.save_for_backward(scores_NE, chosen_NK)
        ctx.rule = rule
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(chosen_NK)
        return chosen_NK, weights_NK, scores_NE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        dweights_NK, dscores_NE = (None if g is None else g.contiguous() for g in grads[1:])
        if dweights_NK is None and dscores_NE is None:
            return None, None, None
        scores_NE, chosen_NK = ctx.saved_tensors
        (N, E), K = scores_NE.shape, chosen_NK.shape[1]
        dlogits_NE = torch.empty_like(scores_NE)
        if N:
            route_backward_kernel[(triton.cdiv(N, TOKENS),)](
                *(scores_NE, chosen_NK, dweights_NK, dscores_NE, dlogits_NE),
                *(N, float(ctx.rule.scale), NORM_EPS),
                E=E,
                K=K,
                NORMALISE=ctx.rule.normalise,
                TOKENS=TOKENS,
                WEIGHTS=dweights_NK is not None,
                SCORES=dscores_NE is not None,
                EP=_power(E),
                KP=_power(K),
                num_warps=WARPS,
            )
        return dlogits_NE, None, None


def _power(number: int) -> int:
    return triton.next_power_of_2(number)
