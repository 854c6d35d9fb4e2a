"""The bound on what comes to a rank: reached by the worst routing, and by none exceeded."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.parallel.pool import Pool
from tests.parallel.test_experts import divided, layer_of, mesh_of
from tests.support import tiny_config
from ziphius.config.errors import BadInput
from ziphius.model.router import Routing
from ziphius.parallel.arrivals import worst_arrivals
from ziphius.parallel.journey import Journey
from ziphius.parallel.layout import Layout

TOKENS = 6


def arriving(ranks_per_node: int, experts: int, worst: bool) -> tuple[int, int, int]:
    """Return rows that passed through, tokens that arrived and rows, on this rank."""
    mesh = mesh_of(ranks_per_node)
    changes: dict[str, Any] = {"n_routed_experts": experts}
    moe = divided(layer_of(**changes), mesh, chunks=2)
    generator = torch.Generator().manual_seed(mesh.rank)
    N = TOKENS if worst else 2 + mesh.rank
    chosen_NK = torch.rand(N, experts, generator=generator).argsort(1)[:, :3]
    if worst:  # the first rank's experts first
        chosen_NK = torch.arange(3).expand(N, 3).contiguous()
    routing = Routing(chosen_NK, torch.ones(N, 3).double(), torch.zeros(N, experts))
    u_ND = torch.zeros(N, 24, dtype=torch.float64)
    sort = moe.dispatcher.sort(chosen_NK, moe.experts.store)
    sent = moe.dispatcher.dispatch(u_ND, routing, sort)
    assert isinstance(sent.way, Journey)
    forwarded = sum(spread.height for spread in sent.way.tokens.second)
    assert int(sent.counts_E.max()) <= sent.tokens
    return forwarded, sent.tokens, len(sent.gates_M)


@pytest.mark.parametrize("experts", [8, 16])
@pytest.mark.parametrize("per_node", [1, 2])
def test_the_bound_is_reached_and_not_exceeded(pool: Pool, per_node: int, experts: int) -> None:
    config = tiny_config(n_routed_experts=experts)
    layout = Layout.fill(4, ep=4, ranks_per_node=per_node)
    bound = worst_arrivals(config, layout, TOKENS)
    most = (bound.forwarded, bound.tokens, bound.rows)
    assert pool.run(4, arriving, per_node, experts, True)[0] == most
    for found in pool.run(4, arriving, per_node, experts, False):
        assert all(a <= b for a, b in zip(found, most, strict=True))


def test_memory_is_refused_before_a_step() -> None:
    config, layout = tiny_config(), Layout.fill(4, ep=4, ranks_per_node=2)
    bound = worst_arrivals(config, layout, 1000)
    # 2 nodes, 4 ranks; 2 experts a rank of which a token may choose both.
    assert (bound.forwarded, bound.tokens, bound.rows) == (2000, 4000, 8000)
    hops = 6000 * (24 * 2 + 4 * 3)
    experts = 8000 * (24 * 2 + 8 + (3 * 11 + 2 * 24) * 2)
    assert bound.nbytes == hops + experts + 2000 * 3 * 24 * 2
    fast = worst_arrivals(config, layout, 1000, exact=False)
    assert bound.nbytes - fast.nbytes == 2000 * 2 * 24 * 2
    tiles = worst_arrivals(config, layout, 1000, fp8=True)
    assert bound.nbytes - tiles.nbytes == (6000 + 8000) * (24 * 2 - 24 - 4)
    bound.check(bound.nbytes)
    with pytest.raises(BadInput, match=r"8000 rows come to one rank .* or parallel.ep smaller"):
        bound.check(bound.nbytes - 1)
