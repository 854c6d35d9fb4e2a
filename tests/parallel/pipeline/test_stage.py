"""A model cut into stages: whose blocks are whose, what ranks share, and backward in two halves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support import F32, F64, random_batch, random_model, tiny_config
from ziphius.config.errors import BadInput
from ziphius.config.pretrain import PretrainConfig
from ziphius.kernels.cpu.library import Library
from ziphius.kernels.later import Later
from ziphius.kernels.select import Kernels
from ziphius.model.init import initialise
from ziphius.model.part import Part
from ziphius.model.precision import Precision
from ziphius.model.transformer import Transformer
from ziphius.model.weights import named_weights
from ziphius.parallel.collectives import Axis, Traffic
from ziphius.parallel.layout import DENSE, Layout
from ziphius.parallel.mesh import JOINED, Mesh
from ziphius.parallel.pipeline.families import NAMES, schedule
from ziphius.parallel.pipeline.stage import (
    build_stages,
    parts,
    read_layout,
    split_backward,
)
from ziphius.parallel.recompute import apply_recompute
from ziphius.parallel.sharding import axes_of
from ziphius.training.objective import losses

# Layouts


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.integers(0, 2), st.integers(0, 2))
def test_a_layout_is_what_it_says(shares: list[int], first: int, last: int) -> None:
    shares = [first, *shares, last]
    text = "|".join(map(str, shares))
    assert read_layout(text, sum(shares), len(shares)) == tuple(shares)


def test_equal_shares() -> None:
    assert read_layout(None, 12, 4) == (3, 3, 3, 3)


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        (None, "11 blocks do not lie in equal shares on 4 stages"),
        ("3|4|4", "has 3 stages, and the schedule has 4"),
        ("3|3|3|3", "has 12 blocks, and the model has 11"),
        ("3|0|4|4", "between the first and the last needs a block"),
        ("3|x|4|4", "numbers of blocks"),
        ("3|-1|4|5", "numbers of blocks"),
        ("", "numbers of blocks"),
    ],
)
def test_a_layout_that_does_not_add_up_is_refused(layout: str | None, said: str) -> None:
    with pytest.raises(BadInput) as refusal:
        read_layout(layout, 11, 4)
    assert said in str(refusal.value)
    advice = str(refusal.value).split("as in '")[1].rstrip("'")
    assert advice == "3|3|3|2"
    assert sum(read_layout(advice, 11, 4)) == 11


@pytest.mark.parametrize(("layers", "stages"), [(1, 2), (3, 4), (2, 4), (4, 6), (1, 3)])
def test_the_layout_that_is_named_for_few_blocks_works(layers: int, stages: int) -> None:
    with pytest.raises(BadInput) as refusal:
        read_layout(None, layers, stages)
    advice = str(refusal.value).split("as in '")[1].rstrip("'")
    assert sum(read_layout(advice, layers, stages)) == layers


@pytest.mark.parametrize("layout", [None, "1|1|1|1|0|0|0|0"])
def test_too_few_blocks_for_any_layout_are_refused(layout: str | None) -> None:
    with pytest.raises(BadInput, match="4 blocks fill 6 stages at most, of 8"):
        read_layout(layout, 4, 8)
    with pytest.raises(BadInput, match="smaller parallel"):
        read_layout(layout, 0, 4)


# Parts


def test_parts_have_what_is_theirs() -> None:
    first, middle, last = parts(tiny_config(num_hidden_layers=11), 3, "3|4|4")
    assert first == Part(0, 3, begins=True, ends=False, embeds=True)
    assert middle == Part(3, 7, begins=False, ends=False, embeds=False)
    assert last == Part(7, 11, begins=False, ends=True, embeds=True)
    *_, without = parts(tiny_config(num_nextn_predict_layers=0), 3)
    assert not without.embeds


def test_blocks_weights_and_initial_values_are_those_of_the_whole() -> None:
    config = tiny_config(num_hidden_layers=5)
    model = Transformer(config, F32)
    initialise(model, 3)
    expected, places = dict(named_weights(model)), []
    seen: Counter[str] = Counter()
    for part in parts(config, 3, "1|3|1"):
        stage = Transformer(config, F32, part=part)
        initialise(stage, 3)
        places += [(layer, depth) for layer, depth, _ in stage.blocks()]
        for name, tensor in named_weights(stage):
            assert torch.equal(tensor, expected[name]), name
            seen[name] += 1
    assert places == [(layer, depth) for layer, depth, _ in model.blocks()]
    assert seen.keys() == expected.keys()
    assert [name for name, times in seen.items() if times > 1] == ["model.embed_tokens.weight"]


def test_stages_one_after_the_other_are_the_model() -> None:
    config = tiny_config(num_hidden_layers=5)
    model = random_model(config, precision=F64)
    weights, batch = dict(named_weights(model)), random_batch(config, 2, 8)
    expected, x_BTD = model.features(batch.tokens_BS), None
    routings: dict[int, Any] = {}
    for part in parts(config, 3, "0|3|2"):
        stage = Transformer(config, F64, part=part)
        for name, tensor in named_weights(stage):
            tensor.copy_(weights[name])
        features = stage.features(batch.tokens_BS, None, x_BTD)
        x_BTD = features.hidden_BTD
        routings |= features.routings
    assert torch.equal(features.hidden_BTD, expected.hidden_BTD)
    assert torch.equal(features.mtp_hidden[0], expected.mtp_hidden[0])
    assert routings.keys() == expected.routings.keys()


# What ranks share


@pytest.mark.parametrize("mtp", [0, 1])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_shared(name: str, mtp: int) -> None:
    """Copies of a stage in DualPipe, and the embedding where MTP is on another rank."""
    table = schedule(name, 4, 8)
    config = tiny_config(num_hidden_layers=table.stages, num_nextn_predict_layers=mtp)
    layout = Layout.fill(8, pp=4)
    counted, found = 0.0, []
    for rank in range(4):
        models = build_stages(config, table, rank, F32)
        ordered = sorted(models.values(), key=lambda model: model.part.first)
        shared: dict[tuple[int, ...], int] = {}
        for p, axis in axes_of(ordered, mesh_of(layout, 2 * rank), table):
            shared[axis.ranks] = shared.get(axis.ranks, 0) + p.numel()
            counted += 2 * p.numel() / axis.size
        found.append({tuple(r // 2 for r in ranks[::2]): n for ranks, n in shared.items()})
        tables = {m.embed_tokens.weight for m in models.values() if m.part.embeds}
        assert len(tables) <= 1, "chunks of a rank share their table"
    assert counted == sum(p.numel() for p in Transformer(config, F32).parameters())
    if name == "dualpipe":
        assert [set(shared) for shared in found] == [{(0, 3)}, {(1, 2)}, {(1, 2)}, {(0, 3)}]
    elif name in ("zbv", "dualpipev") or not mtp:
        assert [set(shared) for shared in found] == [{(rank,)} for rank in range(4)]
    else:
        assert [set(s) for s in found] == [{(0, 3), (0,)}, {(1,)}, {(2,)}, {(0, 3), (3,)}]
        assert found[0][0, 3] == found[3][0, 3] == config.vocab_size * config.hidden_size


def mesh_of(layout: Layout, rank: int) -> Mesh:
    """Return the mesh that a rank would have, without its groups."""
    axes = {}
    for name in (*DENSE, *JOINED):
        ranks = layout.group_of(name, rank)
        axes[name] = Axis(name, ranks, ranks.index(rank), None, Traffic())
    return Mesh(layout, rank, axes, Traffic(), "cpu")


# Backward in two halves

SETTINGS = PretrainConfig(
    steps=1, batch_size=2, micro_batch_size=2, sequence_length=10, learning_rate=1e-2,
    final_learning_rate=1e-3, balance_loss_weight=0.2,
)  # fmt: skip
FP8 = Precision.for_fp8_training()
BF16 = Precision.for_training(torch.bfloat16)
VARIANTS: dict[str, dict[str, Any]] = {
    "float64": {"precision": F64},
    "float64, selective": {"precision": F64, "recompute": "selective"},
    "float64, full": {"precision": F64, "recompute": "full"},
    "float32": {"precision": F32},
    "bfloat16": {"precision": BF16},
    "bfloat16, grouped_mm": {
        "precision": BF16,
        "kernels": Kernels(grouped="grouped_mm"),
        "moe_intermediate_size": 16,  # others go the way of the loop
    },
    "bfloat16, widened": {"precision": BF16, "kernels": Kernels(linear="widened")},
    "FP8": {"precision": FP8},
    "FP8, selective": {"precision": FP8, "recompute": "selective"},
    "no query latent": {"precision": F64, "q_lora_rank": None},
}


def build(later: Later | None, recompute: str = "none", **changes: Any) -> Transformer:
    model = random_model(num_hidden_layers=2, **changes)
    apply_recompute(model, recompute)  # type: ignore[arg-type]
    if later is not None:
        split_backward(model, later)
    return model


def total(model: Transformer, seed: int) -> Tensor:
    batch = random_batch(model.config, 2, 11, seed=seed)
    parts, _ = losses(
        model, batch, SETTINGS, mtp_loss_weight=0.5, target_count=20, sequence_count=2
    )
    return parts.total


def gradients(model: Transformer) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_both_halves_are_bitwise_the_whole(variant: dict[str, Any]) -> None:
    both_halves_are_the_whole(variant)


@pytest.mark.parametrize("precision", [F64, BF16], ids=["float64", "bfloat16"])
def test_both_halves_of_compiled_products(library: Library, precision: Precision) -> None:
    kernels = Kernels(grouped="cpp", library=library)
    both_halves_are_the_whole({"precision": precision, "kernels": kernels})


def both_halves_are_the_whole(variant: dict[str, Any]) -> None:
    """Run two micro-batches, so that sums are compared too."""
    plain, later = build(None, **variant), Later()
    split = build(later, **variant)
    for seed in range(2):
        total(plain, seed).backward()
        with later.open(seed):
            total(split, seed).backward()
    waiting = gradients(split)
    for seed in range(2):
        later.run(seed)
    expected, found = gradients(plain), gradients(split)
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different, different
    # Whatever is a matrix has waited, but the two that are read without a product in backward.
    matrices = {n for n, p in split.named_parameters() if p.ndim > 1}
    assert matrices - waiting.keys() == matrices - {"embed_tokens.weight", "lm_head.weight"}
    assert all(p.grad is None or p.grad.dtype == p.dtype for p in split.parameters())


def test_a_closed_queue_computes_at_once() -> None:
    plain, later = build(None, precision=F64), Later()
    split = build(later, precision=F64)
    total(plain, 0).backward()
    total(split, 0).backward()
    found = gradients(split)
    assert all(torch.equal(found[n], g) for n, g in gradients(plain).items())
    assert not len(later)


class _Products(TorchDispatchMode):
    """Notes the shapes of all products."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[tuple[int, ...], ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            self.shapes.append((tuple(out.shape), *(tuple(a.shape) for a in args)))
        return out


@contextmanager
def products() -> Iterator[list[tuple[tuple[int, ...], ...]]]:
    with _Products() as mode:
        yield mode.shapes


def test_neither_half_does_a_product_of_the_other() -> None:
    """Every product of a whole backward is in one half; W's have the shapes of weights."""
    later = Later()
    model = build(later, precision=F64)
    shapes = set()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            shapes.add(tuple(parameter.shape[-2:]))
    loss = total(model, 0)
    with products() as whole:
        loss.backward()
    loss = total(model, 0)
    with products() as first, later.open("pass"):
        loss.backward()
    with products() as second:
        later.run("pass")
    assert second
    assert all(shape[0] in shapes for shape in second)
    assert not any(shape[0] in shapes for shape in first)
    assert Counter(whole) == Counter(first) + Counter(second)


def test_kernels_that_cannot_split_are_refused() -> None:
    with pytest.raises(BadInput, match="grouped=reference"):
        build(Later(), kernels=Kernels(grouped="reference"))
