"""What brings rows to their experts and back, chooses experts, and the loss over a vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from support.gpu.entry import COPY, OURS, PLAIN, Entry, Place, Version
from support.gpu.rows import EAGER, in_tiles, parts
from ziphius.kernels import loss, permute
from ziphius.kernels.quantize import Fp8, quantize_tiles
from ziphius.model import router
from ziphius.model.dispatch import sort_by_slot

TOP_K, SCALE = 8, 2.5
GROUPS, TOP_GROUPS = 8, 4


@dataclass(frozen=True)
class Sizes:
    """Tokens and their width, experts, tokens that choose, and the loss's rows, words and chunk."""

    tokens: Sequence[int]
    width: int
    experts: int
    choosing: int
    losses: tuple[int, int, int]


FULL = Sizes((4096, 8192), 7168, 256, 8192, (8192, 129280, 1024))
SMALL = Sizes((512,), 1024, 64, 2048, (256, 8192, 128))
TOY = Sizes((19,), 200, 32, 23, (21, 300, 8))


class Sorted(NamedTuple):
    """Rows, and where each goes: ``[N, D]`` or ``[N * K, D]``."""

    rows: Any
    order_M: Tensor
    inverse_M: Tensor


def moves(place: Place, sizes: Sizes) -> list[Entry]:
    """Return the permutation in BF16 and in FP8, its way back, and the sort before it."""
    entries = []
    for N in sizes.tokens:
        entries += [_permute(place, N, sizes), _permute_tiles(place, N, sizes)]
        entries += [_unpermute(place, N, sizes), _sort(place, N, sizes)]
    return entries


def _slots(place: Place, generator: Generator, N: int, experts: int) -> Tensor:
    """Draw ``TOP_K`` different experts a token: ``[N, K]``."""
    scores = torch.rand(N, experts, generator=generator, device=place.device)
    return scores.topk(TOP_K, -1).indices


def _permute(place: Place, N: int, sizes: Sizes) -> Entry:
    D, M = sizes.width, N * TOP_K

    def make(generator: Generator) -> Sorted:
        sort = sort_by_slot(_slots(place, generator, N, sizes.experts), sizes.experts)
        return Sorted(place.normal(generator, N, D), sort.order_M, sort.inverse_M)

    def ours(x: Sorted) -> Tensor:
        from ziphius.kernels.triton.permute import permute_triton

        return permute_triton(*x, TOP_K)

    return Entry(
        section="permute",
        name=f"permute {N} x {D}, top {TOP_K}",
        make=make,
        reference=lambda x: permute.permute(*x, TOP_K),
        ours=Version(OURS, ours),
        plain=Version(PLAIN, lambda x: permute.permute(*x, TOP_K)),
        peers=(Version("index_select", lambda x: x.rows[x.order_M // TOP_K]),),
        nbytes=(N + M) * D * place.storage.itemsize + 8.0 * M,
        goal=(COPY, 0.8),
    )


def _permute_tiles(place: Place, N: int, sizes: Sizes) -> Entry:
    D, M = sizes.width, N * TOP_K

    def make(generator: Generator) -> Sorted:
        sort = sort_by_slot(_slots(place, generator, N, sizes.experts), sizes.experts)
        q = quantize_tiles(place.normal(generator, N, D))
        return Sorted(q, sort.order_M, sort.inverse_M)

    def ours(x: Sorted) -> Fp8:
        from ziphius.kernels.triton.permute import permute_tiles_triton

        return permute_tiles_triton(*x, TOP_K)

    def plain(x: Sorted) -> Fp8:
        return permute.permute_tiles(*x, TOP_K)

    return Entry(
        section="permute",
        name=f"permute tiles {N} x {D}, top {TOP_K}",
        make=make,
        reference=lambda x: parts(plain(x)),
        ours=Version(OURS, ours),
        plain=Version(PLAIN, plain),
        peers=(Version("index_select", plain),),
        answer=lambda x, result: parts(Fp8(*result)),
        nbytes=in_tiles(N, D) + in_tiles(M, D) + 8.0 * M,
        goal=(COPY, 0.8),
    )


def _unpermute(place: Place, N: int, sizes: Sizes) -> Entry:
    D, M = sizes.width, N * TOP_K

    def make(generator: Generator) -> Sorted:
        sort = sort_by_slot(_slots(place, generator, N, sizes.experts), sizes.experts)
        return Sorted(place.normal(generator, M, D), sort.order_M, sort.inverse_M)

    def ours(x: Sorted) -> Tensor:
        from ziphius.kernels.triton.permute import unpermute_triton

        return unpermute_triton(*x, TOP_K)

    def gathered(x: Sorted) -> Tensor:
        return x.rows[x.inverse_M].unflatten(0, (-1, TOP_K)).sum(1)

    return Entry(
        section="permute",
        name=f"unpermute {N} x {D}, top {TOP_K}",
        make=make,
        reference=lambda x: permute.unpermute(*x, TOP_K),
        ours=Version(OURS, ours),
        plain=Version(PLAIN, lambda x: permute.unpermute(*x, TOP_K)),
        peers=(Version("index_select, sum", gathered, bound=1e-2),),
        nbytes=(N + M) * D * place.storage.itemsize + 8.0 * M,
        goal=(COPY, 0.8),
    )


def _sort(place: Place, N: int, sizes: Sizes) -> Entry:
    """Small: what it waits for is itself."""
    M, E = N * TOP_K, sizes.experts

    def flat(sort: Any) -> Sequence[Tensor]:
        return sort.order_M, sort.inverse_M, sort.counts_E

    def ours(slots_NK: Tensor) -> Any:
        from ziphius.kernels.triton.permute import sort_by_slot_triton

        return sort_by_slot_triton(slots_NK, E)

    def torchs(slots_NK: Tensor) -> Sequence[Tensor]:
        order_M = slots_NK.flatten().argsort(stable=True)
        inverse_M = torch.empty_like(order_M)
        inverse_M[order_M] = torch.arange(M, device=order_M.device)
        counts_E = torch.zeros(E, dtype=torch.int64, device=order_M.device)
        counts_E.scatter_add_(0, slots_NK.flatten(), torch.ones_like(order_M))
        return order_M, inverse_M, counts_E

    return Entry(
        section="permute",
        name=f"sort {N} tokens' top {TOP_K} of {E}",
        make=lambda generator: _slots(place, generator, N, E),
        reference=lambda slots_NK: flat(sort_by_slot(slots_NK, E)),
        ours=Version(OURS, ours),
        plain=Version(PLAIN, lambda slots_NK: flat(sort_by_slot(slots_NK, E))),
        peers=(Version(EAGER, torchs),),
        answer=lambda x, result: tuple(result)[:3],
        nbytes=3 * 8.0 * M + 8 * E,
    )


class Scores(NamedTuple):
    """Affinities before the sigmoid, and the routing bias."""

    logits_NE: Tensor
    bias_E: Tensor


def decided(x: Scores, least: float = 1e-6) -> Scores:
    """Put a clear token in the place of every one whose choice hangs on a rounding.

    In it two experts or two groups are closer than ``least``; one in ten has such a pair.
    """
    biased_NE = x.logits_NE.double().sigmoid() + x.bias_E
    groups_NG = biased_NE.unflatten(-1, (GROUPS, -1)).topk(2, -1).values.sum(-1)
    gaps = [y.sort(-1).values.diff(dim=-1).amin(-1) for y in (biased_NE, groups_NG)]
    clear_N = torch.minimum(*gaps) > least
    clear_row = x.logits_NE[clear_N.to(torch.int8).argmax()]
    return x._replace(logits_NE=torch.where(clear_N.unsqueeze(-1), x.logits_NE, clear_row))


def routers(place: Place, sizes: Sizes) -> list[Entry]:
    """Return the choice of experts: sigmoid, groups, top-k, weights."""
    N, E = sizes.choosing, sizes.experts

    def make(generator: Generator) -> Scores:
        logits_NE = place.normal(generator, N, E, dtype=torch.float32)
        return decided(Scores(logits_NE, 0.1 * place.normal(generator, E, dtype=torch.float32)))

    rule: Any = {"top_k": TOP_K, "n_group": GROUPS, "topk_group": TOP_GROUPS}
    rule |= {"normalise": True, "scale": SCALE}

    def ours(x: Scores) -> Any:
        from ziphius.kernels.triton.route import route_triton

        return route_triton(*x, **rule)

    def candidates() -> Sequence[Version]:
        from ziphius.kernels.triton.route import LAUNCHES, route_triton

        def launched(launch: tuple[int, int, int]) -> Version:
            return Version(f"{OURS} {launch}", lambda x: route_triton(*x, **rule, launch=launch))

        return tuple(map(launched, LAUNCHES[1:]))

    def plain(x: Scores) -> Sequence[Tensor]:
        scores_NE = x.logits_NE.sigmoid()
        chosen_NK = router.choose(scores_NE, x.bias_E, TOP_K, GROUPS, TOP_GROUPS)
        return chosen_NK, router.gate(scores_NE, chosen_NK, normalise=True, scale=SCALE), scores_NE

    return [
        Entry(
            section="router",
            name=f"{N} tokens, {E} experts",
            make=make,
            reference=lambda x: plain(Scores(x.logits_NE, x.bias_E)),
            ours=Version(OURS, ours),
            plain=Version(PLAIN, plain),
            peers=(Version(EAGER, plain),),
            nbytes=4.0 * E * (2 * N + 1) + (8 + 4) * N * TOP_K,
            bound=1e-5,
            goal=(COPY, 0.8),
            candidates=candidates,
        )
    ]


class Logits(NamedTuple):
    """Logits, and the words that came."""

    logits_NV: Tensor
    targets_N: Tensor


def losses(place: Place, sizes: Sizes) -> list[Entry]:
    """Return cross entropy a chunk of rows at a time, its gradient in the place of the logits."""
    N, V, chunk = sizes.losses

    def make(generator: Generator) -> Logits:
        logits_NV = torch.empty(N, V, dtype=place.storage, device=place.device)
        for rows_nV in logits_NV.split(chunk):
            rows_nV.copy_(3 * torch.randn(rows_nV.shape, generator=generator, device=place.device))
        targets_N = torch.randint(V, (N,), generator=generator, device=place.device)
        targets_N[:: max(1, N // 8)] = loss.IGNORED
        return Logits(logits_NV, targets_N)

    def over_chunks(rows: Any, x: Logits) -> Tensor:
        pairs = zip(x.logits_NV.split(chunk), x.targets_N.split(chunk), strict=True)
        return torch.stack([rows(logits_nV, targets_n) for logits_nV, targets_n in pairs]).sum()

    def ours(x: Logits) -> Tensor:
        from ziphius.kernels.triton.loss import cross_entropy_rows_triton

        return over_chunks(cross_entropy_rows_triton, x)

    def candidates() -> Sequence[Version]:
        from ziphius.kernels.triton.loss import LAUNCHES, Launch, cross_entropy_rows_triton

        def launched(launch: Launch) -> Version:
            rows = partial(cross_entropy_rows_triton, launch=launch)
            return Version(f"{OURS} {launch}", lambda x: over_chunks(rows, x))

        return tuple(map(launched, LAUNCHES[1:]))

    def torchs(logits_nV: Tensor, targets_n: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf_nV = logits_nV.detach().requires_grad_()
            total = F.cross_entropy(leaf_nV.float(), targets_n, reduction="sum")
            logits_nV.copy_(torch.autograd.grad(total, leaf_nV)[0])
        return total.detach()

    def reference(x: Logits) -> Sequence[Tensor]:
        total = torch.zeros((), dtype=torch.float64, device=place.device)
        gradient_NV = torch.empty(N, V, device=place.device)
        pairs = zip(x.logits_NV.split(chunk), x.targets_N.split(chunk), strict=True)
        for out_nV, (logits_nV, targets_n) in zip(gradient_NV.split(chunk), pairs, strict=True):
            wide_nV = logits_nV.double()
            total += loss.cross_entropy_rows(wide_nV, targets_n)
            out_nV.copy_(wide_nV)
        return total, gradient_NV

    return [
        Entry(
            section="loss",
            name=f"cross entropy and gradient {N} x {V}, {chunk} rows at a time",
            make=make,
            reference=reference,
            ours=Version(OURS, ours),
            plain=Version(PLAIN, lambda x: over_chunks(loss.cross_entropy_rows, x)),
            peers=(Version("F.cross_entropy", lambda x: over_chunks(torchs, x)),),
            answer=lambda x, result: (result, x.logits_NV),
            nbytes=2.0 * N * V * place.storage.itemsize,
            bound=1e-2 if place.storage == torch.bfloat16 else 1e-4,
            goal=(COPY, 0.8),
            candidates=candidates,
        )
    ]
