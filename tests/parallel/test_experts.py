"""Experts on several ranks: the numbers of one process, and no byte more than there must be."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parallel.distinct import distinct
from tests.parallel.pool import Pool
from tests.support import F64, random_model, random_tokens, tiny_config
from ziphius.config.errors import BadInput
from ziphius.kernels.fp8 import Tiled, unread
from ziphius.kernels.quantize import E4M3, Fp8, quantize_tiles
from ziphius.kernels.select import Kernels
from ziphius.model.dispatch import Sent
from ziphius.model.ffn import MixtureOfExperts
from ziphius.model.init import initialise
from ziphius.model.precision import Precision
from ziphius.model.router import Routing, expert_counts
from ziphius.model.transformer import Transformer
from ziphius.model.weights import named_weights
from ziphius.parallel.experts import AllToAllDispatcher, cut_experts
from ziphius.parallel.layout import Layout
from ziphius.parallel.mesh import Mesh, make_mesh
from ziphius.parallel.transport import AxisTransport

LENGTH = 9
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def mesh_of(ranks_per_node: int = 0) -> Mesh:
    world = torch.distributed.get_world_size()
    return make_mesh(Layout.fill(world, ep=world, ranks_per_node=ranks_per_node))


def skewed_model(**changes: Any) -> Transformer:
    """Expert 5 is the first choice of every token, expert 2 of none."""
    model = random_model(tiny_config(**changes), precision=F64)
    for _, _, block in model.blocks():
        if isinstance(block.mlp, MixtureOfExperts):
            block.mlp.gate.e_score_correction_bias[5] += 3
            block.mlp.gate.e_score_correction_bias[2] -= 30
    return model


def run(model: Transformer, tokens_BS: Tensor) -> tuple[dict[int, Tensor], list[Tensor], Tensor]:
    """Return every layer's choices, the hidden states and the loss, after its backward."""
    features = model.features(tokens_BS)
    T = tokens_BS.shape[1] - 1
    loss = model.cross_entropy(features.hidden_BTD.flatten(0, 1), tokens_BS[:, 1:].flatten())
    for depth, hidden_BTD in enumerate(features.mtp_hidden, start=1):
        targets_BT = tokens_BS[:, 1 + depth : T + 1]
        loss = loss + 0.3 * model.cross_entropy(hidden_BTD.flatten(0, 1), targets_BT.flatten())
    loss.backward()
    hidden = [features.hidden_BTD, *features.mtp_hidden]
    chosen = {layer: routing.chosen_NK for layer, routing in features.routings.items()}
    return chosen, hidden, loss.detach()


def gradients(model: Transformer) -> dict[str, Tensor]:
    """Return the gradients under the names of the weights."""
    twin = Transformer(model.config, model.precision, kernels=model.kernels)
    for (_, _, ours), (_, _, theirs) in zip(model.blocks(), twin.blocks(), strict=True):
        if isinstance(ours.mlp, MixtureOfExperts):
            theirs.mlp.experts.store = type(ours.mlp.experts.store)(
                model.config, model.precision, None, ours.mlp.experts.store.slot_to_expert
            )
    with torch.no_grad():
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.copy_(torch.zeros_like(q) if p.grad is None else p.grad)
    return {name: x for name, x in named_weights(twin) if "correction_bias" not in name}


def equals_one_process(
    shares: Sequence[int], ranks_per_node: int, combine: Any, chunks: int, changes: dict[str, Any]
) -> None:
    mesh = mesh_of(ranks_per_node)
    whole = skewed_model(**changes)
    tokens_BS = random_tokens(whole.config, sum(shares), LENGTH + 1)
    chosen, hidden, loss = run(whole, tokens_BS)
    for choice_NK in chosen.values():
        counts = expert_counts(choice_NK, whole.config.n_routed_experts)
        assert counts[5] > 0.6 * len(choice_NK)
        assert counts[2] == 0
    part = cut_experts(skewed_model(**changes), mesh, combine=combine, chunks=chunks)
    first = sum(shares[: mesh.rank])
    own = slice(first, first + shares[mesh.rank])
    _, own_hidden, own_loss = run(part, tokens_BS[own])
    for ours, theirs in zip(own_hidden, hidden, strict=True):
        torch.testing.assert_close(ours, theirs[own], **CLOSE)
    torch.testing.assert_close(mesh["world"].all_reduce(own_loss), loss, **CLOSE)
    expected = gradients(whole)
    experts = 0
    for name, gradient in gradients(part).items():
        if ".mlp.experts." in name:
            experts += 1
        else:
            mesh["world"].all_reduce(gradient)
        torch.testing.assert_close(gradient, expected[name], **CLOSE, msg=lambda t, n=name: n + t)
    layers = len(chosen)
    assert experts == layers * 3 * whole.config.n_routed_experts // len(shares)


@pytest.mark.parametrize(
    ("shares", "ranks_per_node", "combine", "chunks"),
    [
        ((1, 2), 0, "exact", 1),
        ((3, 0), 1, "fast", 2),
        ((2, 0, 1, 1), 0, "fast", 3),
        ((2, 0, 1, 1), 2, "exact", 3),
        ((1, 1, 0, 2), 2, "fast", 1),
        ((0, 1, 1, 1), 1, "exact", 2),
    ],
)
def test_equals_one_process(
    pool: Pool, shares: Sequence[int], ranks_per_node: int, combine: str, chunks: int
) -> None:
    args = (shares, ranks_per_node, combine, chunks, {})
    pool.run(len(shares), equals_one_process, *args)


def test_one_rank_alone() -> None:
    model, tokens_BS = skewed_model(), random_tokens(tiny_config(), 2, LENGTH + 1)
    _, hidden, loss = run(model, tokens_BS)
    part = cut_experts(skewed_model(), make_mesh(Layout()), chunks=4)
    _, own_hidden, own_loss = run(part, tokens_BS)
    assert torch.equal(own_loss, loss)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(own_hidden, hidden, strict=True))
    assert torch.equal(part.embed_tokens.weight.grad, model.embed_tokens.weight.grad)


# --- bytes ----------------------------------------------------------------------------------------

WIDE: dict[str, Any] = {"n_routed_experts": 16, "n_group": 4, "topk_group": 2}


def layer_of(precision: Precision = F64, **changes: Any) -> MixtureOfExperts:
    config = tiny_config(**changes)
    moe = MixtureOfExperts(config, precision, Kernels(), None)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for x in [*moe.parameters(), *moe.buffers()]:
            x.copy_(torch.randn(x.shape, generator=generator, dtype=torch.float64) * 0.3)
    return moe


def divided(moe: MixtureOfExperts, mesh: Mesh, **how: Any) -> MixtureOfExperts:
    """Cut one layer, with the slots in another order."""
    store, E = moe.experts.store, moe.experts.store.n_experts
    slots = tuple(range(E))[::-1] if how.pop("turned", False) else tuple(range(E))
    hops = {"peers": AxisTransport(mesh["ep_peers"]), "node": AxisTransport(mesh["ep_node"])}
    dispatcher = AllToAllDispatcher(Kernels(), slots, **hops, **how)
    own = slots[mesh.rank * E // len(mesh["ep"].ranks) :][: E // len(mesh["ep"].ranks)]
    part = copy.copy(store)
    part._parameters = {
        name: torch.nn.Parameter(p.detach()[list(own)].clone())
        for name, p in store.named_parameters()
    }
    part.slot_to_expert = own
    moe.experts.store, moe.dispatcher = part, dispatcher
    return moe


def through(moe: MixtureOfExperts, u_ND: Any, routing: Routing) -> tuple[Sent, Tensor]:
    """Dispatch, compute, combine."""
    sort = moe.dispatcher.sort(routing.chosen_NK, moe.experts.store)
    sent = moe.dispatcher.dispatch(u_ND, routing, sort)
    return sent, moe.dispatcher.combine(moe.experts(sent), sent)


def counted(ranks_per_node: int, combine: Any, chunks: int) -> tuple[Any, ...]:
    mesh = mesh_of(ranks_per_node)
    moe = divided(layer_of(**WIDE), mesh, combine=combine, chunks=chunks)
    generator = torch.Generator().manual_seed(mesh.rank)
    N = (7, 0, 12, 5)[mesh.rank]
    u_ND = torch.randn(N, 24, generator=generator, dtype=torch.float64, requires_grad=True)
    routing = moe.gate(u_ND)
    found = []
    out_ND = None
    for stage in ("dispatch", "combine", "backward"):
        mesh.traffic.sent.clear()
        if stage == "dispatch":
            sort = moe.dispatcher.sort(routing.chosen_NK, moe.experts.store)
            sent = moe.dispatcher.dispatch(u_ND, routing, sort)
        elif stage == "combine":
            out_ND = moe.dispatcher.combine(moe.experts(sent), sent)
        else:
            out_ND.sum().backward()
        bytes_sent = mesh.traffic.sent
        assert {operation for _, operation in bytes_sent} <= {"all_to_all"}
        found.append([bytes_sent[axis, "all_to_all"] for axis in ("ep_peers", "ep_node")])
    return routing.chosen_NK, found


@pytest.mark.parametrize("combine", ["exact", "fast"])
@pytest.mark.parametrize("per_node", [1, 2, 4])
def test_only_distinct_pairs_are_sent(pool: Pool, per_node: int, combine: str) -> None:
    chunks = 2
    results = pool.run(4, counted, per_node, combine, chunks)
    nodes = 4 // per_node
    ways = distinct([chosen_NK for chosen_NK, _ in results], per_node, experts=4)
    assert ways.nodes <= WIDE["topk_group"]
    tokens_out, pairs_out, tokens_back, pairs_back = ways[:4]
    row, slots, number = 24 * 8, 3 * 4, 8
    layout = [(nodes - 1) * chunks * (1 + 2 * per_node) * 8, (per_node - 1) * chunks * nodes * 16]
    returning = pairs_back if combine == "exact" else tokens_back
    for rank, (_, (dispatch, combined, backward)) in enumerate(results):
        for hop in range(2):
            there = tokens_out[rank][hop] * row
            beside = tokens_out[rank][hop] * slots + pairs_out[rank][hop] * number
            back = returning[rank][hop] * row
            assert dispatch[hop] == there + beside + layout[hop]
            assert combined[hop] == back
            assert backward[hop] == there + back + pairs_back[rank][hop] * number


# --- the same bits --------------------------------------------------------------------------------


# torch computes the end of a vector otherwise than its middle: rows are whole vectors here.
EVEN: dict[str, Any] = {**WIDE, "hidden_size": 64, "moe_intermediate_size": 32}


def same_bits(ranks_per_node: int, chunks: int, turned: bool) -> None:
    """In BF16 and FP32 too: no sum is taken in another order than in one process."""
    mesh = mesh_of(ranks_per_node)
    for dtype in (torch.float32, torch.bfloat16):
        precision = Precision(compute=dtype, storage=torch.float32)
        generator = torch.Generator().manual_seed(0)
        u_ND = torch.randn(40, 64, generator=generator).to(dtype)
        dout_ND = torch.randn(40, 64, generator=generator).to(dtype)
        whole = layer_of(precision, **EVEN)
        part = divided(layer_of(precision, **EVEN), mesh, chunks=chunks, turned=turned)
        with torch.no_grad():
            routing = whole.gate(u_ND)
        compare(mesh, whole, part, u_ND, dout_ND, routing)


def compare(
    mesh: Mesh,
    whole: MixtureOfExperts,
    part: MixtureOfExperts,
    u_ND: Tensor,
    dout_ND: Tensor,
    routing: Routing,
    tiled: Any = lambda u_ND: u_ND,
) -> None:
    """Assert that results and gradients are those of one process to the bit."""
    ends = (0, 13, 13, 30, 40) if mesh.layout.world == 4 else (0, 27, 40)
    own = slice(ends[mesh.rank], ends[mesh.rank + 1])
    leaves = [u_ND.clone().requires_grad_(), routing.weights_NK.clone().requires_grad_()]
    _, expected = through(whole, tiled(leaves[0]), routing._replace(weights_NK=leaves[1]))
    expected.backward(dout_ND)
    own_leaves = [x.detach()[own].clone().requires_grad_() for x in leaves]
    own_routing = Routing(*(x[own] for x in routing))._replace(weights_NK=own_leaves[1])
    _, result = through(part, tiled(own_leaves[0]), own_routing)
    result.backward(dout_ND[own])
    assert torch.equal(result, expected[own])
    for ours, theirs in zip(own_leaves, leaves, strict=True):
        assert torch.equal(ours.grad, theirs.grad[own])
    held = list(part.experts.store.slot_to_expert)
    stores = part.experts.store, whole.experts.store
    for ours, theirs in zip(*(store.parameters() for store in stores), strict=True):
        assert torch.equal(ours.grad, theirs.grad[held])
        assert theirs.grad.any()


@pytest.mark.parametrize(("world", "per_node", "chunks"), [(2, 0, 1), (4, 2, 3), (4, 0, 2)])
def test_exact_is_one_process_to_the_bit(
    pool: Pool, world: int, per_node: int, chunks: int
) -> None:
    pool.run(world, same_bits, per_node, chunks, False)
    if chunks > 1:
        pool.run(world, same_bits, per_node, chunks, True)


FP8: dict[str, Any] = {"hidden_size": 384, "moe_intermediate_size": 128, "n_routed_experts": 8}


def same_bits_fp8(ranks_per_node: int, chunks: int) -> None:
    mesh = mesh_of(ranks_per_node)
    precision = Precision.for_fp8_training()
    whole = layer_of(precision, **FP8)
    part = divided(layer_of(precision, **FP8), mesh, chunks=chunks)
    generator = torch.Generator().manual_seed(0)
    u_ND, dout_ND = (torch.randn(40, 384, generator=generator).bfloat16() for _ in range(2))
    with torch.no_grad():
        routing = whole.gate(u_ND)

    def tiled(x: Tensor) -> Tiled:
        return Tiled(x, *quantize_tiles(x.detach(), power_of_two=True)[:2])

    compare(mesh, whole, part, u_ND, dout_ND, routing, tiled)


@pytest.mark.parametrize(("world", "per_node", "chunks"), [(2, 0, 2), (4, 2, 1)])
def test_fp8_is_one_process_to_the_bit(pool: Pool, world: int, per_node: int, chunks: int) -> None:
    pool.run(world, same_bits_fp8, per_node, chunks)


def tiles_unchanged() -> None:
    """Codes are random bytes under scales that no quantiser would choose: any rounding shows."""
    mesh = mesh_of(1)
    precision = Precision.for_fp8_training()
    moe = divided(layer_of(precision, **FP8), mesh)
    generator = torch.Generator().manual_seed(mesh.rank)
    N = (17, 6)[mesh.rank]
    codes_ND = torch.randint(0, 100, (N, 384), generator=generator, dtype=torch.uint8)
    scales_NG = 2.0 ** torch.randint(-9, 3, (N, 3), generator=generator).float()
    value_ND = unread(torch.zeros(1, dtype=torch.bfloat16), N, 384).detach().requires_grad_()
    chosen_NK = torch.rand(N, 8, generator=generator).argsort(1)[:, :3]
    weights_NK = torch.rand(N, 3, generator=generator)
    routing = Routing(chosen_NK, weights_NK, torch.zeros(N, 8))
    sort = moe.dispatcher.sort(chosen_NK, moe.experts.store)
    u_ND = Tiled(value_ND, codes_ND.view(E4M3), scales_NG)
    sent = moe.dispatcher.dispatch(u_ND, routing, sort)
    kept: list[Tensor] = []
    met: list[Fp8] = []
    grouped = moe.experts.fp8.grouped

    def product(a: Fp8, b: Fp8, counts_E: Tensor, dtype: torch.dtype) -> Tensor:
        met.append(a)
        return grouped(a, b, counts_E, dtype)

    moe.experts.fp8 = replace(moe.experts.fp8, grouped=product)

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        rows_MD = moe.experts(sent)
    assert isinstance(sent.rows_MD, Tiled)
    # What arrived is what left, row by row, and that very memory is what backward keeps.
    world = mesh["world"]
    most = [world.all_gather(torch.cat((x, x.new_zeros(17 - N, *x.shape[1:])))) for x in
            (codes_ND, scales_NG, chosen_NK + 0)]  # fmt: skip
    sizes, first = (17, 6), 4 * mesh.rank
    wanted = []
    for expert in range(first, first + 4):
        for rank, size in enumerate(sizes):
            for token in range(17 * rank, 17 * rank + size):
                if expert in most[2][token].tolist():
                    wanted.append(token)
    assert torch.equal(sent.rows_MD.codes.view(torch.uint8), most[0][wanted])
    assert torch.equal(sent.rows_MD.scales, most[1][wanted])
    places = {x.data_ptr() for x in kept}
    assert {sent.rows_MD.codes.data_ptr(), sent.rows_MD.scales.data_ptr()} <= places
    # And it is what the first product multiplies: nothing has been made numbers and codes again.
    assert met[0].codes.data_ptr() == sent.rows_MD.codes.data_ptr()
    assert met[0].scales.data_ptr() == sent.rows_MD.scales.data_ptr()
    assert rows_MD.isfinite().all()
    # The gradient travels as tiles of powers of two, and its numbers beside them are never read.
    out_ND = moe.dispatcher.combine(rows_MD, sent)
    met.clear()
    back_from: list[Fp8] = []
    put = sent.gradient.put
    sent.gradient.put = lambda tiles: (back_from.append(tiles), put(tiles))[1]  # type: ignore[method-assign]
    before = mesh.traffic.sent["ep_peers", "all_to_all"]
    out_ND.backward(torch.randn(N, 384, generator=generator).bfloat16())
    there = sum(any(e // 4 != mesh.rank for e in row) for row in chosen_NK.tolist())
    others = most[2][17 * (1 - mesh.rank) :][: sizes[1 - mesh.rank]]
    back = int((others // 4 == mesh.rank).sum())
    sent_bytes = mesh.traffic.sent["ep_peers", "all_to_all"] - before
    assert sent_bytes == there * (384 + 12) + back * (384 * 2 + 4)
    (gradient,) = back_from
    assert met[0].codes.data_ptr() == gradient.codes.data_ptr()
    assert met[0].scales.data_ptr() == gradient.scales.data_ptr()
    assert value_ND.grad is not None
    assert value_ND.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in moe.experts.store.parameters())


def test_tiles_enter_the_products_as_they_left(pool: Pool) -> None:
    pool.run(2, tiles_unchanged)


# --- cutting --------------------------------------------------------------------------------------


def cut_then_named(ranks_per_node: int) -> dict[str, Tensor]:
    mesh = mesh_of(ranks_per_node)
    model = cut_experts(Transformer(tiny_config(), F64), mesh)
    initialise(model, 3)
    return {name: x.clone() for name, x in named_weights(model)}


def test_the_part_has_the_right_names_and_initial_values(pool: Pool) -> None:
    whole = Transformer(tiny_config(), F64)
    initialise(whole, 3)
    expected = dict(named_weights(whole))
    parts = pool.run(2, cut_then_named, 0)
    assert set(parts[0]) | set(parts[1]) == set(expected)
    for rank, part in enumerate(parts):
        experts = {int(n.split(".experts.")[1].split(".")[0]) for n in part if ".experts." in n}
        assert experts == set(range(4 * rank, 4 * rank + 4))
        assert all(torch.equal(x, expected[name]) for name, x in part.items())


def with_redundant_slots() -> None:
    """Two ranks of five slots: expert 5 is on both, expert 0 twice on one."""
    mesh = mesh_of()
    slots = (0, 1, 5, 2, 0, 3, 4, 5, 6, 7)
    whole, tokens_BT = skewed_model(), random_tokens(tiny_config(), 3, LENGTH)
    part = cut_experts(skewed_model(), mesh, slot_to_expert=slots)
    own = slice(0, 2) if mesh.rank == 0 else slice(2, 3)
    with torch.no_grad():
        torch.testing.assert_close(part(tokens_BT[own]), whole(tokens_BT)[own], **CLOSE)


def test_redundant_slots_serve_too(pool: Pool) -> None:
    pool.run(2, with_redundant_slots)


def test_what_cannot_be_spread_is_refused() -> None:
    class Ranks:
        def __init__(self, size: int) -> None:
            self.size, self.place = size, 0

    def make(slots: int, **how: Any) -> None:
        hops: dict[str, Any] = {"peers": Ranks(2), "node": Ranks(3)}
        AllToAllDispatcher(Kernels(), range(slots), **hops, **how)

    make(12)
    with pytest.raises(BadInput, match="ep = 6 does not divide 8 slots of experts: use 2"):
        make(8)
    with pytest.raises(BadInput, match="exact or fast"):
        make(12, combine="quick")
    with pytest.raises(BadInput, match="chunks = 0"):
        make(12, chunks=0)
    in_place = Transformer(tiny_config(), F64, kernels=Kernels(mixture="reference"))
    with pytest.raises(BadInput, match="mixture = reference"):
        cut_experts(in_place, make_mesh(Layout()))
