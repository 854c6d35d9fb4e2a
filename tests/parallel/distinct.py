"""How many rows must travel to experts and back, counted from the choices alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

Hops = list[list[int]]  # of every rank: rows over nodes, and rows inside its node


class Ways(NamedTuple):
    """What every rank sends: distinct (token, node) and (token, rank), and pairs.

    A pair is a choice of a token. ``nodes`` are the most that a token goes to.
    """

    tokens_out: Hops
    pairs_out: Hops
    tokens_back: Hops
    pairs_back: Hops
    nodes: int


def distinct(chosen: Sequence[Tensor], per_node: int, experts: int) -> Ways:
    """Count for choices ``[N, K]`` of every rank, where each has so many experts.

    A row goes to the rank of the same index in the other node, and from there inside it.
    """
    none: Hops = [[0, 0] for _ in chosen]
    ways = Ways(*([list(hops) for hops in none] for _ in range(4)), 0)  # type: ignore[arg-type]
    for source, chosen_NK in enumerate(chosen):
        for choices in chosen_NK.tolist():
            ranks = [expert // experts for expert in choices]
            nodes = {rank // per_node for rank in ranks}
            ways = ways._replace(nodes=max(ways.nodes, len(nodes)))
            for node in nodes:
                middle = node * per_node + source % per_node
                ways.tokens_out[source][0] += middle != source
                ways.tokens_back[middle][0] += middle != source
            for rank in set(ranks):
                middle = rank // per_node * per_node + source % per_node
                ways.tokens_out[middle][1] += middle != rank
                ways.tokens_back[rank][1] += middle != rank
            for rank in ranks:
                middle = rank // per_node * per_node + source % per_node
                ways.pairs_out[source][0] += middle != source
                ways.pairs_out[middle][1] += middle != rank
                ways.pairs_back[middle][0] += middle != source
                ways.pairs_back[rank][1] += middle != rank
    return ways
