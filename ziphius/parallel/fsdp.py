"""FSDP2 and HSDP: weights, gradients and moments are spread over ranks, weights whole in use only.

torch's ``fully_shard`` brings a block's weights together before its forward and its backward pass
and sums gradients behind it. What stands here says which weights go together, over which ranks,
and how they leave by their Hugging Face names. Routed experts are shared by the ranks that hold the
same ones; everything else by all ranks of a replica. With ``dp_replicate`` > 1 (HSDP) replicas hold
the same shards, and sum their gradients once more.

ZeRO-1 (``sharding.py``) is the report's and the only one for pipelines, which need gradients kept
whole until all micro-batches are through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import Shard

from ziphius.config.errors import BadInput
from ziphius.kernels.later import Later
from ziphius.model.derived import Derived
from ziphius.model.ffn import MixtureOfExperts
from ziphius.model.transformer import Features, Transformer
from ziphius.parallel.collectives import ALL_GATHER, REDUCE_SCATTER, Axis
from ziphius.parallel.layout import Layout
from ziphius.parallel.ledger import shadow
from ziphius.parallel.mesh import Mesh, device_mesh
from ziphius.parallel.pipeline.stage import SPLIT_GROUPED, SPLIT_LINEAR, split_backward
from ziphius.parallel.spread import Shards, experts_of


def check_sharding(kind: str, layout: Layout) -> None:
    """Refuse a kind of sharding that a layout cannot have. Raises BadInput with the nearest."""
    said = f"parallel.sharding = '{kind}'"
    if kind == "zero1":
        return
    if kind not in ("fsdp", "hsdp"):
        raise BadInput(f"{said}: use 'zero1', 'fsdp' or 'hsdp'")
    if layout.pp > 1:
        raise BadInput(
            f"{said} with pp = {layout.pp}: a pipeline keeps gradients whole until all its "
            "micro-batches are through; use 'zero1', or pp = 1"
        )
    if layout.tp > 1:
        raise BadInput(
            f"{said} with tp = {layout.tp}: weights that tp holds alike would miss a part of their "
            "gradients; use 'zero1', or tp = 1"
        )
    if kind == "fsdp" and layout.dp_replicate > 1:
        raise BadInput(
            f"{said} with dp_replicate = {layout.dp_replicate}: use 'hsdp', or dp_replicate = 1"
        )
    if kind == "hsdp" and layout.dp_replicate == 1:
        raise BadInput(f"{said} with dp_replicate = 1: use 'fsdp', or dp_replicate = 2 or more")
    if kind == "hsdp" and layout.dp_shard * layout.cp == 1:
        raise BadInput(
            f"{said} with dp_shard * cp = 1: replicas of one rank have nothing to spread; use "
            "'zero1', or a smaller dp_replicate"
        )


def apply_fsdp(model: Transformer, mesh: Mesh, *, every_pass: bool = False) -> Shards:
    """Spread a whole model's parameters over the ranks of a mesh, in place; its values are kept.

    Experts are cut before (``cut_experts``), and recomputation is applied before: this comes last.
    Blocks are brought together for ``forward`` as a whole, so that their stages cannot be called
    one by one. On one rank nothing is spread.

    Gradients are summed over ranks once a step; until then those of several passes add up whole,
    in the weights' dtype. With ``every_pass`` they are summed in each and add up in shards: nothing
    whole stays, and as many times as much is sent.

    Raises BadInput for layouts that ``check_sharding`` refuses, and for kernels that note where
    weights lie.
    """
    replicas = mesh.layout.dp_replicate
    check_sharding("hsdp" if replicas > 1 else "fsdp", mesh.layout)
    if model.kernels.function("mixture") is not None:
        raise BadInput(
            f"kernels: mixture = {model.kernels.mixture} notes where weights lie, and sharded ones "
            "come and go: use mixture = 'stages'"
        )
    shards = Shards(model, mesh, every_pass=every_pass)
    object.__setattr__(model, "shards", shards)
    if mesh.layout.world > 1:
        _keep_no_copies(model)
        _spread(model, shards)
    _count_passes(model, shards)
    return shards


def named_weights(shards: Shards) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, tensor) of every weight, routing biases included: see ``gathered``.

    Where experts are on several ranks of ``ep``, each yields its own.
    """
    yield from shards.gathered(shards.parts())
    yield from shards.biases.items()


def load_weights(shards: Shards, read: Callable[[str], Tensor]) -> None:
    """Set every weight to what ``read`` returns by its name; a rank reads what it has rows of."""
    shards.load(shards.parts(), read)
    for name, bias_E in shards.biases.items():
        bias_E.copy_(read(name))


def _spread(model: Transformer, shards: Shards) -> None:
    mesh = shards.mesh
    dims = {p: shards.dimension(name) for name, p in model.named_parameters()}
    dense, experts = device_mesh(mesh, "shard"), device_mesh(mesh, "expert_shard")
    # Whoever alone has an expert keeps it as it is.
    alone = set(experts_of(model)) if experts.size() == 1 else set()

    def unit(module: nn.Module, over: Any, axis: Axis) -> None:
        fully_shard(
            module, mesh=over, ignored_params=alone, shard_placement_fn=lambda p: Shard(dims[p])
        )
        _sum_by(cast("FSDPModule", module), axis, mesh["dp_replicate"])
        module.register_forward_pre_hook(lambda m, _: shards.remember(m))

    for _, depth, block in model.blocks():
        if isinstance(block.mlp, MixtureOfExperts) and not alone:
            unit(block.mlp.experts, experts, mesh["expert_shard"])
        unit(block, dense, mesh["shard"])
        if depth:
            unit(model.mtp[depth - 1].eh_proj, dense, mesh["shard"])
    unit(model, dense, mesh["shard"])
    register_fsdp_forward_method(model, "features")
    for module in model.modules():
        derived = getattr(module, "derived", None)
        if isinstance(derived, Derived) and alone.isdisjoint(module.parameters()):
            derived.passing = True


def _sum_by(module: FSDPModule, axis: Axis, replicas: Axis) -> None:
    """Sum gradients, which losses have divided by the counts of the global batch; count bytes."""
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)
    module.set_custom_all_gather(cast("Any", _Gather(axis)))
    module.set_custom_reduce_scatter(cast("Any", _Scatter(axis)))
    if replicas.size > 1:
        traffic, share = replicas.traffic, 2 * (replicas.size - 1)
        module.set_all_reduce_hook(
            lambda x: traffic.count(replicas.name, "all_reduce", x.nbytes * share // replicas.size)
        )


class _Communication:
    def __init__(self, axis: Axis) -> None:
        self.axis = axis

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _Gather(_Communication):
    """torch's all-gather, counted and named as those of ``Axis``."""

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        axis = self.axis
        axis.traffic.count(axis.name, "all_gather", input_tensor.nbytes * (axis.size - 1))
        with axis.named("all_gather of weights"):
            return ALL_GATHER(output_tensor, input_tensor, group, async_op)


class _Scatter(_Communication):
    """torch's reduce-scatter, likewise."""

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> dist.Work | None:
        axis = self.axis
        sent = input_tensor.nbytes * (axis.size - 1) // axis.size
        axis.traffic.count(axis.name, "reduce_scatter", sent)
        with axis.named("reduce_scatter of gradients"):
            return REDUCE_SCATTER(output_tensor, input_tensor, op, group, async_op)


def _count_passes(model: Transformer, shards: Shards) -> None:
    features = model.features

    def counted(model: Transformer, *args: Any, **named: Any) -> Features:
        if torch.is_grad_enabled():
            shards.forward()
        if isinstance(model, FSDPModule):
            model.reshard()  # what the last pass without backward has left may be old
        found: Features = features(*args, **named)
        shards.remember(model)
        return found

    shadow(model, "features", counted)


def _keep_no_copies(model: Transformer) -> None:
    """Let products keep a weight itself for backward, not what it was cast to.

    torch would hold the casts of all blocks at once, whole. Their own backward casts again; it is
    the one that could leave weight gradients to a queue, which is never open here.
    """
    chosen = model.kernels
    if chosen.linear in SPLIT_LINEAR and chosen.grouped in SPLIT_GROUPED:
        split_backward(model, Later())
