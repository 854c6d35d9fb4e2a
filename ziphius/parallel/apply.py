"""The one place where parallelism is applied to a network, from outside."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from ziphius.config.model import ModelConfig
from ziphius.config.parallel import ParallelConfig
from ziphius.kernels.later import Later
from ziphius.kernels.select import Kernels
from ziphius.model.init import initialise
from ziphius.model.precision import Precision
from ziphius.model.transformer import Transformer
from ziphius.parallel import spread, tensor
from ziphius.parallel.experts import Combine, cut_experts
from ziphius.parallel.fsdp import check_sharding
from ziphius.parallel.mesh import Mesh
from ziphius.parallel.passes import InOne, Passes
from ziphius.parallel.pipeline.actions import Chunk, Schedule
from ziphius.parallel.pipeline.families import fewest, schedule
from ziphius.parallel.pipeline.passes import Pipelined, in_order
from ziphius.parallel.pipeline.stage import build_stages, split_backward
from ziphius.parallel.recompute import apply_recompute
from ziphius.parallel.rectangles import SplitOf
from ziphius.parallel.sequence import apply_sequence
from ziphius.parallel.sharding import Sharding, axes_of


@dataclass(frozen=True)
class Arithmetic:
    """How a network computes, whatever is applied to it."""

    precision: Precision
    kernels: Kernels
    device: str


def apply_parallel(
    model: ModelConfig,
    parallel: ParallelConfig,
    mesh: Mesh,
    how: Arithmetic,
    *,
    seed: int,
    micro_batch_size: int,
    document_mask: bool = False,
) -> Passes:
    """Build what this rank holds of a network, with the initial values of one process.

    Stages of a pipeline first; of these the positions and heads of this rank, and its experts; then
    recomputation, and a backward in two halves where the schedule has one. Raises BadInput for what
    cannot be spread so.
    """
    check_sharding(parallel.sharding, mesh.layout)
    later, table = Later(), _table(parallel, mesh)
    # Nobody has memory for what is cut away.
    cuts = mesh.layout.ep > 1 or mesh.layout.tp > 1
    device = "meta" if cuts else how.device
    if table is None:
        whole = Transformer(model, how.precision, kernels=how.kernels, device=device)
        stages = {Chunk(0, 0): whole}
    else:
        stages = build_stages(
            model,
            table,
            mesh["pp"].place,
            how.precision,
            layout=parallel.layout,
            kernels=how.kernels,
            device=device,
        )
    for part in in_order(stages):
        apply_sequence(part, mesh)
        if mesh.layout.ep > 1:
            combine: Combine = "exact" if mesh.device == "cpu" else "fast"
            cut_experts(part, mesh, combine=combine, chunks=parallel.chunks)
        if cuts:
            part.to_empty(device=how.device)
    split = _cut_of(model, mesh)
    number = 1 if table is None else table.stages
    for chunk, part in stages.items():
        initialise(part, seed, split)
        apply_recompute(part, parallel.recompute_of(chunk.stage, number))
    if table is None:
        return InOne(whole, mesh, micro_batch_size, document_mask=document_mask)
    if _splits(table):
        for part in in_order(stages):
            split_backward(part, later)
    return Pipelined(table, stages, mesh, later, micro_batch_size, document_mask=document_mask)


def held(passes: Passes) -> SplitOf:
    """Return which part of each weight this rank holds, as checkpoints take it."""
    model, mesh = passes.models[0], passes.mesh
    if mesh.layout.tp > 1:
        return _cut_of(model.config, mesh)
    return spread.split_of(model)


def _cut_of(model: ModelConfig, mesh: Mesh) -> SplitOf:
    return partial(tensor.split_of, config=model, tp=mesh.layout.tp, place=mesh.place.tp)


def shard(passes: Passes) -> Sharding:
    """Lay the weights of a rank out for ZeRO-1, and let gradients that wait go there too."""
    table = passes.table if isinstance(passes, Pipelined) else None
    sharding = Sharding(axes_of(passes.models, passes.mesh, table))
    if isinstance(passes, Pipelined):
        passes.later.add = sharding.put_off
    return sharding


def _table(parallel: ParallelConfig, mesh: Mesh) -> Schedule | None:
    """Return the schedule's smallest table, which has the places of all stages."""
    ranks = mesh.layout.pp
    if ranks == 1:
        return None
    stages = None
    if parallel.schedule == "interleaved" and parallel.layout is not None:
        stages = len(parallel.layout.split("|"))
    return schedule(parallel.schedule, ranks, fewest(parallel.schedule, ranks)[0], stages)


def _splits(table: Schedule) -> bool:
    steps = (step for steps in table.steps for step in steps)
    return any(action.kind in "IW" for step in steps for action in step.actions)
