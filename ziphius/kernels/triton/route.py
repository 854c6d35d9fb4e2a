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
from ziphius.kernels.triton.bits import approximate, interpreted

LEAST = tl.constexpr(-(2**31))  # below every number's ``_ordered``
# Tokens of a program of one warp, forward; tokens of a program and its warps, backward. A benchmark
# may try the others.
LAUNCHES = ((2, 8, 4), (1, 4, 2), (4, 16, 4), (8, 8, 8))


def route_triton(
    logits_NE: Tensor,
    bias_E: Tensor,
    *,
    top_k: int,
    n_group: int,
    topk_group: int,
    normalise: bool,
    scale: float,
    launch: tuple[int, int, int] = LAUNCHES[0],
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what ``route_reference`` does in FP32; of equal scores the lowest number wins.

    A logit that is no number is chosen first, as ``torch.topk`` does, so that it shows.
    """
    rule = Rule(top_k, n_group, topk_group, normalise, scale)
    chosen, weights, scores = _Route.apply(logits_NE, bias_E, rule, launch)
    return chosen, weights, scores


@triton.jit
def route_kernel(
    logits_ptr, bias_ptr, chosen_ptr, weights_ptr, scores_ptr, N, scale, eps,
    E: tl.constexpr, K: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr,
    NORMALISE: tl.constexpr, TOKENS: tl.constexpr, GP: tl.constexpr, EP: tl.constexpr,
    KP: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Route a block of tokens; experts stand as ``[tokens, groups, experts of a group]``.

    Meant for one warp: then a token's numbers are spread over its threads alone, and a maximum of
    integers is one instruction of the warp.
    """
    EACH: tl.constexpr = E // GROUPS
    tokens = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    group = tl.arange(0, GP)[None, :, None]
    member = tl.arange(0, EP)[None, None, :]
    expert = group * EACH + member
    real = (group < GROUPS) & (member < EACH)
    inside = (tokens < N)[:, None, None] & real
    place = tokens[:, None, None] * E + expert
    logits = tl.load(logits_ptr + place, inside, other=0.0).to(tl.float32)
    scores = _sigmoid(logits, INTERPRETED)
    tl.store(scores_ptr + place, scores.to(scores_ptr.dtype.element_ty), inside)
    biased = scores + tl.load(bias_ptr + expert, real, other=0.0).to(tl.float32)
    biased = tl.where(biased == biased, biased, float("inf"))
    key = tl.where(real, _ordered(biased), LEAST)
    if GROUPS > 1:
        key = _best_groups(key, member, KEPT, GP)
    chosen = _largest(key, expert, TOKENS, K, KP)
    choice = tl.arange(0, KP)[None, :]
    inside = (tokens < N)[:, None] & (choice < K)
    # Read again, from a cache: to pick them out of the scores takes longer.
    taken = tl.load(logits_ptr + tokens[:, None] * E + chosen, inside, other=float("-inf"))
    weights = _sigmoid(taken.to(tl.float32), INTERPRETED)
    if NORMALISE:
        weights = tl.div_rn(weights, tl.sum(weights, 1)[:, None] + eps + tl.zeros_like(weights))
    place = tokens[:, None] * K + choice
    tl.store(chosen_ptr + place, chosen.to(tl.int64), inside)
    tl.store(weights_ptr + place, (weights * scale).to(weights_ptr.dtype.element_ty), inside)


@triton.jit
def _sigmoid(x, INTERPRETED: tl.constexpr):
    """Compute ``1 / (1 + e^-x)``, on a GPU with its own reciprocal."""
    power = 1.0 + tl.exp(-x)
    return 1.0 / power if INTERPRETED else approximate("rcp.approx.ftz.f32 $0, $1;", power)


@triton.jit
def _ordered(x):
    """Return integers in the order of FP32 numbers, NaN aside; all are above ``LEAST``."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _best_groups(key, member, KEPT: tl.constexpr, GP: tl.constexpr):
    """Leave the experts of the ``KEPT`` groups whose two best are the greatest in sum."""
    best = tl.max(key, 2)
    first = tl.min(tl.where(key == best[:, :, None], member, member.shape[2]), 2)
    second = tl.max(tl.where(member == first[:, :, None], LEAST, key), 2)
    total = _number(best) + _number(second)
    mine, other = total[:, :, None], total[:, None, :]
    number = tl.arange(0, GP)
    earlier = number[None, None, :] < number[None, :, None]
    before = (other > mine) | ((other == mine) & earlier)
    kept = tl.sum(before.to(tl.int32), 2) < KEPT
    return tl.where(kept[:, :, None], key, LEAST)


@triton.jit
def _number(key):
    """Return the FP32 number of an ``_ordered`` integer, minus infinity for ``LEAST``."""
    key = tl.maximum(key, -2139095041)
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _largest(key, expert, TOKENS: tl.constexpr, K: tl.constexpr, KP: tl.constexpr):
    """Return the ``K`` experts of the largest keys of each token, of equals the first.

    An axis after the other: Triton 3.6 mixes up tokens where it reduces a reshaped axis whose
    numbers lie in threads that are not neighbours (seen on a GPU).
    """
    choice = tl.arange(0, KP)[None, :]
    chosen = tl.zeros([TOKENS, KP], tl.int32)
    for k in tl.static_range(K):
        best = tl.max(tl.max(key, 1), 1)[:, None, None]
        first = tl.min(tl.min(tl.where(key == best, expert, 2**30), 1), 1)
        chosen = tl.where(choice == k, first[:, None], chosen)
        key = tl.where(expert == first[:, None, None], LEAST, key)
    return chosen


@triton.jit
def route_backward_kernel(
    scores_ptr, chosen_ptr, dweights_ptr, dscores_ptr, dlogits_ptr, N, scale, eps,
    E: tl.constexpr, K: tl.constexpr, NORMALISE: tl.constexpr, WEIGHTS: tl.constexpr,
    SCORES: tl.constexpr, TOKENS: tl.constexpr, EP: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """Bring gradients of weights and of scores to the logits of a block of tokens.

    Those of the chosen experts are written again, with the weights' part.
    """
    tokens = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    row = tokens[:, None] * E
    expert = tl.arange(0, EP)[None, :]
    inside = (tokens < N)[:, None] & (expert < E)
    dlogits = tl.zeros([TOKENS, EP], tl.float32)
    if SCORES:
        score = tl.load(scores_ptr + row + expert, inside, other=0.0).to(tl.float32)
        dscore = tl.load(dscores_ptr + row + expert, inside, other=0.0).to(tl.float32)
        dlogits = dscore * score * (1.0 - score)
    tl.store(dlogits_ptr + row + expert, dlogits.to(dlogits_ptr.dtype.element_ty), inside)
    if WEIGHTS:
        choice = tl.arange(0, KP)[None, :]
        own = (tokens < N)[:, None] & (choice < K)
        place = tokens[:, None] * K + choice
        chosen = row + tl.load(chosen_ptr + place, own, other=0)
        gradient = tl.load(dweights_ptr + place, own, other=0.0).to(tl.float32) * scale
        taken = tl.load(scores_ptr + chosen, own, other=0.0).to(tl.float32)
        if NORMALISE:
            total = tl.sum(taken, 1)[:, None] + eps
            along = tl.sum(gradient * taken, 1)[:, None] / total
            gradient = (gradient - along) / total
        if SCORES:
            gradient += tl.load(dscores_ptr + chosen, own, other=0.0).to(tl.float32)
        gradient *= taken * (1.0 - taken)
        tl.debug_barrier()
        tl.store(dlogits_ptr + chosen, gradient.to(dlogits_ptr.dtype.element_ty), own)


class _Route(torch.autograd.Function):
    """Keeps scores and choice."""

    @staticmethod
    def forward(
        ctx: Any, logits_NE: Tensor, bias_E: Tensor, rule: Rule, launch: tuple[int, int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits_NE = logits_NE.contiguous()
        (N, E), K = logits_NE.shape, rule.top_k
        scores_NE = torch.empty_like(logits_NE)
        chosen_NK = logits_NE.new_empty(N, K, dtype=torch.int64)
        weights_NK = logits_NE.new_empty(N, K)
        if N:
            route_kernel[(triton.cdiv(N, launch[0]),)](
                *(logits_NE, bias_E.contiguous(), chosen_NK, weights_NK, scores_NE),
                *(N, float(rule.scale), NORM_EPS),
                E=E,
                K=K,
                GROUPS=rule.n_group,
                KEPT=rule.topk_group,
                NORMALISE=rule.normalise,
                TOKENS=launch[0],
                GP=_power(rule.n_group),
                EP=_power(E // rule.n_group),
                KP=_power(K),
                INTERPRETED=interpreted(),
                num_warps=1,
            )
        ctx.save_for_backward(scores_NE, chosen_NK)
        ctx.rule, ctx.launch = rule, launch
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(chosen_NK)
        return chosen_NK, weights_NK, scores_NE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        dweights_NK, dscores_NE = (None if g is None else g.contiguous() for g in grads[1:])
        if dweights_NK is None and dscores_NE is None:
            return None, None, None, None
        scores_NE, chosen_NK = ctx.saved_tensors
        (N, E), K = scores_NE.shape, chosen_NK.shape[1]
        dlogits_NE = torch.empty_like(scores_NE)
        if N:
            _, tokens, warps = ctx.launch
            route_backward_kernel[(triton.cdiv(N, tokens),)](
                *(scores_NE, chosen_NK, dweights_NK, dscores_NE, dlogits_NE),
                *(N, float(ctx.rule.scale), NORM_EPS),
                E=E,
                K=K,
                NORMALISE=ctx.rule.normalise,
                TOKENS=tokens,
                WEIGHTS=dweights_NK is not None,
                SCORES=dscores_NE is not None,
                EP=_power(E),
                KP=_power(K),
                num_warps=warps,
            )
        return dlogits_NE, None, None, None


def _power(number: int) -> int:
    return triton.next_power_of_2(number)
