"""Who does what: the sizes of all axes, and the ranks that share each. No process groups here.

``world = pp * dp_replicate * dp_shard * cp * tp``, and ranks count in this order, ``tp`` fastest.
``ep`` reuses the ranks of ``dp_shard * cp``, as in the report (PP16 x EP64 x ZeRO-1, facts 5.1).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from ziphius.config.errors import BadInput
from ziphius.config.parallel import ParallelConfig

DENSE = ("pp", "dp_replicate", "dp_shard", "cp", "tp")


@dataclass(frozen=True)
class Place:
    """Where a rank stands on each dense axis."""

    pp: int
    dp_replicate: int
    dp_shard: int
    cp: int
    tp: int


@dataclass(frozen=True)
class Layout:
    """The sizes of a run's axes, checked. Ranks of a node are ``ranks_per_node`` neighbours."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    ranks_per_node: int = 1

    @classmethod
    def fill(
        cls,
        world: int,
        *,
        pp: int = 1,
        dp_replicate: int = 1,
        dp_shard: int = -1,
        cp: int = 1,
        tp: int = 1,
        ep: int = 1,
        ranks_per_node: int = 0,
    ) -> Layout:
        """Lay ``world`` processes out; ``dp_shard`` = -1 takes what is left.

        ``ranks_per_node`` = 0 says that all are on one node.
        Raises BadInput, with the nearest layout that works, for one that cannot.
        """
        sizes = {"pp": pp, "dp_replicate": dp_replicate, "cp": cp, "tp": tp, "ep": ep}
        if dp_shard != -1:
            sizes["dp_shard"] = dp_shard
        for name, size in sizes.items():
            if size < 1:
                raise BadInput(f"{name} = {size}: use 1 or more")
        others = pp * dp_replicate * cp * tp
        if dp_shard == -1:
            if world % others:
                raise BadInput(
                    f"parallel: pp * dp_replicate * cp * tp = {others} does not divide {world} "
                    f"processes: start {_multiple(world, others)} of them"
                )
            dp_shard = world // others
        if others * dp_shard != world:
            raise BadInput(
                f"parallel: pp * dp_replicate * dp_shard * cp * tp = {others * dp_shard}, and "
                f"there are {world} processes: start {others * dp_shard}, or let "
                "parallel.dp_shard = -1 take what is left"
            )
        node = min(ranks_per_node or world, world)
        layout = cls(pp, dp_replicate, dp_shard, cp, tp, ep, node)
        layout._check_experts()
        return layout

    @classmethod
    def of(cls, parallel: ParallelConfig, world: int, ranks_per_node: int = 0) -> Layout:
        """Return the layout that a recipe has for so many processes. Raises BadInput.

        ``ranks_per_node`` is what there is, where the recipe does not say.
        """
        return cls.fill(
            world,
            pp=parallel.pp,
            dp_replicate=parallel.dp_replicate,
            dp_shard=parallel.dp_shard,
            cp=parallel.cp,
            tp=parallel.tp,
            ep=parallel.ep,
            ranks_per_node=parallel.ranks_per_node or ranks_per_node,
        )

    @property
    def world(self) -> int:
        """How many processes there are."""
        return self.pp * self.dp_replicate * self.dp_shard * self.cp * self.tp

    def place(self, rank: int) -> Place:
        """Return where a rank stands."""
        found = []
        for name in reversed(DENSE):
            rank, position = divmod(rank, getattr(self, name))
            found.append(position)
        return Place(*reversed(found))

    def node(self, rank: int) -> int:
        """Return the node that a rank is on."""
        return rank // self.ranks_per_node

    def groups(self, axis: str) -> list[tuple[int, ...]]:
        """Return the groups of an axis; together they are all ranks, each once.

        The dense axes by their names. ``dp``: ranks with the same dense weights, which see
        different tokens. ``batch``: those of them that see different sequences. ``sequence``: ranks
        that share the same ones, over ``cp`` and ``tp``. ``stage``: all of a pipeline stage; they
        hold alike what ``tp`` does not cut. ``ep``: ranks that hold an expert's stack together.
        ``edp``: ranks with the same experts. ``shard``: those of a ``dp`` group in one replica,
        which FSDP spreads dense weights over. ``expert_shard``: those of them with the same
        experts. ``ep_node``: those of an ``ep`` group on one node. ``ep_peers``: those of an ``ep``
        group with the same index in their nodes. ``mirror_dp``, ``mirror_stage`` and
        ``mirror_edp``: those of ``dp``, ``stage`` and ``edp`` together with the ones of the stage
        at the other end, as DualPipe's two directions hold the same weights
        there. ``ends``: those of ``dp`` of the first and of the last rank of a pipeline together.
        """
        ranks = range(self.world)
        keys = {rank: self._key(axis, rank) for rank in ranks}
        ordered = sorted(ranks, key=lambda rank: (keys[rank], rank))
        return [tuple(group) for _, group in groupby(ordered, key=lambda rank: keys[rank])]

    def group_of(self, axis: str, rank: int) -> tuple[int, ...]:
        """Return the ranks that share an axis with one, it included."""
        return next(group for group in self.groups(axis) if rank in group)

    def _key(self, axis: str, rank: int) -> tuple[int, ...]:
        """Return what the ranks of a group have in common."""
        p = self.place(rank)
        sharded = p.dp_shard * self.cp + p.cp  # the ranks that ``ep`` reuses
        experts, member = divmod(sharded, self.ep)
        if axis in DENSE:
            return tuple(getattr(p, name) for name in DENSE if name != axis)
        mirror = min(p.pp, self.pp - 1 - p.pp)
        keys = {
            "world": (),
            "stage": (p.pp,),
            "dp": (p.pp, p.tp),
            "batch": (p.pp, p.cp, p.tp),
            "sequence": (p.pp, p.dp_replicate, p.dp_shard),
            "ep": (p.pp, p.dp_replicate, p.tp, experts),
            "edp": (p.pp, member),
            "shard": (p.pp, p.dp_replicate, p.tp),
            "expert_shard": (p.pp, p.dp_replicate, p.tp, member),
            "mirror_dp": (mirror, p.tp),
            "mirror_stage": (mirror,),
            "mirror_edp": (mirror, member),
            "ends": (p.pp % (self.pp - 1) if self.pp > 1 else 0, p.tp),
            "ep_node": (p.pp, p.dp_replicate, p.tp, experts, self.node(rank)),
            "ep_peers": (p.pp, p.dp_replicate, p.tp, experts, rank % self.ranks_per_node),
        }
        return keys[axis]

    def _check_experts(self) -> None:
        sharded = self.dp_shard * self.cp
        if sharded % self.ep:
            raise BadInput(
                f"parallel.ep = {self.ep} does not divide dp_shard * cp = {sharded}: "
                f"use {_divisor(sharded, self.ep)}"
            )
        here, peers = (
            {len(group) for group in self.groups(axis)} for axis in ("ep_node", "ep_peers")
        )
        # As many on every node, and at the same places there.
        if len(here) > 1 or len(peers) > 1 or here.pop() * peers.pop() != self.ep:
            raise BadInput(
                f"parallel.ep = {self.ep} spreads unevenly over nodes of {self.ranks_per_node} "
                "ranks: let ranks_per_node be a multiple of ep, or ep of ranks_per_node"
            )

    def check_groups(self, n_group: int) -> None:
        """Refuse routing groups that nodes do not hold whole (facts 5.6). Raises BadInput."""
        nodes = len(self.group_of("ep_peers", 0))
        if nodes > 1 and n_group % nodes:
            raise BadInput(
                f"parallel.ep = {self.ep} spans {nodes} nodes, which model.n_group = {n_group} "
                f"does not divide evenly: use {_divisor(n_group, nodes)} nodes"
            )


def _multiple(number: int, of: int) -> int:
    """Return the nearest positive multiple."""
    return max(1, round(number / of)) * of


def _divisor(number: int, near: int) -> int:
    """Return the divisor nearest to a number."""
    return min(_divisors(number), key=lambda d: (abs(d - near), d))


def _divisors(number: int) -> Iterator[int]:
    return (d for d in range(1, number + 1) if number % d == 0)
