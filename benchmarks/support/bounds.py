"""The least that a rank must send in a training step, beside what it does send, by kind.

All are bytes of one rank. What is counted apart from the kinds below, ``other``, has no bound here:
losses, loads, the gradients' norm, routing weights' layout, flags.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from ziphius.model.ffn import Dense
from ziphius.parallel.journey import Departure
from ziphius.parallel.mesh import Mesh
from ziphius.parallel.passes import InOne, Passes
from ziphius.parallel.pipeline.families import schedule
from ziphius.parallel.pipeline.passes import Pipelined
from ziphius.parallel.rows import MicroBatch
from ziphius.parallel.sharding import Sharding

# What is said in the record.
BOUNDS = {
    "zero1": "(n-1)/n of the gradients in FP32 and (n-1)/n of the weights, for every group of n "
    "ranks that hold weights alike",
    "experts": "rows of the compute dtype, four times (out and back, forward and backward): one a "
    "(token, other node) and one a (token, rank of a node but the one where it arrives). Runs "
    "combine exactly: every choice's row comes back, so that the sums are one process's",
    "pipeline": "hidden states of every micro-batch that counts, over each boundary between "
    "stages on two ranks, forward and backward",
    "cp": "latent and rotary key of own tokens to n-1 others in every attention, and the gradient",
    "tp": "latents and query latents of own tokens to n-1 others, outputs of attention; rows and "
    "outputs of dense layers, embedding and head; and the gradients of all",
}


@dataclass(frozen=True)
class Step:
    """What bounds are made from: a rank's part of the network, and what it did in a step."""

    passes: Passes
    sharding: Sharding | None
    parts: list[MicroBatch]
    departures: list[Departure]
    length: int

    @property
    def mesh(self) -> Mesh:
        """The groups that it was done in."""
        return self.passes.mesh


def bounds(step: Step) -> dict[str, int]:
    """Return the least of every kind that the layout has at all."""
    found = {
        "zero1": _zero1(step),
        "experts": _experts(step),
        "pipeline": _pipeline(step),
        "cp": _shared(step, "cp"),
        "tp": _shared(step, "tp"),
    }
    return {kind: least for kind, least in found.items() if least}


def by_kind(step: Step, sent: Mapping[tuple[str, str], int]) -> Counter[str]:
    """Sort what was sent into the kinds that bounds are of, and ``other``."""
    kinds: Counter[str] = Counter()
    alike = set() if step.sharding is None else {b.axis.name for b in step.sharding.buffers}
    for (axis, operation), nbytes in sent.items():
        if axis in ("ep_node", "ep_peers"):
            kind = "experts"
        elif axis == "pp" and operation == "send":
            kind = "pipeline"
        elif axis in ("cp", "tp") and operation != "all_reduce":
            kind = axis
        elif axis in alike and operation in ("reduce_scatter", "all_gather"):
            kind = "zero1"
        else:
            kind = "other"
        kinds[kind] += nbytes
    return kinds


def _zero1(step: Step) -> int:
    least = 0
    for buffer in [] if step.sharding is None else step.sharding.buffers:
        numbers = sum(p.numel() for p in buffer.spans)
        each = 4 + buffer.weights.element_size()
        least += numbers * each * (buffer.axis.size - 1) // buffer.axis.size
    return least


def _experts(step: Step) -> int:
    """Count rows at their source; over all ranks the sum is that of who sends them."""
    nodes, here = step.mesh["ep_peers"], step.mesh["ep_node"]
    rows = 0
    for way in step.departures:
        to_node = way.to_node.sum(0).tolist()
        rows += sum(to_node) - to_node[nodes.place]
        to_rank = way.tokens.sum(0).view(nodes.size, here.size)
        rows += int(to_rank.sum() - to_rank[:, here.place].sum())
    config, dtype = step.passes.models[0].config, step.passes.models[0].precision.compute
    return 4 * rows * config.hidden_size * dtype.itemsize


def _pipeline(step: Step) -> int:
    """Count what this rank's stages hand to stages on other ranks."""
    if not isinstance(step.passes, Pipelined):
        return 0
    small, place = step.passes.table, step.mesh["pp"].place
    table = schedule(small.name, small.ranks, len(step.parts), small.stages)
    least = 0
    for number, part in enumerate(step.parts):
        ways = table.places[table.direction(number)]
        # A boundary's hidden states go down it, and their gradient up.
        hops = sum(place in pair and pair[0] != pair[1] for pair in pairwise(ways))
        least += hops * _hidden(step, part) if part.counts else 0
    return least


def _shared(step: Step, axis: str) -> int:
    """Count numbers of a token that others need; what is summed is as much as what is gathered."""
    n = step.mesh[axis].size
    if n == 1:
        return 0
    assert isinstance(step.passes, InOne), "the bound is that of a whole network"
    (model,), mtp = step.passes.models, step.passes.model.config.num_nextn_predict_layers
    c = model.config
    latent, D = c.kv_lora_rank + c.qk_rope_head_dim, c.hidden_size
    numbers: Counter[int] = Counter()  # of a position, by the depth that it belongs to
    for _, depth, block in model.blocks():
        numbers[depth] += latent
        if axis == "tp":
            numbers[depth] += (c.q_lora_rank or D) + D
            numbers[depth] += 2 * D if isinstance(block.mlp, Dense) else 0
    if axis == "tp":
        for depth in range(mtp + 1):
            numbers[depth] += 2 * D  # embedding and head
    sent = sum(
        len(part.rows) * model.positions.count(step.length, depth) * each
        for part in step.parts
        for depth, each in numbers.items()
    )
    return 2 * (n - 1) * sent * model.precision.compute.itemsize


def _hidden(step: Step, part: MicroBatch) -> int:
    """Return the bytes of a micro-batch's hidden states on this rank."""
    model = step.passes.models[0]
    positions = len(part.rows) * model.positions.count(step.length)
    return positions * model.config.hidden_size * model.precision.compute.itemsize
