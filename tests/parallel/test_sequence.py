"""Shared rows together with recomputation, pipelines, ZeRO-1 and FP8."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parallel.pool import Pool
from tests.parallel.sharded import SMALL, assert_same_results, settings, sharded, train
from tests.parallel.shared import (
    CLOSE,
    CONFIG,
    equals_one_process,
    own_rows,
    rows_of,
    run,
    skewed_model,
)
from tests.support import F64, random_tokens, randomise, tiny_config
from ziphius.data.heldout import HeldoutRows
from ziphius.data.rows import Batch
from ziphius.kernels.fp8 import Tiled, unread
from ziphius.kernels.later import Later
from ziphius.kernels.loss import IGNORED
from ziphius.kernels.quantize import quantize_tiles
from ziphius.model.init import initialise
from ziphius.model.precision import Precision
from ziphius.model.transformer import Transformer
from ziphius.model.weights import named_weights
from ziphius.parallel.experts import cut_experts
from ziphius.parallel.layout import Layout
from ziphius.parallel.mesh import make_mesh
from ziphius.parallel.passes import InOne
from ziphius.parallel.pipeline.families import schedule
from ziphius.parallel.pipeline.runtime import Pipeline
from ziphius.parallel.pipeline.stage import build_stages
from ziphius.parallel.recompute import apply_recompute
from ziphius.parallel.rows import MicroBatch
from ziphius.parallel.sequence import SharedWidth, apply_sequence
from ziphius.parallel.sharding import Sharding, axes_of
from ziphius.parallel.tensor import gradient_axis, split_of
from ziphius.training.objective import Losses, PreTraining, count_targets, losses
from ziphius.training.optimizer import AdamW
from ziphius.training.sharded import ShardedAdamW
from ziphius.training.validate import bits_per_byte, mtp_agreement
from ziphius.training.validate_together import validate_together

# --- recomputation --------------------------------------------------------------------------------


def recomputed(layout: dict[str, int], how: str) -> None:
    equals_one_process(layout, 10, {}, recompute=how)


@pytest.mark.parametrize("how", ["selective", "full"])
@pytest.mark.parametrize("layout", [{"cp": 2}, {"tp": 2}])
def test_what_is_recomputed_is_the_same(pool: Pool, layout: dict[str, int], how: str) -> None:
    pool.run(2, recomputed, layout, how)


def travels_again(how: Any) -> int:
    mesh = make_mesh(Layout.fill(2, cp=2))
    model = apply_sequence(skewed_model(), mesh)
    apply_recompute(model, how)
    run(model, rows_of(model, 1, 8), slice(None), "unbiased", document_mask=False)
    return mesh.traffic.sent["cp", "all_gather"]


def test_what_is_recomputed_selectively_does_not_travel_again(pool: Pool) -> None:
    once, selective, full = (
        pool.run(2, travels_again, how) for how in ("none", "selective", "full")
    )
    assert selective == once
    assert full == [2 * n for n in once]


# --- pipelines ------------------------------------------------------------------------------------

LENGTH, ROWS, SCALE = 10, 4, 2.0


def counts(batch: Batch) -> dict[str, Any]:
    targets = count_targets(batch, document_mask=True)
    return {
        "mtp_loss_weight": 0.3,
        "target_count": targets,
        "sequence_count": len(batch),
        "document_mask": True,
    }


def in_a_pipeline(name: str, layout: dict[str, int]) -> None:
    """Gradients of cut layers may wait, and activations between stages are of own positions."""
    mesh = make_mesh(Layout.fill(4, pp=2, **layout))
    whole, config = skewed_model(num_hidden_layers=4), settings(balance_loss_weight=0.7)
    batch = rows_of(whole, ROWS, LENGTH)
    expected, _ = losses(whole, batch, config, **counts(batch))
    (expected.total * SCALE).backward()
    table, later = schedule(name, 2, ROWS, None), Later()
    models = build_stages(whole.config, table, mesh["pp"].place, whole.precision, later=later)
    tp = mesh["tp"]
    for model in models.values():
        apply_sequence(model, mesh)
        weights = dict(named_weights(whole))
        for weight_name, tensor in named_weights(model):
            split = split_of(weight_name, model.config, tp.size, tp.place)
            given = weights[weight_name]
            tensor.copy_(given if split is None else split.cut(given))

    pipeline = Pipeline(table, models, mesh["pp"], later, document_mask=True)
    parts = [MicroBatch(rows, counts=True) for rows in batch.split(1)]
    result = pipeline.run(parts, PreTraining(config, **counts(batch)), SCALE)
    sums = mesh["world"].all_reduce(result.sums.clone())
    torch.testing.assert_close(sums[3], expected.total.detach(), **CLOSE)
    ordered = sorted(models.values(), key=lambda model: model.part.first)
    named = {p: (model, n) for model in ordered for n, p in model.named_parameters()}
    for parameter, axis in axes_of(ordered, mesh, table):
        model, own_name = named[parameter]
        where = _global(model, own_name)
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        axis.all_reduce(gradient)
        wanted = whole.get_parameter(where).grad
        split = split_of(own_name, model.config, tp.size, tp.place)
        wanted = wanted if split is None else split.cut(wanted)
        torch.testing.assert_close(gradient, wanted, **CLOSE, msg=lambda m, n=where: f"{n}: {m}")
    assert len(named) > 10


def _global(model: Transformer, name: str) -> str:
    kind, _, rest = name.partition(".")
    index, _, inside = rest.partition(".")
    return name if kind != "layers" else f"layers.{int(index) + model.part.first}.{inside}"


@pytest.mark.parametrize(
    ("name", "layout"),
    [("zb1p", {"tp": 2}), ("dualpipev", {"tp": 2}), ("dualpipe", {"tp": 2}), ("1f1b", {"cp": 2})],
)
def test_in_a_pipeline(pool: Pool, name: str, layout: dict[str, int]) -> None:
    pool.run(4, in_a_pipeline, name, layout)


# --- ZeRO-1 ---------------------------------------------------------------------------------------


def updated_as_one(layout: dict[str, int]) -> None:
    """Two steps of AdamW over shards, clipped: the norm counts every weight once."""
    mesh = make_mesh(Layout.fill(4, **layout))
    config = settings(clip_norm=0.05)
    whole = skewed_model()
    model = apply_sequence(skewed_model(), mesh)
    one = AdamW(whole.parameters(), config)
    many = ShardedAdamW(
        Sharding(axes_of([model], mesh), SMALL), mesh["world"], config, model.kernels
    )
    batch = rows_of(whole, ROWS, LENGTH)
    for _ in range(2):
        one.begin(1)
        many.begin(1)
        run(whole, batch, slice(None), "real", document_mask=True)
        run(model, batch, own_rows(mesh["batch"], ROWS), "real", document_mask=True)
        expected, found = one.measure(), many.measure()
        assert found[0] == pytest.approx(expected[0], rel=1e-9)
        assert expected[1] < 1, "it is clipped"
        one.step(1e-2, expected[1])
        many.step(1e-2, found[1])
        whole.zero_grad()
        model.zero_grad()
    weights, tp = dict(named_weights(whole)), mesh["tp"]
    for name, tensor in named_weights(model):
        split = split_of(name, model.config, tp.size, tp.place)
        wanted = weights[name] if split is None else split.cut(weights[name])
        torch.testing.assert_close(tensor, wanted, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("layout", [{"tp": 2}, {"cp": 2, "tp": 2}])
def test_zero_sums_over_what_each_weight_is_alike(pool: Pool, layout: dict[str, int]) -> None:
    pool.run(4, updated_as_one, layout)


def trained_as_one(layout: dict[str, int]) -> None:
    """Three steps of training from initial values, laid out before there is memory for them."""
    mesh, config = make_mesh(Layout.fill(4, **layout)), settings()
    tp = mesh["tp"]
    model_config = tiny_config(**CONFIG)
    whole = Transformer(model_config, F64)
    initialise(whole, 5)
    model = apply_sequence(Transformer(model_config, F64, device="meta"), mesh)
    if mesh["ep"].size > 1:
        cut_experts(model, mesh)
    model.to_empty(device="cpu")
    initialise(model, 5, lambda name: split_of(name, model_config, tp.size, tp.place))
    expected = train(whole, AdamW(whole.parameters(), config), config)
    found = train(model, sharded(model, mesh, config), config, mesh)
    assert_same_results(found, expected)
    weights = dict(named_weights(whole))
    for name, tensor in named_weights(model):
        split = split_of(name, model_config, tp.size, tp.place)
        wanted = weights[name] if split is None else split.cut(weights[name])
        torch.testing.assert_close(tensor, wanted, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    "layout", [{"tp": 2, "ep": 2}, {"cp": 2, "tp": 2, "ep": 2}, {"cp": 2, "ep": 4}]
)
def test_training_is_that_of_one_process(pool: Pool, layout: dict[str, int]) -> None:
    pool.run(4, trained_as_one, layout)


# --- held-out text --------------------------------------------------------------------------------


def judged(layout: dict[str, int]) -> None:
    mesh = make_mesh(Layout.fill(4, **layout))
    whole, model = skewed_model(vocab_size=13), apply_sequence(skewed_model(vocab_size=13), mesh)
    stream_MS = random_tokens(whole.config, 5, 13)
    tokens_MT, targets_MT = stream_MS[:, :-1], stream_MS[:, 1:].clone()
    targets_MT[3, 9:] = IGNORED
    expected = bits_per_byte(whole, tokens_MT, targets_MT, 60, batch=3)
    assert bits_per_byte(model, tokens_MT, targets_MT, 60, batch=3) == pytest.approx(
        expected, rel=1e-9
    )
    agreed = mtp_agreement(whole, tokens_MT, targets_MT, batch=2)
    assert agreed is not None
    assert 0 < agreed < 1
    assert mtp_agreement(model, tokens_MT, targets_MT, batch=2) == agreed
    rows = HeldoutRows(tokens_MT, targets_MT, 60)
    found = validate_together(InOne(model, mesh, 2), rows)
    assert found.bits_per_byte == pytest.approx(expected, rel=1e-9)
    assert found.mtp_agreement == pytest.approx(agreed, rel=1e-12)


@pytest.mark.parametrize("layout", [{"cp": 2, "tp": 2}, {"tp": 4}, {"cp": 2}])
def test_held_out_text_is_judged_as_by_one(pool: Pool, layout: dict[str, int]) -> None:
    pool.run(4, judged, layout)


# --- FP8 ------------------------------------------------------------------------------------------

FP8: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 96,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "moe_intermediate_size": 128,
    "num_nextn_predict_layers": 1,
    "num_hidden_layers": 2,
}


def gradients(model: Transformer, batch: Batch) -> tuple[Losses, dict[str, Tensor]]:
    found, _ = run(model, batch, slice(None), "unbiased", document_mask=False, scale=32.0)
    return found, {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}


def tame(precision: Precision) -> Transformer:
    """Small weights, as a run starts with: rounding stays small on its way through the layers."""
    return randomise(skewed_model(precision=precision, **FP8), std=0.03, bias_std=3.0)


def in_fp8(layout: dict[str, int]) -> dict[str, tuple[float, float]]:
    """Return of every gradient how far it is from float64, of one process and of several."""
    mesh = make_mesh(Layout.fill(2, **layout))
    precision = Precision.for_fp8_training()
    whole, model = tame(precision), apply_sequence(tame(precision), mesh)
    batch, taken = rows_of(whole, 2, 16), {}

    def keep(who: str, module: Any, args: tuple[Tiled, ...]) -> None:
        taken[who] = args[0]

    for who, one in (("one", whole), ("many", model)):
        one.layers[0].self_attn.kv_b_proj.register_forward_pre_hook(partial(keep, who))
    expected, exact = gradients(tame(F64), batch)
    _, rounded = gradients(whole, batch)
    found, ours = gradients(model, batch)
    # The up-projections meet the codes of one process.
    assert torch.equal(taken["many"].codes.view(torch.uint8), taken["one"].codes.view(torch.uint8))
    assert torch.equal(taken["many"].scales, taken["one"].scales)
    total = mesh["stage"].all_reduce(found.total.detach().clone())
    assert total.item() == pytest.approx(expected.total.item(), rel=5e-3)
    errors = {}
    for name, gradient in ours.items():
        mesh[gradient_axis(name, model.config, mesh.layout)].all_reduce(gradient)
        split = split_of(name, model.config, mesh["tp"].size, mesh["tp"].place)
        wanted, theirs = (
            x if split is None else split.cut(x) for x in (exact[name], rounded[name])
        )
        far = [(x - wanted).norm() / wanted.norm() for x in (theirs, gradient)]
        errors[name] = (far[0].item(), far[1].item())
    return errors


@pytest.mark.parametrize("layout", [{"cp": 2}, {"tp": 2}])
def test_in_fp8(pool: Pool, layout: dict[str, int]) -> None:
    """Several processes round as one does: to the same distance from float64."""
    for errors in pool.run(2, in_fp8, layout):
        assert len(errors) > 40
        for name, (one, many) in errors.items():
            assert many < 1.25 * one + 0.01, name
            assert one < 0.3, name


def tiles_of_a_dense_layer() -> None:
    """Codes and scales arrive as they were sent, and the gradient of every row goes home."""
    mesh = make_mesh(Layout.fill(2, tp=2))
    generator = torch.Generator().manual_seed(mesh.rank)
    u_ND = torch.randn(3, 256, generator=generator).bfloat16()
    tiles = quantize_tiles(u_ND, power_of_two=True)
    value = unread(u_ND, 3, 256).detach().requires_grad_()
    width = SharedWidth(mesh["tp"])
    found = width.gather(Tiled(value, tiles.codes, tiles.scales))
    assert isinstance(found, Tiled)
    own = slice(3 * mesh.rank, 3 * mesh.rank + 3)
    assert torch.equal(found.codes[own].view(torch.uint8), tiles.codes.view(torch.uint8))
    assert torch.equal(found.scales[own], tiles.scales)
    assert found.value.shape == (6, 256)
    dvalue = torch.arange(6.0)[:, None].expand(6, 256).bfloat16()
    found.value.backward(dvalue)
    assert value.grad is not None
    assert torch.equal(value.grad, 2 * dvalue[own])
    # Two bytes a number would be four times 768.
    assert mesh.traffic.sent["tp", "all_gather"] == 3 * 256 + 3 * 2 * 4


def test_tiles_travel_to_dense_layers_as_they_are(pool: Pool) -> None:
    pool.run(2, tiles_of_a_dense_layer)
