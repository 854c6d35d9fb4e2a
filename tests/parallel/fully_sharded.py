"""Models whose weights are spread over ranks, and steps of them, for several tests."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.parallel.sharded import (
    State,
    state_of,
    train,
)
from tests.support import F64, random_model
from ziphius.config.pretrain import PretrainConfig
from ziphius.model.ffn import MixtureOfExperts
from ziphius.model.precision import Precision
from ziphius.model.transformer import Transformer
from ziphius.parallel.experts import cut_experts
from ziphius.parallel.fsdp import apply_fsdp, named_weights
from ziphius.parallel.layout import Layout
from ziphius.parallel.mesh import Mesh, make_mesh
from ziphius.parallel.recompute import apply_recompute
from ziphius.parallel.spread import Shards
from ziphius.training.fully_sharded import FullyShardedAdamW
from ziphius.training.optimizer import AdamW
from ziphius.training.step import StepResult

Recompute = Literal["none", "selective", "full"]
BF16 = Precision.for_training(torch.bfloat16)
FP8 = Precision.for_fp8_training()


def mesh_of(**layout: int) -> Mesh:
    return make_mesh(Layout.fill(torch.distributed.get_world_size(), **layout))


def skewed_model(**changes: Any) -> Transformer:
    """Expert 5 is a choice of every token, expert 2 of none."""
    model = random_model(**changes)
    for _, _, block in model.blocks():
        if isinstance(block.mlp, MixtureOfExperts):
            block.mlp.gate.e_score_correction_bias[5] += 3
            block.mlp.gate.e_score_correction_bias[2] -= 30
    return model


def spread(
    model: Transformer, mesh: Mesh, config: PretrainConfig, recompute: Recompute = "none"
) -> FullyShardedAdamW:
    if mesh.layout.ep > 1:
        cut_experts(model, mesh)
    apply_recompute(model, recompute)
    shards = apply_fsdp(model, mesh, every_pass=recompute == "selective")
    return FullyShardedAdamW(shards, config, model.kernels)


def state(optimizer: FullyShardedAdamW) -> State:
    found = dict(named_weights(optimizer.shards)) | dict(optimizer.named_moments(()))
    return {name: tensor.clone() for name, tensor in found.items()}


def by_one(config: PretrainConfig, **model: Any) -> tuple[list[StepResult], State]:
    one = skewed_model(**{"precision": F64, **model})
    optimizer = AdamW(one.parameters(), config)
    return train(one, optimizer, config), state_of(one, optimizer)


def assert_in_shards(shards: Shards) -> None:
    """Nothing of a weight, a gradient or a moment is here but this rank's part."""
    for name, p in shards.model.named_parameters():
        axis, dim = shards.axes[name], shards.dimension(name)
        assert isinstance(p, DTensor) == (axis.size > 1 or shards.mesh.layout.dp_replicate > 1)
        own = p.to_local() if isinstance(p, DTensor) else p
        whole = shards.shapes[name]
        most = math.ceil(whole[dim] / axis.size) * whole.numel() // whole[dim]
        assert own.numel() <= most
        assert own.untyped_storage().nbytes() == most * p.element_size()
        assert p.grad is None
    for p in shards._gathered:
        assert p.grad is None
        if any(axis.size > 1 for axis in shards.axes.values()) and is_spread(shards, p):
            assert p.untyped_storage().nbytes() == 0


def is_spread(shards: Shards, gathered: Tensor) -> bool:
    return all(gathered is not p for p in shards.model.parameters())


def by_many(
    config: PretrainConfig, model: dict[str, Any], layout: dict[str, int], recompute: Recompute
) -> tuple[list[StepResult], State]:
    mesh = mesh_of(**layout)
    many = skewed_model(**{"precision": F64, **model})
    optimizer = spread(many, mesh, config, recompute)
    results = train(many, optimizer, config, mesh)
    assert_in_shards(optimizer.shards)
    return results, state(optimizer)
