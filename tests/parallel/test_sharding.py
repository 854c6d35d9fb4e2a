"""Steps over ranks are those of one process: losses, weights, moments, biases."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.parallel.pool import Pool
from tests.parallel.sharded import (
    RATE,
    SMALL,
    STEPS,
    State,
    alone,
    assert_same_results,
    assert_same_state,
    by_many,
    by_one,
    settings,
    sharded,
    state_of,
    train,
)
from tests.support import F64, as_batch, random_batch, random_model, step_settings, tiny_config
from ziphius.config.errors import BadInput
from ziphius.config.pretrain import PretrainConfig
from ziphius.kernels.select import compiled_kernels
from ziphius.model.experts import StackedExperts
from ziphius.model.ffn import MixtureOfExperts
from ziphius.model.precision import Precision
from ziphius.model.weights import named_weights
from ziphius.parallel.layout import Layout
from ziphius.parallel.mesh import make_mesh
from ziphius.parallel.passes import InOne
from ziphius.parallel.rows import check_batch, own_micro_batches
from ziphius.parallel.sharding import Sharding, axes_of
from ziphius.training.optimizer import AdamW
from ziphius.training.sharded import ShardedAdamW
from ziphius.training.step import StepResult, train_step


@pytest.mark.parametrize(
    ("world", "layout", "changes", "model"),
    [
        (2, {}, {}, {}),
        (3, {}, {"batch_size": 7, "micro_batch_size": 1}, {"num_nextn_predict_layers": 2}),
        (4, {"dp_replicate": 2}, {"batch_size": 5, "micro_batch_size": 1}, {}),
        (4, {}, {"batch_size": 16, "micro_batch_size": 4}, {"first_k_dense_replace": 3}),
    ],
    ids=["2", "3 and blank passes", "4 and fewer rows than two each", "4 without main experts"],
)
def test_steps_equal_those_of_one_process(
    pool: Pool, world: int, layout: dict[str, int], changes: dict[str, int], model: dict[str, int]
) -> None:
    config = settings(**changes)
    results, state = by_one(config, **model)
    assert any(r.grad_norm > config.clip_norm for r in results), "clipping takes part"
    (first, kept), *others = pool.run(world, by_many, config, model, layout)
    assert_same_results(first, results)
    assert_same_state(kept, state)
    # Bits, as ranks that drift apart are never brought together again.
    for found, shards in others:
        assert found == first
        assert all(torch.equal(shards[name], tensor) for name, tensor in kept.items())


def test_a_sharded_process_alone_is_the_plain_one() -> None:
    config = settings()
    results, state = by_one(config)
    model, mesh = random_model(precision=F64), make_mesh(Layout())
    optimizer = sharded(model, mesh, config)
    assert_same_results(train(model, optimizer, config, mesh), results)
    assert_same_state(state_of(model, optimizer), state)


def test_pieces_and_whole_parameters_get_the_same_bits(kernel_folder: Path) -> None:
    """Only the norm is summed in another order, so nothing is clipped here."""
    kernels = compiled_kernels(kernel_folder)
    config = settings(clip_norm=1e9, moments="bfloat16")
    precision = Precision.for_training(torch.bfloat16)
    one, many = (random_model(precision=precision, kernels=kernels) for _ in range(2))
    mesh = make_mesh(Layout())
    plain, optimizer = AdamW(one.parameters(), config, kernels), sharded(many, mesh, config)
    train(one, plain, config)
    train(many, optimizer, config, mesh)
    expected = state_of(one, plain)
    assert optimizer.sharding.buffers[0].n_buckets > 1
    for name, tensor in state_of(many, optimizer).items():
        assert torch.equal(tensor, expected[name]), name


def test_a_model_whose_sharding_is_closed_trains_as_any_other() -> None:
    config = settings()
    model = random_model(precision=F64)
    optimizer = sharded(model, make_mesh(Layout()), config)
    optimizer.sharding.close()
    results = train(model, AdamW(model.parameters(), config), config)
    assert_same_results(results, by_one(config)[0])


def test_bf16_moments_are_rounded_as_in_one_process(pool: Pool) -> None:
    config = settings(moments="bfloat16")
    _, state = by_one(config)
    for _, found in pool.run(2, by_many, config, {}, {}):
        for name, tensor in state.items():
            assert found[name].dtype == tensor.dtype, name
            # Next to a border, the last bits decide to which side a moment is rounded.
            tolerance = {"rtol": 2**-7, "atol": 1e-6}
            torch.testing.assert_close(found[name], tensor, **tolerance)


# What is sent, and when


def sent(backwards: bool) -> tuple[int, dict[tuple[str, str], int], int]:
    mesh = make_mesh(Layout.fill(2))
    model, config = random_model(precision=F64), settings()
    optimizer = sharded(model, mesh, config)
    started = []
    plain = optimizer.sharding.reduce

    def reduce() -> None:
        started.append(mesh.traffic.sent["dp", "reduce_scatter"])
        plain()

    optimizer.sharding.reduce = reduce  # type: ignore[method-assign]
    if not backwards:
        begin = optimizer.begin
        optimizer.begin = lambda backwards=None: begin()  # type: ignore[method-assign]
    train(model, optimizer, config, mesh, range(1))
    buffers = optimizer.sharding.buffers
    halves = sum(b.shard_size * b.weights.element_size() for b in buffers if b.axis.size > 1)
    return started[0], dict(mesh.traffic.sent), halves


@pytest.mark.parametrize("known", [True, False])
def test_gradients_travel_once_a_step_and_before_its_end_if_it_is_known(
    pool: Pool, known: bool
) -> None:
    for before, bytes_sent, halves in pool.run(2, sent, known):
        reduced = sum(n for (_, what), n in bytes_sent.items() if what == "reduce_scatter")
        gathered = sum(n for (_, what), n in bytes_sent.items() if what == "all_gather")
        assert reduced == gathered == halves
        assert (before > 0.9 * bytes_sent["dp", "reduce_scatter"]) == known


def test_a_gradient_too_many_is_refused() -> None:
    p = nn.Parameter(torch.ones(3))
    sharding = Sharding([(p, alone())])
    sharding.begin(1)
    (p * 2).sum().backward()
    with pytest.raises(RuntimeError, match="call begin first"):
        (p * 2).sum().backward()
    assert sharding.buffers[0].gradients[:3].tolist() == [2, 2, 2]


def test_narrow_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="bfloat16"):
        Sharding([(nn.Parameter(torch.ones(3, dtype=torch.bfloat16)), alone())])


# Failures


def poisoned(where: str) -> tuple[list[StepResult], State, list[tuple[float, float]]]:
    """Something is not finite on rank 1 in the first step, and all is well in the others."""
    mesh = make_mesh(Layout.fill(3))
    model, config = random_model(precision=F64), settings()
    optimizer = sharded(model, mesh, config)
    passes = InOne(model, mesh, config.micro_batch_size)
    rate, judged, results = step_settings(config, RATE), [], []

    def judge(loss: float, norm: float) -> str | None:
        judged.append((loss, norm))
        return None if math.isfinite(loss) and math.isfinite(norm) else "not finite"

    for number in (7, *range(STEPS)):
        handles = []
        if number == 7 and mesh.rank == 1:
            watched = model.lm_head if where == "loss" else model.layers[1].self_attn.o_proj
            if where == "loss":
                handles.append(model.norm.register_forward_hook(lambda *a: a[2] * math.nan))
            else:
                handles.append(watched.weight.register_hook(lambda g: g * math.inf))
        batch = random_batch(model.config, config.batch_size, 11, seed=number)
        results.append(train_step(passes, optimizer, batch, config, rate, judge))
        for handle in handles:
            handle.remove()
    return results, state_of(model, optimizer), judged


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_on_one_rank_makes_all_skip(pool: Pool, where: str) -> None:
    expected, state = by_one(settings())
    for results, found, judged in pool.run(3, poisoned, where):
        assert results[0].skipped == "not finite"
        assert not math.isfinite(judged[0][1])
        assert math.isfinite(judged[0][0]) == (where == "gradient")
        assert_same_results(results[1:], expected)
        assert_same_state(found, state)


def too_small(rows: int) -> str:
    mesh = make_mesh(Layout.fill(3))
    model, config = random_model(precision=F64), settings(batch_size=rows)
    with pytest.raises(BadInput) as refused:
        train(model, sharded(model, mesh, config), config, mesh)
    return str(refused.value)


def test_a_batch_of_fewer_rows_than_ranks_is_refused_with_what_would_work(pool: Pool) -> None:
    for said in pool.run(3, too_small, 2):
        assert "2 rows" in said
        assert "3 or more" in said
        assert "at most 2 ranks" in said
    check_batch(3, 3)


# Rows


@given(st.integers(1, 9), st.integers(0, 40), st.integers(1, 7))
def test_every_row_counts_once_and_all_ranks_make_as_many_passes(
    ranks: int, more: int, size: int
) -> None:
    rows = ranks + more
    batch = as_batch(torch.arange(rows).unsqueeze(1))
    parts = [own_micro_batches(batch, size, alone(ranks, place)) for place in range(ranks)]
    counted = [row for own in parts for part in own if part.counts for row in part.rows.tokens_BS]
    assert [int(row) for row in counted] == list(range(rows))
    assert len({len(own) for own in parts}) == 1
    assert all(1 <= len(part.rows) <= size for own in parts for part in own)
    # Nobody makes a pass that none needs.
    assert any(all(part.counts for part in own) for own in parts)


# Parameters that differ over an axis


def different(ep: int) -> tuple[float, State, State]:
    """Dense and stacked weights of which a rank holds its experts', with gradients of its own."""
    mesh = make_mesh(Layout.fill(4, ep=ep))
    part = mesh["ep"].place
    dense, experts, unused = toy()
    own = nn.Parameter(experts.detach().chunk(ep)[part].clone())
    axes = [(dense, mesh["dp"]), (own, mesh["edp"]), (unused, mesh["dp"])]
    optimizer = ShardedAdamW(Sharding(axes, 256), mesh["world"], settings(weight_decay=0.5))
    for number in range(2):
        given = toy_gradients(number)
        # The ranks of an expert share its gradient, unevenly; of the dense weights only one has it.
        optimizer.begin(1)
        share = [0.25, 0.75] if mesh["edp"].size == 2 else [1.0]
        gradient = given[1].chunk(ep)[part] * share[mesh["edp"].place]
        loss = (own * gradient).sum()
        if mesh.rank == 2:
            loss = loss + (dense * given[0]).sum()
        loss.backward()
        size = optimizer.measure()
        optimizer.step(0.1, size.factor)
    return size.norm, {"dense": dense.detach(), "unused": unused.detach()}, own.detach()


def toy() -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
    draw = torch.Generator().manual_seed(1)
    shapes = ((13, 17), (8, 3, 7), (5, 5))
    drawn = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes)
    return tuple(nn.Parameter(x) for x in drawn)  # type: ignore[return-value]


def toy_gradients(step: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(2 + step)
    shapes = ((13, 17), (8, 3, 7))
    return tuple(torch.randn(s, generator=draw, dtype=torch.float64) for s in shapes)  # type: ignore[return-value]


@pytest.mark.parametrize("ep", [2, 4])
def test_every_parameter_is_in_the_norm_once_and_one_without_gradient_stays(
    pool: Pool, ep: int
) -> None:
    dense, experts, unused = toy()
    before = unused.detach().clone()
    optimizer = AdamW([dense, experts, unused], settings(weight_decay=0.5))
    for number in range(2):
        dense.grad, experts.grad = toy_gradients(number)
        size = optimizer.measure()
        optimizer.step(0.1, size.factor)
    found = pool.run(4, different, ep)
    for rank, (norm, same, own) in enumerate(found):
        assert norm == pytest.approx(size.norm, rel=1e-12)
        torch.testing.assert_close(same["dense"], dense.detach(), rtol=1e-12, atol=1e-12)
        assert torch.equal(same["unused"], before)
        part = rank % ep
        torch.testing.assert_close(own, experts.detach().chunk(ep)[part], rtol=1e-12, atol=1e-12)


# Moments by name


def write(config: PretrainConfig) -> tuple[State, State]:
    mesh = make_mesh(Layout.fill(2))
    model = random_model(precision=F64)
    optimizer = sharded(model, mesh, config)
    train(model, optimizer, config, mesh, range(2))
    weights = {name: tensor.clone() for name, tensor in named_weights(model)}
    return weights, dict(optimizer.named_moments(named_weights(model)))


def go_on(config: PretrainConfig, weights: State, moments: State, bucket_bytes: int) -> Any:
    mesh = make_mesh(Layout.fill(torch.distributed.get_world_size()))
    model = random_model(precision=F64, seed=9)
    optimizer = sharded(model, mesh, config, bucket_bytes)
    with torch.no_grad():
        for name, tensor in named_weights(model):
            tensor.copy_(weights[name])
    read = []

    def reader(name: str) -> Tensor:
        read.append(name)
        return moments[name]

    optimizer.load_moments(named_weights(model), reader)
    optimizer.steps = 2
    again = dict(optimizer.named_moments(named_weights(model)))
    assert all(torch.equal(again[name], moments[name]) for name in moments)
    return train(model, optimizer, config, mesh, range(2, 4)), state_of(model, optimizer), read


@pytest.mark.parametrize("bucket_bytes", [SMALL, 2**20])
def test_moments_of_two_ranks_go_on_over_three(pool: Pool, bucket_bytes: int) -> None:
    config = settings()
    one = random_model(precision=F64)
    optimizer = AdamW(one.parameters(), config)
    results = train(one, optimizer, config, steps=range(4))
    (weights, moments), (_, others) = pool.run(2, write, config)
    assert all(torch.equal(others[name], tensor) for name, tensor in moments.items())
    after = pool.run(3, go_on, config, weights, moments, bucket_bytes)
    for found, state, _ in after:
        assert_same_results(found, results[2:])
        assert_same_state(state, state_of(one, optimizer))
    reads = [len(read) for _, _, read in after]
    if bucket_bytes > SMALL:
        assert max(reads) < 0.7 * len(moments), "a rank reads what it needs"


def part_of_the_experts(moments: State) -> set[str]:
    mesh = make_mesh(Layout.fill(4, ep=2))
    model, place = random_model(precision=F64), mesh["ep"].place
    for _, _, block in model.blocks():
        if isinstance(block.mlp, MixtureOfExperts):
            half = range(place * 4, place * 4 + 4)
            block.mlp.experts.store = StackedExperts(model.config, F64, None, half)
    optimizer = sharded(model, mesh, settings())
    optimizer.load_moments(named_weights(model), moments.__getitem__)
    found = dict(optimizer.named_moments(named_weights(model)))
    assert {b.axis.name for b in optimizer.sharding.buffers} == {"dp", "edp"}
    assert all(torch.equal(tensor, moments[name]) for name, tensor in found.items())
    return set(found)


def test_a_rank_reads_and_gives_the_moments_of_its_own_experts(pool: Pool) -> None:
    plain = AdamW((one := random_model(precision=F64)).parameters(), settings())
    draw = torch.Generator().manual_seed(3)
    moments = {
        name: torch.randn(tensor.shape, generator=draw, dtype=tensor.dtype)
        for name, tensor in plain.named_moments(named_weights(one))
    }
    first, second, *others = pool.run(4, part_of_the_experts, moments)
    assert others == [first, second]
    assert first | second == set(moments)
    assert not any(".mlp.experts." in name for name in first & second)


def test_moments_go_from_one_process_to_shards_and_back() -> None:
    config = settings(moments="bfloat16")
    one, many = random_model(precision=F64), random_model(precision=F64)
    plain, mesh = AdamW(one.parameters(), config), make_mesh(Layout())
    train(one, plain, config)
    optimizer = sharded(many, mesh, config)
    moments = dict(plain.named_moments(named_weights(one)))
    optimizer.load_moments(named_weights(many), moments.__getitem__)
    for name, moment in optimizer.named_moments(named_weights(many)):
        assert torch.equal(moment, moments.pop(name)), name
    assert not moments


def test_gathering_holds_a_bucket_and_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The window over the buckets drops what lies behind it."""
    model = random_model(precision=F64)
    optimizer = sharded(model, make_mesh(Layout()), settings())
    largest = 0
    plain: Callable[..., Tensor] = torch.cat

    def joined(*args: Any) -> Tensor:
        nonlocal largest
        out = plain(*args)
        largest = max(largest, out.numel())
        return out

    monkeypatch.setattr(torch, "cat", joined)
    names = [name for name, _ in optimizer.named_moments(named_weights(model))]
    monkeypatch.undo()
    buffers = optimizer.sharding.buffers
    bound = max(b.bucket for b in buffers) + max(w.numel() for _, w in named_weights(model))
    assert len(names) == len(set(names))
    assert largest <= bound < min(b.shard_size for b in buffers)


# Where weights lie


def test_weights_are_aligned_views_and_changes_are_seen() -> None:
    model = random_model(tiny_config())
    before = {name: tensor.clone() for name, tensor in named_weights(model)}
    version = model.lm_head.weight._version
    sharding = Sharding(axes_of([model], make_mesh(Layout())), SMALL)
    assert all(torch.equal(tensor, before[name]) for name, tensor in named_weights(model))
    assert all(p.data_ptr() % 64 == 0 for p in model.parameters())
    sharding.gather()
    # Derived forms of weights (FP8 tiles, packed copies) are made anew when this number moves.
    assert model.lm_head.weight._version > version


def test_weights_are_free_when_nobody_holds_them() -> None:
    """torch keeps hooks where no collector sees them."""
    sharding = Sharding(axes_of([random_model()], make_mesh(Layout())), SMALL)
    held = weakref.ref(sharding.buffers[0].weights.untyped_storage())
    alone = weakref.ref(sharding)
    del sharding
    gc.collect()
    assert alone() is None
    assert held() is None
