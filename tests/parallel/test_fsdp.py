"""Steps with weights spread over ranks are those of one process, and memory is as it should be."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from tests.parallel.fully_sharded import (
    BF16,
    FP8,
    Recompute,
    assert_in_shards,
    by_many,
    by_one,
    mesh_of,
    skewed_model,
    spread,
    state,
)
from tests.parallel.pool import Pool
from tests.parallel.sharded import (
    RATE,
    STEPS,
    State,
    assert_same_results,
    assert_same_state,
    settings,
    sharded,
    state_of,
    train,
)
from tests.support import F32, F64, random_batch, random_model, step_settings
from ziphius.config.pretrain import PretrainConfig
from ziphius.kernels.select import Kernels, compiled_kernels
from ziphius.model.precision import Precision
from ziphius.model.transformer import Transformer
from ziphius.parallel.collectives import Lost
from ziphius.parallel.experts import cut_experts
from ziphius.parallel.fsdp import apply_fsdp
from ziphius.parallel.layout import Layout
from ziphius.parallel.mesh import make_mesh
from ziphius.parallel.passes import InOne
from ziphius.training.fully_sharded import FullyShardedAdamW
from ziphius.training.step import StepResult, train_step


@pytest.mark.parametrize(
    ("world", "layout", "changes", "model", "recompute"),
    [
        (2, {}, {}, {"num_nextn_predict_layers": 2}, "none"),
        (
            3,
            {},
            {"batch_size": 4, "micro_batch_size": 1},
            {"moe_intermediate_size": 12},
            "selective",
        ),
        (4, {"dp_replicate": 2}, {"batch_size": 5, "micro_batch_size": 1}, {}, "full"),
        (4, {"ep": 2}, {"batch_size": 6, "micro_batch_size": 1}, {}, "selective"),
        (4, {"ep": 4}, {"batch_size": 4}, {"num_hidden_layers": 2}, "full"),
        (4, {"ep": 2, "dp_replicate": 2}, {"batch_size": 4}, {"num_hidden_layers": 2}, "none"),
    ],
    ids=[
        "2",
        "3, a blank pass, experts cut along rows",
        "2x2, a row or two each",
        "experts on 2 of 4",
        "experts on 4",
        "2x2, experts on 2",
    ],
)
def test_steps_equal_those_of_one_process(
    pool: Pool,
    world: int,
    layout: dict[str, int],
    changes: dict[str, int],
    model: dict[str, int],
    recompute: Recompute,
) -> None:
    config = settings(**changes)
    results, expected = by_one(config, **model)
    assert any(r.grad_norm > config.clip_norm for r in results), "clipping takes part"
    found = pool.run(world, by_many, config, model, layout, recompute)
    seen: set[str] = set()
    for same, tensors in found:
        assert_same_results(same, results)
        assert_same_state(tensors, {name: expected[name] for name in tensors})
        assert len(tensors) == len(expected) or layout.get("ep", 1) > 1
        seen |= set(tensors)
        # Bits, as ranks that drift apart are never brought together again.
        assert same == found[0][0]
        assert all(torch.equal(t, found[0][1].get(name, t)) for name, t in tensors.items())
    assert seen == set(expected)
    loads = results[0].loads[1]
    assert loads[2] == 0
    assert loads[5] == max(loads)


def test_in_float32_steps_are_those_of_one_process_up_to_its_rounding(pool: Pool) -> None:
    config = settings()
    results, expected = by_one(config, precision=F32)
    for found, tensors in pool.run(2, by_many, config, {"precision": F32}, {}, "none"):
        for a, b in zip(found, results, strict=True):
            assert a.loss == pytest.approx(b.loss, rel=1e-5)
            assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-4)
        for name, tensor in tensors.items():
            assert tensor.dtype == torch.float32
            if not name.startswith(("first.", "second.")):
                # Adam's first steps are as long as the rate however small a gradient is.
                torch.testing.assert_close(tensor, expected[name], rtol=0, atol=RATE / 10)


def test_one_process_spreads_nothing() -> None:
    config = settings()
    results, expected = by_one(config)
    model, mesh = skewed_model(precision=F64), make_mesh(Layout())
    optimizer = spread(model, mesh, config, "selective")
    assert_same_results(train(model, optimizer, config, mesh), results)
    assert_same_state(state(optimizer), expected)


# Kernels and forms that know where a weight lies


def both(
    config: PretrainConfig, precision: Precision, folder: str | None, ep: int
) -> tuple[list[StepResult], State, list[StepResult], State]:
    """Train the same by FSDP and by ZeRO-1."""
    mesh = mesh_of(ep=ep)
    kernels = Kernels() if folder is None else compiled_kernels(Path(folder))
    models = [skewed_model(precision=precision, kernels=kernels) for _ in range(2)]
    ours = spread(models[0], mesh, config, "selective")
    if ep > 1:
        cut_experts(models[1], mesh)
    theirs = sharded(models[1], mesh, config)
    found = train(models[0], ours, config, mesh)
    expected = train(models[1], theirs, config, mesh)
    assert_in_shards(ours.shards)
    return found, state(ours), expected, state_of(models[1], theirs)


@pytest.mark.parametrize("compiled", [False, True], ids=["torch", "compiled"])
@pytest.mark.parametrize("precision", [BF16, FP8], ids=["bf16", "fp8"])
def test_derived_forms_are_those_of_the_new_weights(
    pool: Pool, kernel_folder: Path, precision: Precision, compiled: bool
) -> None:
    """A sum of two is the same in any order, so that over two ranks all bits are ZeRO-1's.

    A form that was kept over an update would be far off.
    """
    if compiled:
        compiled_kernels(kernel_folder)  # built once
    config = settings(clip_norm=1e9, micro_batch_size=4)
    folder = str(kernel_folder) if compiled else None
    for found, tensors, results, expected in pool.run(2, both, config, precision, folder, 1):
        assert [r.loss for r in found] == [r.loss for r in results]
        assert found[-1].loss < found[0].loss
        assert set(tensors) == set(expected)
        for name, tensor in expected.items():
            assert torch.equal(tensors[name], tensor), name


def test_experts_of_one_rank_in_fp8(pool: Pool) -> None:
    config = settings(clip_norm=1e9, micro_batch_size=4)
    for found, tensors, results, expected in pool.run(2, both, config, FP8, None, 2):
        assert [r.loss for r in found] == [r.loss for r in results]
        assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())


def kept(precision: Precision) -> tuple[int, set[tuple[int, ...]], int]:
    """Look between forward and backward."""
    mesh = mesh_of()
    model = random_model(precision=precision)
    matrices = {tuple(p.shape) for _, _, b in model.blocks() for p in b.parameters() if p.ndim > 1}
    shards = apply_fsdp(model, mesh)
    copies: set[tuple[int, ...]] = set()
    known = shards._gathered

    def pack(tensor: Tensor) -> Tensor:
        shape, place = tuple(tensor.shape), tensor.untyped_storage().data_ptr()
        weights = {p.untyped_storage().data_ptr() for p in known}
        if (shape in matrices or shape[::-1] in matrices) and place not in weights:
            copies.add(shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        features = model.features(random_batch(model.config, 2, 18).tokens_BS)
    outer = {*model.embed_tokens.parameters(), *model.lm_head.parameters()}
    outer |= {p for m in (model.norm, *model.mtp) for p in m.parameters(recurse=False)}
    whole = [p for p in shards._gathered if p.untyped_storage().nbytes() and p.ndim > 1]
    assert {id(p) for p in whole} == {id(p) for p in outer if p.ndim > 1}
    features.hidden_BTD.sum().backward()
    assert_in_forms(model)
    return len(whole), copies, len(known)


def assert_in_forms(model: Transformer) -> None:
    for module in model.modules():
        assert not getattr(getattr(module, "derived", None), "_kept", {})


@pytest.mark.parametrize("precision", [F64, BF16, FP8], ids=["float64", "bf16", "fp8"])
def test_between_the_passes_no_block_has_its_weights_in_any_form(
    pool: Pool, precision: Precision
) -> None:
    for whole, copies, known in pool.run(2, kept, precision):
        assert whole == 2, "embedding and head"
        assert known > 30
        assert not copies


def written_behind_its_back() -> list[float]:
    mesh = mesh_of()
    model = random_model(precision=F64)
    rows = dict(apply_fsdp(model, mesh).weights())
    tokens_BS = random_batch(model.config, 2, 9).tokens_BS
    found = []
    for _ in range(2):
        with torch.no_grad():
            hidden_ND = model.features(tokens_BS).hidden_BTD.flatten(0, 1)
            nats = model.cross_entropy(hidden_ND, tokens_BS[:, 1:].flatten())
            rows["lm_head.weight"].zero_()
        found.append(float(nats) / len(hidden_ND))
    return found


def test_a_pass_takes_the_weights_that_there_are(pool: Pool) -> None:
    """Also where the one before it had no backward, and left the outermost weights whole."""
    for before, after in pool.run(2, written_behind_its_back):
        assert before != pytest.approx(math.log(61))
        assert after == pytest.approx(math.log(61))


# What is sent


def sent(layout: dict[str, int], every_pass: bool) -> tuple[dict[tuple[str, str], int], int, int]:
    mesh, config = mesh_of(**layout), settings(micro_batch_size=1)
    model = random_model(precision=F64)
    shards = apply_fsdp(model, mesh, every_pass=every_pass)
    whole: list[int] = []
    features = model.features

    def watched(*args: Any, **named: Any) -> Any:
        whole.append(sum(p.grad.numel() for p in shards._gathered if p.grad is not None))
        return features(*args, **named)

    model.features = watched  # type: ignore[method-assign]
    train(model, FullyShardedAdamW(shards, config), config, mesh, range(1))
    own = sum(p.untyped_storage().nbytes() for p in shards.parts().values())
    return dict(mesh.traffic.sent), own, max(whole)


@pytest.mark.parametrize("every_pass", [False, True])
@pytest.mark.parametrize("replicas", [1, 2])
def test_gradients_are_summed_once_a_step_or_in_every_pass(
    pool: Pool, replicas: int, every_pass: bool
) -> None:
    passes = 8 // (2 * replicas)
    times = passes if every_pass else 1
    layout = {"dp_replicate": replicas}
    for bytes_sent, own, whole in pool.run(2 * replicas, sent, layout, every_pass):
        reduced = sum(n for (_, what), n in bytes_sent.items() if what == "reduce_scatter")
        assert reduced == own * times
        assert (whole == 0) == every_pass
        if replicas > 1:
            assert bytes_sent["dp_replicate", "all_reduce"] == own * times
        gathered = sum(n for (_, what), n in bytes_sent.items() if what == "all_gather")
        assert passes * own < gathered <= 2 * passes * own, "for forward, and again for backward"


# Failures


def poisoned(where: str) -> tuple[list[StepResult], State]:
    """Something is not finite on rank 1 in the first step, and all is well in the others."""
    mesh, config = mesh_of(), settings()
    model = skewed_model(precision=F64)
    optimizer = spread(model, mesh, config)
    rate, results = step_settings(config, RATE), []
    for number in (7, *range(STEPS)):
        if where == "loss":
            hook = model.layers[0].register_forward_hook(lambda *a: (a[2][0] * math.nan, a[2][1]))
        else:
            hook = model.layers[1].register_forward_hook(lambda *a: infinite_gradient(a[2]))
        if number != 7 or mesh.rank != 1:
            hook.remove()
        batch = random_batch(model.config, config.batch_size, 11, seed=number)
        passes = InOne(model, mesh, config.micro_batch_size)
        results.append(train_step(passes, optimizer, batch, config, rate))
        hook.remove()
    return results, state(optimizer)


def infinite_gradient(output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
    x_BTD = output[0].clone()
    x_BTD.register_hook(lambda g: g * math.inf)
    return x_BTD, output[1]


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_on_one_rank_makes_all_skip(pool: Pool, where: str) -> None:
    results, expected = by_one(settings())
    for found, tensors in pool.run(2, poisoned, where):
        assert found[0].skipped is not None
        assert math.isfinite(found[0].loss) == (where == "gradient")
        assert_same_results(found[1:], results)
        assert_same_state(tensors, expected)


def broken(inside: str) -> tuple[list[StepResult], State]:
    """The second pass of a step fails on all ranks; then steps go on."""
    mesh, config = mesh_of(), settings()
    model = skewed_model(precision=F64)
    optimizer = spread(model, mesh, config)
    batch = random_batch(model.config, config.batch_size, 11, seed=7)
    passes, calls = InOne(model, mesh, config.micro_batch_size), 0

    def fail(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt

    if inside == "forward":
        hook = model.layers[1].register_forward_hook(fail)
    else:
        hook = model.layers[1].self_attn.register_full_backward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        train_step(passes, optimizer, batch, config, step_settings(config, RATE))
    hook.remove()
    return train(model, optimizer, config, mesh), state(optimizer)


@pytest.mark.parametrize("inside", ["forward", "backward"])
def test_after_a_step_that_failed_the_next_is_what_it_would_have_been(
    pool: Pool, inside: str
) -> None:
    if not hasattr(FSDPModule, "reset_iter_state"):  # it is refused, and said
        with pytest.raises(AssertionError, match=r"torch before 2\.13 cannot go on"):
            pool.run(2, broken, inside)
        return
    results, expected = by_one(settings())
    for found, tensors in pool.run(2, broken, inside):
        assert_same_results(found, results)
        assert_same_state(tensors, expected)


def test_passes_are_those_that_were_announced() -> None:
    model = random_model(precision=F64)
    shards = apply_fsdp(model, make_mesh(Layout()))
    tokens_BS = random_batch(model.config, 1, 5).tokens_BS
    shards.begin(1)
    with pytest.raises(RuntimeError, match="0 of 1"):
        shards.end()
    model.features(tokens_BS)
    with torch.no_grad():
        model.features(tokens_BS)
    shards.end()
    with pytest.raises(RuntimeError, match="call begin first"):
        model.features(tokens_BS)


def deserted() -> str:
    mesh = make_mesh(Layout.fill(2), deadline=0.5)
    model = random_model()
    apply_fsdp(model, mesh)
    mesh.traffic.step = 7
    if mesh.rank == 0:
        with pytest.raises(Lost) as lost:
            model.features(random_batch(model.config, 1, 5).tokens_BS)
        return str(lost.value)
    time.sleep(1)
    return ""


def test_who_waits_for_weights_in_vain_says_so(pool: Pool) -> None:
    said, _ = pool.run(2, deserted)
    assert "rank 0: all_gather of weights over shard (ranks 0 1) failed at step 7" in said
