"""Expert parallelism: a dispatcher of two hops, and the part of the experts that a rank keeps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ziphius.config.errors import BadInput
from ziphius.kernels.fp8 import Arrived, Operand, Tiled, unread
from ziphius.kernels.quantize import E4M3, Fp8, Quantize
from ziphius.kernels.select import Kernels
from ziphius.model.dispatch import AT_ONCE, Dispatcher, Lane, Sent
from ziphius.model.experts import ExpertStore, StackedExperts, slots_of
from ziphius.model.ffn import MixtureOfExperts
from ziphius.model.router import Routing
from ziphius.model.transformer import Transformer
from ziphius.parallel.flight import Flight, Tensors, begin, end
from ziphius.parallel.journey import Departure, Journey, Network, travel
from ziphius.parallel.mesh import Mesh
from ziphius.parallel.transport import AxisTransport, Transport

# ``exact`` brings every expert's row back and sums at the source, in the order of choices: the
# numbers are those of one process. ``fast`` sums on the expert's rank and in its node first.
Combine = Literal["exact", "fast"]


class AllToAllDispatcher(Dispatcher):
    """Experts live on many ranks: rows travel to them in two hops (see ``journey.py``).

    ``slot_to_expert`` are the slots of all ranks, one rank's after the other's. With ``chunks``
    the second hop of one part of the tokens overlaps the first hop of the next.
    """

    def __init__(
        self,
        kernels: Kernels,
        slot_to_expert: Sequence[int],
        *,
        peers: Transport,
        node: Transport,
        combine: Combine = "exact",
        chunks: int = 1,
    ) -> None:
        """Raise BadInput for what cannot be spread over the ranks."""
        ranks = peers.size * node.size
        if combine not in get_args(Combine) or chunks < 1:
            raise BadInput(f"experts: combine = {combine!r}, chunks = {chunks}: exact or fast, 1+")
        if len(slot_to_expert) % ranks:
            raise BadInput(
                f"parallel.ep = {ranks} does not divide {len(slot_to_expert)} slots of experts: "
                f"use {math.gcd(len(slot_to_expert), ranks)}"
            )
        self.slot_to_expert = tuple(slot_to_expert)
        self.network = Network(peers, node, len(slot_to_expert) // ranks)
        self.quantize: Quantize = kernels.function("quantize")()
        self.exact, self.chunks = combine == "exact", chunks

    def sort(self, chosen_NK: Tensor, store: ExpertStore) -> Departure:
        """Find the ranks that every token goes to."""
        slots_NK = slots_of(chosen_NK, self.slot_to_expert, store.n_experts)
        return Departure.plan(slots_NK, self.network, self.chunks)

    def dispatch(self, u_ND: Operand, routing: Routing, sort: object) -> Sent:
        """Send every token's row to its experts; of tiles only codes and scales, as they are."""
        return self.end_dispatch(self.begin_dispatch(u_ND, routing, sort, AT_ONCE))

    def combine(self, rows_MD: Tensor, sent: Sent) -> Tensor:
        """Bring the rows back and sum them; their gradient travels in tiles where rows did."""
        return self.end_combine(self.begin_combine(rows_MD, sent, AT_ONCE))

    def begin_dispatch(self, u_ND: Operand, routing: Routing, sort: object, lane: Lane) -> object:
        """Begin to tell every rank what comes to it, and to send it."""
        assert isinstance(sort, Departure), "made by this class"
        tiles = u_ND[1:] if isinstance(u_ND, Tiled) else (None, None)
        value_ND = u_ND.value if isinstance(u_ND, Tiled) else u_ND
        flight = _Dispatch(lane, sort, self.network, self.exact)
        return begin(flight, value_ND, *tiles, routing.weights_NK)

    def end_dispatch(self, begun: object) -> Sent:
        """Return what has come."""
        flight, (value_MD, *tiles, gates_M) = end(begun)
        assert isinstance(flight, _Dispatch), "made by this class"
        journey = flight.journey
        assert journey is not None, "found before the rows travelled"
        rows_MD = value_MD if tiles[0] is None else Tiled(value_MD, *tiles)
        return Sent(rows_MD, gates_M, journey.counts_E, journey.arrived, journey)

    def begin_combine(self, rows_MD: Tensor, sent: Sent, lane: Lane) -> object:
        """Begin to bring the rows back."""
        assert isinstance(sent.way, Journey), "made by this class"
        quantize = self.quantize if isinstance(sent.rows_MD, Tiled) else None
        flight = _Combine(lane, sent.way, self.exact, quantize, sent.gradient)
        return begin(flight, rows_MD)

    def end_combine(self, begun: object) -> Tensor:
        """Return the sums."""
        _, (sums_ND,) = end(begun)
        return sums_ND


@dataclass
class _Dispatch(Flight):
    """Rows, or tiles, and routing weights on their way to the experts."""

    departure: Departure
    network: Network
    exact: bool
    journey: Journey | None = None

    def out(self, *given: Tensor | None) -> Tensors:
        value_ND, codes_ND, scales_NG, weights_NK = given
        assert value_ND is not None, "rows are given"
        assert weights_NK is not None, "and routing weights"
        self.journey = journey = travel(self.departure, self.network)
        gates_M = journey.choices_out(weights_NK)
        if codes_ND is None or scales_NG is None:
            (rows_MD,) = journey.rows_out(value_ND)
            return rows_MD, None, None, gates_M
        moved = _tiles_out(journey, Fp8(codes_ND, scales_NG))
        value_MD = unread(value_ND, len(moved.codes), value_ND.shape[1])
        return value_MD, moved.codes, moved.scales, gates_M

    def back(self, *grads: Tensor) -> Tensors:
        drows_MD, _, _, dgates_M = grads
        assert self.journey is not None, "rows have come before their gradients"
        du_ND = _back(self.journey, drows_MD, exact=self.exact)
        return du_ND, None, None, self.journey.choices_back(dgates_M)


@dataclass
class _Combine(Flight):
    """The experts' rows on their way back."""

    journey: Journey
    exact: bool
    quantize: Quantize | None
    gradient: Arrived

    def out(self, *given: Tensor | None) -> Tensors:
        (rows_MD,) = given
        assert rows_MD is not None, "experts have computed rows"
        return (_back(self.journey, rows_MD, exact=self.exact),)

    def back(self, *grads: Tensor) -> Tensors:
        (dout_ND,) = grads
        if self.quantize is None:
            return tuple(self.journey.rows_out(dout_ND))
        tiles = _tiles_out(self.journey, self.quantize.tiles(dout_ND, power_of_two=True))
        self.gradient.put(tiles)
        return (unread(dout_ND, *tiles.codes.shape),)


def _tiles_out(journey: Journey, tiles: Fp8) -> Fp8:
    """Bring tiles to the experts: codes as bytes, scales beside them."""
    codes_MD, scales_MG = journey.rows_out(tiles.codes.view(torch.uint8), tiles.scales)
    return Fp8(codes_MD.view(E4M3), scales_MG)


def _back(journey: Journey, rows_MD: Tensor, *, exact: bool) -> Tensor:
    return journey.sum_at_source(rows_MD) if exact else journey.sum_on_the_way(rows_MD)


@torch.no_grad()
def cut_experts(
    model: Transformer,
    mesh: Mesh,
    *,
    slot_to_expert: Sequence[int] | None = None,
    combine: Combine = "exact",
    chunks: int = 1,
) -> Transformer:
    """Keep of a whole model's experts those of this rank, in place, and let rows travel to others.

    ``slot_to_expert`` are the slots of all ranks of ``ep``; by default every expert has one, in
    order. Weights that the model has are kept; it may as well be initialised or loaded afterwards,
    by the names of what is left.
    Raises BadInput for experts or routing groups that do not spread evenly.
    """
    config = model.config
    mesh.layout.check_groups(config.n_group)
    slots = tuple(slot_to_expert or range(config.n_routed_experts))
    peers, node = AxisTransport(mesh["ep_peers"]), AxisTransport(mesh["ep_node"])
    for _, _, block in model.blocks():
        moe = block.mlp
        if not isinstance(moe, MixtureOfExperts):
            continue
        if moe.mixture is not None:
            raise BadInput(f"kernels: mixture = {model.kernels.mixture} needs all experts in place")
        whole = moe.experts.store
        assert isinstance(whole, StackedExperts), "training stacks the experts"
        dispatcher = AllToAllDispatcher(
            model.kernels, slots, peers=peers, node=node, combine=combine, chunks=chunks
        )
        first = dispatcher.network.rank * dispatcher.network.slots
        own = slots[first : first + dispatcher.network.slots]
        part = StackedExperts(config, model.precision, whole.down_proj.device, own)
        held = {expert: slot for slot, expert in enumerate(whole.slot_to_expert)}
        for here, expert in enumerate(own):
            part.gate_up_proj[here].copy_(whole.gate_up_proj[held[expert]])
            part.down_proj[here].copy_(whole.down_proj[held[expert]])
        moe.experts.store, moe.dispatcher = part, dispatcher
    return model
