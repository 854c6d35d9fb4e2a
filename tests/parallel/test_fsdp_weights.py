"""Weights that are spread, by their names, and what cannot be spread."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.parallel.fully_sharded import (
    mesh_of,
    skewed_model,
    spread,
    state,
)
from tests.parallel.pool import Pool
from tests.parallel.sharded import (
    State,
    assert_same_results,
    assert_same_state,
    settings,
    sharded,
    state_of,
    train,
)
from tests.support import F64, random_batch, random_model, tiny_config
from ziphius.config.errors import BadInput
from ziphius.config.pretrain import PretrainConfig
from ziphius.kernels.select import Kernels
from ziphius.model.precision import Precision
from ziphius.model.transformer import Transformer
from ziphius.model.weights import ROUTING_BIAS
from ziphius.parallel.fsdp import apply_fsdp, check_sharding, load_weights
from ziphius.parallel.layout import Layout
from ziphius.parallel.mesh import make_mesh
from ziphius.parallel.rectangles import Rectangle, place_of
from ziphius.parallel.spread import held_weights
from ziphius.training.optimizer import AdamW

# Weights and moments by name


def write(config: PretrainConfig) -> State:
    mesh = mesh_of()
    model = skewed_model(precision=F64)
    optimizer = spread(model, mesh, config)
    train(model, optimizer, config, mesh, range(2))
    return state(optimizer)


def go_on(config: PretrainConfig, saved: State, ep: int) -> tuple[Any, ...]:
    mesh = mesh_of(ep=ep)
    model = skewed_model(precision=F64, seed=9)
    optimizer = spread(model, mesh, config)
    with torch.no_grad():  # leaves the weights outside blocks whole, of which the old must not stay
        model.features(random_batch(model.config, 1, 5).tokens_BS)
    read = []

    def reader(name: str) -> Tensor:
        read.append(name)
        return saved[name]

    load_weights(optimizer.shards, reader)
    optimizer.load_moments((), reader)
    optimizer.steps = 2
    assert len(read) == len(set(read))
    again = state(optimizer)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in again.items())
    return train(model, optimizer, config, mesh, range(2, 4)), state(optimizer), len(read)


@pytest.mark.parametrize(("world", "ep"), [(3, 1), (4, 2)])
def test_weights_and_moments_of_two_ranks_go_on_over_others(
    pool: Pool, world: int, ep: int
) -> None:
    config = settings()
    one = skewed_model(precision=F64)
    plain = AdamW(one.parameters(), config)
    results = train(one, plain, config, steps=range(4))
    saved, _ = pool.run(2, write, config)
    after = pool.run(world, go_on, config, saved, ep)
    expected = state_of(one, plain)
    assert set(saved) == set(expected)
    for found, tensors, reads in after:
        assert_same_results(found, results[2:])
        assert_same_state(tensors, {name: expected[name] for name in tensors})
        assert reads < 0.85 * len(saved), "a rank reads what it has a part of"


def covered(moe_width: int) -> list[Rectangle]:
    mesh = mesh_of()
    model = random_model(precision=F64, moe_intermediate_size=moe_width)
    shards = apply_fsdp(model, mesh)
    pieces = list(shards.held(shards.parts()))
    held = dict(held_weights(model))
    for name, offsets, whole, own in pieces:
        assert held[name] is not own
        assert held[name].data_ptr() == own.data_ptr()
        place = place_of(own.shape, shards.split_of(name))
        assert place == (offsets, whole)
    assert set(held) == {piece.name for piece in pieces} | set(shards.biases)
    return [piece._replace(data=piece.data.clone()) for piece in pieces]


@pytest.mark.parametrize("moe_width", [11, 12])
def test_rows_of_all_ranks_are_the_weights(pool: Pool, moe_width: int) -> None:
    model = random_model(precision=F64, moe_intermediate_size=moe_width)
    whole = state_of(model, AdamW([], settings()))
    left = {name: t.clone() for name, t in whole.items() if not name.endswith(ROUTING_BIAS)}
    for rank in pool.run(3, covered, moe_width):
        for name, (start, *zeros), shape, own in rank:
            assert shape == whole[name].shape
            assert not any(zeros)
            rows = slice(start, start + len(own))
            assert torch.equal(own, whole[name][rows])
            left[name][rows] = math.nan
    assert all(tensor.isnan().all() for tensor in left.values())


# What is refused


@pytest.mark.parametrize(
    ("kind", "layout", "said"),
    [
        ("zero2", {}, "'zero1', 'fsdp' or 'hsdp'"),
        ("fsdp", {"pp": 2}, "use 'zero1', or pp = 1"),
        ("hsdp", {"pp": 2, "dp_replicate": 2}, "use 'zero1', or pp = 1"),
        ("fsdp", {"tp": 2}, "use 'zero1', or tp = 1"),
        ("fsdp", {"dp_replicate": 2}, "use 'hsdp', or dp_replicate = 1"),
        ("hsdp", {}, "use 'fsdp', or dp_replicate = 2 or more"),
        ("hsdp", {"dp_replicate": 8}, "use 'zero1', or a smaller dp_replicate"),
    ],
)
def test_pairs_that_cannot_be_are_refused(kind: str, layout: dict[str, int], said: str) -> None:
    with pytest.raises(BadInput, match=said) as refused:
        check_sharding(kind, Layout.fill(8, **layout))
    assert "\n" not in str(refused.value)


def test_pairs_that_can_be_are_not() -> None:
    check_sharding("zero1", Layout.fill(8, pp=2, dp_replicate=2))
    check_sharding("fsdp", Layout.fill(8, cp=2, ep=8))
    check_sharding("hsdp", Layout.fill(8, dp_replicate=2, ep=4))
    check_sharding("fsdp", Layout())


def test_models_that_cannot_be_spread_are_refused() -> None:
    mesh = make_mesh(Layout())
    with pytest.raises(BadInput, match="mixture = 'stages'"):
        apply_fsdp(random_model(kernels=Kernels(mixture="reference")), mesh)
    with pytest.raises(ValueError, match="bfloat16"):
        apply_fsdp(Transformer(tiny_config(), Precision.for_inference(torch.bfloat16)), mesh)
    tied = random_model()
    tied.lm_head.weight = nn.Parameter(tied.embed_tokens.weight.data)
    with pytest.raises(ValueError, match="share memory"):
        apply_fsdp(tied, mesh)
    model = random_model()
    sharded(model, mesh, settings())
    with pytest.raises(ValueError, match="sharded already"):
        apply_fsdp(model, mesh)
