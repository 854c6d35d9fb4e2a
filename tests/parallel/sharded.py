"""Steps of training over ranks and in one process, and what is compared of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support import F64, random_batch, random_model, step_settings
from ziphius.config.pretrain import PretrainConfig
from ziphius.model.transformer import Transformer
from ziphius.model.weights import ROUTING_BIAS, named_weights
from ziphius.parallel.collectives import Axis, Traffic
from ziphius.parallel.layout import Layout
from ziphius.parallel.mesh import Mesh, make_mesh
from ziphius.parallel.passes import InOne
from ziphius.parallel.sharding import Sharding, axes_of
from ziphius.training.optimizer import AdamW, Optimizer
from ziphius.training.sharded import ShardedAdamW
from ziphius.training.step import StepResult, train_step

RATE = 2e-3
STEPS = 3
SMALL = 2**14  # bytes of a bucket: there are many, and matrices lie in several
State = dict[str, Tensor]


def settings(**changes: Any) -> PretrainConfig:
    given: dict[str, Any] = {
        "steps": 50,
        "batch_size": 8,
        "micro_batch_size": 2,
        "sequence_length": 10,
        "learning_rate": RATE,
        "final_learning_rate": 1e-4,
        "bias_update_speed": 0.01,
        "balance_loss_weight": 0.01,
        "clip_norm": 0.5,
        "moments": "float32",
    }
    return PretrainConfig(**{**given, **changes})


def alone(size: int = 1, place: int = 0) -> Axis:
    return Axis("dp", tuple(range(size)), place, None, Traffic())


def sharded(
    model: Transformer, mesh: Mesh, config: PretrainConfig, bucket_bytes: int = SMALL
) -> ShardedAdamW:
    sharding = Sharding(axes_of([model], mesh), bucket_bytes)
    return ShardedAdamW(sharding, mesh["world"], config, model.kernels)


def state_of(model: Transformer, optimizer: Optimizer) -> State:
    found = dict(named_weights(model)) | dict(optimizer.named_moments(named_weights(model)))
    return {name: tensor.clone() for name, tensor in found.items()}


def train(
    model: Transformer,
    optimizer: Optimizer,
    config: PretrainConfig,
    mesh: Mesh | None = None,
    steps: range = range(STEPS),
) -> list[StepResult]:
    rate = step_settings(config, RATE)
    passes = InOne(model, mesh or make_mesh(Layout()), config.micro_batch_size)
    return [
        train_step(
            passes,
            optimizer,
            random_batch(model.config, config.batch_size, 11, seed=number),
            config,
            rate,
        )
        for number in steps
    ]


def by_one(config: PretrainConfig, **model: Any) -> tuple[list[StepResult], State]:
    one = random_model(precision=F64, **model)
    optimizer = AdamW(one.parameters(), config)
    return train(one, optimizer, config), state_of(one, optimizer)


def by_many(config: PretrainConfig, model: dict[str, Any], layout: dict[str, int]) -> Any:
    mesh = make_mesh(Layout.fill(torch.distributed.get_world_size(), **layout))
    one = random_model(precision=F64, **model)
    optimizer = sharded(one, mesh, config)
    return train(one, optimizer, config, mesh), state_of(one, optimizer)


def assert_same_results(found: list[StepResult], expected: list[StepResult]) -> None:
    for a, b in zip(found, expected, strict=True):
        for name, value in vars(b).items():
            given = getattr(a, name)
            near = isinstance(value, float)
            assert given == (pytest.approx(value, rel=1e-9) if near else value), name


def assert_same_state(found: State, expected: State) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        torch.testing.assert_close(
            found[name], tensor, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )
        if name.endswith(ROUTING_BIAS):
            assert torch.equal(found[name], tensor), name
