"""The one file that makes process groups."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ziphius.config.errors import BadInput
from ziphius.parallel.collectives import Axis, Traffic, Ways
from ziphius.parallel.layout import DENSE, Layout, Place

# The axes that Layout.groups describes, beside the dense ones.
JOINED = (
    *("world", "stage", "dp", "batch", "sequence", "ep", "edp", "ep_node", "ep_peers"),
    *("shard", "expert_shard", "mirror_dp", "mirror_stage", "mirror_edp", "ends"),
)
# Those that are in use while the rank computes, and may use others (pipeline/overlap.py): a group's
# collectives have an order only if one thread begins them.
BESIDE = ("ep_node", "ep_peers")
# All ranks, over processors: of the thread that saves, and of what ranks decide together.
SAVING, CONTROL = "saving", "control"

# The groups of an axis: all ranks, each once.
Parts = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Mesh:
    """A layout with the groups that this rank communicates in."""

    layout: Layout
    rank: int
    axes: dict[str, Axis]
    traffic: Traffic
    device: str

    def __getitem__(self, axis: str) -> Axis:
        return self.axes[axis]

    def begin_step(self, step: int) -> None:
        """Let messages name a step, and count anew how long this rank waits."""
        self.traffic.step = self.axes[CONTROL].traffic.step = step
        self.traffic.waited = 0.0

    @cached_property
    def place(self) -> Place:
        """Where this rank stands."""
        return self.layout.place(self.rank)


def make_mesh(
    layout: Layout, *, deadline: float = 600, saving_deadline: float = 3600, device: str = "cpu"
) -> Mesh:
    """Make this rank's groups of a layout; all call this together, after ``init_process_group``.

    ``deadline`` is what any collective may take, in seconds. The axis ``saving`` is all ranks in a
    group of its own, on processors: a thread that writes a checkpoint uses it while the others
    train. There a rank may wait, ``saving_deadline`` seconds, until another has written its files.
    ``control`` is all ranks on processors too, for what they decide together.
    Without a process group the layout is that of one process. Raises BadInput for a layout of
    another number of processes.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    if layout.world not in (1, world):
        raise BadInput(
            f"a layout of {layout.world} processes, and there are {world}: start as many"
        )
    traffic, axes = Traffic(), {}
    rank = dist.get_rank() if layout.world > 1 else 0
    made: dict[tuple[str, Parts], dist.ProcessGroup | None] = {}
    for name in (*DENSE, *JOINED):
        parts = tuple(layout.groups(name))
        ranks = _own(parts, rank)
        # Axes of the same groups share them.
        key = name if name in BESIDE else "", parts
        if key not in made:
            made[key] = _make(parts, rank, deadline)
        group = made[key] if len(ranks) > 1 else None
        ways = _make_ways(parts, rank, deadline) if name == "pp" else None
        axes[name] = Axis(name, ranks, ranks.index(rank), group, traffic, ways)
    everyone = (tuple(range(layout.world)),)
    for name, limit in ((SAVING, saving_deadline), (CONTROL, deadline)):
        # Counted apart: it is not training's, and counters are not for two threads at a time.
        group = _make(everyone, rank, limit, backend="gloo")
        axes[name] = Axis(name, everyone[0], rank, group, Traffic())
    return Mesh(layout, rank, axes, traffic, device)


def _own(parts: Parts, rank: int) -> tuple[int, ...]:
    return next(ranks for ranks in parts if rank in ranks)


def _make(
    parts: Parts, rank: int, deadline: float, backend: str | None = None
) -> dist.ProcessGroup | None:
    """Make the group that this rank is in; no rank waits for one that it is not in.

    torch names such a group by its ranks and by how many groups a process has made before. So all
    make as many: a rank that an axis leaves alone, where others have company, makes one too.
    """
    ranks = _own(parts, rank)
    if all(len(others) == 1 for others in parts):
        return None
    return dist.new_group(
        list(ranks),
        timeout=timedelta(seconds=deadline),
        backend="gloo" if len(ranks) == 1 else backend,
        use_local_synchronization=True,
    )


def _make_ways(parts: Parts, rank: int, deadline: float) -> Ways | None:
    """Make a group for messages to later places, and one for those to earlier places.

    On NCCL the messages of a pair of ranks in one group take turns: two that send to each other
    first would wait for ever.
    """
    later, earlier = (_make(parts, rank, deadline) for _ in range(2))
    return Ways(later, earlier) if later is not None and earlier is not None else None


def device_mesh(mesh: Mesh, axis: Literal["shard", "expert_shard"]) -> DeviceMesh:
    """Return an axis as torch's FSDP2 takes it: behind ``dp_replicate``, where that has ranks.

    Its groups are those of the mesh.
    """
    names = ("dp_replicate", axis) if mesh.layout.dp_replicate > 1 else (axis,)
    replicas = [mesh.layout.group_of("dp_replicate", rank) for rank in mesh[axis].ranks]
    ranks = torch.tensor(replicas, dtype=torch.int).T  # [dp_replicate, axis]
    # torch wants a group even of one rank.
    groups = [
        mesh[name].group or dist.new_group([mesh.rank], use_local_synchronization=True)
        for name in names
    ]
    group, ranks = (groups, ranks) if len(groups) > 1 else (groups[0], ranks[0])
    device = torch.device(mesh.device).type
    return DeviceMesh.from_group(group, device, mesh=ranks, mesh_dim_names=names)
