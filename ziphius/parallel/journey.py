"""The way of rows to their experts and back in two hops (report section 3.2.2; facts 5.6).

Hop one goes over nodes, to the rank with the same index there, once per (token, node). Hop two goes
inside the node, once per (token, rank); copies for several experts are made at its end. What a
*pair*, a token's choice, has of its own goes once per pair: its routing weight, and in exact mode
its expert's row on the way back. The way is found once, and backward takes it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ziphius.kernels.permute import sum_choices
from ziphius.parallel.transport import Spread, Transport


@dataclass(frozen=True)
class Network:
    """The two hops: ``peers`` over nodes, ``node`` inside one; ranks count node by node.

    Every rank has ``slots`` slots of experts: rank ``r`` those from ``r * slots``.
    """

    peers: Transport
    node: Transport
    slots: int

    @property
    def ranks(self) -> int:
        """How many ranks there are."""
        return self.peers.size * self.node.size

    @property
    def rank(self) -> int:
        """Which of them this is."""
        return self.peers.place * self.node.size + self.node.place


@dataclass(frozen=True)
class Departure:
    """What a rank knows of its own tokens before anything is sent; no number is on the host yet.

    ``tokens`` and ``pairs`` ``[chunks, ranks]`` are how many of either go to every rank of each
    part of the tokens, ``to_node`` ``[N, nodes]`` says whether a token goes to a node.
    """

    slots_NK: Tensor
    to_node: Tensor
    tokens: Tensor
    pairs: Tensor
    sizes: list[int]

    @classmethod
    def plan(cls, slots_NK: Tensor, network: Network, chunks: int) -> Departure:
        """Find where tokens go that chose these slots, of all ranks' slots."""
        N, R = len(slots_NK), network.ranks
        rank_NK = slots_NK // network.slots
        pairs_NR = slots_NK.new_zeros(N, R).scatter_add_(1, rank_NK, torch.ones_like(rank_NK))
        tokens_NR = pairs_NR > 0
        sizes = [(c + 1) * N // chunks - c * N // chunks for c in range(chunks)]
        tokens, pairs = (
            torch.stack([part.sum(0) for part in x.split(sizes)]) for x in (tokens_NR, pairs_NR)
        )
        to_node = tokens_NR.view(N, network.peers.size, network.node.size).any(2)
        return cls(slots_NK, to_node, tokens, pairs, sizes)


@dataclass(frozen=True)
class Hops:
    """A way of two hops for each chunk of rows: all first hops begin before any is waited for."""

    network: Network
    first: list[Spread]
    second: list[Spread]

    def out(self, xs: Sequence[Tensor]) -> list[Tensor]:
        """Multicast rows through both hops; chunks arrive one after the other."""
        sizes = [spread.height for spread in self.first]
        parts = list(zip(*(x.split(sizes) for x in xs), strict=True))
        peers, node = self.network.peers, self.network.node
        first = [
            [peers.multicast(x, spread) for x in part]
            for part, spread in zip(parts, self.first, strict=True)
        ]
        second = [
            [node.multicast(x.wait(), spread) for x in part]
            for part, spread in zip(first, self.second, strict=True)
        ]
        return [torch.cat([x.wait() for x in part]) for part in zip(*second, strict=True)]

    def back(self, x: Tensor) -> Tensor:
        """Reduce rows through both hops, to where they came from."""
        parts = x.split([sum(spread.received) for spread in self.second])
        peers, node = self.network.peers, self.network.node
        second = [node.reduce(p, spread) for p, spread in zip(parts, self.second, strict=True)]
        first = [
            peers.reduce(p.wait(), spread) for p, spread in zip(second, self.first, strict=True)
        ]
        return torch.cat([p.wait() for p in first])


@dataclass(frozen=True)
class Journey:
    """The whole way of a batch, known on every rank that it touches.

    At its end rows are sorted by slot; in a slot they are in the order of the source's rank and of
    its tokens, which is that of one process with all tokens. ``order`` is the place of every such
    row among the pairs as they arrive, ``token`` its arrived token.
    """

    tokens: Hops
    pairs: Hops
    order_M: Tensor
    token_M: Tensor
    counts_E: Tensor
    arrived: int
    top_k: int

    def rows_out(self, *xs_ND: Tensor) -> list[Tensor]:
        """Bring rows of tokens to their experts: ``[M, ...]``."""
        return [x.index_select(0, self.token_M) for x in self.tokens.out(xs_ND)]

    def choices_out(self, x_NK: Tensor) -> Tensor:
        """Bring one number a choice to its expert: ``[M]``."""
        return self.pairs.out([x_NK.flatten()])[0].index_select(0, self.order_M)

    def choices_back(self, x_M: Tensor) -> Tensor:
        """Bring one number a row back to its choice: ``[N, K]``."""
        return self.pairs.back(x_M.index_select(0, self.inverse_M)).unflatten(0, (-1, self.top_k))

    def sum_at_source(self, rows_MD: Tensor) -> Tensor:
        """Bring every expert's row back and sum in the order of choices: as one process does."""
        rows_PD = self.pairs.back(rows_MD.index_select(0, self.inverse_M))
        return sum_choices(rows_PD.unflatten(0, (-1, self.top_k)))

    def sum_on_the_way(self, rows_MD: Tensor) -> Tensor:
        """Sum a token's rows on each rank, then in each node, and at last at the source."""
        high = torch.promote_types(rows_MD.dtype, torch.float32)
        total_AD = rows_MD.new_zeros(self.arrived, rows_MD.shape[1], dtype=high)
        for row_m, token_m in self._turns:
            total_AD.index_add_(0, token_m, rows_MD.index_select(0, row_m).to(high))
        return self.tokens.back(total_AD.to(rows_MD.dtype))

    @cached_property
    def inverse_M(self) -> Tensor:
        """The row of every pair as they arrive."""
        inverse_M = torch.empty_like(self.order_M)
        inverse_M[self.order_M] = torch.arange(len(inverse_M), device=inverse_M.device)
        return inverse_M

    @cached_property
    def _turns(self) -> list[tuple[Tensor, Tensor]]:
        """The first rows of all tokens and their tokens, then the second ones, and so on."""
        token_P = self.token_M.index_select(0, self.inverse_M)  # sorted, as pairs arrive
        turn_P = torch.arange(len(token_P), device=token_P.device)
        turn_P = turn_P - torch.searchsorted(token_P, token_P)
        found = []
        for turn in range(self.top_k):
            (pair_m,) = (turn_P == turn).nonzero(as_tuple=True)
            found.append((self.inverse_M[pair_m], token_P[pair_m]))
        return found


def travel(departure: Departure, network: Network) -> Journey:
    """Tell every rank what comes to it, first how many and then which slots: all take part."""
    P, L = network.peers.size, network.node.size
    chunks, top_k = len(departure.sizes), departure.slots_NK.shape[1]
    tokens, pairs = (x.view(chunks, P, L) for x in (departure.tokens, departure.pairs))
    to_node = torch.stack([part.sum(0) for part in departure.to_node.split(departure.sizes)])
    # For every node and chunk: its tokens, and the tokens and pairs of each of its ranks.
    table = torch.cat((to_node.unsqueeze(2), tokens, pairs), 2).transpose(0, 1).contiguous()
    coming = network.peers.write(table, [1] * P, [1] * P).wait()
    # For every rank here, chunk and source node: tokens and pairs.
    onward = coming[:, :, 1:].unflatten(2, (2, L)).permute(3, 1, 0, 2).contiguous()
    arriving = network.node.write(onward, [1] * L, [1] * L).wait()

    sent, came = table.cpu(), coming.cpu()
    first = _first_hop(departure, network, sent, came)
    slots = departure.slots_NK.int().split(departure.sizes)
    on_way = [network.peers.multicast(x, s) for x, s in zip(slots, first[0], strict=True)]
    forwarded = [x.wait() for x in on_way]
    second = _second_hop(forwarded, network, came, arriving.cpu())
    on_way = [network.node.multicast(x, s) for x, s in zip(forwarded, second[0], strict=True)]
    slots_AK = torch.cat([x.wait() for x in on_way])

    token_hops, pair_hops = (Hops(network, *way) for way in zip(first, second, strict=True))
    # Of every chunk, this node's ranks one after the other, and of each the nodes.
    numbers = arriving[:, :, :, 0].transpose(0, 1).flatten()
    nodes = torch.arange(P, device=numbers.device) * L
    sources = torch.arange(L, device=numbers.device).unsqueeze(1) + nodes
    source_A = sources.flatten().repeat(chunks).repeat_interleave(numbers)
    here_AK = slots_AK // network.slots == network.rank
    token_P, choice_P = here_AK.nonzero(as_tuple=True)
    slot_P = slots_AK[token_P, choice_P].long() - network.rank * network.slots
    order_M = (slot_P * network.ranks + source_A[token_P]).argsort(stable=True)
    counts_E = torch.bincount(slot_P, minlength=network.slots)
    token_M, arrived = token_P[order_M], len(slots_AK)
    return Journey(token_hops, pair_hops, order_M, token_M, counts_E, arrived, top_k)


def _first_hop(
    departure: Departure, network: Network, sent: Tensor, came: Tensor
) -> tuple[list[Spread], list[Spread]]:
    """Lay hop one out, of tokens and of pairs; ``sent`` and ``came`` are tables on the host."""
    L = network.node.size
    by_token, by_pair = [], []
    slots, to_node = (x.split(departure.sizes) for x in (departure.slots_NK, departure.to_node))
    for chunk, (slots_nK, to_node_nP) in enumerate(zip(slots, to_node, strict=True)):
        _, token = to_node_nP.T.nonzero(as_tuple=True)
        going, coming = (x[:, chunk, 0].tolist() for x in (sent, came))
        by_token.append(Spread(token, going, coming, len(slots_nK)))
        node = slots_nK.flatten() // (network.slots * L)
        going, coming = (x[:, chunk, 1 + L :].sum(1).tolist() for x in (sent, came))
        by_pair.append(Spread(node.argsort(stable=True), going, coming, slots_nK.numel()))
    return by_token, by_pair


def _second_hop(
    forwarded: Sequence[Tensor], network: Network, came: Tensor, arriving: Tensor
) -> tuple[list[Spread], list[Spread]]:
    """Lay hop two out for the slots that hop one has brought, chunk by chunk."""
    L = network.node.size
    by_token, by_pair = [], []
    for chunk, slots_nK in enumerate(forwarded):
        rank_nK = slots_nK // network.slots - network.peers.place * L
        here_nK = (rank_nK >= 0) & (rank_nK < L)
        token_p, _ = here_nK.nonzero(as_tuple=True)
        rank_p = rank_nK[here_nK].long()
        to_rank_nL = here_nK.new_zeros(len(slots_nK), L)
        to_rank_nL[token_p, rank_p] = True
        _, token = to_rank_nL.T.nonzero(as_tuple=True)
        going, coming = came[:, chunk, 1:].sum(0), arriving[:, chunk].sum(1)
        counts = going[:L].tolist(), coming[:, 0].tolist()
        by_token.append(Spread(token, *counts, len(slots_nK)))
        counts = going[L:].tolist(), coming[:, 1].tolist()
        by_pair.append(Spread(rank_p.argsort(stable=True), *counts, len(rank_p)))
    return by_token, by_pair
